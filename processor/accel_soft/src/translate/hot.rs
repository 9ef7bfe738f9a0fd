//! What translated code keeps within reach of its stack pointer.

use std::mem::offset_of;
use std::sync::atomic::AtomicU32;

use super::jumps::{Jump, Jumps};
use crate::cpu::{Cpu, Op};
use crate::mmu::{DataEntry, RecentPages, Tlb};
use crate::simd::Vectors;
use crate::system::SystemState;

/// The part of a [`Cpu`] that only translated code and its callers use.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Hot {
    /// The word of events that other threads raise.
    pub(crate) events: *const AtomicU32,
    /// The table of indirect jumps ([`super::jumps`]).
    pub(crate) jumps: *const Jump,
    /// What stands for the mode and the translations of addresses in that table: a number in the top 16 bits.
    pub(crate) key: u64,
    /// RIP of the running code less its place in its page.
    pub(crate) page: u64,
    /// Guest R13, R14 and R15 while translated code runs.
    pub(crate) spilled: [u64; 3],
    /// For values that outgrow the scratch registers.
    pub(crate) scratch: [u64; 4],
}

/// What is known of a decoded operation besides what it does. The stubs count misses here.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct OpPlace {
    /// The place of its block in its page.
    pub(crate) start: u16,
    /// A clock of instructions, when its memory operand was last in another page than [`RecentPages`] has.
    pub(crate) epoch: u16,
    /// Instructions of the block behind it.
    pub(crate) rest: u8,
    /// How often that was so since the clock changed.
    pub(crate) misses: u8,
    /// It looks at the x87 unit, or changes it.
    pub(crate) x87: bool,
    /// That was so too often: its memory operand is looked up in the translation buffer at once.
    pub(crate) scattered: bool,
}

/// Instructions for which [`OpPlace::misses`] are counted, as a power of two.
pub(crate) const EPOCH: u8 = 16;

/// What is looked at only when translated code is entered or left.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Gate {
    /// The stack of who entered translated code.
    pub(crate) host_rsp: u64,
    /// Decoded operations, by number.
    pub(crate) ops: *const Op,
    /// What else is to know of the operations.
    pub(crate) places: *const OpPlace,
    /// MXCSR for the host's own code.
    pub(crate) host_mxcsr: u32,
    /// What [`Hot::key`] was made of: a change means another key.
    pub(crate) key_of: (u16, u64),
    /// An operation whose memory operand is in another page too often, or null.
    pub(crate) scattered: *const OpPlace,
    /// Status flags for a moment, as LAHF and SETO give them.
    saved_flags: u64,
    /// A host address that R15 holds through a block, while R15 is used for something else.
    held: u64,
    /// The table that [`Hot::jumps`] is of, while translated code runs.
    pub(crate) jumps: *mut Jumps,
}

impl Gate {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self {
            host_rsp: 0,
            ops: std::ptr::null(),
            places: std::ptr::null(),
            host_mxcsr: 0x1f80,
            key_of: (0, 0),
            scattered: std::ptr::null(),
            saved_flags: 0,
            held: 0,
            jumps: std::ptr::null_mut(),
        }
    }
}

impl Hot {
    /// Nothing yet.
    pub(crate) fn new(events: *const AtomicU32) -> Self {
        Self {
            spilled: [0; 3],
            events,
            jumps: std::ptr::null(),
            key: 0,
            page: 0,
            scratch: [0; 4],
        }
    }
}

/// Displacements from the stack pointer of translated code.
pub(crate) mod at {
    use x86_defs::state::{GS, Segment};

    use super::{Cpu, DataEntry, Gate, Hot, RecentPages, SystemState, Tlb, Vectors, offset_of};

    const HOT: usize = offset_of!(Cpu, hot);
    /// [`Tlb::data`].
    pub(crate) const TLB: i32 = (offset_of!(Cpu, tlb) + offset_of!(Tlb, data)) as i32;
    const RECENT: usize =
        offset_of!(Cpu, tlb) + offset_of!(Tlb, recent) + offset_of!(RecentPages, now);

