//! BT family, BSF, BSR, LZCNT, TZCNT, POPCNT, BMI1, BMI2's PDEP, PEXT and BZHI, ADCX, ADOX, CRC32.

use super::arith::{Arith, WideArith};
use crate::cpu::{Access, Cpu, Ea, Op, Result, Status, Value};

/// BT.
pub(crate) const TEST: u8 = 0;
/// BTS.
pub(crate) const SET: u8 = 1;
/// BTR.
pub(crate) const RESET: u8 = 2;
/// BTC.
pub(crate) const COMPLEMENT: u8 = 3;

#[inline(always)]
fn changed<T: Value, const KIND: u8>(value: T, bit: u32) -> T {
    let (value, mask) = (value.to_u64(), 1u64 << bit);
    T::from_u64(match KIND {
        SET => value | mask,
        RESET => value & !mask,
        COMPLEMENT => value ^ mask,
        _ => value,
    })
}

#[inline(always)]
fn set_carry(cpu: &mut Cpu, carry: bool) {
    cpu.status.low = cpu.status.low & !1 | u8::from(carry);
}

/// BT, BTS, BTR, BTC of a register; the bit's number is an immediate or the second register.
pub(crate) fn bit_register<T: Value, const KIND: u8, const IMMEDIATE: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let number = if IMMEDIATE {
        op.imm
    } else {
        cpu.regs.get(op.b)
    };
    let bit = number as u32 & (T::BITS - 1);
    let value: T = cpu.reg_a(op);
    set_carry(cpu, value.to_u64() >> bit & 1 != 0);
    if KIND != TEST {
        cpu.set_a(op, changed::<T, KIND>(value, bit));
    }
    Ok(())
}

/// The same of memory. A bit number in a register reaches beyond the operand: it selects a word as far away as it says.
pub(crate) fn bit_memory<T: Arith, const KIND: u8, const IMMEDIATE: bool, const LOCKED: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let size = size_of::<T>() as u64;
    let access = if KIND == TEST {
        Access::Read
    } else {
        Access::Write
    };
    let (bit, linear) = if IMMEDIATE {
        let linear = cpu.linear_op(op, size, access)?;
        (op.imm as u32 & (T::BITS - 1), linear)
    } else {
        let number = cpu.reg_a::<T>(op).sign_extend();
        let away = ((number >> T::BITS.trailing_zeros()) as u64).wrapping_mul(size);
        let mask = super::string::address_mask(op.ea());
        let offset = cpu.ea(op).wrapping_add(away) & mask;
        let linear = match op.ea() {
            Ea::Flat64 | Ea::Long32 => offset.wrapping_add(cpu.bases[(op.seg & 7) as usize]),
            _ => cpu.linear(op.seg, offset, size, access)?,
        };
        (number as u32 & (T::BITS - 1), linear)
    };
    let old: T = match (KIND, LOCKED) {
        (TEST, _) => cpu.load_in(linear, op.seg)?,
        (_, true) => cpu.update_locked(linear, op.seg, |_, v| changed::<T, KIND>(v, bit))?,
        (_, false) => cpu.update(linear, op.seg, |_, v| changed::<T, KIND>(v, bit))?,
    };
    set_carry(cpu, old.to_u64() >> bit & 1 != 0);
    Ok(())
}

#[inline(always)]
fn source<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<T> {
    if MEMORY {
        cpu.read_op(op)
    } else {
        Ok(cpu.reg_b(op))
    }
}

/// BSF, and BSR with `REVERSE`. The destination keeps its value when the source is zero.
pub(crate) fn scan<T: WideArith, const REVERSE: bool, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let value: T = source::<T, MEMORY>(cpu, op)?;
    let (index, status) = if REVERSE { value.bsr() } else { value.bsf() };
    cpu.status = status;
    if value != T::default() {
        cpu.set_a(op, index);
    }
    Ok(())
}

/// Flags of the counting instructions: CF when the source is zero, ZF when the result is.
fn count_status(source_zero: bool, result_zero: bool) -> Status {
    Status {
        of: 0,
        low: u8::from(source_zero) | u8::from(result_zero) << 6,
    }
}

/// TZCNT.
pub(crate) fn tzcnt<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = source::<T, MEMORY>(cpu, op)?.to_u64();
    let count = value.trailing_zeros().min(T::BITS);
    cpu.status = count_status(value == 0, count == 0);
    cpu.set_a(op, T::from_u64(u64::from(count)));
    Ok(())
}

/// LZCNT.
pub(crate) fn lzcnt<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = source::<T, MEMORY>(cpu, op)?.to_u64();
    let count = value.leading_zeros() - (64 - T::BITS);
    cpu.status = count_status(value == 0, count == 0);
    cpu.set_a(op, T::from_u64(u64::from(count)));
    Ok(())
}

/// POPCNT.
pub(crate) fn popcnt<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = source::<T, MEMORY>(cpu, op)?.to_u64();
    cpu.status = count_status(false, value == 0);
    cpu.set_a(op, T::from_u64(u64::from(value.count_ones())));
    Ok(())
}

/// SF and ZF of a result and the given CF; OF clear.
fn bmi_status<T: Arith>(value: T, carry: bool) -> Status {
    let zero = u8::from(value == T::default()) << 6;
    let sign = u8::from(value.sign_extend() < 0) << 7;
    Status {
        of: 0,
        low: zero | sign | u8::from(carry),
    }
}

