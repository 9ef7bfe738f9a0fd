//! Processor states in which loaders and tests enter a guest: flat segments in one of the modes, everything else as after
//! reset.

use x86_defs::control::{Cr0, Cr4, Efer, Rflags};
use x86_defs::state::{CS, MpState, Segment, VcpuState};

/// Selector of the code segment of [`GDT`].
pub const CODE: u16 = 0x08;
/// Selector of the data segment of [`GDT`].
pub const DATA: u16 = 0x10;

/// A descriptor table for 64-bit mode, as it stands in memory: null, 64-bit code, data.
pub const GDT: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Type "execute, read, accessed", S, present.
const CODE_ATTRIBUTES: u32 = 0x9b;
/// Type "read, write, accessed", S, present.
const DATA_ATTRIBUTES: u32 = 0x93;
/// D/B: 32-bit.
const BIG: u32 = 1 << 14;
/// L: 64-bit code.
const LONG: u32 = 1 << 13;
/// G: the limit counts pages.
const PAGES: u32 = 1 << 15;

fn set_segments(state: &mut VcpuState, code: Segment, data: Segment) {
    state.system.segments = [data; 6];
    state.system.segments[CS] = code;
}

fn start(state: &mut VcpuState, rip: u64, rsp: u64) {
    state.registers.rip = rip;
    state.registers.gpr[x86_defs::state::RSP] = rsp;
    state.registers.rflags = Rflags::FIXED.bits();
    state.mp_state = MpState::Runnable;
}

/// Real mode at `segment`:`ip`, all data segments zero.
pub fn real_mode(state: &mut VcpuState, segment: u16, ip: u16, sp: u16) {
    let code = Segment {
        selector: segment,
        base: u64::from(segment) << 4,
        limit: 0xffff,
        attributes: CODE_ATTRIBUTES,
    };
    let data = Segment {
        selector: 0,
        base: 0,
        limit: 0xffff,
        attributes: DATA_ATTRIBUTES,
    };
    set_segments(state, code, data);
    start(state, ip.into(), sp.into());
}

/// 32-bit protected mode without paging, flat segments with the selectors [`CODE`] and [`DATA`]; no descriptor table is set.
pub fn protected_mode(state: &mut VcpuState, eip: u32, esp: u32) {
    state.system.cr0 = (Cr0::PE | Cr0::ET | Cr0::NE).bits();
    set_segments(
        state,
        flat(CODE, CODE_ATTRIBUTES | BIG | PAGES),
        flat(DATA, DATA_ATTRIBUTES | BIG | PAGES),
    );
    start(state, eip.into(), esp.into());
}

/// 64-bit mode in ring 0, paging by the tables at `cr3`, SSE enabled, the descriptor table [`GDT`] expected at `gdt`.
pub fn long_mode(state: &mut VcpuState, cr3: u64, gdt: u64, rip: u64, rsp: u64) {
    let system = &mut state.system;
    system.cr0 = (Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG).bits();
    system.cr3 = cr3;
    system.cr4 = (Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT).bits();
    system.efer = (Efer::LME | Efer::LMA | Efer::NXE | Efer::SCE).bits();
    system.gdtr.base = gdt;
    system.gdtr.limit = (size_of_val(&GDT) - 1) as u16;
    set_segments(
        state,
        flat(CODE, CODE_ATTRIBUTES | LONG | PAGES),
        flat(DATA, DATA_ATTRIBUTES | BIG | PAGES),
    );
    start(state, rip, rsp);
}

fn flat(selector: u16, attributes: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    }
}
