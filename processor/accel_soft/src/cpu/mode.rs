//! What decoding and address translation depend on, in one word.

use bitflags::bitflags;
use x86_defs::control::{Cr0, Cr4, Efer, Rflags, Xcr0};
use x86_defs::state::{CS, DS, ES, FS, GS, SS, Segment};

use super::Cpu;
use super::op::{FLAT, FLAT_STACK};

bitflags! {
    /// The mode that a block is decoded for. Two vCPU states with equal modes execute the same bytes by the same operations.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
    pub(crate) struct Mode: u16 {
        /// 64-bit code.
        const CODE64 = 1 << 0;
        /// 32-bit code (neither: 16-bit).
        const CODE32 = 1 << 1;
        /// The stack pointer has 32 bits (SS.B) outside 64-bit mode.
        const STACK32 = 1 << 2;
        /// Privilege level 3.
        const USER = 1 << 3;
        /// DS, ES and SS have base 0 and limit 4 GiB, and CS base 0 (outside 64-bit mode).
        const FLAT = 1 << 4;
        /// One instruction a block: TF is set or a debug register is armed.
        const STEP = 1 << 5;
        /// x87 instructions do not raise #NM.
        const X87 = 1 << 6;
        /// MMX instructions do not fault.
        const MMX = 1 << 7;
        /// SSE instructions do not fault.
        const SSE = 1 << 8;
        /// AVX instructions do not fault.
        const AVX = 1 << 9;
        /// Protected mode (not real, not virtual-8086).
        const PROTECTED = 1 << 10;
        /// Decoded as AMD's processors do: the operand-size prefix counts for near branches in 64-bit code.
        const AMD = 1 << 11;
    }
}

impl Mode {
    /// 64-bit mode.
    #[inline(always)]
    pub(crate) fn is_64bit(self) -> bool {
        self.contains(Self::CODE64)
    }

    /// Code size in bits.
    pub(crate) fn bitness(self) -> u32 {
        match self {
            m if m.contains(Self::CODE64) => 64,
            m if m.contains(Self::CODE32) => 32,
            _ => 16,
        }
    }
}

/// With what right an access is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// That of the code (CPL, and AC under SMAP).
    Current,
    /// The processor's own: implicit supervisor access.
    System,
}

fn is_flat(segment: &Segment) -> bool {
    // Present, data or readable code, writable if data, not expand-down, base 0, limit 4 GiB.
    let writable_data = segment.attributes & 0x1_009e == 0x92;
    writable_data && segment.base == 0 && segment.limit == u32::MAX
}

impl Cpu {
    /// Derives [`Cpu::mode`] and everything else that follows from control registers, RFLAGS, CPL and the segments. Whoever
    /// changes one of those calls this.
    pub(crate) fn update_mode(&mut self) {
        let (cr0, cr4) = (self.cr0, self.cr4);
        let mut mode = Mode::empty();
        let cs = &self.segments[CS];
        mode.set(Mode::AMD, self.system.amd());
        let virtual_8086 = self.system_flags & Rflags::VM.bits() != 0;
        mode.set(Mode::PROTECTED, cr0.contains(Cr0::PE) && !virtual_8086);
        if self.efer.contains(Efer::LMA) && cs.attributes & (1 << 13) != 0 {
            mode |= Mode::CODE64;
        } else if cs.attributes & (1 << 14) != 0 {
            mode |= Mode::CODE32;
        }
        let is_64bit = mode.is_64bit();
        mode.set(Mode::STACK32, self.segments[SS].attributes & (1 << 14) != 0);
        mode.set(Mode::USER, self.cpl == 3);
        let flat = [ES, SS, DS].iter().all(|s| is_flat(&self.segments[*s])) && cs.base == 0;
        mode.set(Mode::FLAT, !is_64bit && flat);
        let tf = self.system_flags & Rflags::TF.bits() != 0;
        mode.set(Mode::STEP, tf || self.dr7 & 0xff != 0);
        let ts_em = cr0.intersects(Cr0::TS | Cr0::EM);
        mode.set(Mode::X87, !ts_em);
        mode.set(Mode::MMX, !ts_em);
        let sse = !ts_em && cr4.contains(Cr4::OSFXSR);
        mode.set(Mode::SSE, sse);
        let avx = !cr0.contains(Cr0::TS)
            && mode.contains(Mode::PROTECTED)
            && cr4.contains(Cr4::OSXSAVE)
            && self.xcr0.contains(Xcr0::SSE | Xcr0::AVX);
        mode.set(Mode::AVX, avx);
        self.mode = mode;
        self.rip_mask = if is_64bit { u64::MAX } else { 0xffff_ffff };
        let code_base = if is_64bit { 0 } else { cs.base };
        if code_base != self.bases[CS] {
            self.tlb.stale_code();
        }
        for seg in [ES, CS, SS, DS] {
            self.bases[seg] = if is_64bit { 0 } else { self.segments[seg].base };
        }
        self.bases[FS] = self.segments[FS].base;
        self.bases[GS] = self.segments[GS].base;
        self.bases[usize::from(FLAT)] = 0;
        self.bases[usize::from(FLAT_STACK)] = 0;
        let smap = cr4.contains(Cr4::SMAP) && self.system_flags & Rflags::AC.bits() == 0;
        self.tlb.select(self.cpl == 3, smap);
        self.attention = true;
    }
}
