//! Virtio 1.2 devices over PCI.
