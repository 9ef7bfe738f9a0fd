//! QED (QEMU's enhanced disk format), read alone: two levels of tables, clusters that are stored, zero or
//! below, and a backing file.

use std::collections::HashSet;
use std::rc::Rc;

use block::{BlockBackend, BlockError, BlockFuture, ImplicitFile, IoBuf, Medium, OpenGate, Result};

use crate::details::{Description, no_compression};
use crate::fields::Fields;
use crate::mapped::{Mapped, Place, Run};
use crate::qcow2::CheckReport;
use crate::read_only::{Layout, Pages, Places, ReadOnlyImage};

const HEADER_SIZE: usize = 64;
const BACKING_FILE: u64 = 1;
/// The image was not closed; its tables are right all the same, as data is written before them.
const NEED_CHECK: u64 = 2;
const BACKING_IS_RAW: u64 = 4;
/// A file name is no longer than this.
const MAX_NAME: u64 = 1023;

struct Qed {
    medium: Rc<dyn Medium>,
    pages: Pages,
    size: u64,
    cluster: u64,
    /// Entries of a table.
    entries: u64,
    table: u64,
    backing: Option<(String, Option<String>)>,
    parent: Option<Rc<dyn BlockBackend>>,
}

/// What a cluster is.
enum Cluster {
    Unallocated,
    Zero,
    At(u64),
}

/// Opens the disk in `medium`, and its backing file through `gate` unless `backing` says not to.
///
/// # Errors
///
/// `InvalidImage` or `Unsupported` with what is wrong, or what the gate and the host report.
pub async fn open(
    medium: Rc<dyn Medium>,
    gate: &dyn OpenGate,
    backing: bool,
) -> Result<ReadOnlyImage> {
    ReadOnlyImage::open(&medium.clone(), async {
        let mut image = Qed::open(medium).await?;
        if let Some((name, format)) = image.backing.clone().filter(|_| backing) {
            let why = ImplicitFile::Backing { format };
            let parent = gate.open_backend(&image.medium.name(), &name, why).await?;
            image.parent = Some(parent);
        }
        Ok(image)
    })
    .await
}

fn bad(what: impl Into<String>) -> BlockError {
    BlockError::invalid_image(what)
}

impl Qed {
    async fn open(medium: Rc<dyn Medium>) -> Result<Self> {
        let first = IoBuf::zeroed(HEADER_SIZE);
        medium.read(0, first.clone()).await?;
        let first = first.to_vec();
        let f = Fields(&first);
        if !first.starts_with(b"QED\0") {
            return Err(bad("this is no QED image"));
        }
        let (cluster, table_clusters) = (u64::from(f.le32(4)), u64::from(f.le32(8)));
        let (features, table, size) = (f.le64(16), f.le64(40), f.le64(48));
        let unknown = features & !(BACKING_FILE | NEED_CHECK | BACKING_IS_RAW);
        if unknown != 0 {
            let message = format!("the QED features {unknown:#x} are unknown");
            return Err(BlockError::unsupported(message));
        }
        if !cluster.is_power_of_two() || !(4096..=64 << 20).contains(&cluster) {
            return Err(bad(format!("clusters of {cluster} bytes")));
        }
        if !table_clusters.is_power_of_two() || table_clusters > 16 {
            return Err(bad(format!("tables of {table_clusters} clusters")));
        }
        let entries = table_clusters * cluster / 8;
        let largest = u128::from(entries) * u128::from(entries) * u128::from(cluster);
        if !size.is_multiple_of(512) || u128::from(size) > largest || size > 1 << 62 {
            return Err(bad(format!("a disk of {size} bytes")));
        }
        let mut image = Self {
            pages: Pages::new(medium.clone()),
            medium,
            size,
            cluster,
            entries,
            table,
            backing: None,
            parent: None,
        };
        image.check_table(table)?;
        if features & BACKING_FILE != 0 {
            let (at, length) = (u64::from(f.le32(56)), u64::from(f.le32(60)));
            if length > MAX_NAME || at + length > u64::from(f.le32(12)) * cluster {
                return Err(bad("the backing file's name is too long, or misplaced"));
            }
            let name = IoBuf::zeroed(length as usize);
            image.medium.read(at, name.clone()).await?;
            let name = String::from_utf8_lossy(&name.to_vec()).into_owned();
            let raw = features & BACKING_IS_RAW != 0;
            image.backing = Some((name, raw.then(|| "raw".to_owned())));
        }
        Ok(image)
    }

