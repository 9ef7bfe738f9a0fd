//! What instructions do with the status flags, and which of them matter where.

use iced_x86::{Instruction, Mnemonic as M, OpKind, RflagsBits};

/// All six status flags, as iced numbers them.
pub(crate) const ALL: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// What an instruction does with the status flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Effect {
    /// Flags that it needs in the host's.
    pub(crate) reads: u32,
    /// Flags that it leaves new values in, whatever they were.
    pub(crate) writes: u32,
}

/// A count of zero leaves all flags.
fn may_keep(i: &Instruction) -> bool {
    let counted = matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if !counted || i.op_count() == 0 {
        return false;
    }
    match i.op_kind(i.op_count() - 1) {
        OpKind::Immediate8 => i.immediate8() & 31 == 0,
        _ => true,
    }
}

/// The effect of an instruction.
pub(crate) fn effect(i: &Instruction) -> Effect {
    let reads = i.rflags_read() & ALL;
    let writes = i.rflags_modified() & ALL;
    if may_keep(i) {
        return Effect {
            reads: reads | writes,
            writes: 0,
        };
    }
    Effect { reads, writes }
}

/// True when the instruction changes some flag.
pub(crate) fn changes(i: &Instruction) -> bool {
    i.rflags_modified() & ALL != 0
}
