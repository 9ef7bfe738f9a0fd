//! The footer, the dynamic header and geometry (Virtual Hard Disk Image Format Specification 1.0). No
//! I/O here.

use block::{BlockError, Result};

use crate::fields::{Fields, put};

/// The size of the footer in bytes.
pub(crate) const FOOTER_SIZE: usize = 512;
/// The size of the dynamic disk header in bytes.
pub(crate) const HEADER_SIZE: usize = 1024;
/// A place that is not used.
pub(crate) const UNUSED: u32 = u32::MAX;
/// The most cylinders, heads and sectors that the footer can say.
const MAX_GEOMETRY: (u16, u8, u8) = (65535, 16, 255);
const MAX_GEOMETRY_SECTORS: u64 = 65535 * 16 * 255;
/// 2040 GiB.
const MAX_SECTORS: u64 = 0xff00_0000;
/// A block allocation table larger than this is refused: 2 TiB in blocks of 512 KiB.
const MAX_ENTRIES: u32 = 4 << 20;
/// Seconds from 1970 to 2000, where time stamps begin.
const EPOCH: u64 = 946_684_800;

/// What kind of disk it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskType {
    /// All data in order, then the footer.
    Fixed,
    /// Blocks as they are needed.
    Dynamic,
    /// Blocks that differ from a parent.
    Differencing,
}

/// Cylinders, heads, sectors of a track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) cylinders: u16,
    pub(crate) heads: u8,
    pub(crate) sectors: u8,
}

impl Geometry {
    pub(crate) fn total(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The geometry that the specification's appendix computes for a number of sectors. It is never
    /// larger than the disk.
    fn of(sectors: u64) -> Self {
        let total = sectors.min(MAX_GEOMETRY_SECTORS);
        let (mut heads, mut per_track, mut tracks);
        if total >= 65535 * 16 * 63 {
            (heads, per_track) = (16, 255);
            tracks = total / per_track;
        } else {
            per_track = 17;
            tracks = total / per_track;
            heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                (heads, per_track) = (16, 31);
                tracks = total / per_track;
            }
            if tracks >= heads * 1024 {
                (heads, per_track) = (16, 63);
                tracks = total / per_track;
            }
        }
        Self {
            cylinders: (tracks / heads) as u16,
            heads: heads as u8,
            sectors: per_track as u8,
        }
    }

    /// The smallest geometry that holds so many sectors.
    pub(crate) fn holding(sectors: u64) -> Self {
        let wanted = sectors.min(MAX_GEOMETRY_SECTORS);
        let mut tried = wanted;
        loop {
            let geometry = Self::of(tried);
            if geometry.total() >= wanted || tried >= MAX_GEOMETRY_SECTORS {
                return geometry;
            }
            tried += 1;
        }
    }

    /// The geometry that says "see the size".
    pub(crate) fn largest() -> Self {
        let (cylinders, heads, sectors) = MAX_GEOMETRY;
        Self {
            cylinders,
            heads,
            sectors,
        }
    }
}

/// The footer, which also stands at the beginning of dynamic disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) features: u32,
    pub(crate) data_offset: u64,
    pub(crate) timestamp: u32,
    pub(crate) creator: [u8; 4],
    pub(crate) creator_version: u32,
    pub(crate) creator_os: [u8; 4],
    pub(crate) original_size: u64,
    pub(crate) current_size: u64,
    pub(crate) geometry: Geometry,
    pub(crate) disk_type: DiskType,
    pub(crate) uuid: [u8; 16],
    pub(crate) saved_state: u8,
}

fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum: u32 = bytes
        .iter()
        .enumerate()
        .filter(|(n, _)| !(at..at + 4).contains(n))
        .map(|(_, b)| u32::from(*b))
        .sum();
    !sum
}

/// Seconds since 2000, now.
pub(crate) fn timestamp_now() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.as_secs().saturating_sub(EPOCH) as u32)
}

/// Who wrote the footer so that the size in it counts, not the geometry: Hyper-V, QEMU with
/// `force_size`, disk2vhd, tapdisk, XenServer, Azure.
const SIZE_COUNTS: [&[u8; 4]; 6] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];

