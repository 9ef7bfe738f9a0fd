//! Single elements of vectors in and out (PINSR, PEXTR, EXTRACTPS, VEXTRACT), stores of converted vectors, and the
//! MXCSR and state instructions.

use iced_x86::{EncodingKind, Instruction, Mnemonic as M, OpKind};

use super::Unit;
use super::call::{MXCSR_FLAGS, Operands, Vector, call_float};
use super::execute::store;
use super::plan::{Plan, register};
use crate::cpu::{Access, Cpu, Handler, Mode, Op, RegisterFile, Result, instruction as handler};
use x86_defs::state::RDI;

/// MXCSR bits that can be set.
pub(crate) const MXCSR_MASK: u32 = 0xffff;

fn get(cpu: &Cpu, number: u8) -> u128 {
    cpu.vectors.ymm[usize::from(number & 15)][0]
}

/// PINSRB, PINSRW, PINSRD, PINSRQ of `BITS`.
fn insert<const BITS: u32, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let element = if op.has_memory() {
        match BITS {
            8 => u64::from(cpu.read_op::<u8>(op)?),
            16 => u64::from(cpu.read_op::<u16>(op)?),
            32 => u64::from(cpu.read_op::<u32>(op)?),
            _ => cpu.read_op::<u64>(op)?,
        }
    } else {
        cpu.regs.get::<u64>(if VEX { op.c } else { op.b })
    };
    let old = get(cpu, if VEX { op.b } else { op.a });
    let shift = (op.imm as u32 & (128 / BITS - 1)) * BITS;
    let mask = (u128::MAX >> (128 - BITS)) << shift;
    let register = &mut cpu.vectors.ymm[usize::from(op.a & 15)];
    register[0] = old & !mask | u128::from(element) << shift & mask;
    if VEX {
        register[1] = 0;
    }
    Ok(())
}

/// PEXTRB, PEXTRW, PEXTRD, PEXTRQ, EXTRACTPS.
fn extract<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let shift = (op.imm as u32 & (128 / BITS - 1)) * BITS;
    if !op.has_memory() {
        let element = get(cpu, op.b) >> shift & u128::MAX >> (128 - BITS);
        cpu.regs.set::<u64>(op.a, element as u64);
        return Ok(());
    }
    let element = get(cpu, op.a) >> shift;
    match BITS {
        8 => cpu.write_op(op, element as u8),
        16 => cpu.write_op(op, element as u16),
        32 => cpu.write_op(op, element as u32),
        _ => cpu.write_op(op, element as u64),
    }
}

/// VEXTRACTF128, VEXTRACTI128.
fn extract_half(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let half = (op.imm & 1) as usize;
    if op.has_memory() {
        let value = cpu.vectors.ymm[usize::from(op.a & 15)][half];
        return cpu.write_op(op, value);
    }
    let value = cpu.vectors.ymm[usize::from(op.b & 15)][half];
    cpu.vectors.ymm[usize::from(op.a & 15)] = [value, 0];
    Ok(())
}

/// VCVTPS2PH to memory.
#[allow(unsafe_code)] // Reaches the plan by the address that decoding left.
fn store_half_precision(cpu: &mut Cpu, op: &Op) -> Result<()> {
    // SAFETY: `lookup` gives this handler only to operations that `keep_in` has prepared.
    let plan = unsafe { Plan::of(op) };
    let mut operands = Operands {
        b: Vector(cpu.vectors.ymm[usize::from(op.a & 15)]),
        ..Operands::default()
    };
    let size = if plan.wide { 16 } else { 8 };
    if cpu.mode.contains(Mode::AMD) {
        // AMD's processors look at the place before they look at the value.
        let linear = cpu.linear_op(op, u64::from(size), Access::Write)?;
        cpu.probe(linear, u64::from(size), Access::Write, op.seg)?;
    }
    let mxcsr = cpu.vectors.mxcsr;
    let raised = call_float(plan.stub, plan.wide, mxcsr, &mut operands);
    if raised & !(mxcsr >> 7) & MXCSR_FLAGS != 0 {
        cpu.vectors.mxcsr |= raised;
        return Err(cpu.simd_exception());
    }
    // Intel's processors set the flags also when the store faults.
    cpu.vectors.mxcsr |= raised;
    store(cpu, op, size, false, &operands.a)
}

fn load_mxcsr(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.read_op::<u32>(op)?;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.vectors.mxcsr = value;
    Ok(())
}

fn store_mxcsr(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.vectors.mxcsr;
    cpu.write_op(op, value)
}

/// Registers that VZEROALL and VZEROUPPER reach: eight outside 64-bit mode.
fn zeroed(cpu: &Cpu) -> usize {
    if cpu.mode.is_64bit() { 16 } else { 8 }
}

