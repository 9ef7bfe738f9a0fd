//! Fast handlers for the commonest forms of plans: two vector sources, a vector or a mask as result, no exceptions.
#![allow(unsafe_code)] // Calls stubs on the register file in place.

use std::arch::asm;

use iced_x86::EncodingKind;

use super::call::{MXCSR_FLAGS, MXCSR_MASKS, Stub};
use super::execute::by_plan;
use super::packed::Packed;
use super::plan::{Bank, Plan, Source, Width};
use super::table::{Float, Output};
use crate::cpu::{Access, Cpu, Handler, Op, Result, instruction as handler};

/// Calls a stub that has no third source and does not use RAX, with the operands where they are.
///
/// # Safety
/// Each pointer is valid for 32 bytes when `WIDE`, else for 16, and aligned to 16.
#[inline(always)]
unsafe fn call<const WIDE: bool>(
    stub: Stub,
    to: *mut [u128; 2],
    a: *const [u128; 2],
    b: *const [u128; 2],
) {
    // SAFETY: the caller's promise; a stub keeps to the registers declared here.
    unsafe {
        if WIDE {
            asm!(
                "vmovdqu ymm0, [{a}]",
                "vmovdqu ymm1, [{b}]",
                "call {stub}",
                "vmovdqu [{to}], ymm0",
                "vzeroupper",
                stub = in(reg) stub.address(), to = in(reg) to, a = in(reg) a, b = in(reg) b,
                out("rax") _, out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            );
        } else {
            asm!(
                "movdqa xmm0, [{a}]",
                "movdqa xmm1, [{b}]",
                "call {stub}",
                "movdqa [{to}], xmm0",
                stub = in(reg) stub.address(), to = in(reg) to, a = in(reg) a, b = in(reg) b,
                out("rax") _, out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            );
        }
    }
}

/// How wide, and what becomes of the upper half.
const LEGACY: u8 = 0;
const VEX128: u8 = 1;
const VEX256: u8 = 2;

/// Executes `to = stub(a, b)`. The first source is register operand `a` (`THREE` false) or `b`; the second is the memory
/// operand or the register operand after.
fn binary<const WIDTH: u8, const THREE: bool, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    // SAFETY: `choose` gives this handler to operations that keep a plan.
    let plan = unsafe { Plan::of(op) };
    let mut value = [Packed::default(); 2];
    if MEMORY {
        let size = if WIDTH == VEX256 { 32 } else { 16 };
        let linear = cpu.linear_op(op, size, Access::Read)?;
        if WIDTH == LEGACY && linear & 15 != 0 {
            super::execute::misaligned(cpu, op)?;
        }
        if WIDTH == VEX256 && linear & 0xfff > 0x1000 - 32 {
            cpu.probe(linear, 32, Access::Read, op.seg)?;
        }
        value[0] = cpu.load_in::<Packed>(linear, op.seg)?;
        if WIDTH == VEX256 {
            value[1] = cpu.load_in::<Packed>(linear.wrapping_add(16), op.seg)?;
        }
    }
    let (first, second) = if THREE { (op.b, op.c) } else { (op.a, op.b) };
    let registers = cpu.vectors.ymm.as_mut_ptr();
    // SAFETY: register numbers are masked to the register file's sixteen, which is aligned; the stub fits the width.
    unsafe {
        let b = if MEMORY {
            (&raw const value).cast()
        } else {
            registers.add(usize::from(second & 15))
        };
        let to = registers.add(usize::from(op.a & 15));
        if WIDTH == VEX256 {
            call::<true>(plan.stub, to, registers.add(usize::from(first & 15)), b);
        } else {
            call::<false>(plan.stub, to, registers.add(usize::from(first & 15)), b);
        }
        if WIDTH == VEX128 {
            (*to)[1] = 0;
        }
    }
    Ok(())
}

