//! Writing disks in blocks.

use std::rc::Rc;

use block::sync::RangeLocks;
use block::{BlockFuture, IoBuf, Medium, Result, ZeroFlags};

use super::{Mapped, Place, Run, read};

/// A disk in blocks that can be written.
pub(crate) trait Writable: Mapped {
    /// The block around `offset`: where it begins, and how much of the disk it holds (multiples of 512
    /// bytes).
    fn block_at(&self, offset: u64) -> (u64, u64);

    /// Who may change what at once; ranges are bytes of the disk.
    fn locks(&self) -> &RangeLocks;

    /// Whether a new block gets the parent's content; formats that note what is present sector by
    /// sector leave it where it is.
    fn copies_parent(&self) -> bool;

    /// Where data for `offset` goes in place: the file, the place, and how far that goes on.
    fn writable_place(&self, offset: u64) -> BlockFuture<'_, Option<Target>>;

    /// Room for the block that holds `offset`; it reads as zeroes there. Nothing refers to it yet.
    fn allocate(&self, offset: u64) -> BlockFuture<'_, Target>;

    /// Makes the table refer to the block that `allocate` gave.
    fn install(&self, offset: u64, target: Target) -> BlockFuture<'_, ()>;

    /// Notes that data has been written here.
    fn wrote(&self, offset: u64, length: u64) -> BlockFuture<'_, ()>;

    /// Makes a whole block, which has no place, read as zeroes; `false` if the format cannot say so.
    fn set_zero(&self, offset: u64) -> BlockFuture<'_, bool>;
}

/// A place for data.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) medium: Rc<dyn Medium>,
    pub(crate) offset: u64,
    /// How many bytes follow there before the block ends.
    pub(crate) length: u64,
}

/// Writes `buf` at `offset`.
pub(crate) async fn write(map: &dyn Writable, offset: u64, buf: IoBuf) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let left = (buf.len() - done) as u64;
        let guard = map.locks().share(at, left).await;
        if let Some(target) = map.writable_place(at).await? {
            let n = contiguous(map, at, left, &target).await?;
            let part = buf.slice(done, n as usize);
            target.medium.write(target.offset, part).await?;
            map.wrote(at, n).await?;
            done += n as usize;
            continue;
        }
        drop(guard);
        let (start, length) = map.block_at(at);
        let _alone = map.locks().lock(start, length).await;
        let n = (start + length - at).min(left);
        let part = buf.slice(done, n as usize);
        match map.writable_place(at).await? {
            Some(target) => target.medium.write(target.offset, part).await?,
            None => write_new(map, at, part).await?,
        }
        map.wrote(at, n).await?;
        done += n as usize;
    }
    Ok(())
}

/// How much of a write can go to `target` and the blocks that follow it in the file.
async fn contiguous(map: &dyn Writable, at: u64, left: u64, target: &Target) -> Result<u64> {
    let mut n = target.length.min(left);
    while n < left {
        match map.writable_place(at + n).await? {
            Some(next)
                if next.offset == target.offset + n && Rc::ptr_eq(&next.medium, &target.medium) =>
            {
                n = (n + next.length).min(left);
            }
            _ => break,
        }
    }
    Ok(n)
}

/// The block around `offset` on a disk of `disk` bytes whose blocks all have `size` bytes.
pub(crate) fn even_block(offset: u64, size: u64, disk: u64) -> (u64, u64) {
    let start = offset / size * size;
    (start, size.min(disk - start))
}

const PIECE: u64 = 1 << 20;

async fn write_new(map: &dyn Writable, at: u64, part: IoBuf) -> Result<()> {
    let (start, length) = map.block_at(at);
    let target = map.allocate(at).await?;
    if map.copies_parent() {
        let end = at + part.len() as u64;
        copy_up(map, start, at, start, &target).await?;
        copy_up(map, end, start + length, start, &target).await?;
    }
    let place = target.offset + (at - start);
    target.medium.write(place, part).await?;
    map.install(at, target).await
}

/// Copies what is readable in a range to its place in a new block.
async fn copy_up(
    map: &dyn Writable,
    from: u64,
    end: u64,
    start: u64,
    target: &Target,
) -> Result<()> {
    let mut at = from;
    while at < end {
        let run = map.find(at, (end - at).min(PIECE)).await?;
        let length = run.length.min(end - at).min(PIECE);
        let known_zero = match run.place {
            Place::Zero => true,
            Place::Unallocated => map.parent().is_none(),
            _ => false,
        };
        if !known_zero {
            let buffer = IoBuf::zeroed(length as usize);
            read(map, at, buffer.clone()).await?;
            if !buffer.is_zero() {
                let place = target.offset + (at - start);
                target.medium.write(place, buffer).await?;
            }
        }
        at += length;
    }
    Ok(())
}

/// Makes a range read as zeroes.
pub(crate) async fn write_zeroes(
    map: &dyn Writable,
    offset: u64,
    length: u64,
    flags: ZeroFlags,
) -> Result<()> {
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let (start, block) = map.block_at(at);
        let n = (start + block - at).min(end - at);
        let _alone = map.locks().lock(start, block).await;
        zero_in_block(map, at, n, n == block, flags).await?;
        at += n;
    }
    Ok(())
}

async fn zero_in_block(
    map: &dyn Writable,
    at: u64,
    length: u64,
    whole: bool,
    flags: ZeroFlags,
) -> Result<()> {
    if let Some(target) = map.writable_place(at).await? {
        let flags = flags & ZeroFlags::MAY_UNMAP;
        target
            .medium
            .write_zeroes(target.offset, length, flags)
            .await?;
        return map.wrote(at, length).await;
    }
    if reads_as_zero(map, at, length).await? || (whole && map.set_zero(at).await?) {
        return Ok(());
    }
    write_new(map, at, IoBuf::zeroed(length as usize)).await?;
    map.wrote(at, length).await
}

async fn reads_as_zero(map: &dyn Writable, at: u64, length: u64) -> Result<bool> {
    let mut done = 0;
    while done < length {
        let run = map.find(at + done, length - done).await?;
        let zero = match run.place {
            Place::Zero => true,
            Place::Unallocated => map.parent().is_none(),
            _ => false,
        };
        if !zero {
            return Ok(false);
        }
        done += run.length;
    }
    Ok(true)
}

/// Gives the space of what is stored back to the file system; the blocks stay where they are.
pub(crate) async fn discard(map: &dyn Writable, offset: u64, length: u64) -> Result<()> {
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let _order = map.locks().share(at, end - at).await;
        let run: Run = map.find(at, end - at).await?;
        let n = run.length.min(end - at);
        if let Place::Host { medium, offset, .. } = run.place {
            medium.discard(offset, n).await?;
        }
        at += n;
    }
    Ok(())
}
