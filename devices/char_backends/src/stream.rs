//! A line to descriptors of the host, served by one thread.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use device_model::{CharBackend, CharEvent, CharFrontend};
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::menu::{HELP, Key, Menu};

/// Most bytes of output that wait for the host.
pub const OUTPUT_ROOM: usize = 64 << 10;
/// Most bytes that are written at a time: as many as a pipe that polls writable takes without blocking.
const PIECE: usize = 4096;

/// Where bytes go to and come from.
pub(crate) struct Link {
    pub(crate) input: Option<OwnedFd>,
    pub(crate) output: OwnedFd,
}

/// Makes a link from a client that has come to a listening socket.
pub(crate) type Accept = Box<dyn FnMut() -> std::io::Result<Link> + Send>;

/// What the thread serves.
pub(crate) struct Setup {
    /// The link at the start, if there is one.
    pub(crate) link: Option<Link>,
    /// A listening socket, and how a client's link is made.
    pub(crate) listener: Option<(OwnedFd, Accept)>,
    /// Called for Ctrl-A X; the line is a terminal's when there is one.
    pub(crate) quit: Option<Box<dyn Fn() + Send>>,
    /// A pseudo-terminal reads as hung up while nobody has it open.
    pub(crate) pty: bool,
}

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// The device holds back more.
    starved: bool,
}

struct Shared {
    frontend: Mutex<Option<Weak<dyn CharFrontend>>>,
    output: Mutex<Output>,
    drained: Condvar,
    open: AtomicBool,
    accepting: AtomicBool,
    ended: AtomicBool,
    wake: OwnedFd,
}

impl Shared {
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn frontend(&self) -> Option<Arc<dyn CharFrontend>> {
        self.frontend.lock().as_ref().and_then(Weak::upgrade)
    }
}

/// A backend on descriptors of the host. Dropping it ends its thread.
pub struct Stream {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Stream {
    pub(crate) fn start(setup: Setup) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            frontend: Mutex::new(None),
            output: Mutex::default(),
            drained: Condvar::new(),
            open: AtomicBool::new(setup.link.is_some()),
            accepting: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        });
        let served = shared.clone();
        let thread = std::thread::Builder::new()
            .name("chardev".into())
            .spawn(move || Server::new(served, setup).serve())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl CharBackend for Stream {
    fn connect(&self, frontend: Weak<dyn CharFrontend>) {
        *self.shared.frontend.lock() = Some(frontend);
        self.shared.accepting.store(true, Ordering::SeqCst);
        self.shared.wake();
    }

    fn write(&self, data: &[u8]) -> usize {
        if !self.is_open() {
            return data.len();
        }
        let mut output = self.shared.output.lock();
        let taken = data.len().min(OUTPUT_ROOM - output.bytes.len());
        let idle = output.bytes.is_empty();
        output.bytes.extend(&data[..taken]);
        output.starved |= taken < data.len();
        drop(output);
        if idle && taken > 0 {
            self.shared.wake();
        }
        taken
    }

    fn accept_input(&self) {
        if !self.shared.accepting.swap(true, Ordering::SeqCst) {
            self.shared.wake();
        }
    }

    fn is_open(&self) -> bool {
        self.shared.open.load(Ordering::SeqCst)
    }

    fn drain(&self, at_most: Duration) {
        let end = Instant::now() + at_most;
        let mut output = self.shared.output.lock();
        while !output.bytes.is_empty() && self.is_open() {
            if self.shared.drained.wait_until(&mut output, end).timed_out() {
                return;
            }
        }
    }
}

/// The thread's own.
struct Server {
    shared: Arc<Shared>,
    setup: Setup,
    menu: Menu,
    /// Input that the device has not taken yet.
    pending: VecDeque<u8>,
    /// The input has ended; output goes on.
    input_ended: bool,
}

/// What the descriptors are ready for.
#[derive(Default)]
struct Ready {
    listener: bool,
    input: bool,
    output: bool,
    hung_up: bool,
}

impl Server {
    fn new(shared: Arc<Shared>, setup: Setup) -> Self {
        Self {
            shared,
            setup,
            menu: Menu::default(),
            pending: VecDeque::new(),
            input_ended: false,
        }
    }

