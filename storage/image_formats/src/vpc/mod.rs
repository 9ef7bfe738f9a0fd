//! vpc, also called VHD: fixed, dynamic and differencing disks.
//!
//! A dynamic disk has its footer twice: at the beginning, where readers look first, and behind the last
//! block. New blocks go where the latter was; it is written again before the table refers to them.

mod check;
mod create;
mod header;
mod parent;
mod resize;

pub(crate) use create::write_full;
pub use create::{CreateOptions, NEW_BLOCK_SIZE, create, measure};
pub use header::DiskType;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block::sync::RangeLocks;
use block::{
    BlockBackend, BlockError, BlockFuture, Extent, ExtentQuery, IoBuf, Limits, Medium, OpenGate,
    Result, ZeroFlags,
};

use crate::details::{Compression, Description, ImageFormat, no_compression};
use crate::mapped::{self, Mapped, Order, Place, Run, Table, Target, Writable};
use crate::qcow2::{CheckReport, Repair};
use header::{DynamicHeader, FOOTER_SIZE, Footer, HEADER_SIZE, UNUSED};

/// Bitmaps in memory, at most, unless more of them wait to be written.
const MAX_BITMAPS: usize = 8192;

/// An open VHD.
pub struct Vpc {
    // Configuration.
    medium: Rc<dyn Medium>,
    parent: Option<Rc<dyn BlockBackend>>,
    parent_name: Option<String>,
    // Metadata in memory; newer than the medium until `sync`.
    footer: RefCell<Footer>,
    header: RefCell<Option<DynamicHeader>>,
    table: Table,
    /// Where the next block goes.
    end: Cell<u64>,
    /// The footer behind the last block is not there.
    footer_missing: Cell<bool>,
    bitmaps: RefCell<BTreeMap<u64, Bitmap>>,
    // Who may do what at once.
    locks: RangeLocks,
    syncing: RangeLocks,
}

/// Which sectors of a block are present in a differencing disk; the first one is the highest bit.
#[derive(Clone)]
struct Bitmap {
    bytes: Rc<Vec<u8>>,
    dirty: bool,
}

async fn read_at(medium: &dyn Medium, offset: u64, length: usize) -> Result<Vec<u8>> {
    let buffer = IoBuf::zeroed(length);
    medium.read(offset, buffer.clone()).await?;
    Ok(buffer.to_vec())
}

/// Reads the footer: the one at the beginning if there is one, else the one at the end.
async fn read_footer(medium: &dyn Medium) -> Result<Footer> {
    let first = read_at(medium, 0, FOOTER_SIZE).await?;
    let last_at = medium.len().saturating_sub(FOOTER_SIZE as u64);
    if Footer::is_one(&first)
        && let Ok(footer) = Footer::parse(&first)
        && footer.disk_type != DiskType::Fixed
    {
        return Ok(footer);
    }
    let last = read_at(medium, last_at, FOOTER_SIZE).await?;
    if !Footer::is_one(&last) && last_at > 0 {
        // Old versions of Virtual PC wrote a footer that is a byte short.
        let shorter = read_at(medium, last_at + 1, FOOTER_SIZE).await?;
        if Footer::is_one(&shorter) {
            return Footer::parse(&shorter);
        }
    }
    match Footer::parse(&last) {
        Err(_) if Footer::is_one(&first) => Footer::parse(&first),
        result => result,
    }
}