impl Footer {
    /// Whether `bytes` begin with a footer.
    pub(crate) fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(b"conectix")
    }

    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let f = Fields(bytes);
        if !Self::is_one(bytes) || bytes.len() < FOOTER_SIZE {
            return Err(BlockError::invalid_image("there is no VHD footer"));
        }
        if checksum(&bytes[..FOOTER_SIZE], 64) != f.be32(64) {
            return Err(BlockError::invalid_image("the footer's checksum is wrong"));
        }
        if f.be32(12) >> 16 != 1 {
            let message = format!("VHD version {:#x} is unknown", f.be32(12));
            return Err(BlockError::unsupported(message));
        }
        let disk_type = match f.be32(60) {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            other => {
                return Err(BlockError::unsupported(format!(
                    "disk type {other} is unknown"
                )));
            }
        };
        let footer = Self {
            features: f.be32(8),
            data_offset: f.be64(16),
            timestamp: f.be32(24),
            creator: f.bytes(28),
            creator_version: f.be32(32),
            creator_os: f.bytes(36),
            original_size: f.be64(40),
            current_size: f.be64(48),
            geometry: Geometry {
                cylinders: f.be16(56),
                heads: f.bytes::<1>(58)[0],
                sectors: f.bytes::<1>(59)[0],
            },
            disk_type,
            uuid: f.bytes(68),
            saved_state: f.bytes::<1>(84)[0],
        };
        if footer.size() / 512 > MAX_SECTORS {
            return Err(BlockError::invalid_image(
                "the disk is larger than 2040 GiB",
            ));
        }
        Ok(footer)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; FOOTER_SIZE];
        let disk_type: u32 = match self.disk_type {
            DiskType::Fixed => 2,
            DiskType::Dynamic => 3,
            DiskType::Differencing => 4,
        };
        put(&mut bytes, 0, b"conectix");
        put(&mut bytes, 8, &self.features.to_be_bytes());
        put(&mut bytes, 12, &0x0001_0000u32.to_be_bytes());
        put(&mut bytes, 16, &self.data_offset.to_be_bytes());
        put(&mut bytes, 24, &self.timestamp.to_be_bytes());
        put(&mut bytes, 28, &self.creator);
        put(&mut bytes, 32, &self.creator_version.to_be_bytes());
        put(&mut bytes, 36, &self.creator_os);
        put(&mut bytes, 40, &self.original_size.to_be_bytes());
        put(&mut bytes, 48, &self.current_size.to_be_bytes());
        put(&mut bytes, 56, &self.geometry.cylinders.to_be_bytes());
        bytes[58] = self.geometry.heads;
        bytes[59] = self.geometry.sectors;
        put(&mut bytes, 60, &disk_type.to_be_bytes());
        put(&mut bytes, 68, &self.uuid);
        bytes[84] = self.saved_state;
        let sum = checksum(&bytes, 64);
        put(&mut bytes, 64, &sum.to_be_bytes());
        bytes
    }

    /// Whether the size in the footer counts, not the geometry. Virtual PC went by the geometry.
    pub(crate) fn size_counts(&self) -> bool {
        SIZE_COUNTS.contains(&&self.creator) || self.geometry == Geometry::largest()
    }

    /// The disk's size in bytes.
    pub(crate) fn size(&self) -> u64 {
        if self.size_counts() {
            self.current_size / 512 * 512
        } else {
            self.geometry.total() * 512
        }
    }

    /// Sets the size, in bytes, under the rule of who made the disk. Returns the size that the disk
    /// then has: by the geometry it may be a little larger.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if it is too large.
    pub(crate) fn set_size(&mut self, size: u64, force: bool) -> Result<u64> {
        let sectors = size.div_ceil(512);
        self.geometry = if force {
            Geometry::largest()
        } else {
            Geometry::holding(sectors)
        };
        let sectors = if self.geometry == Geometry::largest() {
            sectors
        } else {
            self.geometry.total()
        };
        if sectors > MAX_SECTORS {
            let message = "Disk size is too large, max size is 2040 GiB";
            return Err(BlockError::invalid_argument(message));
        }
        self.current_size = sectors * 512;
        Ok(self.current_size)
    }
}

/// A way to find the parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Locator {
    pub(crate) platform: [u8; 4],
    /// Bytes reserved for the name.
    pub(crate) space: u32,
    /// Bytes of the name.
    pub(crate) length: u32,
    pub(crate) offset: u64,
}

/// The header of dynamic and differencing disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DynamicHeader {
    pub(crate) table_offset: u64,
    pub(crate) entries: u32,
    pub(crate) block_size: u32,
    pub(crate) parent_uuid: [u8; 16],
    pub(crate) parent_timestamp: u32,
    pub(crate) parent_name: String,
    pub(crate) locators: Vec<Locator>,
}

