// The sum of each token's terms, in the order of k, in fp32. A place without an expert adds nothing,
// whatever an earlier call left in memory.

constexpr u32 COMBINE_COLUMNS = 8;

// Eight columns of one token.
__device__ inline void combine(const Params& p, u32 token, u32 column) {
    float sums[COMBINE_COLUMNS] = {};
    for (u32 k = 0; k < p.top_k; ++k) {
        const u32 place = token * p.top_k + k;
        if (p.ids[place] < 0) continue;
        const uint4 terms =
            __ldcg(reinterpret_cast<const uint4*>(p.terms + size_t(place) * p.hidden + column));
        const float factor = p.weights_in_combine ? p.weights[place] : 1.0f;
        const u32 words[4] = {terms.x, terms.y, terms.z, terms.w};
        for (u32 n = 0; n < COMBINE_COLUMNS; ++n) {
            const float term = bf16_value(u16(words[n / 2] >> 16 * (n % 2)));
            sums[n] = __fadd_rn(sums[n], __fmul_rn(term, factor));
        }
    }
    uint4 out;
    u32* words = &out.x;
    for (u32 n = 0; n < 4; ++n)
        words[n] = bf16_bits(sums[2 * n]) | u32(bf16_bits(sums[2 * n + 1])) << 16;
    *reinterpret_cast<uint4*>(p.out + size_t(token) * p.hidden + column) = out;
}

// Steps of all tokens.
__device__ inline u32 combine_steps(const Params& p) {
    return p.tokens * (p.hidden / COMBINE_COLUMNS);
}

// The share of thread `thread` of `threads` in all tokens.
__device__ inline void combine_share(const Params& p, u32 thread, u32 threads) {
    const u32 row = p.hidden / COMBINE_COLUMNS;
    for (u32 n = thread; n < combine_steps(p); n += threads)
        combine(p, n / row, n % row * COMBINE_COLUMNS);
}
