//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST; INC, DEC, NEG, NOT.

use super::arith::Arith;
use super::dispatch::{
    Address, AnyAddress, BaseAddress, at, done, fast_place, fast_read, next, stored,
};
use crate::cpu::{Cpu, Flow, Handler, Op, Status};

/// An operation with two operands.
pub(crate) trait Binary {
    /// Whether the first operand is replaced.
    const WRITES: bool = true;
    /// The result and the flags.
    fn run<T: Arith>(before: Status, a: T, b: T) -> (T, Status);
}

macro_rules! binary {
    ($($name:ident, $writes:literal, |$s:ident, $a:ident, $b:ident| $run:expr;)*) => {$(
        pub(crate) struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: Arith>($s: Status, $a: T, $b: T) -> (T, Status) {
                let _ = $s;
                $run
            }
        }
    )*};
}
binary! {
    Add, true, |s, a, b| a.add(b);
    Or, true, |s, a, b| a.or(b);
    Adc, true, |s, a, b| a.adc(b, s.carry());
    Sbb, true, |s, a, b| a.sbb(b, s.carry());
    And, true, |s, a, b| a.and(b);
    Sub, true, |s, a, b| a.sub(b);
    Xor, true, |s, a, b| a.xor(b);
    Cmp, false, |s, a, b| a.sub(b);
    Test, false, |s, a, b| a.and(b);
}

/// An operation with one operand.
pub(crate) trait Unary {
    /// The result and the flags.
    fn run<T: Arith>(before: Status, a: T) -> (T, Status);
}

macro_rules! unary {
    ($($name:ident, |$s:ident, $a:ident| $run:expr;)*) => {$(
        pub(crate) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<T: Arith>($s: Status, $a: T) -> (T, Status) {
                $run
            }
        }
    )*};
}
unary! {
    Inc, |s, a| a.inc(s.carry());
    Dec, |s, a| a.dec(s.carry());
    Neg, |_s, a| a.neg();
    Not, |s, a| (a.not(), s);
}

/// Where the second operand of a memory form comes from.
pub(crate) trait Source {
    fn get<T: Arith>(cpu: &Cpu, op: &Op) -> T;
}
/// The register operand.
pub(crate) struct Register;
impl Source for Register {
    #[inline(always)]
    fn get<T: Arith>(cpu: &Cpu, op: &Op) -> T {
        cpu.reg_a(op)
    }
}
/// The immediate.
pub(crate) struct Immediate;
impl Source for Immediate {
    #[inline(always)]
    fn get<T: Arith>(_: &Cpu, op: &Op) -> T {
        T::from_u64(op.imm)
    }
}

#[inline(always)]
fn finish<B: Binary, T: Arith>(cpu: &mut Cpu, op: *const Op, a: T, b: T) -> Flow {
    let (result, status) = B::run(cpu.status, a, b);
    cpu.status = status;
    if B::WRITES {
        cpu.set_a(at(op), result);
    }
    next(cpu, op)
}

fn register_register<B: Binary, T: Arith>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let (a, b) = (cpu.reg_a(at(op)), cpu.reg_b(at(op)));
    finish::<B, T>(cpu, op, a, b)
}

fn register_immediate<B: Binary, T: Arith>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let a = cpu.reg_a(at(op));
    finish::<B, T>(cpu, op, a, T::from_u64(at(op).imm))
}

fn register_memory<B: Binary, T: Arith, E: Address>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let Some(b) = fast_read::<T, E>(cpu, at(op)) else {
        return register_memory_slow::<B, T>(cpu, op);
    };
    let a = cpu.reg_a(at(op));
    finish::<B, T>(cpu, op, a, b)
}

#[cold]
#[inline(never)]
fn register_memory_slow<B: Binary, T: Arith>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let result = cpu.read_op::<T>(at(op)).map(|b| {
        let (result, status) = B::run(cpu.status, cpu.reg_a(at(op)), b);
        cpu.status = status;
        if B::WRITES {
            cpu.set_a(at(op), result);
        }
    });
    done(cpu, op, result)
}

fn memory_read<B: Binary, T: Arith, S: Source, E: Address>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let Some(a) = fast_read::<T, E>(cpu, at(op)) else {
        return memory_read_slow::<B, T, S>(cpu, op);
    };
    cpu.status = B::run(cpu.status, a, S::get(cpu, at(op))).1;
    next(cpu, op)
}

#[cold]
#[inline(never)]
fn memory_read_slow<B: Binary, T: Arith, S: Source>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let result = cpu.read_op::<T>(at(op)).map(|a| {
        cpu.status = B::run(cpu.status, a, S::get(cpu, at(op))).1;
    });
    done(cpu, op, result)
}

