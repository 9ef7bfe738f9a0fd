//! The header of a qcow2 file and its extensions: parsing and encoding, without I/O.
//!
//! Source: the qcow2 image file format specification (docs/interop/qcow2), sections "General",
//! "Header extensions", "Feature name table".

use bitflags::bitflags;
use block::{BlockError, Result};

/// "QFI\xfb".
pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// Cluster sizes from 512 bytes to 2 MiB.
pub(crate) const MIN_CLUSTER_BITS: u32 = 9;
pub(crate) const MAX_CLUSTER_BITS: u32 = 21;
/// The largest L1 table that is accepted, in bytes: a stated bound against hostile files.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// The largest refcount table that is accepted, in bytes.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots.
pub(crate) const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_NAME: usize = 1023;
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
const V3_FULL_LENGTH: usize = 112;

bitflags! {
    /// Features without which the image cannot be read right.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong: lazy refcounts and no clean close.
        const DIRTY = 1 << 0;
        /// Some structure is known to be corrupt: no writes.
        const CORRUPT = 1 << 1;
        /// The guest's data is in another file.
        const DATA_FILE = 1 << 2;
        /// The compression type field counts.
        const COMPRESSION = 1 << 3;
        /// L2 entries have subcluster bitmaps.
        const EXTENDED_L2 = 1 << 4;
        const _ = !0;
    }

    /// Features that may be ignored.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Compatible: u64 {
        /// Refcount updates may be put off until the image is closed.
        const LAZY_REFCOUNTS = 1 << 0;
        const _ = !0;
    }

    /// Features whose bit a writer that does not know them clears.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent with the data.
        const BITMAPS = 1 << 0;
        /// The external data file reads as a raw image of the disk.
        const RAW_DATA_FILE = 1 << 1;
        const _ = !0;
    }
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CompressionType {
    /// Raw deflate with a window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// The name that people write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// Types of header extensions.
pub(crate) mod extension {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    pub(crate) const DATA_FILE: u32 = 0x4441_5441;
    pub(crate) const ENCRYPTION: u32 = 0x0537_be77;
}

/// A header extension that is kept as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// Its type number.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// Where the persistent bitmaps' directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many bitmaps there are.
    pub count: u32,
    /// The directory's length in bytes.
    pub directory_size: u64,
    /// The directory's offset in the file.
    pub directory_offset: u64,
}

/// Where an encrypted image's LUKS header is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncryptionExtension {
    /// The header's offset in the file.
    pub offset: u64,
    /// Its length in bytes, with the places for passwords.
    pub length: u64,
}

/// `crypt_method` of an image that is encrypted as a LUKS volume is.
pub(crate) const CRYPT_LUKS: u32 = 2;
/// The largest LUKS header that is accepted, in bytes.
const MAX_ENCRYPTION_HEADER: u64 = 64 << 20;

/// A header in plain values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The backing file as the image names it.
    pub backing_file: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<String>,
    /// The external data file as the image names it.
    pub data_file: Option<String>,
    /// The cluster size as a power of two.
    pub cluster_bits: u32,
    /// The disk's size in bytes.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// The active L1 table's number of entries.
    pub l1_size: u32,
    /// The active L1 table's place.
    pub l1_offset: u64,
    /// The refcount table's place.
    pub refcount_table_offset: u64,
    /// The refcount table's length in clusters.
    pub refcount_table_clusters: u32,
    /// How many internal snapshots there are.
    pub snapshot_count: u32,
    /// The snapshot table's place.
    pub snapshots_offset: u64,
    /// Features that must be known.
    pub incompatible: Incompatible,
    /// Features that may be ignored.
    pub compatible: Compatible,
    /// Features that unknowing writers clear.
    pub autoclear: Autoclear,
    /// The refcount width in bits as a power of two.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// Extensions other than the ones above, in order.
    pub extensions: Vec<Extension>,
}

fn invalid(message: impl Into<String>) -> BlockError {
    BlockError::invalid_image(message)
}