impl DynamicHeader {
    /// # Errors
    ///
    /// `InvalidImage`.
    pub(crate) fn parse(bytes: &[u8], size: u64) -> Result<Self> {
        let f = Fields(bytes);
        let bad = |what: &str| Err(BlockError::invalid_image(what));
        if !bytes.starts_with(b"cxsparse") || bytes.len() < HEADER_SIZE {
            return bad("there is no dynamic disk header");
        }
        if checksum(&bytes[..HEADER_SIZE], 36) != f.be32(36) {
            return bad("the dynamic header's checksum is wrong");
        }
        let block_size = f.be32(32);
        if !block_size.is_power_of_two() || !(512..=256 << 20).contains(&block_size) {
            return bad("the block size is no power of two between 512 and 256 MiB");
        }
        let entries = f.be32(28);
        if entries > MAX_ENTRIES {
            return bad("the block allocation table is too large");
        }
        if u64::from(entries) * u64::from(block_size) < size {
            return bad("the block allocation table is too small for the disk");
        }
        let table_offset = f.be64(16);
        if table_offset > i64::MAX.cast_unsigned() / 2 {
            return bad("the block allocation table is out of reach");
        }
        let name: Vec<u16> = (0..256).map(|n| f.be16(64 + 2 * n)).collect();
        let name: Vec<u16> = name.into_iter().take_while(|c| *c != 0).collect();
        let locators = (0..8).map(|n| {
            let at = 576 + 24 * n;
            Locator {
                platform: f.bytes(at),
                space: f.be32(at + 4),
                length: f.be32(at + 8),
                offset: f.be64(at + 16),
            }
        });
        Ok(Self {
            table_offset,
            entries,
            block_size,
            parent_uuid: f.bytes(40),
            parent_timestamp: f.be32(56),
            parent_name: String::from_utf16_lossy(&name),
            locators: locators.filter(|l| l.platform != [0; 4]).collect(),
        })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        put(&mut bytes, 0, b"cxsparse");
        put(&mut bytes, 8, &u64::MAX.to_be_bytes());
        put(&mut bytes, 16, &self.table_offset.to_be_bytes());
        put(&mut bytes, 24, &0x0001_0000u32.to_be_bytes());
        put(&mut bytes, 28, &self.entries.to_be_bytes());
        put(&mut bytes, 32, &self.block_size.to_be_bytes());
        put(&mut bytes, 40, &self.parent_uuid);
        put(&mut bytes, 56, &self.parent_timestamp.to_be_bytes());
        for (n, unit) in self.parent_name.encode_utf16().take(255).enumerate() {
            put(&mut bytes, 64 + 2 * n, &unit.to_be_bytes());
        }
        for (n, locator) in self.locators.iter().take(8).enumerate() {
            let at = 576 + 24 * n;
            put(&mut bytes, at, &locator.platform);
            put(&mut bytes, at + 4, &locator.space.to_be_bytes());
            put(&mut bytes, at + 8, &locator.length.to_be_bytes());
            put(&mut bytes, at + 16, &locator.offset.to_be_bytes());
        }
        let sum = checksum(&bytes, 36);
        put(&mut bytes, 36, &sum.to_be_bytes());
        bytes
    }

    /// The bytes of a block's bitmap: a bit for each sector, in whole sectors.
    pub(crate) fn bitmap_size(&self) -> u64 {
        (u64::from(self.block_size) / 512)
            .div_ceil(8)
            .next_multiple_of(512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_follows_the_appendix_of_the_specification() {
        // 10 MiB: 301 x 4 x 17 is a little less, so one cylinder more.
        let geometry = Geometry::holding(20480);
        assert_eq!(geometry.total() * 512, 10_514_432);
        assert_eq!((geometry.heads, geometry.sectors), (4, 17));
        for sectors in [1, 68, 100_000, 1 << 20, 66_059_280, 1 << 28] {
            assert!(Geometry::holding(sectors).total() >= sectors.min(MAX_GEOMETRY_SECTORS));
        }
        assert_eq!(Geometry::holding(u64::MAX), Geometry::largest());
    }

    #[test]
    fn headers_survive_encoding() {
        let mut footer = Footer {
            features: 2,
            data_offset: 512,
            timestamp: 5,
            creator: *b"qem2",
            creator_version: 7,
            creator_os: *b"Wi2k",
            original_size: 1 << 20,
            current_size: 0,
            geometry: Geometry::largest(),
            disk_type: DiskType::Dynamic,
            uuid: [3; 16],
            saved_state: 0,
        };
        assert_eq!(footer.set_size(12345, true).unwrap(), 12800);
        assert_eq!(Footer::parse(&footer.encode()).unwrap(), footer);
        let mut broken = footer.encode();
        broken[50] ^= 1;
        assert!(Footer::parse(&broken).is_err());
        let header = DynamicHeader {
            table_offset: 1536,
            entries: 4,
            block_size: 2 << 20,
            parent_uuid: [1; 16],
            parent_timestamp: 9,
            parent_name: "b\u{e4}se.vhd".into(),
            locators: vec![Locator {
                platform: *b"W2ru",
                space: 512,
                length: 10,
                offset: 4096,
            }],
        };
        assert_eq!(
            DynamicHeader::parse(&header.encode(), 8 << 20).unwrap(),
            header
        );
        assert!(DynamicHeader::parse(&header.encode(), (8 << 20) + 512).is_err());
    }
}
