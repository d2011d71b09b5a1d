// The number formats of NVFP4 in fp32, step by step as kernels/src/numeric.rs has them. The quantiser
// divides: a reciprocal takes other codes, because bf16 inputs meet the midpoints exactly.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 BLOCK = 16;

__device__ inline u16 bf16_bits(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline float bf16_value(u16 bits) { return __uint_as_float(u32(bits) << 16); }

// Value of e4m3 bits that are neither NaN nor negative.
__device__ inline float e4m3_value(u32 bits) {
    // Exponent and mantissa where fp32 has them are too small by 2^120, the difference of the biases.
    return __fmul_rn(__uint_as_float(bits << 20), __uint_as_float((127 + 120) << 23));
}

// The e4m3 bits nearest to a value that is not negative; ties to even, saturating at 448.
__device__ inline u32 e4m3_bits(float value) {
    if (value >= 448.0f) return 0x7e;
    if (value < 0.015625f) return u32(__float2int_rn(__fmul_rn(value, 512.0f)));
    u32 bits = __float_as_uint(value);
    u32 rounded = bits + 0x7ffff + ((bits >> 20) & 1);
    return (rounded >> 20) - ((127 - 7) << 3);
}

// The e2m1 value nearest to `value`; ties to the even code, saturating at 6.
__device__ inline float e2m1_round(float value) {
    float a = fabsf(value);
    float magnitude = a <= 0.25f ? 0.0f
                      : a < 0.75f ? 0.5f
                      : a <= 1.25f ? 1.0f
                      : a < 1.75f ? 1.5f
                      : a <= 2.5f ? 2.0f
                      : a < 3.5f ? 3.0f
                      : a <= 5.0f ? 4.0f
                                  : 6.0f;
    return copysignf(magnitude, value);
}

// Quantises a block with scale g and leaves code x block scale, which bf16 holds exactly.
__device__ inline void requantise(float (&y)[BLOCK], float g) {
    float amax = 0.0f;
    bool nan = false;
    for (u32 n = 0; n < BLOCK; ++n) {
        amax = fmaxf(amax, fabsf(y[n]));
        nan |= isnan(y[n]);
    }
    u32 bits = e4m3_bits(__fmul_rn(__fmul_rn(amax, 1.0f / 6.0f), g));
    float scale = e4m3_value(bits);
    float factor = __fdiv_rn(g, scale);
    for (u32 n = 0; n < BLOCK; ++n) {
        float value = bits == 0 ? 0.0f : __fmul_rn(e2m1_round(__fmul_rn(y[n], factor)), scale);
        y[n] = nan ? __int_as_float(0x7fc00000) : value;
    }
}