/// A cursor over bytes that fails softly.
fn be32(bytes: &[u8], at: usize) -> Result<u32> {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    field
        .map(u32::from_be_bytes)
        .ok_or_else(|| invalid("the qcow2 header is cut short"))
}

fn be64(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    field
        .map(u64::from_be_bytes)
        .ok_or_else(|| invalid("the qcow2 header is cut short"))
}

/// The cluster size of a file that begins with `bytes`, as a power of two.
pub(crate) fn peek_cluster_bits(bytes: &[u8]) -> Result<u32> {
    if be32(bytes, 0)? != MAGIC {
        return Err(invalid("not a qcow2 image"));
    }
    let version = be32(bytes, 4)?;
    if !(2..=3).contains(&version) {
        return Err(BlockError::unsupported(format!(
            "qcow2 version {version} is not supported"
        )));
    }
    let bits = be32(bytes, 20)?;
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        return Err(invalid(format!(
            "a cluster size of 2^{bits} bytes is not 2^9 to 2^21"
        )));
    }
    Ok(bits)
}

impl Header {
    /// Reads a header from the first cluster of a file (or as much of it as there is).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let cluster_bits = peek_cluster_bits(bytes)?;
        let bytes = &bytes[..bytes.len().min(1 << cluster_bits)];
        let version = be32(bytes, 4)?;
        let mut header = Self {
            version,
            backing_file: None,
            backing_format: None,
            data_file: None,
            cluster_bits,
            size: be64(bytes, 24)?,
            crypt_method: be32(bytes, 32)?,
            l1_size: be32(bytes, 36)?,
            l1_offset: be64(bytes, 40)?,
            refcount_table_offset: be64(bytes, 48)?,
            refcount_table_clusters: be32(bytes, 56)?,
            snapshot_count: be32(bytes, 60)?,
            snapshots_offset: be64(bytes, 64)?,
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: 4,
            compression: CompressionType::Zlib,
            extensions: Vec::new(),
        };
        let mut header_length = V2_LENGTH;
        if version == 3 {
            header_length = header.parse_version_3(bytes)?;
        }
        let backing_offset = be64(bytes, 8)?;
        let backing_length = be32(bytes, 16)? as usize;
        let extensions_end = if backing_offset == 0 {
            bytes.len()
        } else {
            usize::try_from(backing_offset)
                .unwrap_or(usize::MAX)
                .min(bytes.len())
        };
        header.parse_extensions(bytes, header_length, extensions_end)?;
        if backing_offset != 0 {
            header.backing_file = Some(backing_name(bytes, backing_offset, backing_length)?);
        }
        header.check()?;
        Ok(header)
    }

    fn parse_version_3(&mut self, bytes: &[u8]) -> Result<usize> {
        self.incompatible = Incompatible::from_bits_retain(be64(bytes, 72)?);
        self.compatible = Compatible::from_bits_retain(be64(bytes, 80)?);
        self.autoclear = Autoclear::from_bits_retain(be64(bytes, 88)?);
        self.refcount_order = be32(bytes, 96)?;
        let length = be32(bytes, 100)? as usize;
        if length < V3_LENGTH || length > bytes.len() {
            return Err(invalid(format!(
                "a qcow2 header length of {length} bytes is impossible"
            )));
        }
        let compression = if length > V3_LENGTH {
            bytes[V3_LENGTH]
        } else {
            0
        };
        self.compression = match compression {
            0 => CompressionType::Zlib,
            1 => CompressionType::Zstd,
            other => {
                let message = format!("qcow2 compression type {other} is not supported");
                return Err(BlockError::unsupported(message));
            }
        };
        if (compression != 0) != self.incompatible.contains(Incompatible::COMPRESSION) {
            return Err(invalid(
                "the compression type does not agree with its feature bit",
            ));
        }
        Ok(length)
    }

    fn parse_extensions(&mut self, bytes: &[u8], start: usize, end: usize) -> Result<()> {
        let mut at = start;
        while at + 8 <= end {
            let kind = be32(bytes, at)?;
            let length = be32(bytes, at + 4)? as usize;
            if kind == extension::END {
                break;
            }
            let data = at
                .checked_add(8)
                .and_then(|from| bytes.get(from..from.checked_add(length)?));
            let Some(data) = data.filter(|_| at + 8 + length <= end) else {
                return Err(invalid(format!(
                    "header extension {kind:#010x} is too large"
                )));
            };
            match kind {
                extension::BACKING_FORMAT => self.backing_format = Some(text(data)),
                extension::DATA_FILE => self.data_file = Some(text(data)),
                _ => self.extensions.push(Extension {
                    kind,
                    data: data.to_vec(),
                }),
            }
            at += 8 + length.next_multiple_of(8);
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.check_features()?;
        let cluster = 1u64 << self.cluster_bits;
        if self.refcount_order > 6 {
            let message = format!(
                "a refcount width of 2^{} bits is more than 64",
                self.refcount_order
            );
            return Err(invalid(message));
        }
        if self.size > i64::MAX.cast_unsigned() - cluster {
            return Err(invalid(format!(
                "a disk of {} bytes is too large",
                self.size
            )));
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            let message = format!(
                "an L1 table of {} entries is larger than the limit",
                self.l1_size
            );
            return Err(invalid(message));
        }
        if u64::from(self.l1_size) < self.l1_entries_for(self.size) {
            return Err(invalid(
                "the L1 table is too small for the size of the disk",
            ));
        }
        let table_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES || table_bytes == 0 {
            let message = format!("a refcount table of {table_bytes} bytes is impossible");
            return Err(invalid(message));
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(invalid(format!(
                "{} snapshots are too many",
                self.snapshot_count
            )));
        }
        let places = [
            ("L1 table", self.l1_offset, u64::from(self.l1_size) * 8),
            ("refcount table", self.refcount_table_offset, table_bytes),
            ("snapshot table", self.snapshots_offset, 0),
        ];
        for (what, offset, length) in places {
            let end = offset.checked_add(length);
            if offset & (cluster - 1) != 0 || end.is_none_or(|e| e > i64::MAX.cast_unsigned()) {
                return Err(invalid(format!("the {what} cannot be at {offset:#x}")));
            }
        }
        if self.refcount_table_offset == 0 {
            return Err(invalid("there is no refcount table"));
        }
        if self.incompatible.contains(Incompatible::EXTENDED_L2) && self.cluster_bits < 14 {
            return Err(invalid(
                "extended L2 entries need clusters of 16 KiB or more",
            ));
        }
        match self.crypt_method {
            0 => Ok(()),
            1 => Err(BlockError::unsupported(
                "AES-encrypted qcow2 images are not supported",
            )),
            CRYPT_LUKS => self.check_encryption(),
            other => Err(invalid(format!("encryption method {other} is unknown"))),
        }
    }

    fn check_encryption(&self) -> Result<()> {
        let Some(EncryptionExtension { offset, length }) = self.encryption() else {
            return Err(invalid("the image does not say where its LUKS header is"));
        };
        let cluster = 1u64 << self.cluster_bits;
        let end = offset.checked_add(length);
        if offset & (cluster - 1) != 0
            || offset == 0
            || length > MAX_ENCRYPTION_HEADER
            || end.is_none_or(|end| end > i64::MAX.cast_unsigned())
        {
            let message = format!("a LUKS header of {length} bytes cannot be at {offset:#x}");
            return Err(invalid(message));
        }
        Ok(())
    }

    fn check_features(&self) -> Result<()> {
        let known = Incompatible::DIRTY
            | Incompatible::CORRUPT
            | Incompatible::DATA_FILE
            | Incompatible::COMPRESSION
            | Incompatible::EXTENDED_L2;
        let unknown = self.incompatible.bits() & !known.bits();
        if unknown == 0 {
            return Ok(());
        }
        let names: Vec<String> = (0..64)
            .filter(|bit| unknown >> bit & 1 == 1)
            .map(|bit| {
                self.feature_name(0, bit)
                    .unwrap_or_else(|| format!("bit {bit}"))
            })
            .collect();
        let message = format!("unknown incompatible qcow2 feature: {}", names.join(", "));
        Err(BlockError::unsupported(message))
    }

    /// The name of a feature bit as the image's own feature name table has it.
    fn feature_name(&self, kind: u8, bit: u8) -> Option<String> {
        let table = self
            .extensions
            .iter()
            .find(|e| e.kind == extension::FEATURE_NAMES)?;
        let entry = table
            .data
            .chunks_exact(48)
            .find(|e| e[0] == kind && e[1] == bit)?;
        let name = entry[2..].split(|b| *b == 0).next()?;
        let name = String::from_utf8_lossy(name);
        Some(name.chars().filter(|c| !c.is_control()).collect())
    }

    /// How many L1 entries a disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        let entry_bits = if self.has_subclusters() { 4 } else { 3 };
        let bits = self.cluster_bits * 2 - entry_bits;
        size.div_ceil(1 << bits)
    }

    /// Whether L2 entries have subcluster bitmaps.
    pub fn has_subclusters(&self) -> bool {
        self.incompatible.contains(Incompatible::EXTENDED_L2)
    }

    /// Where the LUKS header is, if the image says so.
    pub fn encryption(&self) -> Option<EncryptionExtension> {
        let of_kind = |e: &&Extension| e.kind == extension::ENCRYPTION;
        let data = &self.extensions.iter().find(of_kind)?.data;
        Some(EncryptionExtension {
            offset: be64(data, 0).ok()?,
            length: be64(data, 8).ok()?,
        })
    }

    /// Says where the LUKS header is.
    pub(crate) fn set_encryption(&mut self, place: EncryptionExtension) {
        self.extensions.retain(|e| e.kind != extension::ENCRYPTION);
        let data = [place.offset.to_be_bytes(), place.length.to_be_bytes()].concat();
        let kind = extension::ENCRYPTION;
        self.extensions.push(Extension { kind, data });
    }

    /// The bitmaps extension, if there is a well-formed one.
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        let data = &self
            .extensions
            .iter()
            .find(|e| e.kind == extension::BITMAPS)?
            .data;
        Some(BitmapsExtension {
            count: be32(data, 0).ok()?,
            directory_size: be64(data, 8).ok()?,
            directory_offset: be64(data, 16).ok()?,
        })
    }

    /// The bytes of the first cluster up to the end of the backing file's name.
    ///
    /// # Errors
    ///
    /// If it does not fit in a cluster.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(self.version.to_be_bytes());
        bytes.extend([0; 12]); // the backing file's name, below
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.crypt_method.to_be_bytes());
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.refcount_table_offset.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.snapshot_count.to_be_bytes());
        bytes.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            bytes.extend(self.incompatible.bits().to_be_bytes());
            bytes.extend(self.compatible.bits().to_be_bytes());
            bytes.extend(self.autoclear.bits().to_be_bytes());
            bytes.extend(self.refcount_order.to_be_bytes());
            let length = u32::try_from(V3_FULL_LENGTH).expect("a small constant");
            bytes.extend(length.to_be_bytes());
            bytes.push(u8::from(self.compression == CompressionType::Zstd));
            bytes.resize(V3_FULL_LENGTH, 0);
        }
        for (kind, name) in [
            (extension::BACKING_FORMAT, &self.backing_format),
            (extension::DATA_FILE, &self.data_file),
        ] {
            if let Some(name) = name {
                push_extension(&mut bytes, kind, name.as_bytes());
            }
        }
        for extension in &self.extensions {
            push_extension(&mut bytes, extension.kind, &extension.data);
        }
        push_extension(&mut bytes, extension::END, &[]);
        if let Some(name) = &self.backing_file {
            if name.len() > MAX_NAME {
                let message = "the backing file's name is longer than 1023 bytes";
                return Err(BlockError::invalid_argument(message));
            }
            let place = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&place.to_be_bytes());
            let length = u32::try_from(name.len()).unwrap_or(0);
            bytes[16..20].copy_from_slice(&length.to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        if bytes.len() > 1 << self.cluster_bits {
            let message = "the header with its extensions does not fit in a cluster";
            return Err(BlockError::invalid_argument(message));
        }
        Ok(bytes)
    }
}

