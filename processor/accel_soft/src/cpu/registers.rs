//! The general registers as bytes.

/// General registers and the other sources of an effective address, addressed by *byte offset* (see
/// [`RegisterFile::offset`]): any `u8` is in range for every access, so no access needs a check.
#[repr(C, align(64))]
pub(crate) struct RegisterFile {
    words: [u64; 33],
}

/// Slot (word index) that holds the linear-independent RIP of the first instruction of the running block.
pub(crate) const BLOCK_RIP: usize = 16;
/// Slot that is always zero.
pub(crate) const ZERO: usize = 17;

impl RegisterFile {
    /// All zero.
    pub(crate) fn new() -> Self {
        Self { words: [0; 33] }
    }

    /// The byte offset of a word slot.
    pub(crate) const fn offset(slot: usize) -> u8 {
        (slot * 8) as u8
    }

    /// The value at a byte offset.
    #[inline(always)]
    pub(crate) fn get<T: super::Value>(&self, offset: u8) -> T {
        const { assert!(size_of::<T>() <= 8) };
        // SAFETY: offset is at most 255 and the file has 264 bytes, so eight bytes from there are inside.
        unsafe {
            std::ptr::from_ref(self)
                .cast::<u8>()
                .add(offset as usize)
                .cast::<T>()
                .read_unaligned()
        }
    }

    /// Writes the bytes at an offset and no others.
    #[inline(always)]
    pub(crate) fn put<T: super::Value>(&mut self, offset: u8, value: T) {
        const { assert!(size_of::<T>() <= 8) };
        // SAFETY: as in `get`.
        unsafe {
            std::ptr::from_mut(self)
                .cast::<u8>()
                .add(offset as usize)
                .cast::<T>()
                .write_unaligned(value);
        }
    }

    /// Writes a register as an instruction of the value's operand size does: 32-bit results clear the upper half, 8- and
    /// 16-bit results leave the rest.
    #[inline(always)]
    pub(crate) fn set<T: super::Value>(&mut self, offset: u8, value: T) {
        if size_of::<T>() == 4 {
            self.put::<u64>(offset, value.to_u64());
        } else {
            self.put(offset, value);
        }
    }
}

impl std::ops::Index<usize> for RegisterFile {
    type Output = u64;
    #[inline(always)]
    fn index(&self, slot: usize) -> &u64 {
        &self.words[slot]
    }
}

impl std::ops::IndexMut<usize> for RegisterFile {
    #[inline(always)]
    fn index_mut(&mut self, slot: usize) -> &mut u64 {
        &mut self.words[slot]
    }
}
