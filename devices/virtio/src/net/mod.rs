//! The network device (section 5.1).
//!
//! Each pair of queues has one thread, `virtio-netN`, which also drives the link's queue that belongs to the pair, so a frame goes
//! from guest memory to the link, or back, on one thread and in place. The first pair's thread serves the control queue too.
//! Frames wait in the guest's transmit queue while the link can't take them, and in the link while the guest has no receive
//! buffers: nothing is dropped between them.

mod control;
mod filter;
mod pair;
pub mod spec;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use network_cards::{LinkState, NetBackend, NetError, Offloads};
use parking_lot::{Mutex, RwLock};

use crate::device::{Activation, ActiveQueue, DeviceEvents, VirtioDevice, read_space};
use crate::spec::DeviceType;
use crate::worker::{Worker, WorkerHandle};
use filter::RxFilter;
use pair::Pair;
use spec::{ANNOUNCE, LINK_UP, config, feature};

const CONTROL_SIZE: u16 = 64;

/// How a network card appears to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOptions {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Pairs of queues, 1 to what the link can serve.
    pub queue_pairs: u16,
    /// Entries of each queue: a power of two from 64 to 1024.
    pub queue_size: u16,
    /// The largest packet that the link carries, if the guest is to be told: at least 68 bytes.
    pub mtu: Option<u16>,
}

impl NetOptions {
    /// One pair of 256 entries.
    pub fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            queue_pairs: 1,
            queue_size: 256,
            mtu: None,
        }
    }
}

/// What the device, its pairs and its handles share.
struct Shared {
    // Configuration.
    backend: Arc<dyn NetBackend>,
    max_pairs: u16,
    mac: [u8; 6],
    // Runtime.
    events: Mutex<Option<Arc<dyn DeviceEvents>>>,
    pairs: Mutex<Vec<WorkerHandle<Pair>>>,
    /// What the monitor has set.
    plugged_in: AtomicBool,
    /// What the link itself says.
    link_up: AtomicBool,
    // Volatile guest state.
    config: Mutex<[u8; config::SIZE]>,
    features: AtomicU64,
    accepted: AtomicU64,
    active_pairs: AtomicU16,
    filter: RwLock<RxFilter>,
}

impl Shared {
    fn is_up(&self) -> bool {
        self.plugged_in.load(Ordering::Acquire)
    }

    /// What frames for the guest may leave undone.
    fn accepted(&self) -> Offloads {
        Offloads::from_bits_truncate(self.accepted.load(Ordering::Acquire) as u32)
    }

    fn accept(&self, offloads: Offloads) -> Result<(), NetError> {
        let offloads = offloads.consistent();
        // The room for large frames first: one may come as soon as the link knows.
        if offloads.any_segmentation() {
            self.accepted
                .store(u64::from(offloads.bits()), Ordering::Release);
        }
        self.backend.set_offloads(offloads)?;
        self.accepted
            .store(u64::from(offloads.bits()), Ordering::Release);
        Ok(())
    }

    /// Changes the status field; true if it is another one now.
    fn change_status(&self, change: impl FnOnce(u16) -> u16) -> bool {
        let mut space = self.config.lock();
        let old = u16::from_le_bytes([space[config::STATUS], space[config::STATUS + 1]]);
        let new = change(old);
        space[config::STATUS..config::STATUS + 2].copy_from_slice(&new.to_le_bytes());
        old != new
    }

    fn tell_driver(&self) {
        if let Some(events) = &*self.events.lock() {
            events.config_changed();
        }
    }

    /// Brings the status field in line with monitor and link.
    fn update_link(&self) {
        let up = self.is_up() && self.link_up.load(Ordering::Acquire);
        let bit = if up { LINK_UP } else { 0 };
        if self.change_status(|status| status & !LINK_UP | bit) {
            self.tell_driver();
        }
    }

    /// Looks at the link's own state.
    fn follow_link(&self, broken: bool) {
        let up = !broken && self.backend.link() == LinkState::Up;
        if self.link_up.swap(up, Ordering::AcqRel) != up {
            self.update_link();
        }
    }

    fn wake_pairs(&self) {
        for pair in &*self.pairs.lock() {
            pair.post(Pair::look_again);
        }
    }

    /// The state before a driver has said anything.
    fn clear(&self) {
        self.features.store(0, Ordering::Release);
        self.active_pairs.store(1, Ordering::Release);
        *self.filter.write() = RxFilter::open(self.mac);
        self.config.lock()[config::MAC..config::MAC + 6].copy_from_slice(&self.mac);
        self.change_status(|status| status & !ANNOUNCE);
        // A link that refuses is broken, which its queues will tell.
        let _ = self.accept(Offloads::empty());
        let _ = self.backend.set_active_queues(1);
    }
}

