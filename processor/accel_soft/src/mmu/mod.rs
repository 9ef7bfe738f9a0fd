//! Address translation.

mod tlb;

pub(crate) use tlb::Tlb;

use crate::cpu::{Access, Cpu, Mapping, Privilege, Result};

impl Cpu {
    /// Translates a canonical linear address for an access of one or more bytes inside its page: paging rights, accessed
    /// and dirty bits, physical address to host memory. Enters the page into the TLB where that is allowed.
    ///
    /// # Errors
    /// #PF.
    pub(crate) fn translate(
        &mut self,
        linear: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Mapping> {
        let _ = (linear, access, privilege);
        Err(self.ud())
    }

    /// True when the access is inside the limit of the segment and of a kind that it allows (not in 64-bit mode).
    pub(crate) fn segment_allows(
        &self,
        seg: usize,
        offset: u64,
        size: u64,
        access: Access,
    ) -> bool {
        let _ = (seg, offset, size, access);
        false
    }
}
