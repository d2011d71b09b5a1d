//! The number formats of NVFP4 layers: e2m1, e4m3, bf16, and blocks of 16 that share a scale.
//! One value or one row at a time, exact, the model for faster code elsewhere; where bytes lie in
//! memory is `layout`'s business.

use half::bf16;

/// Consecutive elements along K that share one block scale.
pub const BLOCK: usize = 16;

/// Largest magnitude of e2m1.
pub const E2M1_MAX: f32 = 6.0;

/// Largest magnitude of e4m3.
pub const E4M3_MAX: f32 = 448.0;

/// Bits of the e4m3 NaN without its sign.
pub const E4M3_NAN: u8 = 0x7f;

/// Value of each e2m1 code; bit 3 is the sign.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Value of each e4m3 code.
pub const E4M3: [f32; 256] = e4m3_values();

/// Smallest normal number of e4m3, 2^-6; below it the codes are multiples of 2^-9.
const E4M3_NORMAL_MIN: f32 = 0.015_625;

const fn e4m3_values() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let exponent = (code >> 3) & 15;
        let mantissa = code & 7;
        let magnitude = if code & 0x7f == E4M3_NAN as usize {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            f32::from_bits(((exponent + 127 - 7) << 23 | mantissa << 20) as u32)
        };
        values[code] = if code & 0x80 == 0 { magnitude } else { -magnitude };
        code += 1;
    }
    values
}

/// The e2m1 code (0 to 15) nearest to `value`, ties to the even code, saturating at 6. The sign of
/// a zero is kept; NaN has no code and becomes a zero.
#[must_use]
pub fn e2m1_encode(value: f32) -> u8 {
    let a = value.abs();
    // Each term is the midpoint of two codes; a tie goes up exactly where the upper code is even.
    let magnitude = u8::from(a > 0.25)
        + u8::from(a >= 0.75)
        + u8::from(a > 1.25)
        + u8::from(a >= 1.75)
        + u8::from(a > 2.5)
        + u8::from(a >= 3.5)
        + u8::from(a > 5.0);
    u8::from(value.is_sign_negative()) << 3 | magnitude
}

/// Value of the low four bits of `code`.
#[must_use]
pub fn e2m1_decode(code: u8) -> f32 {
    E2M1[usize::from(code & 15)]
}

/// The e4m3 bits nearest to `value`, ties to even, saturating at 448; NaN stays NaN.
#[must_use]
pub fn e4m3_encode(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    let a = value.abs();
    let magnitude = if a.is_nan() {
        E4M3_NAN
    } else if a >= E4M3_MAX {
        0x7e
    } else if a < E4M3_NORMAL_MIN {
        // The product is exact; 8 is the smallest normal number, as it should be.
        (a * 512.0).round_ties_even() as u8
    } else {
        let bits = a.to_bits();
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        ((rounded >> 20) - ((127 - 7) << 3)) as u8
    };
    sign | magnitude
}

/// Value of the e4m3 bits `code`.
#[must_use]
pub fn e4m3_decode(code: u8) -> f32 {
    E4M3[usize::from(code)]
}

/// Whether `code` may scale a block of weights: neither NaN nor negative; -0 is a zero.
#[must_use]
pub fn is_block_scale(code: u8) -> bool {
    code < E4M3_NAN || code == 0x80
}

/// `value` rounded to bf16, to nearest even.
#[must_use]
pub fn bf16_round(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Widens bf16 values.
///
/// # Panics
/// When the lengths differ.
pub fn bf16_widen(from: &[bf16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "bf16_widen: lengths differ");
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

/// Rounds values to bf16, to nearest even.
///
/// # Panics
/// When the lengths differ.
pub fn bf16_narrow(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len(), "bf16_narrow: lengths differ");
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::from_f32(*from);
    }
}

/// The scale (e4m3 bits) of one block whose largest magnitude is `amax`, for quantisation scale
/// `g`: `e4m3(amax * (1/6) * g)`, in fp32 and in this order.
#[must_use]
pub fn block_scale(amax: f32, g: f32) -> u8 {
    e4m3_encode(amax * (1.0 / E2M1_MAX) * g)
}

/// Quantises a row to NVFP4 with quantisation scale `g`, the reciprocal of the global scale.
///
/// `codes` takes two elements a byte, the even one in the low nibble; `scales` one e4m3 byte for
/// each block of [`BLOCK`]. A block whose scale rounds to zero is all zero. A block that holds a
/// NaN gets a NaN scale, so that it dequantises to NaN and not to a number.
///
/// # Panics
/// When the row is not a multiple of [`BLOCK`] long, or an output does not fit it.
pub fn quantise_row(row: &[f32], g: f32, codes: &mut [u8], scales: &mut [u8]) {
    assert_row(row.len(), codes.len(), scales.len());
    let blocks = row.as_chunks::<BLOCK>().0;
    let codes = codes.as_chunks_mut::<{ BLOCK / 2 }>().0;
    for ((block, codes), scale) in blocks.iter().zip(codes).zip(scales) {
        *scale = quantise_block(block, g, codes);
    }
}

fn quantise_block(block: &[f32; BLOCK], g: f32, codes: &mut [u8; BLOCK / 2]) -> u8 {
    let amax = block.iter().fold(0.0_f32, |amax, y| amax.max(y.abs()));
    let scale = if block.iter().any(|y| y.is_nan()) { E4M3_NAN } else { block_scale(amax, g) };
    if scale == 0 {
        *codes = [0; BLOCK / 2];
        return scale;
    }
    let factor = g / e4m3_decode(scale);
    for (byte, pair) in codes.iter_mut().zip(block.as_chunks::<2>().0) {
        let [even, odd] = pair.map(|y| e2m1_encode(y * factor));
        *byte = odd << 4 | even;
    }
    scale
}

/// The values of a quantised row: code x block scale x `global`. The first product is exact, the
/// second is rounded once to fp32.
///
/// # Panics
/// When the row is not a multiple of [`BLOCK`] long, or an input does not fit it.
pub fn dequantise_row(codes: &[u8], scales: &[u8], global: f32, row: &mut [f32]) {
    assert_row(row.len(), codes.len(), scales.len());
    for (index, y) in row.iter_mut().enumerate() {
        let code = codes[index / 2] >> (4 * (index % 2));
        *y = e2m1_decode(code) * e4m3_decode(scales[index / BLOCK]) * global;
    }
}

fn assert_row(elements: usize, codes: usize, scales: usize) {
    assert!(elements.is_multiple_of(BLOCK), "{elements} elements are no whole blocks of {BLOCK}");
    assert_eq!(codes, elements / 2, "bytes of codes for {elements} elements");
    assert_eq!(scales, elements / BLOCK, "block scales for {elements} elements");
}

#[cfg(test)]
mod tests;
