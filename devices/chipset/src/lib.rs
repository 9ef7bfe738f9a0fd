//! The PC's own devices: timers, interrupt controllers, serial ports, power management.
//!
//! Each device is made by its `new`, in its reset state, with the [`device_model::IrqLine`]s and other ends that it is
//! wired to, and put on a bus by its `attach`, whose regions keep it there. [`InterruptPins`] makes
//! the pins that lines end in.

mod calendar;
pub mod fw_cfg;
pub mod ged;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod ps2;
pub mod rtc;
pub mod serial;
pub mod small_ports;
#[cfg(test)]
mod testing;
pub mod wiring;

pub use fw_cfg::FwCfg;
pub use ged::GenericEvents;
pub use hpet::{Hpet, HpetPins};
pub use i8042::I8042;
pub use ioapic::IoApic;
pub use pic::Pic;
pub use pit::Pit;
pub use pm::{AcpiPm, ResetControl};
pub use rtc::{CmosConfig, Rtc};
pub use serial::Serial;
pub use small_ports::{DebugConsole, DmaPages, PvPanic};
pub use wiring::InterruptPins;
