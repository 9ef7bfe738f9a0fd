//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE, and what other modules push and pop with.

use x86_defs::state::{RBP, RSP, SS};

use super::dispatch::{at, done, fast_load, next, place_at, stored};
use crate::cpu::{Access, Cpu, Flow, Mode, Op, Result, Value, gpr};

const FLAT_STACK: u8 = 7;

/// The mask of the stack pointer: 64 bits in 64-bit mode, else as SS.B says.
#[inline(always)]
pub(crate) fn stack_mask(cpu: &Cpu) -> u64 {
    if cpu.mode.is_64bit() {
        u64::MAX
    } else if cpu.mode.contains(Mode::STACK32) {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// Adds to the stack pointer, of which only the bits that the stack's size uses change.
#[inline(always)]
pub(crate) fn advance(cpu: &mut Cpu, by: u64) {
    let to = cpu.regs[RSP].wrapping_add(by);
    set_pointer(cpu, to);
}

fn set_pointer(cpu: &mut Cpu, to: u64) {
    let mask = stack_mask(cpu);
    if mask == 0xffff {
        cpu.regs[RSP] = cpu.regs[RSP] & !mask | to & mask;
    } else {
        cpu.regs[RSP] = to & mask;
    }
}

impl Cpu {
    fn stack_linear(&mut self, offset: u64, size: u64, access: Access) -> Result<u64> {
        let offset = offset & stack_mask(self);
        if self.mode.is_64bit() {
            return Ok(offset);
        }
        self.linear(SS as u8, offset, size, access)
    }

    /// Pushes a value.
    pub(crate) fn push<T: Value>(&mut self, value: T) -> Result<()> {
        let size = size_of::<T>() as u64;
        let to = self.regs[RSP].wrapping_sub(size);
        let linear = self.stack_linear(to, size, Access::Write)?;
        self.store_in(linear, value, FLAT_STACK)?;
        advance(self, size.wrapping_neg());
        Ok(())
    }

    /// Faults if a push of `size` bytes would.
    pub(crate) fn probe_push(&mut self, size: u64) -> Result<()> {
        let to = self.regs[RSP].wrapping_sub(size);
        let linear = self.stack_linear(to, size, Access::Write)?;
        self.probe(linear, size, Access::Write, FLAT_STACK)
    }

    /// The value `above` bytes above the top of the stack, which stays there.
    pub(crate) fn peek<T: Value>(&mut self, above: u64) -> Result<T> {
        let from = self.regs[RSP].wrapping_add(above);
        let linear = self.stack_linear(from, size_of::<T>() as u64, Access::Read)?;
        self.load_in(linear, FLAT_STACK)
    }

    /// Pops a value.
    pub(crate) fn pop<T: Value>(&mut self) -> Result<T> {
        let value = self.peek(0)?;
        advance(self, size_of::<T>() as u64);
        Ok(value)
    }
}

/// PUSH r in 64-bit mode.
pub(crate) fn push64_r(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value: u64 = cpu.reg_a(at(op));
    push64(cpu, op, value)
}

/// PUSH imm in 64-bit mode.
pub(crate) fn push64_i(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value = at(op).imm;
    push64(cpu, op, value)
}

#[inline(always)]
fn push64(cpu: &mut Cpu, op: *const Op, value: u64) -> Flow {
    let rsp = cpu.regs[RSP].wrapping_sub(8);
    let Some(place) = place_at::<u64>(cpu, rsp) else {
        return push64_slow(cpu, op, value);
    };
    cpu.regs[RSP] = rsp;
    if place.put(value) {
        return stored(cpu, op, place);
    }
    next(cpu, op)
}

#[cold]
#[inline(never)]
fn push64_slow(cpu: &mut Cpu, op: *const Op, value: u64) -> Flow {
    let result = cpu.push(value);
    done(cpu, op, result)
}

/// POP r in 64-bit mode.
pub(crate) fn pop64_r(cpu: &mut Cpu, op: *const Op) -> Flow {
    let rsp = cpu.regs[RSP];
    let Some(value) = fast_load::<u64>(cpu, rsp) else {
        return pop64_slow(cpu, op);
    };
    cpu.regs[RSP] = rsp.wrapping_add(8);
    cpu.regs.put(at(op).a, value);
    next(cpu, op)
}

#[cold]
#[inline(never)]
fn pop64_slow(cpu: &mut Cpu, op: *const Op) -> Flow {
    let result = pop_r::<u64>(cpu, at(op));
    done(cpu, op, result)
}

/// PUSH r.
pub(crate) fn push_r<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.push::<T>(cpu.reg_a(op))
}

/// PUSH imm.
pub(crate) fn push_i<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.push(T::from_u64(op.imm))
}

