//! Making new disks.

use std::rc::Rc;

use block::{BlockError, ImplicitFile, IoBuf, Medium, OpenGate, Result};

use super::descriptor::NO_PARENT;
use super::header::{Family, SECTOR, SparseHeader};
use super::parent::read_cid;
use crate::identity::random_bytes;
use crate::qcow2::Preallocation;

/// How a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Subformat {
    /// One file with grains and the descriptor.
    #[default]
    MonolithicSparse,
    /// A descriptor, and one file with all data.
    MonolithicFlat,
    /// A descriptor, and files with grains for 2 GiB each.
    TwoGbMaxExtentSparse,
    /// A descriptor, and files with all data of 2 GiB each.
    TwoGbMaxExtentFlat,
    /// One file with compressed grains.
    StreamOptimized,
}

impl Subformat {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
    ];

    /// The name that the descriptor and people use.
    pub fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
        }
    }

    fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }

    /// The descriptor is in a file of its own.
    fn has_descriptor_file(self) -> bool {
        self.is_flat() || self.is_split()
    }
}

/// The controller that a disk is meant for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Adapter {
    /// IDE.
    #[default]
    Ide,
    /// LSI Logic.
    LsiLogic,
    /// BusLogic.
    BusLogic,
    /// That of old ESX versions.
    LegacyEsx,
}

impl Adapter {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ide, Self::LsiLogic, Self::BusLogic, Self::LegacyEsx];

    /// The name that the descriptor and people use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ide => "ide",
            Self::LsiLogic => "lsilogic",
            Self::BusLogic => "buslogic",
            Self::LegacyEsx => "legacyESX",
        }
    }
}

/// What a new disk is like.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// How it is stored.
    pub subformat: Subformat,
    /// What it is meant for.
    pub adapter: Adapter,
    /// The version of virtual hardware that it is meant for; 4 if none is given.
    pub hardware_version: Option<String>,
    /// The version of the guest tools; the largest number if none is given.
    pub tools_version: Option<String>,
    /// Hardware version 6.
    pub compat6: bool,
    /// Grains may be marked as zeroes.
    pub zeroed_grain: bool,
    /// The parent's name.
    pub parent: Option<String>,
    /// Reserve the space of a flat disk.
    pub preallocation: Preallocation,
}

const GRAIN: u64 = 64 << 10;
const TABLE_ENTRIES: u64 = 512;
/// The most of the disk that a file of a split disk holds.
const SPLIT: u64 = 2 << 30;
/// Room for the descriptor in a sparse extent.
const DESCRIPTOR_ROOM: u64 = 20 * SECTOR;
/// The most bytes that grain tables with 32-bit sector numbers can name.
const MAX_SPARSE: u64 = u32::MAX as u64 * SECTOR;

fn invalid(what: impl Into<String>) -> BlockError {
    BlockError::invalid_argument(what)
}

fn check(options: &CreateOptions) -> Result<()> {
    let subformat = options.subformat;
    if options.compat6 && options.hardware_version.is_some() {
        return Err(invalid("compat6 cannot be enabled with hwversion set"));
    }
    if subformat.is_flat() && options.parent.is_some() {
        return Err(invalid("Flat image can't have backing file"));
    }
    if subformat.is_flat() && options.zeroed_grain {
        return Err(invalid("Flat image can't enable zeroed grain"));
    }
    if !options.size.is_multiple_of(SECTOR) {
        return Err(invalid("the size must be a multiple of 512"));
    }
    let extent = if subformat.is_split() {
        SPLIT
    } else {
        options.size
    };
    if !subformat.is_flat() && extent > MAX_SPARSE - (MAX_SPARSE >> 10) {
        return Err(invalid("the disk is too large for one sparse extent"));
    }
    if options.size > 1 << 54 {
        return Err(invalid("the disk is too large"));
    }
    let versions = [&options.hardware_version, &options.tools_version];
    let quotes = |v: &&String| v.contains(['"', '\n', '\r']);
    if versions.into_iter().flatten().any(|v| quotes(&v)) {
        return Err(invalid("a version has no quotes in it"));
    }
    Ok(())
}

/// The sizes of the extents.
fn extents(options: &CreateOptions) -> Vec<u64> {
    if !options.subformat.is_split() {
        return vec![options.size];
    }
    let count = options.size.div_ceil(SPLIT).max(1);
    (0..count)
        .map(|n| SPLIT.min(options.size - n * SPLIT))
        .collect()
}

