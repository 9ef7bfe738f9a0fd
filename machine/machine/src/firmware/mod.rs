//! The tables that a BIOS leaves in memory for an operating system.

mod acpi;
mod dsdt;
mod reset_vector;
mod smbios;

pub use acpi::{AcpiConfig, Platform, Transport, write as write_acpi};
pub use reset_vector::write as write_reset_vector;
pub use smbios::{SmbiosConfig, write as write_smbios};

use std::ops::Range;

/// Where the ACPI tables lie; the root pointer is the first of them.
pub const ACPI_AREA: Range<u64> = 0xe_0000..0xf_0000;
/// Where the SMBIOS tables lie; the entry point is the first of them.
pub const SMBIOS_AREA: Range<u64> = 0xf_0000..0xf_ffe0;

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, b| sum.wrapping_add(*b))
        .wrapping_neg()
}
