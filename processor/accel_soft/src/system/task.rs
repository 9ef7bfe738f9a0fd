//! Hardware task switching with 16- and 32-bit task state segments (SDM volume 3, chapter 9).

use x86_defs::control::{Cr0, Rflags};
use x86_defs::state::{CS, DS, ES, FS, GS, SS, Segment};

use super::descriptor::{Descriptor, code_of, is_null, kind};
use super::interrupt::virtual_segment;
use super::segment::null_segment;
use crate::cpu::{Access, Cpu, Result};

/// Why tasks are switched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TaskSwitch {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// An interrupt or exception through a task gate.
    Interrupt,
    /// IRET with NT set.
    Return,
}

/// A TSS that a switch may go to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tss {
    selector: u16,
    descriptor: Descriptor,
}

/// The registers that a TSS holds.
#[derive(Debug, Clone, Copy, Default)]
struct Image {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    ldtr: u16,
    trap: bool,
}

/// Offsets in the two kinds of TSS (SDM volume 3, figures 9-2 and 9-10).
struct Layout {
    word: u64,
    least_limit: u64,
    rip: u64,
    flags: u64,
    gpr: u64,
    segments: u64,
    segment_count: usize,
    ldtr: u64,
}

const LAYOUT32: Layout = Layout {
    word: 4,
    least_limit: 0x67,
    rip: 0x20,
    flags: 0x24,
    gpr: 0x28,
    segments: 0x48,
    segment_count: 6,
    ldtr: 0x60,
};

const LAYOUT16: Layout = Layout {
    word: 2,
    least_limit: 0x2b,
    rip: 0x0e,
    flags: 0x10,
    gpr: 0x12,
    segments: 0x22,
    segment_count: 4,
    ldtr: 0x2a,
};

fn layout(attributes: u32) -> &'static Layout {
    if attributes & 8 != 0 {
        &LAYOUT32
    } else {
        &LAYOUT16
    }
}

impl Cpu {
    /// The TSS that a task gate names; `ext` is the EXT bit of error codes.
    pub(super) fn task_gate_target(&mut self, gate: Descriptor, ext: u32) -> Result<Tss> {
        let selector = gate.gate_selector();
        let code = code_of(selector) | ext;
        if is_null(selector) || selector & 4 != 0 {
            return Err(self.gp(code));
        }
        let Some(descriptor) = self.read_descriptor(selector)? else {
            return Err(self.gp(code));
        };
        let available = [kind::TSS_AVAILABLE, kind::TSS16_AVAILABLE];
        if descriptor.is_segment() || !available.contains(&descriptor.kind()) {
            return Err(self.gp(code));
        }
        if !descriptor.is_present() {
            return Err(self.np(code));
        }
        Ok(Tss {
            selector,
            descriptor,
        })
    }

    /// The TSS that a far transfer names itself; its privilege has been checked.
    pub(super) fn direct_tss(&mut self, selector: u16) -> Result<Tss> {
        let code = code_of(selector);
        if selector & 4 != 0 {
            return Err(self.gp(code));
        }
        match self.read_descriptor(selector)? {
            Some(descriptor) => Ok(Tss {
                selector,
                descriptor,
            }),
            None => Err(self.gp(code)),
        }
    }

    /// IRET of a nested task: back to the one in the link field.
    pub(super) fn return_from_task(&mut self) -> Result<()> {
        let selector: u16 = self.load_system(self.system_address(self.tr.base, 0))?;
        let code = code_of(selector);
        if is_null(selector) || selector & 4 != 0 {
            return Err(self.ts(code));
        }
        let Some(descriptor) = self.read_descriptor(selector)? else {
            return Err(self.ts(code));
        };
        let busy = [kind::TSS_BUSY, kind::TSS16_BUSY];
        if descriptor.is_segment() || !busy.contains(&descriptor.kind()) {
            return Err(self.ts(code));
        }
        if !descriptor.is_present() {
            return Err(self.np(code));
        }
        let tss = Tss {
            selector,
            descriptor,
        };
        self.switch_task(tss, TaskSwitch::Return, None)
    }

