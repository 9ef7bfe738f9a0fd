//! RFLAGS: the status flags apart from the rest.

use x86_defs::control::Rflags;

use super::Cpu;

/// The six status flags as the host's LAHF and SETO give them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(crate) struct Status {
    /// OF: 0 or 1.
    pub(crate) of: u8,
    /// SF, ZF, AF, PF and CF at their places in RFLAGS; the other bits may be anything.
    pub(crate) low: u8,
}

/// CF in [`Status::low`].
pub(crate) const CF: u8 = 1 << 0;
/// PF in [`Status::low`].
pub(crate) const PF: u8 = 1 << 2;
/// AF in [`Status::low`].
pub(crate) const AF: u8 = 1 << 4;
/// ZF in [`Status::low`].
pub(crate) const ZF: u8 = 1 << 6;
/// SF in [`Status::low`].
pub(crate) const SF: u8 = 1 << 7;
const LOW: u8 = CF | PF | AF | ZF | SF;

/// The status flags in RFLAGS.
pub(crate) const STATUS: u64 = LOW as u64 | Rflags::OF.bits();

impl Status {
    /// From RFLAGS.
    #[inline]
    pub(crate) fn from_rflags(rflags: u64) -> Self {
        Self {
            of: u8::from(rflags & Rflags::OF.bits() != 0),
            low: rflags as u8 & LOW,
        }
    }

    /// As bits of RFLAGS.
    #[inline]
    pub(crate) fn to_rflags(self) -> u64 {
        u64::from(self.low & LOW) | u64::from(self.of) << 11
    }

    /// CF.
    #[inline]
    pub(crate) fn carry(self) -> bool {
        self.low & CF != 0
    }

    /// ZF.
    #[inline]
    pub(crate) fn zero(self) -> bool {
        self.low & ZF != 0
    }

    /// The condition of a conditional instruction: the low four bits of its opcode (SDM volume 1, appendix B).
    #[inline(always)]
    pub(crate) fn condition(self, cc: u8) -> bool {
        let holds = match cc >> 1 & 7 {
            0 => self.of != 0,
            1 => self.low & CF != 0,
            2 => self.low & ZF != 0,
            3 => self.low & (CF | ZF) != 0,
            4 => self.low & SF != 0,
            5 => self.low & PF != 0,
            6 => (self.low >> 7) ^ self.of != 0,
            _ => self.low & ZF != 0 || (self.low >> 7) ^ self.of != 0,
        };
        holds ^ (cc & 1 != 0)
    }
}

impl Cpu {
    /// RFLAGS as the guest sees it.
    #[inline]
    pub(crate) fn rflags(&self) -> u64 {
        self.system_flags | self.status.to_rflags()
    }

    /// Replaces RFLAGS, status flags and all, and derives what follows from it. Bits that are not there stay fixed.
    pub(crate) fn set_rflags(&mut self, rflags: u64) {
        let known = Rflags::all().bits() & !STATUS & !Rflags::FIXED.bits();
        self.status = Status::from_rflags(rflags);
        let system = rflags & known | Rflags::FIXED.bits();
        let changed = system ^ self.system_flags;
        self.system_flags = system;
        if changed & !Rflags::DF.bits() != 0 {
            self.update_mode();
        }
        if changed & system & Rflags::IF.bits() != 0 {
            // Interrupts that were held back may wait.
            self.attention = true;
        }
    }

    /// A flag of RFLAGS that is not a status flag.
    #[inline]
    pub(crate) fn system_flag(&self, flag: Rflags) -> bool {
        self.system_flags & flag.bits() != 0
    }
}
