//! Headers, region tables and metadata ([MS-VHDX] 2.2 to 2.6). No I/O here.

use block::{BlockError, Result};

use crate::fields::{Fields, put};
use crate::names::utf16le;

/// Places in the file that never change ([MS-VHDX] 2.2).
pub(crate) const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
pub(crate) const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
pub(crate) const HEADER_SIZE: usize = 4096;
pub(crate) const REGION_TABLE_SIZE: usize = 64 << 10;
pub(crate) const MIB: u64 = 1 << 20;
/// The largest disk.
pub(crate) const MAX_SIZE: u64 = 64 << 40;
/// A block allocation table with more entries is refused (128 MiB).
const MAX_ENTRIES: u64 = 16 << 20;
/// A log larger than this is refused.
const MAX_LOG: u32 = 64 << 20;
const MAX_REGIONS: usize = 2047;
const MAX_METADATA_ITEMS: usize = 2047;
/// A parent locator larger than this is refused.
const MAX_LOCATOR: u32 = 1 << 20;

/// A GUID as it stands in files.
pub(crate) type Guid = [u8; 16];

/// A GUID from its text, whose first three fields are stored with the lowest byte first.
pub(crate) const fn guid(text: &str) -> Guid {
    let text = text.as_bytes();
    let mut digits = [0u8; 16];
    let (mut at, mut n) = (0, 0);
    while at < text.len() {
        if text[at] == b'-' {
            at += 1;
            continue;
        }
        let mut value = 0;
        let mut k = 0;
        while k < 2 {
            let c = text[at + k];
            value = value * 16 + if c >= b'A' { c - b'A' + 10 } else { c - b'0' };
            k += 1;
        }
        digits[n] = value;
        n += 1;
        at += 2;
    }
    const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut out = [0; 16];
    let mut n = 0;
    while n < 16 {
        out[n] = digits[ORDER[n]];
        n += 1;
    }
    out
}

/// A GUID as text, without braces.
pub(crate) fn guid_text(guid: &Guid) -> String {
    let f = Fields(guid);
    let tail: String = guid[10..].iter().map(|b| format!("{b:02x}")).collect();
    format!(
        "{:08x}-{:04x}-{:04x}-{:02x}{:02x}-{tail}",
        f.le32(0),
        f.le16(4),
        f.le16(6),
        guid[8],
        guid[9]
    )
}

pub(crate) const BAT_REGION: Guid = guid("2DC27766-F623-4200-9D64-115E9BFD4A08");
pub(crate) const METADATA_REGION: Guid = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E");
pub(crate) const FILE_PARAMETERS: Guid = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
pub(crate) const DISK_SIZE: Guid = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
pub(crate) const DISK_ID: Guid = guid("BECA12AB-B2E6-4523-93EF-C309E000C746");
pub(crate) const LOGICAL_SECTOR: Guid = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
pub(crate) const PHYSICAL_SECTOR: Guid = guid("CDA348C7-445D-4471-9CC9-E9885251C556");
pub(crate) const PARENT_LOCATOR: Guid = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");
pub(crate) const LOCATOR_TYPE: Guid = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913");

/// The checksum of a structure, with the four bytes at `at` taken as zero.
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = crc32c::crc32c(&bytes[..at]);
    let sum = crc32c::crc32c_append(sum, &[0; 4]);
    crc32c::crc32c_append(sum, &bytes[at + 4..])
}

fn bad(what: impl Into<String>) -> BlockError {
    BlockError::invalid_image(what)
}

/// One of the two headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    pub(crate) file_write: Guid,
    pub(crate) data_write: Guid,
    pub(crate) log: Guid,
    pub(crate) log_version: u16,
    pub(crate) log_length: u32,
    pub(crate) log_offset: u64,
}

