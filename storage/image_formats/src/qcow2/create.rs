//! Making new images.

use std::rc::Rc;

use block::{BlockBackend, BlockError, IoBuf, Medium, OpenGate, Result};

use super::header::{
    Autoclear, CRYPT_LUKS, Compatible, CompressionType, EncryptionExtension, Header, Incompatible,
    MAX_L1_BYTES, extension, feature_name_table,
};
use super::layout::{Mapping, set_refcount};
use super::{OpenOptions, Qcow2};
use crate::luks;

/// How much of a new image is allocated at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing but the header and its tables.
    #[default]
    Off,
    /// All mappings; the data is a hole in the file.
    Metadata,
    /// All mappings, and space reserved for the data.
    Falloc,
    /// All mappings, and zeroes written for the data.
    Full,
}

/// What a new image is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// In bytes.
    pub cluster_size: u64,
    /// 1 to 64.
    pub refcount_bits: u32,
    /// The backing file's name as it is stored.
    pub backing_file: Option<String>,
    /// The backing file's format as it is stored.
    pub backing_format: Option<String>,
    /// Put refcount updates off.
    pub lazy_refcounts: bool,
    /// How clusters are compressed, if they are.
    pub compression: CompressionType,
    /// Subclusters.
    pub extended_l2: bool,
    /// The external data file's name as it is stored.
    pub data_file: Option<String>,
    /// The data file reads as a raw image.
    pub data_file_raw: bool,
    /// How much to allocate.
    pub preallocation: Preallocation,
    /// How the guest's data is encrypted, if it is; the size there does not count.
    pub encryption: Option<luks::CreateOptions>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_size: 65_536,
            refcount_bits: 16,
            backing_file: None,
            backing_format: None,
            lazy_refcounts: false,
            compression: CompressionType::Zlib,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
            encryption: None,
        }
    }
}

fn refused(message: impl Into<String>) -> BlockError {
    BlockError::invalid_argument(message)
}

