//! Where things lie in the guest-physical address space.
//!
//! RAM lies from zero up to `LOW_MAX` at most, and the rest of it from 4 GiB. Between them lie the PCI
//! Express configuration space, the PCI window and the interrupt controllers, at the addresses that Q35's and microvm's users know
//! from QEMU.

use std::ops::Range;

use guest_memory::{BackingOptions, GuestMemory, MemoryError};

/// Most RAM below 4 GiB when there is more than fits below the configuration space.
const LOW_MAX: u64 = 0x8000_0000;
/// PCI Express configuration space: 256 buses.
pub const ECAM: Range<u64> = 0xb000_0000..0xc000_0000;
/// Window for PCI memory below 4 GiB.
pub const PCI_MEMORY: Range<u64> = 0xc000_0000..0xfc00_0000;
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Virtio devices in memory space, on a board without PCI, one behind the other.
pub const VIRTIO_MMIO: u64 = 0xfeb0_0000;
/// Generic events and power registers, on a board without the PC's fixed hardware.
pub const GENERIC_EVENTS: u64 = 0xfea0_0000;
/// HPET.
pub const HPET: u64 = 0xfed0_0000;
/// Local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// First address of RAM above the hole.
pub const HIGH: u64 = 1 << 32;
/// Where the BIOS's tables lie: ACPI and SMBIOS, within what systems without UEFI search.
pub const TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// End of the memory below the legacy video area; above it lies what was the extended BIOS data area.
const CONVENTIONAL_END: u64 = 0x9_fc00;
const VIDEO: u64 = 0xa_0000;

/// Types of the E820 map (ACPI 6.5, section 15.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RegionKind {
    /// Usable RAM.
    Ram = 1,
    /// Reserved.
    Reserved = 2,
}

/// An entry of the E820 map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: RegionKind,
}

/// Where a machine's memory is.
#[derive(Debug, Clone)]
pub struct MemoryMap {
    low: u64,
    high: u64,
    e820: Vec<E820Entry>,
}

impl MemoryMap {
    /// The map of a machine with `size` bytes of RAM, a whole number of pages, with a place for PCI Express configuration space
    /// or without.
    pub fn new(size: u64, ecam: bool) -> Self {
        let low = if size > ECAM.start { LOW_MAX } else { size };
        let high = size - low;
        let mut e820 = Vec::new();
        let mut push = |range: Range<u64>, kind| {
            if range.start < range.end {
                let size = range.end - range.start;
                e820.push(E820Entry {
                    base: range.start,
                    size,
                    kind,
                });
            }
        };
        push(0..CONVENTIONAL_END, RegionKind::Ram);
        push(CONVENTIONAL_END..VIDEO, RegionKind::Reserved);
        push(TABLES, RegionKind::Reserved);
        push(TABLES.end..low, RegionKind::Ram);
        if ecam {
            push(ECAM, RegionKind::Reserved);
        }
        push(HIGH..HIGH + high, RegionKind::Ram);
        Self { low, high, e820 }
    }

    /// Just past the RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.low
    }

    /// Just past all RAM.
    pub fn high_end(&self) -> u64 {
        if self.high == 0 {
            self.low
        } else {
            HIGH + self.high
        }
    }

    /// The map as firmware reports it.
    pub fn e820(&self) -> &[E820Entry] {
        &self.e820
    }

    /// Stretches of RAM as ACPI's SRAT names them.
    pub fn ram(&self) -> Vec<Range<u64>> {
        let mut ranges = vec![0..VIDEO, TABLES.end..self.low];
        if self.high != 0 {
            ranges.push(HIGH..HIGH + self.high);
        }
        ranges
    }

    /// Allocates the RAM.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn allocate(
        &self,
        memory: &GuestMemory,
        options: BackingOptions,
    ) -> Result<(), MemoryError> {
        memory.add_ram(0, self.low, options)?;
        if self.high != 0 {
            memory.add_ram(HIGH, self.high, options)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_keeps_out_of_the_hole() {
        for size in [16 << 20, ECAM.start, ECAM.start + 4096, 64 << 30] {
            let map = MemoryMap::new(size, true);
            let usable = map.e820().iter().filter(|e| e.kind == RegionKind::Ram);
            let lost = (VIDEO - CONVENTIONAL_END) + (TABLES.end - VIDEO);
            assert_eq!(usable.map(|e| e.size).sum::<u64>() + lost, size);
            assert!(map.low_end() <= ECAM.start);
            assert!(
                map.e820()
                    .windows(2)
                    .all(|w| w[0].base + w[0].size <= w[1].base)
            );
        }
    }
}
