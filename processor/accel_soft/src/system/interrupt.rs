//! Interrupts and exceptions: delivery through the vector tables of all modes, and IRET (SDM volume 3, chapter 7 and
//! section 21.3).

use x86_defs::control::{Cr4, Rflags};
use x86_defs::exception;
use x86_defs::state::{CS, DS, ES, FS, GS, SS, Segment};

use super::descriptor::{Descriptor, code_of, is_null, kind};
use super::segment::{ATTR_VIRTUAL_8086, null_segment};
use super::stack::Stack;
use super::task::TaskSwitch;
use super::transfer::CodeTarget;
use crate::cpu::{Cpu, Exception, Op, Result, Value};

/// What is being delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// INT n, INT3, INTO: gates are checked against CPL, and error codes have no EXT bit.
    Software,
    /// An exception or INT1.
    Exception,
    /// An external interrupt or NMI.
    External,
}

impl Source {
    /// The EXT bit of error codes: the event came from outside the program.
    fn ext(self) -> u32 {
        u32::from(self != Self::Software)
    }
}

/// Exceptions of which two in a row make a double fault (SDM volume 3, table 7-5).
fn is_contributory(vector: u8) -> bool {
    matches!(
        vector,
        exception::DE | exception::TS | exception::NP | exception::SS | exception::GP
    )
}

/// What becomes of exception `second` raised while `first` was delivered.
fn combine(first: u8, second: u8) -> Option<u8> {
    if first == exception::DF {
        return None;
    }
    let double = (is_contributory(first) && is_contributory(second))
        || (first == exception::PF && (second == exception::PF || is_contributory(second)));
    Some(if double { exception::DF } else { second })
}

/// An exception's error code, if its vector has one.
fn error_code(exception: Exception) -> Option<u32> {
    match exception {
        Exception::WithCode(_, code) | Exception::Page { code, .. } => Some(code),
        _ => None,
    }
}

impl Cpu {
    /// Delivers `Cpu::exception` to the guest: `rip` is the address to return to (for faults, the instruction's). Double
    /// faults are made inside.
    ///
    /// # Errors
    /// `Cpu::exception` is [`crate::cpu::Exception::Shutdown`] then: a triple fault.
    pub(crate) fn deliver_exception(&mut self) -> Result<()> {
        let mut now = self.exception;
        loop {
            let Some(vector) = now.vector() else {
                return match now {
                    Exception::Resume => Ok(()),
                    _ => Err(self.raise(Exception::Shutdown)),
                };
            };
            match now {
                Exception::Page { address, .. } => self.cr2 = address,
                Exception::Debug(bits) => self.note_debug(bits),
                _ => {}
            }
            let resume = self.wants_resume_flag(now);
            if self
                .deliver(vector, error_code(now), Source::Exception, resume)
                .is_ok()
            {
                return Ok(());
            }
            now = self.second_exception(vector);
        }
    }

    /// Faults push a flags image with RF set; debug exceptions push it as it is (instruction breakpoints) or clear (traps).
    fn wants_resume_flag(&self, exception: Exception) -> bool {
        let trap = matches!(exception, Exception::Plain(exception::BP | exception::OF));
        !trap && !matches!(exception, Exception::Debug(_))
    }

    /// The exception to deliver after delivery of `first` has failed with `Cpu::exception`.
    fn second_exception(&mut self, first: u8) -> Exception {
        let second = self.exception;
        let Some(vector) = second.vector() else {
            return second;
        };
        if let Exception::Page { address, .. } = second {
            self.cr2 = address;
        }
        match combine(first, vector) {
            None => Exception::Shutdown,
            Some(exception::DF) => Exception::WithCode(exception::DF, 0),
            Some(_) => second,
        }
    }

    fn note_debug(&mut self, bits: u64) {
        // B0 to B3 tell of this exception alone; the others stay until software clears them.
        self.dr6 = self.dr6 & !0xf | bits | super::control::DR6_ONES;
        self.dr7 &= !super::control::DR7_GD;
    }

