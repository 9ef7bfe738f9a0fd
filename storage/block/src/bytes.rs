//! A disk in single bytes, for peers and tools that know of no blocks.

use std::rc::Rc;

use crate::backend::ZeroFlags;
use crate::buffer::IoBuf;
use crate::disk::Disk;
use crate::error::Result;
use crate::sync::RangeLocks;

/// A disk whose requests may begin and end anywhere: parts of blocks are read, changed and written back,
/// in an order with the other writes that come through here.
pub struct ByteDisk {
    disk: Rc<Disk>,
    /// Orders read-modify-write cycles and the writes that they overlap.
    writing: RangeLocks,
}

fn zeroes(length: u64) -> IoBuf {
    IoBuf::zeroed(usize::try_from(length).unwrap_or(0))
}

impl ByteDisk {
    /// Wraps `disk`.
    pub fn new(disk: Rc<Disk>) -> Self {
        Self {
            disk,
            writing: RangeLocks::default(),
        }
    }

    /// The disk below.
    pub fn disk(&self) -> &Rc<Disk> {
        &self.disk
    }

    fn block(&self) -> u64 {
        u64::from(self.disk.limits().logical_block_size.max(1))
    }

    fn aligned(&self, offset: u64, length: u64) -> bool {
        let block = self.block();
        offset.is_multiple_of(block) && length.is_multiple_of(block)
    }

    /// The whole blocks around a range: where they begin, and room for them.
    fn around(&self, offset: u64, length: u64) -> (u64, IoBuf) {
        let start = offset - offset % self.block();
        let end = offset.saturating_add(length);
        let whole = end
            .checked_next_multiple_of(self.block())
            .map_or(0, |end| end - start);
        (start, zeroes(whole))
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    ///
    /// As [`Disk::read`].
    pub async fn read(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let length = buf.len() as u64;
        if self.aligned(offset, length) {
            return self.disk.read(offset, buf).await;
        }
        self.disk.check_range(offset, length)?;
        let (start, bounce) = self.around(offset, length);
        self.disk.read(start, bounce.clone()).await?;
        let skip = usize::try_from(offset - start).unwrap_or(0);
        buf.copy_from(&bounce.slice(skip, buf.len()).to_vec());
        Ok(())
    }

    /// Writes `buf` at `offset`; if `through`, it is on stable storage when this returns.
    ///
    /// # Errors
    ///
    /// As [`Disk::write`].
    pub async fn write(&self, offset: u64, buf: IoBuf, through: bool) -> Result<()> {
        let length = buf.len() as u64;
        if self.aligned(offset, length) {
            let _order = self.writing.share(offset, length).await;
            return self.disk.write(offset, buf, through).await;
        }
        self.disk.check_range(offset, length)?;
        let (start, bounce) = self.around(offset, length);
        let _alone = self.writing.lock(start, bounce.len() as u64).await;
        self.disk.read(start, bounce.clone()).await?;
        let skip = usize::try_from(offset - start).unwrap_or(0);
        bounce.copy_from_at(skip, &buf.to_vec());
        self.disk.write(start, bounce, through).await
    }

    /// Makes the range read as zeroes; if `through`, stably so.
    ///
    /// # Errors
    ///
    /// As [`Disk::write_zeroes`].
    pub async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        flags: ZeroFlags,
        through: bool,
    ) -> Result<()> {
        self.disk.check_range(offset, length)?;
        let block = self.block();
        let (start, end) = (
            offset.next_multiple_of(block),
            (offset + length) / block * block,
        );
        if start >= end {
            return self.write(offset, zeroes(length), through).await;
        }
        if start > offset {
            self.write(offset, zeroes(start - offset), through).await?;
        }
        if offset + length > end {
            let tail = zeroes(offset + length - end);
            self.write(end, tail, through).await?;
        }
        let _order = self.writing.share(start, end - start).await;
        self.disk
            .write_zeroes(start, end - start, flags, through)
            .await
    }

    /// Gives the space of the whole blocks inside the range back, if the disk's policy says so.
    ///
    /// # Errors
    ///
    /// As [`Disk::discard`].
    pub async fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.disk.check_range(offset, length)?;
        let block = self.block();
        let (start, end) = (
            offset.next_multiple_of(block),
            (offset + length) / block * block,
        );
        if start >= end {
            return Ok(());
        }
        let _order = self.writing.share(start, end - start).await;
        self.disk.discard(start, end - start).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::block_on;
    use crate::{DiskOptions, ErrorKind, MemoryMedium, RawBackend};

    #[test]
    fn parts_of_blocks_leave_the_rest_alone() {
        block_on(async {
            let medium = Rc::new(MemoryMedium::from_vec(vec![9; 4096]));
            let raw = RawBackend::open(medium.clone()).await.unwrap();
            let disk = ByteDisk::new(Rc::new(Disk::new(Rc::new(raw), DiskOptions::default())));
            let mut model = vec![9; 4096];
            disk.write(500, IoBuf::from_slice(&[1; 30]), false)
                .await
                .unwrap();
            model[500..530].fill(1);
            let flags = ZeroFlags::empty();
            disk.write_zeroes(1000, 2000, flags, false).await.unwrap();
            disk.write_zeroes(3100, 7, flags, true).await.unwrap();
            model[1000..3000].fill(0);
            model[3100..3107].fill(0);
            assert_eq!(medium.to_vec(), model);
            let buf = IoBuf::zeroed(1500);
            disk.read(1, buf.clone()).await.unwrap();
            assert_eq!(buf.to_vec(), model[1..1501]);
            for (offset, length) in [(4095, 2), (u64::MAX, 1), (u64::MAX - 1, 5)] {
                let buf = IoBuf::zeroed(length);
                let error = disk.write(offset, buf.clone(), false).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::OutOfRange);
                assert!(disk.read(offset, buf).await.is_err());
                let length = length as u64;
                let zero = disk.write_zeroes(offset, length, flags, false);
                assert!(zero.await.is_err());
                assert!(disk.discard(offset, length).await.is_err());
            }
        })
        .unwrap();
    }
}
