//! A tap device of the host: the guest's card becomes an interface of the host's kernel.
//!
//! Frames pass with `virtio_net_hdr` in front, so checksums and segmentation are left to whoever needs them done, which
//! on a path between two guests or a guest and the host is nobody. Each queue pair has its own descriptor.

mod ioctls;

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use smallvec::SmallVec;

use crate::backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
use crate::offload::{HEADER_LEN, OffloadHeader, Offloads};
use ioctls::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ};

/// The kernel's own limit (MAX_TAP_QUEUES).
const MAX_QUEUES: u16 = 256;
/// The kernel takes no more pieces in one call; two of them are ours.
const IOV_MAX: usize = 1022;

/// The `TUN_F_` flags of linux/if_tun.h, by what they mean.
const TUN_OFFLOADS: [(Offloads, usize); 7] = [
    (Offloads::CSUM, 0x01),
    (Offloads::TSO4, 0x02),
    (Offloads::TSO6, 0x04),
    (Offloads::ECN, 0x08),
    (Offloads::UFO, 0x10),
    (Offloads::USO4, 0x20),
    (Offloads::USO6, 0x40),
];

/// The settings of a tap device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapConfig {
    /// The interface's name, 1 to 15 bytes. It is made if it doesn't exist and the process may do that, and then goes with the process.
    pub ifname: String,
    /// How many queue pairs, 1 to 256.
    pub queues: u16,
}

/// A tap device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<Arc<OwnedFd>>,
    offloads: Offloads,
    /// How many queues are in use; 0 before they are taken.
    active: Mutex<u16>,
}

impl Tap {
    /// Opens (or makes) an interface.
    ///
    /// # Errors
    ///
    /// No permission, an interface that is no tap device or is in use, a name or a number of queues that is not possible.
    pub fn open(config: &TapConfig) -> Result<Self, NetError> {
        let name = &config.ifname;
        let refuse = |option, value: String, expected: &str| {
            Err(NetError::Config {
                option,
                value,
                expected: expected.into(),
            })
        };
        let bad = |c: char| c == '/' || c.is_whitespace() || c == '\0';
        if name.is_empty() || name.len() >= IFNAMSIZ || name.contains(bad) {
            return refuse(
                "ifname",
                name.clone(),
                "expected an interface's name of 1 to 15 bytes",
            );
        }
        if !(1..=MAX_QUEUES).contains(&config.queues) {
            return refuse("queues", config.queues.to_string(), "expected 1 to 256");
        }
        let exists = interface_exists(name);
        let open = |flags| -> Result<Vec<_>, _> {
            (0..config.queues)
                .map(|_| open_queue(name, flags))
                .collect()
        };
        let plain = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        let opened = if config.queues > 1 {
            open(plain | IFF_MULTI_QUEUE)
        } else {
            // An interface that was made for several queues wants to be told so even for one.
            open(plain).or_else(|first| match first {
                OpenError::Interface(Errno::INVAL) => {
                    open(plain | IFF_MULTI_QUEUE).map_err(|_| first)
                }
                other => Err(other),
            })
        };
        let queues = opened.map_err(|error| error.explain(config, exists))?;
        Self::with_queues(name.clone(), queues)
    }

