//! MMX, SSE to SSE4.2, AES, PCLMULQDQ, SHA, AVX, AVX2, FMA, F16C, GFNI.
//!
//! Decoding finds for each instruction a handler and, for most, a [`plan::Plan`] that names the host routine which
//! executes the operation; see [`call`] for how.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `call` | calls of host routines, under a guest's MXCSR where that matters |
//! | `table` and its kind | the routine for each mnemonic |
//! | `plan`, `execute` | from an instruction to its routine and operands, and back |
//! | `moves`, `elements`, `gather`, `mmx`, `strings` | what is not of the form "routine of one or two sources" |
//! | `host` | what the host can execute |

mod call;
mod elements;
mod execute;
mod fast;
mod gather;
mod host;
mod mmx;
mod moves;
mod packed;
mod plan;
mod strings;
mod table;
mod table_float;
mod table_fma;
mod table_immediate;
mod table_integer;

use iced_x86::Instruction;

use crate::cpu::{Handler, Op, instruction as handler};

pub(crate) use elements::MXCSR_MASK;
pub(crate) use host::host_features;
/// What must be enabled for an instruction not to fault. The decoder looks it up in [`crate::cpu::Mode`] and puts the fault
/// in the instruction's place where it is not, so that handlers need not check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// x87: #NM when CR0.EM or TS.
    X87,
    /// MMX: #UD when CR0.EM, #NM when CR0.TS.
    Mmx,
    /// SSE: #UD when CR0.EM or not CR4.OSFXSR, #NM when CR0.TS.
    Sse,
    /// AVX: #UD when not CR4.OSXSAVE or XCR0 lacks it or not in protected mode, #NM when CR0.TS.
    Avx,
    /// Checks by itself.
    Own,
}

/// XMM and YMM registers, MXCSR.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Vectors {
    /// YMM0 to YMM15: low and high half.
    pub(crate) ymm: [[u128; 2]; 16],
    /// MXCSR.
    pub(crate) mxcsr: u32,
}

impl Default for Vectors {
    fn default() -> Self {
        Self {
            ymm: [[0; 2]; 16],
            mxcsr: 0x1f80,
        }
    }
}

/// The handler of a vector instruction, or `None` when it is not one or the host can't execute it. Handlers that execute by
/// a plan keep it in `op`'s immediate.
pub(crate) fn lookup(instruction: &Instruction, op: &mut Op) -> Option<(Handler, Unit)> {
    if !instruction
        .cpuid_features()
        .iter()
        .all(|f| host::supports(*f))
    {
        return None;
    }
    mmx::lookup(instruction, op)
        .or_else(|| moves::lookup(instruction))
        .or_else(|| elements::lookup(instruction, op))
        .or_else(|| gather::lookup(instruction, op))
        .or_else(|| strings::lookup(instruction))
        .or_else(|| by_plan(instruction, op))
}

fn by_plan(instruction: &Instruction, op: &mut Op) -> Option<(Handler, Unit)> {
    let plan = plan::Plan::for_instruction(instruction)?;
    plan.keep_in(op);
    let fast = fast::choose(plan, instruction.encoding());
    Some((
        fast.unwrap_or_else(|| handler(execute::by_plan)),
        plan.unit(),
    ))
}
