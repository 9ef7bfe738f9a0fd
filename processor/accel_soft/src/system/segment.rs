//! Segment registers: loads with their checks, LDTR and TR, LAR, LSL, VERR, VERW, ARPL, descriptor-table registers.

use x86_defs::control::{Cr4, Rflags};
use x86_defs::state::{CS, DescriptorTable, ES, SS, Segment};

use super::descriptor::{Descriptor, UNUSABLE, code_of, in_limit, is_null, kind};
use crate::cpu::{Access, Cpu, Op, Result, Status};

/// Attributes of a segment in virtual-8086 mode: present, DPL 3, accessed writable data.
pub(super) const ATTR_VIRTUAL_8086: u32 = 0xf3;

impl Cpu {
    /// CR0.PE without RFLAGS.VM.
    #[inline]
    pub(super) fn protected(&self) -> bool {
        self.mode.contains(crate::cpu::Mode::PROTECTED)
    }

    /// Virtual-8086 mode.
    #[inline]
    pub(super) fn virtual_8086(&self) -> bool {
        self.system_flag(Rflags::VM)
    }

    /// True when the access is inside the limit of the segment and of a kind that it allows (not in 64-bit mode).
    pub(crate) fn segment_allows(
        &self,
        seg: usize,
        offset: u64,
        size: u64,
        access: Access,
    ) -> bool {
        let segment = &self.segments[seg];
        let attributes = segment.attributes;
        if attributes & UNUSABLE != 0 {
            return false;
        }
        if self.protected() {
            let (code, second) = (attributes & 8 != 0, attributes & 2 != 0);
            let allowed = match access {
                Access::Read => !code || second,
                Access::Write => !code && second,
                Access::Fetch => true,
            };
            if !allowed {
                return false;
            }
        }
        in_limit(segment, offset, size)
    }

    /// Loads a segment register other than CS.
    ///
    /// # Errors
    /// #GP, #SS or #NP with the selector, page faults.
    pub(crate) fn load_segment(&mut self, seg: usize, selector: u16) -> Result<()> {
        if !self.protected() {
            let virtual_8086 = self.virtual_8086();
            let segment = &mut self.segments[seg];
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
            if virtual_8086 {
                segment.limit = 0xffff;
                segment.attributes = ATTR_VIRTUAL_8086;
            }
        } else if is_null(selector) {
            self.load_null(seg, selector)?;
        } else {
            let cpl = self.cpl;
            self.segments[seg] = if seg == SS {
                self.checked_stack_segment(selector, cpl)?
            } else {
                self.checked_data_segment(selector)?
            };
        }
        self.update_mode();
        Ok(())
    }

    fn load_null(&mut self, seg: usize, selector: u16) -> Result<()> {
        let cpl = self.cpl;
        let rpl = selector as u8 & 3;
        if seg == SS && (!self.mode.is_64bit() || cpl == 3 || rpl != cpl) {
            return Err(self.gp(0));
        }
        self.segments[seg] = null_segment(selector, if seg == SS { cpl } else { 0 });
        Ok(())
    }

