//! Near branches. Their targets are kept as distances from the block's first instruction.

use super::dispatch::{at, done_branch, fast_load, place_at, stored_branch};
use super::stack;
use crate::cpu::{BLOCK_RIP, Cpu, Fault, Flow, Mode, Op, Result, Value};
use x86_defs::state::{RCX, RSP};

#[inline(always)]
fn target(cpu: &Cpu, op: &Op) -> u64 {
    cpu.regs[BLOCK_RIP].wrapping_add(op.imm) & cpu.rip_mask
}

/// JMP rel. `WORD`: 16-bit operand size, which cuts the target to 16 bits.
pub(crate) fn jmp<const WORD: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let to = target(cpu, at(op));
    cpu.rip = if WORD { to & 0xffff } else { to };
    Flow::Next
}

/// Jcc rel.
pub(crate) fn jcc<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let (to, not) = (target(cpu, at(op)), cpu.next_rip(at(op)));
    cpu.rip = if cpu.status.condition(CC) { to } else { not };
    Flow::Next
}

/// Jcc rel with 16-bit operand size.
pub(crate) fn jcc_word<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let (to, not) = (target(cpu, at(op)) & 0xffff, cpu.next_rip(at(op)));
    cpu.rip = if cpu.status.condition(CC) { to } else { not };
    Flow::Next
}

/// A branch target outside the segment or not canonical faults before anything changes.
#[inline(always)]
fn check(cpu: &mut Cpu, rip: u64) -> std::result::Result<(), Fault> {
    if cpu.mode.is_64bit() {
        if (rip as i64) << 16 >> 16 == rip as i64 {
            return Ok(());
        }
    } else if rip <= u64::from(cpu.segments[x86_defs::state::CS].limit) {
        return Ok(());
    }
    Err(cpu.gp(0))
}

/// JMP r.
pub(crate) fn jmp_r<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let to = cpu.reg_a::<T>(at(op)).to_u64();
    if let Err(f) = check(cpu, to) {
        return done_branch(cpu, op, Err(f));
    }
    cpu.rip = to;
    Flow::Next
}

/// JMP m.
pub(crate) fn jmp_m<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let result = cpu.read_op::<T>(at(op)).and_then(|to| {
        check(cpu, to.to_u64())?;
        cpu.rip = to.to_u64();
        Ok(())
    });
    done_branch(cpu, op, result)
}

fn call_to<T: Value>(cpu: &mut Cpu, op: &Op, to: u64) -> Result<()> {
    let (back, rsp) = (cpu.next_rip(op), cpu.regs[RSP]);
    if cpu.mode.contains(Mode::AMD) {
        cpu.probe_push(size_of::<T>() as u64)?;
        check(cpu, to)?;
    }
    cpu.push(T::from_u64(back))?;
    // Intel's processors look at the target only after they have written the return address.
    check(cpu, to).inspect_err(|_| cpu.regs[RSP] = rsp)?;
    cpu.rip = to;
    Ok(())
}

/// CALL rel in 64-bit mode.
pub(crate) fn call64(cpu: &mut Cpu, op: *const Op) -> Flow {
    let rsp = cpu.regs[RSP].wrapping_sub(8);
    let Some(place) = place_at::<u64>(cpu, rsp) else {
        return call_slow::<u64>(cpu, op);
    };
    let (to, back) = (target(cpu, at(op)), cpu.next_rip(at(op)));
    cpu.regs[RSP] = rsp;
    cpu.rip = to;
    if place.put(back) {
        return stored_branch(cpu, place);
    }
    Flow::Next
}

/// CALL rel.
#[inline(never)]
pub(crate) fn call_slow<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let to = target(cpu, at(op)) & mask::<T>();
    let result = call_to::<T>(cpu, at(op), to);
    done_branch(cpu, op, result)
}

fn mask<T: Value>() -> u64 {
    u64::MAX >> (64 - T::BITS)
}

/// CALL r.
pub(crate) fn call_r<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let to = cpu.reg_a::<T>(at(op)).to_u64();
    let result = call_to::<T>(cpu, at(op), to);
    done_branch(cpu, op, result)
}

/// CALL m.
pub(crate) fn call_m<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let result = cpu
        .read_op::<T>(at(op))
        .and_then(|to| call_to::<T>(cpu, at(op), to.to_u64()));
    done_branch(cpu, op, result)
}

/// RET and RET imm in 64-bit mode.
pub(crate) fn ret64(cpu: &mut Cpu, op: *const Op) -> Flow {
    let rsp = cpu.regs[RSP];
    match fast_load::<u64>(cpu, rsp) {
        Some(to) if (to as i64) << 16 >> 16 == to as i64 => {
            cpu.regs[RSP] = rsp.wrapping_add(8).wrapping_add(at(op).imm);
            cpu.rip = to;
            Flow::Next
        }
        _ => ret_slow::<u64>(cpu, op),
    }
}

/// RET and RET imm.
#[inline(never)]
pub(crate) fn ret_slow<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let result = ret::<T>(cpu, at(op));
    done_branch(cpu, op, result)
}

fn ret<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let to = cpu.peek::<T>(0)?.to_u64();
    check(cpu, to)?;
    stack::advance(cpu, size_of::<T>() as u64 + op.imm);
    cpu.rip = to;
    Ok(())
}

/// JCXZ, JECXZ, JRCXZ, LOOP, LOOPE, LOOPNE: the count has the address size.
pub(crate) fn counted<T: Value, const KIND: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let count = cpu.regs[RCX] & mask::<T>();
    let (mut left, mut jump) = (count, count == 0);
    if KIND != JCXZ {
        left = count.wrapping_sub(1) & mask::<T>();
        jump = left != 0
            && match KIND {
                LOOPE => cpu.status.zero(),
                LOOPNE => !cpu.status.zero(),
                _ => true,
            };
    }
    let mut to = cpu.next_rip(at(op));
    if jump {
        to = target(cpu, at(op));
        if at(op).disp == 1 {
            to &= 0xffff;
        }
        if let Err(f) = check(cpu, to) {
            return done_branch(cpu, op, Err(f));
        }
    }
    if KIND != JCXZ {
        cpu.regs.set(crate::cpu::gpr(RCX), T::from_u64(left));
    }
    cpu.rip = to;
    Flow::Next
}

/// JCXZ and its kin.
pub(crate) const JCXZ: u8 = 0;
/// LOOP.
pub(crate) const LOOP: u8 = 1;
/// LOOPE.
pub(crate) const LOOPE: u8 = 2;
/// LOOPNE.
pub(crate) const LOOPNE: u8 = 3;

/// The operation after the last instruction of a block that was cut off: goes on at the next address.
pub(crate) fn end_of_block(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.rip = cpu.next_rip(at(op));
    Flow::Next
}
