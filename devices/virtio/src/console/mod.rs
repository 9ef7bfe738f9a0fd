//! The console device (section 5.3), with any number of ports: virtio-serial.
//!
//! One thread, `virtio-console`, serves all ports and the control channel. What comes from a character backend is kept, as far
//! as there is room, by `port::Input` on the backend's own thread and moved to the guest by the device's.

mod port;
pub mod spec;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use device_model::{CharBackend, CharFrontend};
use parking_lot::Mutex;
use rustix::event::PollFlags;

use crate::device::{Activation, ActiveQueue, DeviceEvents, VirtioDevice, read_space};
use crate::doorbell;
use crate::queue::{Chain, QueueError};
use crate::spec::DeviceType;
use crate::worker::{Service, WaitSet, Worker, WorkerHandle};
use port::Port;
use spec::{config, event, feature, queue};

const QUEUE_SIZE: u16 = 128;
/// The most ports that a device has, the console among them.
pub const MAX_PORTS: usize = 31;
/// Messages to the driver that wait at most: while there are more, those from it wait.
const MAX_MESSAGES: usize = 128;

/// A port with a name, `/dev/virtio-ports/NAME` in a Linux guest.
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// What it is connected to.
    pub backend: Arc<dyn CharBackend>,
}

/// A console device's ports.
#[derive(Default)]
pub struct ConsoleOptions {
    /// Port 0, the console, `/dev/hvc0` in a Linux guest.
    pub console: Option<Arc<dyn CharBackend>>,
    /// The ports from 1 on.
    pub ports: Vec<NamedPort>,
}

/// Why a console device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Too many ports.
    #[error("a virtio console has {MAX_PORTS} ports at most, not {0}")]
    TooManyPorts(usize),
    /// The host gives no thread.
    #[error("can't start the virtio console's thread")]
    Thread(#[source] std::io::Error),
}

/// The device's thread.
struct Ports {
    // Runtime.
    /// By port number.
    list: Vec<Option<Port>>,
    receive: Option<ActiveQueue>,
    transmit: Option<ActiveQueue>,
    again: bool,
    // Volatile guest state.
    multiport: bool,
    /// Messages that wait for a buffer of the driver's.
    messages: VecDeque<Vec<u8>>,
    /// Columns and rows of the console.
    size: Option<(u16, u16)>,
}

fn message(port: usize, event: u16, value: u16, tail: &[u8]) -> Vec<u8> {
    let mut bytes = (port as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&event.to_le_bytes());
    bytes.extend_from_slice(&value.to_le_bytes());
    bytes.extend_from_slice(tail);
    bytes
}

impl Ports {
    fn port(&mut self, number: usize) -> Option<&mut Port> {
        self.list.get_mut(number)?.as_mut()
    }

    /// Serves one port.
    fn serve(&mut self, number: usize) {
        let more = self.port(number).is_some_and(Port::serve);
        self.again |= more;
    }

    fn unblock(&mut self, number: usize) {
        if let Some(port) = self.port(number) {
            port.unblock();
        }
        self.serve(number);
    }

    /// The other side of a backend has come or gone.
    fn host_opened(&mut self, number: usize, open: bool) {
        let ready = self.port(number).is_some_and(|p| p.ready);
        if ready {
            self.send(message(number, event::PORT_OPEN, u16::from(open), &[]));
        }
    }

    fn resize(&mut self, size: (u16, u16)) {
        self.size = Some(size);
        if self.port(0).is_some_and(|p| p.ready) {
            self.send_size();
        }
    }

    fn send_size(&mut self) {
        if let Some((cols, rows)) = self.size {
            let [c0, c1] = cols.to_le_bytes();
            let [r0, r1] = rows.to_le_bytes();
            self.send(message(0, event::RESIZE, 0, &[c0, c1, r0, r1]));
        }
    }

    fn send(&mut self, message: Vec<u8>) {
        // From the driver's doing no more than a few beyond the limit; from the host's, the oldest goes.
        if self.messages.len() >= 2 * MAX_MESSAGES {
            self.messages.pop_front();
        }
        self.messages.push_back(message);
        self.deliver();
    }

    /// Gives waiting messages to the driver.
    fn deliver(&mut self) {
        let Some(active) = &mut self.receive else {
            return;
        };
        let queue = &mut active.queue;
        while let Some(message) = self.messages.front() {
            let Some(chain) = queue.pop() else {
                if queue.enable_doorbell() {
                    continue;
                }
                break;
            };
            let n = chain.writable.write_at(0, message);
            queue.push(chain.token, n as u32);
            self.messages.pop_front();
        }
        queue.commit();
    }

