//! Far transfers of control: JMP, CALL and RET to other code segments and through call gates (SDM volume 3, section 6.8;
//! volume 2, the instructions' operations).

use x86_defs::state::{CS, SS, Segment};

use super::descriptor::{ATTR_LONG, Descriptor, UNUSABLE, code_of, is_null, kind};
use super::segment::null_segment;
use super::stack::{Stack, segment_mask};
use super::task::TaskSwitch;
use crate::cpu::{Access, Cpu, Op, Result, Value};

/// What a checked code segment descriptor becomes when it is loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct CodeTarget {
    pub(super) segment: Segment,
    pub(super) cpl: u8,
}

impl CodeTarget {
    pub(super) fn is_64bit(&self, long_mode: bool) -> bool {
        long_mode && self.segment.attributes & ATTR_LONG != 0
    }
}

impl Cpu {
    /// #GP(0) unless an instruction pointer is inside the code segment or canonical.
    pub(super) fn check_target(&mut self, target: &CodeTarget, rip: u64) -> Result<()> {
        let good = if target.is_64bit(self.long_mode()) {
            super::canonical(rip)
        } else {
            rip <= u64::from(target.segment.limit)
        };
        if good { Ok(()) } else { Err(self.gp(0)) }
    }

    /// L and D may not both be set in long mode.
    pub(super) fn check_long_code(&mut self, d: Descriptor, code: u32) -> Result<()> {
        if self.long_mode() && d.is_long() && d.is_big() {
            return Err(self.gp(code));
        }
        Ok(())
    }

    /// Loads CS and RIP.
    pub(super) fn enter_code(&mut self, target: &CodeTarget, rip: u64) {
        self.segments[CS] = Segment {
            selector: target.segment.selector & !3 | u16::from(target.cpl),
            ..target.segment
        };
        self.cpl = target.cpl;
        self.rip = rip;
        self.update_mode();
    }

