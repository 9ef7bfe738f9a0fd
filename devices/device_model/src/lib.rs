//! What every device is built from.
//!
//! * [`IoBus`] and [`IoHandler`]: a device's registers in port space or in memory space.
//! * [`IrqPin`], [`IrqLine`] and [`IrqSink`]: interrupt wires. A device holds a line, never a number.
//! * [`MsiSink`]: interrupts that are sent as messages.
//! * [`Doorbells`]: guest writes that only signal an event.
//! * [`Device`]: what the machine asks of all devices alike.
//! * [`PowerControl`]: how a device asks the machine to power off, reset or report.
//! * [`CharBackend`] and [`CharFrontend`]: the two ends of a serial line.
//!
//! # Locks
//!
//! A handler is called without any lock held and takes its device's own. Calls go *down*: a device may, with its lock held,
//! set its lines, send messages, arm timers and write to its character backend; none of these calls back into a device
//! on the same thread. What comes *up* (register accesses, timers, input) comes without locks held.

mod bus;
mod character;
mod device;
mod doorbell;
mod irq;
mod power;

pub use bus::{IoBus, IoError, IoHandler, IoRegion, Widths};
pub use character::{CharBackend, CharEvent, CharFrontend};
pub use device::{Device, ResetKind};
pub use doorbell::{Doorbell, Doorbells};
pub use irq::{IrqLine, IrqPin, IrqSink, MsiSink};
pub use power::{PanicKind, PowerControl, PowerEvent, ResetCause, ShutdownCause, WakeCause};
