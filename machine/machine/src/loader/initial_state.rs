//! Processor states in which kernels are entered.

use guest_memory::{GuestMemory, MemoryError};
use x86_defs::control::{Cr0, Cr4, Efer, Rflags};
use x86_defs::state::{
    CS, DS, DescriptorTable, ES, FS, GS, MpState, RBX, RSI, RSP, SS, Segment, VcpuState,
};

/// Guest-physical addresses of the first descriptor table, page tables and stack.
const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const STACK: u64 = 0x8ff0;
/// Selectors that the boot protocols ask for.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;
/// Flat segments: limit 4 GiB, present, ring 0 (SDM volume 3, section 3.4.5).
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x0000_8b00_0000_0067;
/// Page-table entry bits.
const PRESENT_WRITE: u64 = 3;
const LARGE: u64 = 1 << 7;

/// How the bootstrap processor starts.
#[derive(Debug, Clone)]
pub struct Entry {
    rip: u64,
    /// General register and value that name the boot information.
    argument: (usize, u64),
    long: bool,
}

impl Entry {
    /// Long mode with the first 4 GiB mapped to themselves, RSI naming the boot parameters.
    pub(super) fn long_mode(
        memory: &GuestMemory,
        rip: u64,
        boot_params: u64,
    ) -> Result<Self, MemoryError> {
        write_gdt(memory, CODE_64)?;
        write_page_tables(memory)?;
        Ok(Self {
            rip,
            argument: (RSI, boot_params),
            long: true,
        })
    }

    /// Protected mode without paging, ESI naming the boot parameters.
    pub(super) fn protected_mode(
        memory: &GuestMemory,
        rip: u64,
        boot_params: u64,
    ) -> Result<Self, MemoryError> {
        write_gdt(memory, CODE_32)?;
        Ok(Self {
            rip,
            argument: (RSI, boot_params),
            long: false,
        })
    }

    /// Protected mode without paging, EBX naming the start info.
    pub(super) fn pvh(
        memory: &GuestMemory,
        rip: u64,
        start_info: u64,
    ) -> Result<Self, MemoryError> {
        write_gdt(memory, CODE_32)?;
        Ok(Self {
            rip,
            argument: (RBX, start_info),
            long: false,
        })
    }

    /// Changes the reset state of a vCPU into that of the entry.
    pub(super) fn apply(&self, state: &mut VcpuState) {
        let registers = &mut state.registers;
        registers.gpr = [0; 16];
        registers.gpr[RSP] = STACK;
        registers.gpr[self.argument.0] = self.argument.1;
        registers.rip = self.rip;
        registers.rflags = Rflags::FIXED.bits();
        let system = &mut state.system;
        for index in [ES, SS, DS, FS, GS] {
            system.segments[index] = segment(BOOT_DS, DATA);
        }
        let code = if self.long { CODE_64 } else { CODE_32 };
        system.segments[CS] = segment(BOOT_CS, code);
        system.tr = segment(BOOT_TSS, TSS);
        system.gdtr = DescriptorTable {
            base: GDT,
            limit: 5 * 8 - 1,
        };
        system.idtr = DescriptorTable { base: 0, limit: 0 };
        system.cr0 = (Cr0::PE | Cr0::ET).bits();
        if self.long {
            system.cr0 |= Cr0::PG.bits();
            system.cr3 = PML4;
            system.cr4 = Cr4::PAE.bits();
            system.efer = (Efer::LME | Efer::LMA).bits();
        }
        state.mp_state = MpState::Runnable;
    }
}

/// The hidden part of a segment register for a flat descriptor.
fn segment(selector: u16, descriptor: u64) -> Segment {
    let limit = (descriptor & 0xffff | (descriptor >> 32) & 0xf_0000) as u32;
    let attributes = (descriptor >> 40) as u32 & 0xf0ff;
    let granular = attributes & 1 << 15 != 0;
    Segment {
        selector,
        base: 0,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        attributes,
    }
}

fn write_words(memory: &GuestMemory, at: u64, words: &[u64]) -> Result<(), MemoryError> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    memory.load(at, &bytes)
}

fn write_gdt(memory: &GuestMemory, code: u64) -> Result<(), MemoryError> {
    write_words(memory, GDT, &[0, 0, code, DATA, TSS])
}

/// Maps the first 4 GiB to themselves in pages of 2 MiB (SDM volume 3, section 5.5).
fn write_page_tables(memory: &GuestMemory) -> Result<(), MemoryError> {
    let pdpt = PML4 + 0x1000;
    let first_directory = pdpt + 0x1000;
    write_words(memory, PML4, &[pdpt | PRESENT_WRITE])?;
    let directories: Vec<u64> = (0..4)
        .map(|n| (first_directory + n * 0x1000) | PRESENT_WRITE)
        .collect();
    write_words(memory, pdpt, &directories)?;
    let pages: Vec<u64> = (0..4 * 512)
        .map(|n| (n << 21) | LARGE | PRESENT_WRITE)
        .collect();
    write_words(memory, first_directory, &pages)
}
