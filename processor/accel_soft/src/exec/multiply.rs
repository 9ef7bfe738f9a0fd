//! MUL, IMUL, DIV, IDIV, MULX.

use x86_defs::state::{RAX, RDX};

use super::arith::{Arith, WideArith};
use crate::cpu::{Cpu, Op, Result, Value, gpr};

#[inline(always)]
fn operand<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<T> {
    if MEMORY {
        cpu.read_op(op)
    } else {
        Ok(cpu.reg_a(op))
    }
}

/// Puts a double-size value into AX or (r)DX:(r)AX.
#[inline(always)]
fn set_pair<T: Value>(cpu: &mut Cpu, low: T, high: T) {
    if T::BITS == 8 {
        cpu.regs
            .put::<u16>(gpr(RAX), (high.to_u64() << 8 | low.to_u64()) as u16);
    } else {
        cpu.regs.set(gpr(RAX), low);
        cpu.regs.set(gpr(RDX), high);
    }
}

/// One-operand MUL and IMUL.
pub(crate) fn multiply<T: Arith, const SIGNED: bool, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let b: T = operand::<T, MEMORY>(cpu, op)?;
    let a: T = cpu.regs.get(gpr(RAX));
    let (low, high, status) = if SIGNED { a.imul(b) } else { a.mul(b) };
    cpu.status = status;
    set_pair(cpu, low, high);
    Ok(())
}

/// Two-operand IMUL.
pub(crate) fn imul2<T: WideArith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b: T = if MEMORY {
        cpu.read_op(op)?
    } else {
        cpu.reg_b(op)
    };
    let (result, status) = cpu.reg_a::<T>(op).imul2(b);
    cpu.status = status;
    cpu.set_a(op, result);
    Ok(())
}

/// Three-operand IMUL.
pub(crate) fn imul3<T: WideArith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b: T = if MEMORY {
        cpu.read_op(op)?
    } else {
        cpu.reg_b(op)
    };
    let (result, status) = b.imul2(T::from_u64(op.imm));
    cpu.status = status;
    cpu.set_a(op, result);
    Ok(())
}

/// The dividend: AX or (r)DX:(r)AX.
fn dividend<T: Value>(cpu: &Cpu) -> u128 {
    match T::BITS {
        8 => u128::from(cpu.regs[RAX] & 0xffff),
        bits => {
            let mask = u64::MAX >> (64 - bits);
            u128::from(cpu.regs[RDX] & mask) << bits | u128::from(cpu.regs[RAX] & mask)
        }
    }
}

/// DIV.
pub(crate) fn divide<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b = operand::<T, MEMORY>(cpu, op)?.to_u64();
    if b == 0 {
        return Err(cpu.de());
    }
    let a = dividend::<T>(cpu);
    let (quotient, remainder) = if a >> 64 == 0 {
        (u128::from(a as u64 / b), u128::from(a as u64 % b))
    } else {
        (a / u128::from(b), a % u128::from(b))
    };
    if quotient >> T::BITS != 0 {
        return Err(cpu.de());
    }
    set_pair(
        cpu,
        T::from_u64(quotient as u64),
        T::from_u64(remainder as u64),
    );
    Ok(())
}

/// IDIV.
pub(crate) fn divide_signed<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b = i128::from(operand::<T, MEMORY>(cpu, op)?.sign_extend());
    if b == 0 {
        return Err(cpu.de());
    }
    let unused = 128 - 2 * T::BITS;
    let a = (dividend::<T>(cpu) << unused) as i128 >> unused;
    let (quotient, remainder) = match (i64::try_from(a), b as i64) {
        (Ok(a), b) if b != -1 => (i128::from(a / b), i128::from(a % b)),
        _ => (a.wrapping_div(b), a.wrapping_rem(b)),
    };
    let limit = 1i128 << (T::BITS - 1);
    if !(-limit..limit).contains(&quotient) {
        return Err(cpu.de());
    }
    set_pair(
        cpu,
        T::from_u64(quotient as u64),
        T::from_u64(remainder as u64),
    );
    Ok(())
}

/// MULX: RDX times the operand, high half into the first register, low into the second; no flags.
pub(crate) fn mulx<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b: T = if MEMORY {
        cpu.read_op(op)?
    } else {
        cpu.regs.get(op.c)
    };
    let (low, high, _) = cpu.regs.get::<T>(gpr(RDX)).mul(b);
    cpu.regs.set(op.b, low);
    cpu.set_a(op, high);
    Ok(())
}
