//! Compressed loop devices (Knoppix' cloop, version 2), read alone: a shell script, then the places of
//! blocks that zlib has compressed.

use std::rc::Rc;

use block::executor::offload;
use block::{BlockBackend, BlockError, BlockFuture, IoBuf, Medium, Result};

use crate::details::Description;
use crate::fields::Fields;
use crate::mapped::{Mapped, Place, Run};
use crate::qcow2::CheckReport;
use crate::read_only::{LastBlock, Layout, Pages, ReadOnlyImage};

/// Where the sizes stand, in the lowest byte last; the script is before.
const SIZES_AT: u64 = 128;
const TABLE_AT: u64 = 136;
const MAX_BLOCK: u64 = 64 << 20;

struct Cloop {
    medium: Rc<dyn Medium>,
    pages: Pages,
    block: u64,
    blocks: u64,
    last: LastBlock,
}

/// Opens the disk in `medium`.
///
/// # Errors
///
/// `InvalidImage` or `Unsupported` with what is wrong, or what the host reports.
pub async fn open(medium: Rc<dyn Medium>) -> Result<ReadOnlyImage> {
    ReadOnlyImage::open(&medium.clone(), Cloop::open(medium)).await
}

impl Cloop {
    async fn open(medium: Rc<dyn Medium>) -> Result<Self> {
        let sizes = IoBuf::zeroed(8);
        medium.read(SIZES_AT, sizes.clone()).await?;
        let sizes = sizes.to_vec();
        let f = Fields(&sizes);
        let (block, blocks) = (u64::from(f.be32(0)), u64::from(f.be32(4)));
        if block == 0 || !block.is_multiple_of(512) || block > MAX_BLOCK {
            return Err(BlockError::invalid_image(format!(
                "blocks of {block} bytes: expected a multiple of 512 up to 64 MiB"
            )));
        }
        if TABLE_AT + (blocks + 1) * 8 > medium.len() {
            return Err(BlockError::invalid_image(
                "the table of blocks reaches past the end of the file",
            ));
        }
        Ok(Self {
            pages: Pages::new(medium.clone()),
            medium,
            block,
            blocks,
            last: LastBlock::default(),
        })
    }

    /// Where a block begins, and where the one before it ends.
    async fn place(&self, number: u64) -> Result<u64> {
        let bytes = self.pages.bytes(TABLE_AT + number * 8).await?;
        Ok(u64::from_be_bytes(bytes))
    }

    async fn inflated(&self, number: u64) -> Result<Vec<u8>> {
        let bad = |what: &str| BlockError::invalid_image(format!("block {number} {what}"));
        let (start, end) = (self.place(number).await?, self.place(number + 1).await?);
        let length = end.checked_sub(start);
        let length = length.ok_or_else(|| bad("ends before it begins"))?;
        // Compressing never makes a block twice as long.
        if length > 2 * MAX_BLOCK || end > self.medium.len() {
            return Err(bad("is too long, or reaches past the end of the file"));
        }
        let data = IoBuf::zeroed(length as usize);
        self.medium.read(start, data.clone()).await?;
        let (data, size) = (data.to_vec(), self.block as usize);
        let inflated = offload(move || inflate(&data, size)).await;
        inflated.ok_or_else(|| bad("is damaged"))
    }
}

/// Inflates a whole zlib stream of `size` bytes.
pub(crate) fn inflate(data: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; size];
    let mut inflater = flate2::Decompress::new(true);
    let finish = flate2::FlushDecompress::Finish;
    let status = inflater.decompress(data, &mut out, finish).ok()?;
    let whole = inflater.total_out() == size as u64;
    (status == flate2::Status::StreamEnd && whole).then_some(out)
}

impl Mapped for Cloop {
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run> {
        Box::pin(async move {
            Ok(Run {
                place: Place::Compressed,
                length: length.min(self.block - offset % self.block),
            })
        })
    }

    fn read_encoded(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let number = offset / self.block;
            let block = self.last.get(number, self.inflated(number)).await?;
            let within = (offset % self.block) as usize;
            let part = block.get(within..within + buf.len());
            buf.copy_from(part.unwrap_or(&[]));
            Ok(())
        })
    }

    fn parent(&self) -> Option<Rc<dyn BlockBackend>> {
        None
    }

    fn tells_unallocated(&self) -> bool {
        false
    }
}

impl Layout for Cloop {
    fn format(&self) -> &'static str {
        "cloop"
    }

    fn size(&self) -> u64 {
        self.blocks * self.block
    }

    fn medium(&self) -> &Rc<dyn Medium> {
        &self.medium
    }

    fn describe(&self) -> Description {
        Description::default()
    }

    fn check(&self) -> BlockFuture<'_, Option<CheckReport>> {
        Box::pin(async { Ok(None) })
    }
}
