//! Instructions on the system's part of RFLAGS: CLI, STI, PUSHF, POPF, in all modes (SDM volume 2; volume 3, chapter 21).

use x86_defs::control::{Cr4, Rflags};
use x86_defs::state::SS;

use crate::cpu::{Cpu, Op, Result, STATUS, Status, Value};

impl Cpu {
    /// RFLAGS.IOPL.
    #[inline]
    pub(crate) fn iopl(&self) -> u8 {
        (self.system_flags >> 12) as u8 & 3
    }

    /// CLI, STI and their kind act on VIF instead of IF.
    fn virtual_interrupts(&self) -> bool {
        if self.virtual_8086() {
            self.iopl() < 3 && self.cr4.contains(Cr4::VME)
        } else {
            self.protected() && self.cpl == 3 && self.iopl() < 3 && self.cr4.contains(Cr4::PVI)
        }
    }

    /// Real mode has privilege level 0, virtual-8086 mode 3.
    fn may_change_if(&self) -> bool {
        self.cpl <= self.iopl()
    }

    /// Replaces the flags of `mask`.
    fn change_flags(&mut self, set: u64, mask: u64) {
        let new = self.rflags() & !mask | set & mask;
        // Flags that nothing is derived from, by far the most frequent to change.
        const PLAIN: u64 = STATUS
            | Rflags::IF.bits()
            | Rflags::DF.bits()
            | Rflags::NT.bits()
            | Rflags::ID.bits()
            | Rflags::RF.bits();
        if (new ^ self.system_flags) & !PLAIN != 0 {
            return self.set_rflags(new);
        }
        self.status = Status::from_rflags(new);
        self.system_flags = new & !STATUS;
        self.attention |= new & Rflags::IF.bits() != 0;
    }
}

pub(super) fn cli(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.may_change_if() {
        cpu.system_flags &= !Rflags::IF.bits();
    } else if cpu.virtual_interrupts() {
        cpu.system_flags &= !Rflags::VIF.bits();
    } else {
        return Err(cpu.gp(0));
    }
    Ok(())
}

pub(super) fn sti(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.may_change_if() {
        if !cpu.system_flag(Rflags::IF) {
            cpu.system_flags |= Rflags::IF.bits();
            cpu.sti_shadow = true;
            cpu.attention = true;
        }
    } else if cpu.virtual_interrupts() && !cpu.system_flag(Rflags::VIP) {
        cpu.system_flags |= Rflags::VIF.bits();
    } else {
        return Err(cpu.gp(0));
    }
    Ok(())
}

/// PUSHF with operand size `T`.
pub(super) fn pushf<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let mut flags = cpu.rflags() & !(Rflags::RF | Rflags::VM).bits();
    if cpu.virtual_8086() && cpu.iopl() < 3 {
        if !cpu.cr4.contains(Cr4::VME) || size_of::<T>() != 2 {
            return Err(cpu.gp(0));
        }
        let vif = flags & Rflags::VIF.bits() != 0;
        flags = flags & !Rflags::IF.bits() | Rflags::IOPL.bits();
        if vif {
            flags |= Rflags::IF.bits();
        }
    }
    let sp = cpu.stack_pointer().wrapping_sub(size_of::<T>() as u64) & cpu.stack_mask();
    cpu.write::<T>(SS as u8, sp, T::from_u64(flags))?;
    cpu.set_stack_pointer(sp);
    Ok(())
}

/// POPF with operand size `T`.
pub(super) fn popf<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let sp = cpu.stack_pointer();
    let new = cpu.read::<T>(SS as u8, sp)?.to_u64();
    let mut mask = (Rflags::CF
        | Rflags::PF
        | Rflags::AF
        | Rflags::ZF
        | Rflags::SF
        | Rflags::TF
        | Rflags::DF
        | Rflags::OF
        | Rflags::NT)
        .bits();
    if size_of::<T>() > 2 {
        mask |= (Rflags::AC | Rflags::ID).bits();
    }
    let mut set = new;
    if cpu.virtual_8086() {
        if cpu.iopl() == 3 {
            mask |= Rflags::IF.bits();
        } else {
            let to_if = new & Rflags::IF.bits() != 0;
            let refused = size_of::<T>() != 2
                || !cpu.cr4.contains(Cr4::VME)
                || new & Rflags::TF.bits() != 0
                || (to_if && cpu.system_flag(Rflags::VIP));
            if refused {
                return Err(cpu.gp(0));
            }
            mask |= Rflags::VIF.bits();
            set = set & !Rflags::VIF.bits() | if to_if { Rflags::VIF.bits() } else { 0 };
        }
    } else {
        if cpu.cpl == 0 {
            mask |= Rflags::IOPL.bits();
        }
        if cpu.may_change_if() {
            mask |= Rflags::IF.bits();
        }
    }
    // RF is cleared; VM is not touched.
    mask |= Rflags::RF.bits();
    set &= !Rflags::RF.bits();
    let next = sp.wrapping_add(size_of::<T>() as u64);
    cpu.set_stack_pointer(next);
    cpu.change_flags(set, mask);
    Ok(())
}
