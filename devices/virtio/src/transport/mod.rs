//! How a guest reaches a device.

mod bar;
mod mmio;
mod pci;
mod registers;
mod signals;
pub mod spec;

pub use self::mmio::{MmioWiring, VirtioMmio};
pub use self::pci::{PciWiring, VirtioPci, VirtioPciError};
pub use bar::{DeviceStatus, ModernBar};
pub use signals::FunctionInterrupts;
