//! qcow2, versions 2 and 3.
//!
//! `header` and `layout` are the parsers, free of I/O; `cache` and `allocator` manage metadata; `sync`
//! has the one order in which metadata reaches the medium; `tables` maps clusters; `io` serves requests.

mod allocator;
mod bitmap;
mod cache;
pub mod check;
mod compress;
mod create;
mod encrypted;
mod header;
mod io;
mod layout;
mod resize;
mod snapshot;
mod sync;
mod tables;

pub use bitmap::BitmapInfo;
pub use check::{CheckReport, Repair};
pub use compress::ClusterCompressor;
pub use create::{CreateOptions, Preallocation, create};
pub use header::{
    Autoclear, BitmapsExtension, Compatible, CompressionType, EncryptionExtension, Extension,
    Header, Incompatible,
};
pub use snapshot::Snapshot;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use block::sync::RangeLocks;
use block::{
    BlockBackend, BlockError, BlockFuture, ErrorKind, Extent, ExtentQuery, ImplicitFile, IoBuf,
    Limits, Medium, OpenGate, Result, ZeroFlags,
};

use crate::details::Property;
use crate::luks::{Encryption, KeyChange, Secret};
use allocator::Refcounts;
use cache::Cache;
use header::CRYPT_LUKS;
use layout::Geometry;

/// How an image is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenOptions {
    /// Memory for L2 tables, in bytes.
    pub l2_cache: u64,
    /// Memory for refcounts, in bytes.
    pub refcount_cache: u64,
    /// Punch holes in the file where clusters are given back.
    pub discard: bool,
    /// Open the backing file; without it, unallocated parts read as zeroes.
    pub backing: bool,
    /// Open for checking: images marked as corrupt or not cleanly closed are left as they are.
    pub for_check: bool,
    /// The password of an encrypted image. Without it the image can only be described and checked.
    pub secret: Option<Secret>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            l2_cache: 32 << 20,
            refcount_cache: 8 << 20,
            discard: true,
            backing: true,
            for_check: false,
            secret: None,
        }
    }
}

/// An open qcow2 image.
pub struct Qcow2 {
    // Configuration.
    medium: Rc<dyn Medium>,
    /// Where guest data is: the medium itself, or the external data file.
    data: Rc<dyn Medium>,
    external_data: bool,
    encryption: Option<Rc<Encryption>>,
    geometry: Geometry,
    writable: bool,
    discards_medium: bool,
    backing: RefCell<Option<Rc<dyn BlockBackend>>>,
    // Metadata in memory; newer than the medium until `sync`.
    header: RefCell<Header>,
    size: Cell<u64>,
    l1: RefCell<Vec<u64>>,
    l1_dirty: RefCell<BTreeSet<usize>>,
    l2: Cache<Vec<u64>>,
    refcounts: Refcounts,
    /// Clusters (by number) with one reference less once the medium has forgotten it.
    to_free: RefCell<Vec<u64>>,
    snapshots: RefCell<Vec<Snapshot>>,
    bitmaps: RefCell<Vec<bitmap::Stored>>,
    /// Bitmaps have come or gone since the directory was written.
    bitmaps_changed: Cell<bool>,
    /// Places and lengths of what removed bitmaps took.
    unused_bitmap_data: RefCell<Vec<(u64, u64)>>,
    /// The compressed cluster that was read last.
    decompressed: RefCell<Option<(u64, Rc<Vec<u8>>)>>,
    // Who may do what at once.
    /// Guest clusters in use by requests.
    ranges: RangeLocks,
    /// Each of these is a plain lock: one range for all.
    allocating: RangeLocks,
    growing: RangeLocks,
    syncing: RangeLocks,
    syncing_refcounts: RangeLocks,
}

async fn read_table(medium: &dyn Medium, place: u64, entries: usize) -> Result<Vec<u64>> {
    let buffer = IoBuf::zeroed(entries * 8);
    medium.read(place, buffer.clone()).await?;
    let bytes = buffer.to_vec();
    let words = bytes
        .chunks_exact(8)
        .map(|b| u64::from_be_bytes(b.try_into().unwrap_or([0; 8])));
    Ok(words.collect())
}

/// Reads the header of an image.
///
/// # Errors
///
/// `InvalidImage` or `Unsupported`, naming the file.
pub async fn read_header(medium: &dyn Medium) -> Result<Header> {
    let first = IoBuf::zeroed(512);
    medium.read(0, first.clone()).await?;
    let parse = async {
        let bits = header::peek_cluster_bits(&first.to_vec())?;
        let cluster = IoBuf::zeroed(1 << bits);
        medium.read(0, cluster.clone()).await?;
        Header::parse(&cluster.to_vec())
    };
    parse
        .await
        .map_err(|e| e.context(format!("'{}'", medium.name())))
}