impl Vpc {
    /// Opens the disk in `medium`; a differencing disk's parent is opened through `gate`, unless
    /// `backing` says not to.
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
        let footer = read_footer(&*medium).await?;
        let mut image = Self {
            parent: None,
            parent_name: None,
            footer: RefCell::new(footer.clone()),
            header: RefCell::new(None),
            table: Table::new(0, Vec::new(), 4, Order::Big),
            end: Cell::new(0),
            footer_missing: Cell::new(false),
            bitmaps: RefCell::default(),
            locks: RangeLocks::default(),
            syncing: RangeLocks::default(),
            medium,
        };
        let length = image.medium.len();
        if footer.disk_type == DiskType::Fixed {
            if footer.size() > length {
                let message = "the file is shorter than the disk";
                return Err(BlockError::invalid_image(message));
            }
            return Ok(image);
        }
        if footer.data_offset > i64::MAX.cast_unsigned() / 2 {
            return Err(BlockError::invalid_image(
                "the dynamic header is out of reach",
            ));
        }
        let bytes = read_at(&*image.medium, footer.data_offset, HEADER_SIZE).await?;
        let header = DynamicHeader::parse(&bytes, footer.size())?;
        let entries = header.entries as usize;
        if header.table_offset + entries as u64 * 4 > length {
            let message = "the block allocation table reaches past the end of the file";
            return Err(BlockError::invalid_image(message));
        }
        image.table =
            Table::read(&*image.medium, header.table_offset, entries, 4, Order::Big).await?;
        image.end.set(end_of_blocks(&image.table, &header, &footer));
        let at_end = read_at(&*image.medium, image.end.get(), FOOTER_SIZE).await?;
        image.footer_missing.set(at_end != footer.encode());
        if footer.disk_type == DiskType::Differencing {
            image.parent_name = parent::candidates(&*image.medium, &header)
                .await?
                .into_iter()
                .next();
            if backing {
                let (name, parent) = parent::open(&*image.medium, &header, gate).await?;
                image.parent_name = Some(name);
                image.parent = Some(parent);
            }
        }
        image.header = RefCell::new(Some(header));
        Ok(image)
    }

    /// What kind of disk it is.
    pub fn disk_type(&self) -> DiskType {
        self.footer.borrow().disk_type
    }

    fn size(&self) -> u64 {
        self.footer.borrow().size()
    }

    /// Block size and bitmap size; the disk is not a fixed one.
    fn sizes(&self) -> (u64, u64) {
        let header = self.header.borrow();
        header.as_ref().map_or((1 << 21, 512), |h| {
            (u64::from(h.block_size), h.bitmap_size())
        })
    }

    /// Where a block begins in the file, bitmap first.
    fn block_place(&self, block: u64) -> Option<u64> {
        let entry = self.table.get(block as usize)?;
        (entry != u64::from(UNUSED)).then_some(entry * 512)
    }

    fn is_differencing(&self) -> bool {
        self.disk_type() == DiskType::Differencing
    }

    async fn bitmap(&self, block: u64, place: u64) -> Result<Rc<Vec<u8>>> {
        if let Some(known) = self.bitmaps.borrow().get(&block) {
            return Ok(known.bytes.clone());
        }
        let bytes = Rc::new(read_at(&*self.medium, place, self.sizes().1 as usize).await?);
        let mut bitmaps = self.bitmaps.borrow_mut();
        if bitmaps.len() >= MAX_BITMAPS {
            bitmaps.retain(|_, bitmap| bitmap.dirty);
        }
        // Another task may have read and changed it meanwhile.
        let entry = bitmaps.entry(block).or_insert(Bitmap {
            bytes,
            dirty: false,
        });
        Ok(entry.bytes.clone())
    }

    async fn run_at(&self, offset: u64, length: u64) -> Result<Run> {
        let host = |offset, holes| Place::Host {
            medium: self.medium.clone(),
            offset,
            holes,
        };
        if self.disk_type() == DiskType::Fixed {
            let place = host(offset, true);
            return Ok(Run { place, length });
        }
        let (block_size, bitmap_size) = self.sizes();
        let (block, within) = (offset / block_size, offset % block_size);
        let length = length.min(block_size - within);
        let Some(place) = self.block_place(block) else {
            return Ok(self.unused_run(block, within, length, block_size));
        };
        let at = place + bitmap_size + within;
        if !self.is_differencing() {
            let place = host(at, true);
            return Ok(Run { place, length });
        }
        let bitmap = self.bitmap(block, place).await?;
        let first = (within / 512) as usize;
        let last = (within + length).div_ceil(512) as usize;
        let present = is_present(&bitmap, first);
        let same = (first..last).take_while(|n| is_present(&bitmap, *n) == present);
        let length = (same.count() as u64 * 512).min(length);
        let place = if present {
            host(at, false)
        } else {
            Place::Unallocated
        };
        Ok(Run { place, length })
    }

    /// A run of blocks that are not there.
    fn unused_run(&self, block: u64, within: u64, length: u64, block_size: u64) -> Run {
        let mut length = length;
        let mut next = block + 1;
        while within + length == (next - block) * block_size
            && (next as usize) < self.table.len()
            && self.block_place(next).is_none()
            && length < 1 << 40
        {
            length += block_size;
            next += 1;
        }
        let place = Place::Unallocated;
        Run { place, length }
    }

    /// Sets the bits of sectors that have been written.
    async fn mark_present(&self, offset: u64, length: u64) -> Result<()> {
        let (block_size, _) = self.sizes();
        let mut at = offset;
        while at < offset + length {
            let (block, within) = (at / block_size, at % block_size);
            let n = (block_size - within).min(offset + length - at);
            if let Some(place) = self.block_place(block) {
                self.bitmap(block, place).await?;
                let mut bitmaps = self.bitmaps.borrow_mut();
                if let Some(bitmap) = bitmaps.get_mut(&block) {
                    let bytes = Rc::make_mut(&mut bitmap.bytes);
                    for sector in within / 512..(within + n).div_ceil(512) {
                        let bit = 0x80u8 >> (sector % 8);
                        if let Some(byte) = bytes.get_mut(sector as usize / 8) {
                            bitmap.dirty |= *byte & bit == 0;
                            *byte |= bit;
                        }
                    }
                }
            }
            at += n;
        }
        Ok(())
    }

    /// Room for a block at the end of the file, with its bitmap.
    async fn new_block(&self) -> Result<u64> {
        let (block_size, bitmap_size) = self.sizes();
        let place = self.end.get();
        if place / 512 + block_size / 512 >= u64::from(UNUSED) {
            let message = "the image cannot grow any further";
            return Err(BlockError::new(block::ErrorKind::NoSpace, message));
        }
        self.end.set(place + bitmap_size + block_size);
        self.footer_missing.set(true);
        let data = place + bitmap_size;
        // Something that was given up may lie there.
        let stale = self
            .medium
            .len()
            .min(data + block_size)
            .saturating_sub(data);
        if stale > 0 {
            self.medium
                .write_zeroes(data, stale, ZeroFlags::MAY_UNMAP)
                .await?;
        }
        // Others may have made it longer meanwhile.
        let needed = data + block_size + FOOTER_SIZE as u64;
        if self.medium.len() < needed {
            self.medium.set_len(needed).await?;
        }
        let fill = if self.is_differencing() { 0 } else { 0xff };
        let bitmap = vec![fill; bitmap_size as usize];
        self.medium.write(place, IoBuf::from_slice(&bitmap)).await?;
        Ok(place)
    }

    /// Makes everything durable that was written before.
    async fn sync(&self) -> Result<()> {
        let _turn = self.syncing.lock(0, 1).await;
        if self.medium.read_only() {
            return Ok(());
        }
        let changes = self.table.begin();
        let bitmaps = self.take_bitmaps();
        let end = self.end.get();
        if self.footer_missing.get() && self.header.borrow().is_some() {
            let footer = self.footer.borrow().encode();
            self.medium.write(end, IoBuf::from_slice(&footer)).await?;
            if end == self.end.get() {
                self.footer_missing.set(false);
            }
        }
        self.medium.flush().await?;
        if changes.is_empty() && bitmaps.is_empty() {
            return Ok(());
        }
        let result = self.write_metadata(&changes, &bitmaps).await;
        if result.is_err() {
            let mut known = self.bitmaps.borrow_mut();
            for (block, _) in &bitmaps {
                if let Some(bitmap) = known.get_mut(block) {
                    bitmap.dirty = true;
                }
            }
        }
        result
    }

    fn take_bitmaps(&self) -> Vec<(u64, Rc<Vec<u8>>)> {
        let mut bitmaps = self.bitmaps.borrow_mut();
        let dirty = bitmaps.iter_mut().filter(|(_, b)| b.dirty);
        dirty
            .map(|(block, bitmap)| {
                bitmap.dirty = false;
                (*block, bitmap.bytes.clone())
            })
            .collect()
    }

    async fn write_metadata(
        &self,
        changes: &mapped::Changes,
        bitmaps: &[(u64, Rc<Vec<u8>>)],
    ) -> Result<()> {
        self.table.write(&*self.medium, changes).await?;
        for (block, bytes) in bitmaps {
            if let Some(place) = self.block_place(*block) {
                self.medium.write(place, IoBuf::from_slice(bytes)).await?;
            }
        }
        self.medium.flush().await
    }
}