impl Header {
    /// `None` if there is no valid header.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let f = Fields(bytes);
        if bytes.len() < HEADER_SIZE
            || !bytes.starts_with(b"head")
            || f.le32(4) != checksum(&bytes[..HEADER_SIZE], 4)
            || f.le16(66) != 1
        {
            return None;
        }
        Some(Self {
            sequence: f.le64(8),
            file_write: f.bytes(16),
            data_write: f.bytes(32),
            log: f.bytes(48),
            log_version: f.le16(64),
            log_length: f.le32(68),
            log_offset: f.le64(72),
        })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        put(&mut bytes, 0, b"head");
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write);
        put(&mut bytes, 32, &self.data_write);
        put(&mut bytes, 48, &self.log);
        put(&mut bytes, 64, &self.log_version.to_le_bytes());
        put(&mut bytes, 66, &1u16.to_le_bytes());
        put(&mut bytes, 68, &self.log_length.to_le_bytes());
        put(&mut bytes, 72, &self.log_offset.to_le_bytes());
        let sum = checksum(&bytes, 4);
        put(&mut bytes, 4, &sum.to_le_bytes());
        bytes
    }

    /// Whether there is a log that can be written to.
    pub(crate) fn has_log(&self) -> bool {
        u64::from(self.log_length).is_multiple_of(MIB)
            && self.log_length > 0
            && self.log_offset.is_multiple_of(MIB)
            && (MIB..1 << 62).contains(&self.log_offset)
    }

    /// The current one of two headers, and its number.
    pub(crate) fn current(first: &[u8], second: &[u8]) -> Result<(usize, Self)> {
        let found = match (Self::parse(first), Self::parse(second)) {
            (Some(a), Some(b)) if a.sequence >= b.sequence => (0, a),
            (_, Some(b)) => (1, b),
            (Some(a), None) => (0, a),
            (None, None) => return Err(bad("both headers are damaged")),
        };
        let header = &found.1;
        if header.log_version != 0 && header.log != [0; 16] {
            let message = format!("log version {} is unknown", header.log_version);
            return Err(BlockError::unsupported(message));
        }
        if header.log != [0; 16] && !header.has_log() {
            return Err(bad("the header's log lies at an impossible place"));
        }
        if header.log != [0; 16] && header.log_length > MAX_LOG {
            return Err(bad("the log that is to be replayed is larger than 64 MiB"));
        }
        Ok(found)
    }
}

/// A part of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) id: Guid,
    pub(crate) offset: u64,
    pub(crate) length: u32,
    pub(crate) required: bool,
}

/// Reads a region table; `None` if it is damaged.
pub(crate) fn parse_regions(bytes: &[u8]) -> Option<Vec<Region>> {
    let f = Fields(bytes);
    let count = f.le32(8) as usize;
    if bytes.len() < REGION_TABLE_SIZE
        || !bytes.starts_with(b"regi")
        || f.le32(4) != checksum(&bytes[..REGION_TABLE_SIZE], 4)
        || count > MAX_REGIONS
    {
        return None;
    }
    let region = |n: usize| {
        let at = 16 + 32 * n;
        Region {
            id: f.bytes(at),
            offset: f.le64(at + 16),
            length: f.le32(at + 24),
            required: f.le32(at + 28) & 1 != 0,
        }
    };
    Some((0..count).map(region).collect())
}

pub(crate) fn encode_regions(regions: &[Region]) -> Vec<u8> {
    let mut bytes = vec![0; REGION_TABLE_SIZE];
    put(&mut bytes, 0, b"regi");
    put(&mut bytes, 8, &(regions.len() as u32).to_le_bytes());
    for (n, region) in regions.iter().take(MAX_REGIONS).enumerate() {
        let at = 16 + 32 * n;
        put(&mut bytes, at, &region.id);
        put(&mut bytes, at + 16, &region.offset.to_le_bytes());
        put(&mut bytes, at + 24, &region.length.to_le_bytes());
        put(
            &mut bytes,
            at + 28,
            &u32::from(region.required).to_le_bytes(),
        );
    }
    let sum = checksum(&bytes, 4);
    put(&mut bytes, 4, &sum.to_le_bytes());
    bytes
}

