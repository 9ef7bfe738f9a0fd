//! The header: text, signature, then fields of version 1.1. No I/O here.

use block::{BlockError, Result};

use crate::fields::{Fields, put};

pub(crate) const HEADER_SIZE: usize = 512;
const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x1_0001;
/// What the header's own length field counts: from that field to the end of what version 1.1 defines.
const FIELDS: u32 = 0x180;
/// The size of a block of new disks, which VirtualBox uses as well.
pub(crate) const BLOCK_SIZE: u64 = 1 << 20;
/// The largest table entries: not stored, and not stored but zero.
pub(crate) const UNALLOCATED: u64 = 0xffff_ffff;
pub(crate) const DISCARDED: u64 = 0xffff_fffe;
/// A table with more entries (64 MiB) is refused.
pub(crate) const MAX_BLOCKS: u64 = 16 << 20;
const MAX_SIZE: u64 = 1 << 60;

/// What a header says; places in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// All blocks were stored when the disk was made.
    pub(crate) fixed: bool,
    pub(crate) table: u64,
    pub(crate) data: u64,
    /// The disk's size.
    pub(crate) size: u64,
    pub(crate) block_size: u64,
    /// Entries of the table.
    pub(crate) blocks: u64,
    /// Blocks in the file, counted from `data`.
    pub(crate) allocated: u64,
    pub(crate) uuid: [u8; 16],
    pub(crate) snapshot_uuid: [u8; 16],
}

/// Where the number of allocated blocks stands.
pub(crate) const ALLOCATED_AT: usize = 0x184;

fn unsupported(what: impl Into<String>) -> BlockError {
    BlockError::unsupported(what)
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let f = Fields(bytes);
        if f.le32(0x40) != SIGNATURE {
            return Err(BlockError::invalid_image("this is no VDI image"));
        }
        if f.le32(0x44) != VERSION {
            let (major, minor) = (f.le16(0x46), f.le16(0x44));
            return Err(unsupported(format!(
                "VDI version {major}.{minor} is not supported"
            )));
        }
        let fixed = match f.le32(0x4c) {
            1 => false,
            2 => true,
            3 | 4 => return Err(unsupported("VDI images with a parent are not supported")),
            kind => return Err(unsupported(format!("the VDI image type {kind} is unknown"))),
        };
        if [f.bytes::<16>(0x1a8), f.bytes(0x1b8)] != [[0; 16]; 2] {
            return Err(unsupported("VDI images with a parent are not supported"));
        }
        let block_size = u64::from(f.le32(0x178));
        if !block_size.is_power_of_two() || !(4096..=256 << 20).contains(&block_size) {
            return Err(unsupported(format!(
                "VDI blocks of {block_size} bytes are not supported"
            )));
        }
        if f.le32(0x17c) != 0 {
            return Err(unsupported("VDI blocks with extra data are not supported"));
        }
        if f.le32(0x168) != 512 {
            let size = f.le32(0x168);
            return Err(unsupported(format!("VDI sectors of {size} bytes")));
        }
        Self {
            fixed,
            table: u64::from(f.le32(0x154)),
            data: u64::from(f.le32(0x158)),
            size: f.le64(0x170),
            block_size,
            blocks: u64::from(f.le32(0x180)),
            allocated: u64::from(f.le32(ALLOCATED_AT)),
            uuid: f.bytes(0x188),
            snapshot_uuid: f.bytes(0x198),
        }
        .validate()
    }

    fn validate(mut self) -> Result<Self> {
        let bad = |what: &str| Err(BlockError::invalid_image(what));
        if self.size > MAX_SIZE {
            return bad("the disk is impossibly large");
        }
        // Some versions of VirtualBox wrote sizes that are not whole sectors.
        self.size = self.size.next_multiple_of(512);
        if self.blocks > MAX_BLOCKS {
            return Err(unsupported(format!(
                "VDI tables of more than {MAX_BLOCKS} blocks are not supported"
            )));
        }
        if self.size > self.blocks * self.block_size {
            return bad("the block map is too small for the disk");
        }
        if !self.table.is_multiple_of(512) || !self.data.is_multiple_of(512) {
            return bad("the block map or the first block is not at a sector's beginning");
        }
        if self.table < HEADER_SIZE as u64 {
            return bad("the block map overlaps the header");
        }
        if self.data < self.table + self.blocks * 4 {
            return bad("the block map overlaps the blocks");
        }
        if self.allocated >= DISCARDED {
            return bad("more blocks are allocated than there can be");
        }
        Ok(self)
    }

    /// The header's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        put(&mut bytes, 0, b"<<< Corten VM Virtual Disk Image >>>\n");
        let fields = [
            (0x40, SIGNATURE),
            (0x44, VERSION),
            (0x48, FIELDS),
            (0x4c, if self.fixed { 2 } else { 1 }),
            (0x154, self.table as u32),
            (0x158, self.data as u32),
            (0x168, 512),
            (0x178, self.block_size as u32),
            (0x180, self.blocks as u32),
            (ALLOCATED_AT, self.allocated as u32),
        ];
        for (at, value) in fields {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        put(&mut bytes, 0x170, &self.size.to_le_bytes());
        put(&mut bytes, 0x188, &self.uuid);
        put(&mut bytes, 0x198, &self.snapshot_uuid);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_encoding_and_damage_is_refused() {
        let header = Header {
            fixed: true,
            table: 512,
            data: 1024,
            size: 5 << 20,
            block_size: BLOCK_SIZE,
            blocks: 5,
            allocated: 2,
            uuid: [1; 16],
            snapshot_uuid: [2; 16],
        };
        let bytes = header.encode();
        assert_eq!(Header::parse(&bytes).unwrap(), header);
        for (at, value) in [
            (0x40, 0),
            (0x44, 9),
            (0x4c, 4),
            (0x4c, 9),
            (0x155, 0),
            (0x155, 4),
            (0x158, 7),
            (0x168, 1),
            (0x177, 0x7f),
            (0x178, 1),
            (0x17c, 1),
            (0x180, 4),
            (0x183, 0x7f),
            (0x1a8, 1),
            (0x1b8, 1),
        ] {
            let mut broken = bytes.clone();
            broken[at] = value;
            assert!(Header::parse(&broken).is_err(), "{at:#x}");
        }
    }
}