    fn check_table(&self, place: u64) -> Result<()> {
        let end = place.checked_add(self.entries * 8);
        let inside = end.is_some_and(|end| end <= self.medium.len());
        if place == 0 || !place.is_multiple_of(self.cluster) || !inside {
            return Err(bad(format!(
                "a table at {place} is misplaced, or past the end of the file"
            )));
        }
        Ok(())
    }

    async fn entry(&self, table: u64, index: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(
            self.pages.bytes(table + index * 8).await?,
        ))
    }

    /// The second-level table with this number, if there is one.
    async fn second(&self, number: u64) -> Result<Option<u64>> {
        let place = self.entry(self.table, number).await?;
        if place == 0 {
            return Ok(None);
        }
        self.check_table(place)?;
        Ok(Some(place))
    }

    async fn cluster_in(&self, table: u64, index: u64) -> Result<Cluster> {
        Ok(match self.entry(table, index).await? {
            0 => Cluster::Unallocated,
            1 => Cluster::Zero,
            place if place.is_multiple_of(self.cluster) && place < 1 << 62 => Cluster::At(place),
            place => return Err(bad(format!("a cluster at {place} is misplaced"))),
        })
    }

    async fn run_at(&self, offset: u64, length: u64) -> Result<Run> {
        let covers = self.entries * self.cluster;
        let Some(table) = self.second(offset / covers).await? else {
            return Ok(Run {
                place: Place::Unallocated,
                length: length.min(covers - offset % covers),
            });
        };
        let within = offset % self.cluster;
        let index = offset % covers / self.cluster;
        let place = match self.cluster_in(table, index).await? {
            Cluster::Unallocated => Place::Unallocated,
            Cluster::Zero => Place::Zero,
            Cluster::At(place) => Place::Host {
                medium: self.medium.clone(),
                offset: place + within,
                holes: false,
            },
        };
        Ok(Run {
            place,
            length: length.min(self.cluster - within),
        })
    }

    async fn check_tables(&self) -> Result<CheckReport> {
        let mut places = Places::new(self.cluster, self.medium.len());
        places.report.total_clusters = self.size.div_ceil(self.cluster);
        let covers = self.entries * self.cluster;
        let mut seen = HashSet::new();
        for number in 0..self.size.div_ceil(covers) {
            let table = match self.second(number).await {
                Ok(Some(table)) => table,
                Ok(None) => continue,
                Err(error) => {
                    places.report.corruption(error.one_line());
                    continue;
                }
            };
            if !seen.insert(table) {
                let what = format!("two tables lie at {table}");
                places.report.corruption(what);
                continue;
            }
            for index in 0..self.entries {
                match self.cluster_in(table, index).await {
                    Ok(Cluster::At(place)) => places.add(number * self.entries + index, place),
                    Ok(Cluster::Unallocated | Cluster::Zero) => {}
                    Err(error) => places.report.corruption(error.one_line()),
                }
            }
        }
        places.report.image_end_offset = 0;
        Ok(places.report)
    }
}

impl Mapped for Qed {
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
        true
    }
}

impl Layout for Qed {
    fn format(&self) -> &'static str {
        "qed"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn medium(&self) -> &Rc<dyn Medium> {
        &self.medium
    }

    fn describe(&self) -> Description {
        let (file, format) = self.backing.clone().unzip();
        Description {
            cluster_size: Some(self.cluster),
            backing_file: file,
            backing_format: format.flatten(),
            ..Description::default()
        }
    }

    fn check(&self) -> BlockFuture<'_, Option<CheckReport>> {
        Box::pin(async move { Ok(Some(self.check_tables().await?)) })
    }
}
