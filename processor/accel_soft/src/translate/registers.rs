//! Where the guest's general registers are while translated code runs.
//!
//! Most are in the host registers of the same number. The host's RSP is at the [`crate::cpu::Cpu`], so the guest's is in R13;
//! R14 and R15 are for the translator's own use, so the guest's R13 to R15 are in memory: compilers use them least.

use super::emit::{R13, R14, R15, Reg};
use super::hot::at;

/// Holds addresses.
pub(crate) const ADDRESS: Reg = R14;
/// Holds entries of the translation buffer, and guest registers that are in memory.
pub(crate) const SCRATCH: Reg = R15;
/// Holds the guest's RSP.
pub(crate) const STACK: Reg = R13;

/// Where a guest register is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a host register.
    Host(Reg),
    /// In memory, at this displacement from the host's RSP.
    Frame(i32),
}

/// The place of guest register `number` (0 to 15).
pub(crate) const fn place(number: u8) -> Place {
    match number {
        4 => Place::Host(STACK),
        13..=15 => Place::Frame(at::SPILLED + 8 * (number as i32 - 13)),
        _ => Place::Host(number),
    }
}
