//! Linux's boot parameters, the "zero page" (Linux `Documentation/arch/x86/zero-page.rst` and `boot.rst`).

use std::path::Path;

use guest_memory::GuestMemory;

use super::bzimage::HEADER;
use super::initial_state::Entry;
use super::{BootInfo, CMDLINE, LOWEST, LoadError, Loaded, load_initrd, write_command_line};

/// Guest-physical address of the boot parameters.
const ZERO_PAGE: u64 = 0x7000;
/// Offsets in the zero page.
const ACPI_RSDP_ADDR: usize = 0x70;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;
/// "Undefined" boot loader.
const LOADER_TYPE: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 1 << 7;

/// The setup header, from its first byte at offset 0x1f1 of image and zero page.
pub(super) struct SetupHeader(Vec<u8>);

impl SetupHeader {
    pub(super) fn from_image(bytes: &[u8]) -> Self {
        let mut header = bytes.to_vec();
        header.resize(0x290 - HEADER, 0);
        Self(header)
    }

    /// What a boot loader gives a kernel that has no header of its own.
    pub(super) fn for_elf() -> Self {
        let mut setup = Self(vec![0; 0x290 - HEADER]);
        setup.put(0x1fe, &0xaa55u16.to_le_bytes());
        setup.put(0x202, b"HdrS");
        setup.put(0x206, &0x20fu16.to_le_bytes());
        setup.put(0x211, &[LOADED_HIGH]);
        setup.put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        setup.put(0x230, &0x100_0000u32.to_le_bytes());
        setup.put(0x238, &2047u32.to_le_bytes());
        setup
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at - HEADER..][..bytes.len()].copy_from_slice(bytes);
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at - HEADER], self.0[at - HEADER + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    pub(super) fn setup_sectors(&self) -> u8 {
        self.0[0]
    }
    pub(super) fn version(&self) -> u16 {
        self.u16(0x206)
    }
    pub(super) fn load_flags(&self) -> u8 {
        self.0[0x211 - HEADER]
    }
    pub(super) fn payload_offset(&self) -> u32 {
        self.u32(0x248)
    }
    pub(super) fn payload_length(&self) -> u32 {
        self.u32(0x24c)
    }
    fn initrd_max(&self) -> u64 {
        u64::from(self.u32(0x22c))
    }
    fn command_line_max(&self) -> usize {
        self.u32(0x238) as usize
    }
    /// Memory that the kernel needs from where it starts until it has set itself up, in bytes.
    fn init_size(&self) -> u64 {
        u64::from(self.u32(0x260))
    }
}

/// Writes the zero page, command line and initial RAM disk. `lowest` is the first free byte above the kernel.
fn write(
    memory: &GuestMemory,
    setup: &SetupHeader,
    lowest: u64,
    info: &BootInfo<'_>,
) -> Result<(), LoadError> {
    write_command_line(memory, info.append, setup.command_line_max())?;
    let (initrd, initrd_size) = load_initrd(memory, info, lowest, setup.initrd_max())?;
    let mut page = vec![0u8; 4096];
    page[HEADER..HEADER + setup.0.len()].copy_from_slice(&setup.0);
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x210, &[LOADER_TYPE]);
    put(0x211, &[setup.load_flags() & !CAN_USE_HEAP]);
    put(0x218, &(initrd as u32).to_le_bytes());
    put(0x21c, &(initrd_size as u32).to_le_bytes());
    put(0x228, &(CMDLINE as u32).to_le_bytes());
    put(ACPI_RSDP_ADDR, &info.rsdp.to_le_bytes());
    let entries = info.map.e820();
    let count = entries.len().min(E820_MAX);
    put(E820_ENTRIES, &[count as u8]);
    for (n, entry) in entries.iter().take(count).enumerate() {
        let at = E820_TABLE + n * 20;
        put(at, &entry.base.to_le_bytes());
        put(at + 8, &entry.size.to_le_bytes());
        put(at + 16, &(entry.kind as u32).to_le_bytes());
    }
    memory.load(ZERO_PAGE, &page)?;
    Ok(())
}

/// Enters a loaded kernel by the 64-bit boot protocol.
pub(super) fn enter_64(
    memory: &GuestMemory,
    setup: &SetupHeader,
    loaded: Loaded,
    info: &BootInfo<'_>,
) -> Result<Entry, LoadError> {
    // The kernel builds its first page tables behind itself; init_size covers them.
    let lowest = loaded
        .end
        .max(loaded.entry.saturating_add(setup.init_size()));
    write(memory, setup, lowest, info)?;
    Ok(Entry::long_mode(memory, loaded.entry, ZERO_PAGE)?)
}

/// Loads the protected-mode code at 1 MiB and enters it by the 32-bit boot protocol.
pub(super) fn enter_32(
    memory: &GuestMemory,
    path: &Path,
    setup: &SetupHeader,
    code: &[u8],
    info: &BootInfo<'_>,
) -> Result<Entry, LoadError> {
    let needed = LOWEST + setup.init_size().max(code.len() as u64) + (16 << 20);
    if needed > info.map.low_end() {
        return Err(LoadError::TooSmall {
            path: path.to_owned(),
            what: "the kernel",
            needed,
            available: info.map.low_end(),
        });
    }
    memory.load(LOWEST, code)?;
    write(memory, setup, needed, info)?;
    Ok(Entry::protected_mode(memory, LOWEST, ZERO_PAGE)?)
}
