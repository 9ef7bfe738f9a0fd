//! What devices and tools hold: a backend behind checks and policies.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{BlockBackend, Extent, ExtentQuery, Limits, ZeroFlags};
use crate::bitmap::DirtyBitmap;
use crate::buffer::IoBuf;
use crate::error::{BlockError, ErrorKind, Result};
use crate::sync::RangeLocks;
use crate::throttle::{Direction, ThrottleGroup, ThrottleLimits};
use crate::watch::{Change, StandStill, Traffic, WriteWatcher};

/// When written data reaches stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// The host's page cache; flushes are obeyed.
    #[default]
    Writeback,
    /// Direct I/O past the page cache; flushes are obeyed.
    None,
    /// The host's page cache; each write is followed by a flush.
    Writethrough,
    /// Direct I/O; each write is followed by a flush.
    DirectSync,
    /// The host's page cache; flushes are ignored. Fast, and loses data on a power cut.
    Unsafe,
}

impl CacheMode {
    /// Reads the name that people write.
    ///
    /// # Errors
    ///
    /// If there is no such mode.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "none" | "off" => Self::None,
            "writeback" => Self::Writeback,
            "writethrough" => Self::Writethrough,
            "directsync" => Self::DirectSync,
            "unsafe" => Self::Unsafe,
            _ => {
                return Err(BlockError::invalid_argument(format!(
                    "unknown cache mode '{name}' (known: none, writeback, writethrough, directsync, \
                     unsafe)"
                )));
            }
        })
    }

    /// Whether the host's page cache is passed by.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }

    /// Whether each write is followed by a flush.
    pub fn flushes_each_write(self) -> bool {
        matches!(self, Self::Writethrough | Self::DirectSync)
    }
}

/// What to do with written blocks that are all zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// Write them as they are.
    #[default]
    Off,
    /// Write them as zeroes, keeping their space.
    On,
    /// Write them as zeroes, giving their space back.
    Unmap,
}

/// The policies of a disk that do not depend on its format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskOptions {
    /// When data reaches stable storage.
    pub cache: CacheMode,
    /// Pass discards on to the image; otherwise they do nothing.
    pub discard: bool,
    /// What to do with zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Refuse writes even if the backend would take them.
    pub read_only: bool,
    /// The logical block size that is enforced, if larger than the backend's.
    pub logical_block_size: Option<u32>,
    /// The physical block size that is shown, if not the backend's.
    pub physical_block_size: Option<u32>,
}

/// What has become of one kind of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Operations {
    /// Those that succeeded.
    pub done: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long they took, in nanoseconds.
    pub nanoseconds: u64,
    /// Those that failed.
    pub failed: u64,
}

/// Counters since the disk was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskStatistics {
    /// Reads.
    pub reads: Operations,
    /// Writes, of zeroes too.
    pub writes: Operations,
    /// Flushes.
    pub flushes: Operations,
    /// Discards.
    pub discards: Operations,
    /// The end of the last byte that was written.
    pub highest_written: u64,
}

/// A disk: checks every request, applies the policies of [`DiskOptions`], then asks the backend.
pub struct Disk {
    backend: RefCell<Rc<dyn BlockBackend>>,
    options: DiskOptions,
    statistics: Cell<DiskStatistics>,
    throttle: RefCell<Arc<ThrottleGroup>>,
    /// Limits are passed over, so that what waits for them ends soon.
    hurry: Cell<bool>,
    traffic: Rc<Traffic>,
    ranges: RangeLocks,
    watchers: RefCell<Rc<[Rc<dyn WriteWatcher>]>>,
    bitmaps: RefCell<Vec<Rc<DirtyBitmap>>>,
}

impl Disk {
    /// Wraps `backend`.
    pub fn new(backend: Rc<dyn BlockBackend>, options: DiskOptions) -> Self {
        let unlimited = ThrottleGroup::new("", ThrottleLimits::default());
        Self::throttled(backend, options, Arc::new(unlimited))
    }

    /// Wraps `backend`; reads and writes keep to the limits of a group.
    pub fn throttled(
        backend: Rc<dyn BlockBackend>,
        options: DiskOptions,
        throttle: Arc<ThrottleGroup>,
    ) -> Self {
        Self {
            backend: RefCell::new(backend),
            options,
            statistics: Cell::default(),
            throttle: RefCell::new(throttle),
            hurry: Cell::new(false),
            traffic: Rc::default(),
            ranges: RangeLocks::default(),
            watchers: RefCell::new(Rc::new([])),
            bitmaps: RefCell::default(),
        }
    }

    /// While this is set, requests do not wait for their limits.
    pub fn set_hurry(&self, hurry: bool) {
        self.hurry.set(hurry);
    }

