//! Images that are read alone: what such formats share.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::rc::Rc;

use block::{
    BlockBackend, BlockError, BlockFuture, ErrorKind, Extent, ExtentQuery, IoBuf, Limits, Medium,
    Result, ZeroFlags,
};

use crate::details::{Compression, Description, ImageFormat, no_compression};
use crate::mapped::{self, Mapped};
use crate::qcow2::{CheckReport, Repair};

/// A disk that is only read.
pub(crate) trait Layout: Mapped {
    /// The format's name.
    fn format(&self) -> &'static str;

    /// The disk's size in bytes.
    fn size(&self) -> u64;

    /// The file.
    fn medium(&self) -> &Rc<dyn Medium>;

    /// What the image says of itself.
    fn describe(&self) -> Description;

    /// Checks the image; `None` if there is nothing to check.
    fn check(&self) -> BlockFuture<'_, Option<CheckReport>>;
}

/// An open image of a format that is not written.
pub struct ReadOnlyImage {
    layout: Box<dyn Layout>,
}

impl ReadOnlyImage {
    pub(crate) fn new(layout: impl Layout + 'static) -> Self {
        Self {
            layout: Box::new(layout),
        }
    }

    /// The same, naming the file where the image is refused.
    pub(crate) async fn open<L: Layout + 'static>(
        medium: &Rc<dyn Medium>,
        opened: impl Future<Output = Result<L>>,
    ) -> Result<Self> {
        let opened = opened.await.map(Self::new);
        opened.map_err(|e| match e.kind() {
            ErrorKind::InvalidImage | ErrorKind::Unsupported => {
                e.context(format!("'{}'", medium.name()))
            }
            _ => e,
        })
    }

    fn refuse<'a, T: 'a>(&self) -> BlockFuture<'a, T> {
        let format = self.layout.format();
        let message = format!("images of the format {format} are read, not written");
        Box::pin(async move { Err(BlockError::new(ErrorKind::ReadOnly, message)) })
    }
}

impl BlockBackend for ReadOnlyImage {
    fn limits(&self) -> Limits {
        let alignment = self.layout.medium().alignment();
        Limits {
            size: self.layout.size(),
            logical_block_size: 512,
            physical_block_size: alignment.max(512),
            buffer_alignment: alignment,
            discard_granularity: 4096,
            zero_granularity: 4096,
            max_transfer: 1 << 30,
            read_only: true,
        }
    }

    fn format_name(&self) -> &'static str {
        self.layout.format()
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.layout.medium().name())
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move { mapped::read(&*self.layout, offset, buf).await })
    }

    fn write(&self, _offset: u64, _buf: IoBuf) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _flags: ZeroFlags) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn discard(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        Box::pin(async move { mapped::extents(&*self.layout, query).await })
    }

    fn resize(&self, _size: u64) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

impl ImageFormat for ReadOnlyImage {
    fn describe(&self) -> Description {
        self.layout.describe()
    }

    fn check(&self, _repair: Repair) -> BlockFuture<'_, Option<CheckReport>> {
        self.layout.check()
    }

    fn compression(&self) -> Option<Compression> {
        None
    }

    fn write_compressed(&self, _offset: u64, _data: Vec<u8>) -> BlockFuture<'_, ()> {
        no_compression()
    }
}

const PAGE: u64 = 4096;
/// Pages in memory, at most.
const MAX_PAGES: usize = 1024;

/// Tables of a file, of which only what is asked for is in memory.
pub(crate) struct Pages {
    medium: Rc<dyn Medium>,
    known: RefCell<BTreeMap<u64, Rc<Vec<u8>>>>,
}

impl Pages {
    pub(crate) fn new(medium: Rc<dyn Medium>) -> Self {
        Self {
            medium,
            known: RefCell::default(),
        }
    }

    /// `N` bytes at `at`, which is a multiple of `N`, a power of two.
    pub(crate) async fn bytes<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let place = at / PAGE * PAGE;
        let known = self.known.borrow().get(&place).cloned();
        let page = match known {
            Some(page) => page,
            None => {
                let buffer = IoBuf::zeroed(PAGE as usize);
                self.medium.read(place, buffer.clone()).await?;
                let page = Rc::new(buffer.to_vec());
                let mut pages = self.known.borrow_mut();
                if pages.len() >= MAX_PAGES {
                    pages.clear();
                }
                pages.insert(place, page.clone());
                page
            }
        };
        let mut out = [0; N];
        let within = (at - place) as usize;
        if let Some(part) = page.get(within..within + N) {
            out.copy_from_slice(part);
        }
        Ok(out)
    }
}

/// The compressed block that was read last: whoever reads in order inflates each block once.
#[derive(Default)]
pub(crate) struct LastBlock(RefCell<Option<(u64, Rc<Vec<u8>>)>>);

impl LastBlock {
    /// The block with this number, made by `make` if it is another one than last time.
    pub(crate) async fn get(
        &self,
        number: u64,
        make: impl Future<Output = Result<Vec<u8>>>,
    ) -> Result<Rc<Vec<u8>>> {
        let known = self.0.borrow().clone().filter(|(n, _)| *n == number);
        if let Some((_, bytes)) = known {
            return Ok(bytes);
        }
        let bytes = Rc::new(make.await?);
        *self.0.borrow_mut() = Some((number, bytes.clone()));
        Ok(bytes)
    }
}

/// Looks for blocks outside the file, and for places that two blocks have.
pub(crate) struct Places {
    owners: HashMap<u64, u64>,
    last: Option<u64>,
    size: u64,
    file: u64,
    pub(crate) report: CheckReport,
}

impl Places {
    /// Blocks of `size` bytes in a file of `file` bytes.
    pub(crate) fn new(size: u64, file: u64) -> Self {
        Self {
            owners: HashMap::new(),
            last: None,
            size,
            file,
            report: CheckReport::default(),
        }
    }

    /// The disk's block with this number lies at `place`.
    pub(crate) fn add(&mut self, number: u64, place: u64) {
        let report = &mut self.report;
        report.allocated_clusters += 1;
        let follows = self.last.is_none_or(|last| last + self.size == place);
        report.fragmented_clusters += u64::from(!follows);
        self.last = Some(place);
        if place >= self.file {
            report.corruption(format!(
                "block {number} lies at {place}, past the end of the file"
            ));
            return;
        }
        report.image_end_offset = report.image_end_offset.max(place + self.size);
        if let Some(other) = self.owners.insert(place, number) {
            report.corruption(format!("blocks {other} and {number} both lie at {place}"));
        }
    }
}
