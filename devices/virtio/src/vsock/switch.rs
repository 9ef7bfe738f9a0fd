//! The device's thread: packets of the guest's, sockets of the host's, and who belongs to whom.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::connection::{BUFFER, Connection, Fate, State};
use super::packet::Header;
use super::spec::{HEADER, HOST_CID, TYPE_STREAM, op, queue};
use crate::device::ActiveQueue;
use crate::doorbell;
use crate::queue::{Chain, QueueError};
use crate::worker::{Service, WaitSet};

/// Connections at most.
const MAX_CONNECTIONS: usize = 1000;
/// Programs on the host that have connected and not yet said where to.
const MAX_GREETINGS: usize = 32;
/// The longest `CONNECT` line.
const MAX_LINE: usize = 32;
/// Packets without data that wait for the guest at most; while there are more, packets from it wait.
const MAX_REPLIES: usize = 1024;
/// Packets of one kind before others have their turn.
const TURN: usize = 64;
/// The most data in one packet to the guest, in bytes.
const MAX_DATA: usize = 64 << 10;
/// The first port number of connections from the host.
const FIRST_HOST_PORT: u32 = 1 << 30;

const LISTENER: u64 = 3;
/// Tokens of greetings are this plus their place.
const GREETING: u64 = 1 << 32;
/// Tokens of connections are this plus their number.
const CONNECTION: u64 = 1 << 33;

/// A program on the host that has connected: it says `CONNECT port`.
struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

/// A connection's ports, the host's first.
type Ports = (u32, u32);

pub(super) struct Switch {
    // Configuration.
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    // Runtime.
    receive: Option<ActiveQueue>,
    transmit: Option<ActiveQueue>,
    event: Option<ActiveQueue>,
    greetings: Vec<Greeting>,
    connections: HashMap<u64, Connection>,
    numbers: HashMap<Ports, u64>,
    next_number: u64,
    next_port: u32,
    /// Packets without data for the guest.
    replies: VecDeque<Header>,
    /// Connections whose socket may be read.
    readable: VecDeque<u64>,
    /// The guest has no receive buffers.
    starved: bool,
    again: bool,
    space: Vec<u8>,
}

impl Switch {
    pub(super) fn new(guest_cid: u64, path: PathBuf, listener: UnixListener) -> Self {
        Self {
            guest_cid,
            path,
            listener,
            receive: None,
            transmit: None,
            event: None,
            greetings: Vec::new(),
            connections: HashMap::new(),
            numbers: HashMap::new(),
            next_number: 0,
            next_port: FIRST_HOST_PORT,
            replies: VecDeque::new(),
            readable: VecDeque::new(),
            starved: false,
            again: false,
            space: vec![0; MAX_DATA],
        }
    }

    pub(super) fn start(&mut self, active: ActiveQueue) {
        match active.queue.index() {
            queue::RECEIVE => self.receive = Some(active),
            queue::TRANSMIT => self.transmit = Some(active),
            _ => self.event = Some(active),
        }
        self.starved = false;
        self.again = true;
    }

    pub(super) fn stop(&mut self, index: u16) {
        match index {
            queue::RECEIVE => self.receive = None,
            queue::TRANSMIT => self.transmit = None,
            _ => self.event = None,
        }
    }

    /// The guest has forgotten all connections, and so do we.
    pub(super) fn reset(&mut self) {
        (self.receive, self.transmit, self.event) = (None, None, None);
        self.connections.clear();
        self.numbers.clear();
        self.replies.clear();
        self.readable.clear();
    }

    fn is_active(&self) -> bool {
        self.receive.is_some() && self.transmit.is_some()
    }

    // From the guest.

    fn serve_transmit(&mut self) {
        for _ in 0..TURN {
            if self.replies.len() >= MAX_REPLIES {
                break;
            }
            let Some(active) = &mut self.transmit else {
                return;
            };
            let Some(chain) = active.queue.pop() else {
                active.queue.commit();
                if active.queue.enable_doorbell() {
                    continue;
                }
                return;
            };
            match parse(&chain) {
                Ok(header) => {
                    let data = chain.readable.part(HEADER, header.len as usize);
                    let token = chain.token;
                    self.packet(&header, || data.to_vec(BUFFER as usize));
                    if let Some(active) = &mut self.transmit {
                        active.queue.push(token, 0);
                    }
                }
                Err(what) => active.queue.fail(QueueError::Request(what)),
            }
        }
        if let Some(active) = &mut self.transmit {
            active.queue.commit();
            // With too many replies waiting, the guest's receive buffers bring us back.
            self.again |= self.replies.len() < MAX_REPLIES;
        }
    }

