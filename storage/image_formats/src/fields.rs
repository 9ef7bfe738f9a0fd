//! Numbers in headers: at fixed places, in either byte order, never past the end.

/// The bytes of a header; what lies past its end reads as zero.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    /// `N` bytes.
    pub(crate) fn bytes<const N: usize>(self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        for (n, byte) in out.iter_mut().enumerate() {
            *byte = self.0.get(at + n).copied().unwrap_or(0);
        }
        out
    }

    pub(crate) fn be16(self, at: usize) -> u16 {
        u16::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn be32(self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn be64(self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn le16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    pub(crate) fn le32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    pub(crate) fn le64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    /// A part; shorter or empty where the header ends before.
    pub(crate) fn slice(&self, at: usize, length: usize) -> &[u8] {
        let end = at.saturating_add(length).min(self.0.len());
        self.0.get(at..end).unwrap_or(&[])
    }
}

/// Puts `value` into `bytes` at `at`, which must have room for it.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