fn memory_update<B: Binary, T: Arith, S: Source, E: Address>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let Some(place) = fast_place::<T, E>(cpu, at(op)) else {
        return memory_update_slow::<B, T, S>(cpu, op);
    };
    let (result, status) = B::run(cpu.status, place.get::<T>(), S::get(cpu, at(op)));
    cpu.status = status;
    if place.put(result) {
        return stored(cpu, op, place);
    }
    next(cpu, op)
}

#[cold]
#[inline(never)]
fn memory_update_slow<B: Binary, T: Arith, S: Source>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let mut status = cpu.status;
    let result = cpu.update_op::<T>(at(op), |cpu, a| {
        let (result, new) = B::run(cpu.status, a, S::get(cpu, at(op)));
        status = new;
        result
    });
    if result.is_ok() {
        cpu.status = status;
    }
    done(cpu, op, result.map(|_| ()))
}

fn memory_locked<B: Binary, T: Arith, S: Source>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let mut status = cpu.status;
    let result = cpu.update_op_locked::<T>(at(op), |cpu, a| {
        let (result, new) = B::run(cpu.status, a, S::get(cpu, at(op)));
        status = new;
        result
    });
    if result.is_ok() {
        cpu.status = status;
    }
    done(cpu, op, result.map(|_| ()))
}

fn unary_register<U: Unary, T: Arith>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let (result, status) = U::run::<T>(cpu.status, cpu.reg_a(at(op)));
    cpu.status = status;
    cpu.set_a(at(op), result);
    next(cpu, op)
}

fn unary_memory<U: Unary, T: Arith, E: Address>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let Some(place) = fast_place::<T, E>(cpu, at(op)) else {
        return unary_memory_slow::<U, T, false>(cpu, op);
    };
    let (result, status) = U::run(cpu.status, place.get::<T>());
    cpu.status = status;
    if place.put(result) {
        return stored(cpu, op, place);
    }
    next(cpu, op)
}

#[cold]
#[inline(never)]
fn unary_memory_slow<U: Unary, T: Arith, const LOCKED: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let mut status = cpu.status;
    let f = |cpu: &mut Cpu, a: T| {
        let (result, new) = U::run(cpu.status, a);
        status = new;
        result
    };
    let result = if LOCKED {
        cpu.update_op_locked::<T>(at(op), f)
    } else {
        cpu.update_op::<T>(at(op), f)
    };
    if result.is_ok() {
        cpu.status = status;
    }
    done(cpu, op, result.map(|_| ()))
}

/// The operands of an instruction with two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    RegisterRegister,
    RegisterImmediate,
    RegisterMemory,
    MemoryRegister,
    MemoryImmediate,
}

/// The handler of a binary operation on operands of a size. `base`: the memory operand is a [`BaseAddress`].
pub(crate) fn binary<B: Binary, T: Arith>(form: Form, locked: bool, base: bool) -> Handler {
    if base {
        binary_at::<B, T, BaseAddress>(form, locked)
    } else {
        binary_at::<B, T, AnyAddress>(form, locked)
    }
}

fn binary_at<B: Binary, T: Arith, E: Address>(form: Form, locked: bool) -> Handler {
    match (form, locked) {
        (Form::RegisterRegister, _) => register_register::<B, T>,
        (Form::RegisterImmediate, _) => register_immediate::<B, T>,
        (Form::RegisterMemory, _) => register_memory::<B, T, E>,
        (Form::MemoryRegister, _) if !B::WRITES => memory_read::<B, T, Register, E>,
        (Form::MemoryImmediate, _) if !B::WRITES => memory_read::<B, T, Immediate, E>,
        (Form::MemoryRegister, false) => memory_update::<B, T, Register, E>,
        (Form::MemoryImmediate, false) => memory_update::<B, T, Immediate, E>,
        (Form::MemoryRegister, true) => memory_locked::<B, T, Register>,
        (Form::MemoryImmediate, true) => memory_locked::<B, T, Immediate>,
    }
}

/// The handler of a unary operation.
pub(crate) fn unary<U: Unary, T: Arith>(memory: bool, locked: bool, base: bool) -> Handler {
    match (memory, locked) {
        (false, _) => unary_register::<U, T>,
        (true, false) if base => unary_memory::<U, T, BaseAddress>,
        (true, false) => unary_memory::<U, T, AnyAddress>,
        (true, true) => unary_memory_slow::<U, T, true>,
    }
}
