//! Moves between vector registers, memory and general registers: nothing here computes.

use iced_x86::{EncodingKind, Instruction, Mnemonic as M, OpKind};

use super::Unit;
use super::packed::Packed;
use super::plan::register;
use crate::cpu::{Access, Cpu, Handler, Op, Result, instruction as handler};

/// Writes an XMM register as a legacy (`VEX` false) or VEX.128 instruction does.
#[inline(always)]
fn set<const VEX: bool>(cpu: &mut Cpu, number: u8, value: u128) {
    let register = &mut cpu.vectors.ymm[usize::from(number & 15)];
    register[0] = value;
    if VEX {
        register[1] = 0;
    }
}

#[inline(always)]
fn get(cpu: &Cpu, number: u8) -> u128 {
    cpu.vectors.ymm[usize::from(number & 15)][0]
}

/// Replaces the bits of `old` from `shift` on, `bits` of them, by those of `new`.
#[inline(always)]
fn insert(old: u128, new: u128, bits: u32, shift: u32) -> u128 {
    let mask = (u128::MAX >> (128 - bits)) << shift;
    old & !mask | new << shift & mask
}

/// As [`set`], without a detour through general registers.
#[inline(always)]
fn set_packed<const VEX: bool>(cpu: &mut Cpu, number: u8, value: Packed) {
    cpu.set_xmm(number, value);
    if VEX {
        cpu.set_ymm_high(number, Packed::default());
    }
}

fn copy<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.xmm(op.b);
    set_packed::<VEX>(cpu, op.a, value);
    Ok(())
}

fn copy_256(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (low, high) = (cpu.xmm(op.b), cpu.ymm_high(op.b));
    cpu.set_xmm(op.a, low);
    cpu.set_ymm_high(op.a, high);
    Ok(())
}

fn load<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.read_op::<Packed>(op)?;
    set_packed::<VEX>(cpu, op.a, value);
    Ok(())
}

fn load_aligned<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let linear = cpu.linear_op(op, 16, Access::Read)?;
    if linear & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let value = cpu.load_in::<Packed>(linear, op.seg)?;
    set_packed::<VEX>(cpu, op.a, value);
    Ok(())
}

fn load_256<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let linear = linear_256::<ALIGNED>(cpu, op, Access::Read)?;
    let low = cpu.load_in::<Packed>(linear, op.seg)?;
    let high = cpu.load_in::<Packed>(linear.wrapping_add(16), op.seg)?;
    cpu.set_xmm(op.a, low);
    cpu.set_ymm_high(op.a, high);
    Ok(())
}

/// The address of a 32-byte operand; where that lies in two pages, both have been found good.
#[inline(always)]
fn linear_256<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op, access: Access) -> Result<u64> {
    let linear = cpu.linear_op(op, 32, access)?;
    if ALIGNED && linear & 31 != 0 {
        return Err(cpu.gp(0));
    }
    if linear & 0xfff > 0x1000 - 32 {
        cpu.probe(linear, 32, access, op.seg)?;
    }
    Ok(linear)
}

fn save(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.xmm(op.a);
    cpu.write_op(op, value)
}

fn save_aligned(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let linear = cpu.linear_op(op, 16, Access::Write)?;
    if linear & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let value = cpu.xmm(op.a);
    cpu.store_in(linear, value, op.seg)
}

fn save_256<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let linear = linear_256::<ALIGNED>(cpu, op, Access::Write)?;
    let (low, high) = (cpu.xmm(op.a), cpu.ymm_high(op.a));
    cpu.store_in(linear, low, op.seg)?;
    cpu.store_in(linear.wrapping_add(16), high, op.seg)
}

fn load_32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.read_op::<u32>(op)?;
    set_packed::<VEX>(cpu, op.a, Packed::from_quadword(value.into()));
    Ok(())
}

fn load_64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.read_op::<u64>(op)?;
    set_packed::<VEX>(cpu, op.a, Packed::from_quadword(value));
    Ok(())
}

fn save_32(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = get(cpu, op.a) as u32;
    cpu.write_op(op, value)
}

fn save_64(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = get(cpu, op.a) as u64;
    cpu.write_op(op, value)
}

fn save_high_64(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = (get(cpu, op.a) >> 64) as u64;
    cpu.write_op(op, value)
}

/// MOVSS and MOVSD between registers: two operands.
fn merge<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = insert(get(cpu, op.a), get(cpu, op.b), BITS, 0);
    set::<false>(cpu, op.a, value);
    Ok(())
}

/// VMOVSS and VMOVSD between registers: three operands.
fn merge_vex<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = insert(get(cpu, op.b), get(cpu, op.c), BITS, 0);
    set::<true>(cpu, op.a, value);
    Ok(())
}

/// MOVLPS, MOVHPS and their kind from memory, at bit `SHIFT`.
fn load_half<const VEX: bool, const SHIFT: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let new = cpu.read_op::<u64>(op)?;
    let old = get(cpu, if VEX { op.b } else { op.a });
    set::<VEX>(cpu, op.a, insert(old, u128::from(new), 64, SHIFT));
    Ok(())
}