/// Reaches a network card that a guest has, from the monitor.
#[derive(Clone)]
pub struct NetHandle(Arc<Shared>);

impl NetHandle {
    /// Plugs the cable in or pulls it.
    pub fn set_link(&self, up: bool) {
        self.0.plugged_in.store(up, Ordering::Release);
        self.0.update_link();
        self.0.wake_pairs();
    }

    /// Asks the guest to announce itself on the network, as after a migration. Does nothing for a driver that can't.
    pub fn announce(&self) {
        let can = self.0.features.load(Ordering::Acquire) & feature::GUEST_ANNOUNCE != 0;
        if can && self.0.change_status(|status| status | ANNOUNCE) {
            self.0.tell_driver();
        }
    }

    /// The link that the card is plugged into.
    pub fn backend(&self) -> &Arc<dyn NetBackend> {
        &self.0.backend
    }
}

/// The network device.
pub struct Net {
    // Configuration.
    options: NetOptions,
    // Runtime.
    shared: Arc<Shared>,
    pairs: Vec<Worker<Pair>>,
}

/// The features that say what the guest may leave undone.
fn host_features(offloads: Offloads) -> u64 {
    let mut features = 0;
    for (offload, bit) in [
        (Offloads::CSUM, feature::CSUM),
        (Offloads::TSO4, feature::HOST_TSO4),
        (Offloads::TSO6, feature::HOST_TSO6),
        (Offloads::ECN, feature::HOST_ECN),
        (Offloads::UFO, feature::HOST_UFO),
        (Offloads::USO4 | Offloads::USO6, feature::HOST_USO),
    ] {
        if offloads.contains(offload) {
            features |= bit;
        }
    }
    features
}

const GUEST_OFFLOADS: [(Offloads, u64); 7] = [
    (Offloads::CSUM, feature::GUEST_CSUM),
    (Offloads::TSO4, feature::GUEST_TSO4),
    (Offloads::TSO6, feature::GUEST_TSO6),
    (Offloads::ECN, feature::GUEST_ECN),
    (Offloads::UFO, feature::GUEST_UFO),
    (Offloads::USO4, feature::GUEST_USO4),
    (Offloads::USO6, feature::GUEST_USO6),
];

/// What the guest accepts, by its features.
fn guest_offloads(features: u64) -> Offloads {
    GUEST_OFFLOADS
        .iter()
        .filter(|(_, bit)| features & bit != 0)
        .fold(Offloads::empty(), |all, (offload, _)| all | *offload)
}

/// Which features need which other ones (section 5.1.3.1): a set, and a set of which one must be there.
const DEPENDENCIES: [(u64, u64); 9] = [
    (
        feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::GUEST_UFO
            | feature::GUEST_USO4
            | feature::GUEST_USO6,
        feature::GUEST_CSUM,
    ),
    (
        feature::GUEST_ECN,
        feature::GUEST_TSO4 | feature::GUEST_TSO6,
    ),
    (
        feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_UFO | feature::HOST_USO,
        feature::CSUM,
    ),
    (feature::HOST_ECN, feature::HOST_TSO4 | feature::HOST_TSO6),
    (
        feature::CTRL_RX | feature::CTRL_VLAN | feature::MQ | feature::CTRL_MAC_ADDR,
        feature::CTRL_VQ,
    ),
    (feature::CTRL_RX_EXTRA, feature::CTRL_VQ),
    (feature::GUEST_ANNOUNCE, feature::CTRL_VQ),
    (feature::GUEST_ANNOUNCE, feature::STATUS),
    (feature::CTRL_GUEST_OFFLOADS, feature::CTRL_VQ),
];

fn check(options: &NetOptions, backend: &dyn NetBackend) -> Result<(), NetError> {
    let size = options.queue_size;
    if !size.is_power_of_two() || !(64..=1024).contains(&size) {
        return Err(NetError::Config {
            option: "queue-size",
            value: size.to_string(),
            expected: "a power of two from 64 to 1024".into(),
        });
    }
    if let Some(mtu) = options.mtu.filter(|mtu| *mtu < 68) {
        return Err(NetError::Config {
            option: "mtu",
            value: mtu.to_string(),
            expected: "at least 68 bytes".into(),
        });
    }
    let max = backend.max_queue_pairs().min(128);
    if !(1..=max).contains(&options.queue_pairs) {
        return Err(NetError::QueueCount {
            link: backend.describe(),
            asked: options.queue_pairs,
            max,
        });
    }
    Ok(())
}

