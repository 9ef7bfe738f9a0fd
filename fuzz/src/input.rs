//! The fuzzer's bytes as a stream of choices.

/// Bytes that choices are taken from. When they have run out all choices are zero.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Choices from all of `data`.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// True while there are bytes left.
    pub fn more(&self) -> bool {
        !self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// The next `count` bytes, or as many as there are.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next `count` bytes, at most eight, as a little-endian number.
    pub fn word(&mut self, count: usize) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.bytes(count.min(8));
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    /// A number below `limit`, and 0 when that is 0. Takes no more bytes than the limit needs.
    pub fn below(&mut self, limit: u64) -> u64 {
        let bits = 64 - limit.saturating_sub(1).leading_zeros();
        self.word(bits.div_ceil(8) as usize) % limit.max(1)
    }

    /// True once in `times`, up to 256.
    pub fn one_in(&mut self, times: u8) -> bool {
        self.byte().is_multiple_of(times.max(1)) && self.more()
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number of the kind that registers mind: small, a bit, all ones, near a limit, or anything.
    pub fn number(&mut self) -> u64 {
        let kind = self.byte();
        let shift = u32::from(kind >> 2);
        match kind & 3 {
            0 => self.word(1),
            1 => 1 << shift,
            2 => (u64::MAX >> shift).wrapping_sub(self.word(1) & 3),
            _ => self.word(8),
        }
    }
}
