//! VHDX ([MS-VHDX]): fixed, dynamic and differencing disks.
//!
//! Blocks go to the end of the file; the table and the sector bitmaps refer to them from the next flush
//! on, by way of the log: data first, then a log entry, then the changes in their places. So after a power
//! cut the entry says what is missing, or nothing has been changed.

mod bitmaps;
mod check;
mod create;
mod header;
mod journal;
mod log;
mod parent;
mod replayed;
mod resize;

pub use create::{CreateOptions, create, measure, new_block_size};

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::sync::RangeLocks;
use block::{
    BlockBackend, BlockError, BlockFuture, Extent, ExtentQuery, IoBuf, Limits, Medium, OpenGate,
    Result, ZeroFlags,
};

use crate::details::{Compression, Description, ImageFormat, no_compression};
use crate::mapped::{self, Mapped, Order, Place, Run, Table, Target, Writable};
use crate::qcow2::{CheckReport, Repair};
use bitmaps::{Bitmaps, PAGE_BITS, is_set};
use header::{HEADER_SIZE, HEADERS, Header, MIB, Metadata, REGION_TABLE_SIZE, Region, State};
use journal::Journal;
use log::SECTOR;
use replayed::Replayed;

/// No more of the metadata region is read.
const MAX_METADATA: u64 = 4 << 20;

/// An open VHDX image.
pub struct Vhdx {
    // Configuration.
    medium: Rc<dyn Medium>,
    parent: Option<Rc<dyn BlockBackend>>,
    parent_name: Option<String>,
    /// The log had changes in it when the image was opened.
    log_was_dirty: bool,
    // Metadata in memory; newer than the medium until `sync`.
    regions: RefCell<Vec<Region>>,
    metadata: RefCell<Metadata>,
    table: Table,
    bitmaps: Bitmaps,
    journal: Journal,
    /// Where the next block goes.
    end: Cell<u64>,
    // Who may do what at once.
    locks: RangeLocks,
    bitmap_blocks: RangeLocks,
    syncing: RangeLocks,
}

async fn read_at(medium: &dyn Medium, offset: u64, length: usize) -> Result<Vec<u8>> {
    let buffer = IoBuf::zeroed(length);
    medium.read(offset, buffer.clone()).await?;
    Ok(buffer.to_vec())
}

fn bad(what: impl Into<String>) -> BlockError {
    BlockError::invalid_image(what)
}

/// The current header and its number.
async fn read_header(medium: &dyn Medium) -> Result<(usize, Header)> {
    let signature = read_at(medium, 0, 8).await?;
    if signature != b"vhdxfile" {
        return Err(bad("this is no VHDX image"));
    }
    let first = read_at(medium, HEADERS[0], HEADER_SIZE).await?;
    let second = read_at(medium, HEADERS[1], HEADER_SIZE).await?;
    Header::current(&first, &second)
}

/// The region table: the first copy that is whole.
async fn read_regions(medium: &dyn Medium) -> Result<Vec<Region>> {
    for place in header::REGION_TABLES {
        let bytes = read_at(medium, place, REGION_TABLE_SIZE).await?;
        if let Some(regions) = header::parse_regions(&bytes) {
            return Ok(regions);
        }
    }
    Err(bad("both region tables are damaged"))
}

async fn read_metadata(medium: &dyn Medium, region: Region) -> Result<Metadata> {
    let length = u64::from(region.length).min(MAX_METADATA);
    let bytes = read_at(medium, region.offset, length as usize).await?;
    Metadata::parse(&bytes)
}

impl Vhdx {
    /// Opens the disk in `medium`; a differencing disk's parent is opened through `gate`, unless
    /// `backing` says not to. A log that was left is replayed; if the medium cannot be written, only in
    /// memory.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported` with what is wrong, or what the gate and the host report.
    pub async fn open(medium: Rc<dyn Medium>, gate: &dyn OpenGate, backing: bool) -> Result<Self> {
        let name = medium.name();
        let opened = Self::open_inner(medium, gate, backing).await;
        opened.map_err(|e| match e.kind() {
            block::ErrorKind::InvalidImage | block::ErrorKind::Unsupported => {
                e.context(format!("'{name}'"))
            }
            _ => e,
        })
    }