    /// Takes messages of the driver's.
    fn serve_control(&mut self) {
        self.deliver();
        for _ in 0..MAX_MESSAGES {
            if self.messages.len() >= MAX_MESSAGES {
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
                Ok(from_driver) => {
                    active.queue.push(chain.token, 0);
                    self.handle(from_driver);
                }
                Err(what) => active.queue.fail(QueueError::Request(what)),
            }
        }
        if let Some(active) = &mut self.transmit {
            active.queue.commit();
            // When messages to the driver wait, its buffers for them bring us back.
            self.again |= self.messages.len() < MAX_MESSAGES;
        }
    }

    fn handle(&mut self, (number, event, value): (u32, u16, u16)) {
        let number = number as usize;
        match event {
            event::DEVICE_READY if value == 1 => {
                for number in 0..self.list.len() {
                    if self.list[number].is_some() {
                        self.send(message(number, event::DEVICE_ADD, 1, &[]));
                    }
                }
            }
            event::PORT_READY => self.port_ready(number, value == 1),
            event::PORT_OPEN => {
                if let Some(port) = self.port(number) {
                    port.guest_open = value == 1;
                }
                self.serve(number);
            }
            _ => {}
        }
    }

    fn port_ready(&mut self, number: usize, ready: bool) {
        let Some(port) = self.port(number) else {
            return;
        };
        port.ready = ready;
        if !ready {
            return;
        }
        let (is_console, name) = (port.is_console, port.name.clone());
        let host_open = is_console || port.backend.is_open();
        if is_console {
            self.send(message(number, event::CONSOLE_PORT, 1, &[]));
            self.send_size();
        }
        if let Some(name) = name {
            self.send(message(number, event::PORT_NAME, 1, name.as_bytes()));
        }
        if host_open {
            self.send(message(number, event::PORT_OPEN, 1, &[]));
        }
    }

    /// Which port a queue belongs to, and whether it carries input for the guest.
    fn place(index: u16) -> (usize, bool) {
        let input = index.is_multiple_of(2);
        let port = match index {
            0 | 1 => 0,
            _ => usize::from(index / 2) - 1,
        };
        (port, input)
    }

    fn start(&mut self, active: ActiveQueue) {
        let index = active.queue.index();
        match index {
            queue::CONTROL_RECEIVE => self.receive = Some(active),
            queue::CONTROL_TRANSMIT => self.transmit = Some(active),
            _ => {
                let (number, input) = Self::place(index);
                let multiport = self.multiport;
                if let Some(port) = self.port(number) {
                    // Without the control channel nobody says that it is open.
                    port.guest_open |= !multiport;
                    if input {
                        port.receive = Some(active);
                    } else {
                        port.transmit = Some(active);
                    }
                }
            }
        }
        self.again = true;
    }

    fn stop(&mut self, index: u16) {
        match index {
            queue::CONTROL_RECEIVE => self.receive = None,
            queue::CONTROL_TRANSMIT => self.transmit = None,
            _ => {
                let (number, input) = Self::place(index);
                if let Some(port) = self.port(number) {
                    if input {
                        port.receive = None;
                    } else {
                        port.stop_transmit();
                    }
                }
            }
        }
    }

    fn reset(&mut self) {
        self.receive = None;
        self.transmit = None;
        self.messages.clear();
        self.list.iter_mut().flatten().for_each(Port::reset);
    }

    fn queue_at(&self, token: u64) -> Option<&ActiveQueue> {
        let index = token as u16;
        match index {
            queue::CONTROL_RECEIVE => self.receive.as_ref(),
            queue::CONTROL_TRANSMIT => self.transmit.as_ref(),
            _ => {
                let (number, input) = Self::place(index);
                let port = self.list.get(number)?.as_ref()?;
                if input {
                    port.receive.as_ref()
                } else {
                    port.transmit.as_ref()
                }
            }
        }
    }
}

/// Reads a message of the driver's: port, event, value.
fn parse(chain: &Chain) -> Result<(u32, u16, u16), &'static str> {
    let bytes: [u8; event::SIZE] = chain
        .readable
        .array_at(0)
        .ok_or("a console control message that is too short")?;
    let word = u64::from_le_bytes(bytes);
    Ok((word as u32, (word >> 32) as u16, (word >> 48) as u16))
}

impl Service for Ports {
    fn wait_for<'a>(&'a self, set: &mut WaitSet<'a>) {
        if self.again {
            set.at_most(Duration::ZERO);
        }
        for index in 0..2 * (self.list.len() as u64 + 1) {
            if let Some(active) = self.queue_at(index) {
                set.add(active.doorbell.as_fd(), PollFlags::IN, index);
            }
        }
    }

    fn ready(&mut self, token: u64, _: PollFlags) {
        if let Some(active) = self.queue_at(token) {
            doorbell::take(&active.doorbell);
        }
        match token as u16 {
            queue::CONTROL_RECEIVE | queue::CONTROL_TRANSMIT => self.serve_control(),
            index => self.serve(Self::place(index).0),
        }
    }

    fn end_of_batch(&mut self) {
        if std::mem::take(&mut self.again) {
            self.serve_control();
            for number in 0..self.list.len() {
                self.serve(number);
            }
        }
    }
}