    /// A packet of the guest's; `fetch` copies its data.
    fn packet(&mut self, header: &Header, fetch: impl FnOnce() -> Vec<u8>) {
        let ours = header.dst_cid == HOST_CID && header.src_cid == self.guest_cid;
        // What is for, or from, somebody else gets lost.
        if !ours {
            return;
        }
        if header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        if header.op == op::REQUEST {
            return self.request(header);
        }
        let ports = (header.dst_port, header.src_port);
        let number = self.numbers.get(&ports).copied();
        let Some((number, connection)) =
            number.and_then(|n| Some((n, self.connections.get_mut(&n)?)))
        else {
            return self.refuse(header);
        };
        if header.op == op::RST {
            self.remove(number);
            return;
        }
        connection.update_credit(header);
        let fate = match header.op {
            unexpected if !connection.expects(unexpected) => Fate::Reset,
            op::RESPONSE => connection.accepted(),
            op::RW if header.len > BUFFER => Fate::Reset,
            op::RW => connection.take_data(&fetch()),
            op::SHUTDOWN => connection.guest_shutdown(header.flags),
            op::CREDIT_UPDATE => Fate::Lives,
            op::CREDIT_REQUEST => {
                let reply = connection.header(self.guest_cid, op::CREDIT_UPDATE);
                self.replies.push_back(reply);
                Fate::Lives
            }
            _ => Fate::Reset,
        };
        self.settle(number, fate);
    }

    /// Ends a connection that is over, and tells the guest of room that it has got back.
    fn settle(&mut self, number: u64, fate: Fate) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if fate == Fate::Reset {
            let reply = connection.header(self.guest_cid, op::RST);
            self.replies.push_back(reply);
            self.remove(number);
        } else if connection.owes_credit() {
            let reply = connection.header(self.guest_cid, op::CREDIT_UPDATE);
            self.replies.push_back(reply);
        }
    }

    /// Answers a packet that belongs to nothing. An RST is not answered.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.replies.push_back(header.reset_for());
        }
    }

    fn remove(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            self.numbers
                .remove(&(connection.host_port, connection.guest_port));
        }
    }

    fn insert(&mut self, connection: Connection) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.numbers
            .insert((connection.host_port, connection.guest_port), number);
        self.connections.insert(number, connection);
        number
    }

    /// The guest wants to connect to a port of the host: to the socket with that number behind its name.
    fn request(&mut self, header: &Header) {
        let ports = (header.dst_port, header.src_port);
        if self.numbers.contains_key(&ports) || self.connections.len() >= MAX_CONNECTIONS {
            return self.refuse(header);
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", header.dst_port));
        let Ok(stream) = connect_to(PathBuf::from(path)) else {
            return self.refuse(header);
        };
        let mut connection = Connection::new(stream, ports.0, ports.1, State::Open);
        connection.update_credit(header);
        let reply = connection.header(self.guest_cid, op::RESPONSE);
        self.insert(connection);
        self.replies.push_back(reply);
    }

    // To the guest.

    fn serve_receive(&mut self) {
        for _ in 0..TURN {
            if self.replies.is_empty() && self.readable.is_empty() {
                break;
            }
            let Some(active) = &mut self.receive else {
                return;
            };
            let Some(chain) = active.queue.pop() else {
                active.queue.commit();
                if active.queue.enable_doorbell() {
                    continue;
                }
                self.starved = true;
                return;
            };
            self.starved = false;
            if chain.writable.len() <= HEADER {
                let what = "a receive buffer that is too small for a packet";
                active.queue.fail(QueueError::Request(what));
                return;
            }
            if let Some(reply) = self.replies.pop_front() {
                chain.writable.write_at(0, &reply.encode());
                active.queue.push(chain.token, HEADER as u32);
                // There may be room for what the guest wants to say again.
                self.again |= self.replies.len() + 1 == MAX_REPLIES;
            } else {
                self.give_data(chain);
            }
        }
        if let Some(active) = &mut self.receive {
            active.queue.commit();
        }
        self.again |= !self.replies.is_empty() || !self.readable.is_empty();
    }

    /// Fills a buffer from the next readable socket, or puts it back.
    fn give_data(&mut self, chain: Chain) {
        let Some(active) = &mut self.receive else {
            return;
        };
        let queue = &mut active.queue;
        while let Some(number) = self.readable.pop_front() {
            let Some(connection) = self.connections.get_mut(&number) else {
                continue;
            };
            connection.queued = false;
            if !connection.can_read() {
                continue;
            }
            let most = self.space.len().min(chain.writable.len() - HEADER);
            match connection.read(&mut self.space[..most]) {
                Ok(Some(0)) => {}
                Ok(Some(n)) => {
                    let mut header = connection.header(self.guest_cid, op::RW);
                    header.len = n as u32;
                    chain.writable.write_at(0, &header.encode());
                    chain.writable.write_at(HEADER, &self.space[..n]);
                    queue.push(chain.token, (HEADER + n) as u32);
                    return;
                }
                end => {
                    let gone = end.is_err() || has_left(&connection.stream);
                    let flags = connection.host_ended(gone);
                    let mut header = connection.header(self.guest_cid, op::SHUTDOWN);
                    header.flags = flags;
                    chain.writable.write_at(0, &header.encode());
                    queue.push(chain.token, HEADER as u32);
                    return;
                }
            }
        }
        queue.unpop(chain);
    }

    // From the host.

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.greetings.len() >= MAX_GREETINGS {
                // Who has said nothing for longest makes room.
                self.greetings.remove(0);
            }
            self.greetings.push(Greeting {
                stream,
                line: Vec::new(),
            });
        }
    }

    /// Reads more of the line of a program that has connected.
    fn greet(&mut self, at: usize) {
        let Some(greeting) = self.greetings.get_mut(at) else {
            return;
        };
        let port = match read_line(greeting) {
            Line::Unfinished => return,
            Line::Port(port) => Some(port),
            Line::Bad => None,
        };
        let greeting = self.greetings.swap_remove(at);
        let Some(port) = port.filter(|_| self.connections.len() < MAX_CONNECTIONS) else {
            return;
        };
        while self.numbers.contains_key(&(self.next_port, port)) {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_HOST_PORT);
        }
        let host_port = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(FIRST_HOST_PORT);
        let mut connection = Connection::new(greeting.stream, host_port, port, State::Asked);
        let request = connection.header(self.guest_cid, op::REQUEST);
        self.insert(connection);
        self.replies.push_back(request);
    }

    fn socket_ready(&mut self, number: u64, events: PollFlags) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        let gone = PollFlags::HUP | PollFlags::ERR;
        if connection.state == State::Asked {
            if events.intersects(gone) {
                self.settle(number, Fate::Reset);
            }
            return;
        }
        let mut fate = Fate::Lives;
        if events.intersects(PollFlags::OUT | PollFlags::ERR | PollFlags::HUP) {
            fate = connection.flush();
        }
        if connection.can_read()
            && events.intersects(PollFlags::IN | gone)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.readable.push_back(number);
        }
        self.settle(number, fate);
    }
}