    /// The descriptor of a stack segment for privilege level `cpl`, with #GP and #SS as for MOV SS.
    fn checked_stack_segment(&mut self, selector: u16, cpl: u8) -> Result<Segment> {
        let code = code_of(selector);
        let Some(d) = self.read_descriptor(selector)? else {
            return Err(self.gp(code));
        };
        if selector as u8 & 3 != cpl || !d.is_writable_data() || d.dpl() != cpl {
            return Err(self.gp(code));
        }
        if !d.is_present() {
            return Err(self.ss(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(Descriptor(d.0 | 1 << 40).segment(selector))
    }

    fn checked_data_segment(&mut self, selector: u16) -> Result<Segment> {
        let code = code_of(selector);
        let Some(d) = self.read_descriptor(selector)? else {
            return Err(self.gp(code));
        };
        let rpl = selector as u8 & 3;
        let free = d.is_code() && d.is_conforming();
        if !d.is_readable() || (!free && (rpl > d.dpl() || self.cpl > d.dpl())) {
            return Err(self.gp(code));
        }
        if !d.is_present() {
            return Err(self.np(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(Descriptor(d.0 | 1 << 40).segment(selector))
    }

    /// After a return to an outer privilege level: data segments that it may not use become null.
    pub(super) fn drop_privileged_segments(&mut self) {
        for seg in [ES, 3, 4, 5] {
            let attributes = self.segments[seg].attributes;
            let dpl = (attributes >> 5) as u8 & 3;
            let conforming_code = attributes & 0b1_1100 == 0b1_1100;
            let is_null = attributes & UNUSABLE != 0;
            if !is_null && !conforming_code && dpl < self.cpl {
                self.segments[seg] = null_segment(0, 0);
            }
        }
    }

    /// LLDT.
    ///
    /// # Errors
    /// #GP, #NP.
    fn load_ldtr(&mut self, selector: u16) -> Result<()> {
        if is_null(selector) {
            self.ldtr = null_segment(selector, 0);
            return Ok(());
        }
        let (d, base) = self.system_segment(selector, &[kind::LDT])?;
        self.ldtr = Segment {
            base,
            ..d.segment(selector)
        };
        Ok(())
    }

    /// LTR.
    ///
    /// # Errors
    /// #GP, #NP.
    fn load_tr(&mut self, selector: u16) -> Result<()> {
        if is_null(selector) {
            return Err(self.gp(0));
        }
        let kinds = [kind::TSS_AVAILABLE, kind::TSS16_AVAILABLE];
        let kinds = if self.long_mode() {
            &kinds[..1]
        } else {
            &kinds
        };
        let (d, base) = self.system_segment(selector, kinds)?;
        self.mark_busy(selector, true)?;
        self.tr = Segment {
            base,
            ..Descriptor(d.0 | 2 << 40).segment(selector)
        };
        Ok(())
    }

    /// The descriptor of an LDT or TSS in the GDT, and its base (64 bits in long mode).
    fn system_segment(&mut self, selector: u16, kinds: &[u8]) -> Result<(Descriptor, u64)> {
        let code = code_of(selector);
        if selector & 4 != 0 {
            return Err(self.gp(code));
        }
        let Some(d) = self.read_descriptor(selector)? else {
            return Err(self.gp(code));
        };
        let mut base = d.base();
        if d.is_segment() || !kinds.contains(&d.kind()) {
            return Err(self.gp(code));
        }
        if self.long_mode() {
            let Some(high) = self.read_descriptor_high(selector)? else {
                return Err(self.gp(code));
            };
            base |= high << 32;
            // The type field of the upper half must be zero.
            if high >> 40 & 0x1f != 0 || !super::canonical(base) {
                return Err(self.gp(code));
            }
        }
        if !d.is_present() {
            return Err(self.np(code));
        }
        Ok((d, base))
    }

    /// What LAR, LSL, VERR and VERW look at: the descriptor, if it may be seen from here.
    fn visible_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(d) = self.read_descriptor(selector)? else {
            return Ok(None);
        };
        let free = d.is_code() && d.is_conforming();
        let rpl = selector as u8 & 3;
        Ok((free || (self.cpl <= d.dpl() && rpl <= d.dpl())).then_some(d))
    }

    pub(super) fn set_zero_flag(&mut self, set: bool) {
        let zf = Rflags::ZF.bits();
        let flags = self.status.to_rflags() & !zf | if set { zf } else { 0 };
        self.status = Status::from_rflags(flags);
    }

    /// A 16-bit register or memory operand. `register` is the register operand's offset.
    fn selector_operand(&mut self, op: &Op, register: u8) -> Result<u16> {
        if op.has_memory() {
            self.read_op::<u16>(op)
        } else {
            Ok(self.regs.get::<u16>(register))
        }
    }

    /// Instructions that know only protected mode: #UD elsewhere.
    fn need_protected(&mut self) -> Result<()> {
        if self.protected() {
            Ok(())
        } else {
            Err(self.ud())
        }
    }

    /// #GP(0) unless at privilege level 0.
    pub(crate) fn need_supervisor(&mut self) -> Result<()> {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.gp(0))
        }
    }

    /// UMIP: SGDT, SIDT, SLDT, SMSW and STR are #GP(0) in user mode.
    pub(super) fn check_umip(&mut self) -> Result<()> {
        if self.cpl != 0 && self.cr4.contains(Cr4::UMIP) {
            return Err(self.gp(0));
        }
        Ok(())
    }
}

/// A segment register with a null selector.
pub(super) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        attributes: UNUSABLE | u32::from(dpl) << 5,
    }
}

/// MOV Sreg, r/m16. A load of SS keeps interrupts off until the next instruction has ended.
pub(super) fn mov_to_segment(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let seg = usize::from(op.a);
    let selector = cpu.selector_operand(op, op.b)?;
    if seg == CS || seg > 5 {
        return Err(cpu.ud());
    }
    cpu.load_segment(seg, selector)?;
    if seg == SS {
        cpu.mov_ss_shadow = true;
        cpu.attention = true;
    }
    Ok(())
}

/// MOV r, Sreg (`T` is the operand size) and MOV m16, Sreg.
pub(super) fn mov_from_segment<T: crate::cpu::Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    if op.has_memory() {
        let selector = cpu.segments[usize::from(op.a).min(5)].selector;
        return cpu.write_op::<u16>(op, selector);
    }
    let selector = cpu.segments[usize::from(op.b).min(5)].selector;
    cpu.set_a::<T>(op, T::from_u64(u64::from(selector)));
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS: `T` is the offset's size.
pub(super) fn load_far_pointer<T: crate::cpu::Value, const SEG: usize>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let size = size_of::<T>() as u64;
    let linear = cpu.linear_op(op, size + 2, Access::Read)?;
    let offset: T = cpu.load_in(linear, op.seg)?;
    let at = cpu.wrap_linear(linear.wrapping_add(size));
    let selector: u16 = cpu.load_in(at, op.seg)?;
    cpu.load_segment(SEG, selector)?;
    cpu.set_a(op, offset);
    if SEG == SS {
        cpu.mov_ss_shadow = true;
        cpu.attention = true;
    }
    Ok(())
}