    /// Delivers an external interrupt or NMI; `rip` is the address to return to.
    ///
    /// # Errors
    /// As [`Self::deliver_exception`].
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) -> Result<()> {
        if self.deliver(vector, None, Source::External, false).is_ok() {
            return Ok(());
        }
        self.exception = self.second_exception(vector.max(32));
        self.deliver_exception()
    }

    fn deliver(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
        resume: bool,
    ) -> Result<()> {
        let mut flags = self.rflags();
        if resume {
            flags |= Rflags::RF.bits();
        }
        if self.long_mode() {
            self.deliver_long(vector, error, source, flags)
        } else if self.protected() || self.virtual_8086() {
            self.deliver_protected(vector, error, source, flags)
        } else {
            self.deliver_real(vector)
        }
    }

    fn deliver_real(&mut self, vector: u8) -> Result<()> {
        let at = u64::from(vector) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return Err(self.gp(u32::from(vector) * 8 + 2));
        }
        let entry: u32 = self.load_system(self.idtr.base.wrapping_add(at) & 0xffff_ffff)?;
        self.enter_real_handler(entry)
    }

    /// Pushes FLAGS, CS and IP, and goes to a real-mode vector.
    fn enter_real_handler(&mut self, entry: u32) -> Result<()> {
        let mut stack = self.current_stack();
        let flags = self.rflags();
        let cs = self.segments[CS].selector;
        self.push_on(&mut stack, 2, flags & 0xffff)?;
        self.push_on(&mut stack, 2, u64::from(cs))?;
        self.push_on(&mut stack, 2, self.rip & 0xffff)?;
        let offset = u64::from(entry & 0xffff);
        if offset > u64::from(self.segments[CS].limit) {
            return Err(self.gp(0));
        }
        self.set_stack_pointer(stack.sp);
        let cleared = Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF;
        self.system_flags &= !cleared.bits();
        let selector = (entry >> 16) as u16;
        self.segments[CS].selector = selector;
        self.segments[CS].base = u64::from(selector) << 4;
        self.rip = offset;
        self.update_mode();
        Ok(())
    }

    /// The gate of a vector: its first eight bytes, after the checks that all modes share.
    fn gate(&mut self, vector: u8, source: Source, size: u64, kinds: &[u8]) -> Result<Descriptor> {
        let at = u64::from(vector) * size;
        let code = u32::from(vector) * 8 + 2 + source.ext();
        if at + size - 1 > u64::from(self.idtr.limit) {
            return Err(self.gp(code));
        }
        let gate = Descriptor(self.load_system(self.system_address(self.idtr.base, at))?);
        if gate.is_segment() || !kinds.contains(&gate.kind()) {
            return Err(self.gp(code));
        }
        if source == Source::Software && gate.dpl() < self.cpl {
            return Err(self.gp(code));
        }
        if !gate.is_present() {
            return Err(self.np(code));
        }
        Ok(gate)
    }

    /// The handler's code segment.
    fn handler(&mut self, selector: u16, ext: u32) -> Result<CodeTarget> {
        if is_null(selector) {
            return Err(self.gp(ext));
        }
        let code = code_of(selector) | ext;
        let Some(d) = self.read_descriptor(selector)? else {
            return Err(self.gp(code));
        };
        let long_ok = !self.long_mode() || (d.is_long() && !d.is_big());
        if !d.is_code() || d.dpl() > self.cpl || !long_ok {
            return Err(self.gp(code));
        }
        if !d.is_present() {
            return Err(self.np(code));
        }
        self.mark_accessed(selector, d)?;
        let inner = !d.is_conforming() && d.dpl() < self.cpl;
        Ok(CodeTarget {
            segment: Descriptor(d.0 | 1 << 40).segment(selector),
            cpl: if inner { d.dpl() } else { self.cpl },
        })
    }

    fn deliver_long(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
        flags: u64,
    ) -> Result<()> {
        let gates = [kind::INTERRUPT_GATE, kind::TRAP_GATE];
        let gate = self.gate(vector, source, 16, &gates)?;
        let at = self.idtr.base.wrapping_add(u64::from(vector) * 16 + 8);
        let high: u64 = self.load_system(at)?;
        let ext = source.ext();
        let target = self.handler(gate.gate_selector(), ext)?;
        let rip = gate.gate_offset() | high << 32;
        let inner = target.cpl < self.cpl;
        let sp = match gate.gate_ist() {
            0 if inner => self.tss_stack(4 + u64::from(target.cpl) * 8, ext)?,
            0 => self.regs[x86_defs::state::RSP] & self.stack_mask(),
            ist => self.tss_stack(0x24 + (ist - 1) * 8, ext)?,
        };
        let mut stack = Stack {
            segment: Segment::default(),
            sp: sp & !15,
            mask: u64::MAX,
            flat: true,
            user: target.cpl == 3,
            code: ext,
        };
        let frame = [
            u64::from(self.segments[SS].selector),
            self.regs[x86_defs::state::RSP] & self.stack_mask(),
            flags,
            u64::from(self.segments[CS].selector),
            self.rip,
        ];
        for value in frame {
            self.push_on(&mut stack, 8, value)?;
        }
        if let Some(code) = error {
            self.push_on(&mut stack, 8, u64::from(code))?;
        }
        if !super::canonical(rip) {
            return Err(self.gp(ext));
        }
        if inner {
            self.segments[SS] = null_segment(u16::from(target.cpl), target.cpl);
        }
        self.clear_flags_for(gate);
        self.enter_code(&target, rip);
        self.regs[x86_defs::state::RSP] = stack.sp;
        Ok(())
    }

    /// The flags that delivery through a gate clears.
    fn clear_flags_for(&mut self, gate: Descriptor) {
        let mut cleared = Rflags::TF | Rflags::VM | Rflags::RF | Rflags::NT;
        if gate.kind() & 1 == 0 {
            cleared |= Rflags::IF;
        }
        self.system_flags &= !cleared.bits();
    }

    fn deliver_protected(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
        flags: u64,
    ) -> Result<()> {
        let gates = [
            kind::TASK_GATE,
            kind::INTERRUPT_GATE16,
            kind::TRAP_GATE16,
            kind::INTERRUPT_GATE,
            kind::TRAP_GATE,
        ];
        let gate = self.gate(vector, source, 8, &gates)?;
        let ext = source.ext();
        if gate.kind() == kind::TASK_GATE {
            let tss = self.task_gate_target(gate, ext)?;
            return self.switch_task(tss, TaskSwitch::Interrupt, error);
        }
        let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let target = self.handler(gate.gate_selector(), ext)?;
        let virtual_8086 = self.virtual_8086();
        if virtual_8086 && target.cpl != 0 {
            let code = code_of(gate.gate_selector()) | ext;
            return Err(self.gp(code));
        }
        let mut offset = gate.gate_offset();
        if size == 2 {
            offset &= 0xffff;
        }
        let inner = target.cpl < self.cpl;
        let old = self.current_stack();
        let (mut stack, new_ss) = if inner {
            self.inner_stack(target.cpl, ext)?
        } else {
            (Stack { code: ext, ..old }, self.segments[SS])
        };
        if virtual_8086 {
            for seg in [GS, FS, DS, ES] {
                let selector = self.segments[seg].selector;
                self.push_on(&mut stack, size, u64::from(selector))?;
            }
        }
        if inner {
            let ss = self.segments[SS].selector;
            self.push_on(&mut stack, size, u64::from(ss))?;
            let sp = self.regs[x86_defs::state::RSP] & 0xffff_ffff;
            self.push_on(&mut stack, size, sp)?;
        }
        let cs = self.segments[CS].selector;
        for value in [flags, u64::from(cs), self.rip] {
            self.push_on(&mut stack, size, value)?;
        }
        if let Some(code) = error {
            self.push_on(&mut stack, size, u64::from(code))?;
        }
        if self.check_target(&target, offset).is_err() {
            return Err(self.gp(ext));
        }
        self.clear_flags_for(gate);
        if virtual_8086 {
            for seg in [GS, FS, DS, ES] {
                self.segments[seg] = null_segment(0, 0);
            }
        }
        self.segments[SS] = new_ss;
        self.enter_code(&target, offset);
        self.set_stack_pointer_masked(stack.sp, stack.mask);
        Ok(())
    }

    /// INT n, INT3, INTO. `rip` is the following instruction's.
    ///
    /// # Errors
    /// The fault that delivery ends in; `rip` is then set back by the caller.
    fn software_interrupt(&mut self, vector: u8, int_n: bool) -> Result<()> {
        if self.virtual_8086() && int_n {
            if self.cr4.contains(Cr4::VME)
                && let Some(entry) = self.redirected(vector)?
            {
                return self.deliver_redirected(entry);
            }
            if self.iopl() < 3 {
                return Err(self.gp(0));
            }
        }
        self.deliver(vector, None, Source::Software, false)
    }

    /// The real-mode vector of an INT n in virtual-8086 mode whose redirection bit in the TSS is clear.
    fn redirected(&mut self, vector: u8) -> Result<Option<u32>> {
        let limit = u64::from(self.tr.limit);
        if self.tr.attributes & 8 == 0 || limit < 0x67 {
            return Err(self.gp(0));
        }
        let map: u16 = self.load_system(self.system_address(self.tr.base, 0x66))?;
        let at = u64::from(map).wrapping_sub(32) + u64::from(vector / 8);
        if u64::from(map) < 32 || at > limit {
            return Err(self.gp(0));
        }
        let byte: u8 = self.load_system(self.system_address(self.tr.base, at))?;
        if byte & 1 << (vector % 8) != 0 {
            return Ok(None);
        }
        Ok(Some(self.load(u64::from(vector) * 4)?))
    }

    fn deliver_redirected(&mut self, entry: u32) -> Result<()> {
        let mut stack = self.current_stack();
        let mut flags = self.rflags() & 0xffff;
        let virtual_if = self.iopl() < 3;
        if virtual_if {
            let vif = self.system_flag(Rflags::VIF);
            flags = flags & !Rflags::IF.bits() | Rflags::IOPL.bits();
            flags |= if vif { Rflags::IF.bits() } else { 0 };
        }
        let cs = self.segments[CS].selector;
        for value in [flags, u64::from(cs), self.rip & 0xffff] {
            self.push_on(&mut stack, 2, value)?;
        }
        self.set_stack_pointer(stack.sp);
        let own = if virtual_if { Rflags::VIF } else { Rflags::IF };
        self.system_flags &= !(own | Rflags::TF | Rflags::NT).bits();
        let selector = (entry >> 16) as u16;
        self.segments[CS].selector = selector;
        self.segments[CS].base = u64::from(selector) << 4;
        self.rip = u64::from(entry & 0xffff);
        self.update_mode();
        Ok(())
    }

    /// IRET with operand size `size`.
    ///
    /// # Errors
    /// #GP, #NP, #SS, #TS, #PF.
    fn interrupt_return(&mut self, size: u64) -> Result<()> {
        if !self.protected() && !self.virtual_8086() {
            self.return_real(size)?;
        } else if self.virtual_8086() {
            self.return_in_virtual_8086(size)?;
        } else if self.system_flag(Rflags::NT) {
            if self.long_mode() {
                return Err(self.gp(0));
            }
            self.return_from_task()?;
        } else {
            self.return_protected(size)?;
        }
        if self.nmi_masked {
            self.nmi_masked = false;
            self.attention = true;
        }
        Ok(())
    }

    fn return_real(&mut self, size: u64) -> Result<()> {
        let mut stack = self.current_stack();
        let rip = self.pop_from(&mut stack, size)?;
        let cs = self.pop_from(&mut stack, size)? as u16;
        let flags = self.pop_from(&mut stack, size)?;
        if rip > u64::from(self.segments[CS].limit) {
            return Err(self.gp(0));
        }
        self.set_stack_pointer(stack.sp);
        self.segments[CS].selector = cs;
        self.segments[CS].base = u64::from(cs) << 4;
        self.rip = rip;
        let kept = (Rflags::VM | Rflags::VIF | Rflags::VIP).bits();
        self.load_flags(flags, kept, size);
        self.update_mode();
        Ok(())
    }

    /// Replaces the flags but for those in `kept`; a 16-bit image leaves the upper half.
    fn load_flags(&mut self, image: u64, kept: u64, size: u64) {
        let kept = kept | if size == 2 { 0xffff_0000 } else { 0 };
        let new = self.rflags() & kept | image & !kept & 0xffff_ffff;
        self.set_rflags(new);
    }

    fn return_in_virtual_8086(&mut self, size: u64) -> Result<()> {
        let vme = self.cr4.contains(Cr4::VME) && size == 2;
        if self.iopl() < 3 && !vme {
            return Err(self.gp(0));
        }
        let mut stack = self.current_stack();
        let rip = self.pop_from(&mut stack, size)?;
        let cs = self.pop_from(&mut stack, size)? as u16;
        let flags = self.pop_from(&mut stack, size)?;
        if rip > u64::from(self.segments[CS].limit) {
            return Err(self.gp(0));
        }
        let mut kept = (Rflags::IOPL | Rflags::VM | Rflags::VIF | Rflags::VIP).bits();
        let mut image = flags;
        if self.iopl() < 3 {
            let to_if = flags & Rflags::IF.bits() != 0;
            let tf = flags & Rflags::TF.bits() != 0;
            if tf || (to_if && self.system_flag(Rflags::VIP)) {
                return Err(self.gp(0));
            }
            kept = kept & !Rflags::VIF.bits() | Rflags::IF.bits();
            image |= if to_if { Rflags::VIF.bits() } else { 0 };
        }
        self.set_stack_pointer(stack.sp);
        self.segments[CS].selector = cs;
        self.segments[CS].base = u64::from(cs) << 4;
        self.rip = rip;
        let upper = if size == 2 {
            0xffff_0000 & !Rflags::VIF.bits()
        } else {
            0
        };
        let kept = kept | upper;
        let new = self.rflags() & kept | image & !kept & 0xffff_ffff;
        self.set_rflags(new);
        self.update_mode();
        Ok(())
    }

    fn return_protected(&mut self, size: u64) -> Result<()> {
        let mut stack = self.current_stack();
        let rip = self.pop_from(&mut stack, size)?;
        let selector = self.pop_from(&mut stack, size)? as u16;
        let flags = self.pop_from(&mut stack, size)?;
        let to_virtual = flags & Rflags::VM.bits() != 0;
        if to_virtual && self.cpl == 0 && size == 4 && !self.long_mode() {
            return self.return_to_virtual_8086(stack, rip, selector, flags);
        }
        let target = self.return_target(selector)?;
        self.check_target(&target, rip)?;
        let outer = target.cpl > self.cpl;
        // 64-bit mode always pops the stack pointer.
        let new_stack = if outer || self.mode.is_64bit() {
            let sp = self.pop_from(&mut stack, size)?;
            let ss = self.pop_from(&mut stack, size)? as u16;
            Some((sp, self.outer_stack_segment(ss, &target)?))
        } else {
            None
        };
        let mut kept = (Rflags::VM | Rflags::VIF | Rflags::VIP).bits();
        if self.cpl == 0 {
            kept &= !(Rflags::VIF | Rflags::VIP).bits();
        } else {
            kept |= Rflags::IOPL.bits();
        }
        if self.cpl > self.iopl() {
            kept |= Rflags::IF.bits();
        }
        let kept = kept | if size == 2 { 0xffff_0000 } else { 0 };
        let new = self.rflags() & kept | flags & !kept & 0xffff_ffff;
        self.set_rflags_without_mode(new);
        match new_stack {
            Some((sp, segment)) => {
                self.segments[SS] = segment;
                self.enter_code(&target, rip);
                let mask = self.stack_mask();
                self.set_stack_pointer_masked(sp, mask);
                if outer {
                    self.drop_privileged_segments();
                    self.update_mode();
                }
            }
            None => {
                self.set_stack_pointer(stack.sp);
                self.enter_code(&target, rip);
            }
        }
        Ok(())
    }

    fn return_to_virtual_8086(
        &mut self,
        mut stack: Stack,
        rip: u64,
        cs: u16,
        flags: u64,
    ) -> Result<()> {
        let mut values = [0; 6];
        for value in &mut values {
            *value = self.pop_from(&mut stack, 4)?;
        }
        let [sp, ss, es, ds, fs, gs] = values;
        for (seg, selector) in [
            (ES, es),
            (CS, u64::from(cs)),
            (SS, ss),
            (DS, ds),
            (FS, fs),
            (GS, gs),
        ] {
            self.segments[seg] = virtual_segment(selector as u16);
        }
        self.cpl = 3;
        self.rip = rip & 0xffff;
        self.regs[x86_defs::state::RSP] = sp;
        self.set_rflags_without_mode(flags & 0xffff_ffff);
        self.update_mode();
        Ok(())
    }
}

