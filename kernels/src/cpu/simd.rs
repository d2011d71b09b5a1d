//! Lanes of AVX2 and AVX-512, and the choice among instruction sets. What is done with lanes is the
//! business of `product`.
#![expect(unsafe_code, reason = "vector instructions of the processor, checked before use")]

use super::product::{Scalar, Strip, Vector};
use super::tactic::Isa;

/// Runs a product with the instructions of its tactic.
///
/// # Panics
/// When the processor lacks them: tactics are checked when a device is made.
pub(super) fn run(strip: &Strip<'_>, panel: &mut [Vector], out: &mut [Vector]) {
    let isa = strip.tactic.isa;
    assert!(isa.available(), "{isa:?} is not available");
    match isa {
        Isa::Scalar => strip.run::<Scalar>(panel, out),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `available` found AVX2 and FMA.
        Isa::Avx2 => unsafe { x86::run_avx2(strip, panel, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `available` found AVX-512F.
        Isa::Avx512 => unsafe { x86::run_avx512(strip, panel, out) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => unreachable!("available() was asked"),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Each method is inlined into [`run_avx2`] or [`run_avx512`], the only callers, which enable
    //! the instructions; loads and stores stay within the arrays behind their references.

    use std::arch::x86_64::*;

    use crate::cpu::layout::{CodeLine, LANES, ScaleLine};
    use crate::cpu::product::{Lanes, Strip, Vector};
    use crate::numeric::E2M1;

    /// An e4m3 number shifted to where fp32 has exponent and mantissa is too small by this factor,
    /// 2^120: the difference of the two biases, 127 and 7. Exact for normal and subnormal numbers.
    const REBIAS: f32 = f32::from_bits((127 + 120) << 23);

    #[target_feature(enable = "avx512f")]
    pub(super) fn run_avx512(strip: &Strip<'_>, panel: &mut [Vector], out: &mut [Vector]) {
        strip.run::<Avx512>(panel, out);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn run_avx2(strip: &Strip<'_>, panel: &mut [Vector], out: &mut [Vector]) {
        strip.run::<Avx2>(panel, out);
    }

    /// Evaluates one expression of intrinsics.
    macro_rules! lanes {
        ($e:expr) => {
            // SAFETY: see the head of this module.
            unsafe { $e }
        };
    }

    struct Avx512;

    impl Lanes for Avx512 {
        type Floats = __m512;
        type Codes = __m512i;

        #[inline(always)]
        fn zero() -> __m512 {
            lanes!(_mm512_setzero_ps())
        }

        #[inline(always)]
        fn load(from: &Vector) -> __m512 {
            lanes!(_mm512_load_ps(from.0.as_ptr()))
        }

        #[inline(always)]
        fn store(values: __m512, to: &mut Vector) {
            lanes!(_mm512_store_ps(to.0.as_mut_ptr(), values));
        }

        #[inline(always)]
        fn scales(line: &ScaleLine) -> __m512 {
            let bytes = lanes!(_mm_loadu_si128(line.as_ptr().cast()));
            let words = lanes!(_mm512_cvtepu8_epi32(bytes));
            let shifted = lanes!(_mm512_slli_epi32::<20>(words));
            let small = lanes!(_mm512_castsi512_ps(shifted));
            let rebias = lanes!(_mm512_set1_ps(REBIAS));
            lanes!(_mm512_mul_ps(small, rebias))
        }

        #[inline(always)]
        fn codes(line: &CodeLine) -> __m512i {
            lanes!(_mm512_loadu_si512(line.as_ptr().cast()))
        }

        #[inline(always)]
        fn weight(codes: __m512i, scales: __m512) -> __m512 {
            let table = lanes!(_mm512_loadu_ps(E2M1.as_ptr()));
            // The permutation looks at the low four bits of each index alone.
            let values = lanes!(_mm512_permutexvar_ps(codes, table));
            lanes!(_mm512_mul_ps(values, scales))
        }

        #[inline(always)]
        fn next(codes: __m512i) -> __m512i {
            lanes!(_mm512_srli_epi32::<4>(codes))
        }

        #[inline(always)]
        fn fma(weight: __m512, x: f32, sum: __m512) -> __m512 {
            let x = lanes!(_mm512_set1_ps(x));
            lanes!(_mm512_fmadd_ps(weight, x, sum))
        }

        #[inline(always)]
        fn prefetch(bytes: &[u8], ahead: usize) {
            prefetch_line(bytes, ahead);
        }
    }

    struct Avx2;

    const HALF: usize = LANES / 2;

    impl Lanes for Avx2 {
        type Floats = [__m256; 2];
        type Codes = [__m256i; 2];

        #[inline(always)]
        fn zero() -> [__m256; 2] {
            [lanes!(_mm256_setzero_ps()); 2]
        }

        #[inline(always)]
        fn load(from: &Vector) -> [__m256; 2] {
            let low = lanes!(_mm256_loadu_ps(from.0[..HALF].as_ptr()));
            [low, lanes!(_mm256_loadu_ps(from.0[HALF..].as_ptr()))]
        }

        #[inline(always)]
        fn store(values: [__m256; 2], to: &mut Vector) {
            lanes!(_mm256_storeu_ps(to.0[..HALF].as_mut_ptr(), values[0]));
            lanes!(_mm256_storeu_ps(to.0[HALF..].as_mut_ptr(), values[1]));
        }

        #[inline(always)]
        fn scales(line: &ScaleLine) -> [__m256; 2] {
            let bytes = lanes!(_mm_loadu_si128(line.as_ptr().cast()));
            let high = lanes!(_mm_unpackhi_epi64(bytes, bytes));
            [scales8(bytes), scales8(high)]
        }

        #[inline(always)]
        fn codes(line: &CodeLine) -> [__m256i; 2] {
            let low = lanes!(_mm256_loadu_si256(line[..32].as_ptr().cast()));
            [low, lanes!(_mm256_loadu_si256(line[32..].as_ptr().cast()))]
        }

        #[inline(always)]
        fn weight(codes: [__m256i; 2], scales: [__m256; 2]) -> [__m256; 2] {
            [weight8(codes[0], scales[0]), weight8(codes[1], scales[1])]
        }

        #[inline(always)]
        fn next(codes: [__m256i; 2]) -> [__m256i; 2] {
            let low = lanes!(_mm256_srli_epi32::<4>(codes[0]));
            [low, lanes!(_mm256_srli_epi32::<4>(codes[1]))]
        }

        #[inline(always)]
        fn fma(weight: [__m256; 2], x: f32, sum: [__m256; 2]) -> [__m256; 2] {
            let x = lanes!(_mm256_set1_ps(x));
            let low = lanes!(_mm256_fmadd_ps(weight[0], x, sum[0]));
            [low, lanes!(_mm256_fmadd_ps(weight[1], x, sum[1]))]
        }

        #[inline(always)]
        fn prefetch(bytes: &[u8], ahead: usize) {
            prefetch_line(bytes, ahead);
        }
    }

    #[inline(always)]
    fn prefetch_line(bytes: &[u8], ahead: usize) {
        let line = bytes.as_ptr().wrapping_add(ahead);
        // SAFETY: a prefetch of any address, mapped or not, has no effect but on the cache.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    fn scales8(bytes: __m128i) -> __m256 {
        let words = lanes!(_mm256_cvtepu8_epi32(bytes));
        let shifted = lanes!(_mm256_slli_epi32::<20>(words));
        let small = lanes!(_mm256_castsi256_ps(shifted));
        let rebias = lanes!(_mm256_set1_ps(REBIAS));
        lanes!(_mm256_mul_ps(small, rebias))
    }

    #[inline(always)]
    fn weight8(codes: __m256i, scales: __m256) -> __m256 {
        // Eight lanes index the eight magnitudes with the low three bits; the fourth is the sign.
        let table = lanes!(_mm256_loadu_ps(E2M1[..8].as_ptr()));
        let magnitudes = lanes!(_mm256_permutevar8x32_ps(table, codes));
        let shifted = lanes!(_mm256_slli_epi32::<28>(codes));
        let shifted = lanes!(_mm256_castsi256_ps(shifted));
        let sign_bit = lanes!(_mm256_set1_ps(-0.0));
        let signs = lanes!(_mm256_and_ps(shifted, sign_bit));
        let values = lanes!(_mm256_xor_ps(magnitudes, signs));
        lanes!(_mm256_mul_ps(values, scales))
    }
}