    /// Puts the disk into another group for its limits; requests that wait do so for the group that they found.
    pub fn set_throttle(&self, group: Arc<ThrottleGroup>) {
        self.throttle.replace(group);
    }

    async fn admit(&self, direction: Direction, length: u64) -> Result<()> {
        let group = self.throttle.borrow().clone();
        group.admit(direction, length, &self.hurry).await
    }

    /// The backend below. It may be replaced by another whenever the disk does not stand still.
    pub fn backend(&self) -> Rc<dyn BlockBackend> {
        self.backend.borrow().clone()
    }

    /// Waits until no request is under way, and keeps new ones waiting as long as the result lives.
    pub async fn stand_still(&self) -> StandStill {
        self.traffic.stop().await
    }

    /// Puts another backend, which holds the same content, in the place of this one; returns the former.
    ///
    /// # Panics
    ///
    /// If it is another disk that stands still.
    pub fn replace_backend(
        &self,
        still: &StandStill,
        backend: Rc<dyn BlockBackend>,
    ) -> Rc<dyn BlockBackend> {
        assert!(still.is_of(&self.traffic), "another disk stands still");
        self.backend.replace(backend)
    }

    /// From now on `watcher` sees each change.
    ///
    /// # Panics
    ///
    /// If it is another disk that stands still.
    pub fn watch(&self, still: &StandStill, watcher: Rc<dyn WriteWatcher>) {
        assert!(still.is_of(&self.traffic), "another disk stands still");
        let mut watchers = self.watchers.borrow_mut();
        *watchers = watchers.iter().cloned().chain([watcher]).collect();
    }

    /// Ends what [`Self::watch`] began; changes under way may still be told.
    pub fn unwatch(&self, watcher: &Rc<dyn WriteWatcher>) {
        let mut watchers = self.watchers.borrow_mut();
        let others = watchers.iter().filter(|w| !Rc::ptr_eq(w, watcher));
        let others = others.cloned().collect();
        *watchers = others;
    }

    /// The ranges that changes hold while the disk is watched. A job that moves data holds them too.
    pub fn ranges(&self) -> &RangeLocks {
        &self.ranges
    }

    /// The bitmaps that record changes.
    pub fn bitmaps(&self) -> Vec<Rc<DirtyBitmap>> {
        self.bitmaps.borrow().clone()
    }

    /// The bitmap of this name.
    pub fn bitmap(&self, name: &str) -> Option<Rc<DirtyBitmap>> {
        let bitmaps = self.bitmaps.borrow();
        bitmaps.iter().find(|bitmap| bitmap.name() == name).cloned()
    }

    /// Records changes in one more bitmap, if it is enabled; it follows the disk's size.
    pub fn add_bitmap(&self, bitmap: Rc<DirtyBitmap>) {
        self.bitmaps.borrow_mut().push(bitmap);
    }

    /// Records no more changes in this bitmap.
    pub fn remove_bitmap(&self, bitmap: &Rc<DirtyBitmap>) {
        self.bitmaps.borrow_mut().retain(|b| !Rc::ptr_eq(b, bitmap));
    }

    /// The policies in force.
    pub fn options(&self) -> &DiskOptions {
        &self.options
    }

    /// Size, alignments and abilities, after the policies.
    pub fn limits(&self) -> Limits {
        let mut limits = self.backend.borrow().limits();
        limits.read_only |= self.options.read_only;
        if let Some(size) = self.options.logical_block_size {
            limits.logical_block_size = limits.logical_block_size.max(size);
        }
        if let Some(size) = self.options.physical_block_size {
            limits.physical_block_size = size;
        }
        limits.physical_block_size = limits.physical_block_size.max(limits.logical_block_size);
        if !self.options.discard {
            limits.discard_granularity = 0;
        }
        limits
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.backend.borrow().limits().size
    }