impl Net {
    /// A network card on a link.
    ///
    /// # Errors
    /// For impossible options, a link whose queues are taken, or a host that gives no threads.
    pub fn new(
        backend: Arc<dyn NetBackend>,
        options: NetOptions,
    ) -> Result<(Self, NetHandle), NetError> {
        check(&options, &*backend)?;
        let links = backend.take_queues(options.queue_pairs)?;
        let mut space = [0; config::SIZE];
        space[config::MAX_PAIRS..config::MAX_PAIRS + 2]
            .copy_from_slice(&options.queue_pairs.to_le_bytes());
        let mtu = options.mtu.unwrap_or(0);
        space[config::MTU..config::MTU + 2].copy_from_slice(&mtu.to_le_bytes());
        let shared = Arc::new(Shared {
            backend,
            max_pairs: options.queue_pairs,
            mac: options.mac,
            events: Mutex::new(None),
            pairs: Mutex::default(),
            plugged_in: AtomicBool::new(true),
            link_up: AtomicBool::new(true),
            config: Mutex::new(space),
            features: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            active_pairs: AtomicU16::new(1),
            filter: RwLock::new(RxFilter::open(options.mac)),
        });
        shared.clear();
        shared.follow_link(false);
        shared.update_link();
        let mut pairs = Vec::new();
        for (number, link) in (0..).zip(links) {
            let pair = Pair::new(number, shared.clone(), link);
            let worker = Worker::start(&format!("virtio-net{number}"), pair)
                .map_err(|e| NetError::os("can't start a network card's thread", e))?;
            shared.pairs.lock().push(worker.handle().clone());
            pairs.push(worker);
        }
        let handle = NetHandle(shared.clone());
        let device = Self {
            options,
            shared,
            pairs,
        };
        Ok((device, handle))
    }

    /// Which pair's thread serves a queue, and as what.
    fn place(&self, index: u16, features: u64) -> (usize, u16) {
        // Without MQ the control queue comes behind the one pair (section 5.1.2).
        let pairs = if features & feature::MQ != 0 {
            self.options.queue_pairs
        } else {
            1
        };
        if index >= 2 * pairs {
            (0, 2)
        } else {
            (usize::from(index / 2), index % 2)
        }
    }

    fn start(&self, queue: ActiveQueue, features: u64) {
        let (pair, role) = self.place(queue.queue.index(), features);
        if let Some(worker) = self.pairs.get(pair) {
            worker.call(move |pair| pair.start(role, queue));
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.options.queue_size; 2 * usize::from(self.options.queue_pairs)];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn features(&self) -> u64 {
        let mut features = feature::MAC
            | feature::MRG_RXBUF
            | feature::STATUS
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_VLAN
            | feature::CTRL_RX_EXTRA
            | feature::CTRL_MAC_ADDR
            | feature::GUEST_ANNOUNCE
            | host_features(self.shared.backend.transmit_offloads().consistent());
        let receive = self.shared.backend.receive_offloads().consistent();
        for (offload, bit) in GUEST_OFFLOADS {
            if receive.contains(offload) {
                features |= bit | feature::CTRL_GUEST_OFFLOADS;
            }
        }
        if self.options.mtu.is_some() {
            features |= feature::MTU;
        }
        if self.options.queue_pairs > 1 {
            features |= feature::MQ;
        }
        features
    }

    fn accepts(&self, features: u64) -> bool {
        DEPENDENCIES
            .iter()
            .all(|(these, need)| features & these == 0 || features & need != 0)
    }

    fn connect(&mut self, events: Arc<dyn DeviceEvents>) {
        *self.shared.events.lock() = Some(events);
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_space(&*self.shared.config.lock(), offset, data);
    }

    fn write_config(&mut self, _: usize, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        let features = activation.features;
        self.shared.features.store(features, Ordering::Release);
        if features & feature::CTRL_VLAN != 0 {
            self.shared.filter.write().vlans = Some(Box::new([0; 64]));
        }
        // A link that refuses is broken, which its queues will tell.
        let _ = self.shared.accept(guest_offloads(features));
        for queue in activation.queues {
            self.start(queue, features);
        }
    }

    fn start_queue(&mut self, queue: ActiveQueue) {
        let features = self.shared.features.load(Ordering::Acquire);
        self.start(queue, features);
    }

    fn stop_queue(&mut self, index: u16) {
        let features = self.shared.features.load(Ordering::Acquire);
        let (pair, role) = self.place(index, features);
        if let Some(worker) = self.pairs.get(pair) {
            worker.call(move |pair| pair.stop(role));
        }
    }

    fn reset(&mut self) {
        for worker in &self.pairs {
            worker.call(|pair| (0..3).for_each(|role| pair.stop(role)));
        }
        self.shared.clear();
    }
}
