//! Faults: how an instruction that can't complete says so.

use x86_defs::exception;

use super::Cpu;

/// An exception on its way to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exception {
    /// An exception of this vector, without error code.
    Plain(u8),
    /// An exception of this vector with an error code.
    WithCode(u8, u32),
    /// A page fault: error code and the linear address for CR2.
    Page {
        /// Error code ([`exception::PF_PRESENT`] and its kind).
        code: u32,
        /// Faulting linear address.
        address: u64,
    },
    /// A debug exception: the bits to set in DR6.
    Debug(u64),
    /// Nothing to deliver: state that decoding rests on has changed; go on at `Cpu::rip`, which is already set.
    Resume,
    /// A triple fault.
    Shutdown,
}

impl Exception {
    /// The vector, for what is delivered through the IDT.
    pub(crate) fn vector(self) -> Option<u8> {
        match self {
            Self::Plain(v) | Self::WithCode(v, _) => Some(v),
            Self::Page { .. } => Some(exception::PF),
            Self::Debug(_) => Some(exception::DB),
            Self::Resume | Self::Shutdown => None,
        }
    }
}

/// The sign that [`Cpu::exception`] holds an exception to deliver. Of no size, so that results stay in registers. Made
/// only by [`Cpu::raise`] and its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault(());

/// The result of whatever can fault.
pub(crate) type Result<T> = std::result::Result<T, Fault>;

impl Cpu {
    /// Notes an exception; the caller returns the fault.
    #[cold]
    pub(crate) fn raise(&mut self, exception: Exception) -> Fault {
        self.exception = exception;
        Fault(())
    }

    /// #UD.
    #[cold]
    pub(crate) fn ud(&mut self) -> Fault {
        self.raise(Exception::Plain(exception::UD))
    }

    /// #NM.
    #[cold]
    pub(crate) fn nm(&mut self) -> Fault {
        self.raise(Exception::Plain(exception::NM))
    }

    /// #DE.
    #[cold]
    pub(crate) fn de(&mut self) -> Fault {
        self.raise(Exception::Plain(exception::DE))
    }

    /// #GP with an error code.
    #[cold]
    pub(crate) fn gp(&mut self, code: u32) -> Fault {
        self.raise(Exception::WithCode(exception::GP, code))
    }

    /// #SS with an error code.
    #[cold]
    pub(crate) fn ss(&mut self, code: u32) -> Fault {
        self.raise(Exception::WithCode(exception::SS, code))
    }

    /// #NP with an error code.
    #[cold]
    pub(crate) fn np(&mut self, code: u32) -> Fault {
        self.raise(Exception::WithCode(exception::NP, code))
    }

    /// #TS with an error code.
    #[cold]
    pub(crate) fn ts(&mut self, code: u32) -> Fault {
        self.raise(Exception::WithCode(exception::TS, code))
    }
}
