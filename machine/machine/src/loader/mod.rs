//! Booting a kernel without firmware.
//!
//! A bzImage's payload is decompressed by the host and entered at its 64-bit entry point (Linux `Documentation/arch/x86/boot.rst`,
//! "64-bit boot protocol"); an image whose payload is not a 64-bit ELF file is entered by the 32-bit boot protocol and
//! decompresses itself. An ELF file is entered by PVH when it carries the note for it, else at its 64-bit entry point.

mod boot_params;
mod bzimage;
mod cache;
mod decompress;
mod elf;
mod initial_state;
mod pvh;

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use guest_memory::{GuestMemory, MemoryError};
use x86_defs::state::VcpuState;

pub use cache::KernelCache;
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

/// An open file with its name, for messages.
struct Image {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Image {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let error = |source| LoadError::File {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(error)?;
        let data = file.metadata().map_err(error)?;
        if data.is_dir() {
            return Err(error(std::io::ErrorKind::IsADirectory.into()));
        }
        let length = data.len();
        if length > MAX_FILE {
            return Err(error(std::io::Error::other("larger than 2 GiB")));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
        })
    }

    fn bad(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Kernel {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    fn failed(&self, source: std::io::Error) -> LoadError {
        LoadError::File {
            path: self.path.clone(),
            source,
        }
    }

    /// The bytes of a range that lies inside the file.
    fn bytes(&self, range: Range<u64>) -> Result<Vec<u8>, LoadError> {
        let mut data = vec![0; (range.end - range.start) as usize];
        self.file
            .read_exact_at(&mut data, range.start)
            .map_err(|e| self.failed(e))?;
        Ok(data)
    }
}

impl elf::Source for Image {
    fn len(&self) -> u64 {
        self.length
    }

    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, String> {
        let mut bytes = vec![0; len];
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|_| "truncated ELF file".to_owned())?;
        Ok(bytes.into())
    }
}

/// A kernel's ELF file.
enum Vmlinux {
    /// In memory, decompressed just now; with the digest under which it is to be kept.
    Unpacked(Vec<u8>, Option<cache::Digest>),
    /// A file that nobody else changes.
    Cached(File),
    /// The file that was given.
    Given,
}

/// What there is to load, and by which protocol it is entered.
enum Form {
    /// An ELF file as it is.
    Elf(elf::Kernel),
    /// A bzImage whose payload is entered in 64-bit mode.
    Unpacked(boot_params::SetupHeader, elf::Kernel),
    /// A bzImage that decompresses itself: its protected-mode code.
    Packed(boot_params::SetupHeader, Vec<u8>),
}

/// A kernel that has been read, decompressed and looked at, before there is a machine to put it into.
pub struct PreparedKernel {
    image: Image,
    form: Form,
    vmlinux: Vmlinux,
    cache: Option<KernelCache>,
}

impl PreparedKernel {
    /// Reads a kernel. A compressed one is taken out of the cache when it is there.
    ///
    /// # Errors
    /// When the file is missing, broken or too large.
    pub fn read(path: &Path, cache: Option<&KernelCache>) -> Result<Self, LoadError> {
        let image = Image::open(path)?;
        if image.length == 0 {
            return Err(image.bad("an empty file, expected a bzImage or an ELF kernel"));
        }
        let head = image.bytes(0..image.length.min(bzimage::HEAD as u64))?;
        let (form, vmlinux) = if head.starts_with(elf::MAGIC) {
            let kernel = elf::Kernel::parse(&image).map_err(|why| image.bad(why))?;
            (Form::Elf(kernel), Vmlinux::Given)
        } else {
            let setup = bzimage::parse(&head, image.length).map_err(|why| image.bad(why))?;
            bz_image(&image, setup, cache)?
        };
        Ok(Self {
            image,
            form,
            vmlinux,
            cache: cache.cloned(),
        })
    }

    /// Puts the kernel and what belongs to it into memory; returns how the bootstrap processor starts.
    ///
    /// # Errors
    /// When it does not fit, or what belongs to it can't be had.
    pub fn load(&self, memory: &GuestMemory, info: &BootInfo<'_>) -> Result<Entry, LoadError> {
        match &self.form {
            Form::Elf(kernel) => {
                let loaded = self.load_elf(memory, kernel, info.map)?;
                match kernel.pvh_entry {
                    Some(entry) => pvh::enter(memory, entry, loaded.end, info),
                    None => {
                        let setup = boot_params::SetupHeader::for_elf();
                        boot_params::enter_64(memory, &setup, loaded, info)
                    }
                }
            }
            Form::Unpacked(setup, kernel) => {
                let loaded = self.load_elf(memory, kernel, info.map)?;
                boot_params::enter_64(memory, setup, loaded, info)
            }
            Form::Packed(setup, code) => {
                boot_params::enter_32(memory, &self.image.path, setup, code, info)
            }
        }
    }