/// What the device and its handles share.
struct Shared {
    config: Mutex<[u8; config::SIZE]>,
    events: Mutex<Option<Arc<dyn DeviceEvents>>>,
}

/// Reaches a console device that a guest has.
#[derive(Clone)]
pub struct ConsoleHandle {
    shared: Arc<Shared>,
    thread: WorkerHandle<Ports>,
}

impl ConsoleHandle {
    /// Tells the guest the size of the console's terminal.
    pub fn resize(&self, cols: u16, rows: u16) {
        {
            let mut space = self.shared.config.lock();
            space[config::COLS..config::COLS + 2].copy_from_slice(&cols.to_le_bytes());
            space[config::ROWS..config::ROWS + 2].copy_from_slice(&rows.to_le_bytes());
        }
        self.thread.post(move |ports| ports.resize((cols, rows)));
        if let Some(events) = &*self.shared.events.lock() {
            events.config_changed();
        }
    }
}

/// The console device.
pub struct Console {
    // Configuration.
    ports: usize,
    console: Option<Arc<dyn CharBackend>>,
    // Runtime.
    shared: Arc<Shared>,
    worker: Worker<Ports>,
    /// The backends hold them weakly.
    _inputs: Vec<Arc<port::Input>>,
}

impl Console {
    /// A console device with its ports connected.
    ///
    /// # Errors
    /// For too many ports, or a host that gives no thread.
    pub fn new(options: ConsoleOptions) -> Result<(Self, ConsoleHandle), ConsoleError> {
        let count = options.ports.len() + 1;
        if count > MAX_PORTS {
            return Err(ConsoleError::TooManyPorts(count));
        }
        let console = options.console.clone();
        let mut list = vec![options.console.map(|b| Port::new(0, None, true, b))];
        for (number, NamedPort { name, backend }) in (1..).zip(options.ports) {
            list.push(Some(Port::new(number, Some(name), false, backend)));
        }
        let connected: Vec<_> = list
            .iter()
            .flatten()
            .map(|port| (port.input.clone(), port.backend.clone()))
            .collect();
        let service = Ports {
            list,
            receive: None,
            transmit: None,
            again: false,
            multiport: false,
            messages: VecDeque::new(),
            size: None,
        };
        let worker = Worker::start("virtio-console", service).map_err(ConsoleError::Thread)?;
        let mut inputs = Vec::new();
        for (input, backend) in connected {
            *input.thread.lock() = Some(worker.handle().clone());
            let frontend: Arc<dyn CharFrontend> = input.clone();
            backend.connect(Arc::downgrade(&frontend));
            inputs.push(input);
        }
        let mut space = [0; config::SIZE];
        space[config::MAX_PORTS..config::MAX_PORTS + 4]
            .copy_from_slice(&(count as u32).to_le_bytes());
        let shared = Arc::new(Shared {
            config: Mutex::new(space),
            events: Mutex::new(None),
        });
        let handle = ConsoleHandle {
            shared: shared.clone(),
            thread: worker.handle().clone(),
        };
        let device = Self {
            ports: count,
            console,
            shared,
            worker,
            _inputs: inputs,
        };
        Ok((device, handle))
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * (self.ports + 1)]
    }

    fn features(&self) -> u64 {
        feature::SIZE | feature::MULTIPORT | feature::EMERG_WRITE
    }

    fn accepts(&self, _: u64) -> bool {
        true
    }

    fn connect(&mut self, events: Arc<dyn DeviceEvents>) {
        *self.shared.events.lock() = Some(events);
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_space(&*self.shared.config.lock(), offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (config::EMERGENCY_WRITE, [byte, ..], Some(console)) = (offset, data, &self.console)
        {
            console.write(&[*byte]);
        }
    }

    fn activate(&mut self, activation: Activation) {
        let multiport = activation.features & feature::MULTIPORT != 0;
        self.worker.call(move |ports| {
            ports.multiport = multiport;
            for queue in activation.queues {
                ports.start(queue);
            }
        });
    }

    fn start_queue(&mut self, queue: ActiveQueue) {
        self.worker.call(move |ports| ports.start(queue));
    }

    fn stop_queue(&mut self, index: u16) {
        self.worker.call(move |ports| ports.stop(index));
    }

    fn reset(&mut self) {
        self.worker.call(Ports::reset);
    }
}
