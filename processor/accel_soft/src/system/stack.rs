//! The stack as far transfers and events use it: frames that are written or read whole before registers change.

use x86_defs::state::{RSP, SS, Segment};

use super::descriptor::{ATTR_BIG, in_limit};
use crate::cpu::{Cpu, Mode, Result};

/// A stack on which a frame is being built or read, apart from the registers until all has gone well.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stack {
    /// The stack segment; not looked at when `flat`.
    pub(super) segment: Segment,
    /// Stack pointer.
    pub(super) sp: u64,
    /// Bits of the stack pointer that count.
    pub(super) mask: u64,
    /// 64-bit: no segment.
    pub(super) flat: bool,
    /// Accesses are made with user privilege.
    pub(super) user: bool,
    /// What #SS carries as its error code.
    pub(super) code: u32,
}

/// The stack pointer's bits that count with this stack segment outside 64-bit mode.
pub(super) fn segment_mask(segment: &Segment) -> u64 {
    if segment.attributes & ATTR_BIG != 0 {
        0xffff_ffff
    } else {
        0xffff
    }
}

impl Cpu {
    /// The stack pointer's bits that count.
    #[inline]
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.mode.is_64bit() {
            u64::MAX
        } else if self.mode.contains(Mode::STACK32) {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// The stack pointer.
    #[inline]
    pub(crate) fn stack_pointer(&self) -> u64 {
        self.regs[RSP] & self.stack_mask()
    }

    /// Replaces the part of the stack pointer that counts.
    #[inline]
    pub(crate) fn set_stack_pointer(&mut self, sp: u64) {
        self.set_stack_pointer_masked(sp, self.stack_mask());
    }

    /// Replaces the part of the stack pointer that `mask` names. A 32-bit stack pointer clears the upper half.
    pub(super) fn set_stack_pointer_masked(&mut self, sp: u64, mask: u64) {
        let kept = if mask == 0xffff {
            self.regs[RSP] & !0xffff
        } else {
            0
        };
        self.regs[RSP] = kept | (sp & mask);
    }

    /// The stack in use.
    pub(super) fn current_stack(&self) -> Stack {
        Stack {
            segment: self.segments[SS],
            sp: self.stack_pointer(),
            mask: self.stack_mask(),
            flat: self.mode.is_64bit(),
            user: self.cpl == 3,
            code: 0,
        }
    }

    fn stack_address(&mut self, stack: &Stack, sp: u64, size: u64) -> Result<u64> {
        if stack.flat {
            if !super::canonical(sp) || !super::canonical(sp.wrapping_add(size - 1)) {
                return Err(self.ss(stack.code));
            }
            return Ok(sp);
        }
        if !in_limit(&stack.segment, sp, size) {
            return Err(self.ss(stack.code));
        }
        Ok(stack.segment.base.wrapping_add(sp) & 0xffff_ffff)
    }

    /// Pushes `size` (2, 4 or 8) bytes.
    ///
    /// # Errors
    /// #SS, #PF.
    pub(super) fn push_on(&mut self, stack: &mut Stack, size: u64, value: u64) -> Result<()> {
        let sp = stack.sp.wrapping_sub(size) & stack.mask;
        let linear = self.stack_address(stack, sp, size)?;
        if stack.user {
            self.store_bytes(linear, &value.to_le_bytes()[..size as usize])?;
        } else {
            match size {
                2 => self.store_system(linear, value as u16)?,
                4 => self.store_system(linear, value as u32)?,
                _ => self.store_system(linear, value)?,
            }
        }
        stack.sp = sp;
        Ok(())
    }

    /// Pops `size` (2, 4 or 8) bytes.
    ///
    /// # Errors
    /// #SS, #PF.
    pub(super) fn pop_from(&mut self, stack: &mut Stack, size: u64) -> Result<u64> {
        let linear = self.stack_address(stack, stack.sp, size)?;
        let value = if stack.user {
            let mut bytes = [0; 8];
            self.load_bytes(linear, &mut bytes[..size as usize])?;
            u64::from_le_bytes(bytes)
        } else {
            match size {
                2 => u64::from(self.load_system::<u16>(linear)?),
                4 => u64::from(self.load_system::<u32>(linear)?),
                _ => self.load_system(linear)?,
            }
        };
        stack.sp = stack.sp.wrapping_add(size) & stack.mask;
        Ok(value)
    }
}
