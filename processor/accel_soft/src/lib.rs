//! The software CPU: an interpreter and a translator of x86 with a software MMU, local APIC and everything else that a guest sees of a
//! processor, on hosts that can't run a guest in hardware.
//!
//! The guest is hostile: nothing it does may panic, read or write host memory outside guest memory, or hang the vCPU's
//! thread against [`accel::VcpuHandle::kick`].
//!
//! | module | what it holds |
//! | --- | --- |
//! | `cpu` | `Cpu`, faults, flags, predecoded operations, guest memory access |
//! | `block` | decoding and the cache of decoded blocks |
//! | `exec` | integer instructions |
//! | `mmu` | page walks and the translation buffers |
//! | `system` | segments, exceptions, control registers, MSRs, CPUID |
//! | `apic` | the local APIC |
//! | `simd`, `x87` | vectors and floating point |
//! | `translate` | host code for guest code |

#![allow(unsafe_code)] // reads and writes guest memory and predecoded operations by pointer

pub mod apic;
mod block;
mod cpu;
#[cfg(test)]
mod differential;
mod exec;
mod mmu;
mod run;
mod simd;
mod system;
#[cfg(test)]
mod testing;
mod translate;
mod vm;
#[cfg(test)]
mod wild;
mod x87;

pub use vm::{SoftAccel, SoftEmulator, SoftOptions};
