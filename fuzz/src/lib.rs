//! Fuzz targets and what they share.

pub mod ahci_ports;
pub mod chipset_registers;
pub mod images;
pub mod input;
pub mod nbd_peers;
pub mod pci_topology;
pub mod registers;
pub mod smoke;
pub mod virtio_devices;