/// PUSH Sreg with operand size `T`.
pub(super) fn push_segment<T: crate::cpu::Value, const SEG: usize>(
    cpu: &mut Cpu,
    _: &Op,
) -> Result<()> {
    let selector = cpu.segments[SEG].selector;
    let (mask, size) = (cpu.stack_mask(), size_of::<T>() as u64);
    let sp = cpu.stack_pointer().wrapping_sub(size) & mask;
    // The 32- and 64-bit forms write only the selector's 16 bits on recent processors with a 32-bit operand; the
    // whole slot is written zero-extended here, which the manual allows.
    cpu.write::<T>(SS as u8, sp, T::from_u64(u64::from(selector)))?;
    cpu.set_stack_pointer(sp);
    Ok(())
}

/// POP Sreg with operand size `T`.
pub(super) fn pop_segment<T: crate::cpu::Value, const SEG: usize>(
    cpu: &mut Cpu,
    _: &Op,
) -> Result<()> {
    let (mask, size) = (cpu.stack_mask(), size_of::<T>() as u64);
    let sp = cpu.stack_pointer();
    let value: T = cpu.read(SS as u8, sp)?;
    // The stack pointer moves by the old stack segment's size, and only if the load works.
    cpu.load_segment(SEG, value.to_u64() as u16)?;
    let moved = sp.wrapping_add(size) & mask;
    cpu.set_stack_pointer_masked(moved, mask);
    if SEG == SS {
        cpu.mov_ss_shadow = true;
        cpu.attention = true;
    }
    Ok(())
}

pub(super) fn lldt(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    cpu.need_supervisor()?;
    let selector = cpu.selector_operand(op, op.a)?;
    cpu.load_ldtr(selector)
}

pub(super) fn ltr(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    cpu.need_supervisor()?;
    let selector = cpu.selector_operand(op, op.a)?;
    cpu.load_tr(selector)
}

fn store_selector<T: crate::cpu::Value>(cpu: &mut Cpu, op: &Op, selector: u16) -> Result<()> {
    if op.has_memory() {
        return cpu.write_op::<u16>(op, selector);
    }
    cpu.set_a::<T>(op, T::from_u64(u64::from(selector)));
    Ok(())
}

pub(super) fn sldt<T: crate::cpu::Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    cpu.check_umip()?;
    store_selector::<T>(cpu, op, cpu.ldtr.selector)
}

pub(super) fn str<T: crate::cpu::Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    cpu.check_umip()?;
    store_selector::<T>(cpu, op, cpu.tr.selector)
}

