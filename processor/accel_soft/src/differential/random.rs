//! Deterministic random numbers, biased to the values at which things go wrong.

/// A xorshift generator.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// From a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    /// 64 random bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound.max(1)
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of the values.
    pub(crate) fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// An integer for a register.
    pub(crate) fn integer(&mut self) -> u64 {
        const EDGES: [u64; 24] = [
            0,
            1,
            2,
            3,
            7,
            8,
            15,
            31,
            32,
            63,
            64,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            u64::MAX - 1,
            u64::MAX,
        ];
        match self.below(8) {
            0..3 => self.next(),
            3 => self.next() & 0xff,
            4 => u64::from(self.next() as u32),
            5 => (self.next() as i64 >> self.below(63)) as u64,
            _ => self.pick(&EDGES),
        }
    }

    /// The bits of a single-precision value.
    pub(crate) fn single(&mut self) -> u32 {
        const EDGES: [u32; 20] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0xffc0_0000,
            0x7f80_0001,
            0xff81_2345,
            0x0000_0001,
            0x807f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0xff7f_ffff,
            0x4f00_0000,
            0xcf00_0000,
            0x5f00_0000,
            0x3f00_0000,
            0x4b00_0001,
        ];
        match self.below(5) {
            0 => self.next() as u32,
            1 => self.pick(&EDGES),
            2 => (self.below(2000) as f32 / 8.0 - 100.0).to_bits(),
            // Near one another, so that sums cancel and products stay in range.
            3 => 0x3f00_0000 ^ (self.next() as u32 & 0x81ff_ffff),
            // Near the smallest normal number.
            _ => (self.next() as u32 & 0x807f_ffff) | (self.below(4) as u32) << 23,
        }
    }

    /// The bits of a double-precision value.
    pub(crate) fn double(&mut self) -> u64 {
        const EDGES: [u64; 20] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0xfff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0xfff4_5678_0000_0000,
            1,
            0x800f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x41e0_0000_0000_0000,
            0xc1e0_0000_0020_0000,
            0x43e0_0000_0000_0000,
            0x3fe0_0000_0000_0000,
            0x380f_ffff_ffff_ffff,
            0x47ef_ffff_f000_0000,
        ];
        match self.below(5) {
            0 => self.next(),
            1 => self.pick(&EDGES),
            2 => (self.below(2000) as f64 / 8.0 - 100.0).to_bits(),
            3 => 0x3fe0_0000_0000_0000 ^ (self.next() & 0x803f_ffff_ffff_ffff),
            _ => (self.next() & 0x800f_ffff_ffff_ffff) | self.below(4) << 52,
        }
    }

    /// An 80-bit value: significand, sign and exponent.
    pub(crate) fn extended(&mut self) -> (u64, u16) {
        let sign = (self.next() as u16) & 0x8000;
        let top = 1 << 63;
        match self.below(12) {
            0 => (0, sign),
            1 => (top, sign | 0x7fff),
            2 => (top | self.next() >> 1, sign | 0x7fff),
            3 => (top | 1 << 62, sign | 0x7fff),
            4 => (self.next() >> 1, sign),
            5 => (self.next(), self.next() as u16),
            6 => (top, sign | 0x3fff),
            7 => (
                top | self.next() >> 1,
                sign | (0x3fff - 70 + self.below(140) as u16),
            ),
            8 => (
                top | self.next() >> 1 & !0x7ff,
                sign | (0x3fff + 0x3fe - self.below(0x7fd) as u16),
            ),
            9 => (
                top | self.next() >> self.below(63),
                sign | (0x3fff + self.below(66) as u16),
            ),
            10 => (
                top | self.next() >> 1,
                sign | self.pick(&[1, 2, 0x7ffe, 0x7ffd]),
            ),
            _ => (
                top | self.next() >> 1,
                sign | (0x3fff - 2 + self.below(4) as u16),
            ),
        }
    }

    /// 128 bits of one of the kinds of elements.
    pub(crate) fn vector(&mut self) -> u128 {
        match self.below(8) {
            0 => u128::from(self.next()) << 64 | u128::from(self.next()),
            1 | 2 => (0..4).fold(0, |v, _| v << 32 | u128::from(self.single())),
            3 | 4 => u128::from(self.double()) << 64 | u128::from(self.double()),
            5 => (0..16).fold(0, |v, _| v << 8 | u128::from(self.integer() as u8)),
            6 => u128::from(self.integer()) << 64 | u128::from(self.integer()),
            _ => self.pick(&[0, u128::MAX, 1 << 127, 1]),
        }
    }
}
