//! The x87 unit (whose registers MMX shares).

use iced_x86::Instruction;

use crate::cpu::{Handler, Op};
use crate::simd::Unit;

/// x87 registers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct X87 {
    /// Physical registers R0 to R7 (not relative to the top of stack): significand, sign and exponent. MMn is the
    /// significand of Rn.
    pub(crate) registers: [(u64, u16); 8],
    /// Control word.
    pub(crate) control: u16,
    /// Status word, with the top of stack in bits 11 to 13.
    pub(crate) status: u16,
    /// Bit n: register Rn is *not* empty (the abridged tag word of FXSAVE).
    pub(crate) tags: u8,
    /// Last opcode (11 bits).
    pub(crate) opcode: u16,
    /// Last instruction pointer.
    pub(crate) instruction: u64,
    /// Last instruction's code segment.
    pub(crate) instruction_segment: u16,
    /// Last data pointer.
    pub(crate) data: u64,
    /// Last data segment.
    pub(crate) data_segment: u16,
}

impl Default for X87 {
    fn default() -> Self {
        Self {
            registers: [(0, 0); 8],
            control: 0x37f,
            status: 0,
            tags: 0,
            opcode: 0,
            instruction: 0,
            instruction_segment: 0,
            data: 0,
            data_segment: 0,
        }
    }
}

/// The handler of an x87 instruction (FWAIT too), or `None` when it is not one.
pub(crate) fn lookup(instruction: &Instruction, op: &Op) -> Option<(Handler, Unit)> {
    let _ = (instruction, op);
    None
}
