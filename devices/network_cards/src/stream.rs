//! Frames over a socket of another program: another VM, a switch, or a user-mode network in a process of its own like passt.
//!
//! * [`StreamNet`]: a stream socket. Each frame has its length in front, four bytes in network byte order, as QEMU's
//!   `-netdev stream` and `-netdev socket` have it.
//! * [`DgramNet`]: a datagram socket, one frame in each datagram, as QEMU's `-netdev dgram` has it.
//!
//! Frames are plain Ethernet in both; nothing is left undone.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use crate::backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
use crate::offload::{MAX_FRAME, OffloadHeader, Offloads};

/// The bytes of a frame's length.
const LENGTH: usize = 4;
/// The shortest frame: its header.
const SHORTEST: usize = 14;
/// The kernel takes no more pieces in one call; one of them is ours.
const IOV_MAX: usize = 1023;
/// How much is read at once, in bytes.
const READ_AHEAD: usize = 128 << 10;

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// A path in the file system.
    Unix(PathBuf),
    /// TCP or UDP.
    Inet(SocketAddr),
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Inet(addr) => write!(f, "{addr}"),
        }
    }
}

impl SocketAddress {
    fn socket(&self, kind: SocketType) -> rustix::io::Result<OwnedFd> {
        let family = match self {
            Self::Unix(_) => AddressFamily::UNIX,
            Self::Inet(SocketAddr::V4(_)) => AddressFamily::INET,
            Self::Inet(SocketAddr::V6(_)) => AddressFamily::INET6,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(family, kind, flags, None)
    }

    fn connect(&self, socket: &OwnedFd) -> rustix::io::Result<()> {
        match self {
            Self::Unix(path) => rustix::net::connect(socket, &SocketAddrUnix::new(path)?),
            Self::Inet(addr) => rustix::net::connect(socket, addr),
        }
    }

    /// Binds the socket. A path that a program left behind is taken over, one that is in use is not.
    fn bind(&self, socket: &OwnedFd, kind: SocketType) -> rustix::io::Result<()> {
        match self {
            Self::Unix(path) => {
                let addr = SocketAddrUnix::new(path)?;
                match rustix::net::bind(socket, &addr) {
                    Err(Errno::ADDRINUSE) if self.is_left_behind(kind) => {
                        rustix::fs::unlink(path)?;
                        rustix::net::bind(socket, &addr)
                    }
                    result => result,
                }
            }
            Self::Inet(addr) => {
                rustix::net::sockopt::set_socket_reuseaddr(socket, kind == SocketType::STREAM)?;
                rustix::net::bind(socket, addr)
            }
        }
    }

    fn is_left_behind(&self, kind: SocketType) -> bool {
        self.socket(kind).and_then(|s| self.connect(&s)) == Err(Errno::CONNREFUSED)
    }
}

/// The settings of a link over a stream socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamConfig {
    /// Where the other side is, or where to wait for it.
    pub address: SocketAddress,
    /// Wait for the other side to connect; when it goes, wait for the next one.
    pub server: bool,
    /// Connect again this long after the other side went away or was not there. Without it the link stays down then, and it is an
    /// error if the other side is not there at first.
    pub reconnect: Option<Duration>,
}

/// A link over a stream socket.
#[derive(Debug)]
pub struct StreamNet {
    config: StreamConfig,
    up: Arc<AtomicBool>,
    queue: Mutex<Option<Box<StreamQueue>>>,
}

impl StreamNet {
    /// Connects, or starts to wait for a connection.
    ///
    /// # Errors
    ///
    /// Nobody is there, or the address can't be used.
    pub fn new(config: StreamConfig) -> Result<Self, NetError> {
        let up = Arc::new(AtomicBool::new(false));
        let queue = StreamQueue::new(config.clone(), up.clone())?;
        Ok(Self {
            config,
            up,
            queue: Mutex::new(Some(Box::new(queue))),
        })
    }

    /// Where it listens: tells what port 0 became.
    pub fn local_address(&self) -> Option<SocketAddr> {
        let queue = self.queue.lock();
        let socket = queue.as_ref()?.listener.as_ref()?;
        SocketAddr::try_from(rustix::net::getsockname(socket).ok()?).ok()
    }
}

