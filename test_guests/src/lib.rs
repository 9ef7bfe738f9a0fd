//! Bare-metal guests, and the conformance suite that runs them on each processor.
//!
//! A guest is an assembler source under `guests/`, in the folder of the mode in which it is entered; `build.rs` makes a flat
//! binary of it. A guest talks to its [`board`] by a few ports (`guests/ports.h`): it checks what it sees itself and ends
//! with an exit code or with the line of its source in which a check failed. What needs the host's hand (interrupts, changes of
//! the memory map, state in and out) is driven by the tests in [`suite`].

pub mod board;
pub mod suite;

/// In which mode a guest is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Real mode at 0000:1000.
    Real,
    /// 32-bit protected mode without paging, at 1 MiB.
    Protected,
    /// 64-bit mode, at 1 MiB; see `guests/long.h`.
    Long,
}

impl Mode {
    /// Guest-physical address of the image.
    pub fn address(self) -> u64 {
        match self {
            Self::Real => 0x1000,
            Self::Protected | Self::Long => 0x10_0000,
        }
    }
}

/// An assembled guest.
#[derive(Debug)]
pub struct Guest {
    /// Name of its source without the extension.
    pub name: &'static str,
    /// How it is entered.
    pub mode: Mode,
    /// Its bytes.
    pub image: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/guests.rs"));

/// The guest of a name.
///
/// # Panics
/// When there is none.
pub fn guest(name: &str) -> &'static Guest {
    GUESTS
        .iter()
        .find(|guest| guest.name == name)
        .unwrap_or_else(|| panic!("there is no guest {name}"))
}
