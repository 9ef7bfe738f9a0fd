//! Copying the content of one disk to another, leaving out what need not be copied.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use block::executor::{offload, spawn_local};
use block::{
    BlockBackend, Disk, ErrorKind, Extent, ExtentKind, ExtentQuery, IoBuf, Result, Scope,
    ZeroFlags, bytes_are_zero,
};

use crate::Image;
use crate::deflate::Deflater;
use crate::qcow2::{ClusterCompressor, CompressionType};

/// Pieces in flight at once, by default.
pub const DEFAULT_PARALLEL: usize = 8;
/// The size of a piece.
const PIECE: u64 = 1 << 20;

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyOptions {
    /// Runs of zeroes at least this long, and aligned to it, are not written as data; 0 writes all.
    pub sparse_size: u64,
    /// Compress what is written, if the target's format can.
    pub compress: bool,
    /// The target reads as zeroes where nothing has been written.
    pub target_is_zero: bool,
    /// `Layer` leaves out what the source's backing file has.
    pub scope: Scope,
    /// Pieces in flight at once.
    pub parallel: usize,
    /// Where the source cannot be read, write zeroes and go on.
    pub salvage: bool,
    /// Read the target too, and write only where it is otherwise: an earlier copy goes on.
    pub only_differences: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            sparse_size: 4096,
            compress: false,
            target_is_zero: true,
            scope: Scope::Chain,
            parallel: DEFAULT_PARALLEL,
            salvage: false,
            only_differences: false,
        }
    }
}

/// A source with its place in the target, and what to do with it.
struct Copy<'a> {
    source: &'a Disk,
    target: &'a Disk,
    /// Where the source begins in the target.
    shift: u64,
    image: &'a Image,
    compression: Option<Compressing>,
    options: CopyOptions,
    turns: &'a Turns,
    /// Room for a piece, kept from one to the next: fresh memory costs a page fault every 4 KiB.
    room: IoBuf,
    /// The piece again, where it can be looked at.
    bytes: RefCell<Vec<u8>>,
}