/// The names of the files beside the descriptor that a disk named `name` consists of; they are relative
/// to it.
pub fn files(options: &CreateOptions, name: &str) -> Vec<String> {
    if !options.subformat.has_descriptor_file() {
        return Vec::new();
    }
    let last = name.rsplit('/').next().unwrap_or(name);
    let (stem, extension) = match last.rfind('.') {
        Some(at) if at > 0 => last.split_at(at),
        _ => (last, ""),
    };
    if !options.subformat.is_split() {
        return vec![format!("{stem}-flat{extension}")];
    }
    let letter = if options.subformat.is_flat() {
        'f'
    } else {
        's'
    };
    (1..=extents(options).len())
        .map(|n| format!("{stem}-{letter}{n:03}{extension}"))
        .collect()
}

/// Where everything lies in a new sparse extent.
struct Layout {
    header: SparseHeader,
    tables: u64,
    table_size: u64,
    /// Where the tables of the directory and of its copy begin.
    first_tables: [u64; 2],
}

impl Layout {
    fn new(options: &CreateOptions, size: u64, descriptor: bool) -> Self {
        let compressed = options.subformat == Subformat::StreamOptimized;
        let tables = size.div_ceil(GRAIN).div_ceil(TABLE_ENTRIES);
        let table_size = TABLE_ENTRIES * 4;
        let directory_size = (tables * 4).next_multiple_of(SECTOR);
        let redundant = SECTOR + if descriptor { DESCRIPTOR_ROOM } else { 0 };
        let directory = redundant + directory_size + tables * table_size;
        let end = directory + directory_size + tables * table_size;
        let version = match (compressed, options.zeroed_grain) {
            (true, _) => 3,
            (false, true) => 2,
            (false, false) => 1,
        };
        Self {
            header: SparseHeader {
                family: Family::Hosted,
                version,
                capacity: size,
                grain: GRAIN,
                table_entries: TABLE_ENTRIES,
                directory,
                redundant: Some(redundant),
                descriptor: descriptor.then_some((SECTOR, DESCRIPTOR_ROOM)),
                zeroed: options.zeroed_grain,
                compressed,
                markers: compressed,
                data: end.next_multiple_of(GRAIN),
                tables: 0,
                grains: 0,
            },
            tables,
            table_size,
            first_tables: [directory + directory_size, redundant + directory_size],
        }
    }

    async fn write(&self, medium: &dyn Medium) -> Result<()> {
        medium.set_len(self.header.data).await?;
        let places = [self.header.directory, self.header.redundant.unwrap_or(0)];
        for (place, first) in places.into_iter().zip(self.first_tables) {
            let entry = |n: u64| ((first + n * self.table_size) / SECTOR) as u32;
            let directory: Vec<u8> = (0..self.tables)
                .flat_map(|n| entry(n).to_le_bytes())
                .collect();
            if !directory.is_empty() {
                medium.write(place, IoBuf::from_slice(&directory)).await?;
            }
        }
        medium.flush().await?;
        let header = IoBuf::from_slice(&self.header.encode());
        medium.write(0, header).await
    }
}

/// The descriptor's text.
fn text(options: &CreateOptions, name: &str, parent_cid: u32) -> String {
    let cid = loop {
        let cid = u32::from_le_bytes(random_bytes());
        if cid != NO_PARENT {
            break cid;
        }
    };
    let create_type = options.subformat.name();
    let mut text = format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={parent_cid:08x}\n\
         createType=\"{create_type}\"\n"
    );
    if let Some(parent) = &options.parent {
        text.push_str(&format!("parentFileNameHint=\"{parent}\"\n"));
    }
    text.push_str("\n# Extent description\n");
    let own = name.rsplit('/').next().unwrap_or(name).to_owned();
    let mut names = files(options, name);
    if names.is_empty() {
        names.push(own);
    }
    for (size, file) in extents(options).into_iter().zip(names) {
        let sectors = size / SECTOR;
        let line = if options.subformat.is_flat() {
            format!("RW {sectors} FLAT \"{file}\" 0\n")
        } else {
            format!("RW {sectors} SPARSE \"{file}\"\n")
        };
        text.push_str(&line);
    }
    let heads = if options.adapter == Adapter::Ide {
        16
    } else {
        255
    };
    let cylinders = options.size / (63 * heads * SECTOR);
    let hardware = options.hardware_version.as_deref();
    let hardware = hardware.unwrap_or(if options.compat6 { "6" } else { "4" });
    let tools = options.tools_version.as_deref().unwrap_or("2147483647");
    let adapter = options.adapter.name();
    text.push_str(&format!(
        "\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{hardware}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"63\"\nddb.adapterType = \"{adapter}\"\n\
         ddb.toolsVersion = \"{tools}\"\n"
    ));
    text
}