fn push_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn text(data: &[u8]) -> String {
    String::from_utf8_lossy(data).into_owned()
}

fn backing_name(bytes: &[u8], offset: u64, length: usize) -> Result<String> {
    if length > MAX_NAME {
        return Err(invalid("the backing file's name is longer than 1023 bytes"));
    }
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = start
        .checked_add(length)
        .and_then(|end| bytes.get(start..end));
    name.map(text)
        .ok_or_else(|| invalid("the backing file's name is outside the first cluster"))
}

/// The feature name table that this program writes.
pub(crate) fn feature_name_table() -> Extension {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = Vec::with_capacity(48 * names.len());
    for (kind, bit, name) in names {
        let start = data.len();
        data.extend([kind, bit]);
        data.extend(name.as_bytes());
        data.resize(start + 48, 0);
    }
    Extension {
        kind: extension::FEATURE_NAMES,
        data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;

    fn sample() -> Header {
        Header {
            version: 3,
            backing_file: Some("base.img".into()),
            backing_format: Some("raw".into()),
            data_file: None,
            cluster_bits: 16,
            size: 1 << 30,
            crypt_method: 0,
            l1_size: 2,
            l1_offset: 0x30000,
            refcount_table_offset: 0x10000,
            refcount_table_clusters: 1,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: Incompatible::COMPRESSION,
            compatible: Compatible::LAZY_REFCOUNTS,
            autoclear: Autoclear::empty(),
            refcount_order: 4,
            compression: CompressionType::Zstd,
            extensions: vec![
                feature_name_table(),
                Extension {
                    kind: 0x1234_5678,
                    data: vec![1, 2, 3],
                },
            ],
        }
    }

    #[test]
    fn encoded_headers_read_back() {
        let header = sample();
        assert_eq!(Header::parse(&header.encode().unwrap()).unwrap(), header);
        let old = Header {
            version: 2,
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            compression: CompressionType::Zlib,
            ..header
        };
        assert_eq!(Header::parse(&old.encode().unwrap()).unwrap(), old);
    }

    #[test]
    fn unknown_features_are_refused_by_name() {
        let mut header = sample();
        header.incompatible |= Incompatible::from_bits_retain(1 << 9 | 1 << 40);
        let table = &mut header.extensions[0].data;
        let start = table.len();
        table.extend([0, 9]);
        table.extend(b"time travel");
        table.resize(start + 48, 0);
        let error = Header::parse(&header.encode().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("time travel, bit 40"), "{error}");
    }

    #[test]
    fn impossible_values_are_refused() {
        let good = sample().encode().unwrap();
        let with = |at: usize, value: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            Header::parse(&bytes).unwrap_err().to_string()
        };
        assert!(with(20, &22u32.to_be_bytes()).contains("cluster size"));
        assert!(with(36, &u32::MAX.to_be_bytes()).contains("L1 table"));
        assert!(with(36, &1u32.to_be_bytes()).contains("too small"));
        assert!(with(40, &1u64.to_be_bytes()).contains("L1 table"));
        assert!(with(56, &u32::MAX.to_be_bytes()).contains("refcount table"));
        assert!(with(96, &7u32.to_be_bytes()).contains("refcount width"));
        assert!(with(32, &2u32.to_be_bytes()).contains("LUKS"));
        assert!(with(24, &u64::MAX.to_be_bytes()).contains("too large"));
        assert!(with(16, &2000u32.to_be_bytes()).contains("1023"));
        assert!(with(100, &8u32.to_be_bytes()).contains("header length"));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            changes in proptest::collection::vec((0usize..200, proptest::num::u8::ANY), 0..20),
            length in 0usize..400,
        ) {
            let mut bytes = sample().encode().unwrap();
            bytes.truncate(length);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            let _ = Header::parse(&bytes);
        }
    }
}
