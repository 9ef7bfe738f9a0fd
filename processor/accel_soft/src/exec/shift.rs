//! Shifts and rotates, SHLD and SHRD, and their BMI2 forms without flags.

use super::arith::{Arith, WideArith};
use super::dispatch::{at, next};
use crate::cpu::{Cpu, Flow, Handler, Op, Result, Status, Value, instruction};
use x86_defs::state::RCX;

/// What the status becomes after a rotate: only CF and OF change.
#[inline(always)]
fn rotated(before: Status, after: Status) -> Status {
    Status {
        of: after.of,
        low: before.low & !1 | after.low & 1,
    }
}

/// A shift or rotate.
pub(crate) trait Shift {
    /// The result; `count` is masked and not zero.
    fn run<T: Arith>(before: Status, a: T, count: u8) -> (T, Status);
}
macro_rules! shifts {
    ($($name:ident, |$s:ident, $a:ident, $n:ident| $run:expr;)*) => {$(
        pub(crate) struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<T: Arith>($s: Status, $a: T, $n: u8) -> (T, Status) {
                $run
            }
        }
    )*};
}
shifts! {
    Shl, |_s, a, n| a.shl(n);
    Shr, |_s, a, n| a.shr(n);
    Sar, |_s, a, n| a.sar(n);
    Rol, |s, a, n| { let (r, t) = a.rol(n); (r, rotated(s, t)) };
    Ror, |s, a, n| { let (r, t) = a.ror(n); (r, rotated(s, t)) };
    Rcl, |s, a, n| { let (r, t) = a.rcl(n, s.carry()); (r, rotated(s, t)) };
    Rcr, |s, a, n| { let (r, t) = a.rcr(n, s.carry()); (r, rotated(s, t)) };
}

/// The count, masked as the operand size wants it.
#[inline(always)]
fn count<T: Value, const BY_CL: bool>(cpu: &Cpu, op: &Op) -> u8 {
    let raw = if BY_CL { cpu.regs[RCX] } else { op.imm };
    raw as u8 & if T::BITS == 64 { 63 } else { 31 }
}

fn register<S: Shift, T: Arith, const BY_CL: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let n = count::<T, BY_CL>(cpu, at(op));
    let a: T = cpu.reg_a(at(op));
    if n == 0 {
        cpu.set_a(at(op), a);
    } else {
        let (result, status) = S::run(cpu.status, a, n);
        cpu.status = status;
        cpu.set_a(at(op), result);
    }
    next(cpu, op)
}

fn memory<S: Shift, T: Arith, const BY_CL: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let n = count::<T, BY_CL>(cpu, op);
    let mut status = cpu.status;
    cpu.update_op::<T>(op, |cpu, a| {
        if n == 0 {
            return a;
        }
        let (result, new) = S::run(cpu.status, a, n);
        status = new;
        result
    })?;
    cpu.status = status;
    Ok(())
}

/// The handler of a shift of a register or memory, by an immediate or CL.
pub(crate) fn shift<S: Shift, T: Arith>(in_memory: bool, by_cl: bool) -> Handler {
    match (in_memory, by_cl) {
        (false, false) => register::<S, T, false>,
        (false, true) => register::<S, T, true>,
        (true, false) => instruction(memory::<S, T, false>),
        (true, true) => instruction(memory::<S, T, true>),
    }
}

#[inline(always)]
fn double<T: WideArith, const RIGHT: bool>(a: T, fill: T, n: u8) -> (T, Status) {
    if RIGHT {
        a.shrd(fill, n)
    } else {
        a.shld(fill, n)
    }
}

fn double_register<T: WideArith, const RIGHT: bool, const BY_CL: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let n = count::<T, BY_CL>(cpu, op);
    let (a, fill): (T, T) = (cpu.reg_a(op), cpu.reg_b(op));
    let mut result = a;
    if n != 0 {
        (result, cpu.status) = double::<T, RIGHT>(a, fill, n);
    }
    cpu.set_a(op, result);
    Ok(())
}

fn double_memory<T: WideArith, const RIGHT: bool, const BY_CL: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let n = count::<T, BY_CL>(cpu, op);
    let fill: T = cpu.reg_a(op);
    let mut status = cpu.status;
    cpu.update_op::<T>(op, |_, a| {
        if n == 0 {
            return a;
        }
        let (result, new) = double::<T, RIGHT>(a, fill, n);
        status = new;
        result
    })?;
    cpu.status = status;
    Ok(())
}

/// The handler of SHLD or SHRD.
pub(crate) fn double_shift<T: WideArith, const RIGHT: bool>(
    in_memory: bool,
    by_cl: bool,
) -> Handler {
    match (in_memory, by_cl) {
        (false, false) => instruction(double_register::<T, RIGHT, false>),
        (false, true) => instruction(double_register::<T, RIGHT, true>),
        (true, false) => instruction(double_memory::<T, RIGHT, false>),
        (true, true) => instruction(double_memory::<T, RIGHT, true>),
    }
}

/// SHLX.
pub(crate) const SHLX: u8 = 0;
/// SHRX.
pub(crate) const SHRX: u8 = 1;
/// SARX.
pub(crate) const SARX: u8 = 2;
/// RORX.
pub(crate) const RORX: u8 = 3;

/// SHLX, SHRX, SARX, RORX: `MEMORY` says where the value comes from.
pub(crate) fn flagless<T: Arith, const KIND: u8, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let value: T = if MEMORY {
        cpu.read_op(op)?
    } else {
        cpu.reg_b(op)
    };
    let raw = match (KIND, MEMORY) {
        (RORX, _) => op.imm,
        (_, true) => cpu.regs.get::<u64>(op.b),
        (_, false) => cpu.regs.get::<u64>(op.c),
    };
    let n = raw as u32 & (T::BITS - 1);
    let result = match KIND {
        SHLX => value.to_u64() << n,
        SHRX => value.to_u64() >> n,
        SARX => (value.sign_extend() >> n) as u64,
        _ if T::BITS == 32 => u64::from((value.to_u64() as u32).rotate_right(n)),
        _ => value.to_u64().rotate_right(n),
    };
    cpu.set_a(op, T::from_u64(result));
    Ok(())
}