fn is_present(bitmap: &[u8], sector: usize) -> bool {
    bitmap
        .get(sector / 8)
        .is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0)
}

/// The first place behind everything that is in use.
fn end_of_blocks(table: &Table, header: &DynamicHeader, footer: &Footer) -> u64 {
    let block = u64::from(header.block_size) + header.bitmap_size();
    let table_end = header.table_offset + u64::from(header.entries) * 4;
    let header_end = footer.data_offset + HEADER_SIZE as u64;
    let locators = header
        .locators
        .iter()
        .map(|l| l.offset.saturating_add(u64::from(l.length)));
    let used = table
        .entries()
        .into_iter()
        .filter(|e| *e != u64::from(UNUSED));
    let blocks = used.map(|e| e * 512 + block);
    locators
        .filter(|end| *end < 1 << 40)
        .chain(blocks)
        .fold(table_end.max(header_end), u64::max)
        .next_multiple_of(512)
}

impl Mapped for Vpc {
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

impl Writable for Vpc {
    fn block_at(&self, offset: u64) -> (u64, u64) {
        mapped::even_block(offset, self.sizes().0, self.size())
    }

    fn locks(&self) -> &RangeLocks {
        &self.locks
    }

    fn copies_parent(&self) -> bool {
        false
    }

    fn writable_place(&self, offset: u64) -> BlockFuture<'_, Option<Target>> {
        Box::pin(async move {
            let target = |offset, length| Target {
                medium: self.medium.clone(),
                offset,
                length,
            };
            if self.disk_type() == DiskType::Fixed {
                return Ok(Some(target(offset, self.size() - offset)));
            }
            let (block_size, bitmap_size) = self.sizes();
            let within = offset % block_size;
            let place = self.block_place(offset / block_size);
            Ok(place.map(|p| target(p + bitmap_size + within, block_size - within)))
        })
    }

