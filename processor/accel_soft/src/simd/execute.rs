//! Execution of the instructions that have a stub.
#![allow(unsafe_code)] // Reaches plans by the address that decoding left.

use iced_x86::Code;
use x86_defs::control::Cr4;
use x86_defs::exception;

use super::call::{
    MXCSR_FLAGS, MXCSR_UM, Operands, Vector, call_float, call_mm, call_xmm, call_ymm,
};
use super::plan::{Bank, Plan, Source, Width};
use super::table::{Float, Output};
use crate::cpu::{Access, Cpu, Exception, Mode, Op, Result, Status};

/// MXCSR: invalid, denormal, divide by zero: found before an operation is carried out.
const BEFORE: u32 = 0x07;
/// MXCSR: underflow.
const UE: u32 = 1 << 4;

/// Executes an instruction by its plan.
pub(crate) fn by_plan(cpu: &mut Cpu, op: &Op) -> Result<()> {
    // SAFETY: this handler is only given to operations that `keep_in` has prepared.
    let plan = unsafe { Plan::of(op) };
    let mut operands = Operands::default();
    let mmx = plan.width == Width::Mm || plan.second == Bank::Mm || plan.destination == Bank::Mm;
    if mmx {
        cpu.check_pending_x87()?;
    }
    operands.b = second(cpu, op, plan)?;
    if mmx {
        // This stays when the instruction then raises a floating-point exception.
        cpu.enter_mmx();
    }
    operands.rax = operands.b.0[0] as u64;
    operands.a = vector_source(cpu, op, plan, plan.sources[0]);
    if plan.sources[2] != Source::None {
        operands.c = match plan.sources[2] {
            // Only fused multiply-adds have a third source in memory, and then the second is a register.
            Source::Memory => operands.b,
            source => vector_source(cpu, op, plan, source),
        };
        if plan.sources[2] == Source::Memory {
            operands.b = vector_source(cpu, op, plan, plan.sources[1]);
        }
    }
    if plan.float == Float::No {
        match (plan.width, plan.wide) {
            (Width::Mm, _) => call_mm(plan.stub, &mut operands),
            (_, true) => call_ymm(plan.stub, &mut operands),
            (_, false) => call_xmm(plan.stub, &mut operands),
        }
    } else {
        float(cpu, plan, &mut operands)?;
    }
    finish(cpu, op, plan, &operands);
    Ok(())
}

/// Calls a stub under the guest's MXCSR and raises what is not masked.
fn float(cpu: &mut Cpu, plan: &Plan, operands: &mut Operands) -> Result<()> {
    let mxcsr = cpu.vectors.mxcsr;
    let raised = call_float(plan.stub, plan.wide, mxcsr, operands);
    let mut raised = raised;
    if mxcsr & MXCSR_UM == 0 && is_tiny(plan, &operands.a) {
        raised |= UE;
    }
    let unmasked = raised & !(mxcsr >> 7) & MXCSR_FLAGS;
    if unmasked == 0 {
        cpu.vectors.mxcsr |= raised;
        return Ok(());
    }
    // What is found before the operation keeps it from being carried out, so that nothing else is found.
    // (With overflow or underflow unmasked the processor tells apart whether a result of unlimited exponent is inexact; here
    // the flag is that of the masked response.)
    let noted = if unmasked & BEFORE == 0 {
        raised
    } else {
        raised & BEFORE
    };
    cpu.vectors.mxcsr |= noted;
    Err(cpu.simd_exception())
}

/// True when an element of the result is so small that it is denormal, although perhaps exact.
fn is_tiny(plan: &Plan, result: &Vector) -> bool {
    let halves = if plan.wide { 2 } else { 1 };
    let tiny32 = |v: u32| v & 0x7f80_0000 == 0 && v & 0x007f_ffff != 0;
    let tiny64 = |v: u64| v & 0x7ff0_0000_0000_0000 == 0 && v & 0x000f_ffff_ffff_ffff != 0;
    let tiny16 = |v: u16| v & 0x7c00 == 0 && v & 0x03ff != 0;
    let mut lanes = result.0[..halves].iter();
    match plan.float {
        Float::No | Float::Flags => false,
        Float::SingleScalar => tiny32(result.0[0] as u32),
        Float::DoubleScalar => tiny64(result.0[0] as u64),
        Float::Single => lanes.any(|h| (0..4).any(|i| tiny32((h >> (32 * i)) as u32))),
        Float::Double => lanes.any(|h| (0..2).any(|i| tiny64((h >> (64 * i)) as u64))),
        Float::Half => lanes.any(|h| (0..8).any(|i| tiny16((h >> (16 * i)) as u16))),
    }
}

/// Writes the result.
#[inline]
fn finish(cpu: &mut Cpu, op: &Op, plan: &Plan, operands: &Operands) {
    match plan.output {
        Output::Flags => cpu.status = Status::from_rflags(operands.rax),
        Output::General if plan.destination == Bank::General64 => {
            cpu.regs.set::<u64>(op.a, operands.rax)
        }
        Output::General => cpu.regs.set::<u32>(op.a, operands.rax as u32),
        Output::Vector if plan.destination == Bank::Mm => cpu.set_mm(op.a, operands.a.0[0] as u64),
        Output::Vector => {
            let register = &mut cpu.vectors.ymm[usize::from(op.a & 15)];
            match plan.width {
                Width::Vex256 => *register = operands.a.0,
                Width::Vex128 => *register = [operands.a.0[0], 0],
                Width::Legacy | Width::Mm => register[0] = operands.a.0[0],
            }
        }
    }
}

