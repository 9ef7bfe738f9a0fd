//! One port: its queues on the guest's side, its character backend on the host's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use device_model::{CharBackend, CharEvent, CharFrontend};
use parking_lot::Mutex;

use super::Ports;
use crate::device::ActiveQueue;
use crate::queue::Chain;
use crate::worker::WorkerHandle;

/// Input that waits for the guest at most, in bytes.
const INPUT: usize = 64 << 10;
/// Output handed to the backend at a time, in bytes.
const OUTPUT: usize = 16 << 10;
/// Buffers of one port before others have their turn.
const TURN: usize = 64;

/// What the backend sees of a port. Called on the backend's threads.
pub(super) struct Input {
    bytes: Mutex<VecDeque<u8>>,
    /// The backend has bytes left that were not taken.
    refused: AtomicBool,
    port: usize,
    pub(super) thread: Mutex<Option<WorkerHandle<Ports>>>,
}

impl Input {
    pub(super) fn new(port: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::default(),
            refused: AtomicBool::new(false),
            port,
            thread: Mutex::new(None),
        })
    }

    fn tell(&self, what: impl FnOnce(&mut Ports, usize) + Send + 'static) {
        let port = self.port;
        if let Some(thread) = &*self.thread.lock() {
            thread.post(move |ports| what(ports, port));
        }
    }
}

impl CharFrontend for Input {
    fn receive(&self, data: &[u8]) -> usize {
        let mut bytes = self.bytes.lock();
        let n = data.len().min(INPUT - bytes.len().min(INPUT));
        bytes.extend(&data[..n]);
        if n < data.len() {
            self.refused.store(true, Ordering::SeqCst);
        }
        drop(bytes);
        if n > 0 {
            self.tell(Ports::serve);
        }
        n
    }

    fn writable(&self) {
        self.tell(|ports, port| {
            ports.unblock(port);
        });
    }

    fn event(&self, event: CharEvent) {
        match event {
            CharEvent::Opened => self.tell(|ports, port| ports.host_opened(port, true)),
            CharEvent::Closed => self.tell(|ports, port| ports.host_opened(port, false)),
            CharEvent::Break => {}
        }
    }
}

/// A port on the device's thread.
pub(super) struct Port {
    // Configuration.
    pub(super) name: Option<String>,
    pub(super) is_console: bool,
    pub(super) backend: Arc<dyn CharBackend>,
    // Runtime.
    pub(super) input: Arc<Input>,
    pub(super) receive: Option<ActiveQueue>,
    pub(super) transmit: Option<ActiveQueue>,
    /// A chain that the backend has taken a part of, and how much.
    unfinished: Option<(Chain, usize)>,
    /// The backend takes no more now.
    blocked: bool,
    // Volatile guest state.
    /// The driver knows the port.
    pub(super) ready: bool,
    /// A program in the guest has it open.
    pub(super) guest_open: bool,
}

impl Port {
    pub(super) fn new(
        number: usize,
        name: Option<String>,
        is_console: bool,
        backend: Arc<dyn CharBackend>,
    ) -> Self {
        Self {
            name,
            is_console,
            backend,
            input: Input::new(number),
            receive: None,
            transmit: None,
            unfinished: None,
            blocked: false,
            ready: false,
            guest_open: false,
        }
    }

    pub(super) fn stop_transmit(&mut self) {
        self.transmit = None;
        self.unfinished = None;
        self.blocked = false;
    }

    pub(super) fn reset(&mut self) {
        self.receive = None;
        self.stop_transmit();
        self.ready = false;
        self.guest_open = false;
        self.input.bytes.lock().clear();
        self.offer_room();
    }

    pub(super) fn unblock(&mut self) {
        self.blocked = false;
    }

    /// Tells a backend that was refused that there is room now.
    fn offer_room(&self) {
        if self.input.refused.swap(false, Ordering::SeqCst) {
            self.backend.accept_input();
        }
    }

    /// Moves what can be moved. True if there is more to do.
    pub(super) fn serve(&mut self) -> bool {
        let more = self.serve_output();
        self.serve_input() || more
    }

    fn serve_input(&mut self) -> bool {
        if !self.guest_open {
            return false;
        }
        let Some(active) = &mut self.receive else {
            return false;
        };
        let queue = &mut active.queue;
        let mut moved = 0;
        while moved < TURN && !self.input.bytes.lock().is_empty() {
            let Some(chain) = queue.pop() else {
                if queue.enable_doorbell() {
                    continue;
                }
                break;
            };
            let mut bytes = self.input.bytes.lock();
            let n = bytes.len().min(chain.writable.len());
            let chunk: Vec<u8> = bytes.drain(..n).collect();
            drop(bytes);
            chain.writable.write_at(0, &chunk);
            queue.push(chain.token, n as u32);
            moved += 1;
        }
        queue.commit();
        if moved > 0 {
            self.offer_room();
        }
        moved == TURN
    }

    fn serve_output(&mut self) -> bool {
        let Some(active) = &mut self.transmit else {
            return false;
        };
        let queue = &mut active.queue;
        for _ in 0..TURN {
            if self.blocked {
                queue.commit();
                return false;
            }
            let next = self
                .unfinished
                .take()
                .or_else(|| queue.pop().map(|c| (c, 0)));
            let Some((chain, done)) = next else {
                queue.commit();
                if queue.enable_doorbell() {
                    continue;
                }
                return false;
            };
            let mut chunk = vec![0; OUTPUT.min(chain.readable.len() - done)];
            chain.readable.read_at(done, &mut chunk);
            let taken = self.backend.write(&chunk).min(chunk.len());
            self.blocked = taken < chunk.len();
            if done + taken == chain.readable.len() {
                queue.push(chain.token, 0);
            } else {
                self.unfinished = Some((chain, done + taken));
            }
        }
        queue.commit();
        true
    }
}
