//! MMX, SSE to SSE4.2, AES, PCLMULQDQ, SHA, AVX, AVX2, FMA, F16C.

use iced_x86::Instruction;

use crate::cpu::{Handler, Op};

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

/// The handler of a vector instruction, or `None` when it is not one.
pub(crate) fn lookup(instruction: &Instruction, op: &Op) -> Option<(Handler, Unit)> {
    let _ = (instruction, op);
    None
}
