//! Persistent dirty bitmaps: their directory, loading and storing them, and recording writes in them.
//!
//! Source: the qcow2 specification, sections "Bitmaps extension" and "Bitmaps". A bitmap that records writes is marked as in use
//! in the file before the first of them, and stored when the image is closed; who finds it marked knows that it was not.

use std::rc::Rc;

use block::{BlockError, DirtyBitmap, ErrorKind, IoBuf, Medium, Result};

use super::header::{Autoclear, BitmapsExtension, Extension, Header, extension};
use super::{Qcow2, read_table};

/// The directory is no longer than this, in bytes.
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_BITMAPS: u32 = 65_535;
const MAX_NAME: usize = 1023;
/// A bitmap's table has no more entries than this.
const MAX_TABLE: u32 = 1 << 22;
/// All bitmaps that record writes together take no more memory than this, in bytes.
const MAX_MEMORY: u64 = 1 << 30;
/// Bytes of a directory entry without its extra data and name.
const ENTRY: usize = 24;
/// The only type that there is: which parts have been written.
const DIRTY_TRACKING: u8 = 1;
/// Table entries: where data is, or what all of it is.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// Flags of a directory entry.
const IN_USE: u32 = 1 << 0;
const AUTO: u32 = 1 << 1;
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
const KNOWN_FLAGS: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;

/// A bitmap of the image, as people hear of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk for each bit.
    pub granularity: u64,
    /// It records writes.
    pub auto: bool,
    /// It was not stored when the image was last closed, so what it says cannot be trusted.
    pub in_use: bool,
    /// Flags that this version does not know.
    pub unknown_flags: u32,
}

/// A bitmap in the directory.
#[derive(Clone)]
pub(super) struct Stored {
    name: Vec<u8>,
    flags: u32,
    kind: u8,
    granularity_bits: u8,
    extra: Vec<u8>,
    table: u64,
    entries: u32,
    /// Set when it has been loaded; then this is newer than what is stored, and the file may have it marked as in use.
    live: Option<Rc<DirtyBitmap>>,
}

fn invalid(message: impl Into<String>) -> BlockError {
    BlockError::invalid_image(message)
}

impl Stored {
    fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: self.name(),
            granularity: 1 << self.granularity_bits,
            auto: self.flags & AUTO != 0,
            in_use: self.flags & IN_USE != 0,
            unknown_flags: self.flags & !KNOWN_FLAGS,
        }
    }

    /// Whether this version may use it; else it is left as it is.
    fn is_known(&self) -> bool {
        let extra = self.extra.is_empty() || self.flags & EXTRA_DATA_COMPATIBLE != 0;
        self.kind == DIRTY_TRACKING && self.flags & !KNOWN_FLAGS == 0 && extra
    }

    fn check_usable(&self) -> Result<()> {
        let name = self.name();
        if self.flags & IN_USE != 0 {
            let message = format!("Bitmap '{name}' is inconsistent and cannot be used");
            return Err(invalid(message));
        }
        if !self.is_known() {
            let message = format!("Bitmap '{name}' has features that are not known");
            return Err(BlockError::unsupported(message));
        }
        Ok(())
    }

    fn encode(&self, to: &mut Vec<u8>) {
        to.extend(self.table.to_be_bytes());
        to.extend(self.entries.to_be_bytes());
        to.extend(self.flags.to_be_bytes());
        to.extend([self.kind, self.granularity_bits]);
        to.extend((self.name.len() as u16).to_be_bytes());
        to.extend((self.extra.len() as u32).to_be_bytes());
        to.extend(&self.extra);
        to.extend(&self.name);
        to.resize(to.len().next_multiple_of(8), 0);
    }
}

/// Reads a directory.
fn parse(bytes: &[u8], count: u32, cluster: u64) -> Result<Vec<Stored>> {
    let mut list: Vec<Stored> = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let short = || invalid("the bitmap directory is cut short");
        let entry = bytes.get(at..).filter(|rest| rest.len() >= ENTRY);
        let entry = entry.ok_or_else(short)?;
        let number = |from: usize, to: usize| {
            let bytes = entry[from..to].iter();
            bytes.fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let (name_length, extra_length) = (number(18, 20) as usize, number(20, 24) as usize);
        let rest = &entry[ENTRY..];
        let extra = rest.get(..extra_length).ok_or_else(short)?;
        let name = rest[extra_length..].get(..name_length).ok_or_else(short)?;
        let stored = Stored {
            name: name.to_vec(),
            flags: number(12, 16) as u32,
            kind: entry[16],
            granularity_bits: entry[17],
            extra: extra.to_vec(),
            table: number(0, 8),
            entries: number(8, 12) as u32,
            live: None,
        };
        let good = (9..=31).contains(&stored.granularity_bits)
            && (1..=MAX_NAME).contains(&name_length)
            && stored.table.is_multiple_of(cluster)
            && stored.table != 0
            && stored.entries <= MAX_TABLE;
        if !good || list.iter().any(|other| other.name == stored.name) {
            let name = stored.name();
            return Err(invalid(format!(
                "the entry of bitmap '{name}' is impossible"
            )));
        }
        list.push(stored);
        at += (ENTRY + extra_length + name_length).next_multiple_of(8);
    }
    Ok(list)
}

