// The product of 16 weight rows with up to 8 tokens, over all columns, by one warp: one sum in one
// order for each output, whatever shares the tile.

constexpr u32 TILE_TOKENS = 8;

__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// `weights` are the units of 16 rows; `row` is this lane's token (lane / 4), null where there is none.
// d: rows g and g + 8 (d[0..1], d[2..3]) of tokens 2c and 2c + 1.
__device__ inline void product(const u8* weights, const u16* row, u32 columns, float (&d)[4]) {
    const u32 lane = threadIdx.x % 32, c = lane % 4;
    const u32 wide = unit_steps(columns), unit = wide * (STEP_CODE_BYTES + STEP_COLUMNS);
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    for (u32 step = 0; step < steps_of(columns); ++step) {
        const u8* at = weights + size_t(step / wide) * unit;
        const u32 within = step % wide;
        const uint4 codes =
            *reinterpret_cast<const uint4*>(at + within * STEP_CODE_BYTES + lane * 16);
        const u8* scales = at + wide * STEP_CODE_BYTES + (lane * wide + within) * 2;
        const u32 low = scale_pair(scales[0]), high = scale_pair(scales[1]);
        const u32 column = step * STEP_COLUMNS + c * BLOCK;
        uint4 x[2] = {};
        if (row != nullptr && column < columns) {
            x[0] = *reinterpret_cast<const uint4*>(row + column);
            x[1] = *reinterpret_cast<const uint4*>(row + column + 8);
        }
        u32 a[4];
        decode(codes.x, low, high, a);
        mma(d, a, x[0].x, x[0].y);
        decode(codes.y, low, high, a);
        mma(d, a, x[0].z, x[0].w);
        decode(codes.z, low, high, a);
        mma(d, a, x[1].x, x[1].y);
        decode(codes.w, low, high, a);
        mma(d, a, x[1].z, x[1].w);
    }
}
