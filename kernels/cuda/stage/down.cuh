// FC2: a warp takes 16 columns of the output, for the tokens of a tile; each result is one bf16 term.

extern "C" __global__ void down(const Params p) {
    const u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    const u32 rows = p.hidden / 16, g = lane / 4, c = lane % 4;
    if (warp >= rows) return;
    const Tile tile = p.tiles[blockIdx.y];
    const u16* row =
        g < tile.count ? p.mid + size_t(tile.first + g) * p.intermediate : nullptr;
    float d[4];
    product(p.fc2 + (size_t(tile.expert) * rows + warp) * tile_bytes(p.intermediate), row,
            p.intermediate, d);
    const float alpha = p.scalars[tile.expert].fc2_alpha;
    for (u32 n = 0; n < 2; ++n) {
        const u32 token = 2 * c + n;
        if (token >= tile.count) continue;
        u16* term = p.terms + size_t(p.pairs[tile.first + token].place) * p.hidden + warp * 16 + g;
        term[0] = bf16_bits(__fmul_rn(alpha, d[n]));
        term[8] = bf16_bits(__fmul_rn(alpha, d[2 + n]));
    }
}