/// Reads the directory of an image. One that the last writer did not know is none.
pub(super) async fn read_directory(medium: &dyn Medium, header: &Header) -> Result<Vec<Stored>> {
    let Some(place) = header
        .bitmaps()
        .filter(|_| header.autoclear.contains(Autoclear::BITMAPS))
    else {
        return Ok(Vec::new());
    };
    let cluster = 1u64 << header.cluster_bits;
    if place.count > MAX_BITMAPS
        || place.directory_size > MAX_DIRECTORY
        || !place.directory_offset.is_multiple_of(cluster)
    {
        return Err(invalid("the bitmap directory is impossible"));
    }
    let buffer = IoBuf::zeroed(place.directory_size as usize);
    medium.read(place.directory_offset, buffer.clone()).await?;
    parse(&buffer.to_vec(), place.count, cluster)
}

fn not_found(name: &str) -> BlockError {
    BlockError::new(
        ErrorKind::NotFound,
        format!("Dirty bitmap '{name}' not found"),
    )
}

impl Qcow2 {
    /// The image's bitmaps, in the order of its directory.
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        self.bitmaps.borrow().iter().map(Stored::info).collect()
    }

    fn find_bitmap(&self, name: &str) -> Result<usize> {
        let bitmaps = self.bitmaps.borrow();
        let found = bitmaps.iter().position(|b| b.name == name.as_bytes());
        found.ok_or_else(|| not_found(name))
    }

    /// A bitmap's bits. While the image is open for writing they may be changed, and are stored when it is closed.
    ///
    /// # Errors
    ///
    /// `NotFound`, `InvalidImage` for one that cannot be trusted, or what the host reports.
    pub async fn bitmap(&self, name: &str) -> Result<Rc<DirtyBitmap>> {
        let index = self.find_bitmap(name)?;
        let stored = self.bitmaps.borrow()[index].clone();
        if let Some(live) = stored.live {
            return Ok(live);
        }
        stored.check_usable()?;
        let live = Rc::new(self.read_bitmap(&stored).await?);
        live.set_enabled(stored.flags & AUTO != 0);
        live.set_persistent(true);
        if self.writable {
            self.bitmaps.borrow_mut()[index].live = Some(live.clone());
        }
        Ok(live)
    }

    async fn read_bitmap(&self, stored: &Stored) -> Result<DirtyBitmap> {
        let bitmap =
            DirtyBitmap::new(stored.name(), self.size.get(), 1 << stored.granularity_bits)?;
        let cluster = self.geometry.cluster_size();
        let mut bytes = bitmap.to_bytes();
        let wanted = (bytes.len() as u64).div_ceil(cluster);
        // Words of eight bytes may need a cluster more than the bits do.
        let least = self
            .size
            .get()
            .div_ceil(1 << stored.granularity_bits)
            .div_ceil(8);
        if u64::from(stored.entries) < least.div_ceil(cluster) {
            let message = format!("the table of bitmap '{}' is too short", stored.name());
            return Err(invalid(message));
        }
        let entries = wanted.min(u64::from(stored.entries)) as usize;
        let table = read_table(&*self.medium, stored.table, entries).await?;
        for (entry, part) in table.iter().zip(bytes.chunks_mut(cluster as usize)) {
            let place = entry & OFFSET;
            if place == 0 {
                part.fill(if entry & ALL_ONES != 0 { 0xff } else { 0 });
                continue;
            }
            if !place.is_multiple_of(cluster) {
                let message = format!("the data of bitmap '{}' is not aligned", stored.name());
                return Err(invalid(message));
            }
            let buffer = IoBuf::zeroed(part.len());
            self.medium.read(place, buffer.clone()).await?;
            part.copy_from_slice(&buffer.to_vec());
        }
        bitmap.load_bytes(&bytes);
        Ok(bitmap)
    }

    /// Loads the bitmaps that record writes, and marks them in the file as in use.
    pub(super) async fn begin_recording(&self) -> Result<()> {
        let bitmaps = self.bitmaps.borrow().clone();
        let records = |b: &&Stored| b.flags & AUTO != 0 && b.flags & IN_USE == 0 && b.is_known();
        let names: Vec<String> = bitmaps.iter().filter(records).map(Stored::name).collect();
        if names.is_empty() {
            return Ok(());
        }
        let mut memory = 0;
        for name in names {
            let live = self.bitmap(&name).await?;
            memory += live.size().div_ceil(u64::from(live.granularity())) / 8;
            if memory > MAX_MEMORY {
                let message = "the dirty bitmaps would take more than 1 GiB of memory";
                return Err(BlockError::invalid_image(message));
            }
        }
        let Some(place) = self.header.borrow().bitmaps() else {
            return Ok(());
        };
        let mut directory = Vec::new();
        for stored in &*self.bitmaps.borrow() {
            let mut marked = stored.clone();
            if stored.live.is_some() {
                marked.flags |= IN_USE;
            }
            marked.encode(&mut directory);
        }
        let bytes = IoBuf::from_slice(&directory);
        self.medium.write(place.directory_offset, bytes).await?;
        self.medium.flush().await
    }

    /// Notes that the guest changes a range.
    pub(super) fn record(&self, offset: u64, length: u64) {
        for stored in &*self.bitmaps.borrow() {
            if let Some(live) = stored.live.as_ref().filter(|live| live.is_enabled()) {
                live.set(offset, length);
            }
        }
    }

    fn check_bitmaps_possible(&self) -> Result<()> {
        if self.header.borrow().version < 3 {
            let message = "Cannot store dirty bitmaps in qcow2 v2 files";
            return Err(BlockError::unsupported(message));
        }
        if !self.writable {
            let message = "the image is open for reading alone";
            return Err(BlockError::new(ErrorKind::ReadOnly, message));
        }
        Ok(())
    }

    /// Adds a clean bitmap with a bit for each `granularity` bytes; `None`: as many as a cluster has, 4 KiB at least.
    ///
    /// # Errors
    ///
    /// `AlreadyExists`, `InvalidArgument` for an impossible name or granularity, `Unsupported` for version 2.
    pub fn add_bitmap(&self, name: &str, granularity: Option<u32>, enabled: bool) -> Result<()> {
        self.check_bitmaps_possible()?;
        let refused = |message: String| Err(BlockError::invalid_argument(message));
        if name.is_empty() || name.len() > MAX_NAME {
            return refused(format!("a bitmap's name has 1 to {MAX_NAME} bytes"));
        }
        if self.find_bitmap(name).is_ok() {
            let message = format!("Bitmap already exists: {name}");
            return Err(BlockError::new(ErrorKind::AlreadyExists, message));
        }
        if self.bitmaps.borrow().len() >= MAX_BITMAPS as usize {
            return refused(format!("an image has at most {MAX_BITMAPS} bitmaps"));
        }
        let usual = (self.geometry.cluster_size() as u32).max(4096);
        let live = DirtyBitmap::new(name, self.size.get(), granularity.unwrap_or(usual))?;
        live.set_enabled(enabled);
        live.set_persistent(true);
        self.bitmaps.borrow_mut().push(Stored {
            name: name.as_bytes().to_vec(),
            flags: 0,
            kind: DIRTY_TRACKING,
            granularity_bits: live.granularity().trailing_zeros() as u8,
            extra: Vec::new(),
            table: 0,
            entries: 0,
            live: Some(Rc::new(live)),
        });
        self.bitmaps_changed.set(true);
        Ok(())
    }

    /// Removes a bitmap, also one that cannot be trusted.
    ///
    /// # Errors
    ///
    /// `NotFound`, or what the host reports.
    pub async fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.check_bitmaps_possible()?;
        let index = self.find_bitmap(name)?;
        let gone = self.bitmaps.borrow_mut().remove(index);
        let clusters = self.clusters_of(&gone).await?;
        self.unused_bitmap_data.borrow_mut().extend(clusters);
        self.bitmaps_changed.set(true);
        Ok(())
    }

    /// Follows a change of the disk's size.
    pub(super) async fn resize_bitmaps(&self, size: u64) -> Result<()> {
        let mut all = Vec::new();
        for info in self.bitmaps() {
            all.push(self.bitmap(&info.name).await?);
        }
        for bitmap in all {
            bitmap.resize(size)?;
        }
        Ok(())
    }

    /// Places and lengths of what a stored bitmap takes.
    async fn clusters_of(&self, stored: &Stored) -> Result<Vec<(u64, u64)>> {
        if stored.entries == 0 {
            return Ok(Vec::new());
        }
        let length = u64::from(stored.entries) * 8;
        let table = read_table(&*self.medium, stored.table, stored.entries as usize).await?;
        let data = table
            .iter()
            .map(|entry| entry & OFFSET)
            .filter(|place| *place != 0);
        let mut list: Vec<(u64, u64)> = data
            .map(|place| (place, self.geometry.cluster_size()))
            .collect();
        list.push((stored.table, length));
        Ok(list)
    }

    /// Stores what is newer than the file, and makes the header point to a new directory.
    pub(super) async fn store_bitmaps(&self) -> Result<()> {
        let bitmaps = self.bitmaps.borrow().clone();
        if !self.bitmaps_changed.get() && bitmaps.iter().all(|b| b.live.is_none()) {
            return Ok(());
        }
        let mut old = std::mem::take(&mut *self.unused_bitmap_data.borrow_mut());
        let mut fresh = Vec::with_capacity(bitmaps.len());
        for stored in bitmaps {
            let Some(live) = stored.live.clone() else {
                fresh.push(stored);
                continue;
            };
            old.extend(self.clusters_of(&stored).await?);
            fresh.push(self.write_bitmap(stored, &live).await?);
        }
        let before = self.header.borrow().bitmaps();
        old.extend(before.map(|place| (place.directory_offset, place.directory_size)));
        let place = self.write_directory(&fresh).await?;
        // Refcounts of what is new, and all that it holds, are there before the header names it.
        self.sync_all().await?;
        self.change_header(|header| set_bitmaps(header, place))
            .await?;
        *self.bitmaps.borrow_mut() = fresh;
        self.bitmaps_changed.set(false);
        for (place, length) in old {
            self.free_later(place, length);
        }
        self.sync_all().await
    }

    async fn write_directory(&self, bitmaps: &[Stored]) -> Result<Option<BitmapsExtension>> {
        if bitmaps.is_empty() {
            return Ok(None);
        }
        let mut directory = Vec::new();
        bitmaps
            .iter()
            .for_each(|stored| stored.encode(&mut directory));
        if directory.len() as u64 > MAX_DIRECTORY {
            let message = "the bitmap directory would be too large";
            return Err(BlockError::invalid_argument(message));
        }
        let offset = self.allocate_table(directory.len() as u64).await?;
        self.medium
            .write(offset, IoBuf::from_slice(&directory))
            .await?;
        Ok(Some(BitmapsExtension {
            count: bitmaps.len() as u32,
            directory_size: directory.len() as u64,
            directory_offset: offset,
        }))
    }

    /// Writes a bitmap to new clusters.
    async fn write_bitmap(&self, mut stored: Stored, live: &DirtyBitmap) -> Result<Stored> {
        let cluster = self.geometry.cluster_size() as usize;
        let mut bytes = live.to_bytes();
        let granules = live.size().div_ceil(u64::from(live.granularity()));
        bytes.truncate(granules.div_ceil(8) as usize);
        let mut table = Vec::new();
        for part in bytes.chunks(cluster) {
            let entry = if part.iter().all(|byte| *byte == 0) {
                0
            } else if part.len() == cluster && part.iter().all(|byte| *byte == 0xff) {
                ALL_ONES
            } else {
                let place = self.allocate_table(cluster as u64).await?;
                self.medium.write(place, IoBuf::from_slice(part)).await?;
                place
            };
            table.extend(entry.to_be_bytes());
        }
        stored.entries = (table.len() / 8) as u32;
        // An empty disk's bitmap has a place all the same.
        stored.table = self.allocate_table(table.len().max(8) as u64).await?;
        self.medium
            .write(stored.table, IoBuf::from_slice(&table))
            .await?;
        stored.flags = stored.flags & !(IN_USE | AUTO) | if live.is_enabled() { AUTO } else { 0 };
        stored.live = None;
        Ok(stored)
    }
}

/// Says in the header where the directory is. In front of longer extensions, it lies in the first sector.
fn set_bitmaps(header: &mut Header, place: Option<BitmapsExtension>) {
    header.extensions.retain(|e| e.kind != extension::BITMAPS);
    header.autoclear.set(Autoclear::BITMAPS, place.is_some());
    if let Some(place) = place {
        let mut data = place.count.to_be_bytes().to_vec();
        data.extend([0; 4]);
        data.extend(place.directory_size.to_be_bytes());
        data.extend(place.directory_offset.to_be_bytes());
        let kind = extension::BITMAPS;
        header.extensions.insert(0, Extension { kind, data });
        // A small cluster has no room for the names of features, which are for messages alone.
        if header.encode().is_err() {
            header
                .extensions
                .retain(|e| e.kind != extension::FEATURE_NAMES);
        }
    }
}

/// Forgets a directory that a writer who did not know it has left. What it took is lost until a check finds it.
pub(super) fn drop_stale(header: &mut Header) -> bool {
    let stale = header.bitmaps().is_some() && !header.autoclear.contains(Autoclear::BITMAPS);
    if stale {
        set_bitmaps(header, None);
    }
    stale
}