/// Makes compressed pieces land in the order of the source, so that the file is the same whatever the
/// number of threads and whoever finishes first.
#[derive(Default)]
struct Turns {
    /// The number of the task that may write.
    now: Cell<u64>,
    failed: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

impl Turns {
    /// Waits until all tasks before `number` are done; false if one has failed.
    async fn wait(&self, number: u64) -> bool {
        poll_fn(|cx| {
            if self.failed.get() || self.now.get() == number {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        !self.failed.get()
    }

    fn wake_all(&self) {
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    fn pass_on(&self) {
        self.now.set(self.now.get() + 1);
        self.wake_all();
    }

    fn give_up(&self) {
        self.failed.set(true);
        self.wake_all();
    }
}

/// How data is compressed, and in which units of bytes.
#[derive(Clone, Copy)]
struct Compressing {
    method: Method,
    unit: u64,
}

#[derive(Clone, Copy)]
enum Method {
    /// Clusters of qcow2, where it makes them shorter.
    Qcow2(CompressionType),
    /// Every unit, with or without zlib's header and checksum.
    Deflate { zlib: bool },
}

/// One piece of work.
#[derive(Clone, Copy)]
struct Task {
    /// Counts from 0, in the order of the source.
    number: u64,
    offset: u64,
    length: u64,
    action: Action,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Skip,
    Zero,
    Copy,
}

/// Copies all of `source` to `target` (which `image` is the inside of) from `shift` on. `progress` is
/// told the bytes of the source that are done with.
///
/// # Errors
///
/// The first error of either side; what was copied before stays.
pub async fn copy(
    source: &Rc<Disk>,
    target: &Rc<Disk>,
    image: &Image,
    shift: u64,
    options: CopyOptions,
    progress: &Rc<dyn Fn(u64)>,
) -> Result<()> {
    let end = source.size().min(target.size().saturating_sub(shift));
    let tasks = Rc::new(Tasks {
        source: source.clone(),
        options,
        end,
        grain: grain(image, options),
        next: Cell::new(0),
        handed_out: Cell::new(0),
        known: RefCell::default(),
    });
    let mut workers = Vec::new();
    let turns = Rc::new(Turns::default());
    for _ in 0..options.parallel.clamp(1, 64) {
        let (tasks, source, target) = (tasks.clone(), source.clone(), target.clone());
        let (image, progress, turns) = (image.clone(), progress.clone(), turns.clone());
        workers.push(spawn_local(async move {
            let compression = compression(&image, options);
            let copy = Copy {
                source: &source,
                target: &target,
                shift,
                image: &image,
                compression,
                options,
                turns: &turns,
                room: IoBuf::zeroed(grain(&image, options) as usize),
                bytes: RefCell::default(),
            };
            let result = copy.work(&tasks, &*progress).await;
            if result.is_err() {
                turns.give_up();
            }
            result
        }));
    }
    let mut result = Ok(());
    for worker in workers {
        let ended = worker.await;
        result = result.and(ended);
    }
    result
}

fn compression(image: &Image, options: CopyOptions) -> Option<Compressing> {
    if !options.compress {
        return None;
    }
    if let Some(qcow2) = &image.qcow2 {
        return Some(Compressing {
            method: Method::Qcow2(qcow2.header().compression),
            unit: qcow2.cluster_size(),
        });
    }
    let compression = image.format.as_ref()?.compression()?;
    let zlib = compression.zlib_wrapper;
    Some(Compressing {
        method: Method::Deflate { zlib },
        unit: compression.unit,
    })
}

/// Work is cut at multiples of this.
fn grain(image: &Image, options: CopyOptions) -> u64 {
    compression(image, options).map_or(PIECE, |c| c.unit * (PIECE / c.unit).max(1))
}

/// Hands out the work in order, asking the source for its extents a few at a time.
struct Tasks {
    source: Rc<Disk>,
    options: CopyOptions,
    end: u64,
    grain: u64,
    next: Cell<u64>,
    handed_out: Cell<u64>,
    known: RefCell<std::collections::VecDeque<Extent>>,
}

impl Tasks {
    async fn take(&self) -> Result<Option<Task>> {
        loop {
            let offset = self.next.get();
            if offset >= self.end {
                return Ok(None);
            }
            let first = self.known.borrow().front().cloned();
            let Some(extent) = first.filter(|e| e.offset <= offset && offset < e.end()) else {
                self.look_ahead(offset).await?;
                continue;
            };
            let skip = extent.kind == ExtentKind::Unallocated && self.options.scope == Scope::Layer;
            let zero = extent.reads_as_zero();
            let left = extent.end().min(self.end) - offset;
            let to_boundary = (self.grain - offset % self.grain).min(self.end - offset);
            if self.options.compress && left < to_boundary {
                // Compressed clusters are written whole, whatever the source's extents are.
                self.next.set(offset + to_boundary);
                self.forget_until(offset + to_boundary);
                return Ok(Some(Task {
                    number: self.number(),
                    offset,
                    length: to_boundary,
                    action: Action::Copy,
                }));
            }
            let length = match (zero, self.options.compress) {
                (true, false) => left,
                (true, true) => (offset + left) / self.grain * self.grain - offset,
                (false, _) => left.min(to_boundary),
            };
            let length = if length == 0 { left } else { length };
            self.next.set(offset + length);
            self.forget_until(offset + length);
            let action = match (skip, zero) {
                (true, _) => Action::Skip,
                (false, true) => Action::Zero,
                (false, false) => Action::Copy,
            };
            return Ok(Some(Task {
                number: self.number(),
                offset,
                length,
                action,
            }));
        }
    }

    fn number(&self) -> u64 {
        self.handed_out.replace(self.handed_out.get() + 1)
    }

    fn forget_until(&self, offset: u64) {
        let mut known = self.known.borrow_mut();
        while known.front().is_some_and(|extent| extent.end() <= offset) {
            known.pop_front();
        }
    }

    async fn look_ahead(&self, offset: u64) -> Result<()> {
        let length = (self.end - offset).min(1 << 30);
        let query = ExtentQuery {
            offset,
            length,
            scope: self.options.scope,
            limit: 256,
        };
        let extents = self.source.extents(query).await?;
        // Another worker may have been quicker, and ahead.
        if self.next.get() == offset {
            *self.known.borrow_mut() = extents.into();
        }
        Ok(())
    }
}

impl Copy<'_> {
    /// Takes tasks until there are none, or one has failed.
    async fn work(&self, tasks: &Tasks, progress: &dyn Fn(u64)) -> Result<()> {
        while !self.turns.failed.get() {
            let Some(task) = tasks.take().await? else {
                break;
            };
            if self.perform(task).await? {
                progress(task.length);
            }
        }
        Ok(())
    }

    /// False if another task has failed meanwhile and this one was not done.
    async fn perform(&self, task: Task) -> Result<bool> {
        if self.compression.is_some() {
            return self.perform_in_turn(task).await;
        }
        match task.action {
            Action::Skip => {}
            Action::Zero => self.zero(task.offset, task.length).await?,
            Action::Copy => {
                let buffer = self.room.slice(0, task.length as usize);
                self.read(task.offset, &buffer).await?;
                if !self.is_there(task.offset, &buffer).await? {
                    self.write_sparse(task.offset, &buffer).await?;
                }
            }
        }
        Ok(true)
    }

    /// Reads and compresses beside the other tasks, and writes when its turn has come.
    async fn perform_in_turn(&self, task: Task) -> Result<bool> {
        let mut ready = None;
        if task.action == Action::Copy
            && let Some(how) = self.compression
        {
            let buffer = self.room.slice(0, task.length as usize);
            self.read(task.offset, &buffer).await?;
            if !self.is_there(task.offset, &buffer).await? {
                let bytes = buffer.to_vec();
                let pieces = offload(move || compress_all(&bytes, how)).await;
                ready = Some((buffer, pieces, how));
            }
        }
        if !self.turns.wait(task.number).await {
            return Ok(false);
        }
        if task.action == Action::Zero {
            self.zero(task.offset, task.length).await?;
        }
        if let Some((buffer, pieces, how)) = ready {
            self.write_compressed(task, &buffer, pieces, how).await?;
        }
        self.turns.pass_on();
        Ok(true)
    }

    async fn read(&self, offset: u64, buffer: &IoBuf) -> Result<()> {
        let result = self.source.read(offset, buffer.clone()).await;
        if result.is_ok() || !self.options.salvage {
            return result;
        }
        for at in (0..buffer.len()).step_by(512) {
            let sector = buffer.slice(at, 512.min(buffer.len() - at));
            if self
                .source
                .read(offset + at as u64, sector.clone())
                .await
                .is_err()
            {
                sector.fill_at(0, sector.len(), 0);
            }
        }
        Ok(())
    }

    /// Whether an earlier copy has left this content in the target.
    async fn is_there(&self, offset: u64, buffer: &IoBuf) -> Result<bool> {
        if !self.options.only_differences {
            return Ok(false);
        }
        let found = IoBuf::zeroed(buffer.len());
        self.target.read(self.shift + offset, found.clone()).await?;
        Ok(found.to_vec() == buffer.to_vec())
    }

    async fn zero(&self, offset: u64, length: u64) -> Result<()> {
        if self.options.target_is_zero || length == 0 {
            return Ok(());
        }
        if !self.options.only_differences {
            return self.write_zeroes(self.shift + offset, length).await;
        }
        let (mut at, end) = (self.shift + offset, self.shift + offset + length);
        while at < end {
            let extent = first_extent(self.target, at, end).await?;
            if !extent.reads_as_zero() {
                self.write_zeroes(at, extent.length).await?;
            }
            at += extent.length;
        }
        Ok(())
    }

    async fn write_zeroes(&self, at: u64, length: u64) -> Result<()> {
        let flags = if self.options.sparse_size > 0 {
            ZeroFlags::MAY_UNMAP
        } else {
            ZeroFlags::empty()
        };
        self.target.write_zeroes(at, length, flags, false).await
    }

    /// Writes data, leaving out longer runs of zeroes.
    async fn write_sparse(&self, offset: u64, buffer: &IoBuf) -> Result<()> {
        let grain = self.options.sparse_size as usize;
        if grain == 0 {
            return self
                .target
                .write(self.shift + offset, buffer.clone(), false)
                .await;
        }
        let mut bytes = self.bytes.take();
        bytes.resize(buffer.len(), 0);
        buffer.copy_to(&mut bytes);
        let is_zero = |at: usize| bytes_are_zero(&bytes[at..(at + grain).min(bytes.len())]);
        let mut start = 0;
        while start < bytes.len() {
            let zero = is_zero(start);
            let mut end = start + grain;
            while end < bytes.len() && is_zero(end) == zero {
                end += grain;
            }
            let end = end.min(bytes.len());
            let at = offset + start as u64;
            if zero {
                self.zero(at, (end - start) as u64).await?;
            } else {
                let part = buffer.slice(start, end - start);
                self.target.write(self.shift + at, part, false).await?;
            }
            start = end;
        }
        self.bytes.replace(bytes);
        Ok(())
    }

    async fn write_compressed(
        &self,
        task: Task,
        buffer: &IoBuf,
        compressed: Vec<Compressed>,
        how: Compressing,
    ) -> Result<()> {
        for (number, result) in compressed.into_iter().enumerate() {
            let within = number as u64 * how.unit;
            let at = task.offset + within;
            let length = how.unit.min(task.length - within);
            let aligned = (self.shift + at).is_multiple_of(how.unit);
            match result {
                Compressed::Zero => self.zero(at, length).await?,
                Compressed::Smaller(data) if aligned => {
                    self.store_compressed(self.shift + at, data).await?;
                }
                _ => {
                    let part = buffer.slice(within as usize, length as usize);
                    self.target.write(self.shift + at, part, false).await?;
                }
            }
        }
        Ok(())
    }

    async fn store_compressed(&self, offset: u64, data: Vec<u8>) -> Result<()> {
        match (&self.image.qcow2, &self.image.format) {
            (Some(qcow2), _) => qcow2.write_compressed(offset, &data).await,
            (None, Some(format)) => format.write_compressed(offset, data).await,
            (None, None) => Ok(()),
        }
    }
}

enum Compressed {
    Zero,
    Smaller(Vec<u8>),
    AsItIs,
}

/// Compresses one unit at a time, keeping its tables.
enum Compressor {
    Qcow2(ClusterCompressor),
    Deflate(Deflater, bool),
}

impl Compressor {
    fn new(method: Method) -> Self {
        match method {
            Method::Qcow2(kind) => Self::Qcow2(ClusterCompressor::new(kind)),
            Method::Deflate { zlib } => Self::Deflate(Deflater::default(), zlib),
        }
    }

    fn compress(&mut self, unit: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Qcow2(compressor) => compressor.compress(unit),
            Self::Deflate(deflater, zlib) => {
                let bytes = deflater.compress(unit, usize::MAX)?;
                Some(if *zlib {
                    with_zlib(&bytes, unit)
                } else {
                    bytes
                })
            }
        }
    }
}

/// A deflate stream with zlib's header and checksum (RFC 1950).
fn with_zlib(deflated: &[u8], original: &[u8]) -> Vec<u8> {
    let checksum = simd_adler32::adler32(&original);
    let mut bytes = Vec::with_capacity(deflated.len() + 6);
    bytes.extend_from_slice(&[0x78, 0x9c]);
    bytes.extend_from_slice(deflated);
    bytes.extend_from_slice(&checksum.to_be_bytes());
    bytes
}

fn compress_all(bytes: &[u8], how: Compressing) -> Vec<Compressed> {
    let mut compressor = Compressor::new(how.method);
    let unit = how.unit as usize;
    let one = |part: &[u8]| {
        if bytes_are_zero(part) {
            return Compressed::Zero;
        }
        let padded;
        let whole = if part.len() == unit {
            part
        } else {
            padded = [part, &vec![0; unit - part.len()]].concat();
            &padded
        };
        compressor
            .compress(whole)
            .map_or(Compressed::AsItIs, Compressed::Smaller)
    };
    bytes.chunks(unit).map(one).collect()
}

/// How two disks compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// All bytes are equal, as far as both go, and the rest of the longer one is zero.
    Identical {
        /// The sizes differ.
        sizes_differ: bool,
    },
    /// The content differs; the first sector that does begins here.
    Content {
        /// In bytes.
        offset: u64,
    },
    /// In strict mode: one is allocated here, the other is not.
    Allocation {
        /// In bytes.
        offset: u64,
    },
    /// In strict mode: the sizes differ.
    Size,
}

/// Compares the content of two disks; in strict mode also sizes and what is allocated.
///
/// # Errors
///
/// What either side reports.
pub async fn compare(
    a: &Disk,
    b: &Disk,
    strict: bool,
    progress: &dyn Fn(u64),
) -> Result<Comparison> {
    if strict && a.size() != b.size() {
        return Ok(Comparison::Size);
    }
    let common = a.size().min(b.size());
    let mut offset = 0;
    while offset < common {
        let (first, second) = (
            first_extent(a, offset, common).await?,
            first_extent(b, offset, common).await?,
        );
        let length = first.length.min(second.length);
        let allocated = |e: &Extent| e.kind != ExtentKind::Unallocated;
        if strict && allocated(&first) != allocated(&second) {
            return Ok(Comparison::Allocation { offset });
        }
        let zeroes = (first.reads_as_zero(), second.reads_as_zero());
        let length = if zeroes == (true, true) {
            length
        } else {
            length.min(PIECE)
        };
        if zeroes != (true, true)
            && let Some(at) = compare_piece(a, b, offset, length, zeroes).await?
        {
            return Ok(Comparison::Content { offset: at });
        }
        progress(length);
        offset += length;
    }
    let longer = if a.size() > common { a } else { b };
    while offset < longer.size() {
        let extent = first_extent(longer, offset, longer.size()).await?;
        let length = if extent.reads_as_zero() {
            extent.length
        } else {
            extent.length.min(PIECE)
        };
        if !extent.reads_as_zero()
            && let Some(at) = compare_piece(longer, longer, offset, length, (false, true)).await?
        {
            return Ok(Comparison::Content { offset: at });
        }
        progress(length);
        offset += length;
    }
    Ok(Comparison::Identical {
        sizes_differ: a.size() != b.size(),
    })
}

async fn first_extent(disk: &Disk, offset: u64, end: u64) -> Result<Extent> {
    let query = ExtentQuery {
        offset,
        length: end - offset,
        scope: Scope::Chain,
        limit: 1,
    };
    let extents = disk.extents(query).await?;
    extents.into_iter().next().ok_or_else(|| {
        block::BlockError::new(
            ErrorKind::Io,
            format!("no answer about the extent at {offset}"),
        )
    })
}

/// Where the first sector differs; a side that is known to be zero is not read.
async fn compare_piece(
    a: &Disk,
    b: &Disk,
    offset: u64,
    length: u64,
    zeroes: (bool, bool),
) -> Result<Option<u64>> {
    let read = async |disk: &Disk, zero: bool| {
        let buffer = IoBuf::zeroed(length as usize);
        if !zero {
            disk.read(offset, buffer.clone()).await?;
        }
        Ok::<_, block::BlockError>(buffer.to_vec())
    };
    let (a, b) = (read(a, zeroes.0).await?, read(b, zeroes.1).await?);
    if a == b {
        return Ok(None);
    }
    let sector = a.chunks(512).zip(b.chunks(512)).position(|(a, b)| a != b);
    Ok(sector.map(|n| offset + n as u64 * 512))
}

/// Writes everything that the layer `top` has of its own to `base`, which grows if it is smaller.
///
/// # Errors
///
/// What either side reports; `base` is then partly written, `top` unchanged.
pub async fn commit(top: &Disk, base: &Disk, progress: &dyn Fn(u64)) -> Result<()> {
    if top.size() > base.size() {
        base.resize(top.size()).await?;
    }
    let mut offset = 0;
    while offset < top.size() {
        let length = top.size() - offset;
        let query = ExtentQuery {
            offset,
            length,
            scope: Scope::Layer,
            limit: 256,
        };
        for extent in top.extents(query).await? {
            commit_extent(top, base, &extent).await?;
            progress(extent.length);
            offset = extent.end();
        }
    }
    base.flush().await
}

async fn commit_extent(top: &Disk, base: &Disk, extent: &Extent) -> Result<()> {
    match extent.kind {
        ExtentKind::Unallocated => Ok(()),
        ExtentKind::Zero(_) => {
            base.write_zeroes(extent.offset, extent.length, ZeroFlags::MAY_UNMAP, false)
                .await
        }
        ExtentKind::Data(_) | ExtentKind::Compressed => {
            let mut at = extent.offset;
            while at < extent.end() {
                let buffer = IoBuf::zeroed(PIECE.min(extent.end() - at) as usize);
                top.read(at, buffer.clone()).await?;
                let length = buffer.len() as u64;
                base.write(at, buffer, false).await?;
                at += length;
            }
            Ok(())
        }
    }
}

/// Writes into the layer `top` what would read otherwise once `new` is below it instead of `old`.
///
/// # Errors
///
/// What any side reports; `top` then reads as before, because the old backing file is still named.
pub async fn rebase(
    top: &Disk,
    old: Option<&dyn BlockBackend>,
    new: Option<&dyn BlockBackend>,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let mut offset = 0;
    while offset < top.size() {
        let length = top.size() - offset;
        let query = ExtentQuery {
            offset,
            length,
            scope: Scope::Layer,
            limit: 256,
        };
        for extent in top.extents(query).await? {
            if extent.kind == ExtentKind::Unallocated {
                rebase_extent(top, old, new, &extent).await?;
            }
            progress(extent.length);
            offset = extent.end();
        }
    }
    top.flush().await
}

async fn rebase_extent(
    top: &Disk,
    old: Option<&dyn BlockBackend>,
    new: Option<&dyn BlockBackend>,
    extent: &Extent,
) -> Result<()> {
    let mut at = extent.offset;
    while at < extent.end() {
        let length = (PIECE - at % PIECE).min(extent.end() - at);
        let before = read_backing(old, at, length).await?;
        let after = read_backing(new, at, length).await?;
        if before != after {
            let sectors = before.chunks(4096).zip(after.chunks(4096)).enumerate();
            for (n, (sector, _)) in sectors.filter(|(_, (a, b))| a != b) {
                let place = at + n as u64 * 4096;
                if bytes_are_zero(sector) {
                    let length = sector.len() as u64;
                    top.write_zeroes(place, length, ZeroFlags::MAY_UNMAP, false)
                        .await?;
                } else {
                    top.write(place, IoBuf::from_slice(sector), false).await?;
                }
            }
        }
        at += length;
    }
    Ok(())
}

async fn read_backing(backing: Option<&dyn BlockBackend>, at: u64, length: u64) -> Result<Vec<u8>> {
    let buffer = IoBuf::zeroed(length as usize);
    if let Some(backing) = backing {
        let inside = backing.limits().size.saturating_sub(at).min(length);
        if inside > 0 {
            backing.read(at, buffer.slice(0, inside as usize)).await?;
        }
    }
    Ok(buffer.to_vec())
}
