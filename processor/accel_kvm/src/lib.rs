//! The KVM processor: Linux's kernel hypervisor behind the seam of [`accel`].
//!
//! The interrupt controller is split: KVM keeps the local APICs, the machine keeps the rest. I/O APIC and MSI messages go in by
//! `KVM_SIGNAL_MSI`, or from the kernel by irqfds with routes of their own; the 8259's interrupts go in through LINT0 when
//! KVM says that the vCPU can take one. INIT and startup IPIs are the kernel's.
//!
//! - [`KvmAccel`]: what the host's KVM can do, and the way to a VM.
//! - [`choose`]: whether to use it, for `--accel auto`.
//! - `vm`: a VM: messages, events, doorbells. `routes`: the table of interrupt routes. `slots`: guest memory and the dirty log.
//! - `vcpu`: the run loop. `run_page`: the page shared with the kernel, and kicks. `state`: registers in and out.
//! - `ioctls`: system calls that the `kvm-ioctls` crate has not got. `statistics`: the kernel's counters.

mod choice;
mod host;
mod ioctls;
mod routes;
mod run_page;
mod slots;
mod state;
mod statistics;
mod vcpu;
mod vm;

pub use choice::{Choice, choose};
pub use host::KvmAccel;
