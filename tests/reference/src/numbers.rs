//! The three number formats: values and rounding, written from the formats' definitions.

use std::sync::LazyLock;

/// Values of the e2m1 codes 0 to 7; bit 3 of a code is the sign.
pub const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Values of the e4m3 codes 0 to 0x7e; 0x7f is NaN, bit 7 is the sign.
static E4M3: LazyLock<[f64; 127]> = LazyLock::new(|| {
    std::array::from_fn(|code| {
        let (exponent, mantissa) = (code as i32 >> 3, f64::from(code as u32 & 7) / 8.0);
        match exponent {
            0 => mantissa * 2_f64.powi(-6),
            _ => (1.0 + mantissa) * 2_f64.powi(exponent - 7),
        }
    })
});

/// The value of an e2m1 code (low nibble).
#[must_use]
pub fn e2m1_value(code: u8) -> f64 {
    let magnitude = E2M1[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The values of two e2m1 codes in a byte, the low nibble's first.
#[must_use]
pub fn e2m1_pair(byte: u8) -> [f64; 2] {
    static PAIRS: LazyLock<[[f64; 2]; 256]> = LazyLock::new(|| {
        std::array::from_fn(|byte| [byte as u8, (byte >> 4) as u8].map(e2m1_value))
    });
    PAIRS[usize::from(byte)]
}

/// The e2m1 code nearest to `value`, ties to the even code, saturating at 6.
#[must_use]
pub fn e2m1_code(value: f64) -> u8 {
    // Code c begins above the midpoint below it; at the midpoint itself when c is even.
    const BOUNDS: [(f64, bool); 7] = [
        (0.25, false),
        (0.75, true),
        (1.25, false),
        (1.75, true),
        (2.5, false),
        (3.5, true),
        (5.0, false),
    ];
    let magnitude = value.abs();
    let reached =
        |&&(bound, even): &&(f64, bool)| magnitude > bound || (even && magnitude == bound);
    let code = BOUNDS.iter().filter(reached).count() as u8;
    if value.is_sign_negative() { code | 8 } else { code }
}

/// The value of an e4m3 code; NaN codes give NaN.
#[must_use]
pub fn e4m3_value(code: u8) -> f64 {
    let magnitude = E4M3.get(usize::from(code & 0x7f)).copied().unwrap_or(f64::NAN);
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The e4m3 code nearest to `value` (not negative), ties to the even code, saturating at 448.
#[must_use]
pub fn e4m3_code(value: f64) -> u8 {
    let table = &*E4M3;
    let above = table.partition_point(|&v| v < value);
    if above == 0 {
        return 0;
    }
    let Some(&upper) = table.get(above) else { return 0x7e };
    let middle = f64::midpoint(table[above - 1], upper);
    let up = value > middle || (value == middle && above % 2 == 0);
    (if up { above } else { above - 1 }) as u8
}

/// The value of bf16 bits.
#[must_use]
pub fn bf16_value(bits: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(bits) << 16))
}

/// `value` rounded once to bf16 (to nearest, ties to even), as bits.
#[must_use]
pub fn bf16_bits(value: f64) -> u16 {
    // A bf16 has 8 significant bits and a smallest step of 2^-133.
    let exponent = ((value.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let step = 2_f64.powi((exponent - 7).max(-133));
    let rounded = (value / step).round_ties_even() * step;
    // Exact: what is left fits a bf16, except beyond its range, where the cast gives infinity.
    ((rounded as f32).to_bits() >> 16) as u16
}

/// Quantises a row with scale `g`, the reciprocal of the global scale: codes, one a byte, and block
/// scales. `s8 = e4m3(amax x (1/6) x g)`, `code = e2m1(y x (g / s8))`; a block whose s8 is 0 is zero.
///
/// In fp32, factor by factor as the text has it: bf16 inputs often fall on the very boundary between
/// two codes, and the last bit of the factors decides which one is taken.
#[must_use]
pub fn quantise_row(row: &[f32], g: f32) -> (Vec<u8>, Vec<u8>) {
    let mut codes = Vec::with_capacity(row.len());
    let mut scales = Vec::with_capacity(row.len() / 16);
    for block in row.chunks(16) {
        let amax = block.iter().fold(0.0_f32, |max, y| max.max(y.abs()));
        let scale = e4m3_code(f64::from(amax * (1.0 / 6.0) * g));
        let factor = if scale == 0 { 0.0 } else { g / e4m3_value(scale) as f32 };
        scales.push(scale);
        let code = |y: &f32| if scale == 0 { 0 } else { e2m1_code(f64::from(y * factor)) };
        codes.extend(block.iter().map(code));
    }
    (codes, scales)
}

/// The values that codes and block scales of a row stand for, without any global scale.
#[must_use]
pub fn dequantise_row(codes: &[u8], scales: &[u8]) -> Vec<f64> {
    let block = |(codes, &scale): (&[u8], &u8)| {
        let scale = e4m3_value(scale);
        codes.iter().map(move |&code| e2m1_value(code) * scale).collect::<Vec<_>>()
    };
    codes.chunks(16).zip(scales).flat_map(block).collect()
}

/// Two codes a byte, the even element in the low nibble.
#[must_use]
pub fn pack(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] | pair.get(1).map_or(0, |high| high << 4)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_rounds_to_itself_and_midpoints_to_even() {
        for code in 0..16 {
            assert_eq!(e2m1_code(e2m1_value(code)), code);
        }
        for code in 0..0x7f {
            assert_eq!(e4m3_code(e4m3_value(code)), code);
        }
        for code in 0..7_u8 {
            let middle = f64::midpoint(e2m1_value(code), e2m1_value(code + 1));
            assert_eq!(e2m1_code(middle) % 2, 0, "{middle}");
        }
        for code in 0..0x7e_u8 {
            let middle = f64::midpoint(e4m3_value(code), e4m3_value(code + 1));
            assert_eq!(e4m3_code(middle) % 2, 0, "{middle}");
        }
        assert_eq!((e2m1_code(1e9), e4m3_code(1e9), e4m3_value(0x7e)), (7, 0x7e, 448.0));
    }

    #[test]
    fn bf16_rounds_once_to_nearest_even() {
        for bits in (0..=u16::MAX).filter(|&bits| bf16_value(bits).is_finite()) {
            assert_eq!(bf16_bits(bf16_value(bits)), bits);
        }
        let bf16_round = |value| bf16_value(bf16_bits(value));
        assert_eq!(bf16_round(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(bf16_round(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
        // Rounding by way of fp32 would land on the tie and go down.
        assert_eq!(bf16_round(1.0 + 1.0 / 256.0 + 1e-12), 1.0 + 1.0 / 128.0);
    }
}