/// The parts of [`NetBackend`] that links without offloads and with one queue share.
macro_rules! plain_link {
    () => {
        fn max_queue_pairs(&self) -> u16 {
            1
        }

        fn transmit_offloads(&self) -> Offloads {
            Offloads::empty()
        }

        fn receive_offloads(&self) -> Offloads {
            Offloads::empty()
        }

        fn set_offloads(&self, _accepted: Offloads) -> Result<(), NetError> {
            Ok(())
        }

        fn take_queues(&self, pairs: u16) -> Result<Vec<Box<dyn NetQueue>>, NetError> {
            self.set_active_queues(pairs)?;
            match self.queue.lock().take() {
                Some(queue) => Ok(vec![queue]),
                None => Err(NetError::QueuesTaken(self.describe())),
            }
        }

        fn set_active_queues(&self, pairs: u16) -> Result<(), NetError> {
            if pairs == 1 {
                return Ok(());
            }
            Err(NetError::QueueCount {
                link: self.describe(),
                asked: pairs,
                max: 1,
            })
        }
    };
}

impl NetBackend for StreamNet {
    fn describe(&self) -> String {
        let role = if self.config.server { ",server=on" } else { "" };
        format!("stream,address={}{role}", self.config.address)
    }

    plain_link!();

    fn link(&self) -> LinkState {
        if self.up.load(Ordering::Acquire) {
            LinkState::Up
        } else {
            LinkState::Down
        }
    }
}

/// What a readiness is about.
mod token {
    pub(super) const PEER: u64 = 0;
    pub(super) const LISTENER: u64 = 1;
    pub(super) const TIMER: u64 = 2;
}

#[derive(Debug)]
struct StreamQueue {
    config: StreamConfig,
    up: Arc<AtomicBool>,
    epoll: OwnedFd,
    listener: Option<OwnedFd>,
    timer: Option<OwnedFd>,
    peer: Option<Peer>,
}

/// A connection.
#[derive(Debug)]
struct Peer {
    socket: OwnedFd,
    connecting: bool,
    readable: bool,
    /// The rest of a frame that the socket took in part.
    unsent: Vec<u8>,
    /// Bytes that were read, from `at` on.
    received: Vec<u8>,
    at: usize,
}

impl StreamQueue {
    fn new(config: StreamConfig, up: Arc<AtomicBool>) -> Result<Self, NetError> {
        let address = &config.address;
        let failed = |e: Errno| NetError::os(format!("can't set up the network at {address}"), e);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let mut queue = Self {
            config: config.clone(),
            up,
            epoll,
            listener: None,
            timer: None,
            peer: None,
        };
        if config.server {
            let failed = |e| NetError::os(format!("can't listen for the network at {address}"), e);
            let socket = address.socket(SocketType::STREAM).map_err(failed)?;
            address.bind(&socket, SocketType::STREAM).map_err(failed)?;
            rustix::net::listen(&socket, 1).map_err(failed)?;
            queue
                .watch(&socket, token::LISTENER, EventFlags::IN)
                .map_err(failed)?;
            queue.listener = Some(socket);
            return Ok(queue);
        }
        if config.reconnect.is_some() {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(failed)?;
            queue
                .watch(&timer, token::TIMER, EventFlags::IN)
                .map_err(failed)?;
            queue.timer = Some(timer);
        }
        match queue.connect() {
            Err(_) if config.reconnect.is_some() => queue.try_later(),
            Err(e) => {
                return Err(NetError::os(
                    format!("can't connect the network to {address}"),
                    e,
                ));
            }
            Ok(()) => {}
        }
        Ok(queue)
    }

