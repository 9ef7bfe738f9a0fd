//! Bringing metadata to the medium in an order that survives a power cut at any write.
//!
//! The laws: (1) a refcount is on stable storage before anything refers to the cluster; (2) data is
//! there before an L2 table refers to it; (3) an L2 table is there before an L1 entry refers to it;
//! (4) a cluster is reused only after the medium has forgotten the last reference to it. So the worst
//! that a power cut leaves is a cluster with too high a refcount: a leak.

use std::collections::BTreeSet;
use std::rc::Rc;

use block::{BlockError, IoBuf, Result};

use super::Qcow2;
use super::cache::Piece;
use super::header::{Compatible, Incompatible, MAX_REFCOUNT_TABLE_BYTES};

/// A place on the medium, the piece that belongs there, and its bytes.
type Pending<T> = (u64, Rc<Piece<T>>, Vec<u8>);

/// Everything that was dirty when a write-out began, as it was then: what changes later may refer to
/// data that the write-out's barriers do not cover.
struct WriteOut {
    slices: Vec<Pending<Vec<u64>>>,
    blocks: Vec<Pending<Vec<u8>>>,
    table: BTreeSet<usize>,
    l1: BTreeSet<usize>,
    frees: Vec<u64>,
}

impl Qcow2 {
    /// Makes everything durable that was written before. The one place where metadata is written.
    pub(crate) async fn sync(&self) -> Result<()> {
        let _turn = self.syncing.lock(0, 1).await;
        self.sync_in_turn(!self.lazy_refcounts()).await
    }

    /// Writes refcounts as well, even if they are lazy.
    pub(crate) async fn sync_all(&self) -> Result<()> {
        let _turn = self.syncing.lock(0, 1).await;
        // Frees of the first round make refcounts dirty once more.
        self.sync_in_turn(true).await?;
        self.sync_in_turn(true).await
    }

    /// Makes room in the refcount cache. Refcounts may always be written: they are only too high.
    pub(crate) async fn sync_refcounts(&self) -> Result<()> {
        let _turn = self.syncing_refcounts.lock(0, 1).await;
        let dirty = self.refcounts.blocks.dirty();
        for (number, piece) in dirty {
            let place = self.refcounts.table.borrow()[number as usize];
            let bytes = piece.get(Clone::clone);
            piece.begin_write();
            let result = self.medium.write(place, IoBuf::from_slice(&bytes)).await;
            piece.end_write(result.is_ok());
            result?;
        }
        Ok(())
    }

    pub(crate) fn lazy_refcounts(&self) -> bool {
        self.header
            .borrow()
            .compatible
            .contains(Compatible::LAZY_REFCOUNTS)
    }