/// The two regions that every file has: block allocation table and metadata.
pub(crate) fn known_regions(regions: &[Region]) -> Result<(Region, Region)> {
    for region in regions {
        if !region.offset.is_multiple_of(MIB) || region.offset < MIB || region.offset >= 1 << 62 {
            return Err(bad("a region lies at an impossible place"));
        }
        if region.required && ![BAT_REGION, METADATA_REGION].contains(&region.id) {
            let message = format!("the region {} is unknown", guid_text(&region.id));
            return Err(BlockError::unsupported(message));
        }
    }
    let find = |id: Guid| regions.iter().find(|r| r.id == id).copied();
    match (find(BAT_REGION), find(METADATA_REGION)) {
        (Some(bat), Some(metadata)) => Ok((bat, metadata)),
        _ => Err(bad(
            "the region table lacks the block table or the metadata",
        )),
    }
}

/// A way to find the parent.
pub(crate) type Locator = Vec<(String, String)>;

/// What the disk is like ([MS-VHDX] 2.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub(crate) block_size: u64,
    pub(crate) leave_allocated: bool,
    pub(crate) has_parent: bool,
    pub(crate) size: u64,
    /// Where the size stands in the region.
    pub(crate) size_place: u64,
    pub(crate) disk_id: Guid,
    pub(crate) logical_sector: u32,
    pub(crate) physical_sector: u32,
    pub(crate) locator: Locator,
}

