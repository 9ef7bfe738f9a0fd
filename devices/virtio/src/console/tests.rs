use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};

use device_model::CharEvent;

use super::*;
use crate::spec::feature as ring;
use crate::testing::{DATA, Guest};

/// A terminal that notes what is written, as far as it has room.
#[derive(Default)]
struct Terminal {
    written: Mutex<Vec<u8>>,
    room: AtomicUsize,
    frontend: Mutex<Option<Weak<dyn CharFrontend>>>,
    accepted: AtomicUsize,
}

impl Terminal {
    fn new(room: usize) -> Arc<Self> {
        let terminal = Self::default();
        terminal.room.store(room, Ordering::SeqCst);
        Arc::new(terminal)
    }
    fn frontend(&self) -> Arc<dyn CharFrontend> {
        self.frontend.lock().as_ref().unwrap().upgrade().unwrap()
    }
    fn text(&self) -> Vec<u8> {
        self.written.lock().clone()
    }
}

impl CharBackend for Terminal {
    fn connect(&self, frontend: Weak<dyn CharFrontend>) {
        *self.frontend.lock() = Some(frontend);
    }
    fn write(&self, data: &[u8]) -> usize {
        let n = data.len().min(self.room.load(Ordering::SeqCst));
        self.room.fetch_sub(n, Ordering::SeqCst);
        self.written.lock().extend(&data[..n]);
        n
    }
    fn accept_input(&self) {
        self.accepted.fetch_add(1, Ordering::SeqCst);
    }
    fn is_open(&self) -> bool {
        true
    }
    fn drain(&self, _: Duration) {}
}

fn console() -> (Guest, ConsoleHandle, Arc<Terminal>, Arc<Terminal>) {
    let (a, b) = (Terminal::new(usize::MAX), Terminal::new(usize::MAX));
    let (console, handle) = Console::new(ConsoleOptions {
        console: Some(a.clone()),
        ports: vec![NamedPort {
            name: "org.example.agent".into(),
            backend: b.clone(),
        }],
    })
    .unwrap();
    (Guest::new(console), handle, a, b)
}

const TEXT: u64 = DATA + 0x10_0000;

impl Guest {
    fn tell(&mut self, port: usize, event: u16, value: u16) {
        self.put(TEXT, &message(port, event, value, &[]));
        self.request(3, &[(TEXT, 8, false)]);
    }

    /// The next message: buffers of 64 bytes at `DATA`, in the order of their numbers.
    fn hear(&mut self) -> Vec<u8> {
        let (n, len) = self.used(2);
        let bytes = self.bytes(DATA + n * 64, len as usize);
        self.send(2, &[(DATA + (n + 64) * 64, 64, true)]);
        bytes
    }

    fn begin(&mut self, features: u64) {
        self.start(features, 64);
        for n in 0..64 {
            self.send(2, &[(DATA + n * 64, 64, true)]);
        }
    }

    fn print(&mut self, queue: u16, text: &[u8]) {
        self.put(TEXT, text);
        assert_eq!(self.request(queue, &[(TEXT, text.len() as u32, false)]), 0);
    }
}

#[test]
fn ports_introduce_themselves_and_carry_data() {
    for features in [0, ring::EVENT_IDX, ring::RING_PACKED | ring::EVENT_IDX] {
        let (mut guest, handle, console, agent) = console();
        handle.resize(132, 43);
        guest.begin(features | feature::MULTIPORT | feature::SIZE);
        assert_eq!(guest.config_u32(config::MAX_PORTS), 2);
        assert_eq!((guest.config_u16(0), guest.config_u16(2)), (132, 43));
        guest.tell(0, event::DEVICE_READY, 1);
        assert_eq!(guest.hear(), message(0, event::DEVICE_ADD, 1, &[]));
        assert_eq!(guest.hear(), message(1, event::DEVICE_ADD, 1, &[]));
        guest.tell(0, event::PORT_READY, 1);
        assert_eq!(guest.hear(), message(0, event::CONSOLE_PORT, 1, &[]));
        assert_eq!(guest.hear(), message(0, event::RESIZE, 0, &[132, 0, 43, 0]));
        assert_eq!(guest.hear(), message(0, event::PORT_OPEN, 1, &[]));
        guest.tell(1, event::PORT_READY, 1);
        let name = message(1, event::PORT_NAME, 1, b"org.example.agent");
        assert_eq!(guest.hear(), name);
        assert_eq!(guest.hear(), message(1, event::PORT_OPEN, 1, &[]));
        guest.print(1, b"hello, ");
        guest.print(1, b"console");
        guest.print(5, b"hello, agent");
        assert_eq!(console.text(), b"hello, console");
        assert_eq!(agent.text(), b"hello, agent");
        // Input waits until the port is open.
        assert_eq!(agent.frontend().receive(b"ping"), 4);
        guest.send(4, &[(TEXT + 0x1000, 3, true)]);
        guest.tell(1, event::PORT_OPEN, 1);
        assert_eq!(guest.used(4), (0, 3));
        assert_eq!(guest.bytes(TEXT + 0x1000, 3), b"pin");
        assert_eq!(guest.request(4, &[(TEXT + 0x1000, 3, true)]), 1);
        agent.frontend().event(CharEvent::Closed);
        assert_eq!(guest.hear(), message(1, event::PORT_OPEN, 0, &[]));
        handle.resize(80, 25);
        assert_eq!(guest.hear(), message(0, event::RESIZE, 0, &[80, 0, 25, 0]));
    }
}