    /// Puts a kernel that was decompressed into the cache, on a thread of its own. What can't be kept is decompressed
    /// again the next time.
    pub fn keep(self) {
        let (Vmlinux::Unpacked(bytes, Some(digest)), Some(cache)) = (self.vmlinux, self.cache)
        else {
            return;
        };
        let _ = std::thread::Builder::new()
            .name("kernel-cache".into())
            .spawn(move || cache.keep(&digest, &bytes));
    }

    fn load_elf(
        &self,
        memory: &GuestMemory,
        kernel: &elf::Kernel,
        map: &MemoryMap,
    ) -> Result<Loaded, LoadError> {
        let image = &self.image;
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
            let (at, range) = (segment.address, segment.file.clone());
            let length = (range.end - range.start) as usize;
            match &self.vmlinux {
                Vmlinux::Unpacked(data, _) => {
                    memory.load(at, &data[range.start as usize..range.end as usize])?;
                }
                Vmlinux::Cached(file) => memory.load_file(at, length, file, range.start)?,
                // It may be built anew at any time, so what runs must be a copy.
                Vmlinux::Given => memory.load(at, &image.bytes(range)?)?,
            }
            end = end.max(past);
        }
        Ok(Loaded {
            entry: kernel.entry,
            end,
        })
    }
}

/// Finds or decompresses what is in a bzImage.
fn bz_image(
    image: &Image,
    setup: boot_params::SetupHeader,
    cache: Option<&KernelCache>,
) -> Result<(Form, Vmlinux), LoadError> {
    let payload = bzimage::payload(&setup, image.length).map_err(|why| image.bad(why))?;
    if let Some(range) = payload {
        let length = range.end - range.start;
        let digest = cache
            .map(|_| cache::digest(&image.file, range.start, length))
            .transpose()
            .map_err(|e| image.failed(e))?;
        if let Some(file) = digest.and_then(|digest| cache?.find(&digest)) {
            let length = file.metadata().map_err(|e| image.failed(e))?.len();
            let cached = Image {
                path: image.path.clone(),
                file,
                length,
            };
            let kernel = elf::Kernel::parse(&cached).map_err(|why| image.bad(why))?;
            return Ok((Form::Unpacked(setup, kernel), Vmlinux::Cached(cached.file)));
        }
        let packed = image.bytes(range)?;
        if let Some(data) = bzimage::unpack(&packed).map_err(|why| image.bad(why))? {
            let kernel = elf::Kernel::parse(&data[..]).map_err(|why| image.bad(why))?;
            if kernel.is_64 {
                return Ok((
                    Form::Unpacked(setup, kernel),
                    Vmlinux::Unpacked(data, digest),
                ));
            }
        }
    }
    let code = image.bytes(bzimage::code_offset(&setup)..image.length)?;
    Ok((Form::Packed(setup, code), Vmlinux::Given))
}

/// Where a kernel lies.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    /// Guest-physical address of its first instruction.
    entry: u64,
    /// Just past its last byte, zeroed memory included.
    end: u64,
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
    let size = image.length;
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
    memory.load(address, &image.bytes(0..size)?)?;
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

/// Does what firmware does to the local APIC of every processor where there are APIC IDs above 254: it is in x2APIC mode
/// (SDM volume 3, section 12.12.1), as an operating system takes such IDs from the tables only when it finds that mode on.
pub fn enable_x2apic(state: &mut VcpuState, apic_id: u32) {
    const ENABLED_X2APIC: u64 = 1 << 11 | 1 << 10;
    /// The local APIC ID register, all 32 bits of which are the ID in this mode.
    const ID: Range<usize> = 0x20..0x24;
    state.system.apic_base |= ENABLED_X2APIC;
    if let Some(register) = state.lapic.get_mut(ID) {
        register.copy_from_slice(&apic_id.to_le_bytes());
    }
}

/// Puts a vCPU that has been reset into the state in which the kernel starts.
pub fn prepare(state: &mut VcpuState, entry: &Entry) {
    entry.apply(state);
}