    fn tss_field(&mut self, base: u64, at: u64, size: u64) -> Result<u64> {
        let linear = self.system_address(base, at);
        Ok(match size {
            2 => u64::from(self.load_system::<u16>(linear)?),
            _ => u64::from(self.load_system::<u32>(linear)?),
        })
    }

    fn set_tss_field(&mut self, base: u64, at: u64, size: u64, value: u64) -> Result<()> {
        let linear = self.system_address(base, at);
        match size {
            2 => self.store_system(linear, value as u16),
            _ => self.store_system(linear, value as u32),
        }
    }

    fn read_image(&mut self, tss: &Segment) -> Result<Image> {
        let l = layout(tss.attributes);
        let base = tss.base;
        let mut image = Image {
            rip: self.tss_field(base, l.rip, l.word)?,
            flags: self.tss_field(base, l.flags, l.word)?,
            ldtr: self.tss_field(base, l.ldtr, 2)? as u16,
            ..Image::default()
        };
        for i in 0..8 {
            image.gpr[i as usize] = self.tss_field(base, l.gpr + i * l.word, l.word)?;
        }
        for i in 0..l.segment_count as u64 {
            let at = l.segments + i * l.word;
            image.segments[i as usize] = self.tss_field(base, at, 2)? as u16;
        }
        if l.word == 4 {
            image.cr3 = Some(self.tss_field(base, 0x1c, 4)?);
            image.trap = self.tss_field(base, 0x64, 2)? & 1 != 0;
        }
        Ok(image)
    }

    fn write_image(&mut self, flags: u64) -> Result<()> {
        let l = layout(self.tr.attributes);
        let base = self.tr.base;
        // The whole range must be writable before anything changes.
        let first = self.system_address(base, l.rip);
        let last = self.system_address(base, l.ldtr - 1);
        for at in [first, last] {
            self.map_for(at, Access::Write, 6, crate::cpu::Privilege::System)?;
        }
        self.set_tss_field(base, l.rip, l.word, self.rip)?;
        self.set_tss_field(base, l.flags, l.word, flags)?;
        for i in 0..8 {
            let value = self.regs[i as usize];
            self.set_tss_field(base, l.gpr + i * l.word, l.word, value)?;
        }
        for i in 0..l.segment_count as u64 {
            let selector = self.segments[i as usize].selector;
            self.set_tss_field(base, l.segments + i * l.word, 2, u64::from(selector))?;
        }
        Ok(())
    }

    /// Switches to another task. `error` is pushed onto the new task's stack.
    ///
    /// # Errors
    /// #TS, #NP, #SS, #GP, #PF: before the new task's state is loaded in the old task's context, afterwards in the new
    /// one's.
    pub(super) fn switch_task(
        &mut self,
        tss: Tss,
        why: TaskSwitch,
        error: Option<u32>,
    ) -> Result<()> {
        let selector = tss.selector;
        let new_tr = tss.descriptor.segment(selector);
        let ext = u32::from(why == TaskSwitch::Interrupt);
        let l = layout(new_tr.attributes);
        if u64::from(new_tr.limit) < l.least_limit {
            return Err(self.ts(code_of(selector) | ext));
        }
        let image = self.read_image(&new_tr)?;
        let mut old_flags = self.rflags();
        if why == TaskSwitch::Return {
            old_flags &= !Rflags::NT.bits();
        }
        self.write_image(old_flags)?;
        let old = self.tr;
        if matches!(why, TaskSwitch::Jump | TaskSwitch::Return) {
            self.mark_busy(old.selector, false)?;
        }
        let nested = matches!(why, TaskSwitch::Call | TaskSwitch::Interrupt);
        if nested {
            self.set_tss_field(new_tr.base, 0, 2, u64::from(old.selector))?;
        }
        if why != TaskSwitch::Return {
            self.mark_busy(selector, true)?;
        }
        self.tr = Segment {
            attributes: new_tr.attributes | 2,
            ..new_tr
        };
        self.load_image(&image, nested, l.word == 4)?;
        if let Some(code) = error {
            let mut stack = self.current_stack();
            self.push_on(&mut stack, l.word, u64::from(code))?;
            self.set_stack_pointer(stack.sp);
        }
        if image.trap {
            // The T flag of the TSS: a debug exception before the first instruction.
            const DR6_BT: u64 = 1 << 15;
            return Err(self.raise(crate::cpu::Exception::Debug(DR6_BT)));
        }
        Ok(())
    }

