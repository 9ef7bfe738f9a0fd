//! Segment and gate descriptors (SDM volume 3, sections 3.4.5, 3.5, 6.8.3 and 7.11), and reading them from their tables.

use x86_defs::control::Efer;
use x86_defs::state::Segment;

use crate::cpu::{Cpu, Result};

/// System descriptor types (SDM volume 3, table 3-2).
pub(super) mod kind {
    pub(crate) const TSS16_AVAILABLE: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL_GATE16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT_GATE16: u8 = 6;
    pub(crate) const TRAP_GATE16: u8 = 7;
    pub(crate) const TSS_AVAILABLE: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 11;
    pub(crate) const CALL_GATE: u8 = 12;
    pub(crate) const INTERRUPT_GATE: u8 = 14;
    pub(crate) const TRAP_GATE: u8 = 15;
}

/// [`Segment::attributes`]: the segment register holds a null selector.
pub(super) const UNUSABLE: u32 = 1 << 16;
/// [`Segment::attributes`]: 64-bit code.
pub(super) const ATTR_LONG: u32 = 1 << 13;
/// [`Segment::attributes`]: 32-bit code or stack, 4 GiB upper bound.
pub(super) const ATTR_BIG: u32 = 1 << 14;

/// Eight bytes of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor(pub(super) u64);

impl Descriptor {
    pub(super) fn kind(self) -> u8 {
        (self.0 >> 40) as u8 & 0xf
    }

    /// Code or data, not a system descriptor.
    pub(super) fn is_segment(self) -> bool {
        self.0 & 1 << 44 != 0
    }

    pub(super) fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }

    pub(super) fn is_present(self) -> bool {
        self.0 & 1 << 47 != 0
    }

    pub(super) fn is_code(self) -> bool {
        self.is_segment() && self.kind() & 8 != 0
    }

    pub(super) fn is_conforming(self) -> bool {
        self.kind() & 4 != 0
    }

    pub(super) fn is_writable_data(self) -> bool {
        self.is_segment() && self.kind() & 0b1010 == 0b0010
    }

    /// Data, or code that may be read.
    pub(super) fn is_readable(self) -> bool {
        self.is_segment() && self.kind() & 0b1010 != 0b1000
    }

    pub(super) fn is_long(self) -> bool {
        self.0 & 1 << 53 != 0
    }

    pub(super) fn is_big(self) -> bool {
        self.0 & 1 << 54 != 0
    }

    pub(super) fn base(self) -> u64 {
        (self.0 >> 16 & 0xff_ffff) | (self.0 >> 56) << 24
    }

    pub(super) fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.0 & 1 << 55 != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }

    pub(super) fn attributes(self) -> u32 {
        (self.0 >> 40) as u32 & 0xf0ff
    }

    /// The segment register that holds this descriptor.
    pub(super) fn segment(self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            attributes: self.attributes(),
        }
    }

    /// Of a gate: the selector.
    pub(super) fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Of a gate: the low 32 bits of the offset.
    pub(super) fn gate_offset(self) -> u64 {
        (self.0 & 0xffff) | (self.0 >> 32 & 0xffff_0000)
    }

    /// Of a call gate: how many parameters are copied.
    pub(super) fn gate_parameters(self) -> u32 {
        (self.0 >> 32) as u32 & 0x1f
    }

    /// Of a 64-bit interrupt gate: the interrupt stack table index.
    pub(super) fn gate_ist(self) -> u64 {
        self.0 >> 32 & 7
    }
}