#[test]
fn one_port_works_without_the_control_channel() {
    let (mut guest, _handle, console, _agent) = console();
    guest.start(0, 64);
    guest.print(1, b"x");
    assert_eq!(console.text(), b"x");
    guest.send(0, &[(DATA, 64, true)]);
    console.frontend().receive(b"typed");
    assert_eq!(guest.used(0), (0, 5));
    assert_eq!(guest.bytes(DATA, 5), b"typed");
    guest.write(0x2000 + config::EMERGENCY_WRITE, 4, u64::from(b'!'));
    assert_eq!(console.text(), b"x!");
}

#[test]
fn a_slow_backend_and_a_slow_guest_lose_nothing() {
    let (mut guest, _handle, console, _agent) = console();
    guest.start(0, 64);
    let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    console.room.store(10_000, Ordering::SeqCst);
    guest.put(TEXT, &text);
    guest.send(1, &[(TEXT, 100_000, false)]);
    for part in 2..=10 {
        guest.wait(|_| (console.text().len() == (part - 1) * 10_000).then_some(()));
        assert_eq!(guest.queue(1).used(), None);
        console.room.store(10_000, Ordering::SeqCst);
        console.frontend().writable();
    }
    assert_eq!(guest.used(1), (0, 0));
    assert_eq!(console.text(), text);
    let taken = console.frontend().receive(&text);
    assert_eq!(taken, 64 << 10);
    let mut got = 0;
    while got < taken {
        got += guest.request(0, &[(TEXT, 16 << 10, true)]) as usize;
    }
    assert_eq!(got, taken);
    guest.wait(|_| (console.accepted.load(Ordering::SeqCst) > 0).then_some(()));
    assert_eq!(console.frontend().receive(b"more"), 4);
}

#[test]
fn drivers_that_talk_without_listening_are_held_back() {
    let (mut guest, _handle, _console, _agent) = console();
    guest.start(feature::MULTIPORT, 64);
    guest.put(TEXT, &message(0, event::PORT_READY, 1, &[]));
    guest.put(TEXT + 8, &message(7, event::PORT_READY, 1, &[]));
    let mut sent = 0;
    for round in 0..2000u64 {
        let at = TEXT + round % 2 * 8;
        sent += u64::from(guest.queue(3).add(&[(at, 8, false)]).is_some());
        guest.kick(3);
        guest.queue(3).used();
    }
    // The messages of 60 announcements fill what may wait; then the queue stays full.
    assert!(sent < 400, "{sent}");
    for n in 0..64 {
        guest.send(2, &[(DATA + n * 64, 64, true)]);
    }
    assert_eq!(guest.hear(), message(0, event::CONSOLE_PORT, 1, &[]));
}

#[test]
fn malformed_messages_stop_the_control_queue() {
    let (mut guest, _handle, _console, _agent) = console();
    guest.start(feature::MULTIPORT, 64);
    guest.send(3, &[(TEXT, 7, false)]);
    guest.wait_for_failure();
    guest.start(feature::MULTIPORT, 64);
    for (port, event, value) in [(99, 3, 1), (0, 99, 0), (u32::MAX as usize, 6, 1)] {
        guest.tell(port, event, value);
    }
}