/// The source that may be in memory or in another register file.
#[inline]
fn second(cpu: &mut Cpu, op: &Op, plan: &Plan) -> Result<Vector> {
    if plan.sources[1] == Source::Memory || plan.sources[2] == Source::Memory {
        return memory(cpu, op, plan.memory, plan.aligned);
    }
    Ok(match plan.sources[1] {
        Source::Immediate => u128::from(plan.imm).into(),
        source => {
            let slot = slot(op, source);
            match plan.second {
                Bank::Mm => u128::from(cpu.mm(slot)).into(),
                Bank::General64 | Bank::General32 => u128::from(cpu.regs.get::<u64>(slot)).into(),
                Bank::Vector | Bank::None => vector_source(cpu, op, plan, source),
            }
        }
    })
}

fn slot(op: &Op, source: Source) -> u8 {
    match source {
        Source::B => op.b,
        Source::C => op.c,
        Source::Fixed(number) => number,
        _ => op.a,
    }
}

fn vector_source(cpu: &Cpu, op: &Op, plan: &Plan, source: Source) -> Vector {
    let slot = slot(op, source);
    if plan.width == Width::Mm {
        return u128::from(cpu.mm(slot)).into();
    }
    Vector(cpu.vectors.ymm[usize::from(slot & 15)])
}

/// #GP for a source that is not aligned, where it must be: for the SHA instructions only Intel's processors ask for it.
#[cold]
pub(crate) fn misaligned(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let sha = Code::try_from(usize::from(op.code)).is_ok_and(|code| {
        matches!(
            code,
            Code::Sha1msg1_xmm_xmmm128
                | Code::Sha1msg2_xmm_xmmm128
                | Code::Sha1nexte_xmm_xmmm128
                | Code::Sha1rnds4_xmm_xmmm128_imm8
                | Code::Sha256msg1_xmm_xmmm128
                | Code::Sha256msg2_xmm_xmmm128
                | Code::Sha256rnds2_xmm_xmmm128
        )
    });
    if sha && cpu.mode.contains(Mode::AMD) {
        return Ok(());
    }
    Err(cpu.gp(0))
}

/// Reads a memory operand of 1 to 32 bytes, zero-extended.
#[inline]
pub(crate) fn memory(cpu: &mut Cpu, op: &Op, size: u8, aligned: bool) -> Result<Vector> {
    let linear = cpu.linear_op(op, u64::from(size), Access::Read)?;
    if aligned && linear & (u64::from(size) - 1) != 0 {
        misaligned(cpu, op)?;
    }
    Ok(match size {
        1 => u128::from(cpu.load_in::<u8>(linear, op.seg)?).into(),
        2 => u128::from(cpu.load_in::<u16>(linear, op.seg)?).into(),
        4 => u128::from(cpu.load_in::<u32>(linear, op.seg)?).into(),
        8 => u128::from(cpu.load_in::<u64>(linear, op.seg)?).into(),
        32 => {
            if linear & 0xfff > 0x1000 - 32 {
                // The last byte decides first whether the address is canonical.
                cpu.probe(linear, 32, Access::Read, op.seg)?;
            }
            let low = cpu.load_in(linear, op.seg)?;
            Vector([low, cpu.load_in(linear.wrapping_add(16), op.seg)?])
        }
        _ => cpu.load_in::<u128>(linear, op.seg)?.into(),
    })
}

/// Writes a memory operand of 1 to 32 bytes.
#[inline]
pub(crate) fn store(cpu: &mut Cpu, op: &Op, size: u8, aligned: bool, value: &Vector) -> Result<()> {
    let linear = cpu.linear_op(op, u64::from(size), Access::Write)?;
    if aligned && linear & (u64::from(size) - 1) != 0 {
        return Err(cpu.gp(0));
    }
    let low = value.0[0];
    match size {
        1 => cpu.store_in(linear, low as u8, op.seg),
        2 => cpu.store_in(linear, low as u16, op.seg),
        4 => cpu.store_in(linear, low as u32, op.seg),
        8 => cpu.store_in(linear, low as u64, op.seg),
        32 => {
            if linear & 0xfff > 0x1000 - 32 {
                // Both pages must be writable before the first byte is written.
                cpu.probe(linear, 32, Access::Write, op.seg)?;
            }
            cpu.store_in(linear, low, op.seg)?;
            cpu.store_in(linear.wrapping_add(16), value.0[1], op.seg)
        }
        _ => cpu.store_in(linear, low, op.seg),
    }
}

impl Cpu {
    /// #XM, or #UD where the operating system does not know of it.
    #[cold]
    pub(crate) fn simd_exception(&mut self) -> crate::cpu::Fault {
        if self.cr4.contains(Cr4::OSXMMEXCPT) {
            self.raise(Exception::Plain(exception::XM))
        } else {
            self.ud()
        }
    }
}