    fn watch(&self, fd: impl AsFd, token: u64, events: EventFlags) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), events)
    }

    fn connect(&mut self) -> rustix::io::Result<()> {
        let socket = self.config.address.socket(SocketType::STREAM)?;
        match self.config.address.connect(&socket) {
            Ok(()) => self.adopt(socket, false),
            Err(Errno::INPROGRESS) => self.adopt(socket, true),
            Err(error) => Err(error),
        }
    }

    /// Takes a connection over, which may still be on its way.
    fn adopt(&mut self, socket: OwnedFd, connecting: bool) -> rustix::io::Result<()> {
        // Only TCP has the option.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        self.watch(&socket, token::PEER, edges)?;
        self.peer = Some(Peer {
            socket,
            connecting,
            readable: true,
            unsent: Vec::new(),
            received: Vec::new(),
            at: 0,
        });
        self.up.store(!connecting, Ordering::Release);
        Ok(())
    }

    /// The other side is gone.
    fn lost(&mut self) {
        self.peer = None;
        self.up.store(false, Ordering::Release);
        self.try_later();
        if self.listener.is_some() {
            // Somebody may wait for the place.
            self.accept();
        }
    }

    fn try_later(&mut self) {
        let (Some(timer), Some(wait)) = (&self.timer, self.config.reconnect) else {
            return;
        };
        let wait = wait.max(Duration::from_millis(10));
        let spec = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        // A timer and a time in range: can't fail.
        let _ = timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec);
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        if self.peer.is_some() {
            return;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Ok(socket) = rustix::net::accept_with(listener, flags) {
            // If it can't be waited for, the next one may.
            let _ = self.adopt(socket, false);
        }
        self.listen(self.peer.is_none());
    }

    /// While there is a peer the others stay in the kernel's queue, and must not keep the descriptor ready.
    fn listen(&self, on: bool) {
        if let Some(listener) = &self.listener {
            let events = if on {
                EventFlags::IN
            } else {
                EventFlags::empty()
            };
            let data = epoll::EventData::new_u64(token::LISTENER);
            // The listener is registered, so this can't fail.
            let _ = epoll::modify(&self.epoll, listener, data, events);
        }
    }

    fn on_peer(&mut self, events: EventFlags) {
        let Some(peer) = &mut self.peer else { return };
        peer.readable = true;
        if peer.connecting && events.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP)
        {
            match rustix::net::sockopt::socket_error(&peer.socket) {
                Ok(Ok(())) => {
                    peer.connecting = false;
                    self.up.store(true, Ordering::Release);
                }
                _ => return self.lost(),
            }
        }
        if peer.flush().is_err() {
            self.lost();
        }
    }
}

