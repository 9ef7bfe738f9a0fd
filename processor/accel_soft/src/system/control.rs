//! Control registers, debug registers, XCR0, and the instructions that invalidate translations.

use x86_defs::control::{Cr0, Cr4, Efer, Rflags, Xcr0};
use x86_defs::state::{CS, RAX, RCX, RDX};

use super::descriptor::{ATTR_LONG, kind};
use crate::cpu::{Access, Cpu, Exception, Op, Result, Value};
use crate::mmu::PHYSICAL_BITS;

/// The bits of CR4 that there are.
pub(super) const CR4_KNOWN: Cr4 = Cr4::all()
    .difference(Cr4::LA57)
    .difference(Cr4::VMXE)
    .difference(Cr4::PKE);

/// The state components that there can be.
pub(super) const XCR0_KNOWN: Xcr0 = Xcr0::X87.union(Xcr0::SSE).union(Xcr0::AVX);

/// The state components that XCR0 may enable: AVX only where the host executes it.
fn xcr0_allowed() -> Xcr0 {
    if crate::simd::host_features().avx {
        XCR0_KNOWN
    } else {
        XCR0_KNOWN - Xcr0::AVX
    }
}

impl Cpu {
    /// MOV to CR0 and what follows from it.
    ///
    /// # Errors
    /// #GP.
    pub(super) fn set_cr0(&mut self, value: u64) -> Result<()> {
        if value >> 32 != 0 {
            return Err(self.gp(0));
        }
        let new = Cr0::from_bits_truncate(value) | Cr0::ET;
        let old = self.cr0;
        let bad = (new.contains(Cr0::PG) && !new.contains(Cr0::PE))
            || (new.contains(Cr0::NW) && !new.contains(Cr0::CD));
        if bad {
            return Err(self.gp(0));
        }
        let paging_on = new.contains(Cr0::PG) && !old.contains(Cr0::PG);
        let paging_off = !new.contains(Cr0::PG) && old.contains(Cr0::PG);
        if paging_on && self.efer.contains(Efer::LME) {
            let long_code = self.segments[CS].attributes & ATTR_LONG != 0;
            let old_tss = matches!(
                (self.tr.attributes & 0xf) as u8,
                kind::TSS16_AVAILABLE | kind::TSS16_BUSY
            );
            if !self.cr4.contains(Cr4::PAE) || long_code || old_tss {
                return Err(self.gp(0));
            }
        } else if paging_on {
            self.load_pdptes(new, self.cr3, self.cr4)?;
        }
        if paging_off && (self.mode.is_64bit() || self.cr4.contains(Cr4::PCIDE)) {
            return Err(self.gp(0));
        }
        if paging_on && self.efer.contains(Efer::LME) {
            self.efer |= Efer::LMA;
        } else if paging_off {
            self.efer -= Efer::LMA;
        }
        self.cr0 = new;
        if (old ^ new).intersects(Cr0::PG | Cr0::WP | Cr0::PE) {
            self.flush_translations();
        }
        self.update_mode();
        Ok(())
    }

    /// MOV to CR3.
    ///
    /// # Errors
    /// #GP for reserved bits.
    pub(super) fn set_cr3(&mut self, value: u64) -> Result<()> {
        let pcid = self.cr4.contains(Cr4::PCIDE);
        let keep = pcid && value >> 63 != 0;
        let value = if keep { value & !(1 << 63) } else { value };
        if self.long_mode() && value >> PHYSICAL_BITS != 0 {
            return Err(self.gp(0));
        }
        let value = if self.long_mode() {
            value
        } else {
            value & 0xffff_ffff
        };
        self.load_pdptes(self.cr0, value, self.cr4)?;
        self.cr3 = value;
        self.switch_address_space(keep);
        self.leave_block = true;
        Ok(())
    }

    /// MOV to CR4.
    ///
    /// # Errors
    /// #GP.
    pub(super) fn set_cr4(&mut self, value: u64) -> Result<()> {
        let old = self.cr4;
        let new = Cr4::from_bits_retain(value);
        let pcid_on = new.contains(Cr4::PCIDE) && !old.contains(Cr4::PCIDE);
        let bad = !CR4_KNOWN.contains(new)
            || (self.long_mode() && !new.contains(Cr4::PAE))
            || (pcid_on && (!self.long_mode() || self.cr3 & 0xfff != 0));
        if bad {
            return Err(self.gp(0));
        }
        let walks = Cr4::PSE | Cr4::PAE | Cr4::PGE | Cr4::SMEP;
        if (old ^ new).intersects(Cr4::PSE | Cr4::PAE | Cr4::PGE) {
            self.load_pdptes(self.cr0, self.cr3, new)?;
        }
        self.cr4 = new;
        let changed = old ^ new;
        if changed.intersects(walks | Cr4::SMAP | Cr4::PCIDE) {
            self.flush_translations();
        }
        if changed.contains(Cr4::PCIDE) {
            self.switch_address_space(false);
        }
        self.update_mode();
        Ok(())
    }

