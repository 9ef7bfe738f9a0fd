//! Disks that are stored in blocks at places that a table names: what such formats share.
//!
//! A format answers [`Mapped::find`]; reading and extents follow from that. A format that is written
//! too says where new blocks go ([`Writable`]); copying from the parent, order and locks are here.
//!
//! Tables reach the medium after the data that they refer to ([`Table`]): so the worst that a power
//! cut leaves is a block that nothing refers to.

mod table;
mod write;

pub(crate) use table::{Changes, Order, Table};
pub(crate) use write::{Target, Writable, discard, even_block, write, write_zeroes};

use std::rc::Rc;

use block::{
    BlockBackend, BlockFuture, Extent, ExtentKind, ExtentQuery, HostRange, IoBuf, Medium, Result,
    Scope, push_merged,
};

/// What a stretch of a disk is.
#[derive(Clone)]
pub(crate) enum Place {
    /// Stored as it is.
    Host {
        /// The file.
        medium: Rc<dyn Medium>,
        /// Where the stretch begins in it.
        offset: u64,
        /// Holes of the file are told as zeroes.
        holes: bool,
    },
    /// Reads as zeroes.
    Zero,
    /// Not in this layer.
    Unallocated,
    /// Stored in another form; [`Mapped::read_encoded`] reads it.
    Compressed,
}

/// A stretch of a disk that is one thing.
pub(crate) struct Run {
    pub(crate) place: Place,
    /// Never 0.
    pub(crate) length: u64,
}

/// A disk in blocks.
pub(crate) trait Mapped {
    /// What is at `offset`, looking no further than `length`.
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run>;

    /// Reads a stretch that is [`Place::Compressed`].
    fn read_encoded(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()>;

    /// The layer below.
    fn parent(&self) -> Option<Rc<dyn BlockBackend>>;

    /// Whether what is in no layer at all is told as unallocated (formats whose images may have a
    /// parent) or as known zeroes.
    fn tells_unallocated(&self) -> bool;
}

/// Fills `buf` from `offset` on.
pub(crate) async fn read(map: &dyn Mapped, offset: u64, buf: IoBuf) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let left = (buf.len() - done) as u64;
        let run = map.find(at, left).await?;
        let length = run.length.min(left) as usize;
        let part = buf.slice(done, length);
        match run.place {
            Place::Host { medium, offset, .. } => medium.read(offset, part).await?,
            Place::Zero => part.fill_at(0, length, 0),
            Place::Unallocated => read_parent(map.parent(), at, part).await?,
            Place::Compressed => map.read_encoded(at, part).await?,
        }
        done += length;
    }
    Ok(())
}

/// Reads from a parent, which may be shorter or not be there: then as zeroes.
pub(crate) async fn read_parent(
    parent: Option<Rc<dyn BlockBackend>>,
    offset: u64,
    buf: IoBuf,
) -> Result<()> {
    let size = parent.as_ref().map_or(0, |p| p.limits().size);
    let inside = size.saturating_sub(offset).min(buf.len() as u64) as usize;
    buf.fill_at(inside, buf.len() - inside, 0);
    match parent.filter(|_| inside > 0) {
        Some(parent) => parent.read(offset, buf.slice(0, inside)).await,
        None => Ok(()),
    }
}

/// Answers an extent query.
pub(crate) async fn extents(map: &dyn Mapped, query: ExtentQuery) -> Result<Vec<Extent>> {
    let mut found = Vec::new();
    let end = query.offset + query.length;
    let mut offset = query.offset;
    while offset < end && found.len() < query.limit {
        let run = map.find(offset, end - offset).await?;
        let mut length = run.length.min(end - offset);
        let kind = match run.place {
            Place::Host {
                medium,
                offset: at,
                holes,
            } => {
                let file = medium.name();
                let range = Some(HostRange { file, offset: at });
                let stored = stored_length(&*medium, at, length, holes)?;
                length = stored.1;
                if stored.0 {
                    ExtentKind::Data(range)
                } else {
                    ExtentKind::Zero(range)
                }
            }
            Place::Zero => ExtentKind::Zero(None),
            Place::Compressed => ExtentKind::Compressed,
            Place::Unallocated => ExtentKind::Unallocated,
        };
        if kind == ExtentKind::Unallocated && query.scope == Scope::Chain {
            let part = ExtentQuery {
                offset,
                length,
                ..query
            };
            parent_extents(map, part, &mut found).await?;
            offset = found.last().map_or(end, Extent::end);
            continue;
        }
        let extent = Extent {
            offset,
            length,
            kind,
            depth: 0,
        };
        push_merged(&mut found, extent);
        offset += length;
    }
    Ok(found)
}

/// Whether a part of a file is stored, and how far that goes.
fn stored_length(medium: &dyn Medium, at: u64, length: u64, holes: bool) -> Result<(bool, u64)> {
    if !holes {
        return Ok((true, length));
    }
    let inside = medium.len().saturating_sub(at).min(length);
    if inside == 0 {
        return Ok((false, length));
    }
    let range = medium.sparse_range(at, inside)?;
    // Guests address whole sectors, files may have holes anywhere.
    let whole = if range.data {
        range.length.next_multiple_of(512).min(length)
    } else if range.length == inside {
        // What is past the end of the file is a hole too.
        length
    } else {
        range.length / 512 * 512
    };
    Ok(if whole == 0 {
        (true, 512.min(length))
    } else {
        (range.data, whole)
    })
}

async fn parent_extents(
    map: &dyn Mapped,
    query: ExtentQuery,
    found: &mut Vec<Extent>,
) -> Result<()> {
    let parent = map.parent();
    let has_parent = parent.is_some();
    let size = parent.as_ref().map_or(0, |p| p.limits().size);
    let inside = size.saturating_sub(query.offset).min(query.length);
    if let Some(parent) = parent.filter(|_| inside > 0) {
        let part = ExtentQuery {
            length: inside,
            ..query
        };
        for extent in parent.extents(part).await? {
            let depth = extent.depth + 1;
            push_merged(found, Extent { depth, ..extent });
        }
        return Ok(());
    }
    let (kind, depth) = match (has_parent, map.tells_unallocated()) {
        // Past the end of a parent, it is the parent that says zero.
        (true, _) => (ExtentKind::Zero(None), 1),
        (false, true) => (ExtentKind::Unallocated, 0),
        (false, false) => (ExtentKind::Zero(None), 0),
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
