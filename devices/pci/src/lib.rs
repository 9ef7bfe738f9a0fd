//! PCI and PCI Express: configuration space, base address registers, interrupts, bridges.
//!
//! A device implements [`PciDevice`] and owns a [`PciFunction`], made by a [`FunctionBuilder`]: its configuration space,
//! its base address registers and its interrupts. [`PciBus::add`] plugs it in and gives a [`PciHandle`]; dropping the handle
//! unplugs it. Base address registers are mapped into the machine's [`device_model::IoBus`]es wherever the guest puts them, as
//! far as the bridges on the way let them through.

mod address;
mod assign;
mod builder;
mod bus;
mod config;
mod function;
mod host;
pub mod lpc;
pub mod mch;
mod msix;
mod root_port;
pub mod spec;
#[cfg(test)]
mod testing;

pub use address::Devfn;
pub use assign::{RootWindows, assign};
pub use builder::{Bar, BarKind, ExpressType, FunctionBuilder, Identity};
pub use bus::{
    Fabric, IntxRouting, PciBus, PciHandle, SlotSink, config_read, config_write, is_bridge,
};
pub use config::ConfigSpace;
pub use function::{PciDevice, PciFunction};
pub use host::{CONFIG_ADDRESS, CONFIG_DATA, ConfigAccess, ECAM_BYTES_PER_BUS, Ecam};
pub use lpc::Lpc;
pub use mch::Mch;
pub use msix::Msix;
pub use root_port::{PciBridge, PowerOffSink, RootPort};

/// What can go wrong in building a PCI topology.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// The place is taken.
    #[error("{function} cannot be plugged into {devfn}: {other} is there")]
    SlotTaken {
        /// What was to be plugged in.
        function: String,
        /// Where.
        devfn: Devfn,
        /// What is there.
        other: String,
    },
    /// No free slot on the bus.
    #[error("no free PCI slot for {0}")]
    Full(String),
    /// The bus hangs on a bridge that is not plugged in.
    #[error("{0} cannot be plugged into a bus that is not connected")]
    NotConnected(String),
    /// A base address register that can't be.
    #[error("{function}: base address register {index} cannot decode {size:#x} bytes")]
    BadBar {
        /// Whose.
        function: String,
        /// Which.
        index: usize,
        /// Bytes or ports.
        size: u64,
    },
    /// An MSI-X table that does not fit.
    #[error("{function}: no room for {vectors} MSI-X vectors")]
    BadMsix {
        /// Whose.
        function: String,
        /// How many vectors.
        vectors: u16,
    },
    /// A window is too small for the devices.
    #[error("{function}: no room for {size:#x} bytes of {space} space")]
    NoRoom {
        /// Whose register or window.
        function: String,
        /// Bytes or ports.
        size: u64,
        /// Which address space.
        space: &'static str,
    },
}