/// ANDN.
pub(crate) fn andn<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let b: T = if MEMORY {
        cpu.read_op(op)?
    } else {
        cpu.regs.get(op.c)
    };
    let result = T::from_u64(!cpu.reg_b::<T>(op).to_u64() & b.to_u64());
    cpu.status = bmi_status(result, false);
    cpu.set_a(op, result);
    Ok(())
}

/// BLSI.
pub(crate) const ISOLATE: u8 = 0;
/// BLSMSK.
pub(crate) const MASK: u8 = 1;
/// BLSR.
pub(crate) const CLEAR: u8 = 2;

/// BLSI, BLSMSK, BLSR.
pub(crate) fn lowest<T: Arith, const KIND: u8, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let value: T = source::<T, MEMORY>(cpu, op)?;
    let v = value.to_u64();
    let result = T::from_u64(match KIND {
        ISOLATE => v & v.wrapping_neg(),
        MASK => v ^ v.wrapping_sub(1),
        _ => v & v.wrapping_sub(1),
    });
    let carry = (v == 0) != (KIND == ISOLATE);
    cpu.status = bmi_status(result, carry);
    if KIND == MASK {
        cpu.status.low &= !(1 << 6);
    }
    cpu.set_a(op, result);
    Ok(())
}

/// The value (second operand) and the control (third) of BEXTR and BZHI.
fn value_control<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(u64, u64)> {
    if MEMORY {
        let value: T = cpu.read_op(op)?;
        Ok((value.to_u64(), cpu.regs.get(op.b)))
    } else {
        Ok((cpu.reg_b::<T>(op).to_u64(), cpu.regs.get(op.c)))
    }
}

/// BEXTR.
pub(crate) fn bextr<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (value, control) = value_control::<T, MEMORY>(cpu, op)?;
    let (start, length) = (control as u32 & 0xff, control as u32 >> 8 & 0xff);
    let shifted = value.checked_shr(start).unwrap_or(0);
    let mask = 1u64.checked_shl(length).map_or(u64::MAX, |m| m - 1);
    let result = T::from_u64(shifted & mask);
    cpu.status = bmi_status(result, false);
    cpu.status.low &= !(1 << 7);
    cpu.set_a(op, result);
    Ok(())
}

/// BZHI.
pub(crate) fn bzhi<T: Arith, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (value, control) = value_control::<T, MEMORY>(cpu, op)?;
    let from = control as u32 & 0xff;
    let kept = from < T::BITS;
    let result = T::from_u64(if kept {
        value & ((1u64 << from) - 1)
    } else {
        value
    });
    cpu.status = bmi_status(result, !kept);
    cpu.set_a(op, result);
    Ok(())
}

/// The source (second operand) and the mask (third) of PDEP and PEXT.
fn source_mask<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(u64, u64)> {
    let mask: T = if MEMORY {
        cpu.read_op(op)?
    } else {
        cpu.regs.get(op.c)
    };
    Ok((cpu.reg_b::<T>(op).to_u64(), mask.to_u64()))
}

/// PDEP.
pub(crate) fn pdep<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (mut source, mut mask) = source_mask::<T, MEMORY>(cpu, op)?;
    let mut result = 0;
    while mask != 0 {
        if source & 1 != 0 {
            result |= mask & mask.wrapping_neg();
        }
        source >>= 1;
        mask &= mask - 1;
    }
    cpu.set_a(op, T::from_u64(result));
    Ok(())
}

/// PEXT.
pub(crate) fn pext<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (source, mut mask) = source_mask::<T, MEMORY>(cpu, op)?;
    let (mut result, mut bit) = (0u64, 1u64);
    while mask != 0 {
        if source & mask & mask.wrapping_neg() != 0 {
            result |= bit;
        }
        bit <<= 1;
        mask &= mask - 1;
    }
    cpu.set_a(op, T::from_u64(result));
    Ok(())
}

/// ADCX, and ADOX with `OVERFLOW`.
pub(crate) fn add_one_flag<T: Arith, const OVERFLOW: bool, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let b: T = source::<T, MEMORY>(cpu, op)?;
    let carry = if OVERFLOW {
        cpu.status.of != 0
    } else {
        cpu.status.carry()
    };
    let (result, status) = cpu.reg_a::<T>(op).adc(b, carry);
    if OVERFLOW {
        cpu.status.of = u8::from(status.carry());
    } else {
        set_carry(cpu, status.carry());
    }
    cpu.set_a(op, result);
    Ok(())
}

/// CRC32C, reflected polynomial.
const CRC32C: u32 = 0x82f6_3b78;

const fn crc_table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let (mut crc, mut bit) = (i as u32, 0);
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { CRC32C } else { 0 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
}

static CRC_TABLE: [u32; 256] = crc_table();

/// CRC32.
pub(crate) fn crc32<T: Value, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = source::<T, MEMORY>(cpu, op)?.to_u64();
    let mut crc: u32 = cpu.reg_a(op);
    for byte in &value.to_le_bytes()[..size_of::<T>()] {
        crc = crc >> 8 ^ CRC_TABLE[usize::from(crc as u8 ^ byte)];
    }
    cpu.set_a(op, crc);
    Ok(())
}
