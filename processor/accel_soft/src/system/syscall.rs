//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS and GS base instructions (SDM volume 2).

use x86_defs::control::{Cr4, Efer, Rflags};
use x86_defs::state::{CS, FS, GS, RCX, RDX, RSP, SS, Segment};

use crate::cpu::{Cpu, Op, Result, Value};

/// Flat 64-bit code, readable, accessed, present, with 4 KiB granularity.
const CODE64: u32 = 0xa09b;
/// Flat 32-bit code.
const CODE32: u32 = 0xc09b;
/// Flat writable data.
const DATA32: u32 = 0xc093;

fn flat(selector: u16, attributes: u32, dpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes: attributes | u32::from(dpl) << 5,
    }
}

impl Cpu {
    /// Loads CS, SS and the privilege level as the fast system calls do: from constants, not descriptors.
    fn enter_flat(&mut self, cs: u16, code: u32, ss: u16, cpl: u8) {
        let rpl = u16::from(cpl);
        self.segments[CS] = flat(cs & !3 | rpl, code, cpl);
        self.segments[SS] = flat(ss & !3 | rpl, DATA32, cpl);
        self.cpl = cpl;
        self.update_mode();
    }
}

impl Cpu {
    /// Enters 64-bit ring 0 at `target`, as SYSCALL in long mode does.
    pub(super) fn syscall_to(&mut self, target: u64) -> Result<()> {
        let flags = self.rflags();
        self.regs[RCX] = self.rip;
        self.regs[11] = flags & !Rflags::RF.bits();
        self.rip = target;
        let new = flags & !self.system.fmask & !Rflags::RF.bits();
        self.set_rflags_without_mode(new);
        let star = (self.system.star >> 32) as u16;
        self.enter_flat(star, CODE64, star.wrapping_add(8), 0);
        Ok(())
    }

    /// Flat 32-bit segments of ring 0.
    pub(super) fn enter_legacy_kernel(&mut self, cs: u16) {
        self.enter_flat(cs, CODE32, cs.wrapping_add(8), 0);
    }

    /// Flat 32-bit segments of ring 3.
    pub(super) fn enter_legacy_user(&mut self, cs: u16) {
        self.enter_flat(cs, CODE32, cs.wrapping_add(8), 3);
    }
}

pub(super) fn syscall(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if !cpu.efer.contains(Efer::SCE) {
        return Err(cpu.ud());
    }
    if cpu.mode.is_64bit() {
        return cpu.syscall_to(cpu.system.lstar);
    }
    if cpu.system.amd && cpu.protected() {
        return cpu.syscall_32bit();
    }
    Err(cpu.ud())
}

/// SYSRET; `T` is the operand size: 64-bit returns to 64-bit mode.
pub(super) fn sysret<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let legacy = cpu.system.amd && cpu.protected() && !cpu.long_mode();
    if !(cpu.mode.is_64bit() || legacy) || !cpu.efer.contains(Efer::SCE) {
        return Err(cpu.ud());
    }
    cpu.need_supervisor()?;
    if legacy {
        cpu.sysret_legacy();
        return Ok(());
    }
    let long = size_of::<T>() == 8;
    let rip = cpu.regs[RCX];
    if long && !super::canonical(rip) {
        return Err(cpu.gp(0));
    }
    let star = (cpu.system.star >> 48) as u16;
    let flags = cpu.regs[11] & 0x3c_7fd7;
    cpu.set_rflags_without_mode(flags);
    cpu.rip = if long { rip } else { rip & 0xffff_ffff };
    let (cs, code) = if long {
        (star.wrapping_add(16), CODE64)
    } else {
        (star, CODE32)
    };
    cpu.enter_flat(cs, code, star.wrapping_add(8), 3);
    Ok(())
}

