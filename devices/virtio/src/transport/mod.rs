//! How a guest reaches a device.

mod bar;
mod registers;
mod signals;
pub mod spec;

pub use bar::{DeviceStatus, ModernBar};
pub use signals::FunctionInterrupts;
