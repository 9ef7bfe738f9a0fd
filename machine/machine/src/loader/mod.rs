//! Booting a kernel without firmware.
//!
//! A bzImage's payload is decompressed by the host and entered at its 64-bit entry point (Linux `Documentation/arch/x86/boot.rst`,
//! "64-bit boot protocol"); an image whose payload is not a 64-bit ELF file is entered by the 32-bit boot protocol and
//! decompresses itself. An ELF file is entered by PVH when it carries the note for it, else at its 64-bit entry point.

mod boot_params;
mod bzimage;
mod decompress;
mod elf;
mod initial_state;
mod pvh;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use guest_memory::{GuestMemory, MemoryError};
use x86_defs::state::VcpuState;

pub use initial_state::Entry;

use crate::memory_map::MemoryMap;

/// Largest kernel or initial RAM disk that is read, in bytes: what fits below 4 GiB with room to spare.
const MAX_FILE: u64 = 2 << 30;
/// Guest-physical address of the kernel command line.
const CMDLINE: u64 = 0x2_0000;
/// Longest command line in bytes, with its final zero: what stays below the area of the firmware tables.
const CMDLINE_MAX: usize = 0x1_0000;

/// Why a kernel can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file that can't be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A kernel that is none, or is broken.
    #[error("{}: {reason}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It does not fit in the guest's memory.
    #[error("{}: {what} needs {needed} bytes of memory where the guest has {available}", path.display())]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// A command line that is too long.
    #[error("--append: {length} bytes, at most {max} are possible")]
    CommandLine {
        /// Its length in bytes.
        length: usize,
        /// The most that the kernel takes.
        max: usize,
    },
    /// Guest memory refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What the kernel is told of the machine.
pub struct BootInfo<'a> {
    /// Command line.
    pub append: &'a str,
    /// Initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// Where memory is.
    pub map: &'a MemoryMap,
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp: u64,
}

/// A file's content with its name, for messages.
struct Image {
    path: PathBuf,
    data: Vec<u8>,
}

impl Image {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let error = |source| LoadError::File {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(error)?;
        let mut data = Vec::new();
        let read = file
            .take(MAX_FILE + 1)
            .read_to_end(&mut data)
            .map_err(error)?;
        if read as u64 > MAX_FILE {
            return Err(error(std::io::Error::other("larger than 2 GiB")));
        }
        Ok(Self {
            path: path.to_owned(),
            data,
        })
    }

    fn bad(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Kernel {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }
}

/// Loads a kernel and what belongs to it; returns how the bootstrap processor starts.
///
/// # Errors
/// When a file is missing, broken or too large, before the guest runs.
pub fn load(memory: &GuestMemory, kernel: &Path, info: &BootInfo<'_>) -> Result<Entry, LoadError> {
    let image = Image::open(kernel)?;
    if image.data.is_empty() {
        return Err(image.bad("an empty file, expected a bzImage or an ELF kernel"));
    }
    if image.data.starts_with(elf::MAGIC) {
        let kernel = elf::Kernel::parse(&image.data).map_err(|why| image.bad(why))?;
        let loaded = load_elf(memory, &image, &image.data, &kernel, info.map)?;
        return match kernel.pvh_entry {
            Some(entry) => pvh::enter(memory, entry, loaded.end, info),
            None => {
                let setup = boot_params::SetupHeader::for_elf();
                boot_params::enter_64(memory, &setup, loaded, info)
            }
        };
    }
    let setup = bzimage::parse(&image.data).map_err(|why| image.bad(why))?;
    let payload = bzimage::payload(&image.data, &setup).map_err(|why| image.bad(why))?;
    if let Some(vmlinux) = payload {
        let kernel = elf::Kernel::parse(&vmlinux).map_err(|why| image.bad(why))?;
        if kernel.is_64 {
            let loaded = load_elf(memory, &image, &vmlinux, &kernel, info.map)?;
            return boot_params::enter_64(memory, &setup, loaded, info);
        }
    }
    let code = bzimage::protected_mode_code(&image.data, &setup);
    boot_params::enter_32(memory, &image.path, &setup, code, info)
}

/// Where a kernel lies.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    /// Guest-physical address of its first instruction.
    entry: u64,
    /// Just past its last byte, zeroed memory included.
    end: u64,
}

fn load_elf(
    memory: &GuestMemory,
    image: &Image,
    data: &[u8],
    kernel: &elf::Kernel,
    map: &MemoryMap,
) -> Result<Loaded, LoadError> {
    let mut end = 0;
    for segment in &kernel.segments {
        let past = segment.address.saturating_add(segment.memory_size);
        if past > map.low_end() {
            return Err(LoadError::TooSmall {
                path: image.path.clone(),
                what: "the kernel",
                needed: past,
                available: map.low_end(),
            });
        }
        if segment.address < LOWEST {
            return Err(image.bad(format!(
                "a segment at {:#x}, expected all at {LOWEST:#x} or above",
                segment.address
            )));
        }
        // What lies past the file's bytes is zero already: guest memory starts so.
        memory.load(segment.address, &data[segment.file.clone()])?;
        end = end.max(past);
    }
    Ok(Loaded {
        entry: kernel.entry,
        end,
    })
}

/// Below this address lie the boot parameters and firmware tables.
const LOWEST: u64 = 0x10_0000;

/// Writes the command line; `max` is the most bytes that the kernel takes, without the final zero.
fn write_command_line(memory: &GuestMemory, append: &str, max: usize) -> Result<(), LoadError> {
    let max = max.min(CMDLINE_MAX - 1);
    if append.len() > max {
        return Err(LoadError::CommandLine {
            length: append.len(),
            max,
        });
    }
    let mut line = append.as_bytes().to_vec();
    line.push(0);
    memory.load(CMDLINE, &line)?;
    Ok(())
}

/// Loads the initial RAM disk as high as it may lie, on a page boundary; returns its address and size.
fn load_initrd(
    memory: &GuestMemory,
    info: &BootInfo<'_>,
    lowest: u64,
    highest: u64,
) -> Result<(u64, u64), LoadError> {
    let Some(path) = info.initrd else {
        return Ok((0, 0));
    };
    let image = Image::open(path)?;
    let size = image.data.len() as u64;
    let top = info.map.low_end().min(highest.saturating_add(1));
    let address = top.saturating_sub(size) & !0xfff;
    if size == 0 {
        return Err(image.bad("an empty file, expected an initial RAM disk"));
    }
    if address < lowest {
        return Err(LoadError::TooSmall {
            path: image.path,
            what: "the initial RAM disk",
            needed: size,
            available: top.saturating_sub(lowest),
        });
    }
    memory.load(address, &image.data)?;
    Ok((address, size))
}

/// Does what firmware does to the memory types of every processor before a kernel starts: MTRRs are on, and memory is
/// write-back where page tables say nothing else (SDM volume 3, section 13.11.2.1). Linux leaves the page attribute
/// table off where it finds MTRRs off.
pub fn set_memory_types(state: &mut VcpuState) {
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    state.msrs.retain(|(msr, _)| *msr != MTRR_DEF_TYPE);
    state.msrs.push((MTRR_DEF_TYPE, ENABLED_WRITE_BACK));
}

/// Puts a vCPU that has been reset into the state in which the kernel starts.
pub fn prepare(state: &mut VcpuState, entry: &Entry) {
    entry.apply(state);
}
