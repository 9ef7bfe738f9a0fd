//! Making new disks.

use std::rc::Rc;

use block::{BlockError, IoBuf, Medium, Result};

use super::header::{BLOCK_SIZE, HEADER_SIZE, Header, MAX_BLOCKS, UNALLOCATED};
use crate::identity::random_uuid;
use crate::qcow2::Preallocation;

/// The size of a block of new disks.
pub const NEW_BLOCK_SIZE: u64 = BLOCK_SIZE;

/// What a new disk is like.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// All blocks are in the file from the beginning.
    pub fixed: bool,
    /// Reserve the space of a fixed disk.
    pub preallocation: Preallocation,
}

fn header(options: &CreateOptions) -> Result<Header> {
    if !options.size.is_multiple_of(512) {
        let message = "the size must be a multiple of 512";
        return Err(BlockError::invalid_argument(message));
    }
    let blocks = options.size.div_ceil(BLOCK_SIZE);
    if blocks > MAX_BLOCKS {
        return Err(BlockError::invalid_argument(format!(
            "a VDI image holds at most {} TiB",
            (MAX_BLOCKS * BLOCK_SIZE) >> 40
        )));
    }
    let table = HEADER_SIZE as u64;
    Ok(Header {
        fixed: options.fixed,
        table,
        data: (table + blocks * 4).next_multiple_of(512),
        size: options.size,
        block_size: BLOCK_SIZE,
        blocks,
        allocated: if options.fixed { blocks } else { 0 },
        uuid: random_uuid(true),
        snapshot_uuid: random_uuid(true),
    })
}

/// Makes a disk in `medium`, which is emptied.
///
/// # Errors
///
/// `InvalidArgument` for a size that the format cannot have, or what the host reports.
pub async fn create(medium: &Rc<dyn Medium>, options: &CreateOptions) -> Result<()> {
    let header = header(options)?;
    medium.set_len(0).await?;
    let entry = |n: u64| if options.fixed { n } else { UNALLOCATED } as u32;
    let mut table: Vec<u8> = (0..header.blocks)
        .flat_map(|n| entry(n).to_le_bytes())
        .collect();
    table.resize((header.data - header.table) as usize, 0);
    if !table.is_empty() {
        let buffer = IoBuf::from_slice(&table);
        medium.write(header.table, buffer).await?;
    }
    if options.fixed {
        let end = header.data + header.blocks * BLOCK_SIZE;
        medium.set_len(end).await?;
        match options.preallocation {
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => medium.preallocate(header.data, end - header.data).await?,
            Preallocation::Full => crate::vpc::write_full(&**medium, header.data, end).await?,
        }
    }
    medium.flush().await?;
    let bytes = IoBuf::from_slice(&header.encode());
    medium.write(0, bytes).await?;
    medium.flush().await
}

/// The bytes of the file: with this many blocks stored, and with all of them.
///
/// # Errors
///
/// If the format cannot have the size.
pub fn measure(options: &CreateOptions, stored: u64) -> Result<(u64, u64)> {
    let header = header(options)?;
    let all = header.data + header.blocks * BLOCK_SIZE;
    if options.fixed {
        return Ok((all, all));
    }
    Ok((header.data + stored.min(header.blocks) * BLOCK_SIZE, all))
}