    /// Writes XCR0.
    ///
    /// # Errors
    /// #GP for combinations that there are not (SDM volume 1, section 13.3).
    fn set_xcr0(&mut self, value: u64) -> Result<()> {
        let new = Xcr0::from_bits_retain(value);
        let bad = !xcr0_allowed().contains(new)
            || !new.contains(Xcr0::X87)
            || (new.contains(Xcr0::AVX) && !new.contains(Xcr0::SSE));
        if bad {
            return Err(self.gp(0));
        }
        self.xcr0 = new;
        self.update_mode();
        Ok(())
    }

    /// #GP(0) unless at privilege level 0 (CR8 and all the others).
    fn check_control(&mut self) -> Result<()> {
        self.need_supervisor()
    }
}

/// MOV r, CRn.
pub(super) fn mov_from_cr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_control()?;
    let value = match op.b {
        0 => cpu.cr0.bits(),
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4.bits(),
        8 => cpu.apic.cr8(),
        _ => return Err(cpu.ud()),
    };
    cpu.set_a::<T>(op, T::from_u64(value));
    Ok(())
}

/// MOV CRn, r.
pub(super) fn mov_to_cr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    if !matches!(op.a, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.check_control()?;
    let value = cpu.reg_b::<T>(op).to_u64();
    match op.a {
        0 => cpu.set_cr0(value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => cpu.set_cr3(value),
        4 => cpu.set_cr4(value),
        _ => {
            if value >> 4 != 0 {
                return Err(cpu.gp(0));
            }
            cpu.apic.set_cr8(value);
            Ok(())
        }
    }
}

pub(super) fn clts(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.need_supervisor()?;
    cpu.cr0 -= Cr0::TS;
    cpu.update_mode();
    Ok(())
}

/// LMSW: the low four bits of CR0; PE can be set but not cleared.
pub(super) fn lmsw(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_supervisor()?;
    let value = if op.has_memory() {
        cpu.read_op::<u16>(op)?
    } else {
        cpu.reg_a::<u16>(op)
    };
    let low = u64::from(value & 0xf) | cpu.cr0.bits() & 1;
    cpu.set_cr0(cpu.cr0.bits() & !0xf | low)
}

/// SMSW with operand size `T`.
pub(super) fn smsw<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_umip()?;
    let value = cpu.cr0.bits();
    if op.has_memory() {
        return cpu.write_op::<u16>(op, value as u16);
    }
    cpu.set_a::<T>(op, T::from_u64(value));
    Ok(())
}

pub(super) fn invlpg(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_supervisor()?;
    let base = cpu.bases[usize::from(op.seg & 7)];
    let linear = cpu.ea(op).wrapping_add(base);
    let linear = cpu.wrap_linear(linear);
    if super::canonical(linear) {
        cpu.tlb.flush_page(linear, None);
        cpu.leave_block = true;
    }
    Ok(())
}

/// INVPCID (SDM volume 2). The first register operand is the type.
pub(super) fn invpcid<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_supervisor()?;
    let kind = cpu.reg_a::<T>(op).to_u64();
    let linear = cpu.linear_op(op, 16, Access::Read)?;
    let low: u64 = cpu.load_in(linear, op.seg)?;
    let address: u64 = cpu.load_in(cpu.wrap_linear(linear.wrapping_add(8)), op.seg)?;
    let pcids = cpu.cr4.contains(Cr4::PCIDE);
    let bad = kind > 3
        || low >> 12 != 0
        || (kind == 0 && !super::canonical(address))
        || (kind < 2 && !pcids && low != 0);
    if bad {
        return Err(cpu.gp(0));
    }
    cpu.invalidate_pcid(kind, low as u16, address);
    cpu.leave_block = true;
    Ok(())
}

pub(super) fn xgetbv(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if !cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    let value = match cpu.regs[RCX] as u32 {
        0 => cpu.xcr0.bits(),
        // The components that are in use.
        1 => cpu.xcr0.bits() & cpu.components_in_use(),
        _ => return Err(cpu.gp(0)),
    };
    cpu.regs[RAX] = value & 0xffff_ffff;
    cpu.regs[RDX] = value >> 32;
    Ok(())
}

pub(super) fn xsetbv(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if !cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    cpu.need_supervisor()?;
    if cpu.regs[RCX] as u32 != 0 {
        return Err(cpu.gp(0));
    }
    let value = cpu.regs[RDX] << 32 | cpu.regs[RAX] & 0xffff_ffff;
    cpu.set_xcr0(value)
}

// ---- Debug registers (SDM volume 3, chapter 18) ----

/// DR6: bits that read as one.
pub(super) const DR6_ONES: u64 = 0xffff_0ff0;
/// DR6: access to a debug register while DR7.GD is set.
const DR6_BD: u64 = 1 << 13;
/// DR7: general detect.
pub(super) const DR7_GD: u64 = 1 << 13;
/// DR7: bit that reads as one.
pub(super) const DR7_ONES: u64 = 1 << 10;