impl CreateOptions {
    fn validate(&self) -> Result<()> {
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return Err(refused(
                "Cluster size must be a power of two between 512 and 2048k",
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(refused(
                "Refcount width must be a power of two and may not exceed 64 bits",
            ));
        }
        if self.version < 3 {
            if self.refcount_bits != 16 {
                return Err(refused(
                    "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                     (use version=v3 or greater)",
                ));
            }
            let what = if self.lazy_refcounts {
                Some("Lazy refcounts")
            } else if self.compression != CompressionType::Zlib {
                Some("Non-zlib compression type")
            } else if self.extended_l2 {
                Some("Extended L2 entries")
            } else if self.data_file.is_some() {
                Some("External data files")
            } else {
                None
            };
            if let Some(what) = what {
                return Err(refused(format!(
                    "{what} only supported with compatibility level 1.1 and above (use version=v3 or \
                     greater)"
                )));
            }
        }
        if self.extended_l2 && self.cluster_size < 16 << 10 {
            return Err(refused(
                "Extended L2 entries are only supported with cluster sizes of at least \
                                16384 bytes",
            ));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(refused("data-file-raw requires data-file"));
        }
        if self.data_file_raw && self.encryption.is_some() {
            return Err(refused(
                "Encryption and data-file-raw cannot be used at the same time",
            ));
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return Err(refused(
                "Backing file and data-file-raw cannot be used at the same time",
            ));
        }
        Ok(())
    }

    /// The sizes in bytes of an image with these options: with `data` bytes of its disk stored, and
    /// with all of it. An estimate from above: metadata is counted for the whole disk.
    ///
    /// # Errors
    ///
    /// If the options do not go together.
    pub fn measure(&self, data: u64) -> Result<(u64, u64)> {
        let header = self.header()?;
        let cluster = self.cluster_size;
        let entry = if header.has_subclusters() { 16 } else { 8 };
        let disk = self.size.next_multiple_of(cluster);
        let l2_bytes = (disk / cluster * entry).next_multiple_of(cluster);
        let l1_bytes = (l2_bytes / cluster * 8).next_multiple_of(cluster);
        let luks_bytes = self.luks_length()?.next_multiple_of(cluster);
        let metadata = cluster + l2_bytes + l1_bytes + luks_bytes;
        let clusters = (metadata + disk) / cluster;
        let per_block = cluster * 8 / u64::from(self.refcount_bits);
        let (mut blocks, mut table) = (0, 0);
        loop {
            let needed = (clusters + blocks + table).div_ceil(per_block);
            let needed_table = (needed * 8).div_ceil(cluster);
            if (needed, needed_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed, needed_table);
        }
        let full = metadata + disk + (blocks + table) * cluster;
        Ok((full - disk + data.min(disk), full))
    }

    /// Bytes of the LUKS header; 0 without encryption.
    fn luks_length(&self) -> Result<u64> {
        self.encryption.as_ref().map_or(Ok(0), luks::header_length)
    }

    /// The header, without the places of the tables.
    pub(crate) fn header(&self) -> Result<Header> {
        self.validate()?;
        let mut header = Header {
            version: self.version,
            backing_file: self.backing_file.clone(),
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            cluster_bits: self.cluster_size.ilog2(),
            size: self.size,
            crypt_method: self.encryption.as_ref().map_or(0, |_| CRYPT_LUKS),
            l1_size: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: self.refcount_bits.ilog2(),
            compression: self.compression,
            extensions: Vec::new(),
        };
        let incompatible = &mut header.incompatible;
        incompatible.set(
            Incompatible::COMPRESSION,
            self.compression != CompressionType::Zlib,
        );
        incompatible.set(Incompatible::EXTENDED_L2, self.extended_l2);
        incompatible.set(Incompatible::DATA_FILE, self.data_file.is_some());
        header
            .compatible
            .set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        header
            .autoclear
            .set(Autoclear::RAW_DATA_FILE, self.data_file_raw);
        if self.version >= 3 {
            header.extensions.push(feature_name_table());
        }
        if self.encryption.is_some() {
            // Where it is comes later.
            header.set_encryption(EncryptionExtension {
                offset: 0,
                length: self.luks_length()?,
            });
        }
        // A small cluster has no room for the names.
        if header.encode().is_err() {
            header
                .extensions
                .retain(|e| e.kind != extension::FEATURE_NAMES);
        }
        let entries = header.l1_entries_for(self.size);
        if entries * 8 > MAX_L1_BYTES || self.size > i64::MAX.cast_unsigned() - self.cluster_size {
            let message = "The image size is too large (try using a larger cluster size)";
            return Err(refused(message));
        }
        header.l1_size = u32::try_from(entries).unwrap_or(u32::MAX);
        Ok(header)
    }
}

/// Makes an image in `medium`, which is emptied. The data file, if any, is opened through `gate`.
///
/// # Errors
///
/// `InvalidArgument` for options that do not go together, or what the host reports.
pub async fn create(
    medium: &Rc<dyn Medium>,
    gate: &dyn OpenGate,
    options: &CreateOptions,
) -> Result<()> {
    let mut header = options.header()?;
    let cluster = options.cluster_size;
    let keys = match &options.encryption {
        Some(encryption) => Some(luks::new_keys(encryption).await?),
        None => None,
    };
    medium.set_len(0).await?;
    // Header, refcount table, refcount blocks, L1 table, LUKS header, in this order.
    let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(cluster);
    let luks_length = options.luks_length()?;
    let tables = l1_clusters + luks_length.div_ceil(cluster);
    let per_block = cluster * 8 / u64::from(options.refcount_bits);
    let (mut blocks, mut table_clusters) = (1u64, 1u64);
    loop {
        let total = 1 + table_clusters + blocks + tables;
        let needed = total.div_ceil(per_block);
        let needed_table = (needed * 8).div_ceil(cluster);
        if needed <= blocks && needed_table <= table_clusters {
            break;
        }
        (blocks, table_clusters) = (needed.max(blocks), needed_table.max(table_clusters));
    }
    let total = 1 + table_clusters + blocks + tables;
    header.refcount_table_offset = cluster;
    header.refcount_table_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
    header.l1_offset = (1 + table_clusters + blocks) * cluster;
    let table: Vec<u8> = (0..blocks)
        .flat_map(|number| ((1 + table_clusters + number) * cluster).to_be_bytes())
        .collect();
    medium.write(cluster, IoBuf::from_slice(&table)).await?;
    for number in 0..blocks {
        let mut block = vec![0; cluster as usize];
        let used = total.saturating_sub(number * per_block).min(per_block);
        for index in 0..used {
            set_refcount(&mut block, header.refcount_order, index as usize, 1);
        }
        let place = (1 + table_clusters + number) * cluster;
        medium.write(place, IoBuf::from_slice(&block)).await?;
    }
    medium.set_len(total * cluster).await?;
    if let Some(keys) = keys {
        let offset = header.l1_offset + l1_clusters * cluster;
        keys.write(&**medium, offset).await?;
        header.set_encryption(EncryptionExtension {
            offset,
            length: luks_length,
        });
    }
    medium.flush().await?;
    medium
        .write(0, IoBuf::from_slice(&header.encode()?))
        .await?;
    medium.flush().await?;
    if options.data_file_raw {
        let name = options.data_file.clone().unwrap_or_default();
        let why = block::ImplicitFile::Data;
        let data = gate.open_medium(&medium.name(), &name, why, true).await?;
        data.set_len(options.size).await?;
    }
    if options.preallocation != Preallocation::Off {
        let open = OpenOptions {
            backing: false,
            secret: options.encryption.as_ref().and_then(|e| e.secret.clone()),
            ..OpenOptions::default()
        };
        let image = Qcow2::open(medium.clone(), gate, &open).await?;
        image
            .preallocate(0, options.size, options.preallocation)
            .await?;
        image.close().await?;
    }
    Ok(())
}

impl Qcow2 {
    /// Allocates the clusters of a range that has none at all; both ends at whole clusters, or at the
    /// disk's end.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub async fn preallocate(&self, offset: u64, end: u64, how: Preallocation) -> Result<()> {
        let size = self.geometry.cluster_size();
        let mut at = offset;
        while at < end {
            self.own_l2_table(at).await?;
            let span = 1u64 << (self.geometry.cluster_bits + self.geometry.l2_bits);
            let stop = ((at / span + 1) * span).min(end);
            let wanted = self.geometry.clusters(stop - at).min((64 << 20) / size);
            let allocation = self.allocate_data(at, wanted).await?;
            let length = allocation.count * size;
            match how {
                Preallocation::Off => {}
                Preallocation::Metadata => {
                    let needed = allocation.offset + length;
                    if self.data.len() < needed {
                        self.data.set_len(needed).await?;
                    }
                }
                Preallocation::Falloc => self.data.preallocate(allocation.offset, length).await?,
                Preallocation::Full => {
                    let zeroes = IoBuf::zeroed(length as usize);
                    self.data.write(allocation.offset, zeroes).await?;
                }
            }
            for number in 0..allocation.count {
                let place = allocation.offset + number * size;
                let data = self.geometry.all_parts();
                let mapping = Mapping::Host {
                    offset: place,
                    copied: true,
                    data,
                    zero: 0,
                };
                self.set_mapping(at + number * size, mapping).await?;
            }
            at += length;
        }
        self.sync().await
    }
}