    fn serve(mut self) {
        loop {
            self.offer();
            let ready = self.wait();
            if self.shared.ended.load(Ordering::SeqCst) {
                self.write_out();
                return;
            }
            if ready.listener {
                self.accept();
            }
            if ready.output {
                self.write_out();
            }
            if ready.input {
                self.read_in();
            } else if ready.hung_up {
                self.close();
            }
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Ready {
        let shared = &self.shared;
        let has_output = !shared.output.lock().bytes.is_empty();
        let wants_input = self.pending.is_empty() && !self.input_ended;
        // A pseudo-terminal without a user polls as hung up for ever: look again after a while.
        let away = self.setup.pty && !shared.open.load(Ordering::SeqCst);
        let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
        let (mut listener, mut input, mut output) = (None, None, None);
        match (&self.setup.link, &self.setup.listener) {
            (None, Some((fd, _))) => {
                listener = Some(fds.len());
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
            (Some(link), _) if !away => {
                if let Some(fd) = link.input.as_ref().filter(|_| wants_input) {
                    input = Some(fds.len());
                    fds.push(PollFd::new(fd, PollFlags::IN));
                }
                if has_output {
                    output = Some(fds.len());
                    fds.push(PollFd::new(&link.output, PollFlags::OUT));
                }
            }
            _ => {}
        }
        let second = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        match poll(&mut fds, away.then_some(&second)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return Ready::default(),
        }
        let events = |at: Option<usize>| at.map_or(PollFlags::empty(), |at| fds[at].revents());
        let broken = PollFlags::HUP | PollFlags::ERR;
        let ready = Ready {
            listener: !events(listener).is_empty(),
            input: events(input).intersects(PollFlags::IN) || away,
            output: events(output).intersects(PollFlags::OUT),
            hung_up: events(input).union(events(output)).intersects(broken),
        };
        if !fds[0].revents().is_empty() {
            let mut count = [0; 8];
            let _ = rustix::io::read(&shared.wake, &mut count);
        }
        ready
    }

    fn accept(&mut self) {
        let Some((_, accept)) = &mut self.setup.listener else {
            return;
        };
        if let Ok(link) = accept() {
            self.setup.link = Some(link);
            self.input_ended = false;
            self.opened();
        }
    }

    fn opened(&self) {
        if !self.shared.open.swap(true, Ordering::SeqCst)
            && let Some(frontend) = self.shared.frontend()
        {
            frontend.event(CharEvent::Opened);
        }
    }

    /// The other side has gone.
    fn close(&mut self) {
        if !self.setup.pty {
            if self.setup.listener.is_none() {
                self.input_ended = true;
            }
            self.setup.link = None;
        }
        let was_open = self.shared.open.swap(false, Ordering::SeqCst);
        self.forget_output();
        if was_open && let Some(frontend) = self.shared.frontend() {
            frontend.event(CharEvent::Closed);
        }
    }

    fn forget_output(&self) {
        let mut output = self.shared.output.lock();
        output.bytes.clear();
        let starved = std::mem::take(&mut output.starved);
        drop(output);
        self.shared.drained.notify_all();
        if starved && let Some(frontend) = self.shared.frontend() {
            frontend.writable();
        }
    }

    fn write_out(&mut self) {
        let Some(link) = &self.setup.link else { return };
        let mut output = self.shared.output.lock();
        let piece: Vec<u8> = output.bytes.iter().copied().take(PIECE).collect();
        if piece.is_empty() {
            return;
        }
        drop(output);
        let written = match rustix::io::write(&link.output, &piece) {
            Ok(n) => n,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => return self.close(),
        };
        output = self.shared.output.lock();
        output.bytes.drain(..written);
        // Told once there is room for a good deal, not for every piece.
        let roomy = output.bytes.len() <= OUTPUT_ROOM / 2;
        let starved = roomy && std::mem::take(&mut output.starved);
        let empty = output.bytes.is_empty();
        drop(output);
        if empty {
            self.shared.drained.notify_all();
        }
        if starved && let Some(frontend) = self.shared.frontend() {
            frontend.writable();
        }
    }

    fn read_in(&mut self) {
        let Some(fd) = self
            .setup
            .link
            .as_ref()
            .and_then(|link| link.input.as_ref())
        else {
            return;
        };
        let mut buffer = [0; PIECE];
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) if self.setup.quit.is_some() => self.input_ended = true,
            Ok(0) => self.close(),
            Ok(n) => {
                self.opened();
                self.typed(&buffer[..n]);
            }
            Err(Errno::AGAIN) => {
                if self.setup.pty {
                    self.opened();
                }
            }
            Err(Errno::INTR) => {}
            Err(_) => self.close(),
        }
    }

    fn typed(&mut self, bytes: &[u8]) {
        let keys = match &self.setup.quit {
            Some(_) if crate::terminal::is_terminal() => self.menu.typed(bytes),
            _ => vec![Key::Input(bytes.to_vec())],
        };
        for key in keys {
            match key {
                Key::Input(bytes) => self.pending.extend(bytes),
                Key::Quit => {
                    if let Some(quit) = &self.setup.quit {
                        quit();
                    }
                }
                Key::Break => {
                    if let Some(frontend) = self.shared.frontend() {
                        frontend.event(CharEvent::Break);
                    }
                }
                Key::Help => {
                    let mut output = self.shared.output.lock();
                    output.bytes.extend(HELP.as_bytes());
                }
            }
        }
    }

    /// Offers the device what has been read.
    fn offer(&mut self) {
        while !self.pending.is_empty() && self.shared.accepting.load(Ordering::SeqCst) {
            let Some(frontend) = self.shared.frontend() else {
                return;
            };
            // Cleared first: room that comes up meanwhile sets it again.
            self.shared.accepting.store(false, Ordering::SeqCst);
            let bytes = self.pending.make_contiguous();
            let offered = bytes.len();
            let taken = frontend.receive(bytes).min(offered);
            self.pending.drain(..taken);
            if taken == offered {
                self.shared.accepting.store(true, Ordering::SeqCst);
            }
        }
    }
}
