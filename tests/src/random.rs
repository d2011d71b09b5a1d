//! Random numbers that a seed decides, the same everywhere.

/// SplitMix64.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Begins with `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.draw() % end as u64).unwrap_or(0)
    }

    /// A number from 0 to 1, without 1.
    pub fn unit(&mut self) -> f32 {
        // 24 bits, which an f32 holds exactly.
        (self.draw() >> 40) as f32 / 16_777_216.0
    }

    /// A number of the standard normal distribution (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let (radius, angle) = (1.0 - self.unit(), self.unit() * std::f32::consts::TAU);
        (-2.0 * radius.ln()).sqrt() * angle.cos()
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Puts `values` into another order.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for last in (1..values.len()).rev() {
            values.swap(last, self.below(last + 1));
        }
    }
}
