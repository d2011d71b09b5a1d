// act=nvfp4: tokens before FC1, the intermediate before FC2. A thread takes a block of 16.

extern "C" __global__ void quantise_tokens(const Params p) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (block >= size_t(p.tokens) * p.hidden / BLOCK) return;
    u16* x = p.x + block * BLOCK;
    float y[BLOCK];
    for (u32 n = 0; n < BLOCK; ++n) y[n] = bf16_value(x[n]);
    requantise(y, p.g);
    for (u32 n = 0; n < BLOCK; ++n) x[n] = bf16_bits(y[n]);
}

extern "C" __global__ void quantise_intermediate(const Params p) {
    const u32 columns = p.intermediate / BLOCK;
    const Tile tile = p.tiles[blockIdx.y];
    const float norm_const = p.scalars[tile.expert].norm_const;
    for (u32 n = threadIdx.x; n < tile.count * columns; n += blockDim.x) {
        const size_t at = size_t(tile.first + n / columns) * p.intermediate + n % columns * BLOCK;
        float y[BLOCK];
        for (u32 k = 0; k < BLOCK; ++k) y[k] = p.y[at + k];
        requantise(y, norm_const);
        for (u32 k = 0; k < BLOCK; ++k) p.mid[at + k] = bf16_bits(y[k]);
    }
}