    /// The counters.
    pub fn statistics(&self) -> DiskStatistics {
        self.statistics.get()
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `Misaligned`, or what the backend reports.
    pub async fn read(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let (start, length) = (Instant::now(), buf.len() as u64);
        let result = match self.check(offset, length, false) {
            Ok(()) if length == 0 => Ok(()),
            Ok(()) => self.read_checked(offset, buf).await,
            Err(error) => Err(error),
        };
        self.count(start, length, result, |s| &mut s.reads)
    }

    async fn read_checked(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let length = buf.len() as u64;
        self.admit(Direction::Read, length).await?;
        let _passage = self.traffic.enter().await;
        // The disk may have become smaller meanwhile.
        self.check(offset, length, false)?;
        self.read_unseen(offset, buf).await
    }

    /// Reads past limits and counters, as jobs do; also while the disk stands still. The range has been checked.
    pub(crate) async fn read_unseen(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let (backend, max) = (self.backend(), self.max_part());
        if buf.len() <= max {
            return backend.read(offset, buf).await;
        }
        for start in (0..buf.len()).step_by(max) {
            let part = buf.slice(start, max.min(buf.len() - start));
            backend.read(offset + start as u64, part).await?;
        }
        Ok(())
    }

    /// Writes `buf` at `offset`; if `through`, it is on stable storage when this returns.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `Misaligned`, `ReadOnly`, or what the backend reports.
    pub async fn write(&self, offset: u64, buf: IoBuf, through: bool) -> Result<()> {
        let (start, length) = (Instant::now(), buf.len() as u64);
        let result = match self.check(offset, length, true) {
            Ok(()) if length == 0 => Ok(()),
            Ok(()) => self.write_checked(offset, buf, through).await,
            Err(error) => Err(error),
        };
        self.count(start, length, result, |s| &mut s.writes)
    }

    async fn write_checked(&self, offset: u64, buf: IoBuf, through: bool) -> Result<()> {
        let length = buf.len() as u64;
        self.admit(Direction::Write, length).await?;
        let detected = match self.options.detect_zeroes {
            DetectZeroes::Off => None,
            _ if !buf.is_zero() => None,
            DetectZeroes::On => Some(ZeroFlags::empty()),
            DetectZeroes::Unmap => Some(ZeroFlags::MAY_UNMAP),
        };
        let change = match detected {
            Some(flags) => Change::Zeroes(flags),
            None => Change::Data(buf),
        };
        let _passage = self.traffic.enter().await;
        // The disk may have become smaller meanwhile.
        self.check(offset, length, true)?;
        self.change(offset, length, change).await?;
        self.wrote(offset + length);
        self.after_write(through).await
    }

    /// Makes a change, and lets those who follow the disk see it.
    async fn change(&self, offset: u64, length: u64, change: Change) -> Result<()> {
        let watchers = self.watchers.borrow().clone();
        if watchers.is_empty() {
            let result = self.apply(offset, length, &change).await;
            self.record(offset, length);
            return result;
        }
        let block = watchers.iter().map(|w| w.granularity()).max().unwrap_or(1);
        let start = offset / block * block;
        let end = (offset + length).next_multiple_of(block);
        let _held = self.ranges.lock(start, end - start).await;
        for watcher in watchers.iter() {
            watcher.before(offset, length).await?;
        }
        let result = self.apply(offset, length, &change).await;
        self.record(offset, length);
        let done = result.is_ok();
        for watcher in watchers.iter() {
            watcher.after(offset, length, &change, done).await?;
        }
        result
    }

    /// What failed may have been done in part, so it is recorded too.
    fn record(&self, offset: u64, length: u64) {
        let bitmaps = self.bitmaps.borrow();
        for bitmap in bitmaps.iter().filter(|b| b.is_enabled()) {
            bitmap.set(offset, length);
        }
    }

    async fn apply(&self, offset: u64, length: u64, change: &Change) -> Result<()> {
        let backend = self.backend();
        let buf = match change {
            Change::Zeroes(flags) => return backend.write_zeroes(offset, length, *flags).await,
            Change::Discard => return backend.discard(offset, length).await,
            Change::Data(buf) => buf,
        };
        let max = self.max_part();
        if buf.len() <= max {
            return backend.write(offset, buf.clone()).await;
        }
        for start in (0..buf.len()).step_by(max) {
            let part = buf.slice(start, max.min(buf.len() - start));
            backend.write(offset + start as u64, part).await?;
        }
        Ok(())
    }

    fn wrote(&self, end: u64) {
        let mut statistics = self.statistics.get();
        statistics.highest_written = statistics.highest_written.max(end);
        self.statistics.set(statistics);
    }

    /// Makes the range read as zeroes; if `through`, stably so.
    ///
    /// # Errors
    ///
    /// As [`Self::write`]; `Unsupported` if the flags forbid writing zeroes as data and there is no
    /// other way.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mut flags: ZeroFlags,
        through: bool,
    ) -> Result<()> {
        let start = Instant::now();
        if !self.options.discard {
            flags.remove(ZeroFlags::MAY_UNMAP);
        }
        let result = match self.check(offset, length, true) {
            Ok(()) if length == 0 => Ok(()),
            Ok(()) => self.zeroes_checked(offset, length, flags, through).await,
            Err(error) => Err(error),
        };
        self.count(start, length, result, |s| &mut s.writes)
    }