/// Whether the program on the other end has closed its socket and not only shut down its sending side.
fn has_left(stream: &UnixStream) -> bool {
    let mut fds = [rustix::event::PollFd::new(stream, PollFlags::empty())];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let polled = rustix::event::poll(&mut fds, Some(&now));
    polled.is_err() || fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

fn connect_to(path: PathBuf) -> std::io::Result<UnixStream> {
    // Non-blocking from the start: a listener whose queue is full must not hold up the others.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

enum Line {
    Unfinished,
    Port(u32),
    Bad,
}

/// Reads up to the end of the line and not a byte further: the rest is the connection's data.
fn read_line(greeting: &mut Greeting) -> Line {
    let mut byte = [0];
    loop {
        match greeting.stream.read(&mut byte) {
            Ok(1) if byte == *b"\n" => break,
            Ok(1) if greeting.line.len() < MAX_LINE => greeting.line.push(byte[0]),
            Ok(_) => return Line::Bad,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Line::Unfinished,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Line::Bad,
        }
    }
    let line = String::from_utf8_lossy(&greeting.line);
    let mut words = line.split_ascii_whitespace();
    match (words.next(), words.next().map(str::parse), words.next()) {
        (Some("CONNECT"), Some(Ok(port)), None) => Line::Port(port),
        _ => Line::Bad,
    }
}

/// Reads a packet's header; its data must be there.
fn parse(chain: &Chain) -> Result<Header, &'static str> {
    let bytes = chain
        .readable
        .array_at(0)
        .ok_or("a socket packet without a whole header")?;
    let header = Header::decode(&bytes);
    if header.len as usize > chain.readable.len() - HEADER {
        return Err("a socket packet shorter than it says");
    }
    Ok(header)
}

impl Service for Switch {
    fn wait_for<'a>(&'a self, set: &mut WaitSet<'a>) {
        if self.again {
            set.at_most(Duration::ZERO);
        }
        for (token, active) in [
            (queue::RECEIVE, &self.receive),
            (queue::TRANSMIT, &self.transmit),
            (queue::EVENT, &self.event),
        ] {
            if let Some(active) = active {
                set.add(active.doorbell.as_fd(), PollFlags::IN, u64::from(token));
            }
        }
        if !self.is_active() {
            return;
        }
        set.add(self.listener.as_fd(), PollFlags::IN, LISTENER);
        for (at, greeting) in self.greetings.iter().enumerate() {
            set.add(greeting.stream.as_fd(), PollFlags::IN, GREETING + at as u64);
        }
        let room = !self.starved && self.replies.len() < MAX_REPLIES;
        for (number, connection) in &self.connections {
            let events = connection.interest(room);
            if !events.is_empty() {
                set.add(connection.stream.as_fd(), events, CONNECTION + number);
            }
        }
    }

    fn ready(&mut self, token: u64, events: PollFlags) {
        self.again = true;
        if token >= CONNECTION {
            self.socket_ready(token - CONNECTION, events);
        } else if token == LISTENER {
            self.accept();
        } else if token < LISTENER {
            let active = match token as u16 {
                queue::RECEIVE => {
                    self.starved = false;
                    &self.receive
                }
                queue::TRANSMIT => &self.transmit,
                _ => &self.event,
            };
            if let Some(active) = active {
                doorbell::take(&active.doorbell);
            }
        } else {
            // Places change as greetings end, so all are looked at, from the last.
            for at in (0..self.greetings.len()).rev() {
                self.greet(at);
            }
        }
    }

    fn end_of_batch(&mut self) {
        if std::mem::take(&mut self.again) && self.is_active() {
            self.serve_transmit();
            self.serve_receive();
        }
    }
}
