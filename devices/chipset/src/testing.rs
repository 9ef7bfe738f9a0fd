//! Fakes and drivers for the crate's tests.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use device_model::{
    CharBackend, CharFrontend, IoHandler, IrqLine, IrqPin, IrqSink, MsiSink, PowerControl,
    PowerEvent,
};
use parking_lot::Mutex;

/// The far end of one interrupt wire.
pub(crate) struct Line {
    pin: IrqPin,
    edges: Arc<AtomicUsize>,
}

struct CountEdges(Arc<AtomicUsize>);
impl IrqSink for CountEdges {
    fn set_level(&self, _pin: u32, high: bool) {
        if high {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Line {
    pub(crate) fn new() -> Self {
        let edges = Arc::new(AtomicUsize::new(0));
        Self {
            pin: IrqPin::new(Arc::new(CountEdges(edges.clone())), 0),
            edges,
        }
    }

    pub(crate) fn line(&self) -> IrqLine {
        self.pin.line()
    }

    pub(crate) fn pin(&self) -> IrqPin {
        self.pin.clone()
    }

    pub(crate) fn is_high(&self) -> bool {
        self.pin.is_high()
    }

    /// Rising edges so far.
    pub(crate) fn edges(&self) -> usize {
        self.edges.load(Ordering::SeqCst)
    }
}

/// Remembers messages and power requests.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) messages: Mutex<Vec<(u64, u32)>>,
    pub(crate) requests: Mutex<Vec<PowerEvent>>,
}

impl MsiSink for Recorder {
    fn send(&self, address: u64, data: u32) {
        self.messages.lock().push((address, data));
    }
}

impl PowerControl for Recorder {
    fn request(&self, event: PowerEvent) {
        self.requests.lock().push(event);
    }
}

/// A backend that keeps output in memory and takes a limited amount of it.
pub(crate) struct MemoryBackend {
    output: Mutex<Vec<u8>>,
    room: AtomicUsize,
    asked: AtomicBool,
}

impl Default for MemoryBackend {
    fn default() -> Self {
        Self {
            output: Mutex::default(),
            room: AtomicUsize::new(usize::MAX),
            asked: AtomicBool::new(false),
        }
    }
}

impl MemoryBackend {
    pub(crate) fn output(&self) -> Vec<u8> {
        self.output.lock().clone()
    }

    pub(crate) fn set_room(&self, bytes: usize) {
        self.room.store(bytes, Ordering::SeqCst);
    }

    pub(crate) fn asked_for_input(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

impl CharBackend for MemoryBackend {
    fn connect(&self, _frontend: Weak<dyn CharFrontend>) {}
    fn write(&self, data: &[u8]) -> usize {
        let room = self.room.load(Ordering::SeqCst);
        let taken = room.min(data.len());
        self.output.lock().extend(&data[..taken]);
        self.room.store(room - taken, Ordering::SeqCst);
        taken
    }
    fn accept_input(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }
    fn is_open(&self) -> bool {
        true
    }
    fn drain(&self, _at_most: Duration) {}
}

/// A generator of numbers that are the same in every run (xorshift64).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Random aligned accesses of the given sizes to a device's registers.
pub(crate) fn smoke(device: &dyn IoHandler, len: u64, sizes: &[usize], accesses: u32) {
    let mut numbers = Numbers::new(0x1234_5678_9abc_def1);
    for _ in 0..accesses {
        let size = sizes[numbers.next() as usize % sizes.len()];
        let offset = numbers.next() % len / size as u64 * size as u64;
        let mut data = numbers.next().to_le_bytes();
        if numbers.next().is_multiple_of(3) {
            device.read(offset, &mut data[..size]);
        } else {
            device.write(offset, &data[..size]);
        }
    }
}
