//! The local APIC and the messages between local APICs (SDM volume 3, chapter 12).
//!
//! Each vCPU owns a [`LocalApic`]; other threads reach it only through its [`Mailbox`], which they find on the
//! machine's [`ApicBus`]. The interrupt request register *is* in the mailbox, so posting an interrupt is one atomic
//! OR and, if the vCPU sleeps, a wake.

mod bus;
mod local;
mod mailbox;
pub mod spec;
mod timer;

pub use bus::{ApicBus, MAX_APICS, Message};
pub use local::{ApicWrite, LocalApic, MsrFault};
pub use mailbox::{ApicMode, Event, Mailbox};
pub use timer::TIMER_HZ;