    /// Takes over descriptors of one interface that somebody else has opened and set up with `IFF_VNET_HDR`, one for each queue pair.
    ///
    /// # Errors
    ///
    /// Descriptors that are no tap device's, or without `IFF_VNET_HDR`.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Result<Self, NetError> {
        let refuse = |value: String, expected: &str| {
            Err(NetError::Config {
                option: "fds",
                value,
                expected: expected.into(),
            })
        };
        let Some(first) = descriptors.first() else {
            return refuse("".into(), "expected at least one descriptor");
        };
        let (name, flags) = ioctls::interface(first).map_err(|e| {
            NetError::os("the descriptor given for the network is no tap device", e)
        })?;
        if flags & (IFF_TAP | IFF_VNET_HDR | IFF_NO_PI) != IFF_TAP | IFF_VNET_HDR | IFF_NO_PI {
            return refuse(
                name,
                "expected a tap device with IFF_VNET_HDR and IFF_NO_PI",
            );
        }
        for fd in &descriptors {
            rustix::io::ioctl_fionbio(fd, true)
                .map_err(|e| NetError::os(format!("can't use tap device {name}"), e))?;
        }
        Self::with_queues(name, descriptors)
    }

    fn with_queues(name: String, queues: Vec<OwnedFd>) -> Result<Self, NetError> {
        for queue in &queues {
            ioctls::set_header_size(queue, HEADER_LEN as i32)
                .map_err(|e| NetError::os(format!("can't set up tap device {name}"), e))?;
        }
        let queues = queues.into_iter().map(Arc::new).collect();
        let mut tap = Self {
            name,
            queues,
            offloads: Offloads::empty(),
            active: Mutex::new(0),
        };
        // Old kernels lack some: take the largest set that this one has.
        let uso = Offloads::USO4 | Offloads::USO6;
        let all = Offloads::all();
        for set in [all, all - uso, all - uso - Offloads::UFO, Offloads::CSUM] {
            if tap.apply(set).is_ok() {
                tap.offloads = set;
                break;
            }
        }
        tap.set_offloads(Offloads::empty())?;
        Ok(tap)
    }

    fn apply(&self, set: Offloads) -> rustix::io::Result<()> {
        let flags = TUN_OFFLOADS
            .iter()
            .filter(|(o, _)| set.contains(*o))
            .map(|(_, f)| f)
            .sum();
        match self.queues.first() {
            // The interface has one setting for all queues.
            Some(queue) => ioctls::set_offload(queue, flags),
            None => Ok(()),
        }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn interface_exists(name: &str) -> bool {
    let any_socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        None,
    );
    any_socket.is_ok_and(|socket| rustix::net::netdevice::name_to_index(socket, name).is_ok())
}

/// Where opening a queue failed.
#[derive(Debug)]
enum OpenError {
    Driver(Errno),
    Interface(Errno),
}

impl OpenError {
    fn explain(self, config: &TapConfig, exists: bool) -> NetError {
        let name = &config.ifname;
        let error = match self {
            Self::Driver(error) => {
                let mut what = String::from("can't open /dev/net/tun");
                if error == Errno::ACCESS {
                    what.push_str(" (tap devices need permission to read and write it)");
                }
                return NetError::os(what, error);
            }
            Self::Interface(error) => error,
        };
        let what = match error {
            Errno::PERM if exists => {
                format!("interface {name} belongs to another user; opening it needs CAP_NET_ADMIN")
            }
            Errno::PERM => format!(
                "there is no interface {name}, and making one needs CAP_NET_ADMIN \
                 (or: ip tuntap add {name} mode tap user USER)"
            ),
            Errno::BUSY => format!("interface {name} is in use by another program"),
            Errno::INVAL if config.queues > 1 => {
                format!("interface {name} is not a tap device that was made with multi_queue")
            }
            Errno::INVAL => format!("interface {name} is not a tap device"),
            _ => format!("can't open interface {name} as a tap device"),
        };
        NetError::os(what, error)
    }
}

fn open_queue(name: &str, flags: u16) -> Result<OwnedFd, OpenError> {
    let mode = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/dev/net/tun", mode, Mode::empty()).map_err(OpenError::Driver)?;
    ioctls::set_interface(&fd, name, flags).map_err(OpenError::Interface)?;
    Ok(fd)
}

impl NetBackend for Tap {
    fn describe(&self) -> String {
        format!("tap,ifname={}", self.name)
    }

    fn max_queue_pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    fn transmit_offloads(&self) -> Offloads {
        self.offloads
    }

    fn receive_offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&self, accepted: Offloads) -> Result<(), NetError> {
        self.apply(accepted.consistent() & self.offloads)
            .map_err(|e| NetError::os(format!("can't set the offloads of {}", self.name), e))
    }

    fn take_queues(&self, pairs: u16) -> Result<Vec<Box<dyn NetQueue>>, NetError> {
        if *self.active.lock() != 0 {
            return Err(NetError::QueuesTaken(self.describe()));
        }
        // Those that the card doesn't use would swallow frames.
        self.activate(self.max_queue_pairs(), pairs)?;
        let queue = |fd: &Arc<OwnedFd>| -> Box<dyn NetQueue> {
            Box::new(TapQueue {
                fd: fd.clone(),
                name: self.name.clone(),
                blocked: false,
                dropped: 0,
            })
        };
        Ok(self.queues.iter().take(pairs.into()).map(queue).collect())
    }

    fn set_active_queues(&self, pairs: u16) -> Result<(), NetError> {
        let before = *self.active.lock();
        self.activate(before, pairs)
    }

    fn link(&self) -> LinkState {
        LinkState::Up
    }
}

