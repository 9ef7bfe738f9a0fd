//! Sparse extents: grains at places that tables name, tables at places that a directory names.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block::executor::offload;
use block::sync::RangeLocks;
use block::{BlockError, ErrorKind, IoBuf, Medium, Result};

use super::header::{Family, SECTOR, SparseHeader};
use super::read_at;
use crate::fields::{Fields, put};
use crate::mapped::{Changes, Order, Place, Run, Table};

/// Grain tables in memory, at most, unless more of them wait to be written.
const MAX_TABLES: usize = 8192;
/// What stands before the data of a compressed grain: sector of the disk, length.
const GRAIN_MARKER: usize = 12;

/// Where a grain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grain {
    Unallocated,
    Zero,
    At(u64),
}

/// An open sparse extent.
pub(super) struct Sparse {
    pub(super) medium: Rc<dyn Medium>,
    pub(super) header: SparseHeader,
    directory: Table,
    redundant: Option<Table>,
    tables: RefCell<BTreeMap<usize, Rc<Table>>>,
    /// Where the next grain goes.
    end: Cell<u64>,
    allocating: RangeLocks,
    /// The grain that was inflated last, by its place.
    inflated: RefCell<Option<(u64, Rc<Vec<u8>>)>>,
}

impl Sparse {
    pub(super) async fn open(medium: Rc<dyn Medium>, header: SparseHeader) -> Result<Self> {
        let entries = header.directory_entries();
        let width = header.width();
        let read = async |place: u64| {
            // What the file does not hold is not believed, so a short file costs little memory.
            let end = place.saturating_add(entries * width as u64);
            if end > medium.len() {
                let message = "the grain directory reaches past the end of the file";
                return Err(BlockError::invalid_image(message));
            }
            Table::read(&*medium, place, entries as usize, width, Order::Little).await
        };
        let directory = read(header.directory).await?;
        let redundant = match header.redundant {
            Some(place) => Some(read(place).await?),
            None => None,
        };
        let end = medium.len().max(header.data);
        Ok(Self {
            end: Cell::new(end.next_multiple_of(SECTOR)),
            directory,
            redundant,
            tables: RefCell::default(),
            allocating: RangeLocks::default(),
            inflated: RefCell::default(),
            header,
            medium,
        })
    }

    fn bad(&self, what: &str) -> BlockError {
        BlockError::invalid_image(format!("'{}': {what}", self.medium.name()))
    }

    /// The place of a table that a directory's entry gives.
    fn table_place(&self, entry: u64) -> Result<Option<u64>> {
        if entry == 0 {
            return Ok(None);
        }
        if self.header.family != Family::SeSparse {
            return Ok(Some(entry * SECTOR));
        }
        if entry >> 32 != 0x1000_0000 {
            return Err(self.bad("an entry of the grain directory is of an unknown kind"));
        }
        let size = self.header.table_entries * 8;
        Ok(Some(self.header.tables + (entry & 0xffff_ffff) * size))
    }

    /// The table with this number; `None` if it is not there.
    async fn table(&self, number: usize) -> Result<Option<Rc<Table>>> {
        if let Some(table) = self.tables.borrow().get(&number) {
            return Ok(Some(table.clone()));
        }
        let entry = self.directory.get(number).unwrap_or(0);
        let Some(place) = self.table_place(entry)? else {
            return Ok(None);
        };
        let (entries, width) = (self.header.table_entries as usize, self.header.width());
        let table = Table::read(&*self.medium, place, entries, width, Order::Little).await?;
        let mut tables = self.tables.borrow_mut();
        if tables.len() >= MAX_TABLES {
            tables.retain(|_, table| table.is_dirty());
        }
        // Another task may have read and changed it meanwhile.
        let table = tables.entry(number).or_insert_with(|| Rc::new(table));
        Ok(Some(table.clone()))
    }

    fn index(&self, offset: u64) -> (usize, usize) {
        let grain = offset / self.header.grain;
        let entries = self.header.table_entries;
        ((grain / entries) as usize, (grain % entries) as usize)
    }