    async fn open_inner(
        medium: Rc<dyn Medium>,
        gate: &dyn OpenGate,
        backing: bool,
    ) -> Result<Self> {
        let (current, header) = read_header(&*medium).await?;
        if !medium.read_only() && !header.has_log() {
            return Err(bad("it cannot be written to: the header names no log"));
        }
        let log_was_dirty = header.log != [0; 16];
        let journal = Journal::new(medium.clone(), header.clone(), current);
        let medium = if log_was_dirty {
            replay(medium, &header, &journal).await?
        } else {
            medium
        };
        let regions = read_regions(&*medium).await?;
        let (bat, place) = header::known_regions(&regions)?;
        let metadata = read_metadata(&*medium, place).await?;
        let entries = metadata.entries();
        if entries * 8 > u64::from(bat.length) || bat.offset + entries * 8 > medium.len() {
            return Err(bad("the block allocation table is cut off"));
        }
        let table = Table::read(&*medium, bat.offset, entries as usize, 8, Order::Little).await?;
        let mut image = Self {
            parent: None,
            parent_name: None,
            log_was_dirty,
            regions: RefCell::new(regions),
            metadata: RefCell::new(metadata.clone()),
            table,
            bitmaps: Bitmaps::default(),
            journal,
            end: Cell::new(0),
            locks: RangeLocks::default(),
            bitmap_blocks: RangeLocks::default(),
            syncing: RangeLocks::default(),
            medium,
        };
        image.end.set(image.end_of_blocks());
        if metadata.has_parent {
            image.parent_name = parent::candidates(&metadata.locator).into_iter().next();
            if backing {
                let (name, parent) = parent::open(&*image.medium, &metadata, gate).await?;
                image.parent_name = Some(name);
                image.parent = Some(parent);
            }
        }
        Ok(image)
    }

    fn size(&self) -> u64 {
        self.metadata.borrow().size
    }

    fn block_size(&self) -> u64 {
        self.metadata.borrow().block_size
    }

    fn has_parent(&self) -> bool {
        self.metadata.borrow().has_parent
    }

    /// The first place behind everything that is in use.
    fn end_of_blocks(&self) -> u64 {
        let metadata = self.metadata.borrow();
        let header = self.journal.header();
        let mut end = header
            .log_offset
            .saturating_add(u64::from(header.log_length));
        for region in self.regions.borrow().iter() {
            end = end.max(region.offset.saturating_add(u64::from(region.length)));
        }
        let ratio = metadata.chunk_ratio() as usize;
        for (n, entry) in self.table.entries().into_iter().enumerate() {
            let is_bitmap = n % (ratio + 1) == ratio;
            let length = if is_bitmap { MIB } else { metadata.block_size };
            if let Some(State::Full(place) | State::Partial(place)) = State::of(entry) {
                end = end.max(place + length);
            }
        }
        end.max(MIB).next_multiple_of(MIB)
    }

    fn state(&self, block: u64) -> Result<State> {
        let entry = self.metadata.borrow().entry_of(block);
        let value = self.table.get(entry).unwrap_or(0);
        State::of(value).ok_or_else(|| {
            let message = format!("block {block} is in the unknown state {}", value & 7);
            bad(format!("'{}': {message}", self.medium.name()))
        })
    }

    fn set_state(&self, block: u64, state: State) {
        let entry = self.metadata.borrow().entry_of(block);
        self.table.set(entry, state.entry());
    }

    /// The place of the bitmap block of a payload block's chunk.
    fn bitmap_block(&self, block: u64) -> Option<u64> {
        let entry = self.metadata.borrow().bitmap_entry_of(block);
        match State::of(self.table.get(entry)?) {
            Some(State::Full(place)) => Some(place),
            _ => None,
        }
    }

    /// The bits of `length` bytes at `within` of a block, page by page: the page's place, the first
    /// bit in it, and their number.
    fn pages(&self, bitmap: u64, block: u64, within: u64, length: u64) -> Vec<(u64, u64, u64)> {
        let metadata = self.metadata.borrow();
        let sector = u64::from(metadata.logical_sector);
        let base = block % metadata.chunk_ratio() * (metadata.block_size / sector);
        let (mut bit, end) = (
            base + within / sector,
            base + (within + length).div_ceil(sector),
        );
        let mut pages = Vec::new();
        while bit < end {
            let (page, first) = (bit / PAGE_BITS, bit % PAGE_BITS);
            let count = (PAGE_BITS - first).min(end - bit);
            pages.push((bitmap + page * SECTOR as u64, first, count));
            bit += count;
        }
        pages
    }

