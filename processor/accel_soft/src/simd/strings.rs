//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM: executed on the host.
#![allow(unsafe_code)] // The stubs are naked functions.

use std::arch::asm;

use iced_x86::{EncodingKind, Instruction, Mnemonic as M};
use x86_defs::state::{RAX, RCX, RDX};

use super::Unit;
use super::call::{Stub, Vector, imm_stubs};
use crate::cpu::{Cpu, Handler, Op, Result, Status, instruction as handler};

/// What an instruction leaves behind.
struct Outcome {
    mask: Vector,
    index: u64,
    flags: u64,
}

/// Calls a stub with explicit lengths in RAX and RDX.
fn call(stub: Stub, first: Vector, second: Vector, lengths: (u64, u64)) -> Outcome {
    let (first, second) = ([first], [second]);
    let mut mask = [Vector::default()];
    let index: u64;
    let flags: u64;
    // SAFETY: the stub is one instruction that reads XMM0, XMM1, RAX and RDX and writes XMM0 or RCX and the flags.
    unsafe {
        asm!(
            "movdqa xmm0, [r8]",
            "movdqa xmm1, [r9]",
            "call {stub}",
            "pushfq",
            "pop rax",
            "movdqa [r10], xmm0",
            stub = in(reg) stub.address(),
            in("r8") first.as_ptr(),
            in("r9") second.as_ptr(),
            in("r10") mask.as_mut_ptr(),
            inout("rax") lengths.0 => flags,
            in("rdx") lengths.1,
            inout("rcx") 0_u64 => index,
            out("xmm0") _,
            out("xmm1") _,
        );
    }
    Outcome {
        mask: mask[0],
        index,
        flags,
    }
}

/// Executes one of the four, `WIDE` with 64-bit lengths. The mask forms write XMM0, the index forms ECX.
fn compare<const MASK: bool, const WIDE: bool, const VEX: bool>(
    cpu: &mut Cpu,
    op: &Op,
    table: Stub,
) -> Result<()> {
    let first = Vector(cpu.vectors.ymm[usize::from(op.a & 15)]);
    let second = if op.has_memory() {
        cpu.read_op::<u128>(op)?.into()
    } else {
        Vector(cpu.vectors.ymm[usize::from(op.b & 15)])
    };
    let (a, d) = (cpu.regs[RAX], cpu.regs[RDX]);
    let lengths = if WIDE {
        (a, d)
    } else {
        (u64::from(a as u32), u64::from(d as u32))
    };
    let outcome = call(table.with_imm(op.imm as u8), first, second, lengths);
    if MASK {
        cpu.vectors.ymm[0][0] = outcome.mask.0[0];
        if VEX {
            cpu.vectors.ymm[0][1] = 0;
        }
    } else {
        cpu.regs[RCX] = u64::from(outcome.index as u32);
    }
    cpu.status = Status::from_rflags(outcome.flags);
    Ok(())
}

macro_rules! compare {
    ($vex:expr, $mask:literal, $wide:literal, $bytes:literal) => {{
        fn execute<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
            compare::<$mask, $wide, VEX>(cpu, op, imm_stubs!($bytes))
        }
        if $vex {
            handler(execute::<true>)
        } else {
            handler(execute::<false>)
        }
    }};
}

/// The handler of a string comparison.
pub(crate) fn lookup(instruction: &Instruction) -> Option<(Handler, Unit)> {
    let vex = instruction.encoding() == EncodingKind::VEX;
    let found = match instruction.mnemonic() {
        M::Pcmpestrm | M::Vpcmpestrm => compare!(vex, true, false, "0x66, 0x0f, 0x3a, 0x60, 0xc1"),
        M::Pcmpestrm64 | M::Vpcmpestrm64 => {
            compare!(vex, true, true, "0x66, 0x48, 0x0f, 0x3a, 0x60, 0xc1")
        }
        M::Pcmpestri | M::Vpcmpestri => compare!(vex, false, false, "0x66, 0x0f, 0x3a, 0x61, 0xc1"),
        M::Pcmpestri64 | M::Vpcmpestri64 => {
            compare!(vex, false, true, "0x66, 0x48, 0x0f, 0x3a, 0x61, 0xc1")
        }
        M::Pcmpistrm | M::Vpcmpistrm => compare!(vex, true, false, "0x66, 0x0f, 0x3a, 0x62, 0xc1"),
        M::Pcmpistri | M::Vpcmpistri => compare!(vex, false, false, "0x66, 0x0f, 0x3a, 0x63, 0xc1"),
        _ => return None,
    };
    Some((found, if vex { Unit::Avx } else { Unit::Sse }))
}
