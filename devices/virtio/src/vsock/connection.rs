//! One stream: a Unix socket on the host's side, credit and shutdown state on the guest's.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;

use super::packet::Header;
use super::spec::{HOST_CID, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};

/// Our room for a connection's data, in bytes.
pub(super) const BUFFER: u32 = 256 << 10;

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The guest has been asked; the program on the host waits for its `OK`.
    Asked,
    /// Data passes.
    Open,
}

/// A connection.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) state: State,
    /// It waits for a receive buffer of the guest's.
    pub(super) queued: bool,
    /// The guest's room, and how much it has taken out of it.
    peer_alloc: u32,
    peer_forwarded: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Bytes of the guest's that the host's socket has taken, and what of that the guest knows.
    forwarded: u32,
    told: u32,
    /// Bytes of the guest's that the host's socket has not taken yet.
    waiting: VecDeque<u8>,
    /// The guest sends no more (and then, the host's program is told when all has reached it).
    guest_done: bool,
    /// The guest receives no more.
    guest_deaf: bool,
    /// The program on the host sends no more, and the guest has been told.
    host_done: bool,
}

/// What is left of a connection after something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Lives,
    /// It is over; the guest is told so.
    Reset,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, host_port: u32, guest_port: u32, state: State) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            state,
            queued: false,
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            forwarded: 0,
            told: 0,
            waiting: VecDeque::new(),
            guest_done: false,
            guest_deaf: false,
            host_done: false,
        }
    }

    /// A packet of this connection's to the guest.
    pub(super) fn header(&mut self, guest_cid: u64, op: u16) -> Header {
        self.told = self.forwarded;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
        }
    }

    /// Takes note of the guest's room, which every packet tells.
    pub(super) fn update_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(in_flight) as usize
    }

    /// Whether data of the host's could go to the guest now.
    pub(super) fn can_read(&self) -> bool {
        self.state == State::Open && !self.host_done && !self.guest_deaf && self.credit() > 0
    }

    /// What to wait for on the socket.
    pub(super) fn interest(&self, guest_has_room: bool) -> PollFlags {
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, guest_has_room && self.can_read());
        events.set(PollFlags::OUT, !self.waiting.is_empty());
        // A program that leaves before the guest has answered.
        events.set(PollFlags::HUP, self.state == State::Asked);
        events
    }

    /// Data of the guest's.
    pub(super) fn take_data(&mut self, data: &[u8]) -> Fate {
        let room = BUFFER as usize - self.waiting.len();
        if self.state != State::Open || self.guest_done || data.len() > room {
            return Fate::Reset;
        }
        let now = if self.waiting.is_empty() {
            match write(&mut self.stream, data) {
                Ok(n) => n,
                Err(()) => return Fate::Reset,
            }
        } else {
            0
        };
        self.forwarded = self.forwarded.wrapping_add(now as u32);
        self.waiting.extend(&data[now..]);
        Fate::Lives
    }

    /// The socket has room: sends what waits.
    pub(super) fn flush(&mut self) -> Fate {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match write(&mut self.stream, front) {
                Ok(0) => return Fate::Lives,
                Ok(n) => {
                    self.waiting.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(()) => return Fate::Reset,
            }
        }
        self.after_shutdown()
    }

    /// Whether the guest should hear of the room that it has got back.
    pub(super) fn owes_credit(&self) -> bool {
        self.state == State::Open && self.forwarded.wrapping_sub(self.told) >= BUFFER / 4
    }

    /// The guest has shut down directions.
    pub(super) fn guest_shutdown(&mut self, flags: u32) -> Fate {
        self.guest_deaf |= flags & SHUTDOWN_RECEIVE != 0;
        self.guest_done |= flags & SHUTDOWN_SEND != 0;
        if self.guest_deaf {
            // The program may have left already.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.after_shutdown()
    }

    /// Passes the end of the guest's data on, once all of it has gone.
    fn after_shutdown(&mut self) -> Fate {
        if !self.guest_done || !self.waiting.is_empty() {
            return Fate::Lives;
        }
        let _ = self.stream.shutdown(Shutdown::Write);
        if self.guest_deaf {
            Fate::Reset
        } else {
            Fate::Lives
        }
    }

    /// Reads data for the guest, as much as it has room for and fits into `space`. `None` at the end of the data;
    /// an error means that the program has gone.
    pub(super) fn read(&mut self, space: &mut [u8]) -> Result<Option<usize>, ()> {
        let most = space.len().min(self.credit());
        loop {
            match self.stream.read(&mut space[..most]) {
                Ok(0) => return Ok(None),
                Ok(n) => {
                    self.sent = self.sent.wrapping_add(n as u32);
                    return Ok(Some(n));
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Some(0)),
                Err(_) => return Err(()),
            }
        }
    }

    /// The host's program sends no more. Returns the flags to tell the guest.
    pub(super) fn host_ended(&mut self, gone: bool) -> u32 {
        self.host_done = true;
        if gone {
            SHUTDOWN_SEND | SHUTDOWN_RECEIVE
        } else {
            SHUTDOWN_SEND
        }
    }

    /// The guest has accepted a connection that the host asked for.
    pub(super) fn accepted(&mut self) -> Fate {
        if self.state != State::Asked {
            return Fate::Reset;
        }
        self.state = State::Open;
        let line = format!("OK {}\n", self.host_port);
        match write(&mut self.stream, line.as_bytes()) {
            Ok(n) if n == line.len() => Fate::Lives,
            _ => Fate::Reset,
        }
    }

    /// True if `op` opens nothing and this connection may get it.
    pub(super) fn expects(&self, op: u16) -> bool {
        match self.state {
            State::Asked => matches!(op, op::RESPONSE | op::RST),
            State::Open => op != op::RESPONSE && op != op::REQUEST,
        }
    }
}

/// Writes what the socket takes now.
fn write(stream: &mut UnixStream, data: &[u8]) -> Result<usize, ()> {
    let mut done = 0;
    while done < data.len() {
        match stream.write(&data[done..]) {
            Ok(0) => return Err(()),
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return Err(()),
        }
    }
    Ok(done)
}
