//! Changing the size.

use block::{BlockError, IoBuf, Result, ZeroFlags};

use super::Vhdx;
use super::header::{BAT_REGION, MAX_SIZE, METADATA_REGION, MIB, Metadata, REGION_TABLES, State};
use super::header::{Region, encode_regions};
use super::journal::{Sector, patched};
use crate::mapped;

/// Bytes of a region table that a few regions fill.
const TABLE_BEGINNING: usize = 4096;

impl Vhdx {
    /// Changes the disk's size.
    pub(super) async fn resize_to(&self, size: u64) -> Result<()> {
        let old = self.metadata.borrow().clone();
        let mut new = old.clone();
        new.size = size;
        let sector = u64::from(old.logical_sector);
        if size > MAX_SIZE || !size.is_multiple_of(sector) {
            return Err(BlockError::invalid_argument(format!(
                "the size must be a multiple of {sector} and at most 64 TiB"
            )));
        }
        new.validate()
            .map_err(|e| BlockError::invalid_argument(e.message().to_owned()))?;
        self.mark_changed().await?;
        self.sync().await?;
        if size > old.size {
            self.grow(&old, new).await
        } else {
            self.shrink(&old, new).await
        }
    }

    async fn grow(&self, old: &Metadata, new: Metadata) -> Result<()> {
        let block = old.block_size;
        // What lay behind the end of the last block must not come back.
        let within = old.size % block;
        if within > 0
            && let State::Full(place) | State::Partial(place) = self.state(old.size / block)?
        {
            let flags = ZeroFlags::MAY_UNMAP;
            let medium = &self.medium;
            medium
                .write_zeroes(place + within, block - within, flags)
                .await?;
        }
        let (from, to) = (old.entries() as usize, new.entries() as usize);
        let mut sectors = self.make_room(from, to).await?;
        sectors.extend(self.size_sectors(new.size).await?);
        self.set_metadata(&sectors, new.clone()).await?;
        for n in old.size.div_ceil(block)..new.size.div_ceil(block) {
            if new.has_parent {
                // The parent may be larger; what is new reads as zeroes.
                self.set_state(n, State::Zero);
            } else if new.leave_allocated {
                let place = self.new_room(block).await?;
                self.set_state(n, State::Full(place));
            }
        }
        if new.has_parent && within > 0 {
            let rest = (old.size + block - within).min(new.size) - old.size;
            let flags = ZeroFlags::MAY_UNMAP;
            mapped::write_zeroes(self, old.size, rest, flags).await?;
        }
        self.sync().await
    }

    async fn shrink(&self, old: &Metadata, new: Metadata) -> Result<()> {
        let block = old.block_size;
        let sectors = self.size_sectors(new.size).await?;
        for n in new.size.div_ceil(block)..old.size.div_ceil(block) {
            self.set_state(n, State::NotPresent);
        }
        // The entries are forgotten while they can still be named.
        let entries = new.entries() as usize;
        self.set_metadata(&sectors, new).await?;
        self.sync().await?;
        self.table.resize(entries, 0);
        self.sync().await
    }

    /// Sectors with the size of the disk in them.
    async fn size_sectors(&self, size: u64) -> Result<Vec<Sector>> {
        let regions = self.regions.borrow().clone();
        let region = regions.iter().find(|r| r.id == METADATA_REGION);
        let region = region.map_or(0, |r| r.offset);
        let place = region + self.metadata.borrow().size_place;
        patched(&*self.medium, place, &size.to_le_bytes()).await
    }

    async fn set_metadata(&self, sectors: &[Sector], metadata: Metadata) -> Result<()> {
        let _turn = self.syncing.lock(0, 1).await;
        self.journal.commit(sectors).await?;
        *self.metadata.borrow_mut() = metadata;
        Ok(())
    }

    /// Makes the table longer; returns the sectors that say where it is, if it has to move.
    async fn make_room(&self, from: usize, to: usize) -> Result<Vec<Sector>> {
        let mut regions = self.regions.borrow().clone();
        let Some(bat) = regions.iter_mut().find(|r| r.id == BAT_REGION) else {
            return Ok(Vec::new());
        };
        let bytes = to as u64 * 8;
        if bytes <= u64::from(bat.length) {
            let added = (to - from) as u64 * 8;
            if added > 0 {
                let at = bat.offset + from as u64 * 8;
                let flags = ZeroFlags::empty();
                self.medium.write_zeroes(at, added, flags).await?;
                self.medium.flush().await?;
                self.table.resize(to, 0);
            }
            return Ok(Vec::new());
        }
        // Twice as large, so that it does not move each time.
        bat.length = ((bytes * 2).next_multiple_of(MIB)) as u32;
        bat.offset = self.new_room(u64::from(bat.length)).await?;
        let place = bat.offset;
        let entries = self.table.entries();
        let table: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        self.medium.write(place, IoBuf::from_slice(&table)).await?;
        self.medium.flush().await?;
        let sectors = region_sectors(&regions);
        self.table.resize(to, 0);
        self.table.moved(place);
        *self.regions.borrow_mut() = regions;
        Ok(sectors)
    }
}

/// Both copies of the region table. Nobody has so many regions that they do not fit in one sector;
/// if so, the sectors behind are written as well.
fn region_sectors(regions: &[Region]) -> Vec<Sector> {
    let bytes = encode_regions(regions);
    let used = (16 + 32 * regions.len()).next_multiple_of(TABLE_BEGINNING);
    let mut sectors = Vec::new();
    for place in REGION_TABLES {
        let part = bytes[..used.min(bytes.len())].chunks_exact(TABLE_BEGINNING);
        sectors.extend(
            part.enumerate()
                .map(|(n, s)| (place + (n * TABLE_BEGINNING) as u64, s.to_vec())),
        );
    }
    sectors
}
