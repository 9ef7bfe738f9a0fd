//! The QEMU machine protocol: its server and its commands.
