// Fills the cache with clean lines: reads `tokens` times 16 bytes from x.

extern "C" __global__ void read_memory(const Params p) {
    const uint4* from = reinterpret_cast<const uint4*>(p.x);
    u32 sum = 0;
    for (size_t n = size_t(blockIdx.x) * blockDim.x + threadIdx.x; n < p.tokens;
         n += size_t(gridDim.x) * blockDim.x)
        sum += from[n].x + from[n].y + from[n].z + from[n].w;
    // Never true of zeros: it keeps the reads.
    if (sum == 1) p.out[0] = 0;
}
