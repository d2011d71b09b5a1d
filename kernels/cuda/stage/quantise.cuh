// act=nvfp4: each token once, before FC1. A thread takes a block of 16.

extern "C" __global__ void quantise_tokens(const Params p) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (block >= size_t(p.tokens) * p.hidden / BLOCK) return;
    u16* x = p.x + block * BLOCK;
    float y[BLOCK];
    for (u32 n = 0; n < BLOCK; ++n) y[n] = bf16_value(x[n]);
    requantise(y, p.g);
    for (u32 n = 0; n < BLOCK; ++n) x[n] = bf16_bits(y[n]);
}