    /// What a table's entry means.
    fn grain_of(&self, entry: u64) -> Result<Grain> {
        if self.header.family != Family::SeSparse {
            return Ok(match entry {
                0 => Grain::Unallocated,
                1 if self.header.zeroed => Grain::Zero,
                sector => Grain::At(sector * SECTOR),
            });
        }
        Ok(match entry >> 60 {
            0 => Grain::Unallocated,
            1 | 2 => Grain::Zero,
            3 => {
                // The number's lowest 12 bits stand above the others.
                let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                let place = number.checked_mul(self.header.grain);
                let place = place.and_then(|p| p.checked_add(self.header.grains));
                Grain::At(
                    place
                        .filter(|p| *p < 1 << 62)
                        .ok_or_else(|| self.bad("a grain lies at an impossible place"))?,
                )
            }
            _ => return Err(self.bad("an entry of a grain table is of an unknown kind")),
        })
    }

    /// Where the grain at `offset` of the extent is.
    pub(super) async fn grain(&self, offset: u64) -> Result<Grain> {
        let (table, index) = self.index(offset);
        match self.table(table).await? {
            Some(table) => self.grain_of(table.get(index).unwrap_or(0)),
            None => Ok(Grain::Unallocated),
        }
    }

    /// What is at `offset`, looking no further than `length`.
    pub(super) async fn find(&self, offset: u64, length: u64) -> Result<Run> {
        let size = self.header.grain;
        let within = offset % size;
        let first = self.grain(offset).await?;
        if self.header.compressed && matches!(first, Grain::At(_)) {
            return Ok(Run {
                place: Place::Compressed,
                length: length.min(size - within),
            });
        }
        // Grains that follow one another, here and in the file, are told together.
        let start = offset - within;
        let known = self.same_from(start, first, within + length).await? - within;
        let place = match first {
            Grain::Unallocated => Place::Unallocated,
            Grain::Zero => Place::Zero,
            Grain::At(place) => Place::Host {
                medium: self.medium.clone(),
                offset: place + within,
                holes: false,
            },
        };
        Ok(Run {
            place,
            length: known.min(length),
        })
    }

    /// How far from `start`, where a grain begins, the grains are what `first` is, looking no further than `length`. The
    /// answer is whole grains.
    async fn same_from(&self, start: u64, first: Grain, length: u64) -> Result<u64> {
        let size = self.header.grain;
        let mut known = size;
        while known < length {
            let (number, index) = self.index(start + known);
            let rest = self.header.table_entries - index as u64;
            let Some(table) = self.table(number).await? else {
                // No table: all its grains are unallocated, however many there are.
                if first != Grain::Unallocated {
                    break;
                }
                known = known.saturating_add(rest.saturating_mul(size));
                continue;
            };
            for index in index..index + rest as usize {
                if known >= length {
                    return Ok(known);
                }
                let next = self.grain_of(table.get(index).unwrap_or(0))?;
                let goes_on = match (first, next) {
                    (Grain::At(a), Grain::At(b)) => a + known == b,
                    (a, b) => a == b,
                };
                if !goes_on {
                    return Ok(known);
                }
                known += size;
            }
        }
        Ok(known)
    }

    /// Reads a part of one compressed grain.
    pub(super) async fn read_compressed(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let Grain::At(place) = self.grain(offset).await? else {
            return Err(self.bad("a compressed grain has gone"));
        };
        let known = self.inflated.borrow().clone();
        let bytes = match known.filter(|(at, _)| *at == place) {
            Some((_, bytes)) => bytes,
            None => {
                let bytes = Rc::new(self.inflate(place, offset).await?);
                *self.inflated.borrow_mut() = Some((place, bytes.clone()));
                bytes
            }
        };
        let within = (offset % self.header.grain) as usize;
        let part = bytes.get(within..within + buf.len());
        buf.copy_from(part.ok_or_else(|| self.bad("a compressed grain is too short"))?);
        Ok(())
    }