    fn allocate(&self, _offset: u64) -> BlockFuture<'_, Target> {
        Box::pin(async move {
            let (block_size, bitmap_size) = self.sizes();
            let place = self.new_block().await?;
            Ok(Target {
                medium: self.medium.clone(),
                offset: place + bitmap_size,
                length: block_size,
            })
        })
    }

    fn install(&self, offset: u64, target: Target) -> BlockFuture<'_, ()> {
        let (block_size, bitmap_size) = self.sizes();
        let sector = (target.offset - bitmap_size) / 512;
        self.table.set((offset / block_size) as usize, sector);
        Box::pin(async { Ok(()) })
    }

    fn wrote(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            if self.is_differencing() {
                self.mark_present(offset, length).await?;
            }
            Ok(())
        })
    }

    fn set_zero(&self, _offset: u64) -> BlockFuture<'_, bool> {
        // A dynamic disk without a parent reads as zeroes there already.
        Box::pin(async { Ok(false) })
    }
}

impl BlockBackend for Vpc {
    fn limits(&self) -> Limits {
        let fixed = self.disk_type() == DiskType::Fixed;
        let granularity = if fixed { 4096 } else { self.sizes().0 as u32 };
        Limits {
            size: self.size(),
            logical_block_size: 512,
            physical_block_size: self.medium.alignment().max(512),
            buffer_alignment: self.medium.alignment(),
            discard_granularity: 4096,
            zero_granularity: granularity,
            max_transfer: 1 << 30,
            read_only: self.medium.read_only(),
        }
    }

    fn format_name(&self) -> &'static str {
        "vpc"
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
        Box::pin(mapped::discard(self, offset, length))
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
        Box::pin(self.sync())
    }
}

impl ImageFormat for Vpc {
    fn describe(&self) -> Description {
        let dynamic = self
            .header
            .borrow()
            .as_ref()
            .map(|h| u64::from(h.block_size));
        Description {
            cluster_size: dynamic,
            backing_file: self.parent_name.clone(),
            backing_format: self.parent_name.as_ref().map(|_| "vpc".to_owned()),
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