    /// A code segment reached directly by a far JMP or CALL: privilege does not change.
    fn direct_target(&mut self, selector: u16, d: Descriptor) -> Result<CodeTarget> {
        let code = code_of(selector);
        let rpl = selector as u8 & 3;
        let allowed = if d.is_conforming() {
            d.dpl() <= self.cpl
        } else {
            rpl <= self.cpl && d.dpl() == self.cpl
        };
        if !d.is_code() || !allowed {
            return Err(self.gp(code));
        }
        self.check_long_code(d, code)?;
        if !d.is_present() {
            return Err(self.np(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(CodeTarget {
            segment: Descriptor(d.0 | 1 << 40).segment(selector),
            cpl: self.cpl,
        })
    }

    /// The descriptor of a far transfer's selector.
    fn transfer_descriptor(&mut self, selector: u16) -> Result<Descriptor> {
        if is_null(selector) {
            return Err(self.gp(0));
        }
        match self.read_descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.gp(code_of(selector))),
        }
    }

    /// Real and virtual-8086 mode: the segment is where the selector says.
    fn real_target(&mut self, selector: u16, offset: u64) -> Result<()> {
        if offset > u64::from(self.segments[CS].limit) {
            return Err(self.gp(0));
        }
        let cs = &mut self.segments[CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.rip = offset;
        self.update_mode();
        Ok(())
    }

    /// Far JMP.
    ///
    /// # Errors
    /// #GP, #NP, #TS, #PF.
    fn jump_far(&mut self, selector: u16, offset: u64) -> Result<()> {
        if !self.protected() {
            return self.real_target(selector, offset);
        }
        let d = self.transfer_descriptor(selector)?;
        if d.is_segment() {
            let target = self.direct_target(selector, d)?;
            self.check_target(&target, offset)?;
            self.enter_code(&target, offset);
            return Ok(());
        }
        self.check_gate(selector, d)?;
        match d.kind() {
            kind::CALL_GATE | kind::CALL_GATE16 => {
                let (target, offset) = self.gate_target(selector, d, false)?;
                self.check_target(&target, offset)?;
                self.enter_code(&target, offset);
                Ok(())
            }
            kind::TASK_GATE => {
                let tss = self.task_gate_target(d, 0)?;
                self.switch_task(tss, TaskSwitch::Jump, None)
            }
            _ => {
                let tss = self.direct_tss(selector)?;
                self.switch_task(tss, TaskSwitch::Jump, None)
            }
        }
    }

    /// The checks of a system descriptor that a far transfer names: its type and privilege.
    fn check_gate(&mut self, selector: u16, d: Descriptor) -> Result<()> {
        let code = code_of(selector);
        let known: &[u8] = if self.long_mode() {
            &[kind::CALL_GATE]
        } else {
            &[
                kind::CALL_GATE,
                kind::CALL_GATE16,
                kind::TASK_GATE,
                kind::TSS_AVAILABLE,
                kind::TSS16_AVAILABLE,
            ]
        };
        let rpl = selector as u8 & 3;
        if !known.contains(&d.kind()) || d.dpl() < self.cpl || d.dpl() < rpl {
            return Err(self.gp(code));
        }
        if !d.is_present() {
            return Err(self.np(code));
        }
        Ok(())
    }

    /// Where a call gate leads: the code segment with the privilege level that it runs at, and the offset.
    fn gate_target(&mut self, gate: u16, d: Descriptor, call: bool) -> Result<(CodeTarget, u64)> {
        let mut offset = d.gate_offset();
        if d.kind() == kind::CALL_GATE16 {
            offset &= 0xffff;
        }
        if self.long_mode() {
            let Some(high) = self.read_descriptor_high(gate)? else {
                return Err(self.gp(code_of(gate)));
            };
            if high >> 40 & 0x1f != 0 {
                return Err(self.gp(code_of(gate)));
            }
            offset |= high << 32;
        }
        let selector = d.gate_selector();
        let code = code_of(selector);
        let target = self.transfer_descriptor(selector)?;
        let more = target.is_code() && !target.is_conforming() && target.dpl() < self.cpl;
        let same = target.dpl() == self.cpl || (target.is_conforming() && target.dpl() <= self.cpl);
        let long_ok = !self.long_mode() || (target.is_long() && !target.is_big());
        if !target.is_code() || !(same || (more && call)) || !long_ok {
            return Err(self.gp(code));
        }
        if !target.is_present() {
            return Err(self.np(code));
        }
        let target_selector = selector;
        self.mark_accessed(target_selector, target)?;
        Ok((
            CodeTarget {
                segment: Descriptor(target.0 | 1 << 40).segment(target_selector),
                cpl: if more { target.dpl() } else { self.cpl },
            },
            offset,
        ))
    }

    /// Far CALL with operand size `size` (bytes).
    ///
    /// # Errors
    /// #GP, #NP, #SS, #TS, #PF.
    fn call_far(&mut self, selector: u16, offset: u64, size: u64) -> Result<()> {
        let mut stack = self.current_stack();
        let (cs, rip) = (u64::from(self.segments[CS].selector), self.rip);
        if !self.protected() {
            self.push_on(&mut stack, size, cs)?;
            self.push_on(&mut stack, size, rip)?;
            self.real_target(selector, offset)?;
            self.set_stack_pointer(stack.sp);
            return Ok(());
        }
        let d = self.transfer_descriptor(selector)?;
        if d.is_segment() {
            let target = self.direct_target(selector, d)?;
            self.push_on(&mut stack, size, cs)?;
            self.push_on(&mut stack, size, rip)?;
            self.check_target(&target, offset)?;
            self.set_stack_pointer(stack.sp);
            self.enter_code(&target, offset);
            return Ok(());
        }
        self.check_gate(selector, d)?;
        match d.kind() {
            kind::CALL_GATE | kind::CALL_GATE16 => self.call_gate(selector, d),
            kind::TASK_GATE => {
                let tss = self.task_gate_target(d, 0)?;
                self.switch_task(tss, TaskSwitch::Call, None)
            }
            _ => {
                let tss = self.direct_tss(selector)?;
                self.switch_task(tss, TaskSwitch::Call, None)
            }
        }
    }

    fn call_gate(&mut self, gate: u16, d: Descriptor) -> Result<()> {
        let (target, offset) = self.gate_target(gate, d, true)?;
        let size = match d.kind() {
            _ if self.long_mode() => 8,
            kind::CALL_GATE16 => 2,
            _ => 4,
        };
        let old = self.current_stack();
        let (cs, rip) = (u64::from(self.segments[CS].selector), self.rip);
        let ss = u64::from(self.segments[SS].selector);
        if target.cpl == self.cpl {
            let mut stack = Stack {
                flat: old.flat || size == 8,
                ..old
            };
            self.push_on(&mut stack, size, cs)?;
            self.push_on(&mut stack, size, rip)?;
            self.check_target(&target, offset)?;
            self.enter_code(&target, offset);
            self.set_stack_pointer_masked(stack.sp, stack.mask);
            return Ok(());
        }
        let (mut stack, new_ss) = self.inner_stack(target.cpl, 0)?;
        self.push_on(&mut stack, size, ss)?;
        self.push_on(&mut stack, size, old.sp)?;
        if size != 8 {
            self.copy_parameters(&old, &mut stack, size, d.gate_parameters())?;
        }
        self.push_on(&mut stack, size, cs)?;
        self.push_on(&mut stack, size, rip)?;
        self.check_target(&target, offset)?;
        self.segments[SS] = new_ss;
        self.enter_code(&target, offset);
        self.set_stack_pointer_masked(stack.sp, stack.mask);
        Ok(())
    }

    fn copy_parameters(
        &mut self,
        old: &Stack,
        new: &mut Stack,
        size: u64,
        count: u32,
    ) -> Result<()> {
        let mut values = [0; 31];
        let mut from = *old;
        for value in values.iter_mut().take(count as usize) {
            *value = self.pop_from(&mut from, size)?;
        }
        for value in values[..count as usize].iter().rev() {
            self.push_on(new, size, *value)?;
        }
        Ok(())
    }

    /// The stack for a more privileged level, from the TSS. `ext` is the EXT bit of error codes.
    pub(super) fn inner_stack(&mut self, cpl: u8, ext: u32) -> Result<(Stack, Segment)> {
        if self.long_mode() {
            let sp = self.tss_stack(4 + u64::from(cpl) * 8, ext)?;
            let stack = Stack {
                segment: Segment::default(),
                sp,
                mask: u64::MAX,
                flat: true,
                user: false,
                code: ext,
            };
            return Ok((stack, null_segment(u16::from(cpl), cpl)));
        }
        let wide = self.tr.attributes & 8 != 0;
        let level = u64::from(cpl);
        let (at, size) = if wide {
            (4 + level * 8, 6)
        } else {
            (2 + level * 4, 4)
        };
        let bad_tss = code_of(self.tr.selector) | ext;
        if at + size - 1 > u64::from(self.tr.limit) {
            return Err(self.ts(bad_tss));
        }
        let base = self.tr.base;
        let field = |offset| base.wrapping_add(at + offset) & 0xffff_ffff;
        let (sp, selector) = if wide {
            let sp = u64::from(self.load_system::<u32>(field(0))?);
            (sp, self.load_system::<u16>(field(4))?)
        } else {
            let sp = u64::from(self.load_system::<u16>(field(0))?);
            (sp, self.load_system::<u16>(field(2))?)
        };
        let segment = self.inner_stack_segment(selector, cpl, ext)?;
        let mask = segment_mask(&segment);
        let stack = Stack {
            segment,
            sp: sp & mask,
            mask,
            flat: false,
            user: false,
            code: code_of(selector) | ext,
        };
        Ok((stack, segment))
    }

    fn inner_stack_segment(&mut self, selector: u16, cpl: u8, ext: u32) -> Result<Segment> {
        if is_null(selector) {
            return Err(self.ts(ext));
        }
        let code = code_of(selector) | ext;
        let Some(d) = self.read_descriptor(selector)? else {
            return Err(self.ts(code));
        };
        if selector as u8 & 3 != cpl || d.dpl() != cpl || !d.is_writable_data() {
            return Err(self.ts(code));
        }
        if !d.is_present() {
            return Err(self.ss(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(Descriptor(d.0 | 1 << 40).segment(selector))
    }

    /// A stack pointer from the 64-bit TSS.
    pub(super) fn tss_stack(&mut self, at: u64, ext: u32) -> Result<u64> {
        if self.tr.attributes & UNUSABLE != 0 || at + 7 > u64::from(self.tr.limit) {
            let code = code_of(self.tr.selector) | ext;
            return Err(self.ts(code));
        }
        let sp = self.load_system(self.tr.base.wrapping_add(at))?;
        if !super::canonical(sp) {
            return Err(self.ss(ext));
        }
        Ok(sp)
    }

    /// Far RET with operand size `size`; `release` bytes of parameters go.
    ///
    /// # Errors
    /// #GP, #NP, #SS, #PF.
    fn return_far(&mut self, size: u64, release: u64) -> Result<()> {
        let mut stack = self.current_stack();
        let rip = self.pop_from(&mut stack, size)?;
        let selector = self.pop_from(&mut stack, size)? as u16;
        if !self.protected() {
            self.real_target(selector, rip)?;
            self.set_stack_pointer(stack.sp.wrapping_add(release));
            return Ok(());
        }
        let target = self.return_target(selector)?;
        self.check_target(&target, rip)?;
        stack.sp = stack.sp.wrapping_add(release) & stack.mask;
        if target.cpl == self.cpl {
            self.set_stack_pointer(stack.sp);
            self.enter_code(&target, rip);
            return Ok(());
        }
        let sp = self.pop_from(&mut stack, size)?;
        let ss = self.pop_from(&mut stack, size)? as u16;
        let segment = self.outer_stack_segment(ss, &target)?;
        self.segments[SS] = segment;
        self.enter_code(&target, rip);
        let sp = sp.wrapping_add(release);
        let mask = self.stack_mask();
        self.set_stack_pointer_masked(sp, mask);
        self.drop_privileged_segments();
        self.update_mode();
        Ok(())
    }

    /// The code segment that RET or IRET goes back to; its RPL is the privilege level there.
    pub(super) fn return_target(&mut self, selector: u16) -> Result<CodeTarget> {
        let d = self.transfer_descriptor(selector)?;
        let code = code_of(selector);
        let rpl = selector as u8 & 3;
        let allowed = if d.is_conforming() {
            d.dpl() <= rpl
        } else {
            d.dpl() == rpl
        };
        if !d.is_code() || rpl < self.cpl || !allowed {
            return Err(self.gp(code));
        }
        self.check_long_code(d, code)?;
        if !d.is_present() {
            return Err(self.np(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(CodeTarget {
            segment: Descriptor(d.0 | 1 << 40).segment(selector),
            cpl: rpl,
        })
    }

    /// The stack segment of a return to an outer level, or to 64-bit code.
    pub(super) fn outer_stack_segment(
        &mut self,
        selector: u16,
        to: &CodeTarget,
    ) -> Result<Segment> {
        let rpl = selector as u8 & 3;
        if is_null(selector) {
            if to.is_64bit(self.long_mode()) && to.cpl != 3 && rpl == to.cpl {
                return Ok(null_segment(selector, to.cpl));
            }
            return Err(self.gp(0));
        }
        let code = code_of(selector);
        let Some(d) = self.read_descriptor(selector)? else {
            return Err(self.gp(code));
        };
        if rpl != to.cpl || d.dpl() != to.cpl || !d.is_writable_data() {
            return Err(self.gp(code));
        }
        if !d.is_present() {
            return Err(self.ss(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(Descriptor(d.0 | 1 << 40).segment(selector))
    }

    /// A far pointer in memory: `T` is the offset's size.
    fn read_far_pointer<T: Value>(&mut self, op: &Op) -> Result<(u16, u64)> {
        let size = size_of::<T>() as u64;
        let linear = self.linear_op(op, size + 2, Access::Read)?;
        let offset: T = self.load_in(linear, op.seg)?;
        let at = self.wrap_linear(linear.wrapping_add(size));
        let selector: u16 = self.load_in(at, op.seg)?;
        Ok((selector, offset.to_u64()))
    }
}

/// Far JMP to an immediate pointer.
pub(super) fn jmp_far_immediate(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.jump_far((op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

/// Far CALL to an immediate pointer with operand size `T`.
pub(super) fn call_far_immediate<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let size = size_of::<T>() as u64;
    cpu.call_far((op.imm >> 32) as u16, op.imm & 0xffff_ffff, size)
}

/// Far JMP to a pointer in memory.
pub(super) fn jmp_far_memory<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (selector, offset) = cpu.read_far_pointer::<T>(op)?;
    cpu.jump_far(selector, offset)
}

/// Far CALL to a pointer in memory.
pub(super) fn call_far_memory<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (selector, offset) = cpu.read_far_pointer::<T>(op)?;
    cpu.call_far(selector, offset, size_of::<T>() as u64)
}

/// Far RET; the immediate is the number of bytes of parameters.
pub(super) fn ret_far<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.return_far(size_of::<T>() as u64, op.imm & 0xffff)
}