/// As [`call`], under a guest's MXCSR that masks all exceptions; the flags raised.
///
/// # Safety
/// As [`call`].
#[inline(always)]
unsafe fn call_float<const WIDE: bool>(
    stub: Stub,
    mxcsr: u32,
    to: *mut [u128; 2],
    a: *const [u128; 2],
    b: *const [u128; 2],
) -> u32 {
    let mut control = mxcsr & !MXCSR_FLAGS;
    // Nothing but the flags, at which compiled code does not look, differs from the host's own MXCSR: leave them.
    let same = control == MXCSR_MASKS;
    // SAFETY: the caller's promise; MXCSR is the host's again, flags apart, at the end.
    unsafe {
        macro_rules! run {
            ($load_a:literal, $load_b:literal, $store:literal, $($after:literal),*) => {
                asm!(
                    $load_a, $load_b, "ldmxcsr [{control}]", "call {stub}", "stmxcsr [{control}]", $store, $($after),*,
                    stub = in(reg) stub.address(), to = in(reg) to, a = in(reg) a, b = in(reg) b,
                    control = in(reg) &raw mut control, host = in(reg) &raw const MXCSR_MASKS_PLACE,
                    out("rax") _, out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                )
            };
        }
        match (WIDE, same) {
            (true, true) => run!(
                "vmovdqu ymm0, [{a}]",
                "vmovdqu ymm1, [{b}]",
                "vmovdqu [{to}], ymm0",
                "vzeroupper",
                "# {host}"
            ),
            (true, false) => run!(
                "vmovdqu ymm0, [{a}]",
                "vmovdqu ymm1, [{b}]",
                "vmovdqu [{to}], ymm0",
                "vzeroupper",
                "ldmxcsr [{host}]"
            ),
            (false, true) => run!(
                "movdqa xmm0, [{a}]",
                "movdqa xmm1, [{b}]",
                "movdqa [{to}], xmm0",
                "# {host}"
            ),
            (false, false) => run!(
                "movdqa xmm0, [{a}]",
                "movdqa xmm1, [{b}]",
                "movdqa [{to}], xmm0",
                "ldmxcsr [{host}]"
            ),
        }
    }
    control & MXCSR_FLAGS
}

/// The host's MXCSR, in memory.
static MXCSR_MASKS_PLACE: u32 = MXCSR_MASKS;

/// As [`binary`], for floating point and for memory operands of any size. Where an exception is not masked, the general
/// handler does it.
fn float<const WIDTH: u8, const THREE: bool, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<()> {
    let mxcsr = cpu.vectors.mxcsr;
    if mxcsr & MXCSR_MASKS != MXCSR_MASKS {
        return by_plan(cpu, op);
    }
    // SAFETY: as in `binary`.
    let plan = unsafe { Plan::of(op) };
    let mut value = [Packed::default(); 2];
    if MEMORY {
        value = operand(cpu, op, plan)?;
    }
    let (first, second) = if THREE { (op.b, op.c) } else { (op.a, op.b) };
    let registers = cpu.vectors.ymm.as_mut_ptr();
    // SAFETY: as in `binary`.
    unsafe {
        let b = if MEMORY {
            (&raw const value).cast()
        } else {
            registers.add(usize::from(second & 15))
        };
        let to = registers.add(usize::from(op.a & 15));
        let a = registers.add(usize::from(first & 15));
        let raised = if WIDTH == VEX256 {
            call_float::<true>(plan.stub, mxcsr, to, a, b)
        } else {
            call_float::<false>(plan.stub, mxcsr, to, a, b)
        };
        cpu.vectors.mxcsr |= raised;
    }
    if WIDTH == VEX128 {
        cpu.set_ymm_high(op.a, Packed::default());
    }
    Ok(())
}

/// A memory operand of the plan's size, zero-extended.
#[inline(always)]
fn operand(cpu: &mut Cpu, op: &Op, plan: &Plan) -> Result<[Packed; 2]> {
    let linear = cpu.linear_op(op, u64::from(plan.memory), Access::Read)?;
    if plan.aligned && linear & 15 != 0 {
        super::execute::misaligned(cpu, op)?;
    }
    let zero = Packed::default();
    Ok(match plan.memory {
        4 => [
            Packed::from_quadword(cpu.load_in::<u32>(linear, op.seg)?.into()),
            zero,
        ],
        8 => [
            Packed::from_quadword(cpu.load_in::<u64>(linear, op.seg)?),
            zero,
        ],
        16 => [cpu.load_in(linear, op.seg)?, zero],
        _ => {
            if linear & 0xfff > 0x1000 - 32 {
                cpu.probe(linear, 32, Access::Read, op.seg)?;
            }
            [
                cpu.load_in(linear, op.seg)?,
                cpu.load_in(linear.wrapping_add(16), op.seg)?,
            ]
        }
    })
}