    async fn sync_in_turn(&self, with_refcounts: bool) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let has_metadata = self.l2.has_dirty()
            || !self.l1_dirty.borrow().is_empty()
            || !self.to_free.borrow().is_empty()
            || !self.refcounts.table_dirty.borrow().is_empty()
            || (with_refcounts && self.refcounts.blocks.has_dirty());
        if !has_metadata {
            return self.barrier().await;
        }
        if !with_refcounts {
            self.mark_dirty().await?;
        }
        self.grow_refcount_table().await?;
        let work = {
            // Nobody else writes refcount blocks meanwhile: an older one must not overtake.
            let _refcounts = self.syncing_refcounts.lock(0, 1).await;
            let work = self.begin_write_out(with_refcounts);
            self.end_write_out(work).await?
        };
        self.free_forgotten(&work.frees).await
    }

    async fn end_write_out(&self, work: WriteOut) -> Result<WriteOut> {
        let result = self.write_out(&work).await;
        for (_, piece, _) in &work.slices {
            piece.end_write(result.is_ok());
        }
        for (_, piece, _) in &work.blocks {
            piece.end_write(result.is_ok());
        }
        if result.is_err() {
            self.refcounts.table_dirty.borrow_mut().extend(&work.table);
            self.l1_dirty.borrow_mut().extend(&work.l1);
            self.to_free.borrow_mut().extend(&work.frees);
        }
        result.map(|()| work)
    }

    fn begin_write_out(&self, with_refcounts: bool) -> WriteOut {
        let slices = self.l2.dirty().into_iter().map(|(offset, piece)| {
            piece.begin_write();
            let bytes = piece.get(|words| words.iter().flat_map(|w| w.to_be_bytes()).collect());
            (offset, piece, bytes)
        });
        let slices = slices.collect();
        let dirty = if with_refcounts {
            self.refcounts.blocks.dirty()
        } else {
            Vec::new()
        };
        let blocks = dirty.into_iter().map(|(number, piece)| {
            piece.begin_write();
            let place = self.refcounts.table.borrow()[number as usize];
            let bytes = piece.get(Clone::clone);
            (place, piece, bytes)
        });
        WriteOut {
            slices,
            blocks: blocks.collect(),
            table: std::mem::take(&mut *self.refcounts.table_dirty.borrow_mut()),
            l1: std::mem::take(&mut *self.l1_dirty.borrow_mut()),
            frees: std::mem::take(&mut *self.to_free.borrow_mut()),
        }
    }

    async fn write_out(&self, work: &WriteOut) -> Result<()> {
        for (place, _, bytes) in &work.blocks {
            self.medium.write(*place, IoBuf::from_slice(bytes)).await?;
        }
        if !work.table.is_empty() {
            self.medium.flush().await?;
            let place = self.header.borrow().refcount_table_offset;
            let table = self.refcounts.table.borrow().clone();
            self.write_table_sectors(place, &table, &work.table).await?;
        }
        self.barrier().await?;
        if !work.slices.is_empty() {
            for (place, _, bytes) in &work.slices {
                self.medium.write(*place, IoBuf::from_slice(bytes)).await?;
            }
            self.medium.flush().await?;
        }
        if !work.l1.is_empty() {
            let place = self.header.borrow().l1_offset;
            let table = self.l1.borrow().clone();
            self.write_table_sectors(place, &table, &work.l1).await?;
            self.medium.flush().await?;
        }
        Ok(())
    }

    /// Flushes the guest's data, and with it everything else in the same file.
    async fn barrier(&self) -> Result<()> {
        if self.external_data {
            self.data.flush().await?;
        }
        self.medium.flush().await
    }

    /// Writes the 512-byte sectors of a table that hold the entries `dirty`.
    async fn write_table_sectors(
        &self,
        place: u64,
        table: &[u64],
        dirty: &BTreeSet<usize>,
    ) -> Result<()> {
        let sectors: BTreeSet<usize> = dirty.iter().map(|index| index / 64).collect();
        for sector in sectors {
            let start = sector * 64;
            let end = (start + 64).min(table.len());
            let bytes: Vec<u8> = table[start..end]
                .iter()
                .flat_map(|e| e.to_be_bytes())
                .collect();
            self.medium
                .write(place + start as u64 * 8, IoBuf::from_slice(&bytes))
                .await?;
        }
        Ok(())
    }

    /// Moves the refcount table to a larger place if it has outgrown its own.
    async fn grow_refcount_table(&self) -> Result<()> {
        let room = self.refcounts.table_room.get();
        if self.refcounts.table.borrow().len() <= room {
            return Ok(());
        }
        let size = self.geometry.cluster_size();
        let (place, bytes) = loop {
            let wanted = self.refcounts.table.borrow().len() as u64 * 8;
            let bytes = (wanted + wanted / 2).next_multiple_of(size);
            if bytes > MAX_REFCOUNT_TABLE_BYTES {
                let message = "the image cannot grow any further";
                return Err(BlockError::new(block::ErrorKind::NoSpace, message));
            }
            let place = self.allocate_table(bytes).await?;
            // The allocation itself may have made it longer.
            if self.refcounts.table.borrow().len() as u64 * 8 <= bytes {
                break (place, bytes);
            }
            self.free_now(place, bytes / size).await?;
        };
        // The blocks must be there before the table is, and the table before the header says so.
        self.sync_refcounts().await?;
        self.medium.flush().await?;
        let table = self.refcounts.table.borrow().clone();
        let encoded: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.medium
            .write(place, IoBuf::from_slice(&encoded))
            .await?;
        self.medium.flush().await?;
        let (old_place, old_clusters) = {
            let mut header = self.header.borrow_mut();
            let old = (header.refcount_table_offset, header.refcount_table_clusters);
            header.refcount_table_offset = place;
            header.refcount_table_clusters = u32::try_from(bytes / size).unwrap_or(u32::MAX);
            old
        };
        self.refcounts.table_room.set((bytes / 8) as usize);
        self.write_header_fields().await?;
        self.free_later(old_place, u64::from(old_clusters) * size);
        Ok(())
    }

    /// Writes the header's fields, which all lie in the first sector, and makes them durable.
    pub(crate) async fn write_header_fields(&self) -> Result<()> {
        let bytes = self.header.borrow().encode()?;
        let length = if self.header.borrow().version >= 3 {
            112
        } else {
            72
        };
        self.medium
            .write(0, IoBuf::from_slice(&bytes[..length]))
            .await?;
        self.medium.flush().await
    }

    /// Writes the header with its extensions and names.
    pub(crate) async fn write_header(&self) -> Result<()> {
        let mut bytes = self.header.borrow().encode()?;
        bytes.resize(self.geometry.cluster_size() as usize, 0);
        self.medium.write(0, IoBuf::from_slice(&bytes)).await?;
        self.medium.flush().await
    }

    /// With lazy refcounts: says in the header that refcounts may be wrong from now on.
    async fn mark_dirty(&self) -> Result<()> {
        if self
            .header
            .borrow()
            .incompatible
            .contains(Incompatible::DIRTY)
        {
            return Ok(());
        }
        self.header.borrow_mut().incompatible |= Incompatible::DIRTY;
        self.write_header_fields().await
    }

    /// Says in the header that the image is corrupt, so that nobody writes to it any more. Returns
    /// the error to report.
    pub(crate) async fn corrupt(&self, message: String) -> BlockError {
        let known = self
            .header
            .borrow()
            .incompatible
            .contains(Incompatible::CORRUPT);
        if self.writable && !known && self.geometry.zero_flag {
            self.header.borrow_mut().incompatible |= Incompatible::CORRUPT;
            // The corruption is the error to report, whether or not it can be noted.
            let _ = self.write_header_fields().await;
        }
        BlockError::invalid_image(format!("'{}' is corrupt: {message}", self.medium.name()))
    }
}