/// PUSH m.
pub(crate) fn push_m<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value: T = cpu.read_op(op)?;
    cpu.push(value)
}

/// POP r.
pub(crate) fn pop_r<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value: T = cpu.pop()?;
    cpu.set_a(op, value);
    Ok(())
}

/// POP m: an address that rests on RSP is made after the pointer has moved.
pub(crate) fn pop_m<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let before = cpu.regs[RSP];
    let value: T = cpu.pop()?;
    cpu.write_op(op, value)
        .inspect_err(|_| cpu.regs[RSP] = before)
}

/// PUSHA.
pub(crate) fn pusha<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let size = size_of::<T>() as u64;
    let top = cpu.regs[RSP];
    // The lowest slot first: if it can be written and the highest too, all can.
    for i in [7, 0] {
        let to = top.wrapping_sub(size * (i + 1));
        let linear = cpu.stack_linear(to, size, Access::Write)?;
        cpu.probe(linear, size, Access::Write, FLAT_STACK)?;
    }
    for i in 0..8u64 {
        let value: T = cpu.regs.get(gpr(i as usize));
        let to = top.wrapping_sub(size * (i + 1));
        let linear = cpu.stack_linear(to, size, Access::Write)?;
        cpu.store_in(linear, value, FLAT_STACK)?;
    }
    advance(cpu, (size * 8).wrapping_neg());
    Ok(())
}

/// POPA.
pub(crate) fn popa<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let mut values = [T::default(); 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = cpu.peek((i * size_of::<T>()) as u64)?;
    }
    for (i, value) in values.into_iter().enumerate() {
        if 7 - i != RSP {
            cpu.regs.set(gpr(7 - i), value);
        }
    }
    advance(cpu, size_of::<T>() as u64 * 8);
    Ok(())
}

/// LEAVE.
pub(crate) fn leave<T: Value>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let frame = cpu.regs[RBP] & stack_mask(cpu);
    let linear = cpu.stack_linear(frame, size_of::<T>() as u64, Access::Read)?;
    let value: T = cpu.load_in(linear, FLAT_STACK)?;
    set_pointer(cpu, frame.wrapping_add(size_of::<T>() as u64));
    cpu.regs.set(gpr(RBP), value);
    Ok(())
}

/// ENTER: frame size in bits 0 to 15 of the immediate, nesting level in 32 to 39.
pub(crate) fn enter<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let size = size_of::<T>() as u64;
    let (frame_size, level) = (op.imm & 0xffff, op.imm >> 32 & 31);
    let before = cpu.regs[RSP];
    let result = (|| {
        cpu.push::<T>(cpu.regs.get(gpr(RBP)))?;
        let frame = cpu.regs[RSP] & stack_mask(cpu);
        let mut from = cpu.regs[RBP];
        for _ in 1..level {
            from = from.wrapping_sub(size);
            let linear = cpu.stack_linear(from, size, Access::Read)?;
            let value: T = cpu.load_in(linear, FLAT_STACK)?;
            cpu.push(value)?;
        }
        if level > 0 {
            cpu.push(T::from_u64(frame))?;
        }
        advance(cpu, frame_size.wrapping_neg());
        // The processor checks that the new top of the stack can be written.
        let top = cpu.regs[RSP];
        let linear = cpu.stack_linear(top, size, Access::Write)?;
        cpu.probe(linear, size, Access::Write, FLAT_STACK)?;
        Ok(frame)
    })();
    match result {
        Ok(frame) => {
            cpu.regs.set(gpr(RBP), T::from_u64(frame));
            Ok(())
        }
        Err(fault) => {
            cpu.regs[RSP] = before;
            Err(fault)
        }
    }
}