impl Cpu {
    /// The register that a debug register's number means, after the checks that reads and writes share.
    fn debug_register(&mut self, number: u8) -> Result<u8> {
        let number = match number {
            4 | 5 if self.cr4.contains(Cr4::DE) => return Err(self.ud()),
            4 | 5 => number + 2,
            0..=7 => number,
            _ => return Err(self.ud()),
        };
        self.need_supervisor()?;
        if self.dr7 & DR7_GD != 0 {
            self.dr7 &= !DR7_GD;
            return Err(self.raise(Exception::Debug(DR6_BD)));
        }
        Ok(number)
    }
}

/// MOV r, DRn.
pub(super) fn mov_from_dr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = match cpu.debug_register(op.b)? {
        6 => cpu.dr6 | DR6_ONES,
        7 => cpu.dr7 | DR7_ONES,
        n => cpu.dr[usize::from(n & 3)],
    };
    cpu.set_a::<T>(op, T::from_u64(value));
    Ok(())
}

/// MOV DRn, r.
pub(super) fn mov_to_dr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.reg_b::<T>(op).to_u64();
    let number = cpu.debug_register(op.a)?;
    if number >= 6 && value >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    match number {
        6 => cpu.dr6 = value & 0xe00f | DR6_ONES,
        7 => {
            let enabled = (cpu.dr7 | value) & 0xff != 0;
            cpu.dr7 = value & 0xffff_2bff | DR7_ONES;
            cpu.update_mode();
            if enabled {
                // Pages with data breakpoints are not kept in the translation buffers.
                cpu.flush_translations();
            }
        }
        n => {
            cpu.dr[usize::from(n & 3)] = value;
            if cpu.dr7 & 0xff != 0 {
                cpu.flush_translations();
            }
        }
    }
    cpu.leave_block = true;
    Ok(())
}

impl Cpu {
    /// The number of the first armed breakpoint whose condition and range match, as bits B0 to B3 of DR6; only enabled ones
    /// make an exception.
    fn matching_breakpoints(&self, wanted: impl Fn(u64) -> bool, linear: u64, size: u64) -> u64 {
        (0..4u64)
            .filter(|n| {
                let control = self.dr7 >> (16 + n * 4) & 0xf;
                let enabled = self.dr7 >> (n * 2) & 3 != 0;
                let length = [1, 2, 8, 4][(control >> 2) as usize];
                let start = self.dr[*n as usize] & !(length - 1);
                enabled
                    && wanted(control & 3)
                    && linear < start.wrapping_add(length)
                    && start < linear.wrapping_add(size)
            })
            .fold(0, |bits, n| bits | 1 << n)
    }

    /// Called before each instruction of a block with [`crate::cpu::Mode::STEP`]: instruction breakpoints.
    ///
    /// # Errors
    /// #DB.
    pub(crate) fn before_step(&mut self) -> Result<()> {
        // RF covers one instruction; taken off before it, since IRET may set it for the next.
        let resumed = self.system_flag(Rflags::RF);
        self.system_flags &= !Rflags::RF.bits();
        if resumed || self.dr7 & 0xff == 0 {
            return Ok(());
        }
        let linear = self.wrap_linear(self.bases[CS].wrapping_add(self.rip));
        let hit = self.matching_breakpoints(|kind| kind == 0, linear, 1);
        if hit == 0 {
            return Ok(());
        }
        Err(self.raise(Exception::Debug(hit)))
    }

    /// Called after each instruction of such a block: single-step and data breakpoint traps. `tf` is TF before it.
    ///
    /// # Errors
    /// #DB, to be delivered with `rip` at the next instruction.
    pub(crate) fn after_step(&mut self, tf: bool) -> Result<()> {
        let mut bits = std::mem::take(&mut self.system.data_breakpoints);
        if tf && !std::mem::take(&mut self.system.suppress_step) {
            bits |= DR6_BS;
        }
        if bits == 0 {
            return Ok(());
        }
        Err(self.raise(Exception::Debug(bits)))
    }

    /// Takes note of a data access or a port access for the breakpoint registers; the trap comes in [`Self::after_step`].
    #[inline]
    pub(crate) fn note_data_access(&mut self, linear: u64, size: u64, write: bool) {
        if self.dr7 & 0xff == 0 {
            return;
        }
        let wanted = |kind| kind == 3 || (kind == 1 && write);
        self.system.data_breakpoints |= self.matching_breakpoints(wanted, linear, size);
    }

    /// True when an enabled data breakpoint lies in the page of an address: accesses to it must be seen one by one.
    pub(crate) fn watches_page(&self, linear: u64) -> bool {
        self.dr7 & 0xff != 0
            && self.matching_breakpoints(|kind| kind & 1 != 0, linear & !0xfff, 0x1000) != 0
    }
}

/// DR6: single step.
pub(super) const DR6_BS: u64 = 1 << 14;

/// PAUSE-like no-operations of the caches: WBINVD, INVD, WBNOINVD.
pub(super) fn cache_flush(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.need_supervisor()
}

/// CLAC and STAC: `SET` is the new AC.
pub(super) fn set_access_control<const SET: bool>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    let ac = Rflags::AC.bits();
    cpu.system_flags = cpu.system_flags & !ac | if SET { ac } else { 0 };
    let smap = cpu.smap_in_force();
    cpu.tlb.select(false, smap);
    Ok(())
}
