//! The PVH entry (Xen's `docs/misc/pvh.pandoc`, and `start_info.h` of its public headers).

use guest_memory::GuestMemory;

use super::initial_state::Entry;
use super::{BootInfo, CMDLINE, CMDLINE_MAX, LoadError, load_initrd, write_command_line};

/// Guest-physical address of the start info, which its module list and memory map follow.
const START_INFO: u64 = 0x6000;
const MAGIC: u32 = 0x336e_c578;
const START_INFO_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;
const MEMORY_ENTRY_SIZE: usize = 24;
const VERSION: u32 = 1;

/// Writes the start info and enters the kernel.
pub(super) fn enter(
    memory: &GuestMemory,
    entry: u32,
    kernel_end: u64,
    info: &BootInfo<'_>,
) -> Result<Entry, LoadError> {
    write_command_line(memory, info.append, CMDLINE_MAX - 1)?;
    let (initrd, initrd_size) = load_initrd(memory, info, kernel_end, u64::from(u32::MAX))?;
    let modules = START_INFO + START_INFO_SIZE;
    let memory_map = modules + MODULE_SIZE;
    let entries = info.map.e820();

    let mut bytes = Vec::new();
    let mut word = |value: u64, size: usize| bytes.extend(&value.to_le_bytes()[..size]);
    word(u64::from(MAGIC), 4);
    word(u64::from(VERSION), 4);
    word(0, 4); // flags
    word(u64::from(initrd_size != 0), 4);
    word(modules, 8);
    word(CMDLINE, 8);
    word(info.rsdp, 8);
    word(memory_map, 8);
    word(entries.len() as u64, 4);
    word(0, 4);
    // The one module: address, size, its command line (none), reserved.
    word(initrd, 8);
    word(initrd_size, 8);
    word(0, 8);
    word(0, 8);
    for entry in entries {
        word(entry.base, 8);
        word(entry.size, 8);
        word(entry.kind as u64, 4);
        word(0, 4);
    }
    debug_assert_eq!(
        bytes.len(),
        (START_INFO_SIZE + MODULE_SIZE) as usize + entries.len() * MEMORY_ENTRY_SIZE
    );
    memory.load(START_INFO, &bytes)?;
    Ok(Entry::pvh(memory, u64::from(entry), START_INFO)?)
}
