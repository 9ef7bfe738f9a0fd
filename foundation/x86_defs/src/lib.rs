//! The x86 architecture's names: registers, CPUID leaves, MSRs, exception vectors. No logic.
//!
//! "SDM" is the Intel 64 and IA-32 Architectures Software Developer's Manual, "APM" the AMD64 Architecture
//! Programmer's Manual; sections are named beside the definitions.

pub mod control;
pub mod cpuid;
pub mod exception;
pub mod msr;
pub mod state;