    /// The entry of this number in [`RecentPages::now`].
    pub(crate) const fn recent(number: usize) -> i32 {
        (RECENT + number * size_of::<DataEntry>()) as i32
    }
    /// [`Hot::spilled`].
    pub(crate) const SPILLED: i32 = (HOT + offset_of!(Hot, spilled)) as i32;
    /// [`Hot::events`].
    pub(crate) const EVENTS: i32 = (HOT + offset_of!(Hot, events)) as i32;
    /// [`Hot::jumps`].
    pub(crate) const JUMPS: i32 = (HOT + offset_of!(Hot, jumps)) as i32;
    /// [`Hot::key`].
    pub(crate) const KEY: i32 = (HOT + offset_of!(Hot, key)) as i32;
    /// [`Hot::page`].
    pub(crate) const PAGE: i32 = (HOT + offset_of!(Hot, page)) as i32;
    /// [`Hot::scratch`]: RAX or RCX for a moment.
    pub(crate) const SAVED_REGISTER: i32 = (HOT + offset_of!(Hot, scratch)) as i32;
    /// Where the flag byte is of the page that R15 holds an address in.
    pub(crate) const HELD_FLAG: i32 = SAVED_REGISTER + 8;
    /// [`Gate::saved_flags`].
    pub(crate) const SAVED_FLAGS: i32 =
        (offset_of!(Cpu, gate) + offset_of!(Gate, saved_flags)) as i32;
    /// [`Gate::held`].
    pub(crate) const HELD: i32 = (offset_of!(Cpu, gate) + offset_of!(Gate, held)) as i32;
    /// An entry of the translation buffer, or a target, for a moment.
    pub(crate) const SAVED_ENTRY: i32 = SAVED_REGISTER + 16;
    /// An address, while its page is looked up.
    pub(crate) const SAVED_ADDRESS: i32 = SAVED_REGISTER + 24;
    /// [`Gate::scattered`].
    pub(crate) const SCATTERED: i32 = (offset_of!(Cpu, gate) + offset_of!(Gate, scattered)) as i32;
    /// [`Gate::places`].
    pub(crate) const PLACES: i32 = (offset_of!(Cpu, gate) + offset_of!(Gate, places)) as i32;
    /// [`Cpu::status`].
    pub(crate) const STATUS: i32 = offset_of!(Cpu, status) as i32;
    /// [`Gate::host_rsp`].
    pub(crate) const HOST_RSP: i32 = (offset_of!(Cpu, gate) + offset_of!(Gate, host_rsp)) as i32;
    /// [`Gate::host_mxcsr`].
    pub(crate) const HOST_MXCSR: i32 =
        (offset_of!(Cpu, gate) + offset_of!(Gate, host_mxcsr)) as i32;
    /// [`Cpu::system_flags`].
    pub(crate) const SYSTEM_FLAGS: i32 = offset_of!(Cpu, system_flags) as i32;
    /// [`Cpu::rip`].
    pub(crate) const RIP: i32 = offset_of!(Cpu, rip) as i32;
    /// [`Cpu::instructions`].
    pub(crate) const INSTRUCTIONS: i32 = offset_of!(Cpu, instructions) as i32;
    /// [`Cpu::x87_live`].
    pub(crate) const X87_LIVE: i32 = offset_of!(Cpu, x87_live) as i32;
    /// [`Cpu::regs`].
    pub(crate) const REGS: i32 = offset_of!(Cpu, regs) as i32;
    /// [`Cpu::bases`].
    pub(crate) const BASES: i32 = offset_of!(Cpu, bases) as i32;
    /// The same of GS.
    pub(crate) const GS_BASE: i32 = BASES + 8 * GS as i32;
    /// The base of GS in [`Cpu::segments`].
    pub(crate) const GS_SEGMENT_BASE: i32 =
        (offset_of!(Cpu, segments) + GS * size_of::<Segment>() + offset_of!(Segment, base)) as i32;
    /// IA32_KERNEL_GS_BASE.
    pub(crate) const KERNEL_GS_BASE: i32 =
        (offset_of!(Cpu, system) + offset_of!(SystemState, kernel_gs_base)) as i32;
    /// [`Cpu::cpl`].
    pub(crate) const CPL: i32 = offset_of!(Cpu, cpl) as i32;
    /// [`Cpu::sti_shadow`].
    pub(crate) const STI_SHADOW: i32 = offset_of!(Cpu, sti_shadow) as i32;
    /// [`Cpu::held_back`].
    pub(crate) const HELD_BACK: i32 = offset_of!(Cpu, held_back) as i32;
    /// The vector registers.
    pub(crate) const YMM: i32 = (offset_of!(Cpu, vectors) + offset_of!(Vectors, ymm)) as i32;
    /// MXCSR.
    pub(crate) const MXCSR: i32 = (offset_of!(Cpu, vectors) + offset_of!(Vectors, mxcsr)) as i32;
    const _: () = assert!(INSTRUCTIONS < 128 && TLB < 128 && YMM % 32 == 0);
}
