// The sum of each token's terms, in the order of k, in fp32. A place without an expert adds nothing,
// whatever an earlier call left in memory.

extern "C" __global__ void combine(const Params p) {
    const u32 token = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.hidden) return;
    float sum = 0.0f;
    for (u32 k = 0; k < p.top_k; ++k) {
        const u32 place = token * p.top_k + k;
        if (p.ids[place] < 0) continue;
        const float term = bf16_value(p.terms[size_t(place) * p.hidden + column]);
        const float factor = p.weights_in_combine ? p.weights[place] : 1.0f;
        sum = __fadd_rn(sum, __fmul_rn(term, factor));
    }
    p.out[size_t(token) * p.hidden + column] = bf16_bits(sum);
}