/// MOVQ between XMM registers.
fn copy_64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = get(cpu, op.b) & u128::from(u64::MAX);
    set::<VEX>(cpu, op.a, value);
    Ok(())
}

fn from_general<const VEX: bool, const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = if WIDE {
        cpu.regs.get::<u64>(op.b)
    } else {
        u64::from(cpu.regs.get::<u32>(op.b))
    };
    set_packed::<VEX>(cpu, op.a, Packed::from_quadword(value));
    Ok(())
}

fn to_general<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = get(cpu, op.b);
    if WIDE {
        cpu.regs.set::<u64>(op.a, value as u64);
    } else {
        cpu.regs.set::<u32>(op.a, value as u32);
    }
    Ok(())
}

/// The handler of a move of vector registers.
pub(crate) fn lookup(instruction: &Instruction) -> Option<(Handler, Unit)> {
    let vex = instruction.encoding() == EncodingKind::VEX;
    let unit = if vex { Unit::Avx } else { Unit::Sse };
    let found = whole(instruction, vex)
        .or_else(|| element(instruction, vex))
        .or_else(|| half(instruction, vex))?;
    Some((found, unit))
}

/// Chooses between the legacy and the VEX.128 form.
macro_rules! form {
    ($vex:expr, $function:ident $(, $parameter:expr)*) => {
        if $vex { handler($function::<true $(, $parameter)*>) } else { handler($function::<false $(, $parameter)*>) }
    };
}

/// Whole registers.
fn whole(instruction: &Instruction, vex: bool) -> Option<Handler> {
    let aligned = match instruction.mnemonic() {
        M::Movups
        | M::Movupd
        | M::Movdqu
        | M::Lddqu
        | M::Vmovups
        | M::Vmovupd
        | M::Vmovdqu
        | M::Vlddqu => false,
        M::Movaps | M::Movapd | M::Movdqa | M::Movntdqa | M::Movntps | M::Movntpd | M::Movntdq => {
            true
        }
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq => true,
        _ => return None,
    };
    let wide = register(instruction, 0).is_ymm() || register(instruction, 1).is_ymm();
    Some(
        match (
            instruction.op0_kind(),
            instruction.op1_kind(),
            wide,
            aligned,
        ) {
            (OpKind::Register, OpKind::Register, true, _) => handler(copy_256),
            (OpKind::Register, OpKind::Register, false, _) => form!(vex, copy),
            (OpKind::Register, _, true, true) => handler(load_256::<true>),
            (OpKind::Register, _, true, false) => handler(load_256::<false>),
            (OpKind::Register, _, false, true) => form!(vex, load_aligned),
            (OpKind::Register, _, false, false) => form!(vex, load),
            (_, _, true, true) => handler(save_256::<true>),
            (_, _, true, false) => handler(save_256::<false>),
            (_, _, false, true) => handler(save_aligned),
            (_, _, false, false) => handler(save),
        },
    )
}

/// The lowest element.
fn element(instruction: &Instruction, vex: bool) -> Option<Handler> {
    let load = instruction.op0_kind() == OpKind::Register;
    let registers = load && instruction.op1_kind() == OpKind::Register;
    let general = [0, 1].iter().any(|i| register(instruction, *i).is_gpr());
    Some(match instruction.mnemonic() {
        M::Movss if registers => handler(merge::<32>),
        M::Movsd if registers => handler(merge::<64>),
        M::Vmovss if registers => handler(merge_vex::<32>),
        M::Vmovsd if registers => handler(merge_vex::<64>),
        M::Movss | M::Vmovss if load => form!(vex, load_32),
        M::Movsd | M::Vmovsd if load => form!(vex, load_64),
        M::Movss | M::Vmovss => handler(save_32),
        M::Movsd | M::Vmovsd => handler(save_64),
        M::Movd | M::Vmovd if general && register(instruction, 0).is_gpr() => {
            handler(to_general::<false>)
        }
        M::Movq | M::Vmovq if general && register(instruction, 0).is_gpr() => {
            handler(to_general::<true>)
        }
        M::Movd | M::Vmovd if general => form!(vex, from_general, false),
        M::Movq | M::Vmovq if general => form!(vex, from_general, true),
        M::Movq | M::Vmovq if registers => form!(vex, copy_64),
        M::Movd | M::Vmovd if load => form!(vex, load_32),
        M::Movq | M::Vmovq if load => form!(vex, load_64),
        M::Movd | M::Vmovd => handler(save_32),
        M::Movq | M::Vmovq => handler(save_64),
        _ => return None,
    })
}

/// One half of a register from or to memory.
fn half(instruction: &Instruction, vex: bool) -> Option<Handler> {
    let load = instruction.op0_kind() == OpKind::Register;
    Some(match instruction.mnemonic() {
        M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd if load => form!(vex, load_half, 0),
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd if load => form!(vex, load_half, 64),
        M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd => handler(save_64),
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd => handler(save_high_64),
        _ => return None,
    })
}