impl Peer {
    /// Sends what is left of the last frame. Answers whether nothing is left.
    fn flush(&mut self) -> rustix::io::Result<bool> {
        while !self.unsent.is_empty() && !self.connecting {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.socket, &self.unsent, flags) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Sends a frame, whose rest is kept if the socket takes a part. `false`: not now.
    fn send(&mut self, frame: &[IoSlice<'_>], len: usize) -> rustix::io::Result<bool> {
        if !self.flush()? {
            return Ok(false);
        }
        let length = (len as u32).to_be_bytes();
        let mut parts: smallvec::SmallVec<[IoSlice<'_>; 24]> = smallvec::SmallVec::new();
        parts.push(IoSlice::new(&length));
        parts.extend(frame.iter().map(|part| IoSlice::new(part)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut control = SendAncillaryBuffer::default();
        let mut sent = loop {
            match rustix::net::sendmsg(&self.socket, &parts, &mut control, flags) {
                Ok(n) => break n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error),
            }
        };
        for part in &parts {
            let skip = sent.min(part.len());
            self.unsent.extend_from_slice(&part[skip..]);
            sent -= skip;
        }
        Ok(true)
    }

    /// The next whole frame, reading more if there is none. `None`: not now. An error: the other side is gone, or talks nonsense.
    fn next(&mut self) -> io::Result<Option<std::ops::Range<usize>>> {
        loop {
            let waiting = &self.received[self.at..];
            if let Some(length) = waiting.first_chunk::<LENGTH>() {
                let len = u32::from_be_bytes(*length) as usize;
                if len > MAX_FRAME {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                if waiting.len() >= LENGTH + len {
                    let start = self.at + LENGTH;
                    self.at = start + len;
                    return Ok(Some(start..start + len));
                }
            }
            if !self.readable || self.connecting {
                return Ok(None);
            }
            self.received.drain(..self.at);
            self.at = 0;
            self.received.reserve(READ_AHEAD);
            let spare = rustix::buffer::spare_capacity(&mut self.received);
            match rustix::net::recv(&self.socket, spare, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.readable = false,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Copies a frame to the guest's buffers. `None`: it is too long for them, or too short to be one.
fn deliver(bytes: &[u8], buffers: &mut [IoSliceMut<'_>]) -> Option<(OffloadHeader, usize)> {
    let room: usize = buffers.iter().map(|b| b.len()).sum();
    if !(SHORTEST..=room).contains(&bytes.len()) {
        return None;
    }
    let mut rest = bytes;
    for buffer in buffers {
        let (now, later) = rest.split_at(rest.len().min(buffer.len()));
        buffer[..now.len()].copy_from_slice(now);
        rest = later;
    }
    Some((OffloadHeader::default(), bytes.len()))
}

impl NetQueue for StreamQueue {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn interest(&self, _has_room: bool) -> Interest {
        // The peer's socket reports edges.
        Interest {
            readable: true,
            writable: false,
        }
    }

    fn process(&mut self) -> Result<(), NetError> {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 4];
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let events = match epoll::wait(&self.epoll, &mut events, Some(&no_wait)) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(e) => return Err(NetError::os("can't wait for a socket", e)),
        };
        for event in events {
            match event.data.u64() {
                token::LISTENER => self.accept(),
                token::TIMER => {
                    if let Some(timer) = &self.timer {
                        let _ = rustix::io::read(timer, &mut [0u8; 8]);
                    }
                    if self.peer.is_none() && self.connect().is_err() {
                        self.try_later();
                    }
                }
                _ => self.on_peer(event.flags),
            }
        }
        Ok(())
    }

    fn transmit(
        &mut self,
        _header: &OffloadHeader,
        frame: &[IoSlice<'_>],
    ) -> Result<Transmit, NetError> {
        let len: usize = frame.iter().map(|part| part.len()).sum();
        let sane = (SHORTEST..=MAX_FRAME).contains(&len) && frame.len() <= IOV_MAX;
        let peer = match &mut self.peer {
            Some(peer) if sane && !peer.connecting => peer,
            // A link that is down loses frames.
            _ => return Ok(Transmit::Accepted),
        };
        match peer.send(frame, len) {
            Ok(true) => Ok(Transmit::Accepted),
            Ok(false) => Ok(Transmit::WouldBlock),
            Err(_) => {
                self.lost();
                Ok(Transmit::Accepted)
            }
        }
    }

    fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(OffloadHeader, usize)>, NetError> {
        while let Some(peer) = &mut self.peer {
            match peer.next() {
                Ok(Some(range)) => {
                    let frame = deliver(&peer.received[range], buffers);
                    if frame.is_some() {
                        return Ok(frame);
                    }
                }
                Ok(None) => return Ok(None),
                Err(_) => self.lost(),
            }
        }
        Ok(None)
    }
}

/// The settings of a link over a datagram socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DgramConfig {
    /// Where frames come in.
    pub local: SocketAddress,
    /// Where frames go.
    pub remote: SocketAddress,
}

/// A link over a datagram socket.
#[derive(Debug)]
pub struct DgramNet {
    config: DgramConfig,
    queue: Mutex<Option<Box<DgramQueue>>>,
}

impl DgramNet {
    /// Opens the socket. The other side need not be there yet.
    ///
    /// # Errors
    ///
    /// The local address can't be used.
    pub fn new(config: DgramConfig) -> Result<Self, NetError> {
        let failed = |e| NetError::os(format!("can't open the network at {}", config.local), e);
        let socket = config.local.socket(SocketType::DGRAM).map_err(failed)?;
        config
            .local
            .bind(&socket, SocketType::DGRAM)
            .map_err(failed)?;
        let queue = DgramQueue {
            socket,
            remote: config.remote.clone(),
            blocked: false,
            buffer: vec![0; MAX_FRAME + 1],
        };
        Ok(Self {
            config,
            queue: Mutex::new(Some(Box::new(queue))),
        })
    }
}

impl NetBackend for DgramNet {
    fn describe(&self) -> String {
        format!(
            "dgram,local={},remote={}",
            self.config.local, self.config.remote
        )
    }

    plain_link!();

    fn link(&self) -> LinkState {
        LinkState::Up
    }
}

#[derive(Debug)]
struct DgramQueue {
    socket: OwnedFd,
    remote: SocketAddress,
    blocked: bool,
    buffer: Vec<u8>,
}

impl NetQueue for DgramQueue {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
        _header: &OffloadHeader,
        frame: &[IoSlice<'_>],
    ) -> Result<Transmit, NetError> {
        self.blocked = false;
        let len: usize = frame.iter().map(|part| part.len()).sum();
        if !(SHORTEST..=MAX_FRAME).contains(&len) || frame.len() > IOV_MAX {
            return Ok(Transmit::Accepted);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut control = SendAncillaryBuffer::default();
        let sent = match &self.remote {
            SocketAddress::Inet(addr) => {
                rustix::net::sendmsg_addr(&self.socket, addr, frame, &mut control, flags)
            }
            SocketAddress::Unix(path) => SocketAddrUnix::new(path).and_then(|addr| {
                rustix::net::sendmsg_addr(&self.socket, &addr, frame, &mut control, flags)
            }),
        };
        // The socket of a Unix peer that is slow is "writable" all the time, so waiting for it would be a busy loop:
        // its frames are lost, as on a switch. The same goes for a peer that isn't there.
        let wait = sent == Err(Errno::AGAIN) && matches!(self.remote, SocketAddress::Inet(_));
        self.blocked = wait;
        Ok(if wait {
            Transmit::WouldBlock
        } else {
            Transmit::Accepted
        })
    }

    fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(OffloadHeader, usize)>, NetError> {
        loop {
            match rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((len, _)) => {
                    let frame = self
                        .buffer
                        .get(..len)
                        .and_then(|bytes| deliver(bytes, buffers));
                    if frame.is_some() {
                        return Ok(frame);
                    }
                }
                Err(Errno::AGAIN) => return Ok(None),
                // A refusal of something that was sent.
                Err(Errno::INTR | Errno::CONNREFUSED) => {}
                Err(e) => {
                    return Err(NetError::os(
                        format!("can't read frames from {}", self.remote),
                        e,
                    ));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn take(net: &dyn NetBackend) -> Box<dyn NetQueue> {
        net.take_queues(1).unwrap().remove(0)
    }

    fn wait(queue: &mut dyn NetQueue) {
        let interest = queue.interest(true);
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, interest.readable);
        flags.set(PollFlags::OUT, interest.writable);
        let limit = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::from_borrowed_fd(queue.poll_fd(), flags)];
        assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "nothing happens");
        queue.process().unwrap();
    }

    fn receive(queue: &mut dyn NetQueue) -> Vec<u8> {
        let mut buffer = vec![0; MAX_FRAME];
        loop {
            let (a, b) = buffer.split_at_mut(100);
            let mut buffers = [IoSliceMut::new(a), IoSliceMut::new(b)];
            if let Some((_, len)) = queue.receive(&mut buffers).unwrap() {
                buffer.truncate(len);
                return buffer;
            }
            wait(queue);
        }
    }

    fn send(queue: &mut dyn NetQueue, frame: &[u8]) -> Transmit {
        let (a, b) = frame.split_at(frame.len() / 3);
        queue
            .transmit(
                &OffloadHeader::default(),
                &[IoSlice::new(a), IoSlice::new(b)],
            )
            .unwrap()
    }

    fn frame(len: usize, salt: u8) -> Vec<u8> {
        (0..len)
            .map(|n| (n as u8).wrapping_mul(31) ^ salt)
            .collect()
    }

    fn stream(
        address: &SocketAddress,
        server: bool,
        reconnect: Option<u64>,
    ) -> Result<StreamNet, NetError> {
        let reconnect = reconnect.map(Duration::from_millis);
        StreamNet::new(StreamConfig {
            address: address.clone(),
            server,
            reconnect,
        })
    }

    #[test]
    fn frames_pass_over_a_stream_and_a_full_one_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let address = SocketAddress::Unix(dir.path().join("net"));
        let server = stream(&address, true, None).unwrap();
        assert_eq!(server.link(), LinkState::Down);
        let client = stream(&address, false, None).unwrap();
        assert_eq!(client.link(), LinkState::Up);
        let (mut a, mut b) = (take(&server), take(&client));
        wait(&mut *a);
        assert_eq!(server.link(), LinkState::Up);
        let mut sent = Vec::new();
        for n in 0..1000 {
            let frame = frame(14 + n * 13 % 9000, n as u8);
            if send(&mut *b, &frame) == Transmit::WouldBlock {
                break;
            }
            sent.push(frame);
        }
        assert!((10..1000).contains(&sent.len()), "it never was full");
        for frame in &sent {
            assert!(receive(&mut *a) == *frame);
        }
        wait(&mut *b);
        assert_eq!(send(&mut *b, &frame(60, 1)), Transmit::Accepted);
        assert_eq!(send(&mut *a, &frame(1514, 2)), Transmit::Accepted);
        assert_eq!(
            (receive(&mut *a), receive(&mut *b)),
            (frame(60, 1), frame(1514, 2))
        );
    }

    #[test]
    fn a_server_serves_the_next_one_and_a_client_comes_back() {
        let address = SocketAddress::Inet("127.0.0.1:0".parse().unwrap());
        let server = stream(&address, true, None).unwrap();
        let address = SocketAddress::Inet(server.local_address().unwrap());
        let mut a = take(&server);
        for n in 0..3 {
            let client = stream(&address, false, Some(10)).unwrap();
            let mut b = take(&client);
            while server.link() == LinkState::Down || client.link() == LinkState::Down {
                wait(if server.link() == LinkState::Down {
                    &mut *a
                } else {
                    &mut *b
                });
            }
            let _ = send(&mut *b, &frame(100, n));
            assert_eq!(receive(&mut *a), frame(100, n));
            drop((b, client));
            while server.link() == LinkState::Up {
                wait(&mut *a);
                assert!(
                    a.receive(&mut [IoSliceMut::new(&mut [0; 2000])])
                        .unwrap()
                        .is_none()
                );
            }
        }
        drop((a, server));
        let client = stream(&address, false, Some(10)).unwrap();
        assert_eq!(client.link(), LinkState::Down);
        let mut b = take(&client);
        assert_eq!(send(&mut *b, &frame(100, 0)), Transmit::Accepted);
        let server = stream(&address, true, None).unwrap();
        let mut a = take(&server);
        while client.link() == LinkState::Down {
            wait(&mut *b);
        }
        wait(&mut *a);
        let _ = send(&mut *b, &frame(100, 9));
        assert_eq!(receive(&mut *a), frame(100, 9));
    }

    #[test]
    fn nobody_there_and_an_address_in_use_are_told_in_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net");
        let address = SocketAddress::Unix(path.clone());
        let error = stream(&address, false, None).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("can't connect the network to {}", path.display())
        );
        let first = stream(&address, true, None).unwrap();
        let error = stream(&address, true, None).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("can't listen for the network at {}", path.display())
        );
        // Left behind by a program that is gone.
        drop(first);
        assert!(path.exists() && stream(&address, true, None).is_ok());
    }

    #[test]
    fn nonsense_ends_the_connection_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net");
        let server = stream(&SocketAddress::Unix(path.clone()), true, None).unwrap();
        let mut a = take(&server);
        for bytes in [
            &[0xff; 100][..],
            &[0, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3],
            &[0, 0, 1],
            &[0, 1, 0, 17, 0],
        ] {
            let mut rogue = std::os::unix::net::UnixStream::connect(&path).unwrap();
            io::Write::write_all(&mut rogue, bytes).unwrap();
            drop(rogue);
            wait(&mut *a);
            assert!(
                a.receive(&mut [IoSliceMut::new(&mut [0; 2000])])
                    .unwrap()
                    .is_none()
            );
            assert_eq!(server.link(), LinkState::Down);
        }
    }

    #[test]
    fn frames_pass_in_datagrams() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| SocketAddress::Unix(dir.path().join(name));
        let open = |a: &SocketAddress, b: &SocketAddress| {
            DgramNet::new(DgramConfig {
                local: a.clone(),
                remote: b.clone(),
            })
            .unwrap()
        };
        let (x, y) = (at("x"), at("y"));
        let first = open(&x, &y);
        let mut a = take(&first);
        // Nobody is there yet.
        assert_eq!(send(&mut *a, &frame(60, 0)), Transmit::Accepted);
        let second = open(&y, &x);
        let mut b = take(&second);
        for len in [14, 60, 1514, 9000, 60_000] {
            assert_eq!(send(&mut *a, &frame(len, 1)), Transmit::Accepted);
            assert_eq!(receive(&mut *b), frame(len, 1));
            assert_eq!(send(&mut *b, &frame(len, 2)), Transmit::Accepted);
            assert_eq!(receive(&mut *a), frame(len, 2));
        }
        assert_eq!(send(&mut *a, &frame(3, 1)), Transmit::Accepted);
    }
}
