//! Which stubs execute which instruction: what all tables share.

use iced_x86::{Instruction, OpKind};

use super::call::Stub;
use super::{table_float, table_fma, table_immediate, table_integer};

/// What an instruction has to do with MXCSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float {
    /// Nothing.
    No,
    /// Rounds by it or raises flags in it, but never underflows.
    Flags,
    /// May underflow; the result's lanes are single precision.
    Single,
    /// May underflow; the result's lanes are double precision.
    Double,
    /// May underflow; only the lowest lane, single precision, is a result.
    SingleScalar,
    /// May underflow; only the lowest lane, double precision, is a result.
    DoubleScalar,
    /// May underflow; the result's lanes are half precision.
    Half,
}

/// Where the result goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// To the first operand, a vector register.
    Vector,
    /// From RAX to the first operand, a general register.
    General,
    /// From RAX to the arithmetic flags.
    Flags,
}

/// How the instructions of a mnemonic are executed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    /// On XMM registers.
    pub(crate) xmm: Option<Stub>,
    /// On YMM registers.
    pub(crate) ymm: Option<Stub>,
    /// On MM registers.
    pub(crate) mm: Option<Stub>,
    /// On XMM registers with a 64-bit general register; `xmm` is then for 32 bits.
    pub(crate) wide: Option<Stub>,
    /// The stubs are tables indexed by the instruction's immediate.
    pub(crate) immediate: bool,
    /// Relation to MXCSR.
    pub(crate) float: Float,
    /// Where the result goes.
    pub(crate) output: Output,
}

impl Entry {
    pub(crate) const NONE: Self = Self {
        xmm: None,
        ymm: None,
        mm: None,
        wide: None,
        immediate: false,
        float: Float::No,
        output: Output::Vector,
    };

    /// With another relation to MXCSR.
    pub(crate) const fn float(self, float: Float) -> Self {
        Self { float, ..self }
    }

    /// With another place for the result.
    pub(crate) const fn output(self, output: Output) -> Self {
        Self { output, ..self }
    }
}

/// The entry of an instruction that is executed by stubs.
pub(crate) fn entry(instruction: &Instruction) -> Option<Entry> {
    let mnemonic = instruction.mnemonic();
    let last = instruction.op_count().checked_sub(1)?;
    // The same mnemonic may permute by an immediate or by a register.
    let immediate = instruction.op_kind(last) == OpKind::Immediate8;
    immediate
        .then(|| table_immediate::entry(mnemonic))
        .flatten()
        .or_else(|| table_integer::entry(mnemonic))
        .or_else(|| table_float::entry(mnemonic))
        .or_else(|| table_fma::entry(mnemonic))
}