/// The selector as an error code: without RPL.
pub(super) fn code_of(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// A null selector.
pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Is an access of `size` bytes at `offset` inside the segment's limit?
pub(super) fn in_limit(segment: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + (size - 1);
    let limit = u64::from(segment.limit);
    let expand_down = segment.attributes & 0x1c == 0x14;
    if expand_down {
        let top = if segment.attributes & ATTR_BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        offset > limit && last <= top
    } else {
        // Accesses wrap at 4 GiB in a segment that has all of it.
        last <= limit || limit == 0xffff_ffff
    }
}

impl Cpu {
    /// Long mode is active (64-bit or compatibility).
    #[inline]
    pub(super) fn long_mode(&self) -> bool {
        self.efer.contains(Efer::LMA)
    }

    /// The address of a system structure's byte: 32 bits outside long mode.
    pub(super) fn system_address(&self, base: u64, offset: u64) -> u64 {
        let linear = base.wrapping_add(offset);
        if self.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Where a selector's descriptor of `size` bytes is, or `None` when it lies outside its table.
    pub(super) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 != 0 {
            if self.ldtr.attributes & UNUSABLE != 0 {
                return None;
            }
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        };
        (offset + size - 1 <= limit).then(|| self.system_address(base, offset))
    }

    /// Reads the descriptor of a selector that is not null; `None` when it lies outside its table.
    ///
    /// # Errors
    /// Page faults.
    pub(super) fn read_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>> {
        match self.descriptor_address(selector, 8) {
            Some(at) => Ok(Some(Descriptor(self.load_system(at)?))),
            None => Ok(None),
        }
    }

    /// The upper half of a 16-byte descriptor (bits 32 to 63 of its base or offset) at the selector.
    ///
    /// # Errors
    /// Page faults; `None` when it lies outside its table.
    pub(super) fn read_descriptor_high(&mut self, selector: u16) -> Result<Option<u64>> {
        match self.descriptor_address(selector, 16) {
            Some(at) => Ok(Some(self.load_system(at.wrapping_add(8))?)),
            None => Ok(None),
        }
    }

    /// Sets the accessed bit of a code or data descriptor that is loaded.
    ///
    /// # Errors
    /// Page faults.
    pub(super) fn mark_accessed(&mut self, selector: u16, descriptor: Descriptor) -> Result<()> {
        if descriptor.kind() & 1 == 0
            && let Some(at) = self.descriptor_address(selector, 8)
        {
            let byte = (descriptor.0 >> 40) as u8 | 1;
            self.store_system(at.wrapping_add(5), byte)?;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor.
    ///
    /// # Errors
    /// Page faults.
    pub(super) fn mark_busy(&mut self, selector: u16, busy: bool) -> Result<()> {
        if let Some(at) = self.descriptor_address(selector, 8) {
            let at = at.wrapping_add(5);
            let byte: u8 = self.load_system(at)?;
            self.store_system(at, if busy { byte | 2 } else { byte & !2 })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_manual_draws_them() {
        // Base 0x12345678, limit 0xabcde pages, 32-bit writable data, DPL 2.
        let d = Descriptor(0x12ca_d234_5678_bcde);
        assert_eq!(d.base(), 0x1234_5678);
        assert_eq!(d.limit(), 0xabcd_efff);
        assert_eq!(d.dpl(), 2);
        assert!(d.is_present() && d.is_writable_data() && d.is_big() && !d.is_long());
        assert_eq!(d.attributes(), 0xc0d2);
        // 64-bit interrupt gate, IST 3.
        let g = Descriptor(0x8765_8e03_0010_4321);
        assert_eq!(g.gate_offset(), 0x8765_4321);
        assert_eq!((g.gate_selector(), g.gate_ist(), g.kind()), (0x10, 3, 14));
    }

    #[test]
    fn limits_of_both_directions() {
        let up = Segment {
            limit: 0xfff,
            attributes: 0x93,
            ..Segment::default()
        };
        assert!(in_limit(&up, 0xffc, 4) && !in_limit(&up, 0xffd, 4));
        let down = Segment {
            limit: 0xfff,
            attributes: 0x97,
            ..Segment::default()
        };
        assert!(!in_limit(&down, 0xfff, 1) && in_limit(&down, 0x1000, 1));
        assert!(in_limit(&down, 0xfffc, 4) && !in_limit(&down, 0xfffd, 4));
        let big = Segment {
            attributes: 0x97 | ATTR_BIG,
            ..down
        };
        assert!(in_limit(&big, 0xffff_fffc, 4) && !in_limit(&big, 0xffff_fffd, 4));
        assert!(in_limit(&big, 0x1_0000, 4));
    }
}
