//! The control calls of Linux's tun driver (linux/if_tun.h).
#![allow(unsafe_code)] // ioctl can't be called otherwise.

use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::ioctl::{IntegerSetter, Setter, Updater, ioctl, opcode};

/// A tap device: frames start with an Ethernet header.
pub(super) const IFF_TAP: u16 = 0x0002;
/// No packet information in front of frames.
pub(super) const IFF_NO_PI: u16 = 0x1000;
/// `virtio_net_hdr` in front of frames.
pub(super) const IFF_VNET_HDR: u16 = 0x4000;
/// Several descriptors for one interface.
pub(super) const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;

const TUNSETIFF: u32 = opcode::write::<i32>(b'T', 202);
const TUNSETOFFLOAD: u32 = opcode::write::<u32>(b'T', 208);
const TUNGETIFF: u32 = opcode::read::<u32>(b'T', 210);
const TUNSETVNETHDRSZ: u32 = opcode::write::<i32>(b'T', 216);
const TUNSETQUEUE: u32 = opcode::write::<i32>(b'T', 217);

/// The bytes of an interface's name with its terminating zero.
pub(super) const IFNAMSIZ: usize = 16;

/// `struct ifreq` with its flags.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct InterfaceRequest {
    name: [u8; IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: u16) -> Self {
        let mut bytes = [0; IFNAMSIZ];
        let len = name.len().min(IFNAMSIZ - 1);
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self {
            name: bytes,
            flags,
            rest: [0; 22],
        }
    }

    fn name(&self) -> String {
        let len = self.name.iter().position(|b| *b == 0).unwrap_or(IFNAMSIZ);
        String::from_utf8_lossy(&self.name[..len]).into_owned()
    }
}

/// Connects a descriptor of /dev/net/tun to an interface and answers its name, which the kernel makes up if `name` is
/// empty or holds `%d`.
pub(super) fn set_interface(fd: impl AsFd, name: &str, flags: u16) -> Result<String> {
    let mut request = InterfaceRequest::new(name, flags);
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose size and layout `InterfaceRequest` has.
    unsafe {
        ioctl(
            fd,
            Updater::<{ TUNSETIFF }, InterfaceRequest>::new(&mut request),
        )?
    };
    Ok(request.name())
}

/// The name and the flags of the interface that a descriptor is connected to.
pub(super) fn interface(fd: impl AsFd) -> Result<(String, u16)> {
    let mut request = InterfaceRequest::new("", 0);
    // SAFETY: TUNGETIFF writes one `struct ifreq`, whose size and layout `InterfaceRequest` has.
    unsafe {
        ioctl(
            fd,
            Updater::<{ TUNGETIFF }, InterfaceRequest>::new(&mut request),
        )?
    };
    Ok((request.name(), request.flags))
}

/// Says what the reader of the descriptor can take, by the `TUN_F_` flags.
pub(super) fn set_offload(fd: impl AsFd, flags: usize) -> Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    unsafe { ioctl(fd, IntegerSetter::<{ TUNSETOFFLOAD }>::new_usize(flags)) }
}

/// Sets how many bytes stand in front of each frame.
pub(super) fn set_header_size(fd: impl AsFd, size: i32) -> Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int`.
    unsafe { ioctl(fd, Setter::<{ TUNSETVNETHDRSZ }, i32>::new(size)) }
}

/// Takes a queue of a multi-queue interface into use, or out of it.
pub(super) fn set_queue(fd: impl AsFd, attached: bool) -> Result<()> {
    let flags = if attached {
        IFF_ATTACH_QUEUE
    } else {
        IFF_DETACH_QUEUE
    };
    let request = InterfaceRequest::new("", flags);
    // SAFETY: TUNSETQUEUE reads one `struct ifreq`, whose size and layout `InterfaceRequest` has.
    unsafe {
        ioctl(
            fd,
            Setter::<{ TUNSETQUEUE }, InterfaceRequest>::new(request),
        )
    }
}