impl Qcow2 {
    /// Opens the image in `medium`; files that it names go through `gate`.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported` with what is wrong, or what the gate and the host report.
    pub async fn open(
        medium: Rc<dyn Medium>,
        gate: &dyn OpenGate,
        options: &OpenOptions,
    ) -> Result<Self> {
        let header = read_header(&*medium).await?;
        let name = medium.name();
        let writable = !medium.read_only();
        if header.incompatible.contains(Incompatible::CORRUPT) && writable && !options.for_check {
            let message = format!("'{name}' is marked as corrupt: repair it before writing to it");
            return Err(BlockError::invalid_image(message));
        }
        let data = open_data(&header, &medium, gate).await?;
        let external_data = data.is_some();
        let mut data = data.unwrap_or_else(|| medium.clone());
        let encryption = open_encryption(&header, &*medium, options).await;
        let encryption = encryption.map_err(|e| e.context(format!("'{name}'")))?;
        if let Some(encryption) = &encryption {
            data = Rc::new(encrypted::Encrypted {
                inner: data,
                encryption: encryption.clone(),
            });
        }
        let l1 = read_table(&*medium, header.l1_offset, header.l1_size as usize).await?;
        let geometry = Geometry::of(&header);
        let entries = (header.refcount_table_clusters as usize) << (geometry.cluster_bits - 3);
        let table = read_table(&*medium, header.refcount_table_offset, entries).await?;
        let snapshots = snapshot::read_all(&*medium, &header).await;
        let snapshots = snapshots.map_err(|e| e.context(format!("'{name}'")))?;
        let bitmaps = match bitmap::read_directory(&*medium, &header).await {
            Ok(bitmaps) => bitmaps,
            // The check says what is wrong.
            Err(_) if options.for_check => Vec::new(),
            Err(error) => return Err(error.context(format!("'{name}'"))),
        };
        let slices = options.l2_cache / tables::SLICE_SIZE.min(geometry.cluster_size());
        let blocks = options.refcount_cache >> geometry.cluster_bits;
        let image = Self {
            data,
            medium,
            external_data,
            encryption,
            geometry,
            writable,
            discards_medium: options.discard,
            backing: RefCell::new(None),
            size: Cell::new(header.size),
            header: RefCell::new(header),
            l1: RefCell::new(l1),
            l1_dirty: RefCell::default(),
            l2: Cache::new(slices as usize),
            refcounts: Refcounts::new(table, blocks as usize),
            to_free: RefCell::default(),
            snapshots: RefCell::new(snapshots),
            bitmaps: RefCell::new(bitmaps),
            bitmaps_changed: Cell::new(false),
            unused_bitmap_data: RefCell::default(),
            decompressed: RefCell::default(),
            ranges: RangeLocks::default(),
            allocating: RangeLocks::default(),
            growing: RangeLocks::default(),
            syncing: RangeLocks::default(),
            syncing_refcounts: RangeLocks::default(),
        };
        if options.backing {
            image.open_backing(gate).await?;
        }
        if writable && !options.for_check {
            image.prepare_for_writing().await?;
        }
        Ok(image)
    }

    async fn open_backing(&self, gate: &dyn OpenGate) -> Result<()> {
        let (name, format) = {
            let header = self.header.borrow();
            (header.backing_file.clone(), header.backing_format.clone())
        };
        if let Some(name) = name {
            let why = ImplicitFile::Backing { format };
            let backing = gate.open_backend(&self.medium.name(), &name, why).await?;
            *self.backing.borrow_mut() = Some(backing);
        }
        Ok(())
    }

    /// What a writer does first: repair refcounts that were left unwritten, and withdraw what it
    /// will not keep up.
    async fn prepare_for_writing(&self) -> Result<()> {
        if self
            .header
            .borrow()
            .incompatible
            .contains(Incompatible::DIRTY)
        {
            self.check(Repair::All).await?;
            let mut header = self.header.borrow().clone();
            header.incompatible.remove(Incompatible::DIRTY);
            *self.header.borrow_mut() = header;
            self.write_header_fields().await?;
        }
        let known = Autoclear::RAW_DATA_FILE | Autoclear::BITMAPS;
        let kept = self.header.borrow().autoclear & known;
        if bitmap::drop_stale(&mut self.header.borrow_mut()) {
            self.header.borrow_mut().autoclear = kept;
            self.write_header().await?;
        } else if self.header.borrow().autoclear != kept {
            self.header.borrow_mut().autoclear = kept;
            self.write_header_fields().await?;
        }
        self.begin_recording().await
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.header.borrow().clone()
    }

    /// The medium with the metadata.
    pub fn medium(&self) -> &Rc<dyn Medium> {
        &self.medium
    }

    /// The backing file, if it is open.
    pub fn backing(&self) -> Option<Rc<dyn BlockBackend>> {
        self.backing.borrow().clone()
    }

    /// Puts another disk under this one, without changing what the header says.
    pub fn set_backing(&self, backing: Option<Rc<dyn BlockBackend>>) {
        *self.backing.borrow_mut() = backing;
    }

    /// Changes what the header says about the backing file.
    ///
    /// # Errors
    ///
    /// If the name does not fit, or the header cannot be written.
    pub async fn change_backing_name(
        &self,
        name: Option<String>,
        format: Option<String>,
    ) -> Result<()> {
        self.change_header(|header| {
            header.backing_file = name;
            header.backing_format = format;
        })
        .await
    }

