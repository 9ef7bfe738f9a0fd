//! The software CPU.

pub mod apic;
