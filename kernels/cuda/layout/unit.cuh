// Weights in the order of the tensor cores (kernels/src/cuda/units.rs writes it): a unit is 16 rows x
// 64 columns, or x 256 where the columns divide by that.
//
// Row blocks of up to 16 tiles (of 16 rows each) stream together: the units of all tiles of a block
// for the same columns lie side by side.
//
//   codes   for each 64 columns 512 bytes: 16 for each lane
//   scales  for each lane and 64 columns 2 bytes: of row g and of row g + 8
//
// Lane (g, c) = (lane / 4, lane % 4) has the whole block c of rows g and g + 8: words 2s and 2s + 1
// hold the elements 8s to 8s + 7 of both. A scale is E5M3 with exponent E = e + 23; what it scales is too
// small by 2^38, which the alphas make good. A block whose scale is zero has zero codes.

constexpr u32 STEP_COLUMNS = 64;
constexpr u32 STEP_CODE_BYTES = 512;
constexpr u32 STEP_BLOCKS = STEP_COLUMNS / BLOCK;
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

// Byte `at` of a word of E5M3 scales, as a pair of equal bf16.
__device__ inline u32 scale_pair(u32 scales, u32 at) {
    return __byte_perm(scales, 0, at | 4 << 4 | at << 8 | 4 << 12) * 16 + 0x60006000u;
}

// The A fragments of two words: rows g and g + 8, elements 4s and 4s + 1, then 4s + 2 and 4s + 3. What
// does not fit one word's masks lies in both (kernels/src/cuda/units.rs has the bits).
__device__ inline void decode(u32 even, u32 odd, u32 low, u32 high, u32 (&a)[2][4]) {
    constexpr u32 FROM_EVEN = 0x80c180c1;
    const u32 rest = rotate_left(even, 6) & FROM_EVEN | rotate_left(odd, 8) & ~FROM_EVEN;
    a[0][0] = multiply(even & CODE_BITS, low);
    a[0][1] = multiply(even << 4 & CODE_BITS, high);
    a[0][2] = multiply(rotate_left(even, 10) & CODE_BITS, low);
    a[0][3] = multiply(rest & CODE_BITS, high);
    a[1][0] = multiply(odd & CODE_BITS, low);
    a[1][1] = multiply(odd << 4 & CODE_BITS, high);
    a[1][2] = multiply(rotate_left(odd, 10) & CODE_BITS, low);
    a[1][3] = multiply(rest << 6 & CODE_BITS, high);
}
