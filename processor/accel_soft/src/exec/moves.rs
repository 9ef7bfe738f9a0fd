//! MOV and its kin: MOVZX, MOVSX, MOVSXD, LEA, XCHG, CMOVcc, SETcc, BSWAP, MOVBE, XADD, CMPXCHG, CBW and CWD families, XLAT, LAHF, SAHF.

use super::arith::Arith;
use super::dispatch::{Address, at, done, fast_place, fast_read, next, stored};
use crate::cpu::{Access, Cpu, Ea, Flow, Op, Result, Value};
use x86_defs::state::{RAX, RDX};

/// MOV r, r.
pub(crate) fn mov_rr<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value: T = cpu.reg_b(at(op));
    cpu.set_a(at(op), value);
    next(cpu, op)
}

/// MOV r, imm.
pub(crate) fn mov_ri<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.set_a(at(op), T::from_u64(at(op).imm));
    next(cpu, op)
}

/// MOV r, m.
pub(crate) fn mov_rm<T: Value, E: Address>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let Some(value) = fast_read::<T, E>(cpu, at(op)) else {
        return extend_slow::<T, T, false>(cpu, op);
    };
    cpu.set_a(at(op), value);
    next(cpu, op)
}

#[inline(always)]
fn extended<F: Arith, T: Value, const SIGNED: bool>(value: F) -> T {
    T::from_u64(if SIGNED {
        value.sign_extend() as u64
    } else {
        value.to_u64()
    })
}

#[cold]
#[inline(never)]
fn extend_slow<F: Value, T: Value, const SIGNED: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let result = cpu.read_op::<F>(at(op)).map(|value| {
        let wide = value.to_u64();
        let shift = 64 - F::BITS;
        let wide = if SIGNED {
            ((wide << shift) as i64 >> shift) as u64
        } else {
            wide
        };
        cpu.set_a(at(op), T::from_u64(wide));
    });
    done(cpu, op, result)
}

/// MOVZX, MOVSX, MOVSXD r, m.
pub(crate) fn extend_rm<F: Arith, T: Value, E: Address, const SIGNED: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> Flow {
    let Some(value) = fast_read::<F, E>(cpu, at(op)) else {
        return extend_slow::<F, T, SIGNED>(cpu, op);
    };
    cpu.set_a(at(op), extended::<F, T, SIGNED>(value));
    next(cpu, op)
}

/// MOVZX, MOVSX, MOVSXD r, r.
pub(crate) fn extend_rr<F: Arith, T: Value, const SIGNED: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> Flow {
    let value: F = cpu.reg_b(at(op));
    cpu.set_a(at(op), extended::<F, T, SIGNED>(value));
    next(cpu, op)
}

/// MOV m, r.
pub(crate) fn mov_mr<T: Value, E: Address>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let Some(place) = fast_place::<T, E>(cpu, at(op)) else {
        return mov_m_slow::<T, false>(cpu, op);
    };
    if place.put(cpu.reg_a::<T>(at(op))) {
        return stored(cpu, op, place);
    }
    next(cpu, op)
}

/// MOV m, imm.
pub(crate) fn mov_mi<T: Value, E: Address>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let Some(place) = fast_place::<T, E>(cpu, at(op)) else {
        return mov_m_slow::<T, true>(cpu, op);
    };
    if place.put(T::from_u64(at(op).imm)) {
        return stored(cpu, op, place);
    }
    next(cpu, op)
}

#[cold]
#[inline(never)]
fn mov_m_slow<T: Value, const IMMEDIATE: bool>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value = if IMMEDIATE {
        T::from_u64(at(op).imm)
    } else {
        cpu.reg_a(at(op))
    };
    let result = cpu.write_op(at(op), value);
    done(cpu, op, result)
}

/// LEA in 64-bit mode with 64-bit addresses.
pub(crate) fn lea_flat<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let o = at(op);
    let base: u64 = cpu.regs.get(o.base);
    let index: u64 = cpu.regs.get(o.index);
    let sum = base
        .wrapping_add(index << (o.scale & 3))
        .wrapping_add(o.disp as u64);
    cpu.set_a(o, T::from_u64(sum));
    next(cpu, op)
}

/// LEA.
pub(crate) fn lea<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value = cpu.ea(at(op));
    cpu.set_a(at(op), T::from_u64(value));
    next(cpu, op)
}

/// XCHG r, r.
pub(crate) fn xchg_rr<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let (a, b): (T, T) = (cpu.reg_a(at(op)), cpu.reg_b(at(op)));
    cpu.set_a(at(op), b);
    cpu.regs.set(at(op).b, a);
    next(cpu, op)
}