/// PMOVMSKB and MOVMSK: the mask goes to a general register.
fn mask<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    // SAFETY: as in `binary`.
    let plan = unsafe { Plan::of(op) };
    let source = &cpu.vectors.ymm[usize::from(op.b & 15)];
    let result: u64;
    // SAFETY: as in `call`; the stub leaves its result in RAX.
    unsafe {
        if WIDE {
            asm!("vmovdqu ymm1, [{source}]", "call {stub}", "vzeroupper", stub = in(reg) plan.stub.address(),
                source = in(reg) source, out("rax") result, out("xmm0") _, out("xmm1") _);
        } else {
            asm!("movdqa xmm1, [{source}]", "call {stub}", stub = in(reg) plan.stub.address(),
                source = in(reg) source, out("rax") result, out("xmm0") _, out("xmm1") _);
        }
    }
    cpu.regs.set::<u64>(op.a, result);
    Ok(())
}

/// A fast handler for a plan, if its form has one.
pub(crate) fn choose(plan: &Plan, encoding: EncodingKind) -> Option<Handler> {
    if plan.general || plan.second == Bank::Mm || plan.destination == Bank::Mm {
        return None;
    }
    let vex = encoding == EncodingKind::VEX;
    if plan.output == Output::General
        && plan.float == Float::No
        && plan.second == Bank::Vector
        && plan.memory == 0
    {
        let wide = plan.wide;
        return Some(if wide {
            handler(mask::<true>)
        } else {
            handler(mask::<false>)
        });
    }
    if plan.output != Output::Vector || plan.sources[2] != Source::None {
        return None;
    }
    let (three, memory) = match (plan.sources[0], plan.sources[1]) {
        (Source::A, Source::B) => (false, false),
        (Source::A, Source::Memory) => (false, true),
        (Source::B, Source::C) => (true, false),
        (Source::B, Source::Memory) => (true, true),
        _ => return None,
    };
    if !memory && plan.second != Bank::Vector {
        return None;
    }
    if plan.float != Float::No {
        return choose_float(plan.width, three, memory);
    }
    let bytes = match plan.width {
        Width::Legacy | Width::Vex128 => 16,
        Width::Vex256 => 32,
        Width::Mm => return None,
    };
    if memory && (plan.memory != bytes || plan.aligned == vex) {
        return None;
    }
    Some(match (plan.width, three, memory) {
        (Width::Legacy, _, false) => handler(binary::<LEGACY, false, false>),
        (Width::Legacy, _, true) => handler(binary::<LEGACY, false, true>),
        (Width::Vex128, false, false) => handler(binary::<VEX128, false, false>),
        (Width::Vex128, false, true) => handler(binary::<VEX128, false, true>),
        (Width::Vex128, true, false) => handler(binary::<VEX128, true, false>),
        (Width::Vex128, true, true) => handler(binary::<VEX128, true, true>),
        (Width::Vex256, false, false) => handler(binary::<VEX256, false, false>),
        (Width::Vex256, false, true) => handler(binary::<VEX256, false, true>),
        (Width::Vex256, true, false) => handler(binary::<VEX256, true, false>),
        (Width::Vex256, true, true) => handler(binary::<VEX256, true, true>),
        (Width::Mm, ..) => return None,
    })
}

fn choose_float(width: Width, three: bool, memory: bool) -> Option<Handler> {
    Some(match (width, three, memory) {
        (Width::Legacy, _, false) => handler(float::<LEGACY, false, false>),
        (Width::Legacy, _, true) => handler(float::<LEGACY, false, true>),
        (Width::Vex128, false, false) => handler(float::<VEX128, false, false>),
        (Width::Vex128, false, true) => handler(float::<VEX128, false, true>),
        (Width::Vex128, true, false) => handler(float::<VEX128, true, false>),
        (Width::Vex128, true, true) => handler(float::<VEX128, true, true>),
        (Width::Vex256, false, false) => handler(float::<VEX256, false, false>),
        (Width::Vex256, false, true) => handler(float::<VEX256, false, true>),
        (Width::Vex256, true, false) => handler(float::<VEX256, true, false>),
        (Width::Vex256, true, true) => handler(float::<VEX256, true, true>),
        (Width::Mm, ..) => return None,
    })
}