/// A segment register in virtual-8086 mode.
pub(super) fn virtual_segment(selector: u16) -> Segment {
    Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        attributes: ATTR_VIRTUAL_8086,
    }
}

pub(super) fn int_n(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.software_interrupt(op.imm as u8, true)
}

pub(super) fn int3(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.software_interrupt(exception::BP, false)
}

pub(super) fn into(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.status.to_rflags() & Rflags::OF.bits() != 0 {
        return cpu.software_interrupt(exception::OF, false);
    }
    Ok(())
}

/// INT1: as an exception, without a look at the gate's DPL.
pub(super) fn int1(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.deliver(exception::DB, None, Source::Exception, false)
}

pub(super) fn iret<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.interrupt_return(size_of::<T>() as u64)
}

/// BOUND: #BR unless the index lies between the two bounds, which are signed.
pub(super) fn bound<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let size = size_of::<T>() as u64;
    let linear = cpu.linear_op(op, size * 2, crate::cpu::Access::Read)?;
    let low: T = cpu.load_in(linear, op.seg)?;
    let high: T = cpu.load_in(cpu.wrap_linear(linear.wrapping_add(size)), op.seg)?;
    let signed = |v: u64| (v as i64) << (64 - T::BITS) >> (64 - T::BITS);
    let index = signed(cpu.reg_a::<T>(op).to_u64());
    if index < signed(low.to_u64()) || index > signed(high.to_u64()) {
        return Err(cpu.raise(Exception::Plain(exception::BR)));
    }
    Ok(())
}

/// UD0, UD1, UD2.
pub(super) fn undefined(cpu: &mut Cpu, _: &Op) -> Result<()> {
    Err(cpu.ud())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_faults_by_the_manuals_table() {
        use exception::{BP, DF, GP, NMI, NP, PF, UD};
        for first in [BP, UD, NMI] {
            for second in [UD, GP, PF] {
                assert_eq!(combine(first, second), Some(second));
            }
        }
        assert_eq!(combine(GP, NP), Some(DF));
        assert_eq!(combine(GP, PF), Some(PF));
        assert_eq!(combine(GP, UD), Some(UD));
        assert_eq!(combine(PF, PF), Some(DF));
        assert_eq!(combine(PF, GP), Some(DF));
        assert_eq!(combine(PF, UD), Some(UD));
        assert_eq!(combine(DF, UD), None);
    }
}
