//! Where a function sits.

use std::fmt;

/// A slot and a function number on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Devfn(u8);

impl Devfn {
    /// Slot 0 to 31, function 0 to 7.
    ///
    /// # Panics
    /// When one is larger; check what a person typed before.
    pub const fn new(slot: u8, function: u8) -> Self {
        assert!(slot < 32 && function < 8, "slot and function in range");
        Self(slot << 3 | function)
    }

    /// From the byte that configuration addresses carry.
    pub const fn from_byte(byte: u8) -> Self {
        Self(byte)
    }

    /// As the byte that configuration addresses carry.
    pub const fn byte(self) -> u8 {
        self.0
    }

    /// The slot, 0 to 31.
    pub const fn slot(self) -> u8 {
        self.0 >> 3
    }

    /// The function, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Display for Devfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.slot(), self.function())
    }
}
