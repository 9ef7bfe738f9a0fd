//! VDI, `VirtualBox`'s format: dynamic and fixed disks of version 1.1.
//!
//! The header counts the blocks in the file, and other programs put the next block behind that many: so
//! the count is on stable storage before the map refers to new blocks.

mod check;
mod create;
mod header;

pub use create::{CreateOptions, NEW_BLOCK_SIZE, create, measure};

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;

use block::sync::RangeLocks;
use block::{
    BlockBackend, BlockError, BlockFuture, ErrorKind, Extent, ExtentQuery, IoBuf, Limits, Medium,
    Result, ZeroFlags,
};

use crate::details::{Compression, Description, ImageFormat, no_compression};
use crate::mapped::{self, Mapped, Order, Place, Run, Table, Target, Writable};
use crate::qcow2::{CheckReport, Repair};
use header::{ALLOCATED_AT, DISCARDED, HEADER_SIZE, Header};

/// An open VDI image.
pub struct Vdi {
    // Configuration.
    medium: Rc<dyn Medium>,
    header: Header,
    // Metadata in memory; newer than the medium until `sync`.
    map: Table,
    /// The number behind that of the last block.
    next: Cell<u64>,
    /// Numbers before that one that nothing refers to.
    unused: RefCell<Vec<u64>>,
    /// How many blocks the header on the medium counts.
    counted: Cell<u64>,
    // Who may do what at once.
    locks: RangeLocks,
    syncing: RangeLocks,
}

impl Vdi {
    /// Opens the disk in `medium`.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported` with what is wrong, or what the host reports.
    pub async fn open(medium: Rc<dyn Medium>) -> Result<Self> {
        let name = medium.name();
        let opened = Self::open_inner(medium).await;
        opened.map_err(|e| match e.kind() {
            ErrorKind::InvalidImage | ErrorKind::Unsupported => e.context(format!("'{name}'")),
            _ => e,
        })
    }

    async fn open_inner(medium: Rc<dyn Medium>) -> Result<Self> {
        let first = IoBuf::zeroed(HEADER_SIZE);
        medium.read(0, first.clone()).await?;
        let header = Header::parse(&first.to_vec())?;
        // What the file does not hold is not believed, so a short file costs little memory.
        if header.table + header.blocks * 4 > medium.len() {
            let message = "the block map reaches past the end of the file";
            return Err(BlockError::invalid_image(message));
        }
        let entries = header.blocks as usize;
        let map = Table::read(&*medium, header.table, entries, 4, Order::Little).await?;
        let used: HashSet<u64> = map
            .entries()
            .into_iter()
            .filter(|e| *e < DISCARDED)
            .collect();
        // What lies behind the last block that the map names is left over.
        let next = used.iter().max().map_or(0, |last| last + 1);
        let unused = if next <= 2 * header.blocks {
            (0..next).rev().filter(|n| !used.contains(n)).collect()
        } else {
            Vec::new()
        };
        Ok(Self {
            map,
            next: Cell::new(next),
            unused: RefCell::new(unused),
            counted: Cell::new(header.allocated),
            locks: RangeLocks::default(),
            syncing: RangeLocks::default(),
            header,
            medium,
        })
    }

    /// Where a block lies in the file.
    fn place(&self, entry: u64) -> u64 {
        self.header.data + entry * self.header.block_size
    }

    fn entry(&self, offset: u64) -> Option<u64> {
        let entry = self.map.get((offset / self.header.block_size) as usize);
        entry.filter(|e| *e < DISCARDED)
    }

    fn run_at(&self, offset: u64, length: u64) -> Run {
        let size = self.header.block_size;
        let within = offset % size;
        let first = self.entry(offset);
        let mut known = length.min(size - within);
        // Blocks that follow one another, here and in the file, are told together.
        let mut number = 0;
        while known < length {
            number += 1;
            let next = self.entry(offset - within + number * size);
            if next != first.map(|e| e + number) {
                break;
            }
            known = (known + size).min(length);
        }
        let place = match first {
            None => Place::Unallocated,
            Some(entry) => Place::Host {
                medium: self.medium.clone(),
                offset: self.place(entry) + within,
                holes: self.header.fixed,
            },
        };
        Run {
            place,
            length: known,
        }
    }

