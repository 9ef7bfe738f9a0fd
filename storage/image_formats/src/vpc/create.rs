//! Making new disks.

use std::rc::Rc;

use block::{BlockError, IoBuf, Medium, Result};

use super::header::{
    DiskType, DynamicHeader, FOOTER_SIZE, Footer, Geometry, HEADER_SIZE, Locator, UNUSED,
    timestamp_now,
};
use super::{read_at, read_footer};
use crate::qcow2::Preallocation;

/// What a new disk is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// All data in order, or blocks as they are needed.
    pub fixed: bool,
    /// Keep the size as it is; without it the disk gets a geometry, and is a little larger.
    pub force_size: bool,
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
            force_size: false,
            parent: None,
            preallocation: Preallocation::Off,
        }
    }
}

const BLOCK_SIZE: u32 = 2 << 20;

/// What a differencing disk says of its parent.
struct Parent {
    uuid: [u8; 16],
    timestamp: u32,
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
    uuid: [u8; 16],
) -> Result<()> {
    let parent = match parent_medium {
        Some(parent) => {
            let footer = read_footer(parent).await.map_err(|_| {
                let name = parent.name();
                BlockError::invalid_argument(format!("the parent '{name}' must be a VHD"))
            })?;
            Some(Parent {
                uuid: footer.uuid,
                timestamp: footer.timestamp,
            })
        }
        None => None,
    };
    if options.parent.is_some() != parent.is_some() {
        return Err(BlockError::invalid_argument(
            "a differencing disk needs its parent",
        ));
    }
    if parent.is_some() && options.fixed {
        let message = "a fixed disk has no parent: leave out subformat=fixed or the backing file";
        return Err(BlockError::invalid_argument(message));
    }
    // A differencing disk has exactly its parent's size.
    let force = options.force_size || parent.is_some();
    let mut footer = Footer {
        features: 2,
        data_offset: if options.fixed {
            u64::MAX
        } else {
            FOOTER_SIZE as u64
        },
        timestamp: timestamp_now(),
        creator: if force { *b"qem2" } else { *b"qemu" },
        creator_version: 0x0005_0003,
        creator_os: *b"Wi2k",
        original_size: 0,
        current_size: 0,
        geometry: Geometry::largest(),
        disk_type: match (options.fixed, &parent) {
            (true, _) => DiskType::Fixed,
            (false, None) => DiskType::Dynamic,
            (false, Some(_)) => DiskType::Differencing,
        },
        uuid,
        saved_state: 0,
    };
    footer.original_size = footer.set_size(options.size, force)?;
    medium.set_len(0).await?;
    if options.fixed {
        create_fixed(&**medium, &footer, options.preallocation).await
    } else {
        create_dynamic(&**medium, &footer, options, parent).await
    }
}

async fn create_fixed(medium: &dyn Medium, footer: &Footer, how: Preallocation) -> Result<()> {
    let size = footer.size();
    medium.set_len(size + FOOTER_SIZE as u64).await?;
    match how {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => medium.preallocate(0, size).await?,
        Preallocation::Full => write_full(medium, 0, size).await?,
    }
    medium
        .write(size, IoBuf::from_slice(&footer.encode()))
        .await?;
    medium.flush().await
}

/// Writes zeroes as data.
pub(crate) async fn write_full(medium: &dyn Medium, start: u64, end: u64) -> Result<()> {
    let zeroes = IoBuf::zeroed(1 << 20);
    let mut at = start;
    while at < end {
        let length = (end - at).min(1 << 20);
        medium.write(at, zeroes.slice(0, length as usize)).await?;
        at += length;
    }
    Ok(())
}

async fn create_dynamic(
    medium: &dyn Medium,
    footer: &Footer,
    options: &CreateOptions,
    parent: Option<Parent>,
) -> Result<()> {
    let entries = footer.size().div_ceil(u64::from(BLOCK_SIZE)) as u32;
    let table_offset = (FOOTER_SIZE + HEADER_SIZE) as u64;
    let table_bytes = (u64::from(entries) * 4).next_multiple_of(512);
    let mut end = table_offset + table_bytes;
    let mut header = DynamicHeader {
        table_offset,
        entries,
        block_size: BLOCK_SIZE,
        parent_uuid: [0; 16],
        parent_timestamp: 0,
        parent_name: String::new(),
        locators: Vec::new(),
    };
    if let (Some(parent), Some(name)) = (parent, &options.parent) {
        header.parent_uuid = parent.uuid;
        header.parent_timestamp = parent.timestamp;
        header.parent_name = name.rsplit('/').next().unwrap_or(name).to_owned();
        // Both of Windows' kinds of names, in UTF-16LE with backslashes.
        let absolute = name.starts_with('/');
        let text = if absolute {
            name.clone()
        } else {
            format!("./{name}")
        };
        let kinds: &[&[u8; 4]] = if absolute {
            &[b"W2ku"]
        } else {
            &[b"W2ru", b"W2ku"]
        };
        for platform in kinds {
            let bytes: Vec<u8> = text
                .replace('/', "\\")
                .encode_utf16()
                .flat_map(u16::to_le_bytes)
                .collect();
            let space = bytes.len().next_multiple_of(512);
            let mut padded = bytes.clone();
            padded.resize(space, 0);
            medium.write(end, IoBuf::from_slice(&padded)).await?;
            header.locators.push(Locator {
                platform: **platform,
                space: space as u32,
                length: bytes.len() as u32,
                offset: end,
            });
            end += space as u64;
        }
    }
    let mut table = Vec::with_capacity(table_bytes as usize);
    table.resize(table_bytes as usize, 0xff);
    debug_assert_eq!(UNUSED, u32::MAX);
    medium
        .write(512, IoBuf::from_slice(&header.encode()))
        .await?;
    medium
        .write(table_offset, IoBuf::from_slice(&table))
        .await?;
    let footer = footer.encode();
    medium.write(end, IoBuf::from_slice(&footer)).await?;
    medium.flush().await?;
    medium.write(0, IoBuf::from_slice(&footer)).await?;
    medium.flush().await?;
    let written = read_at(medium, 0, FOOTER_SIZE).await?;
    Footer::parse(&written).map(|_| ())
}

/// The size in bytes of the file: with `blocks` blocks in use, and with all of them.
///
/// # Errors
///
/// If the disk is too large.
pub fn measure(options: &CreateOptions, blocks: u64) -> Result<(u64, u64)> {
    let geometry = Geometry::largest();
    let mut footer = Footer {
        features: 2,
        data_offset: 0,
        timestamp: 0,
        creator: if options.force_size {
            *b"qem2"
        } else {
            *b"qemu"
        },
        creator_version: 0,
        creator_os: *b"Wi2k",
        original_size: 0,
        current_size: 0,
        geometry,
        disk_type: DiskType::Dynamic,
        uuid: [0; 16],
        saved_state: 0,
    };
    let size = footer.set_size(options.size, options.force_size)?;
    if options.fixed {
        return Ok((size + 512, size + 512));
    }
    let entries = size.div_ceil(u64::from(BLOCK_SIZE));
    let metadata = 1536 + (entries * 4).next_multiple_of(512) + 512;
    let block = u64::from(BLOCK_SIZE) + 512;
    Ok((
        metadata + blocks.min(entries) * block,
        metadata + entries * block,
    ))
}

/// The block size of new disks in bytes.
pub const NEW_BLOCK_SIZE: u64 = BLOCK_SIZE as u64;