impl Metadata {
    /// Reads the metadata region.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported`.
    pub(crate) fn parse(region: &[u8]) -> Result<Self> {
        let f = Fields(region);
        if !region.starts_with(b"metadata") {
            return Err(bad("there is no metadata table"));
        }
        let count = f.le16(10) as usize;
        if count > MAX_METADATA_ITEMS {
            return Err(bad("the metadata table is too long"));
        }
        let mut items = Vec::with_capacity(count);
        for n in 0..count {
            let at = 32 + 32 * n;
            let id: Guid = f.bytes(at);
            let (offset, length) = (f.le32(at + 16), f.le32(at + 20));
            let flags = f.le32(at + 24);
            let known = [
                FILE_PARAMETERS,
                DISK_SIZE,
                DISK_ID,
                LOGICAL_SECTOR,
                PHYSICAL_SECTOR,
                PARENT_LOCATOR,
            ];
            if flags & 1 == 0 && known.contains(&id) {
                if length > MAX_LOCATOR
                    || u64::from(offset) + u64::from(length) > region.len() as u64
                {
                    return Err(bad("a metadata item reaches past its region"));
                }
                items.push((id, offset as usize, length as usize));
            } else if flags & 4 != 0 {
                let message = format!("the metadata item {} is unknown", guid_text(&id));
                return Err(BlockError::unsupported(message));
            }
        }
        let item = |id: Guid, least: usize, what: &str| {
            let found = items
                .iter()
                .find(|(i, _, length)| *i == id && *length >= least);
            found
                .map(|(_, at, length)| (*at, *length))
                .ok_or_else(|| bad(format!("{what} is missing")))
        };
        let (parameters, _) = item(FILE_PARAMETERS, 8, "the block size")?;
        let (size_at, _) = item(DISK_SIZE, 8, "the disk's size")?;
        let (logical, _) = item(LOGICAL_SECTOR, 4, "the logical sector size")?;
        let physical = item(PHYSICAL_SECTOR, 4, "").map_or(4096, |(at, _)| f.le32(at));
        let flags = f.le32(parameters + 4);
        let metadata = Self {
            block_size: u64::from(f.le32(parameters)),
            leave_allocated: flags & 1 != 0,
            has_parent: flags & 2 != 0,
            size: f.le64(size_at),
            size_place: size_at as u64,
            disk_id: item(DISK_ID, 16, "").map_or([0; 16], |(at, _)| f.bytes(at)),
            logical_sector: f.le32(logical),
            physical_sector: physical,
            locator: match item(PARENT_LOCATOR, 20, "") {
                Ok((at, length)) => parse_locator(f.slice(at, length))?,
                Err(_) => Vec::new(),
            },
        };
        metadata.validate()?;
        Ok(metadata)
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let block = self.block_size;
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            return Err(bad(
                "the block size is no power of two between 1 and 256 MiB",
            ));
        }
        if ![512, 4096].contains(&self.logical_sector)
            || ![512, 4096].contains(&self.physical_sector)
        {
            return Err(bad("a sector size is neither 512 nor 4096"));
        }
        if self.size > MAX_SIZE || !self.size.is_multiple_of(u64::from(self.logical_sector)) {
            return Err(bad(
                "the disk's size is larger than 64 TiB or no multiple of a sector",
            ));
        }
        if self.entries() > MAX_ENTRIES {
            return Err(bad("the block allocation table is larger than 128 MiB"));
        }
        Ok(())
    }

    /// Payload blocks of a chunk, which share a bitmap block.
    pub(crate) fn chunk_ratio(&self) -> u64 {
        (1 << 23) * u64::from(self.logical_sector) / self.block_size
    }

    /// Entries of the block allocation table.
    pub(crate) fn entries(&self) -> u64 {
        let blocks = self.size.div_ceil(self.block_size);
        let ratio = self.chunk_ratio();
        if self.has_parent {
            blocks.div_ceil(ratio) * (ratio + 1)
        } else {
            blocks + blocks.saturating_sub(1) / ratio
        }
    }

    /// The table entry of a payload block.
    pub(crate) fn entry_of(&self, block: u64) -> usize {
        (block + block / self.chunk_ratio()) as usize
    }

    /// The table entry of the bitmap block that covers a payload block.
    pub(crate) fn bitmap_entry_of(&self, block: u64) -> usize {
        let ratio = self.chunk_ratio();
        (block / ratio * (ratio + 1) + ratio) as usize
    }

    /// The region's bytes, 128 KiB of them; the items begin behind the table of 64 KiB.
    pub(crate) fn encode(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 128 << 10];
        let mut items: Vec<(Guid, Vec<u8>, u32)> = Vec::new();
        let flags = u32::from(self.leave_allocated) | u32::from(self.has_parent) << 1;
        let block_size = self.block_size as u32;
        let parameters = [block_size.to_le_bytes(), flags.to_le_bytes()].concat();
        // Required; and what belongs to the disk rather than to the file.
        items.push((FILE_PARAMETERS, parameters, 4));
        items.push((DISK_SIZE, self.size.to_le_bytes().to_vec(), 6));
        items.push((DISK_ID, self.disk_id.to_vec(), 6));
        items.push((
            LOGICAL_SECTOR,
            self.logical_sector.to_le_bytes().to_vec(),
            6,
        ));
        items.push((
            PHYSICAL_SECTOR,
            self.physical_sector.to_le_bytes().to_vec(),
            6,
        ));
        if self.has_parent {
            items.push((PARENT_LOCATOR, encode_locator(&self.locator), 4));
        }
        put(&mut bytes, 0, b"metadata");
        put(&mut bytes, 10, &(items.len() as u16).to_le_bytes());
        let mut place = 64 << 10;
        for (n, (id, data, flags)) in items.iter().enumerate() {
            let at = 32 + 32 * n;
            put(&mut bytes, at, id);
            put(&mut bytes, at + 16, &(place as u32).to_le_bytes());
            put(&mut bytes, at + 20, &(data.len() as u32).to_le_bytes());
            put(&mut bytes, at + 24, &flags.to_le_bytes());
            put(&mut bytes, place, data);
            if *id == DISK_SIZE {
                self.size_place = place as u64;
            }
            place += data.len().next_multiple_of(8);
        }
        bytes
    }
}