impl Tap {
    /// Goes from `before` queues in use to `pairs` of them.
    fn activate(&self, before: u16, pairs: u16) -> Result<(), NetError> {
        let max = self.max_queue_pairs();
        if !(1..=max).contains(&pairs) {
            return Err(NetError::QueueCount {
                link: self.describe(),
                asked: pairs,
                max,
            });
        }
        let changed = usize::from(before.min(pairs))..usize::from(before.max(pairs));
        for queue in self.queues.get(changed).unwrap_or(&[]) {
            ioctls::set_queue(queue, pairs > before)
                .map_err(|e| NetError::os(format!("can't switch a queue of {}", self.name), e))?;
        }
        *self.active.lock() = pairs;
        Ok(())
    }
}

#[derive(Debug)]
struct TapQueue {
    fd: Arc<OwnedFd>,
    name: String,
    /// The last frame was not taken.
    blocked: bool,
    dropped: u64,
}

impl TapQueue {
    /// What an error means: the interface is gone, or a frame is lost.
    fn failed(&mut self, error: Errno) -> Result<(), NetError> {
        match error {
            Errno::BADFD | Errno::BADF | Errno::NODEV | Errno::NXIO => Err(NetError::os(
                format!("interface {} is gone", self.name),
                error,
            )),
            _ => {
                self.dropped += 1;
                Ok(())
            }
        }
    }
}

impl NetQueue for TapQueue {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self, has_room: bool) -> Interest {
        Interest {
            readable: has_room,
            writable: self.blocked,
        }
    }

    fn process(&mut self) -> Result<(), NetError> {
        Ok(())
    }

    fn transmit(
        &mut self,
        header: &OffloadHeader,
        frame: &[IoSlice<'_>],
    ) -> Result<Transmit, NetError> {
        self.blocked = false;
        if frame.len() > IOV_MAX {
            self.dropped += 1;
            return Ok(Transmit::Accepted);
        }
        let bytes = header.encode();
        let mut parts: SmallVec<[IoSlice<'_>; 24]> = SmallVec::new();
        parts.push(IoSlice::new(&bytes));
        parts.extend(frame.iter().map(|part| IoSlice::new(part)));
        loop {
            match rustix::io::writev(&self.fd, &parts) {
                Ok(_) => return Ok(Transmit::Accepted),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.blocked = true;
                    return Ok(Transmit::WouldBlock);
                }
                Err(error) => return self.failed(error).map(|()| Transmit::Accepted),
            }
        }
    }

    fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(OffloadHeader, usize)>, NetError> {
        if buffers.len() > IOV_MAX {
            return Ok(None);
        }
        let room: usize = buffers.iter().map(|b| b.len()).sum();
        loop {
            let (mut header, mut spill) = ([0u8; HEADER_LEN], [0u8; 1]);
            let mut parts: SmallVec<[IoSliceMut<'_>; 24]> = SmallVec::new();
            parts.push(IoSliceMut::new(&mut header));
            parts.extend(buffers.iter_mut().map(|b| IoSliceMut::new(b)));
            // The kernel cuts what doesn't fit without saying so; this byte tells.
            parts.push(IoSliceMut::new(&mut spill));
            let result = rustix::io::readv(&self.fd, &mut parts);
            drop(parts);
            match result {
                Ok(n) if (HEADER_LEN..=HEADER_LEN + room).contains(&n) => {
                    match OffloadHeader::decode(&header) {
                        Ok(header) => return Ok(Some((header, n - HEADER_LEN))),
                        Err(_) => self.dropped += 1,
                    }
                }
                Ok(_) => self.dropped += 1,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return self.failed(error).map(|()| None),
            }
        }
    }
}
