// Weights in the order of the tensor cores (kernels/src/cuda/units.rs writes it): a unit is 16 rows x
// 64 columns, or x 256 where the columns divide by that.
//
// Row blocks of up to 16 tiles (of 16 rows each) stream together: the units of all tiles of a block
// for the same columns lie side by side.
//
//   codes   for each 64 columns 512 bytes: 16 for each lane
//   scales  for each lane and 64 columns 2 bytes: of row g and of row g + 8
//
// Lane (g, c) = (lane / 4, lane % 4) has the whole block c of rows g and g + 8: word s holds the
// elements 4s to 4s + 3 of both. A scale is E5M3 with exponent E = e + 23; what it scales is too
// small by 2^38, which the alphas make good. A block whose scale is zero has zero codes.

constexpr u32 STEP_COLUMNS = 64;
constexpr u32 STEP_CODE_BYTES = 512;
constexpr u32 WIDE_STEPS = 4;
constexpr u32 BLOCK_TILES = 16;

// Bits of a code in a half of a word: sign, exponent, mantissa where bf16 has them.
constexpr u32 CODE_BITS = 0x81c081c0;

__device__ inline u32 steps_of(u32 columns) { return (columns + STEP_COLUMNS - 1) / STEP_COLUMNS; }

__device__ inline u32 unit_steps(u32 columns) {
    return columns % (WIDE_STEPS * STEP_COLUMNS) == 0 ? WIDE_STEPS : 1;
}

__device__ inline u32 unit_bytes(u32 columns) {
    return unit_steps(columns) * (STEP_CODE_BYTES + STEP_COLUMNS);
}

__device__ inline u32 units_of(u32 columns) { return steps_of(columns) / unit_steps(columns); }

// Bytes of a tile.
__device__ inline size_t tile_bytes(u32 columns) {
    return size_t(units_of(columns)) * unit_bytes(columns);
}

__device__ inline u32 rotate_left(u32 word, u32 by) { return __funnelshift_l(word, word, by); }

__device__ inline u32 multiply(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// E5M3 as a pair of bf16.
__device__ inline u32 scale_pair(u32 byte) { return (0x6000u | byte << 4) * 0x10001u; }

// The A fragment of one word: rows g and g + 8, elements 4s and 4s + 1, then 4s + 2 and 4s + 3.
__device__ inline void decode(u32 word, u32 low, u32 high, u32 (&a)[4]) {
    u32 last = (word << 6 & 0x80c080c0u) | (word >> 2 & 0x01000100u);
    a[0] = multiply(word & CODE_BITS, low);
    a[1] = multiply(word << 4 & CODE_BITS, high);
    a[2] = multiply(rotate_left(word, 10) & CODE_BITS, low);
    a[3] = multiply(last, high);
}
