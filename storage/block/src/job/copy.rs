//! Moving a range from one disk to another.

use super::control::IoSide;
use crate::backend::{Extent, ExtentQuery, Scope, ZeroFlags};
use crate::buffer::IoBuf;
use crate::disk::Disk;
use crate::error::BlockError;

/// Extents that are looked at in one go.
const EXTENTS: usize = 64;

/// Which images of a chain a job copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layers {
    /// All of them: what the guest sees.
    All,
    /// What this many images from the top down hold.
    Upper(u32),
    /// Nothing but what changes.
    None,
}

impl Layers {
    /// Whether an extent belongs to them.
    pub fn hold(self, extent: &Extent) -> bool {
        match self {
            Self::All => true,
            Self::Upper(count) => {
                extent.depth < count && extent.kind != crate::ExtentKind::Unallocated
            }
            Self::None => false,
        }
    }
}

/// What failed, and on which side.
pub type CopyError = (BlockError, IoSide);

/// The extents of a range, all of it.
pub(super) async fn extents(
    source: &Disk,
    offset: u64,
    length: u64,
) -> Result<Vec<Extent>, BlockError> {
    let mut found: Vec<Extent> = Vec::new();
    let mut at = offset;
    while at < offset + length {
        let query = ExtentQuery {
            offset: at,
            length: offset + length - at,
            scope: Scope::Chain,
            limit: EXTENTS,
        };
        let more = source.backend().extents(query).await?;
        at = more.last().map_or(offset + length, Extent::end);
        found.extend(more);
    }
    Ok(found)
}

/// Copies a range; zeroes stay zeroes. The caller holds the range.
///
/// # Errors
///
/// What failed first.
pub async fn copy_range(
    source: &Disk,
    target: &Disk,
    offset: u64,
    length: u64,
) -> Result<(), CopyError> {
    let from = |error| (error, IoSide::Source);
    let to = |error| (error, IoSide::Target);
    let block = u64::from(target.limits().logical_block_size.max(512));
    for run in zero_runs(&extents(source, offset, length).await.map_err(from)?, block) {
        if run.zero {
            let flags = ZeroFlags::MAY_UNMAP;
            let written = target.write_zeroes(run.offset, run.length, flags, false);
            written.await.map_err(to)?;
        } else {
            let buf = IoBuf::zeroed(usize::try_from(run.length).unwrap_or(usize::MAX));
            let read = source.read_unseen(run.offset, buf.clone());
            read.await.map_err(from)?;
            let written = target.write(run.offset, buf, false);
            written.await.map_err(to)?;
        }
    }
    Ok(())
}

struct Run {
    offset: u64,
    length: u64,
    zero: bool,
}

/// Joins extents to runs of zeroes and of data. Runs begin at multiples of `block`; what zeroes have in a block beside
/// data is copied as data.
fn zero_runs(extents: &[Extent], block: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let Some(last) = extents.last().map(Extent::end) else {
        return runs;
    };
    let mut push = |start: u64, end: u64, zero: bool| {
        if start >= end {
            return;
        }
        match runs.last_mut() {
            Some(run) if run.zero == zero => run.length = end - run.offset,
            _ => runs.push(Run {
                offset: start,
                length: end - start,
                zero,
            }),
        }
    };
    let mut at = extents[0].offset;
    for extent in extents {
        if extent.reads_as_zero() {
            let start = extent.offset.next_multiple_of(block).max(at);
            let end = if extent.end() == last {
                last
            } else {
                extent.end() / block * block
            };
            if start < end {
                push(at, start, false);
                push(start, end, true);
                at = end;
            }
        } else {
            push(at, extent.end(), false);
            at = extent.end();
        }
    }
    push(at, last, false);
    runs
}
