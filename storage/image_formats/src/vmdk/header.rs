//! Headers of sparse extents: hosted ones (Virtual Disk Format 5.0, "Hosted Sparse Extents"), the older
//! ones of ESX (`COWD`), and `SESparse`. No I/O here.

use block::{BlockError, Result};

use crate::fields::{Fields, put};

pub(crate) const SECTOR: u64 = 512;
pub(crate) const HEADER_SIZE: usize = 512;
/// Where the directory lies, if only the footer says so.
const AT_END: u64 = u64::MAX;
/// The largest grain in sectors (32 MiB).
const MAX_GRAIN: u64 = 65536;
/// A directory with more entries is refused.
const MAX_DIRECTORY: u64 = 16 << 20;
/// The most sectors of an extent.
const MAX_CAPACITY: u64 = 1 << 53;
const SESPARSE_MAGIC: u64 = 0xcafe_babe;
const SESPARSE_VERSION: u64 = 0x2_0000_0001;

const REDUNDANT: u32 = 2;
const ZEROED: u32 = 4;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;

/// Whose format an extent has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// `KDMV`.
    Hosted,
    /// `COWD`.
    Cowd,
    /// Space-efficient sparse.
    SeSparse,
}

/// What a header says; places in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SparseHeader {
    pub(crate) family: Family,
    pub(crate) version: u32,
    /// Size of the extent in bytes.
    pub(crate) capacity: u64,
    /// Size of a grain in bytes.
    pub(crate) grain: u64,
    /// Entries of a grain table.
    pub(crate) table_entries: u64,
    pub(crate) directory: u64,
    /// The directory of the copies of the tables.
    pub(crate) redundant: Option<u64>,
    /// Place and length of an embedded descriptor.
    pub(crate) descriptor: Option<(u64, u64)>,
    /// Entries of 1 mean zeroes.
    pub(crate) zeroed: bool,
    pub(crate) compressed: bool,
    pub(crate) markers: bool,
    /// Nothing but metadata lies before this.
    pub(crate) data: u64,
    /// Where grain tables and grains are counted from (`SESparse`).
    pub(crate) tables: u64,
    /// As above.
    pub(crate) grains: u64,
}

fn bad(what: impl Into<String>) -> BlockError {
    BlockError::invalid_image(what)
}

/// A place that a header gives in sectors.
fn bytes(sectors: u64, what: &str) -> Result<u64> {
    if sectors > MAX_CAPACITY {
        return Err(bad(format!("{what} lies at an impossible place")));
    }
    Ok(sectors * SECTOR)
}

/// Whether a file that begins so is a hosted sparse extent.
pub(crate) fn is_hosted(first: &[u8]) -> bool {
    first.starts_with(b"KDMV")
}

/// Whether a file that begins so is a sparse extent of ESX.
pub(crate) fn is_cowd(first: &[u8]) -> bool {
    first.starts_with(b"COWD")
}

/// Whether the header of a hosted extent leaves it to the footer to say where the tables are.
pub(crate) fn is_in_footer(first: &[u8]) -> bool {
    Fields(first).le64(56) == AT_END
}

/// Checks the three sectors at the end of a file: marker, footer, marker of the end of the stream.
pub(crate) fn footer_of(end: &[u8]) -> Result<&[u8]> {
    let f = Fields(end);
    let marker_ok = f.le32(8) == 0 && f.le32(12) == 3;
    let end_ok = f.le64(1024) == 0 && f.le32(1032) == 0 && f.le32(1036) == 0;
    let footer = f.slice(512, HEADER_SIZE).len();
    if !marker_ok || !end_ok || footer < HEADER_SIZE || !is_hosted(&end[512..]) {
        return Err(bad(
            "the footer at the end of the file is missing or damaged",
        ));
    }
    Ok(&end[512..1024])
}

impl SparseHeader {
    /// Reads the header of a hosted extent, or its footer.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported`.
    pub(crate) fn parse_hosted(first: &[u8]) -> Result<Self> {
        let f = Fields(first);
        let (version, flags) = (f.le32(4), f.le32(8));
        if !is_hosted(first) {
            return Err(bad("this is no sparse extent"));
        }
        if !(1..=3).contains(&version) {
            let message = format!("sparse extents of version {version} are not supported");
            return Err(BlockError::unsupported(message));
        }
        let compressed = flags & COMPRESSED != 0;
        if compressed && f.le16(77) != 1 {
            let message = format!("the compression algorithm {} is unknown", f.le16(77));
            return Err(BlockError::unsupported(message));
        }
        let table_entries = u64::from(f.le32(44));
        if !(1..=512).contains(&table_entries) {
            return Err(bad(format!("grain tables of {table_entries} entries")));
        }
        let descriptor = match (f.le64(28), f.le64(36)) {
            (0, _) | (_, 0) => None,
            (at, length) => Some((
                bytes(at, "the descriptor")?,
                bytes(length, "the descriptor's end")?,
            )),
        };
        let redundant = match flags & REDUNDANT {
            0 => None,
            _ => Some(bytes(f.le64(48), "the redundant directory")?),
        };
        let header = Self {
            family: Family::Hosted,
            version,
            capacity: bytes(f.le64(12), "the extent's end")?,
            grain: grain(f.le64(20))?,
            table_entries,
            directory: match f.le64(56) {
                AT_END => AT_END,
                at => bytes(at, "the directory")?,
            },
            redundant: redundant.filter(|at| *at > 0),
            descriptor,
            zeroed: flags & ZEROED != 0,
            compressed,
            markers: flags & MARKERS != 0,
            data: bytes(f.le64(64), "the first grain").unwrap_or(0),
            tables: 0,
            grains: 0,
        };
        header.validate()
    }