    async fn inflate(&self, place: u64, offset: u64) -> Result<Vec<u8>> {
        let size = self.header.grain as usize;
        // A compressed grain is never much longer than the grain.
        let limit = 2 * size + 4096;
        let (start, length) = if self.header.markers {
            let marker = read_at(&*self.medium, place, GRAIN_MARKER).await?;
            let f = Fields(&marker);
            let sector = offset / self.header.grain * (self.header.grain / SECTOR);
            if f.le64(0) != sector {
                return Err(self.bad("a compressed grain belongs to another place"));
            }
            (place + GRAIN_MARKER as u64, f.le32(8) as usize)
        } else {
            (place, limit)
        };
        if length == 0 || length > limit {
            return Err(self.bad("a compressed grain has an impossible length"));
        }
        let data = read_at(&*self.medium, start, length).await?;
        let inflated = offload(move || inflate(&data, size)).await;
        inflated.ok_or_else(|| self.bad("a compressed grain is damaged"))
    }

    /// Room for a grain at the end of the file.
    pub(super) async fn allocate(&self) -> Result<u64> {
        let size = self.header.grain;
        let place = self.end.get().next_multiple_of(size.min(1 << 20));
        self.check_place(place)?;
        self.end.set(place + size);
        // Others may have made it longer meanwhile.
        if self.medium.len() < place + size {
            self.medium.set_len(place + size).await?;
        }
        Ok(place)
    }

    fn check_place(&self, place: u64) -> Result<()> {
        if place / SECTOR + 2 * self.header.grain / SECTOR > u64::from(u32::MAX) {
            let message = "the extent cannot grow any further";
            return Err(BlockError::new(ErrorKind::NoSpace, message));
        }
        Ok(())
    }

    /// Makes the table refer to a grain.
    pub(super) async fn install(&self, offset: u64, grain: Grain) -> Result<()> {
        let (number, index) = self.index(offset);
        let entry = match grain {
            Grain::Unallocated => 0,
            Grain::Zero => 1,
            Grain::At(place) => place / SECTOR,
        };
        if self.table(number).await?.is_none() {
            self.make_table(number).await?;
        }
        let Some(table) = self.table(number).await? else {
            return Err(self.bad("a grain table has gone"));
        };
        table.set(index, entry);
        Ok(())
    }

    /// Makes a table of unallocated grains. It is on stable storage before the directory names it.
    async fn make_table(&self, number: usize) -> Result<()> {
        let _alone = self.allocating.lock(number as u64, 1).await;
        if self.directory.get(number) != Some(0) {
            return Ok(());
        }
        let size = (self.header.table_entries * 4).next_multiple_of(SECTOR);
        let mut places = Vec::new();
        for directory in self.directories() {
            let place = self.end.get();
            self.check_place(place)?;
            self.end.set(place + size);
            let zeroes = IoBuf::zeroed(size as usize);
            self.medium.write(place, zeroes).await?;
            places.push((directory, place));
        }
        self.medium.flush().await?;
        for (directory, place) in places {
            directory.set(number, place / SECTOR);
        }
        Ok(())
    }

    /// The copy first: readers look at the other.
    fn directories(&self) -> impl Iterator<Item = &Table> {
        self.redundant.iter().chain([&self.directory])
    }

    /// Appends a grain that the caller has compressed.
    pub(super) async fn append(&self, offset: u64, data: &[u8]) -> Result<()> {
        let length = (GRAIN_MARKER + data.len()).next_multiple_of(SECTOR as usize);
        let mut bytes = vec![0; length];
        put(&mut bytes, 0, &(offset / SECTOR).to_le_bytes());
        put(&mut bytes, 8, &(data.len() as u32).to_le_bytes());
        put(&mut bytes, GRAIN_MARKER, data);
        let place = self.end.get();
        self.check_place(place)?;
        self.end.set(place + length as u64);
        self.medium.write(place, IoBuf::from_slice(&bytes)).await?;
        self.install(offset, Grain::At(place)).await
    }

    /// The changes to write: of the directories, and of the tables by their numbers.
    pub(super) fn begin(&self) -> Pending {
        let tables = self.tables.borrow();
        let dirty = tables.iter().filter(|(_, table)| table.is_dirty());
        Pending {
            tables: dirty
                .map(|(number, table)| (*number, table.clone(), table.begin()))
                .collect(),
            directories: self.directories().map(Table::begin).collect(),
        }
    }

