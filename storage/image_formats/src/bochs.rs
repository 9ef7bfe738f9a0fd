//! Bochs' growing disks, read alone (Bochs' documentation, "Harddisk Redologs"): a catalog says where
//! each extent lies, and a bitmap before the extent which of its sectors are there.

use std::rc::Rc;

use block::{BlockBackend, BlockError, BlockFuture, IoBuf, Medium, Result};

use crate::details::{Description, no_compression};
use crate::fields::Fields;
use crate::mapped::{Mapped, Place, Run};
use crate::qcow2::CheckReport;
use crate::read_only::{Layout, Pages, ReadOnlyImage};

const HEADER_SIZE: u64 = 512;
const MAGIC: &[u8] = b"Bochs Virtual HD Image\0";
const V1: u32 = 0x1_0000;
const V2: u32 = 0x2_0000;
/// Enough for the largest disk that Bochs makes, of 8 TiB.
const MAX_CATALOG: u64 = 1 << 20;
const MAX_EXTENT: u64 = 8 << 20;
const UNALLOCATED: u32 = u32::MAX;

struct Bochs {
    medium: Rc<dyn Medium>,
    pages: Pages,
    size: u64,
    catalog: u64,
    /// Where extents begin.
    data: u64,
    extent: u64,
    /// Bytes that a bitmap takes.
    bitmap: u64,
}

/// Opens the disk in `medium`.
///
/// # Errors
///
/// `InvalidImage` or `Unsupported` with what is wrong, or what the host reports.
pub async fn open(medium: Rc<dyn Medium>) -> Result<ReadOnlyImage> {
    ReadOnlyImage::open(&medium.clone(), Bochs::open(medium)).await
}

impl Bochs {
    async fn open(medium: Rc<dyn Medium>) -> Result<Self> {
        let first = IoBuf::zeroed(HEADER_SIZE as usize);
        medium.read(0, first.clone()).await?;
        let first = first.to_vec();
        let f = Fields(&first);
        if !first.starts_with(MAGIC) {
            return Err(BlockError::invalid_image("this is no Bochs disk"));
        }
        if !first[32..].starts_with(b"Redolog\0") || !first[48..].starts_with(b"Growing\0") {
            let message = "of Bochs' disks only growing ones are supported";
            return Err(BlockError::unsupported(message));
        }
        let size = match f.le32(64) {
            V1 => f.le64(84),
            V2 => f.le64(88),
            version => {
                let message = format!("Bochs disks of version {version:#x} are not supported");
                return Err(BlockError::unsupported(message));
            }
        };
        let catalog = u64::from(f.le32(68));
        let entries = u64::from(f.le32(72));
        let (bitmap, extent) = (u64::from(f.le32(76)), u64::from(f.le32(80)));
        let bad = |what: &str| Err(BlockError::invalid_image(what));
        if entries > MAX_CATALOG {
            return bad("the catalog is too large");
        }
        if !extent.is_power_of_two() || !(512..=MAX_EXTENT).contains(&extent) {
            return bad("the size of an extent is no power of two from 512 bytes to 8 MiB");
        }
        if bitmap == 0 || bitmap > MAX_EXTENT {
            return bad("the bitmaps have an impossible size");
        }
        if bitmap.next_multiple_of(512) * 8 < extent / 512 {
            return bad("the bitmaps are too small for the extents");
        }
        if !catalog.is_multiple_of(4) {
            return bad("the catalog is at an odd place");
        }
        if size / 512 > entries * (extent / 512) {
            return bad("the catalog is too small for the disk");
        }
        Ok(Self {
            pages: Pages::new(medium.clone()),
            medium,
            size: size / 512 * 512,
            catalog,
            data: catalog + entries * 4,
            extent,
            bitmap: bitmap.next_multiple_of(512),
        })
    }

    /// Where the bitmap before an extent lies.
    async fn bitmap_place(&self, extent: u64) -> Result<Option<u64>> {
        let entry = u32::from_le_bytes(self.pages.bytes(self.catalog + extent * 4).await?);
        let each = self.bitmap + self.extent;
        Ok((entry != UNALLOCATED).then(|| self.data + u64::from(entry) * each))
    }

    async fn run_at(&self, offset: u64, length: u64) -> Result<Run> {
        let within = offset % self.extent;
        let length = length.min(self.extent - within);
        let Some(bitmap) = self.bitmap_place(offset / self.extent).await? else {
            let place = Place::Unallocated;
            return Ok(Run { place, length });
        };
        let first = within / 512;
        let last = (within + length).div_ceil(512);
        let stored = self.is_stored(bitmap, first).await?;
        let mut next = first + 1;
        while next < last && self.is_stored(bitmap, next).await? == stored {
            next += 1;
        }
        let place = if stored {
            Place::Host {
                medium: self.medium.clone(),
                offset: bitmap + self.bitmap + within,
                holes: false,
            }
        } else {
            Place::Unallocated
        };
        let length = length.min(next * 512 - within);
        Ok(Run { place, length })
    }

    /// Whether a sector of an extent is there; the first one is the lowest bit.
    async fn is_stored(&self, bitmap: u64, sector: u64) -> Result<bool> {
        let [byte] = self.pages.bytes(bitmap + sector / 8).await?;
        Ok(byte >> (sector % 8) & 1 != 0)
    }
}

impl Mapped for Bochs {
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run> {
        Box::pin(self.run_at(offset, length))
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

impl Layout for Bochs {
    fn format(&self) -> &'static str {
        "bochs"
    }

    fn size(&self) -> u64 {
        self.size
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