    /// Reads the header of a sparse extent of ESX.
    ///
    /// # Errors
    ///
    /// As above.
    pub(crate) fn parse_cowd(first: &[u8]) -> Result<Self> {
        let f = Fields(first);
        if !is_cowd(first) {
            return Err(bad("this is no sparse extent of ESX"));
        }
        let header = Self {
            family: Family::Cowd,
            version: f.le32(4),
            capacity: u64::from(f.le32(12)) * SECTOR,
            grain: grain(u64::from(f.le32(16)))?,
            table_entries: 4096,
            directory: u64::from(f.le32(20)) * SECTOR,
            redundant: None,
            descriptor: None,
            zeroed: false,
            compressed: false,
            markers: false,
            data: 0,
            tables: 0,
            grains: 0,
        };
        header.validate()
    }

    /// Reads the constant header of a `SESparse` extent.
    ///
    /// # Errors
    ///
    /// As above.
    pub(crate) fn parse_sesparse(first: &[u8]) -> Result<Self> {
        let f = Fields(first);
        if f.le64(0) != SESPARSE_MAGIC {
            return Err(bad("this is no SESparse extent"));
        }
        if f.le64(8) != SESPARSE_VERSION {
            let message = format!("SESparse of version {:#x} is not supported", f.le64(8));
            return Err(BlockError::unsupported(message));
        }
        let table_sectors = f.le64(32);
        if f.le64(24) != 8 || table_sectors != 64 {
            return Err(BlockError::unsupported(
                "SESparse with grains other than 4 KiB, or tables other than 32 KiB, is not supported",
            ));
        }
        let header = Self {
            family: Family::SeSparse,
            version: 2,
            capacity: bytes(f.le64(16), "the extent's end")?,
            grain: 8 * SECTOR,
            table_entries: table_sectors * SECTOR / 8,
            directory: bytes(f.le64(128), "the directory")?,
            redundant: None,
            descriptor: None,
            zeroed: false,
            compressed: false,
            markers: false,
            data: 0,
            tables: bytes(f.le64(144), "the first grain table")?,
            grains: bytes(f.le64(192), "the first grain")?,
        };
        header.validate()
    }

    fn validate(self) -> Result<Self> {
        if self.directory_entries() > MAX_DIRECTORY {
            return Err(bad("the grain directory is larger than 64 MiB"));
        }
        Ok(self)
    }

    /// Bytes of an entry of directory and tables.
    pub(crate) fn width(&self) -> usize {
        match self.family {
            Family::Hosted | Family::Cowd => 4,
            Family::SeSparse => 8,
        }
    }

    /// Bytes of the disk that a grain table covers.
    pub(crate) fn table_covers(&self) -> u64 {
        self.table_entries * self.grain
    }

    /// Entries of the directory.
    pub(crate) fn directory_entries(&self) -> u64 {
        self.capacity.div_ceil(self.table_covers())
    }

    /// The header's bytes (hosted extents only).
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        let flags =
            1 | if self.redundant.is_some() {
                REDUNDANT
            } else {
                0
            } | if self.zeroed { ZEROED } else { 0 }
                | if self.compressed { COMPRESSED } else { 0 }
                | if self.markers { MARKERS } else { 0 };
        let (at, length) = self.descriptor.unwrap_or((0, 0));
        put(&mut bytes, 0, b"KDMV");
        put(&mut bytes, 4, &self.version.to_le_bytes());
        put(&mut bytes, 8, &flags.to_le_bytes());
        let places = [
            (12, self.capacity),
            (20, self.grain),
            (28, at),
            (36, length),
            (48, self.redundant.unwrap_or(0)),
            (56, self.directory),
            (64, self.data),
        ];
        for (place, value) in places {
            put(&mut bytes, place, &(value / SECTOR).to_le_bytes());
        }
        put(&mut bytes, 44, &(self.table_entries as u32).to_le_bytes());
        // Line ends, by which a transfer as text is found out.
        put(&mut bytes, 73, b"\n \r\n");
        put(&mut bytes, 77, &u16::from(self.compressed).to_le_bytes());
        bytes
    }
}

fn grain(sectors: u64) -> Result<u64> {
    if !(1..=MAX_GRAIN).contains(&sectors) {
        return Err(bad(format!("grains of {sectors} sectors")));
    }
    Ok(sectors * SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_encoding() {
        let header = SparseHeader {
            family: Family::Hosted,
            version: 3,
            capacity: 10 << 30,
            grain: 65536,
            table_entries: 512,
            directory: 40 * 512,
            redundant: Some(21 * 512),
            descriptor: Some((512, 10240)),
            zeroed: true,
            compressed: true,
            markers: true,
            data: 65536,
            tables: 0,
            grains: 0,
        };
        let bytes = header.encode();
        assert_eq!(SparseHeader::parse_hosted(&bytes).unwrap(), header);
        for (at, value) in [
            (4, 9),
            (44, 0),
            (45, 9),
            (20, 0),
            (23, 9),
            (77, 7),
            (59, 0x7f),
        ] {
            let mut broken = bytes.clone();
            broken[at] = value;
            if at == 20 {
                broken[20..28].fill(0);
            }
            if at == 44 {
                broken[44..48].fill(0);
            }
            let at_end = SparseHeader::parse_hosted(&broken);
            assert!(at_end.is_err() || at == 59, "{at}");
        }
    }
}
