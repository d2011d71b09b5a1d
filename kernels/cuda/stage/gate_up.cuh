// FC1 and the activation: a warp takes 8 columns of the intermediate, for the tokens of a tile.

__device__ inline float activate(const Params& p, float gate, float up) {
    // Not fminf and fmaxf, which would turn a NaN into a number.
    gate = gate > p.limit ? p.limit : gate;
    up = up > p.limit ? p.limit : (up < -p.limit ? -p.limit : up);
    const float sigmoid = __fdiv_rn(1.0f, 1.0f + expf(-__fmul_rn(p.alpha, gate)));
    return __fmul_rn(__fmul_rn(__fadd_rn(up, p.beta), gate), sigmoid);
}

extern "C" __global__ void gate_up(const Params p) {
    const u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    const u32 rows = p.intermediate / 8, g = lane / 4, c = lane % 4;
    if (warp >= rows) return;
    const Tile tile = p.tiles[blockIdx.y];
    const Pair* pairs = p.pairs + tile.first;
    const u16* row = g < tile.count ? p.x + size_t(pairs[g].token) * p.hidden : nullptr;
    float d[4];
    product(p.fc1 + (size_t(tile.expert) * rows + warp) * tile_bytes(p.hidden), row, p.hidden, d);
    const Scalars scalars = p.scalars[tile.expert];
    for (u32 n = 0; n < 2; ++n) {
        const u32 token = 2 * c + n;
        if (token >= tile.count) continue;
        float y = activate(p, __fmul_rn(scalars.gate_alpha, d[n]),
                           __fmul_rn(scalars.up_alpha, d[2 + n]));
        if (!p.weights_in_combine) y = __fmul_rn(y, pairs[token].weight);
        const size_t at = size_t(tile.first + token) * p.intermediate + warp * 8 + g;
        if (p.quantised) {
            p.y[at] = y;
        } else {
            p.mid[at] = bf16_bits(y);
        }
    }
}
