// The sum of each token's terms, in the order of k, in fp32; a thread takes 8 columns. A place without
// an expert adds nothing, whatever an earlier call left in memory.

constexpr u32 COMBINE_COLUMNS = 8;

extern "C" __global__ void combine(const Params p) {
    const u32 token = blockIdx.y;
    const u32 column = (blockIdx.x * blockDim.x + threadIdx.x) * COMBINE_COLUMNS;
    if (column >= p.hidden) return;
    float sums[COMBINE_COLUMNS] = {};
    for (u32 k = 0; k < p.top_k; ++k) {
        const u32 place = token * p.top_k + k;
        if (p.ids[place] < 0) continue;
        const uint4 terms =
            *reinterpret_cast<const uint4*>(p.terms + size_t(place) * p.hidden + column);
        const float factor = p.weights_in_combine ? p.weights[place] : 1.0f;
        const u32 words[4] = {terms.x, terms.y, terms.z, terms.w};
        for (u32 n = 0; n < COMBINE_COLUMNS; ++n) {
            const float term = bf16_value(u16(words[n / 2] >> 16 * (n % 2)));
            sums[n] = __fadd_rn(sums[n], __fmul_rn(term, factor));
        }
    }
    u16* out = p.out + size_t(token) * p.hidden + column;
    for (u32 n = 0; n < COMBINE_COLUMNS; ++n) out[n] = bf16_bits(sums[n]);
}