    /// What a part of a block that is partly here is.
    async fn partial_run(&self, block: u64, place: u64, within: u64, length: u64) -> Result<Run> {
        let Some(bitmap) = self.bitmap_block(block) else {
            let name = self.medium.name();
            return Err(bad(format!("'{name}': block {block} has no sector bitmap")));
        };
        let sector = u64::from(self.metadata.borrow().logical_sector);
        let mut present = None;
        let mut sectors = 0;
        'pages: for (page, first, count) in self.pages(bitmap, block, within, length) {
            let bits = self.bitmaps.page(&*self.medium, page).await?;
            for bit in first..first + count {
                let set = is_set(&bits, bit);
                if *present.get_or_insert(set) != set {
                    break 'pages;
                }
                sectors += 1;
            }
        }
        let skipped = within % sector;
        let length = (sectors * sector - skipped).min(length);
        let place = if present == Some(true) {
            self.host(place + within, false)
        } else {
            Place::Unallocated
        };
        Ok(Run { place, length })
    }

    fn host(&self, offset: u64, holes: bool) -> Place {
        Place::Host {
            medium: self.medium.clone(),
            offset,
            holes,
        }
    }

    async fn run_at(&self, offset: u64, length: u64) -> Result<Run> {
        let block_size = self.block_size();
        let (mut block, within) = (offset / block_size, offset % block_size);
        let mut known = length.min(block_size - within);
        let state = self.state(block)?;
        match state {
            State::Full(place) => {
                let place = self.host(place + within, true);
                return Ok(Run {
                    place,
                    length: known,
                });
            }
            State::Partial(place) => return self.partial_run(block, place, within, known).await,
            State::NotPresent | State::Unmapped | State::Zero => {}
        }
        // Blocks without a place are told together.
        while known < length {
            block += 1;
            if self.state(block)? != state {
                break;
            }
            known = (known + block_size).min(length);
        }
        let place = if state == State::NotPresent {
            Place::Unallocated
        } else {
            Place::Zero
        };
        Ok(Run {
            place,
            length: known,
        })
    }

    /// Room for `length` bytes at the end of the file; they read as zeroes.
    async fn new_room(&self, length: u64) -> Result<u64> {
        let place = self.end.get();
        self.end.set(place + length);
        // Something that was given up may lie there.
        let stale = self.medium.len().min(place + length).saturating_sub(place);
        if stale > 0 {
            self.medium
                .write_zeroes(place, stale, ZeroFlags::MAY_UNMAP)
                .await?;
        }
        // Others may have made it longer meanwhile.
        if self.medium.len() < place + length {
            self.medium.set_len(place + length).await?;
        }
        Ok(place)
    }

    /// Makes sure that the block's chunk has a bitmap, in which no sector of the block is present.
    async fn clear_bits(&self, block: u64) -> Result<()> {
        let (entry, chunk, block_size) = {
            let metadata = self.metadata.borrow();
            let chunk = block / metadata.chunk_ratio();
            (metadata.bitmap_entry_of(block), chunk, metadata.block_size)
        };
        let _alone = self.bitmap_blocks.lock(chunk, 1).await;
        let Some(bitmap) = self.bitmap_block(block) else {
            let place = self.new_room(MIB).await?;
            self.table.set(entry, State::Full(place).entry());
            return Ok(());
        };
        self.set_bits(bitmap, block, (0, block_size), false).await
    }

    async fn set_bits(
        &self,
        bitmap: u64,
        block: u64,
        (within, length): (u64, u64),
        value: bool,
    ) -> Result<()> {
        for (page, first, count) in self.pages(bitmap, block, within, length) {
            let bits = (first, count);
            self.bitmaps.set(&*self.medium, page, bits, value).await?;
        }
        Ok(())
    }

    /// Sets the bits of sectors that have been written.
    async fn mark_present(&self, offset: u64, length: u64) -> Result<()> {
        let block_size = self.block_size();
        let mut at = offset;
        while at < offset + length {
            let (block, within) = (at / block_size, at % block_size);
            let n = (block_size - within).min(offset + length - at);
            if let State::Partial(place) = self.state(block)? {
                if n == block_size {
                    self.set_state(block, State::Full(place));
                } else if let Some(bitmap) = self.bitmap_block(block) {
                    self.set_bits(bitmap, block, (within, n), true).await?;
                }
            }
            at += n;
        }
        Ok(())
    }

    /// Says in the header that content changes, before it does.
    async fn mark_changed(&self) -> Result<()> {
        if self.journal.is_marked() {
            return Ok(());
        }
        let _turn = self.syncing.lock(0, 1).await;
        self.journal.mark().await
    }

    /// Makes everything durable that was written before.
    async fn sync(&self) -> Result<()> {
        let _turn = self.syncing.lock(0, 1).await;
        if self.medium.read_only() {
            return Ok(());
        }
        let changes = self.table.begin();
        let pages = self.bitmaps.begin();
        self.medium.flush().await?;
        let mut sectors = pages.clone();
        sectors.extend(self.table.sectors(&changes, SECTOR));
        let result = self.journal.commit(&sectors).await;
        self.bitmaps.end(&pages, result.is_ok());
        if result.is_ok() {
            self.table.end(&changes);
        }
        result
    }

    async fn close_image(&self) -> Result<()> {
        self.sync().await?;
        if self.medium.read_only() {
            return Ok(());
        }
        self.journal.close().await
    }
}

