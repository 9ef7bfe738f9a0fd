//! Making new disks.

use std::rc::Rc;

use block::{BlockError, IoBuf, Medium, Result};

use super::header::{
    BAT_REGION, HEADERS, Header, MAX_SIZE, METADATA_REGION, MIB, Metadata, REGION_TABLES, Region,
    State, encode_regions,
};
use super::{parent, read_header, read_metadata, read_regions};
use crate::identity::random_uuid;
use crate::qcow2::Preallocation;

/// What a new disk is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// All blocks are there from the beginning.
    pub fixed: bool,
    /// The size of a block in bytes, a power of two between 1 and 256 MiB; 0 to choose one.
    pub block_size: u64,
    /// The size of the log in bytes; rounded up to whole MiB.
    pub log_size: u64,
    /// Blocks of a dynamic disk say that they are zero, rather than not being there.
    pub block_state_zero: bool,
    /// 512 or 4096 bytes.
    pub logical_sector: u32,
    /// The parent's name, for a differencing disk.
    pub parent: Option<String>,
    /// Reserve the space of a fixed disk.
    pub preallocation: Preallocation,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            fixed: false,
            block_size: 0,
            log_size: MIB,
            block_state_zero: true,
            logical_sector: 512,
            parent: None,
            preallocation: Preallocation::Off,
        }
    }
}

/// The metadata region's size in bytes.
const METADATA_SIZE: u64 = MIB;

fn invalid(what: impl Into<String>) -> BlockError {
    BlockError::invalid_argument(what)
}

/// The block size in bytes that a new disk gets.
pub fn new_block_size(options: &CreateOptions) -> u64 {
    match options.block_size {
        0 if options.parent.is_some() => 2 * MIB,
        0 if options.size > 32 << 40 => 64 * MIB,
        0 if options.size > 100 << 30 => 32 * MIB,
        0 if options.size > 1 << 30 => 16 * MIB,
        0 => 8 * MIB,
        given => given.clamp(MIB, 256 * MIB),
    }
}

/// Where everything lies in a new file.
struct Layout {
    log_length: u64,
    bat: u64,
    bat_length: u64,
    metadata: u64,
    /// Where blocks begin.
    blocks: u64,
}

impl Layout {
    fn new(options: &CreateOptions, metadata: &Metadata) -> Result<Self> {
        let log_length = options.log_size.max(1).checked_next_multiple_of(MIB);
        let log_length = log_length
            .filter(|n| u32::try_from(*n).is_ok())
            .ok_or_else(|| invalid("Log size must be smaller than 4 GB"))?;
        let bat = MIB + log_length;
        let bat_length = (metadata.entries() * 8).max(1).next_multiple_of(MIB);
        let metadata = bat + bat_length;
        Ok(Self {
            log_length,
            bat,
            bat_length,
            metadata,
            blocks: metadata + METADATA_SIZE,
        })
    }
}

/// Metadata of a new disk, checked.
fn metadata_of(options: &CreateOptions) -> Result<Metadata> {
    if options.size > MAX_SIZE {
        return Err(invalid("Image size too large; max of 64TB"));
    }
    if ![512, 4096].contains(&options.logical_sector) {
        return Err(invalid("Logical sector size must be 512 or 4096"));
    }
    let sector = u64::from(options.logical_sector);
    if !options.size.is_multiple_of(sector) {
        let message =
            format!("The image size must be a multiple of the logical sector size {sector}");
        return Err(invalid(message));
    }
    let block_size = new_block_size(options);
    if !block_size.is_power_of_two() {
        return Err(invalid("Block size must be a power of two"));
    }
    if options.parent.is_some() && options.fixed {
        let message = "a fixed disk has no parent: leave out subformat=fixed or the backing file";
        return Err(invalid(message));
    }
    let metadata = Metadata {
        block_size,
        leave_allocated: options.fixed,
        has_parent: options.parent.is_some(),
        size: options.size,
        size_place: 0,
        disk_id: random_uuid(true),
        logical_sector: options.logical_sector,
        physical_sector: 4096,
        locator: Vec::new(),
    };
    metadata
        .validate()
        .map_err(|e| invalid(e.message().to_owned()))?;
    Ok(metadata)
}