/// LGDT and LIDT: `BITS` is the operand size, which decides how much of the base counts.
fn read_table(cpu: &mut Cpu, op: &Op, bits: u32) -> Result<DescriptorTable> {
    cpu.need_supervisor()?;
    let size = if bits == 64 { 10 } else { 6 };
    let linear = cpu.linear_op(op, size, Access::Read)?;
    let limit: u16 = cpu.load_in(linear, op.seg)?;
    let at = cpu.wrap_linear(linear.wrapping_add(2));
    let base = match bits {
        64 => cpu.load_in::<u64>(at, op.seg)?,
        32 => u64::from(cpu.load_in::<u32>(at, op.seg)?),
        _ => u64::from(cpu.load_in::<u32>(at, op.seg)? & 0xff_ffff),
    };
    if bits == 64 && !super::canonical(base) {
        return Err(cpu.gp(0));
    }
    Ok(DescriptorTable { base, limit })
}

pub(super) fn lgdt<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.gdtr = read_table(cpu, op, BITS)?;
    Ok(())
}

pub(super) fn lidt<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.idtr = read_table(cpu, op, BITS)?;
    Ok(())
}

fn write_table(cpu: &mut Cpu, op: &Op, bits: u32, table: DescriptorTable) -> Result<()> {
    cpu.check_umip()?;
    let size = if bits == 64 { 10 } else { 6 };
    let linear = cpu.linear_op(op, size, Access::Write)?;
    cpu.probe(linear, size, Access::Write, op.seg)?;
    cpu.store_in::<u16>(linear, table.limit, op.seg)?;
    let at = cpu.wrap_linear(linear.wrapping_add(2));
    if bits == 64 {
        cpu.store_in::<u64>(at, table.base, op.seg)
    } else {
        cpu.store_in::<u32>(at, table.base as u32, op.seg)
    }
}

pub(super) fn sgdt<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    write_table(cpu, op, BITS, cpu.gdtr)
}

pub(super) fn sidt<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    write_table(cpu, op, BITS, cpu.idtr)
}

/// LAR: the types that it accepts are SDM volume 2, table 3-53.
pub(super) fn lar<T: crate::cpu::Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    let selector = cpu.selector_operand(op, op.b)?;
    let long = cpu.long_mode();
    let valid = |d: &Descriptor| {
        d.is_segment()
            || match d.kind() {
                1 | 3 | 4 | 5 => !long,
                2 | 9 | 11 | 12 => true,
                _ => false,
            }
    };
    match cpu.visible_descriptor(selector)?.filter(valid) {
        Some(d) => {
            cpu.set_a::<T>(op, T::from_u64(d.0 >> 32 & 0x00ff_ff00));
            cpu.set_zero_flag(true);
        }
        None => cpu.set_zero_flag(false),
    }
    Ok(())
}

/// LSL: the types that it accepts are SDM volume 2, table 3-57.
pub(super) fn lsl<T: crate::cpu::Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    let selector = cpu.selector_operand(op, op.b)?;
    let long = cpu.long_mode();
    let valid = |d: &Descriptor| {
        d.is_segment()
            || match d.kind() {
                1 | 3 => !long,
                2 | 9 | 11 => true,
                _ => false,
            }
    };
    match cpu.visible_descriptor(selector)?.filter(valid) {
        Some(d) => {
            cpu.set_a::<T>(op, T::from_u64(u64::from(d.limit())));
            cpu.set_zero_flag(true);
        }
        None => cpu.set_zero_flag(false),
    }
    Ok(())
}

pub(super) fn verr(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    let selector = cpu.selector_operand(op, op.a)?;
    let d = cpu.visible_descriptor(selector)?;
    cpu.set_zero_flag(d.is_some_and(Descriptor::is_readable));
    Ok(())
}

pub(super) fn verw(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    let selector = cpu.selector_operand(op, op.a)?;
    let d = cpu.visible_descriptor(selector)?;
    cpu.set_zero_flag(d.is_some_and(Descriptor::is_writable_data));
    Ok(())
}

/// ARPL: the first operand's RPL is raised to the second's.
pub(super) fn arpl(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.need_protected()?;
    let raised = |old: u16, to: u16| (old & 3 < to & 3).then_some(old & !3 | to & 3);
    let new = if op.has_memory() {
        let to = cpu.regs.get::<u16>(op.a);
        let old: u16 = cpu.read_op(op)?;
        let new = raised(old, to);
        // A selector that stays as it is need not be writable.
        if let Some(new) = new {
            cpu.write_op(op, new)?;
        }
        new
    } else {
        let new = raised(cpu.regs.get::<u16>(op.a), cpu.regs.get::<u16>(op.b));
        if let Some(new) = new {
            cpu.set_a::<u16>(op, new);
        }
        new
    };
    cpu.set_zero_flag(new.is_some());
    Ok(())
}
