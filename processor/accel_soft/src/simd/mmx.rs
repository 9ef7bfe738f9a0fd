//! MMX: its registers, which are the significands of the x87 registers, and its moves.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::Unit;
use super::elements::store_masked_bytes;
use super::plan::register;
use crate::cpu::{Cpu, Handler, Mode, Op, RegisterFile, Result, instruction as handler};
use x86_defs::state::RDI;

impl Cpu {
    /// MMn.
    #[inline]
    pub(crate) fn mm(&self, number: u8) -> u64 {
        self.x87.registers[usize::from(number & 7)].0
    }

    /// Writes MMn; sign and exponent become all ones.
    #[inline]
    pub(crate) fn set_mm(&mut self, number: u8, value: u64) {
        self.x87.registers[usize::from(number & 7)] = (value, 0xffff);
    }

    /// What every MMX instruction but EMMS does to the x87 unit: the top of stack is 0, no register is empty (SDM volume 1,
    /// section 9.5).
    #[inline]
    pub(crate) fn enter_mmx(&mut self) {
        self.x87.status &= !(7 << 11);
        self.x87.tags = 0xff;
    }
}

/// What comes before an MMX instruction that has read its operands.
fn begin(cpu: &mut Cpu) -> Result<()> {
    cpu.check_pending_x87()?;
    cpu.enter_mmx();
    Ok(())
}

/// Bytes moved, both ways, by MOVD (4) and MOVQ (8).
fn load<const N: u8>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    let value = match (N, op.has_memory()) {
        (4, true) => u64::from(cpu.read_op::<u32>(op)?),
        (4, false) => u64::from(cpu.regs.get::<u32>(op.b)),
        (_, true) => cpu.read_op::<u64>(op)?,
        (_, false) => cpu.regs.get::<u64>(op.b),
    };
    cpu.enter_mmx();
    cpu.set_mm(op.a, value);
    Ok(())
}

fn save<const N: u8>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    // As Intel's processors do: the top of stack changes before the store, the tags after it.
    if !cpu.mode.contains(Mode::AMD) {
        cpu.x87.status &= !(7 << 11);
    }
    match (N, op.has_memory()) {
        (4, true) => cpu.write_op::<u32>(op, cpu.mm(op.a) as u32)?,
        (4, false) => cpu.regs.set::<u32>(op.a, cpu.mm(op.b) as u32),
        (_, true) => cpu.write_op::<u64>(op, cpu.mm(op.a))?,
        (_, false) => cpu.regs.set::<u64>(op.a, cpu.mm(op.b)),
    }
    cpu.enter_mmx();
    Ok(())
}

fn copy(cpu: &mut Cpu, op: &Op) -> Result<()> {
    begin(cpu)?;
    cpu.set_mm(op.a, cpu.mm(op.b));
    Ok(())
}

fn to_vector(cpu: &mut Cpu, op: &Op) -> Result<()> {
    begin(cpu)?;
    cpu.vectors.ymm[usize::from(op.a & 15)][0] = u128::from(cpu.mm(op.b));
    Ok(())
}

fn from_vector(cpu: &mut Cpu, op: &Op) -> Result<()> {
    begin(cpu)?;
    cpu.set_mm(op.a, cpu.vectors.ymm[usize::from(op.b & 15)][0] as u64);
    Ok(())
}

fn insert_word(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    let word = if op.has_memory() {
        cpu.read_op::<u16>(op)?
    } else {
        cpu.regs.get::<u16>(op.b)
    };
    let shift = (op.imm & 3) * 16;
    cpu.enter_mmx();
    cpu.set_mm(
        op.a,
        cpu.mm(op.a) & !(0xffff << shift) | u64::from(word) << shift,
    );
    Ok(())
}

fn extract_word(cpu: &mut Cpu, op: &Op) -> Result<()> {
    begin(cpu)?;
    let word = cpu.mm(op.b) >> ((op.imm & 3) * 16) & 0xffff;
    cpu.regs.set::<u64>(op.a, word);
    Ok(())
}

fn masked_bytes(cpu: &mut Cpu, op: &Op) -> Result<()> {
    begin(cpu)?;
    let (bytes, mask) = (cpu.mm(op.a).to_le_bytes(), cpu.mm(op.b).to_le_bytes());
    store_masked_bytes(cpu, op, &bytes, &mask)?;
    Ok(())
}

fn empty(cpu: &mut Cpu, _: &Op) -> Result<()> {
    begin(cpu)?;
    cpu.x87.tags = 0;
    Ok(())
}

/// The handler of an MMX move.
pub(crate) fn lookup(instruction: &Instruction, op: &mut Op) -> Option<(Handler, Unit)> {
    if instruction.mnemonic() == M::Emms {
        return Some((handler(empty), Unit::Mmx));
    }
    let mm = |i| register(instruction, i).is_mm();
    if !(0..instruction.op_count()).any(mm) {
        return None;
    }
    let general = (0..instruction.op_count()).any(|i| register(instruction, i).is_gpr());
    let load_form = mm(0);
    let registers =
        instruction.op0_kind() == OpKind::Register && instruction.op1_kind() == OpKind::Register;
    let found = match instruction.mnemonic() {
        M::Movd if load_form => handler(load::<4>),
        M::Movd => handler(save::<4>),
        M::Movq if registers && !general => handler(copy),
        M::Movq if load_form => handler(load::<8>),
        M::Movq | M::Movntq => handler(save::<8>),
        M::Pinsrw => handler(insert_word),
        M::Pextrw => handler(extract_word),
        M::Maskmovq => {
            op.base = RegisterFile::offset(RDI);
            handler(masked_bytes)
        }
        // These two need SSE state as well.
        M::Movq2dq => return Some((handler(to_vector), Unit::Sse)),
        M::Movdq2q => return Some((handler(from_vector), Unit::Sse)),
        _ => return None,
    };
    Some((found, Unit::Mmx))
}