    /// Writes changes; what they refer to is on stable storage.
    pub(super) async fn write(&self, pending: &Pending) -> Result<()> {
        for (number, table, changes) in &pending.tables {
            if let Some(copy) = self.copy_of(*number)? {
                for (place, bytes) in table.sectors(changes, SECTOR as usize) {
                    let within = place - table.place();
                    let length = (self.header.table_entries * 4 - within).min(SECTOR) as usize;
                    let buffer = IoBuf::from_slice(&bytes[..length]);
                    self.medium.write(copy + within, buffer).await?;
                }
            }
            table.write(&*self.medium, changes).await?;
        }
        for (directory, changes) in self.directories().zip(&pending.directories) {
            directory.write(&*self.medium, changes).await?;
        }
        Ok(())
    }

    /// Where the copy of a table lies.
    fn copy_of(&self, number: usize) -> Result<Option<u64>> {
        match &self.redundant {
            Some(directory) => self.table_place(directory.get(number).unwrap_or(0)),
            None => Ok(None),
        }
    }

    /// Visits the tables with their numbers, each place once; tells of places that come twice.
    pub(super) async fn each_grain(
        &self,
        mut visit: impl FnMut(u64, Result<Grain>),
        mut twice: impl FnMut(usize, u64),
    ) -> Result<()> {
        let mut seen = std::collections::HashSet::new();
        for number in 0..self.directory.len() {
            let entry = self.directory.get(number).unwrap_or(0);
            let Some(place) = self.table_place(entry)? else {
                continue;
            };
            if !seen.insert(place) {
                twice(number, place);
                continue;
            }
            let size = self.header.table_entries * self.header.width() as u64;
            if place.saturating_add(size) > self.medium.len() {
                twice(number, place);
                continue;
            }
            let Some(table) = self.table(number).await? else {
                continue;
            };
            let first = number as u64 * self.header.table_entries;
            for (n, entry) in table.entries().into_iter().enumerate() {
                visit(first + n as u64, self.grain_of(entry));
            }
        }
        Ok(())
    }

    /// Tables whose copy differs, by number.
    pub(super) async fn differing_copies(&self) -> Result<Vec<usize>> {
        let mut found = Vec::new();
        let size = (self.header.table_entries * 4) as usize;
        let Some(redundant) = &self.redundant else {
            return Ok(found);
        };
        let mut seen = std::collections::HashSet::new();
        for number in 0..self.directory.len() {
            let main = self.table_place(self.directory.get(number).unwrap_or(0))?;
            let copy = self.table_place(redundant.get(number).unwrap_or(0))?;
            // A damaged directory may name one table very often.
            if !seen.insert((main, copy)) {
                continue;
            }
            let differ = match (main, copy) {
                (None, None) => false,
                (Some(a), Some(b)) => {
                    read_at(&*self.medium, a, size).await?
                        != read_at(&*self.medium, b, size).await?
                }
                _ => true,
            };
            if differ {
                found.push(number);
            }
        }
        Ok(found)
    }

    /// Writes the copy of a table anew; `false` if it has no place.
    pub(super) async fn repair_copy(&self, number: usize) -> Result<bool> {
        let main = self.table_place(self.directory.get(number).unwrap_or(0))?;
        let (Some(main), Some(copy)) = (main, self.copy_of(number)?) else {
            return Ok(false);
        };
        let size = (self.header.table_entries * 4) as usize;
        let bytes = read_at(&*self.medium, main, size).await?;
        self.medium.write(copy, IoBuf::from_slice(&bytes)).await?;
        Ok(true)
    }
}

/// Changes that wait to be written.
pub(super) struct Pending {
    tables: Vec<(usize, Rc<Table>, Changes)>,
    directories: Vec<Changes>,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.directories.iter().all(Changes::is_empty)
    }
}

/// Inflates a grain; what is behind its end does not count.
fn inflate(data: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; size];
    let mut inflater = flate2::Decompress::new(true);
    let finish = flate2::FlushDecompress::Finish;
    inflater.decompress(data, &mut out, finish).ok()?;
    // The last grain of a disk may be shorter; the rest is not looked at.
    (inflater.total_out() > 0).then_some(out)
}