fn parse_locator(bytes: &[u8]) -> Result<Locator> {
    let f = Fields(bytes);
    if f.bytes::<16>(0) != LOCATOR_TYPE {
        return Err(BlockError::unsupported(
            "the parent locator is of an unknown kind",
        ));
    }
    let count = f.le16(18) as usize;
    let mut pairs = Vec::new();
    for n in 0..count {
        let at = 20 + 12 * n;
        if at + 12 > bytes.len() {
            return Err(bad("the parent locator is cut off"));
        }
        let text = |place: usize, length: usize| utf16le(f.slice(place, length));
        let key = text(f.le32(at) as usize, f.le16(at + 8) as usize);
        let value = text(f.le32(at + 4) as usize, f.le16(at + 10) as usize);
        pairs.push((key, value));
        // Names that overlap must not multiply.
        if pairs.len() > 64 {
            return Err(bad("the parent locator has too many entries"));
        }
    }
    Ok(pairs)
}

fn encode_locator(pairs: &Locator) -> Vec<u8> {
    let mut bytes = vec![0; 20 + 12 * pairs.len()];
    put(&mut bytes, 0, &LOCATOR_TYPE);
    put(&mut bytes, 18, &(pairs.len() as u16).to_le_bytes());
    for (n, (key, value)) in pairs.iter().enumerate() {
        let at = 20 + 12 * n;
        for (text, place, length) in [(key, at, at + 8), (value, at + 4, at + 10)] {
            let start = bytes.len() as u32;
            let units: Vec<u8> = text
                .encode_utf16()
                .take(2000)
                .flat_map(u16::to_le_bytes)
                .collect();
            put(&mut bytes, place, &start.to_le_bytes());
            put(&mut bytes, length, &(units.len() as u16).to_le_bytes());
            bytes.extend(units);
        }
    }
    bytes
}

/// The state of a payload block ([MS-VHDX] 2.5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    NotPresent,
    /// Undefined, or given back: what it reads as is zero here.
    Unmapped,
    Zero,
    Full(u64),
    Partial(u64),
}

impl State {
    /// Takes an entry of the table apart; `None` if it means nothing.
    pub(crate) fn of(entry: u64) -> Option<Self> {
        let place = entry & !0xf_ffff;
        if place > i64::MAX.cast_unsigned() - (1 << 30) {
            return None;
        }
        Some(match entry & 7 {
            0 => Self::NotPresent,
            1 | 3 => Self::Unmapped,
            2 => Self::Zero,
            6 => Self::Full(place),
            7 => Self::Partial(place),
            _ => return None,
        })
    }

    pub(crate) fn entry(self) -> u64 {
        match self {
            Self::NotPresent => 0,
            Self::Unmapped => 3,
            Self::Zero => 2,
            Self::Full(place) => place | 6,
            Self::Partial(place) => place | 7,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_have_microsofts_byte_order() {
        assert_eq!(
            BAT_REGION[..8],
            [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]
        );
        assert_eq!(
            guid_text(&BAT_REGION),
            "2dc27766-f623-4200-9d64-115e9bfd4a08"
        );
    }

    #[test]
    fn metadata_survives_encoding() {
        let mut metadata = Metadata {
            block_size: 32 << 20,
            leave_allocated: false,
            has_parent: true,
            size: 100 << 30,
            size_place: 0,
            disk_id: [4; 16],
            logical_sector: 4096,
            physical_sector: 4096,
            locator: vec![("relative_path".into(), ".\\b\u{e4}se.vhdx".into())],
        };
        let bytes = metadata.encode();
        assert_eq!(Metadata::parse(&bytes).unwrap(), metadata);
        assert_eq!(metadata.chunk_ratio(), 1024);
        assert_eq!(metadata.entry_of(1024), 1025);
        assert_eq!(metadata.bitmap_entry_of(5), 1024);
    }
}
