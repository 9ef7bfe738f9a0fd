//! AVX2 gathers and masked moves.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::Unit;
use super::plan::register;
use crate::cpu::{Access, Cpu, Ea, Handler, Mode, Op, Result, instruction as handler};

fn lane(value: &[u128; 2], bits: u32, index: u32) -> u64 {
    let at = bits * index;
    let word = value[(at / 128) as usize & 1] >> (at % 128);
    (word as u64) & (u64::MAX >> (64 - bits))
}

fn set_lane(value: &mut [u128; 2], bits: u32, index: u32, new: u64) {
    let at = bits * index;
    let mask = (u128::MAX >> (128 - bits)) << (at % 128);
    let word = &mut value[(at / 128) as usize & 1];
    *word = *word & !mask | u128::from(new) << (at % 128) & mask;
}

/// VPGATHER and VGATHER of `DATA` bits by indices of `INDEX` bits into destinations of `WIDTH` bits (128 or 256; that of
/// the wider of data and indices). The operation's index register is a vector register.
///
/// Elements arrive one by one and each clears its part of the mask, so that the instruction goes on where it was after a
/// fault.
fn gather<const DATA: u32, const INDEX: u32, const WIDTH: u32>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let (destination, mask, index) = (
        usize::from(op.a & 15),
        usize::from(op.b & 15),
        usize::from(op.index & 15),
    );
    let elements = WIDTH / if DATA > INDEX { DATA } else { INDEX };
    let indices = cpu.vectors.ymm[index];
    let before = cpu.vectors.ymm[mask];
    let chosen = |i: &u32| lane(&before, DATA, *i) >> (DATA - 1) != 0;
    let base: u64 = cpu.regs.get(op.base);
    // On Intel's processors the mask's elements are spread to all their bits, also when the first load faults. AMD's leave all
    // but the elements that have arrived as it is until the end.
    let amd = cpu.mode.contains(Mode::AMD);
    if !amd {
        for i in 0..WIDTH / DATA {
            set_lane(
                &mut cpu.vectors.ymm[mask],
                DATA,
                i,
                if chosen(&i) { u64::MAX } else { 0 },
            );
        }
        clear_above(&mut cpu.vectors.ymm[mask], WIDTH);
    }
    for i in 0..elements {
        if !chosen(&i) {
            set_lane(&mut cpu.vectors.ymm[mask], DATA, i, 0);
            continue;
        }
        let index = lane(&indices, INDEX, i);
        let index = if INDEX == 32 {
            index as u32 as i32 as u64
        } else {
            index
        };
        let sum = base
            .wrapping_add(index << (op.scale & 3))
            .wrapping_add(op.disp as u64);
        let linear = linear(cpu, op, sum, u64::from(DATA / 8))?;
        let value = if DATA == 32 {
            u64::from(cpu.load_in::<u32>(linear, op.seg)?)
        } else {
            cpu.load_in::<u64>(linear, op.seg)?
        };
        if !amd {
            clear_above(&mut cpu.vectors.ymm[destination], WIDTH);
        }
        set_lane(&mut cpu.vectors.ymm[destination], DATA, i, value);
        set_lane(&mut cpu.vectors.ymm[mask], DATA, i, 0);
    }
    clear_above(&mut cpu.vectors.ymm[destination], elements * DATA);
    cpu.vectors.ymm[mask] = [0; 2];
    Ok(())
}

/// Clears a register from this bit (64, 128 or 256) on.
fn clear_above(register: &mut [u128; 2], bits: u32) {
    if bits == 64 {
        register[0] &= u128::from(u64::MAX);
    }
    if bits <= 128 {
        register[1] = 0;
    }
}

fn linear(cpu: &mut Cpu, op: &Op, sum: u64, size: u64) -> Result<u64> {
    match op.ea() {
        Ea::Flat64 | Ea::None => Ok(sum.wrapping_add(cpu.bases[usize::from(op.seg & 7)])),
        Ea::Flat32 => Ok(sum & 0xffff_ffff),
        Ea::Long32 => Ok((sum & 0xffff_ffff).wrapping_add(cpu.bases[usize::from(op.seg & 7)])),
        Ea::Seg16 => cpu.linear(op.seg, sum & 0xffff, size, Access::Read),
        Ea::Seg32 => cpu.linear(op.seg, sum & 0xffff_ffff, size, Access::Read),
    }
}

