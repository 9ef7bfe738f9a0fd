//! What lies where a BIOS's entry would be. Systems that want a reset and know no other way jump there in real mode (Linux's `reboot=bios`, which it
//! takes by itself where ACPI has no fixed hardware).

use guest_memory::{GuestMemory, MemoryError};

/// Linear address of F000:FFE0, with the code, and of F000:FFF0, the entry.
const CODE: u64 = 0xf_ffe0;
const ENTRY: u64 = 0xf_fff0;

/// Asks port CF9h for a reset, and where there is none shuts the processor down by a triple fault: a breakpoint without an interrupt table.
const RESET: [u8; 13] = [
    0xb0, 0x0e, // mov al, 0Eh
    0xba, 0xf9, 0x0c, // mov dx, 0CF9h
    0xee, // out dx, al
    0x2e, 0x0f, 0x01, 0x1e, 0xf2, 0xff, // lidt cs:[FFF2h], which is zero
    0xcc, // int3
];
/// `jmp short FFE0h`, and a limit and base of zero.
const JUMP: [u8; 8] = [0xeb, 0xee, 0, 0, 0, 0, 0, 0];

/// Writes it.
///
/// # Errors
/// When there is no memory.
pub fn write(memory: &GuestMemory) -> Result<(), MemoryError> {
    memory.load(CODE, &RESET)?;
    memory.load(ENTRY, &JUMP)
}
