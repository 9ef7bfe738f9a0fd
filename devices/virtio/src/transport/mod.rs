//! How a guest reaches a device.

mod bar;
mod frontend;
mod mmio;
mod pci;
mod registers;
mod signals;
pub mod spec;

pub use self::mmio::{MmioWiring, VirtioMmio};
pub use self::pci::{PciWiring, VirtioPci, VirtioPciError};
pub use bar::ModernBar;
pub use frontend::DeviceStatus;
pub use signals::FunctionInterrupts;