/// XCHG m, r: always locked.
pub(crate) fn xchg_m<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let new: T = cpu.reg_a(op);
    let old = cpu.update_op_locked(op, |_, _| new)?;
    cpu.set_a(op, old);
    Ok(())
}

/// CMOVcc r, r.
pub(crate) fn cmov_rr<T: Value, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let (a, b): (T, T) = (cpu.reg_a(at(op)), cpu.reg_b(at(op)));
    let value = if cpu.status.condition(CC) { b } else { a };
    cpu.set_a(at(op), value);
    next(cpu, op)
}

/// CMOVcc r, m: the memory is read in any case.
pub(crate) fn cmov_rm<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b: T = cpu.read_op(op)?;
    let a: T = cpu.reg_a(op);
    let value = if cpu.status.condition(op.imm as u8) {
        b
    } else {
        a
    };
    cpu.set_a(op, value);
    Ok(())
}

/// SETcc r.
pub(crate) fn set_r<const CC: u8>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value = u8::from(cpu.status.condition(CC));
    cpu.set_a(at(op), value);
    next(cpu, op)
}

/// SETcc m.
pub(crate) fn set_m(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = u8::from(cpu.status.condition(op.imm as u8));
    cpu.write_op(op, value)
}

/// BSWAP.
pub(crate) fn bswap<T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value: T = cpu.reg_a(at(op));
    cpu.set_a(at(op), swapped(value));
    next(cpu, op)
}

fn swapped<T: Value>(value: T) -> T {
    match size_of::<T>() {
        // BSWAP of a 16-bit register is undefined; processors give zero. MOVBE is well defined.
        2 => T::from_u64(u64::from((value.to_u64() as u16).swap_bytes())),
        4 => T::from_u64(u64::from((value.to_u64() as u32).swap_bytes())),
        _ => T::from_u64(value.to_u64().swap_bytes()),
    }
}

/// BSWAP of a 16-bit register.
pub(crate) fn bswap16(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.set_a(op, 0u16);
    Ok(())
}

/// MOVBE r, m.
pub(crate) fn movbe_rm<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value: T = cpu.read_op(op)?;
    cpu.set_a(op, swapped(value));
    Ok(())
}

/// MOVBE m, r.
pub(crate) fn movbe_mr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value: T = cpu.reg_a(op);
    cpu.write_op(op, swapped(value))
}

/// XADD r, r.
pub(crate) fn xadd_rr<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (a, b): (T, T) = (cpu.reg_a(op), cpu.reg_b(op));
    let (sum, status) = a.add(b);
    cpu.status = status;
    cpu.regs.set(op.b, a);
    cpu.set_a(op, sum);
    Ok(())
}

/// XADD m, r.
pub(crate) fn xadd_mr<T: Arith, const LOCKED: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b: T = cpu.reg_a(op);
    let old = if LOCKED {
        cpu.update_op_locked(op, |_, a: T| a.add(b).0)?
    } else {
        cpu.update_op(op, |_, a: T| a.add(b).0)?
    };
    cpu.status = old.add(b).1;
    cpu.set_a(op, old);
    Ok(())
}

/// CMPXCHG r, r.
pub(crate) fn cmpxchg_rr<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (a, b): (T, T) = (cpu.reg_a(op), cpu.reg_b(op));
    let accumulator = T::from_u64(cpu.regs[RAX]);
    cpu.status = accumulator.sub(a).1;
    if accumulator == a {
        cpu.set_a(op, b);
    } else {
        cpu.regs.set(crate::cpu::gpr(RAX), a);
    }
    Ok(())
}

/// CMPXCHG m, r. The destination is written in any case, with its old value where they differ.
pub(crate) fn cmpxchg_mr<T: Arith, const LOCKED: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b: T = cpu.reg_a(op);
    let accumulator = T::from_u64(cpu.regs[RAX]);
    let f = |_: &mut Cpu, a: T| if a == accumulator { b } else { a };
    let old = if LOCKED {
        cpu.update_op_locked(op, f)?
    } else {
        cpu.update_op(op, f)?
    };
    cpu.status = accumulator.sub(old).1;
    if old != accumulator {
        cpu.regs.set(crate::cpu::gpr(RAX), old);
    }
    Ok(())
}

fn pair_low_high(cpu: &Cpu, low: usize, high: usize, bits: u32) -> u128 {
    if bits == 64 {
        u128::from(cpu.regs[low]) | u128::from(cpu.regs[high]) << 64
    } else {
        u128::from(cpu.regs[low] & 0xffff_ffff) | u128::from(cpu.regs[high] & 0xffff_ffff) << 32
    }
}

