//! The guest's requests: reading, writing, zeroing, discarding.
//!
//! Each request holds the clusters it touches: shared if it leaves the mapping alone, exclusively if
//! it changes it. So a cluster cannot be freed and reused under a transfer.

use std::rc::Rc;

use block::{
    Extent, ExtentKind, ExtentQuery, HostRange, IoBuf, Result, Scope, ZeroFlags, push_merged,
};

use super::allocator::{Allocation, Run};
use super::layout::{Mapping, Part};
use super::{Qcow2, compress};

/// Writes are cut into pieces of at most this size for locking and allocation.
const PIECE: u64 = 8 << 20;

impl Qcow2 {
    /// The whole clusters around a range.
    fn around(&self, offset: u64, length: u64) -> (u64, u64) {
        let start = self.geometry.cluster_start(offset);
        (
            start,
            (offset + length).next_multiple_of(self.geometry.cluster_size()) - start,
        )
    }

    pub(crate) async fn read_guest(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let (start, length) = self.around(offset, buf.len() as u64);
        let _held = self.ranges.share(start, length).await;
        self.read_mapped(offset, buf).await
    }

    /// Reads what the tables say, without locks.
    pub(crate) async fn read_mapped(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let stretch = self.stretch(at, (buf.len() - done) as u64).await?;
            let length = stretch.length as usize;
            let piece = buf.slice(done, length);
            match stretch.part {
                Part::Data(place) => self.data.read(place, piece).await?,
                Part::Zero(_) => piece.fill_at(0, length, 0),
                Part::Unallocated => self.read_backing(at, &piece).await?,
                Part::Compressed => self.read_compressed(at, &piece).await?,
            }
            done += length;
        }
        Ok(())
    }

    /// Reads from the backing file; zeroes past its end, or if there is none.
    async fn read_backing(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let backing = self.backing.borrow().clone();
        let size = backing.as_ref().map_or(0, |b| b.limits().size);
        let inside = size.saturating_sub(offset).min(buf.len() as u64) as usize;
        if let Some(backing) = backing.filter(|_| inside > 0) {
            backing.read(offset, buf.slice(0, inside)).await?;
        }
        buf.fill_at(inside, buf.len() - inside, 0);
        Ok(())
    }

    /// Reads a part of a compressed cluster.
    async fn read_compressed(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let Mapping::Compressed {
            offset: place,
            length,
        } = self.mapping(offset).await?
        else {
            return Err(self
                .corrupt("a compressed cluster vanished".to_owned())
                .await);
        };
        let cluster = self.decompressed_cluster(place, length).await?;
        let within = self.geometry.in_cluster(offset) as usize;
        buf.copy_from(&cluster[within..within + buf.len()]);
        Ok(())
    }

    async fn decompressed_cluster(&self, place: u64, length: u64) -> Result<Rc<Vec<u8>>> {
        if let Some((known, cluster)) = &*self.decompressed.borrow()
            && *known == place
        {
            return Ok(cluster.clone());
        }
        if self.external_data {
            return Err(self
                .corrupt("compressed data with a data file".to_owned())
                .await);
        }
        let buffer = IoBuf::zeroed(length as usize);
        self.medium.read(place, buffer.clone()).await?;
        let kind = self.header.borrow().compression;
        let size = self.geometry.cluster_size() as usize;
        let Some(bytes) = compress::decompress(kind, &buffer.to_vec(), size) else {
            let message = format!("the compressed data at {place:#x} cannot be decompressed");
            return Err(block::BlockError::invalid_image(message).context(self.medium.name()));
        };
        let cluster = Rc::new(bytes);
        *self.decompressed.borrow_mut() = Some((place, cluster.clone()));
        Ok(cluster)
    }

    pub(crate) async fn write_guest(&self, offset: u64, buf: IoBuf) -> Result<()> {
        self.record(offset, buf.len() as u64);
        let mut done = 0;
        while done < buf.len() as u64 {
            let at = offset + done;
            let length = (PIECE - at % PIECE).min(buf.len() as u64 - done);
            let piece = buf.slice(done as usize, length as usize);
            if !self.write_in_place(at, &piece).await? {
                self.write_allocating(at, &piece).await?;
            }
            done += length;
        }
        Ok(())
    }

    /// Writes if all of it is allocated already and nobody else's. Returns false if it is not.
    async fn write_in_place(&self, offset: u64, buf: &IoBuf) -> Result<bool> {
        let (start, length) = self.around(offset, buf.len() as u64);
        let _held = self.ranges.share(start, length).await;
        let mut runs = smallvec::SmallVec::<[(u64, usize); 4]>::new();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let stretch = self.stretch(at, (buf.len() - done) as u64).await?;
            let Part::Data(place) = stretch.part else {
                return Ok(false);
            };
            if !stretch.copied {
                return Ok(false);
            }
            runs.push((place, stretch.length as usize));
            done += stretch.length as usize;
        }
        let mut done = 0;
        for (place, length) in runs {
            self.check_overlap(place, length as u64).await?;
            self.data.write(place, buf.slice(done, length)).await?;
            done += length;
        }
        Ok(true)
    }

    /// Guest data must never be written over metadata, whatever a corrupt table says.
    async fn check_overlap(&self, place: u64, length: u64) -> Result<()> {
        if self.external_data {
            return Ok(());
        }
        let end = place + length;
        let overlap = {
            let header = self.header.borrow();
            let table = u64::from(header.refcount_table_clusters) << self.geometry.cluster_bits;
            let known = [
                ("the header", 0, self.geometry.cluster_size()),
                (
                    "the L1 table",
                    header.l1_offset,
                    u64::from(header.l1_size) * 8,
                ),
                ("the refcount table", header.refcount_table_offset, table),
            ];
            known
                .iter()
                .find(|(_, s, l)| place < s + l && *s < end)
                .map(|(what, ..)| *what)
        };
        match overlap {
            Some(what) => {
                let message = format!("a data cluster at {place:#x} overlaps {what}");
                Err(self.corrupt(message).await)
            }
            None => Ok(()),
        }
    }

    async fn write_allocating(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let (start, length) = self.around(offset, buf.len() as u64);
        let _held = self.ranges.lock(start, length).await;
        self.write_held(offset, buf).await
    }

    /// Writes with allocation; the clusters are held exclusively.
    pub(crate) async fn write_held(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            self.own_l2_table(at).await?;
            let left = buf.slice(done, buf.len() - done);
            let mapping = self.mapping(at).await?;
            done += if matches!(mapping, Mapping::Host { copied: true, .. }) {
                self.write_into_cluster(at, &left, mapping).await?
            } else {
                self.write_new_clusters(at, &left, mapping).await?
            };
        }
        Ok(())
    }

    /// Writes into the host cluster that `offset` has already. Returns how much was written.
    async fn write_into_cluster(&self, offset: u64, buf: &IoBuf, old: Mapping) -> Result<usize> {
        let Mapping::Host {
            offset: host,
            copied,
            data,
            zero,
        } = old
        else {
            return Ok(0);
        };
        let geometry = &self.geometry;
        let from = geometry.in_cluster(offset);
        let to = (from + buf.len() as u64).min(geometry.cluster_size());
        let size = geometry.subcluster_size();
        let is_data = |at: u64| data >> (at / size) & 1 == 1;
        let low = if is_data(from) {
            from
        } else {
            from - from % size
        };
        let high = if is_data(to - 1) {
            to
        } else {
            to.next_multiple_of(size)
        };
        let length = (to - from) as usize;
        let padded = self
            .padded(offset, &buf.slice(0, length), from - low, high - to)
            .await?;
        self.check_overlap(host + low, high - low).await?;
        self.data.write(host + low, padded).await?;
        let parts = geometry.parts(low, high);
        if data & parts != parts {
            let new = Mapping::Host {
                offset: host,
                copied,
                data: data | parts,
                zero: zero & !parts,
            };
            self.set_mapping(offset, new).await?;
        }
        Ok(length)
    }

    /// `buf` with what the guest sees before and after it.
    async fn padded(&self, offset: u64, buf: &IoBuf, before: u64, after: u64) -> Result<IoBuf> {
        if before == 0 && after == 0 {
            return Ok(buf.clone());
        }
        let head = IoBuf::zeroed(before as usize);
        let tail = IoBuf::zeroed(after as usize);
        if before > 0 {
            self.read_mapped(offset - before, head.clone()).await?;
        }
        if after > 0 {
            self.read_mapped(offset + buf.len() as u64, tail.clone())
                .await?;
        }
        let parts = [head, buf.clone(), tail];
        let parts: Vec<IoBuf> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        Ok(IoBuf::concat(&parts))
    }

    /// Writes to as many new clusters as belong together. Returns how much was written.
    async fn write_new_clusters(&self, offset: u64, buf: &IoBuf, first: Mapping) -> Result<usize> {
        let size = self.geometry.cluster_size();
        let start = self.geometry.cluster_start(offset);
        let wanted = self.geometry.clusters(offset - start + buf.len() as u64);
        let mut olds = vec![first];
        while (olds.len() as u64) < wanted {
            let next = start + olds.len() as u64 * size;
            if self.geometry.l1_index(next) != self.geometry.l1_index(offset) {
                break;
            }
            let mapping = self.mapping(next).await?;
            if matches!(mapping, Mapping::Host { copied: true, .. }) {
                break;
            }
            olds.push(mapping);
        }
        let allocation = self.allocate_data(start, olds.len() as u64).await?;
        olds.truncate(allocation.count as usize);
        let result = self.fill_new_clusters(offset, buf, &olds, allocation).await;
        if result.is_err() && !self.external_data {
            self.free_now(allocation.offset, allocation.count).await?;
        }
        result
    }

    /// Host clusters for the guest clusters from `start` on.
    pub(crate) async fn allocate_data(&self, start: u64, count: u64) -> Result<Allocation> {
        if self.external_data {
            // Data files are laid out like the disk.
            let fresh = start >= self.data.len();
            return Ok(Allocation {
                offset: start,
                count,
                fresh,
            });
        }
        self.allocate(count, Run::UpTo).await
    }

    async fn fill_new_clusters(
        &self,
        offset: u64,
        buf: &IoBuf,
        olds: &[Mapping],
        allocation: Allocation,
    ) -> Result<usize> {
        let size = self.geometry.cluster_size();
        let part_size = self.geometry.subcluster_size();
        let start = self.geometry.cluster_start(offset);
        let from = offset - start;
        let to = (from + buf.len() as u64).min(olds.len() as u64 * size);
        let last_start = (to - 1) / size * size;
        // All of a cluster that others share is copied; of others only the subclusters touched.
        let low = if needs_whole_copy(olds[0]) {
            0
        } else {
            from - from % part_size
        };
        let high = if olds.last().is_some_and(|old| needs_whole_copy(*old)) {
            last_start + size
        } else {
            to.next_multiple_of(part_size)
        };
        let length = (to - from) as usize;
        let padded = self
            .padded(offset, &buf.slice(0, length), from - low, high - to)
            .await?;
        let (before, after) = ((from - low) as usize, (high - to) as usize);
        let pads_are_zero = before + after > 0
            && padded.slice(0, before).is_zero()
            && padded.slice(before + length, after).is_zero();
        // What is not written there reads as zeroes, unless it is decrypted.
        if allocation.fresh && pads_are_zero && self.encryption.is_none() {
            self.data
                .write(allocation.offset + from, padded.slice(before, length))
                .await?;
        } else {
            self.data.write(allocation.offset + low, padded).await?;
        }
        for (number, old) in olds.iter().enumerate() {
            let cluster = number as u64 * size;
            let parts = self.geometry.parts(
                low.saturating_sub(cluster).min(size),
                high.saturating_sub(cluster).min(size),
            );
            let zero = match old {
                Mapping::Plain { zero } | Mapping::Host { zero, .. } => zero & !parts,
                Mapping::Compressed { .. } => 0,
            };
            let place = allocation.offset + cluster;
            let new = Mapping::Host {
                offset: place,
                copied: true,
                data: parts,
                zero,
            };
            self.set_mapping(start + cluster, new).await?;
            self.forget(*old);
        }
        Ok(length)
    }

    /// Gives back what `old` referred to, after its entry has been replaced.
    pub(crate) fn forget(&self, old: Mapping) {
        match old {
            Mapping::Host { offset, .. } if !self.external_data => {
                self.free_later(offset, self.geometry.cluster_size());
            }
            Mapping::Compressed { offset, length } => self.free_later(offset, length),
            _ => {}
        }
    }

    /// Stores one whole cluster compressed, if that makes it smaller.
    ///
    /// `compressed` is the cluster's data as `compress::compress` made it.
    pub(crate) async fn write_compressed_guest(
        &self,
        offset: u64,
        compressed: &[u8],
    ) -> Result<()> {
        self.record(offset, self.geometry.cluster_size());
        let _held = self.ranges.lock(offset, self.geometry.cluster_size()).await;
        self.own_l2_table(offset).await?;
        let old = self.mapping(offset).await?;
        let length = compressed.len() as u64;
        let place = self.allocate_bytes(length).await?;
        self.medium
            .write(place, IoBuf::from_slice(compressed))
            .await?;
        self.set_mapping(
            offset,
            Mapping::Compressed {
                offset: place,
                length,
            },
        )
        .await?;
        self.forget(old);
        Ok(())
    }

    pub(crate) async fn write_zeroes_guest(
        &self,
        offset: u64,
        length: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        self.for_each_cluster(offset, length, ClusterChange::Zero(flags))
            .await
    }

    pub(crate) async fn discard_guest(&self, offset: u64, length: u64) -> Result<()> {
        self.for_each_cluster(offset, length, ClusterChange::Discard)
            .await
    }

    async fn for_each_cluster(
        &self,
        offset: u64,
        length: u64,
        change: ClusterChange,
    ) -> Result<()> {
        self.record(offset, length);
        let size = self.geometry.cluster_size();
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let piece_end = end.min((at + PIECE) / size * size);
            let (start, held) = self.around(at, piece_end - at);
            let _held = self.ranges.lock(start, held).await;
            while at < piece_end {
                let stop = (self.geometry.cluster_start(at) + size).min(piece_end);
                if let Some(next) = self.skip_unallocated(at, piece_end, change).await? {
                    at = next;
                    continue;
                }
                match change {
                    ClusterChange::Zero(flags) => self.zero_in_cluster(at, stop, flags).await?,
                    ClusterChange::Discard => self.discard_cluster(at, stop).await?,
                }
                at = stop;
            }
        }
        Ok(())
    }

    /// Where to go on if there is no L2 table and none is needed.
    async fn skip_unallocated(
        &self,
        offset: u64,
        end: u64,
        change: ClusterChange,
    ) -> Result<Option<u64>> {
        if self.l2_table(offset).await? != 0 {
            return Ok(None);
        }
        let reads_backing = self.backing.borrow().is_some();
        let raw_data = self.is_raw_data_file() && matches!(change, ClusterChange::Zero(_));
        if reads_backing || raw_data {
            return Ok(None);
        }
        let span = 1u64 << (self.geometry.cluster_bits + self.geometry.l2_bits);
        Ok(Some(((offset / span + 1) * span).min(end)))
    }

    /// Zeroes `[at, stop)` inside one cluster.
    pub(crate) async fn zero_in_cluster(&self, at: u64, stop: u64, flags: ZeroFlags) -> Result<()> {
        let size = self.geometry.subcluster_size();
        let cluster = self.geometry.cluster_start(at);
        // The disk may end inside the last cluster; what is behind it does not count.
        let reaches_end = stop == self.size.get();
        let low = at.next_multiple_of(size);
        let high = if reaches_end {
            stop.next_multiple_of(size)
        } else {
            stop - stop % size
        };
        if !self.geometry.zero_flag || low >= high {
            return self.zero_as_data(at, stop, flags).await;
        }
        if low > at {
            self.zero_as_data(at, low, flags).await?;
        }
        if stop > high {
            self.zero_as_data(high, stop, flags).await?;
        }
        let parts = self.geometry.parts(low - cluster, high - cluster);
        if self.is_raw_data_file() {
            let length = high.min(stop) - low;
            self.data
                .write_zeroes(low, length, flags & ZeroFlags::MAY_UNMAP)
                .await?;
        }
        self.zero_parts(cluster, parts, flags).await
    }

    /// Marks whole subclusters as zero.
    async fn zero_parts(&self, cluster: u64, parts: u32, flags: ZeroFlags) -> Result<()> {
        let old = self.mapping(cluster).await?;
        let reads_backing = self.backing.borrow().is_some();
        let all = self.geometry.all_parts();
        let new = match old {
            Mapping::Plain { zero } if zero & parts == parts || !reads_backing => return Ok(()),
            Mapping::Plain { zero } => Mapping::Plain { zero: zero | parts },
            Mapping::Compressed { .. } if parts == all => Mapping::Plain { zero: all },
            Mapping::Compressed { .. } => {
                let size = self.geometry.subcluster_size();
                let low = u64::from(parts.trailing_zeros()) * size;
                let high = u64::from(32 - parts.leading_zeros()) * size;
                return self
                    .zero_as_data(cluster + low, cluster + high, flags)
                    .await;
            }
            Mapping::Host { zero, .. } if zero | parts == all && self.may_unmap(old, flags) => {
                Mapping::Plain { zero: all }
            }
            Mapping::Host {
                offset,
                copied,
                data,
                zero,
            } => Mapping::Host {
                offset,
                copied,
                data: data & !parts,
                zero: zero | parts,
            },
        };
        self.own_l2_table(cluster).await?;
        self.set_mapping(cluster, new).await?;
        if matches!(new, Mapping::Plain { .. }) {
            self.forget(old);
        }
        Ok(())
    }

    /// Whether a host cluster that became all zero is given back: if that is allowed, or if it is
    /// shared and so of no use as reserved space.
    fn may_unmap(&self, old: Mapping, flags: ZeroFlags) -> bool {
        let copied = matches!(old, Mapping::Host { copied: true, .. });
        !self.is_raw_data_file() && (flags.contains(ZeroFlags::MAY_UNMAP) || !copied)
    }

    /// Zeroes a range by writing data, except where it reads as zeroes already.
    async fn zero_as_data(&self, at: u64, stop: u64, flags: ZeroFlags) -> Result<()> {
        let stop = stop.min(self.size.get());
        let mut at = at;
        while at < stop {
            let stretch = self.stretch(at, stop - at).await?;
            let reads_backing = self.backing.borrow().is_some();
            let is_zero = match stretch.part {
                Part::Zero(_) => true,
                Part::Unallocated => !reads_backing,
                Part::Data(_) | Part::Compressed => false,
            };
            if !is_zero {
                if flags.contains(ZeroFlags::NO_FALLBACK) {
                    let message = "zeroes would have to be written as data";
                    return Err(block::BlockError::unsupported(message));
                }
                let zeroes = IoBuf::zeroed(stretch.length as usize);
                self.write_held(at, &zeroes).await?;
            }
            at += stretch.length;
        }
        Ok(())
    }

    /// Gives a whole cluster back; parts of clusters are left alone.
    async fn discard_cluster(&self, at: u64, stop: u64) -> Result<()> {
        let whole = at == self.geometry.cluster_start(at)
            && (stop - at == self.geometry.cluster_size() || stop == self.size.get());
        if !whole {
            return Ok(());
        }
        let old = self.mapping(at).await?;
        // What is behind must not show through again: older content is not "old or zeroes".
        let reads_backing = self.backing.borrow().is_some();
        let new = if self.geometry.zero_flag {
            Mapping::Plain {
                zero: self.geometry.all_parts(),
            }
        } else if reads_backing {
            return Ok(());
        } else {
            Mapping::Plain { zero: 0 }
        };
        if matches!(old, Mapping::Plain { .. }) || self.is_raw_data_file() {
            return Ok(());
        }
        self.own_l2_table(at).await?;
        self.set_mapping(at, new).await?;
        self.forget(old);
        if let (true, Mapping::Host { offset, .. }) = (self.external_data, old) {
            self.data
                .discard(offset, self.geometry.cluster_size())
                .await?;
        }
        Ok(())
    }

    pub(crate) async fn extents_guest(&self, query: ExtentQuery) -> Result<Vec<Extent>> {
        let mut found = Vec::new();
        let end = query.offset + query.length;
        let mut offset = query.offset;
        while offset < end && found.len() < query.limit {
            let stretch = self.stretch(offset, end - offset).await?;
            // What is stored there is not what the guest has.
            let place = |offset| {
                self.encryption.is_none().then(|| HostRange {
                    file: self.data.name(),
                    offset,
                })
            };
            let kind = match stretch.part {
                Part::Data(at) => ExtentKind::Data(place(at)),
                Part::Zero(at) => ExtentKind::Zero(at.and_then(place)),
                Part::Compressed => ExtentKind::Compressed,
                Part::Unallocated => ExtentKind::Unallocated,
            };
            if kind == ExtentKind::Unallocated && query.scope == Scope::Chain {
                let part = ExtentQuery {
                    offset,
                    length: stretch.length,
                    ..query
                };
                self.backing_extents(part, &mut found).await?;
                offset = found.last().map_or(end, Extent::end);
                continue;
            }
            push_merged(
                &mut found,
                Extent {
                    offset,
                    length: stretch.length,
                    kind,
                    depth: 0,
                },
            );
            offset += stretch.length;
        }
        Ok(found)
    }

    async fn backing_extents(&self, query: ExtentQuery, found: &mut Vec<Extent>) -> Result<()> {
        let backing = self.backing.borrow().clone();
        let size = backing.as_ref().map_or(0, |b| b.limits().size);
        let inside = size.saturating_sub(query.offset).min(query.length);
        if let Some(backing) = backing.filter(|_| inside > 0) {
            let part = ExtentQuery {
                length: inside,
                ..query
            };
            for extent in backing.extents(part).await? {
                push_merged(
                    found,
                    Extent {
                        depth: extent.depth + 1,
                        ..extent
                    },
                );
            }
            // The rest is for the next round, if the limit was not met.
            return Ok(());
        }
        // Past the end of a backing file, it is that file that says zero.
        let (kind, depth) = if self.backing.borrow().is_some() {
            (ExtentKind::Zero(None), 1)
        } else {
            (ExtentKind::Unallocated, 0)
        };
        let extent = Extent {
            offset: query.offset,
            length: query.length,
            kind,
            depth,
        };
        push_merged(found, extent);
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum ClusterChange {
    Zero(ZeroFlags),
    Discard,
}

/// Whether a new cluster must take over everything that the old one has.
fn needs_whole_copy(old: Mapping) -> bool {
    matches!(old, Mapping::Host { .. } | Mapping::Compressed { .. })
}
