//! Fuzz targets and what they share.

pub mod ahci_ports;
pub mod chipset_registers;
pub mod cpu_models;
pub mod images;
pub mod input;
pub mod kernel_images;
pub mod nbd_peers;
pub mod option_texts;
pub mod pci_machine;
pub mod pci_topology;
pub mod qmp_lines;
pub mod registers;
pub mod smoke;
pub mod user_network;
pub mod virtio_devices;