/// CMPXCHG8B (`u64`) and CMPXCHG16B (`u128`).
pub(crate) fn cmpxchg_pair<T: Wide, const LOCKED: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let half = T::BITS / 2;
    let linear = cpu.linear_op(op, size_of::<T>() as u64, Access::Write)?;
    if half == 64 && linear & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let expected = T::from_wide(pair_low_high(cpu, RAX, RDX, half));
    let new = T::from_wide(pair_low_high(
        cpu,
        x86_defs::state::RBX,
        x86_defs::state::RCX,
        half,
    ));
    let f = |_: &mut Cpu, old: T| if old == expected { new } else { old };
    let old = if LOCKED {
        cpu.update_locked(linear, op.seg, f)?
    } else {
        cpu.update(linear, op.seg, f)?
    };
    if old == expected {
        cpu.status.low |= 1 << 6;
    } else {
        cpu.status.low &= !(1 << 6);
        let old = old.to_wide();
        let mask = if half == 64 { u64::MAX } else { 0xffff_ffff };
        cpu.regs[RAX] = old as u64 & mask;
        cpu.regs[RDX] = (old >> half) as u64 & mask;
    }
    Ok(())
}

/// The two sizes of CMPXCHG8B and CMPXCHG16B.
pub(crate) trait Wide: Value {
    fn from_wide(value: u128) -> Self;
    fn to_wide(self) -> u128;
}
impl Wide for u64 {
    fn from_wide(value: u128) -> Self {
        value as u64
    }
    fn to_wide(self) -> u128 {
        u128::from(self)
    }
}
impl Wide for u128 {
    fn from_wide(value: u128) -> Self {
        value
    }
    fn to_wide(self) -> u128 {
        self
    }
}

/// CBW, CWDE, CDQE: `F` into `T` in the accumulator.
pub(crate) fn widen<F: Arith, T: Value>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let value: F = F::from_u64(cpu.regs[RAX]);
    cpu.regs.set(
        crate::cpu::gpr(RAX),
        T::from_u64(value.sign_extend() as u64),
    );
    next(cpu, op)
}

/// CWD, CDQ, CQO.
pub(crate) fn sign_to_rdx<T: Arith>(cpu: &mut Cpu, op: *const Op) -> Flow {
    let sign = T::from_u64(cpu.regs[RAX]).sign_extend() >> 63;
    cpu.regs.set(crate::cpu::gpr(RDX), T::from_u64(sign as u64));
    next(cpu, op)
}

/// XLAT: the table's address is the memory operand (without AL, which is its index).
pub(crate) fn xlat(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let offset = cpu.regs[x86_defs::state::RBX].wrapping_add(cpu.regs[RAX] & 0xff);
    let mask = super::string::address_mask(op.ea());
    let linear = if op.ea() == Ea::Flat64 || op.ea() == Ea::Long32 {
        (offset & mask).wrapping_add(cpu.bases[(op.seg & 7) as usize])
    } else {
        cpu.linear(op.seg, offset & mask, 1, Access::Read)?
    };
    let value: u8 = cpu.load_in(linear, op.seg)?;
    cpu.regs.set(crate::cpu::gpr(RAX), value);
    Ok(())
}

/// LAHF.
pub(crate) fn lahf(cpu: &mut Cpu, op: *const Op) -> Flow {
    let low = cpu.status.to_rflags() as u8 | 2;
    cpu.regs.put(crate::cpu::gpr(RAX) + 1, low);
    next(cpu, op)
}

/// SAHF.
pub(crate) fn sahf(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.status.low = cpu.regs.get::<u8>(crate::cpu::gpr(RAX) + 1);
    next(cpu, op)
}

/// MOV accumulator, moffs.
pub(crate) fn mov_from_offset<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let linear = offset_operand(cpu, op, size_of::<T>() as u64, Access::Read)?;
    let value: T = cpu.load_in(linear, op.seg)?;
    cpu.regs.set(crate::cpu::gpr(RAX), value);
    Ok(())
}

/// MOV moffs, accumulator.
pub(crate) fn mov_to_offset<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let linear = offset_operand(cpu, op, size_of::<T>() as u64, Access::Write)?;
    let value = T::from_u64(cpu.regs[RAX]);
    cpu.store_in(linear, value, op.seg)
}

fn offset_operand(cpu: &mut Cpu, op: &Op, size: u64, access: Access) -> Result<u64> {
    match op.ea() {
        Ea::Flat64 | Ea::Long32 => Ok(op.imm.wrapping_add(cpu.bases[(op.seg & 7) as usize])),
        _ => cpu.linear(op.seg, op.imm, size, access),
    }
}