/// Makes a disk in `medium`, which is emptied, and in the files of [`files`], which are there and
/// empty. The parent is read from `parent_medium`.
///
/// # Errors
///
/// `InvalidArgument` for options that do not go together, or what the gate and the host report.
pub async fn create(
    medium: &Rc<dyn Medium>,
    options: &CreateOptions,
    parent_medium: Option<&dyn Medium>,
    gate: &dyn OpenGate,
) -> Result<()> {
    check(options)?;
    let parent_cid = match (parent_medium, &options.parent) {
        (Some(parent), Some(_)) => read_cid(parent).await.map_err(|_| {
            let name = parent.name();
            invalid(format!("the parent '{name}' must be a VMDK image"))
        })?,
        (None, None) => NO_PARENT,
        _ => return Err(invalid("a disk with a parent needs it")),
    };
    let name = medium.name();
    let text = text(options, &name, parent_cid);
    medium.set_len(0).await?;
    if !options.subformat.has_descriptor_file() {
        let layout = Layout::new(options, options.size, true);
        if text.len() as u64 > DESCRIPTOR_ROOM {
            return Err(invalid("the descriptor has no room for such long names"));
        }
        medium
            .write(SECTOR, IoBuf::from_slice(text.as_bytes()))
            .await?;
        layout.write(&**medium).await?;
        return medium.flush().await;
    }
    for (size, file) in extents(options).into_iter().zip(files(options, &name)) {
        let extent = gate.open_medium(&name, &file, ImplicitFile::Extent, true);
        let extent = extent.await?;
        if options.subformat.is_flat() {
            make_flat(&*extent, size, options.preallocation).await?;
        } else {
            Layout::new(options, size, false).write(&*extent).await?;
        }
        extent.flush().await?;
    }
    medium.write(0, IoBuf::from_slice(text.as_bytes())).await?;
    medium.flush().await
}

async fn make_flat(medium: &dyn Medium, size: u64, how: Preallocation) -> Result<()> {
    medium.set_len(size).await?;
    match how {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => medium.preallocate(0, size).await,
        Preallocation::Full => crate::vpc::write_full(medium, 0, size).await,
    }
}

/// The size in bytes of all files together: with the given extents of the disk stored, which are
/// sorted offsets and lengths, and with all of it. What compression will save is not known.
///
/// # Errors
///
/// If the options do not go together.
pub fn measure(options: &CreateOptions, stored: &[(u64, u64)]) -> Result<(u64, u64)> {
    check(options)?;
    if options.subformat.is_flat() {
        return Ok((options.size, options.size));
    }
    let mut metadata = 0;
    for size in extents(options) {
        let descriptor = !options.subformat.is_split();
        metadata += Layout::new(options, size, descriptor).header.data;
    }
    let (mut grains, mut next) = (0, 0);
    for (offset, length) in stored {
        let first = (offset / GRAIN).max(next);
        let end = (offset + length).div_ceil(GRAIN);
        grains += end.saturating_sub(first);
        next = next.max(end);
    }
    let all = options.size.div_ceil(GRAIN);
    Ok((metadata + grains.min(all) * GRAIN, metadata + all * GRAIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_after_the_descriptor() {
        let mut options = CreateOptions {
            size: 5 << 30,
            subformat: Subformat::TwoGbMaxExtentSparse,
            ..CreateOptions::default()
        };
        let names = files(&options, "/a.b/disk.vmdk");
        assert_eq!(
            names,
            ["disk-s001.vmdk", "disk-s002.vmdk", "disk-s003.vmdk"]
        );
        options.subformat = Subformat::MonolithicFlat;
        assert_eq!(files(&options, "x/disk"), ["disk-flat"]);
        options.subformat = Subformat::StreamOptimized;
        assert!(files(&options, "disk.vmdk").is_empty());
    }
}