fn zero_upper(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let count = zeroed(cpu);
    cpu.vectors.ymm[..count].iter_mut().for_each(|r| r[1] = 0);
    Ok(())
}

fn zero_all(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let count = zeroed(cpu);
    cpu.vectors.ymm[..count].fill([0; 2]);
    Ok(())
}

fn nothing(_: &mut Cpu, _: &Op) -> Result<()> {
    Ok(())
}

/// MOVNTI: an ordinary store.
fn store_general<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.regs.get::<u64>(op.a);
    if WIDE {
        cpu.write_op(op, value)
    } else {
        cpu.write_op(op, value as u32)
    }
}

/// LFENCE, SFENCE, MFENCE: the guest's loads and stores are the host's.
fn fence(_: &mut Cpu, _: &Op) -> Result<()> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// MASKMOVDQU and VMASKMOVDQU: the bytes chosen by the mask's sign bits go to DS:rDI.
fn masked_bytes(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (bytes, mask) = (get(cpu, op.a).to_le_bytes(), get(cpu, op.b).to_le_bytes());
    store_masked_bytes(cpu, op, &bytes, &mask)
}

/// Stores bytes where the mask's sign bit is set. Pages without a byte to store are not touched.
pub(crate) fn store_masked_bytes(cpu: &mut Cpu, op: &Op, bytes: &[u8], mask: &[u8]) -> Result<()> {
    let linear = cpu.linear_op(op, bytes.len() as u64, Access::Write)?;
    let chosen = || (0..bytes.len()).filter(|i| mask[*i] & 0x80 != 0);
    for i in chosen() {
        cpu.probe(linear.wrapping_add(i as u64), 1, Access::Write, op.seg)?;
    }
    for i in chosen() {
        cpu.store_in(linear.wrapping_add(i as u64), bytes[i], op.seg)?;
    }
    Ok(())
}

/// The handler of an instruction of this module.
pub(crate) fn lookup(instruction: &Instruction, op: &mut Op) -> Option<(Handler, Unit)> {
    let vex = instruction.encoding() == EncodingKind::VEX;
    let unit = if vex { Unit::Avx } else { Unit::Sse };
    if let Some(found) = single(instruction, vex) {
        return Some((found, unit));
    }
    let found = match instruction.mnemonic() {
        M::Vcvtps2ph if instruction.op0_kind() == OpKind::Memory => {
            Plan::for_instruction(instruction)?.keep_in(op);
            handler(store_half_precision)
        }
        M::Ldmxcsr | M::Vldmxcsr => handler(load_mxcsr),
        M::Stmxcsr | M::Vstmxcsr => handler(store_mxcsr),
        M::Vzeroupper => handler(zero_upper),
        M::Vzeroall => handler(zero_all),
        M::Maskmovdqu | M::Vmaskmovdqu => {
            op.base = RegisterFile::offset(RDI);
            handler(masked_bytes)
        }
        M::Movnti if register(instruction, 1).is_gpr64() => {
            return Some((handler(store_general::<true>), Unit::Own));
        }
        M::Movnti => return Some((handler(store_general::<false>), Unit::Own)),
        M::Lfence | M::Sfence | M::Mfence => return Some((handler(fence), Unit::Own)),
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => {
            return Some((handler(nothing), Unit::Own));
        }
        _ => return None,
    };
    Some((found, unit))
}

fn single(instruction: &Instruction, vex: bool) -> Option<Handler> {
    // MM registers have their own.
    if (0..instruction.op_count()).any(|i| register(instruction, i).is_mm()) {
        return None;
    }
    Some(match (instruction.mnemonic(), vex) {
        (M::Pinsrb, _) => handler(insert::<8, false>),
        (M::Pinsrw, _) => handler(insert::<16, false>),
        (M::Pinsrd, _) => handler(insert::<32, false>),
        (M::Pinsrq, _) => handler(insert::<64, false>),
        (M::Vpinsrb, _) => handler(insert::<8, true>),
        (M::Vpinsrw, _) => handler(insert::<16, true>),
        (M::Vpinsrd, _) => handler(insert::<32, true>),
        (M::Vpinsrq, _) => handler(insert::<64, true>),
        (M::Pextrb | M::Vpextrb, _) => handler(extract::<8>),
        (M::Pextrw | M::Vpextrw, _) => handler(extract::<16>),
        (M::Pextrd | M::Vpextrd | M::Extractps | M::Vextractps, _) => handler(extract::<32>),
        (M::Pextrq | M::Vpextrq, _) => handler(extract::<64>),
        (M::Vextractf128 | M::Vextracti128, _) => handler(extract_half),
        _ => return None,
    })
}