    /// Changes header fields that nothing else hangs on, and writes the header.
    ///
    /// # Errors
    ///
    /// If the header would not fit in a cluster, or cannot be written; then nothing has changed.
    pub async fn change_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let old = self.header.borrow().clone();
        change(&mut self.header.borrow_mut());
        let result = self.write_header().await;
        if result.is_err() {
            *self.header.borrow_mut() = old;
        }
        result
    }

    /// What the LUKS header of an encrypted image says.
    pub fn encryption(&self) -> Option<Vec<Property>> {
        Some(self.encryption.as_ref()?.describe())
    }

    /// Changes the passwords of an encrypted image.
    ///
    /// # Errors
    ///
    /// `Unsupported` if it is not encrypted, `InvalidArgument` or `PermissionDenied` with what is wrong, or what the host reports.
    pub async fn amend_keys(&self, change: &KeyChange) -> Result<()> {
        let place = self.header.borrow().encryption();
        let (Some(encryption), Some(place)) = (&self.encryption, place) else {
            return Err(BlockError::unsupported("the image is not encrypted"));
        };
        encryption.amend(&*self.medium, place.offset, change).await
    }

    /// The cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn is_raw_data_file(&self) -> bool {
        self.external_data
            && self
                .header
                .borrow()
                .autoclear
                .contains(Autoclear::RAW_DATA_FILE)
    }

    /// Stores one whole cluster (the last one of a disk may be cut short by the disk's end) that
    /// [`ClusterCompressor::compress`] has compressed.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if the offset is not a cluster's, `Unsupported` with an external data file.
    pub async fn write_compressed(&self, offset: u64, compressed: &[u8]) -> Result<()> {
        if self.external_data {
            return Err(BlockError::unsupported(
                "data files cannot hold compressed data",
            ));
        }
        if self.encryption.is_some() {
            let message = "Compression and encryption not supported at the same time";
            return Err(BlockError::unsupported(message));
        }
        if self.geometry.in_cluster(offset) != 0 || offset >= self.size.get() {
            let message = "compressed data is written to whole clusters";
            return Err(BlockError::invalid_argument(message));
        }
        self.write_compressed_guest(offset, compressed).await
    }

    async fn finish(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.store_bitmaps().await?;
        self.sync_all().await?;
        if self
            .header
            .borrow()
            .incompatible
            .contains(Incompatible::DIRTY)
        {
            self.header
                .borrow_mut()
                .incompatible
                .remove(Incompatible::DIRTY);
            self.write_header_fields().await?;
        }
        Ok(())
    }
}

async fn open_encryption(
    header: &Header,
    medium: &dyn Medium,
    options: &OpenOptions,
) -> Result<Option<Rc<Encryption>>> {
    let Some(place) = header
        .encryption()
        .filter(|_| header.crypt_method == CRYPT_LUKS)
    else {
        return Ok(None);
    };
    if options.secret.is_none() && !options.for_check {
        let message = "Parameter 'encrypt.key-secret' is required for cipher";
        return Err(BlockError::invalid_argument(message));
    }
    let secret = options.secret.as_ref();
    let opened = Encryption::open(medium, place.offset, secret).await?;
    Ok(Some(Rc::new(opened)))
}

async fn open_data(
    header: &Header,
    medium: &Rc<dyn Medium>,
    gate: &dyn OpenGate,
) -> Result<Option<Rc<dyn Medium>>> {
    if !header.incompatible.contains(Incompatible::DATA_FILE) {
        return Ok(None);
    }
    let Some(name) = &header.data_file else {
        let message = format!("'{}' does not say where its data file is", medium.name());
        return Err(BlockError::new(ErrorKind::InvalidImage, message));
    };
    let why = ImplicitFile::Data;
    gate.open_medium(&medium.name(), name, why, !medium.read_only())
        .await
        .map(Some)
}

impl BlockBackend for Qcow2 {
    fn limits(&self) -> Limits {
        Limits {
            size: self.size.get() / 512 * 512,
            logical_block_size: 512,
            physical_block_size: self.data.alignment().max(512),
            buffer_alignment: self.data.alignment(),
            discard_granularity: self.geometry.cluster_size() as u32,
            zero_granularity: self.geometry.subcluster_size() as u32,
            max_transfer: 1 << 30,
            read_only: !self.writable,
        }
    }

    fn format_name(&self) -> &'static str {
        "qcow2"
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.medium.name())
    }

    fn backing(&self) -> Option<Rc<dyn BlockBackend>> {
        Self::backing(self)
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.read_guest(offset, buf))
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.write_guest(offset, buf))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(self.write_zeroes_guest(offset, length, flags))
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(self.discard_guest(offset, length))
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.sync())
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        Box::pin(self.extents_guest(query))
    }

    fn resize(&self, size: u64) -> BlockFuture<'_, ()> {
        Box::pin(self.resize_guest(size))
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.finish())
    }
}
