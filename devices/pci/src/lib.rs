//! PCI and PCI Express: configuration space, base address registers, interrupts, bridges.
