//! Changing the disk's size.

use block::{BlockError, IoBuf, Result, ZeroFlags};

use super::Qcow2;
use super::header::MAX_L1_BYTES;

impl Qcow2 {
    pub(crate) async fn resize_guest(&self, size: u64) -> Result<()> {
        let _held = self.ranges.lock(0, u64::MAX).await;
        if size > i64::MAX.cast_unsigned() - self.geometry.cluster_size() {
            let message = format!("a disk of {size} bytes is too large");
            return Err(BlockError::invalid_argument(message));
        }
        let has_snapshots = !self.snapshots.borrow().is_empty();
        if has_snapshots && self.header.borrow().version < 3 {
            let message = "a version 2 image with snapshots cannot change its size";
            return Err(BlockError::unsupported(message));
        }
        self.resize_bitmaps(size).await?;
        let old = self.size.get();
        if size < old {
            self.drop_end(size, old).await?;
        } else {
            self.grow_l1(size).await?;
        }
        self.sync().await?;
        self.header.borrow_mut().size = size;
        self.write_header_fields().await?;
        self.size.set(size);
        if size > old {
            self.hide_backing(old, size).await?;
        }
        if self.is_raw_data_file() || (self.external_data && size < old) {
            self.data.set_len(size).await?;
        }
        Ok(())
    }

    /// Gives back what lies behind the new end, and zeroes the rest of its cluster.
    async fn drop_end(&self, size: u64, old: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let first_gone = size.next_multiple_of(cluster);
        let tail_end = first_gone.min(old);
        if tail_end > size {
            let zeroes = IoBuf::zeroed((tail_end - size) as usize);
            if !self.reads_as_zero(size, tail_end - size).await? {
                self.write_held(size, &zeroes).await?;
            }
        }
        let mut at = first_gone;
        while at < old {
            let table = self.l2_table(at).await?;
            if table == 0 {
                let span = 1u64 << (self.geometry.cluster_bits + self.geometry.l2_bits);
                at = (at / span + 1) * span;
                continue;
            }
            let mapping = self.mapping(at).await?;
            let plain = super::layout::Mapping::Plain { zero: 0 };
            if mapping != plain {
                self.own_l2_table(at).await?;
                self.set_mapping(at, plain).await?;
                self.forget(mapping);
            }
            at += cluster;
        }
        Ok(())
    }

    /// Forgets all of the layer's own content, so that the backing file shows everywhere.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub async fn make_empty(&self) -> Result<()> {
        let _held = self.ranges.lock(0, u64::MAX).await;
        self.drop_end(0, self.size.get()).await?;
        self.sync_all().await
    }

    async fn reads_as_zero(&self, offset: u64, length: u64) -> Result<bool> {
        let buffer = IoBuf::zeroed(length as usize);
        self.read_mapped(offset, buffer.clone()).await?;
        Ok(buffer.is_zero())
    }

    /// Makes the L1 table long enough for `size`.
    async fn grow_l1(&self, size: u64) -> Result<()> {
        let needed = self.header.borrow().l1_entries_for(size);
        let (old_place, old_entries) = {
            let header = self.header.borrow();
            (header.l1_offset, u64::from(header.l1_size))
        };
        if needed <= old_entries {
            return Ok(());
        }
        if needed * 8 > MAX_L1_BYTES {
            let message = format!("a disk of {size} bytes needs larger clusters");
            return Err(BlockError::invalid_argument(message));
        }
        self.sync().await?;
        let place = self.allocate_table(needed * 8).await?;
        let mut table = self.l1.borrow().clone();
        table.resize(needed as usize, 0);
        self.replace_l1(place, table).await?;
        if old_place != 0 {
            self.free_later(old_place, old_entries * 8);
        }
        Ok(())
    }

    /// Writes a new active L1 table and makes the header point to it. Everything that it refers to
    /// must be durable.
    pub(crate) async fn replace_l1(&self, place: u64, table: Vec<u64>) -> Result<()> {
        // The new table's clusters must be counted before the header refers to them.
        self.sync_refcounts().await?;
        self.sync().await?;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.medium.write(place, IoBuf::from_slice(&bytes)).await?;
        self.medium.flush().await?;
        {
            let mut header = self.header.borrow_mut();
            header.l1_offset = place;
            header.l1_size = u32::try_from(table.len()).unwrap_or(u32::MAX);
        }
        *self.l1.borrow_mut() = table;
        self.write_header_fields().await
    }

    /// Keeps a backing file that is longer than the disk was from showing in the new part.
    async fn hide_backing(&self, old: u64, size: u64) -> Result<()> {
        let backing = self.backing.borrow().clone();
        let end = backing.map_or(0, |b| b.limits().size).min(size);
        if end > old {
            let mut at = old;
            while at < end {
                let stop =
                    (self.geometry.cluster_start(at) + self.geometry.cluster_size()).min(end);
                self.zero_in_cluster(at, stop, ZeroFlags::MAY_UNMAP).await?;
                at = stop;
            }
        }
        Ok(())
    }
}
