//! How a guest reaches a device.

mod bar;
mod pci;
mod registers;
mod signals;
pub mod spec;

pub use self::pci::{PciWiring, VirtioPci, VirtioPciError};
pub use bar::{DeviceStatus, ModernBar};
pub use signals::FunctionInterrupts;
