//! Parallels' expanding disks, read alone: a header of 64 bytes, then a table with the place of each
//! cluster.

use std::rc::Rc;

use block::{BlockBackend, BlockError, BlockFuture, IoBuf, Medium, Result};

use crate::details::{Description, no_compression};
use crate::fields::Fields;
use crate::mapped::{Mapped, Place, Run};
use crate::qcow2::CheckReport;
use crate::read_only::{Layout, Pages, Places, ReadOnlyImage};

const HEADER_SIZE: u64 = 64;
/// Entries are sector numbers.
const OLD: &[u8] = b"WithoutFreeSpace";
/// Entries are numbers of clusters.
const NEW: &[u8] = b"WithouFreSpacExt";

struct Parallels {
    medium: Rc<dyn Medium>,
    pages: Pages,
    size: u64,
    cluster: u64,
    /// What an entry counts, in bytes.
    unit: u64,
}

/// Opens the disk in `medium`.
///
/// # Errors
///
/// `InvalidImage` or `Unsupported` with what is wrong, or what the host reports.
pub async fn open(medium: Rc<dyn Medium>) -> Result<ReadOnlyImage> {
    ReadOnlyImage::open(&medium.clone(), Parallels::open(medium)).await
}

impl Parallels {
    async fn open(medium: Rc<dyn Medium>) -> Result<Self> {
        let first = IoBuf::zeroed(HEADER_SIZE as usize);
        medium.read(0, first.clone()).await?;
        let first = first.to_vec();
        let f = Fields(&first);
        let (old, new) = (first.starts_with(OLD), first.starts_with(NEW));
        if !old && !new {
            return Err(BlockError::invalid_image("this is no Parallels disk"));
        }
        if f.le32(16) != 2 {
            let message = format!(
                "Parallels disks of version {} are not supported",
                f.le32(16)
            );
            return Err(BlockError::unsupported(message));
        }
        let (sectors, entries) = (u64::from(f.le32(28)), u64::from(f.le32(32)));
        let mut disk = f.le64(36);
        if old {
            // The upper half is not always zero in old images.
            disk &= 0xffff_ffff;
        }
        let cluster = sectors * 512;
        if sectors == 0 || sectors > 1 << 21 {
            return Err(BlockError::invalid_image(format!(
                "clusters of {sectors} sectors"
            )));
        }
        if HEADER_SIZE + entries * 4 > medium.len() {
            return Err(BlockError::invalid_image(
                "the block allocation table reaches past the end of the file",
            ));
        }
        if disk.div_ceil(sectors) > entries {
            return Err(BlockError::invalid_image(
                "the block allocation table is too small for the disk",
            ));
        }
        Ok(Self {
            pages: Pages::new(medium.clone()),
            medium,
            size: disk * 512,
            cluster,
            unit: if old { 512 } else { cluster },
        })
    }

    /// Where a cluster lies in the file.
    async fn place(&self, cluster: u64) -> Result<Option<u64>> {
        let bytes = self.pages.bytes(HEADER_SIZE + cluster * 4).await?;
        let entry = u64::from(u32::from_le_bytes(bytes));
        Ok((entry != 0).then_some(entry * self.unit))
    }
}

impl Mapped for Parallels {
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run> {
        Box::pin(async move {
            let within = offset % self.cluster;
            let length = length.min(self.cluster - within);
            let place = match self.place(offset / self.cluster).await? {
                None => Place::Unallocated,
                Some(place) => Place::Host {
                    medium: self.medium.clone(),
                    offset: place + within,
                    holes: false,
                },
            };
            Ok(Run { place, length })
        })
    }

    fn read_encoded(&self, _offset: u64, _buf: IoBuf) -> BlockFuture<'_, ()> {
        no_compression()
    }

    fn parent(&self) -> Option<Rc<dyn BlockBackend>> {
        None
    }

    fn tells_unallocated(&self) -> bool {
        true
    }
}

impl Layout for Parallels {
    fn format(&self) -> &'static str {
        "parallels"
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
        Box::pin(async move {
            let mut places = Places::new(self.cluster, self.medium.len());
            let total = self.size.div_ceil(self.cluster);
            places.report.total_clusters = total;
            for number in 0..total {
                if let Some(place) = self.place(number).await? {
                    places.add(number, place);
                }
            }
            Ok(Some(places.report))
        })
    }
}
