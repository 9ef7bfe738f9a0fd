//! Controllers for disks that are not virtio's.
//!
//! * [`ahci`]: Serial ATA, as ICH9 has it, with ATA disks.

pub mod ahci;
mod ata;
