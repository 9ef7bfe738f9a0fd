//! Fast handlers for the commonest forms of plans: two vector sources, a vector or a mask as result, no exceptions.
#![allow(unsafe_code)] // Calls stubs on the register file in place.

use std::arch::asm;

use iced_x86::EncodingKind;

use super::call::Stub;
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
    let mut value = [0; 2];
    if MEMORY {
        let size = if WIDTH == VEX256 { 32 } else { 16 };
        let linear = cpu.linear_op(op, size, Access::Read)?;
        if WIDTH == LEGACY && linear & 15 != 0 {
            return Err(cpu.gp(0));
        }
        if WIDTH == VEX256 && linear & 0xfff > 0x1000 - 32 {
            cpu.probe(linear, 32, Access::Read, op.seg)?;
        }
        value[0] = cpu.load_in::<u128>(linear, op.seg)?;
        if WIDTH == VEX256 {
            value[1] = cpu.load_in::<u128>(linear.wrapping_add(16), op.seg)?;
        }
    }
    let (first, second) = if THREE { (op.b, op.c) } else { (op.a, op.b) };
    let registers = cpu.vectors.ymm.as_mut_ptr();
    // SAFETY: register numbers are masked to the register file's sixteen, which is aligned; the stub fits the width.
    unsafe {
        let b = if MEMORY {
            &raw const value
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
    if plan.float != Float::No || plan.second == Bank::Mm || plan.destination == Bank::Mm {
        return None;
    }
    let vex = encoding == EncodingKind::VEX;
    if plan.output == Output::General && plan.second == Bank::Vector && plan.memory == 0 {
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