/// Makes a disk in `medium`, which is emptied. A differencing disk's parent is read from
/// `parent_medium`.
///
/// # Errors
///
/// `InvalidArgument` for options that do not go together, or what the host reports.
pub async fn create(
    medium: &Rc<dyn Medium>,
    options: &CreateOptions,
    parent_medium: Option<&dyn Medium>,
) -> Result<()> {
    let mut metadata = metadata_of(options)?;
    match (&options.parent, parent_medium) {
        (None, None) => {}
        (Some(name), Some(parent)) => link(&mut metadata, name, parent).await?,
        _ => return Err(invalid("a differencing disk needs its parent")),
    }
    let layout = Layout::new(options, &metadata)?;
    let medium = &**medium;
    medium.set_len(0).await?;
    let end = if options.fixed {
        let blocks = metadata.size.div_ceil(metadata.block_size);
        layout.blocks + blocks * metadata.block_size
    } else {
        layout.blocks
    };
    medium.set_len(end).await?;
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => {
            medium
                .preallocate(layout.blocks, end - layout.blocks)
                .await?
        }
        Preallocation::Full => {
            crate::vpc::write_full(medium, layout.blocks, end).await?;
        }
    }
    write_table(medium, options, &metadata, &layout).await?;
    let bytes = IoBuf::from_slice(&metadata.encode());
    medium.write(layout.metadata, bytes).await?;
    write_headers(medium, &layout).await
}

/// Makes the parent's identity known.
async fn link(metadata: &mut Metadata, name: &str, parent: &dyn Medium) -> Result<()> {
    let header = read_header(parent).await;
    let (_, header) = header.map_err(|_| {
        let name = parent.name();
        invalid(format!("the parent '{name}' must be a VHDX image"))
    })?;
    if header.log != [0; 16] {
        let name = parent.name();
        return Err(invalid(format!(
            "the parent '{name}' has changes in its log: 'check -r all' replays them"
        )));
    }
    let regions = read_regions(parent).await?;
    let (_, place) = super::header::known_regions(&regions)?;
    let theirs = read_metadata(parent, place).await?;
    if theirs.logical_sector != metadata.logical_sector {
        return Err(invalid(format!(
            "the parent has logical sectors of {} bytes: a differencing disk has the same",
            theirs.logical_sector
        )));
    }
    metadata.locator = parent::locator_of(name, &header.data_write);
    Ok(())
}

/// Writes the block allocation table's first state.
async fn write_table(
    medium: &dyn Medium,
    options: &CreateOptions,
    metadata: &Metadata,
    layout: &Layout,
) -> Result<()> {
    if !options.fixed && (metadata.has_parent || !options.block_state_zero) {
        // The new file reads as zeroes: nothing is present.
        return Ok(());
    }
    let blocks = metadata.size.div_ceil(metadata.block_size);
    let mut entries = vec![0u64; metadata.entries() as usize];
    for block in 0..blocks {
        let state = if options.fixed {
            State::Full(layout.blocks + block * metadata.block_size)
        } else {
            State::Zero
        };
        if let Some(entry) = entries.get_mut(metadata.entry_of(block)) {
            *entry = state.entry();
        }
    }
    let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
    if !bytes.is_empty() {
        medium.write(layout.bat, IoBuf::from_slice(&bytes)).await?;
    }
    Ok(())
}

async fn write_headers(medium: &dyn Medium, layout: &Layout) -> Result<()> {
    let region = |id, offset, length: u64| Region {
        id,
        offset,
        length: length as u32,
        required: true,
    };
    let regions = encode_regions(&[
        region(BAT_REGION, layout.bat, layout.bat_length),
        region(METADATA_REGION, layout.metadata, METADATA_SIZE),
    ]);
    for place in REGION_TABLES {
        medium.write(place, IoBuf::from_slice(&regions)).await?;
    }
    let mut header = Header {
        sequence: 0,
        file_write: random_uuid(true),
        data_write: random_uuid(true),
        log: [0; 16],
        log_version: 0,
        log_length: layout.log_length as u32,
        log_offset: MIB,
    };
    for place in HEADERS {
        let bytes = IoBuf::from_slice(&header.encode());
        medium.write(place, bytes).await?;
        header.sequence += 1;
    }
    medium.flush().await?;
    // What makes it an image comes last.
    let mut identifier = vec![0; 520];
    identifier[..8].copy_from_slice(b"vhdxfile");
    for (n, unit) in "Corten".encode_utf16().enumerate() {
        identifier[8 + 2 * n..10 + 2 * n].copy_from_slice(&unit.to_le_bytes());
    }
    medium.write(0, IoBuf::from_slice(&identifier)).await?;
    medium.flush().await
}

/// The size in bytes of the file: with `blocks` blocks in use, and with all of them.
///
/// # Errors
///
/// If the options do not go together.
pub fn measure(options: &CreateOptions, blocks: u64) -> Result<(u64, u64)> {
    let metadata = metadata_of(options)?;
    let layout = Layout::new(options, &metadata)?;
    let all = metadata.size.div_ceil(metadata.block_size);
    let with = |blocks: u64| layout.blocks + blocks * metadata.block_size;
    let stored = if options.fixed { all } else { blocks.min(all) };
    Ok((with(stored), with(all)))
}