/// Replays the log: in the file if it can be written, else in memory.
async fn replay(
    medium: Rc<dyn Medium>,
    header: &Header,
    journal: &Journal,
) -> Result<Rc<dyn Medium>> {
    let end = header.log_offset + u64::from(header.log_length);
    if end > medium.len() {
        return Err(bad("the log is cut off"));
    }
    let bytes = read_at(&*medium, header.log_offset, header.log_length as usize).await?;
    let replay = log::replay(&bytes, &header.log)?;
    if replay.flushed_length > medium.len() {
        return Err(bad(
            "the file has been cut off: it is shorter than its log says",
        ));
    }
    if medium.read_only() {
        let below = medium;
        return Ok(Rc::new(Replayed { below, replay }));
    }
    replay.apply(&*medium).await?;
    journal.close().await?;
    Ok(medium)
}

impl Mapped for Vhdx {
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run> {
        Box::pin(self.run_at(offset, length))
    }

    fn read_encoded(&self, _offset: u64, _buf: IoBuf) -> BlockFuture<'_, ()> {
        no_compression()
    }

    fn parent(&self) -> Option<Rc<dyn BlockBackend>> {
        self.parent.clone()
    }

    fn tells_unallocated(&self) -> bool {
        false
    }
}

impl Writable for Vhdx {
    fn block_at(&self, offset: u64) -> (u64, u64) {
        mapped::even_block(offset, self.block_size(), self.size())
    }

    fn locks(&self) -> &RangeLocks {
        &self.locks
    }

    fn copies_parent(&self) -> bool {
        false
    }

    fn writable_place(&self, offset: u64) -> BlockFuture<'_, Option<Target>> {
        Box::pin(async move {
            self.mark_changed().await?;
            let block_size = self.block_size();
            let within = offset % block_size;
            Ok(match self.state(offset / block_size)? {
                State::Full(place) | State::Partial(place) => Some(Target {
                    medium: self.medium.clone(),
                    offset: place + within,
                    length: block_size - within,
                }),
                State::NotPresent | State::Unmapped | State::Zero => None,
            })
        })
    }

    fn allocate(&self, _offset: u64) -> BlockFuture<'_, Target> {
        Box::pin(async move {
            let length = self.block_size();
            Ok(Target {
                medium: self.medium.clone(),
                offset: self.new_room(length).await?,
                length,
            })
        })
    }

    fn install(&self, offset: u64, target: Target) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let block = offset / self.block_size();
            let state = if self.has_parent() && self.state(block)? == State::NotPresent {
                self.clear_bits(block).await?;
                State::Partial(target.offset)
            } else {
                State::Full(target.offset)
            };
            self.set_state(block, state);
            Ok(())
        })
    }

    fn wrote(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            if self.has_parent() {
                self.mark_present(offset, length).await?;
            }
            Ok(())
        })
    }

    fn set_zero(&self, offset: u64) -> BlockFuture<'_, bool> {
        let block = offset / self.block_size();
        Box::pin(async move {
            self.set_state(block, State::Zero);
            Ok(true)
        })
    }
}

impl BlockBackend for Vhdx {
    fn limits(&self) -> Limits {
        let metadata = self.metadata.borrow();
        Limits {
            size: metadata.size,
            logical_block_size: metadata.logical_sector,
            physical_block_size: metadata.physical_sector.max(self.medium.alignment()),
            buffer_alignment: self.medium.alignment(),
            discard_granularity: 4096,
            zero_granularity: metadata.block_size as u32,
            max_transfer: 1 << 30,
            read_only: self.medium.read_only(),
        }
    }

    fn format_name(&self) -> &'static str {
        "vhdx"
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.medium.name())
    }

    fn backing(&self) -> Option<Rc<dyn BlockBackend>> {
        self.parent.clone()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(mapped::read(self, offset, buf))
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(mapped::write(self, offset, buf))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(mapped::write_zeroes(self, offset, length, flags))
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.mark_changed().await?;
            mapped::discard(self, offset, length).await
        })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.sync())
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        Box::pin(mapped::extents(self, query))
    }

    fn resize(&self, size: u64) -> BlockFuture<'_, ()> {
        Box::pin(self.resize_to(size))
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.close_image())
    }
}

impl ImageFormat for Vhdx {
    fn describe(&self) -> Description {
        Description {
            cluster_size: Some(self.block_size()),
            backing_file: self.parent_name.clone(),
            backing_format: self.parent_name.as_ref().map(|_| "vhdx".to_owned()),
            ..Description::default()
        }
    }

    fn check(&self, repair: Repair) -> BlockFuture<'_, Option<CheckReport>> {
        Box::pin(self.check_disk(repair))
    }

    fn compression(&self) -> Option<Compression> {
        None
    }

    fn write_compressed(&self, _offset: u64, _data: Vec<u8>) -> BlockFuture<'_, ()> {
        no_compression()
    }
}