/// VMASKMOV and VPMASKMOV from memory: elements whose mask is clear are zero and are not read.
fn load_masked<const DATA: u32, const WIDTH: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let mask = cpu.vectors.ymm[usize::from(op.b & 15)];
    if (0..WIDTH / DATA).all(|i| lane(&mask, DATA, i) >> (DATA - 1) == 0) {
        cpu.vectors.ymm[usize::from(op.a & 15)] = [0; 2];
        return Ok(());
    }
    let linear = cpu.linear_op(op, u64::from(WIDTH / 8), Access::Read)?;
    let mut result = [0; 2];
    for i in 0..WIDTH / DATA {
        if lane(&mask, DATA, i) >> (DATA - 1) == 0 {
            continue;
        }
        let at = linear.wrapping_add(u64::from(i * DATA / 8));
        let value = if DATA == 32 {
            u64::from(cpu.load_in::<u32>(at, op.seg)?)
        } else {
            cpu.load_in::<u64>(at, op.seg)?
        };
        set_lane(&mut result, DATA, i, value);
    }
    cpu.vectors.ymm[usize::from(op.a & 15)] = result;
    Ok(())
}

/// VMASKMOV and VPMASKMOV to memory: elements whose mask is clear are not written.
fn store_masked<const DATA: u32, const WIDTH: u32>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let mask = cpu.vectors.ymm[usize::from(op.a & 15)];
    let value = cpu.vectors.ymm[usize::from(op.b & 15)];
    let chosen = || (0..WIDTH / DATA).filter(|i| lane(&mask, DATA, *i) >> (DATA - 1) != 0);
    if chosen().next().is_none() {
        // Not even the address is looked at.
        return Ok(());
    }
    let linear = cpu.linear_op(op, u64::from(WIDTH / 8), Access::Write)?;
    let at = |i: u32| linear.wrapping_add(u64::from(i * DATA / 8));
    for i in chosen() {
        cpu.probe(at(i), u64::from(DATA / 8), Access::Write, op.seg)?;
    }
    for i in chosen() {
        let element = lane(&value, DATA, i);
        if DATA == 32 {
            cpu.store_in(at(i), element as u32, op.seg)?;
        } else {
            cpu.store_in(at(i), element, op.seg)?;
        }
    }
    Ok(())
}

/// The handler of a gather or masked move.
pub(crate) fn lookup(instruction: &Instruction, op: &mut Op) -> Option<(Handler, Unit)> {
    let found = gathers(instruction, op).or_else(|| masked(instruction))?;
    Some((found, Unit::Avx))
}

fn gathers(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let index = instruction.memory_index();
    if !index.is_vector_register() {
        return None;
    }
    let wide = index.is_ymm() || register(instruction, 0).is_ymm();
    let found = match (instruction.mnemonic(), wide) {
        (M::Vpgatherdd | M::Vgatherdps, false) => handler(gather::<32, 32, 128>),
        (M::Vpgatherdd | M::Vgatherdps, true) => handler(gather::<32, 32, 256>),
        (M::Vpgatherdq | M::Vgatherdpd, false) => handler(gather::<64, 32, 128>),
        (M::Vpgatherdq | M::Vgatherdpd, true) => handler(gather::<64, 32, 256>),
        (M::Vpgatherqd | M::Vgatherqps, false) => handler(gather::<32, 64, 128>),
        (M::Vpgatherqd | M::Vgatherqps, true) => handler(gather::<32, 64, 256>),
        (M::Vpgatherqq | M::Vgatherqpd, false) => handler(gather::<64, 64, 128>),
        (M::Vpgatherqq | M::Vgatherqpd, true) => handler(gather::<64, 64, 256>),
        _ => return None,
    };
    // Destination, index and mask must be three registers.
    let numbers = [
        register(instruction, 0).number(),
        index.number(),
        register(instruction, 2).number(),
    ];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Some(handler(|cpu, _| Err(cpu.ud())));
    }
    op.index = (index.number() & 15) as u8;
    Some(found)
}

fn masked(instruction: &Instruction) -> Option<Handler> {
    let load = instruction.op0_kind() == OpKind::Register;
    let wide = register(instruction, 1).is_ymm();
    Some(match (instruction.mnemonic(), load, wide) {
        (M::Vmaskmovps | M::Vpmaskmovd, true, false) => handler(load_masked::<32, 128>),
        (M::Vmaskmovps | M::Vpmaskmovd, true, true) => handler(load_masked::<32, 256>),
        (M::Vmaskmovpd | M::Vpmaskmovq, true, false) => handler(load_masked::<64, 128>),
        (M::Vmaskmovpd | M::Vpmaskmovq, true, true) => handler(load_masked::<64, 256>),
        (M::Vmaskmovps | M::Vpmaskmovd, false, false) => handler(store_masked::<32, 128>),
        (M::Vmaskmovps | M::Vpmaskmovd, false, true) => handler(store_masked::<32, 256>),
        (M::Vmaskmovpd | M::Vpmaskmovq, false, false) => handler(store_masked::<64, 128>),
        (M::Vmaskmovpd | M::Vpmaskmovq, false, true) => handler(store_masked::<64, 256>),
        _ => return None,
    })
}