    async fn zeroes_checked(
        &self,
        offset: u64,
        length: u64,
        flags: ZeroFlags,
        through: bool,
    ) -> Result<()> {
        self.admit(Direction::Write, length).await?;
        let _passage = self.traffic.enter().await;
        self.check(offset, length, true)?;
        let change = Change::Zeroes(flags);
        self.change(offset, length, change).await?;
        self.wrote(offset + length);
        self.after_write(through).await
    }

    /// Gives the range's space back, if the policy says so.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub async fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let start = Instant::now();
        let result = match self.check(offset, length, true) {
            Ok(()) if length == 0 || !self.options.discard => Ok(()),
            Ok(()) => self.discard_checked(offset, length).await,
            Err(error) => Err(error),
        };
        self.count(start, length, result, |s| &mut s.discards)
    }

    async fn discard_checked(&self, offset: u64, length: u64) -> Result<()> {
        let _passage = self.traffic.enter().await;
        self.check(offset, length, true)?;
        self.change(offset, length, Change::Discard).await?;
        self.after_write(false).await
    }

    /// When this returns, every write that ended before it began survives a power cut (unless the
    /// cache mode is `unsafe`).
    ///
    /// # Errors
    ///
    /// What the host reports; then nothing is known about the data written since the last flush.
    pub async fn flush(&self) -> Result<()> {
        let start = Instant::now();
        let result = match self.options.cache {
            CacheMode::Unsafe => Ok(()),
            _ if self.limits().read_only => Ok(()),
            _ => {
                let _passage = self.traffic.enter().await;
                self.backend().flush().await
            }
        };
        self.count(start, 0, result, |s| &mut s.flushes)
    }

    /// Where the bytes are. See [`BlockBackend::extents`].
    ///
    /// # Errors
    ///
    /// `OutOfRange`, or what the backend reports.
    pub async fn extents(&self, query: ExtentQuery) -> Result<Vec<Extent>> {
        self.check_range(query.offset, query.length)?;
        if query.length == 0 {
            return Ok(Vec::new());
        }
        let _passage = self.traffic.enter().await;
        self.check_range(query.offset, query.length)?;
        self.backend()
            .extents(ExtentQuery {
                limit: query.limit.max(1),
                ..query
            })
            .await
    }

    /// Changes the size.
    ///
    /// # Errors
    ///
    /// `ReadOnly`, or what the backend reports.
    pub async fn resize(&self, size: u64) -> Result<()> {
        if self.limits().read_only {
            return Err(read_only());
        }
        let _passage = self.traffic.enter().await;
        self.backend().resize(size).await?;
        for bitmap in self.bitmaps() {
            bitmap.resize(size)?;
        }
        Ok(())
    }

    /// Flushes, and marks the image as cleanly closed. No request may follow.
    ///
    /// # Errors
    ///
    /// What the backend reports.
    pub async fn close(&self) -> Result<()> {
        self.backend().close().await
    }

    async fn after_write(&self, through: bool) -> Result<()> {
        let wanted = through || self.options.cache.flushes_each_write();
        if wanted && self.options.cache != CacheMode::Unsafe {
            self.backend().flush().await?;
        }
        Ok(())
    }

    fn max_part(&self) -> usize {
        let limits = self.backend.borrow().limits();
        let block = self.limits().logical_block_size.max(1);
        (limits.max_transfer / block * block).max(block) as usize
    }

    fn check(&self, offset: u64, length: u64, write: bool) -> Result<()> {
        self.check_range(offset, length)?;
        let limits = self.limits();
        let block = u64::from(limits.logical_block_size.max(1));
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(BlockError::new(
                ErrorKind::Misaligned,
                format!("{length} bytes at {offset} are not whole blocks of {block} bytes"),
            ));
        }
        if write && limits.read_only {
            return Err(read_only());
        }
        Ok(())
    }

    pub(crate) fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        let size = self.size();
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(BlockError::new(
                ErrorKind::OutOfRange,
                format!("{length} bytes at {offset} reach past the end of the disk at {size}"),
            ));
        }
        Ok(())
    }

    fn count(
        &self,
        start: Instant,
        length: u64,
        result: Result<()>,
        of: impl FnOnce(&mut DiskStatistics) -> &mut Operations,
    ) -> Result<()> {
        let mut statistics = self.statistics.get();
        let operations = of(&mut statistics);
        if result.is_ok() {
            operations.done += 1;
            operations.bytes += length;
            let taken = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            operations.nanoseconds = operations.nanoseconds.saturating_add(taken);
        } else {
            operations.failed += 1;
        }
        self.statistics.set(statistics);
        result
    }
}

fn read_only() -> BlockError {
    BlockError::new(ErrorKind::ReadOnly, "the disk is read-only")
}