    /// The new task's registers. From here on faults belong to the new task.
    fn load_image(&mut self, image: &Image, nested: bool, wide: bool) -> Result<()> {
        self.cr0 |= Cr0::TS;
        self.dr7 &= !0x155;
        if let Some(cr3) = image.cr3.filter(|_| self.cr0.contains(Cr0::PG)) {
            self.set_cr3(cr3)?;
        }
        let upper = if wide { 0 } else { self.rflags() & 0xffff_0000 };
        let flags = image.flags | upper | if nested { Rflags::NT.bits() } else { 0 };
        self.rip = image.rip;
        for (i, value) in image.gpr.iter().enumerate() {
            self.regs[i] = if wide {
                *value
            } else {
                self.regs[i] & 0xffff_0000 | value
            };
        }
        for seg in 0..6 {
            self.segments[seg] = null_segment(image.segments[seg], 0);
        }
        self.ldtr = null_segment(image.ldtr, 0);
        self.set_rflags(flags);
        self.load_task_ldtr(image.ldtr)?;
        if self.virtual_8086() {
            for seg in 0..6 {
                self.segments[seg] = virtual_segment(image.segments[seg]);
            }
            self.cpl = 3;
            self.update_mode();
            return Ok(());
        }
        self.load_task_segments(&image.segments)
    }

    fn load_task_ldtr(&mut self, selector: u16) -> Result<()> {
        if is_null(selector) {
            return Ok(());
        }
        let code = code_of(selector);
        let descriptor = if selector & 4 == 0 {
            self.read_descriptor(selector)?
        } else {
            None
        };
        match descriptor {
            Some(d) if !d.is_segment() && d.kind() == kind::LDT && d.is_present() => {
                self.ldtr = d.segment(selector);
                Ok(())
            }
            _ => Err(self.ts(code)),
        }
    }

    fn load_task_segments(&mut self, selectors: &[u16; 6]) -> Result<()> {
        let cs = selectors[CS];
        let code = code_of(cs);
        let cpl = cs as u8 & 3;
        let descriptor = if is_null(cs) {
            None
        } else {
            self.read_descriptor(cs)?
        };
        let Some(d) = descriptor else {
            return Err(self.ts(code));
        };
        let level = if d.is_conforming() {
            d.dpl() <= cpl
        } else {
            d.dpl() == cpl
        };
        if !d.is_code() || !level {
            return Err(self.ts(code));
        }
        if !d.is_present() {
            return Err(self.np(code));
        }
        self.mark_accessed(cs, d)?;
        self.segments[CS] = Descriptor(d.0 | 1 << 40).segment(cs);
        self.cpl = cpl;
        self.update_mode();
        self.load_task_stack(selectors[SS])?;
        for seg in [ES, DS, FS, GS] {
            let selector = selectors[seg];
            if self.load_segment(seg, selector).is_err() {
                return Err(self.task_segment_fault());
            }
        }
        if self.rip > u64::from(self.segments[CS].limit) {
            return Err(self.gp(0));
        }
        Ok(())
    }

    fn load_task_stack(&mut self, selector: u16) -> Result<()> {
        let code = code_of(selector);
        let descriptor = if is_null(selector) {
            None
        } else {
            self.read_descriptor(selector)?
        };
        let Some(d) = descriptor else {
            return Err(self.ts(code));
        };
        if selector as u8 & 3 != self.cpl || d.dpl() != self.cpl || !d.is_writable_data() {
            return Err(self.ts(code));
        }
        if !d.is_present() {
            return Err(self.ss(code));
        }
        self.mark_accessed(selector, d)?;
        self.segments[SS] = Descriptor(d.0 | 1 << 40).segment(selector);
        self.update_mode();
        Ok(())
    }

    /// What would be #GP in a segment load is #TS in a task switch.
    fn task_segment_fault(&mut self) -> crate::cpu::Fault {
        use crate::cpu::Exception;
        match self.exception {
            Exception::WithCode(x86_defs::exception::GP, code) => self.ts(code),
            other => self.raise(other),
        }
    }
}