    /// Room for a block, which reads as zeroes.
    async fn new_block(&self) -> Result<u64> {
        let size = self.header.block_size;
        let unused = self.unused.borrow_mut().pop();
        let entry = unused.unwrap_or(self.next.get());
        if entry >= DISCARDED {
            let message = "the image cannot grow any further";
            return Err(BlockError::new(ErrorKind::NoSpace, message));
        }
        self.next.set(self.next.get().max(entry + 1));
        let place = self.place(entry);
        // Something that was given up may lie there.
        let stale = self.medium.len().min(place + size).saturating_sub(place);
        if stale > 0 {
            let flags = ZeroFlags::MAY_UNMAP;
            self.medium.write_zeroes(place, stale, flags).await?;
        }
        // Others may have made it longer meanwhile.
        if self.medium.len() < place + size {
            self.medium.set_len(place + size).await?;
        }
        Ok(entry)
    }

    /// Writes the header's count of blocks, and nothing else of the sector.
    async fn write_count(&self, count: u64) -> Result<()> {
        let sector = IoBuf::zeroed(HEADER_SIZE);
        self.medium.read(0, sector.clone()).await?;
        let mut bytes = sector.to_vec();
        crate::fields::put(&mut bytes, ALLOCATED_AT, &(count as u32).to_le_bytes());
        self.medium.write(0, IoBuf::from_slice(&bytes)).await?;
        self.counted.set(count);
        self.medium.flush().await
    }

    /// Makes everything durable that was written before.
    async fn sync(&self) -> Result<()> {
        let _turn = self.syncing.lock(0, 1).await;
        if self.medium.read_only() {
            return Ok(());
        }
        let changes = self.map.begin();
        self.medium.flush().await?;
        if changes.is_empty() {
            return Ok(());
        }
        let next = self.next.get();
        if self.counted.get() != next {
            self.write_count(next).await?;
        }
        self.map.write(&*self.medium, &changes).await?;
        self.medium.flush().await
    }
}

impl Mapped for Vdi {
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run> {
        Box::pin(async move { Ok(self.run_at(offset, length)) })
    }

    fn read_encoded(&self, _offset: u64, _buf: IoBuf) -> BlockFuture<'_, ()> {
        no_compression()
    }

    fn parent(&self) -> Option<Rc<dyn BlockBackend>> {
        None
    }

    fn tells_unallocated(&self) -> bool {
        false
    }
}

impl Writable for Vdi {
    fn block_at(&self, offset: u64) -> (u64, u64) {
        mapped::even_block(offset, self.header.block_size, self.header.size)
    }

    fn locks(&self) -> &RangeLocks {
        &self.locks
    }

    fn copies_parent(&self) -> bool {
        false
    }

    fn writable_place(&self, offset: u64) -> BlockFuture<'_, Option<Target>> {
        Box::pin(async move {
            let within = offset % self.header.block_size;
            Ok(self.entry(offset).map(|entry| Target {
                medium: self.medium.clone(),
                offset: self.place(entry) + within,
                length: self.header.block_size - within,
            }))
        })
    }

    fn allocate(&self, _offset: u64) -> BlockFuture<'_, Target> {
        Box::pin(async move {
            let entry = self.new_block().await?;
            Ok(Target {
                medium: self.medium.clone(),
                offset: self.place(entry),
                length: self.header.block_size,
            })
        })
    }

    fn install(&self, offset: u64, target: Target) -> BlockFuture<'_, ()> {
        let entry = (target.offset - self.header.data) / self.header.block_size;
        let number = (offset / self.header.block_size) as usize;
        self.map.set(number, entry);
        Box::pin(async { Ok(()) })
    }

    fn wrote(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_zero(&self, _offset: u64) -> BlockFuture<'_, bool> {
        // What has no place reads as zeroes already.
        Box::pin(async { Ok(false) })
    }
}

impl BlockBackend for Vdi {
    fn limits(&self) -> Limits {
        Limits {
            size: self.header.size,
            logical_block_size: 512,
            physical_block_size: self.medium.alignment().max(512),
            buffer_alignment: self.medium.alignment(),
            discard_granularity: 4096,
            zero_granularity: self.header.block_size as u32,
            max_transfer: 1 << 30,
            read_only: self.medium.read_only(),
        }
    }

    fn format_name(&self) -> &'static str {
        "vdi"
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.medium.name())
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

    fn resize(&self, _size: u64) -> BlockFuture<'_, ()> {
        let message = "Image format driver does not support resize";
        Box::pin(async move { Err(BlockError::unsupported(message)) })
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.sync())
    }
}

impl ImageFormat for Vdi {
    fn describe(&self) -> Description {
        Description {
            cluster_size: Some(self.header.block_size),
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