pub(super) fn sysenter(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.system.amd && cpu.long_mode() {
        return Err(cpu.ud());
    }
    let cs = cpu.system.sysenter_cs as u16;
    let protected = cpu.protected() || cpu.virtual_8086();
    if !protected || cs & !3 == 0 {
        return Err(cpu.gp(0));
    }
    let flags = cpu.rflags() & !(Rflags::VM | Rflags::IF | Rflags::RF).bits();
    cpu.set_rflags_without_mode(flags);
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.regs[RSP] = cpu.system.sysenter_esp & mask;
    cpu.rip = cpu.system.sysenter_eip & mask;
    let code = if long { CODE64 } else { CODE32 };
    cpu.enter_flat(cs, code, cs.wrapping_add(8), 0);
    Ok(())
}

/// SYSEXIT; `T` is the operand size.
pub(super) fn sysexit<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.system.amd && cpu.long_mode() {
        return Err(cpu.ud());
    }
    let cs = cpu.system.sysenter_cs as u16;
    if !cpu.protected() || cs & !3 == 0 || cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let long = size_of::<T>() == 8;
    let (rip, rsp) = (cpu.regs[RDX], cpu.regs[RCX]);
    if long && !(super::canonical(rip) && super::canonical(rsp)) {
        return Err(cpu.gp(0));
    }
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rip = rip & mask;
    cpu.regs[RSP] = rsp & mask;
    let (offset, code) = if long { (32, CODE64) } else { (16, CODE32) };
    let cs = cs.wrapping_add(offset);
    cpu.enter_flat(cs, code, cs.wrapping_add(8), 3);
    Ok(())
}

impl Cpu {
    /// Replaces RFLAGS; the caller goes on to [`Cpu::update_mode`].
    pub(super) fn set_rflags_without_mode(&mut self, flags: u64) {
        let status = crate::cpu::Status::from_rflags(flags);
        let known = Rflags::all().bits();
        self.status = status;
        if flags & !self.system_flags & Rflags::IF.bits() != 0 {
            // Interrupts that were held back may wait.
            self.attention = true;
        }
        self.system_flags = flags & known & !status_mask() | Rflags::FIXED.bits();
    }
}

/// Where the status flags are in RFLAGS.
fn status_mask() -> u64 {
    crate::cpu::Status::from_rflags(u64::MAX).to_rflags()
}

pub(super) fn swapgs(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if !cpu.mode.is_64bit() {
        return Err(cpu.ud());
    }
    cpu.need_supervisor()?;
    let old = cpu.segments[GS].base;
    cpu.segments[GS].base = std::mem::replace(&mut cpu.system.kernel_gs_base, old);
    cpu.bases[GS] = cpu.segments[GS].base;
    Ok(())
}

fn check_fsgsbase(cpu: &mut Cpu) -> Result<()> {
    if !cpu.mode.is_64bit() || !cpu.cr4.contains(Cr4::FSGSBASE) {
        return Err(cpu.ud());
    }
    Ok(())
}

fn read_base<T: Value>(cpu: &mut Cpu, op: &Op, seg: usize) -> Result<()> {
    check_fsgsbase(cpu)?;
    let base = cpu.segments[seg].base;
    cpu.set_a::<T>(op, T::from_u64(base));
    Ok(())
}

fn write_base<T: Value>(cpu: &mut Cpu, op: &Op, seg: usize) -> Result<()> {
    check_fsgsbase(cpu)?;
    let base = cpu.reg_a::<T>(op).to_u64();
    if !super::canonical(base) {
        return Err(cpu.gp(0));
    }
    cpu.segments[seg].base = base;
    cpu.bases[seg] = base;
    Ok(())
}

pub(super) fn rdfsbase<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    read_base::<T>(cpu, op, FS)
}

pub(super) fn rdgsbase<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    read_base::<T>(cpu, op, GS)
}

pub(super) fn wrfsbase<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    write_base::<T>(cpu, op, FS)
}

pub(super) fn wrgsbase<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    write_base::<T>(cpu, op, GS)
}
