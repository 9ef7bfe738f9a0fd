//! Virtio devices as a guest sees them: registers through PCI or memory-mapped, split and packed rings with anything in
//! them, requests that are nearly right, and the host's side at the same time.

use std::io::{IoSlice, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::executor::{EngineKind, IoThread};
use block::{Disk, DiskOptions, MemoryMedium, RawBackend};
use device_model::{CharEvent, IoBus, IoRegion, IrqPin, ResetKind};
use guest_clock::GuestClock;
use network_cards::crossover::crossover;
use network_cards::offload::OffloadHeader;
use network_cards::{NetBackend, NetQueue};
use pci::{Devfn, ExpressType, Fabric, PciBus, PciDevice, PciHandle, config_write};
use virtio::balloon::{Balloon, BalloonHandle, BalloonOptions};
use virtio::blk::{Blk, BlkHandle, BlkOptions};
use virtio::console::{Console, ConsoleHandle, ConsoleOptions, NamedPort};
use virtio::device::VirtioDevice;
use virtio::net::{Net, NetHandle, NetOptions};
use virtio::rng::{RateLimit, Rng};
use virtio::spec::{Status, descriptor, feature};
use virtio::transport::spec::{common, mmio};
use virtio::transport::{MmioWiring, PciWiring, VirtioMmio, VirtioPci};
use virtio::vsock::Vsock;

use crate::input::Input;
use crate::registers::{Ends, FarEnd, Memory, RAM, ROM, TOP, access};

/// The devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A disk.
    Blk,
    /// A network card.
    Net,
    /// A console with a named port.
    Console,
    /// Entropy.
    Rng,
    /// The balloon.
    Balloon,
    /// Sockets.
    Vsock,
}

/// Where the registers are.
const REGISTERS: u64 = 0x1_0000_0000;
/// Where the MSI-X table is.
const TABLE: u64 = 0xe000_0000;
/// The first queue's rings; each queue's have a page.
const RINGS: u64 = 0x1000;
/// Entries of each queue.
const ENTRIES: u16 = 32;
/// Where in a queue's page the driver's and the device's areas are.
const DRIVER_AREA: u64 = 0x400;
const DEVICE_AREA: u64 = 0x800;
/// Requests and their data.
const DATA: u64 = 0x2_0000;
const DATA_SIZE: u64 = 0x2_0000;
/// Indirect tables.
const TABLES: u64 = 0x8_0000;
const GUEST_CID: u64 = 9;

/// The host's side of a device.
enum Host {
    Blk(BlkHandle),
    Net(NetHandle, Box<dyn NetQueue>),
    Console(ConsoleHandle, Vec<Arc<FarEnd>>),
    Rng,
    Balloon(BalloonHandle),
    Vsock {
        directory: tempfile::TempDir,
        _listener: UnixListener,
        streams: Vec<UnixStream>,
    },
}

fn disk() -> (Box<dyn VirtioDevice>, Host) {
    let thread = IoThread::start("disk", EngineKind::Threads).expect("a thread");
    let options = BlkOptions {
        queues: 2,
        ..BlkOptions::default()
    };
    let (device, handle) = Blk::new(thread, options, || async {
        let medium = Rc::new(MemoryMedium::new(1 << 20).with_limit(4 << 20));
        let backend = RawBackend::open(medium).await?;
        let options = DiskOptions {
            discard: true,
            ..DiskOptions::default()
        };
        Ok(Disk::new(Rc::new(backend), options))
    })
    .expect("a disk");
    (Box::new(device), Host::Blk(handle))
}

fn sockets() -> (Box<dyn VirtioDevice>, Host) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    let device = Vsock::new(GUEST_CID, &path).expect("a socket");
    let listener = UnixListener::bind(directory.path().join("s_1")).expect("a socket");
    let host = Host::Vsock {
        directory,
        _listener: listener,
        streams: Vec::new(),
    };
    (Box::new(device), host)
}

fn make(kind: Kind, clock: &GuestClock) -> (Box<dyn VirtioDevice>, Host) {
    match kind {
        Kind::Blk => disk(),
        Kind::Net => {
            let (near, far) = crossover().expect("a cable");
            let mut far = far.take_queues(1).expect("the only user");
            let options = NetOptions::new([2; 6]);
            let (device, handle) = Net::new(Arc::new(near), options).expect("a card");
            (Box::new(device), Host::Net(handle, far.remove(0)))
        }
        Kind::Console => {
            let ends: Vec<Arc<FarEnd>> = (0..2).map(|_| Arc::default()).collect();
            let (device, handle) = Console::new(ConsoleOptions {
                console: Some(ends[0].clone()),
                ports: vec![NamedPort {
                    name: "port".into(),
                    backend: ends[1].clone(),
                }],
            })
            .expect("a console");
            (Box::new(device), Host::Console(handle, ends))
        }
        Kind::Rng => {
            let limit = RateLimit {
                bytes: 4096,
                period: 1000,
            };
            let device = Rng::new(Some((limit, clock.clone()))).expect("a thread");
            (Box::new(device), Host::Rng)
        }
        Kind::Balloon => {
            let options = BalloonOptions {
                deflate_on_oom: true,
                free_page_reporting: true,
            };
            let (device, handle) = Balloon::new(options, clock).expect("a thread");
            (Box::new(device), Host::Balloon(handle))
        }
        Kind::Vsock => sockets(),
    }
}

/// How the guest reaches the registers.
enum Transport {
    Pci(Arc<VirtioPci>),
    Mmio(Arc<VirtioMmio>),
}

/// What keeps the device where it is.
enum Place {
    Pci { _handle: PciHandle },
    Mmio { _region: IoRegion },
}

/// What the driver knows of a queue.
#[derive(Clone, Copy, Default)]
struct Ring {
    /// The next entry of the available ring, or of the packed ring.
    next: u16,
    /// The packed ring's wrap counter, upside down.
    unwrapped: bool,
}

struct Guest {
    kind: Kind,
    memory: Memory,
    bus: IoBus,
    clock: GuestClock,
    transport: Transport,
    _place: Place,
    host: Host,
    queues: u16,
    packed: bool,
    /// Indirect tables have been negotiated.
    indirect: bool,
    rings: Vec<Ring>,
}

impl Guest {
    fn new(kind: Kind, through_pci: bool) -> Self {
        let (memory, bus, clock) = (Memory::new(), IoBus::memory(), GuestClock::stepped());
        let (device, host) = make(kind, &clock);
        let queues = device.queue_sizes().len() as u16;
        let ends = Arc::new(Ends::default());
        let (transport, place) = if through_pci {
            let wiring = PciWiring {
                memory: memory.map.clone(),
                doorbells: None,
                express: Some(ExpressType::RootIntegratedEndpoint),
                withheld: 0,
            };
            let function = VirtioPci::new("device", device, wiring).expect("a function");
            let pin = IrqPin::new(ends.clone(), 0);
            let fabric = Fabric {
                ports: IoBus::ports(),
                memory: bus.clone(),
                msi: ends,
            };
            let root = PciBus::root(fabric, Arc::new(move |_, _| pin.clone()));
            let handle = root.add(Devfn::new(1, 0), function.clone());
            let handle = handle.expect("a free slot");
            (Transport::Pci(function), Place::Pci { _handle: handle })
        } else {
            let wiring = MmioWiring {
                memory: memory.map.clone(),
                doorbells: None,
                interrupt: IrqPin::new(ends, 0).line(),
                withheld: 0,
            };
            let device = VirtioMmio::new("device", device, wiring).expect("a device");
            let region = device.attach(&bus, REGISTERS).expect("a free place");
            (Transport::Mmio(device), Place::Mmio { _region: region })
        };
        let guest = Self {
            kind,
            memory,
            bus,
            clock,
            transport,
            _place: place,
            host,
            queues,
            packed: false,
            indirect: false,
            rings: vec![Ring::default(); usize::from(queues)],
        };
        guest.map();
        guest
    }

    /// Puts a PCI function's registers where we look for them.
    fn map(&self) {
        if let Transport::Pci(function) = &self.transport {
            for (at, value) in [
                (0x14, TABLE as u32),
                (0x20, REGISTERS as u32),
                (0x24, (REGISTERS >> 32) as u32),
                (0x04, 6),
            ] {
                config_write(&**function, at, &value.to_le_bytes());
            }
        }
    }

    /// Writes a register of common configuration, by its offset there.
    fn set(&self, register: usize, size: usize, value: u64) {
        let mapped = match (&self.transport, register) {
            (Transport::Pci(..), at) => Some((at as u64, size)),
            (_, common::DRIVER_FEATURE_SELECT) => Some((mmio::DRIVER_FEATURES_SEL, 4)),
            (_, common::DRIVER_FEATURE) => Some((mmio::DRIVER_FEATURES, 4)),
            (_, common::STATUS) => Some((mmio::STATUS, 4)),
            (_, common::QUEUE_SELECT) => Some((mmio::QUEUE_SEL, 4)),
            (_, common::QUEUE_SIZE) => Some((mmio::QUEUE_NUM, 4)),
            (_, common::QUEUE_ENABLE) => Some((mmio::QUEUE_READY, 4)),
            (_, common::QUEUE_RESET) => Some((mmio::QUEUE_RESET, 4)),
            (_, common::QUEUE_DESC) => Some((mmio::QUEUE_DESC_LOW, 4)),
            (_, common::QUEUE_DRIVER) => Some((mmio::QUEUE_DRIVER_LOW, 4)),
            (_, common::QUEUE_DEVICE) => Some((mmio::QUEUE_DEVICE_LOW, 4)),
            _ => None,
        };
        if let Some((at, size)) = mapped {
            self.bus.write(REGISTERS + at, &value.to_le_bytes()[..size]);
        }
    }

    fn kick(&self, queue: u64) {
        match &self.transport {
            Transport::Pci(..) => {
                let at = REGISTERS + 0x3000 + 4 * queue;
                self.bus.write(at, &(queue as u16).to_le_bytes());
            }
            Transport::Mmio(..) => {
                let at = REGISTERS + mmio::QUEUE_NOTIFY;
                self.bus.write(at, &(queue as u32).to_le_bytes());
            }
        }
    }

    fn set_up_queue(&mut self, index: u16, size: u16) {
        let at = RINGS + u64::from(index) * 0x1000;
        self.memory.put(at, &[0; 0x1000]);
        self.rings[usize::from(index)] = Ring::default();
        self.set(common::QUEUE_SELECT, 2, index.into());
        self.set(common::QUEUE_SIZE, 2, size.into());
        self.set(common::QUEUE_DESC, 8, at);
        self.set(common::QUEUE_DRIVER, 8, at + DRIVER_AREA);
        self.set(common::QUEUE_DEVICE, 8, at + DEVICE_AREA);
        self.set(common::QUEUE_VECTOR, 2, index.into());
        self.set(common::QUEUE_ENABLE, 2, 1);
    }

    /// Resets the device, negotiates some of the features that it may have, and sets its queues up.
    fn start(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        self.packed = how & 1 != 0;
        self.indirect = how & 4 != 0;
        let own = match how >> 5 {
            0 => input.word(4),
            1 => 0,
            _ => self.features(),
        };
        self.set(common::STATUS, 1, 0);
        self.set(common::STATUS, 1, 3);
        let rings = [
            (feature::RING_PACKED, how & 1 != 0),
            (feature::EVENT_IDX, how & 2 != 0),
            (feature::INDIRECT_DESC, how & 4 != 0),
            (feature::RING_RESET, how & 8 != 0),
        ];
        let wanted = rings.iter().filter(|(_, on)| *on);
        let features = wanted.fold(own | feature::VERSION_1, |all, (bit, _)| all | bit);
        for (half, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.set(common::DRIVER_FEATURE_SELECT, 4, half);
            self.set(common::DRIVER_FEATURE, 4, value);
        }
        self.set(common::STATUS, 1, 11);
        self.set(common::CONFIG_VECTOR, 2, self.queues.into());
        for index in 0..self.queues {
            self.set_up_queue(index, ENTRIES);
        }
        self.set(common::STATUS, 1, 15);
    }

    /// The device's own features, as it offers them.
    fn features(&self) -> u64 {
        let (select, feature) = match self.transport {
            Transport::Pci(..) => (common::DEVICE_FEATURE_SELECT as u64, 4),
            Transport::Mmio(..) => (mmio::DEVICE_FEATURES_SEL, mmio::DEVICE_FEATURES),
        };
        let half = |number: u32| {
            let mut value = [0; 4];
            self.bus.write(REGISTERS + select, &number.to_le_bytes());
            self.bus.read(REGISTERS + feature, &mut value);
            u64::from(u32::from_le_bytes(value))
        };
        let rings = feature::RING_PACKED
            | feature::EVENT_IDX
            | feature::INDIRECT_DESC
            | feature::RING_RESET;
        (half(0) | half(1) << 32) & !rings
    }

    /// A request as a driver makes it: what the device reads, and how many bytes it may write. What is in it need not be
    /// right.
    fn content(&self, queue: u16, input: &mut Input<'_>) -> (Vec<u8>, u64) {
        let mut bytes = Vec::new();
        let mut writable = 0;
        match (self.kind, queue) {
            (Kind::Blk, _) => writable = disk_request(&mut bytes, input),
            (Kind::Net, 0) => writable = input.pick(&[1526, 1526, 65_562, 100, 12]),
            (Kind::Net, 1) => {
                bytes.extend([input.byte() & 7, input.pick(&[0, 0, 1, 3, 4, 5, 0x81])]);
                for _ in 0..4 {
                    bytes.extend((input.word(1) as u16).to_le_bytes());
                }
                bytes.extend([0; 2]);
                bytes.extend(frame(input));
            }
            (Kind::Net, _) => {
                writable = 1;
                bytes.extend([input.byte() % 7, input.byte() % 6]);
                if bytes[0] == 1 {
                    bytes.extend((u32::from(input.byte()) & 3).to_le_bytes());
                }
                bytes.extend(input.bytes(16));
            }
            (Kind::Console, 3) => {
                bytes.extend((u32::from(input.byte()) % 4).to_le_bytes());
                bytes.extend((u16::from(input.byte()) % 9).to_le_bytes());
                bytes.extend((u16::from(input.byte()) & 1).to_le_bytes());
            }
            (Kind::Console, 1 | 5) => {
                let count = input.word(2) as usize;
                bytes.resize(count, input.byte());
            }
            (Kind::Balloon, 0 | 1) => {
                for _ in 0..input.below(32) {
                    // Mostly pages that are there.
                    bytes.extend((input.below(0x120) as u32).to_le_bytes());
                }
                if input.one_in(8) {
                    bytes.extend((input.number() as u32).to_le_bytes());
                }
            }
            (Kind::Balloon, 2) => {
                for _ in 0..input.below(12) {
                    bytes.extend((input.word(1) as u16).to_le_bytes());
                    bytes.extend(input.number().to_le_bytes());
                }
            }
            (Kind::Vsock, 1) => socket_packet(&mut bytes, input),
            // What the device fills.
            _ => {
                writable = match input.byte() {
                    255 => input.below(46),
                    how => input.pick(&[4096, 4096, 45, 600]) + u64::from(how & 1),
                }
            }
        }
        (bytes, writable)
    }

    /// An address for a buffer: in the data, mostly.
    fn address(input: &mut Input<'_>) -> u64 {
        let near =
            |edge: u64, input: &mut Input<'_>| edge.wrapping_add(input.word(1)).wrapping_sub(128);
        match input.byte() {
            0..4 => input.number(),
            4 => near(RAM, input),
            5 => near(ROM, input),
            6 => near(ROM + 0x2000, input),
            7 => near(TOP, input),
            8 => near(TOP + 0x1000, input),
            9 => near(RINGS, input),
            _ => DATA + input.below(DATA_SIZE),
        }
    }

    fn length(input: &mut Input<'_>) -> u32 {
        match input.byte() {
            0..8 => input.number() as u32,
            8..32 => 0,
            32..96 => 512 * (1 + u32::from(input.byte() & 15)),
            96..112 => 4096,
            112..128 => 65_550,
            _ => input.word(1) as u32,
        }
    }

    /// Descriptors of a request as a driver makes it, in some number of pieces.
    fn right(&self, queue: u16, input: &mut Input<'_>) -> Vec<(u64, u32, u16)> {
        let (bytes, mut writable) = self.content(queue, input);
        let mut list = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let most = if list.len() < 3 { input.byte() } else { 0 };
            let cut = match usize::from(most) {
                0..128 => rest.len(),
                cut => (cut - 127).min(rest.len()),
            };
            let at = DATA + input.below(DATA_SIZE);
            let (piece, behind) = rest.split_at(cut);
            self.memory.put(at, piece);
            list.push((at, cut as u32, 0));
            rest = behind;
        }
        while writable > 0 {
            let most = if list.len() < 6 { input.byte() } else { 0 };
            let cut = match u64::from(most) {
                0..128 => writable,
                cut => (cut - 127).min(writable),
            };
            let at = DATA + input.below(DATA_SIZE);
            list.push((at, cut as u32, descriptor::WRITE));
            writable -= cut;
        }
        if list.is_empty() {
            list.push((DATA, 0, 0));
        }
        list
    }

    /// Descriptors of any kind, readable before writable, mostly.
    fn wild(&self, queue: u16, input: &mut Input<'_>) -> Vec<(u64, u32, u16)> {
        let (bytes, _) = self.content(queue, input);
        let mut list = Vec::new();
        let mut writable = bytes.is_empty() || input.one_in(3);
        if !writable {
            let at = DATA + input.below(DATA_SIZE);
            self.memory.put(at, &bytes);
            let len = (bytes.len() as u32).wrapping_add(u32::from(input.byte() & 7 == 1));
            list.push((at, len, 0));
        }
        for _ in 0..1 + input.below(4) {
            writable |= input.byte() & 1 != 0;
            writable &= !input.one_in(8);
            let flags = if writable { descriptor::WRITE } else { 0 };
            list.push((Self::address(input), Self::length(input), flags));
        }
        // Where the status goes.
        list.push((DATA + input.below(DATA_SIZE), 1, descriptor::WRITE));
        list
    }

    fn encode(&self, (address, length, flags): (u64, u32, u16), next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        // The packed format has an identifier where the split one has flags.
        let (third, fourth) = if self.packed {
            (next, flags)
        } else {
            (flags, next)
        };
        bytes[12..14].copy_from_slice(&third.to_le_bytes());
        bytes[14..].copy_from_slice(&fourth.to_le_bytes());
        bytes
    }

    /// Puts an indirect table into memory; returns the descriptor that names it.
    fn table(&self, list: &[(u64, u32, u16)], input: &mut Input<'_>) -> (u64, u32, u16) {
        let at = TABLES + 16 * input.below(64);
        for (i, (address, length, flags)) in list.iter().enumerate() {
            let more = i + 1 < list.len() && !self.packed;
            let flags = flags | if more { descriptor::NEXT } else { 0 };
            let bytes = self.encode((*address, *length, flags), i as u16 + 1);
            self.memory.put(at + 16 * i as u64, &bytes);
        }
        let length = 16 * list.len() as u32;
        let wild = input.one_in(20).then(|| input.number() as u32);
        (at, wild.unwrap_or(length), descriptor::INDIRECT)
    }

    /// True once a queue has failed: nothing is done any more until a reset.
    fn has_failed(&self) -> bool {
        let status = match &self.transport {
            Transport::Pci(function) => function.status(),
            Transport::Mmio(device) => device.status(),
        };
        status.status.contains(Status::DEVICE_NEEDS_RESET)
    }

    /// Makes a request available.
    fn request(&mut self, input: &mut Input<'_>) {
        // As a driver would, mostly.
        if self.has_failed() && input.byte() & 3 != 0 {
            self.start(input);
        }
        let queue = input.below(u64::from(self.queues)) as u16;
        let wild = input.one_in(16);
        let mut list = if wild {
            self.wild(queue, input)
        } else {
            self.right(queue, input)
        };
        let table = input.byte();
        if (self.indirect && table & 1 != 0) || table == u8::MAX {
            let table = self.table(&list, input);
            list = vec![table];
        }
        let at = RINGS + u64::from(queue) * 0x1000;
        if self.packed {
            self.add_packed((queue, at), &list, wild, input);
        } else {
            self.add_split((queue, at), &list, wild, input);
        }
        self.kick(queue.into());
    }

    fn add_split(
        &mut self,
        (queue, at): (u16, u64),
        list: &[(u64, u32, u16)],
        wild: bool,
        input: &mut Input<'_>,
    ) {
        let ring = &mut self.rings[usize::from(queue)];
        // Chains of up to seven, each where no other is, as long as the device keeps up.
        let first = ring.next.wrapping_mul(7);
        let slot = |i: usize| (first.wrapping_add(i as u16)) % ENTRIES;
        let entry = ring.next % ENTRIES;
        ring.next = ring.next.wrapping_add(1);
        let index = ring.next;
        for (i, (address, length, flags)) in list.iter().enumerate() {
            let more = if i + 1 < list.len() {
                descriptor::NEXT
            } else {
                0
            };
            let damage = (wild && input.one_in(4)).then(|| (input.word(2), input.word(2)));
            let (next, extra) = damage.unwrap_or((u64::from(slot(i + 1)), 0));
            let flags = flags | more | extra as u16;
            let bytes = self.encode((*address, *length, flags), next as u16);
            self.memory.put(at + 16 * u64::from(slot(i)), &bytes);
        }
        let available = at + DRIVER_AREA;
        let head = slot(0).to_le_bytes();
        self.memory.put(available + 4 + 2 * u64::from(entry), &head);
        self.memory.put(available + 2, &index.to_le_bytes());
    }

    fn add_packed(
        &mut self,
        (queue, at): (u16, u64),
        list: &[(u64, u32, u16)],
        wild: bool,
        input: &mut Input<'_>,
    ) {
        let mut ring = self.rings[usize::from(queue)];
        let first = ring;
        let mut first_flags = [0; 2];
        for (i, (address, length, flags)) in list.iter().enumerate() {
            let mut flags = *flags;
            if i + 1 < list.len() {
                flags |= descriptor::NEXT;
            }
            if wild && input.one_in(4) {
                flags ^= input.word(2) as u16;
            }
            flags |= if ring.unwrapped {
                descriptor::USED
            } else {
                descriptor::AVAIL
            };
            let bytes = self.encode((*address, *length, flags), first.next);
            let place = at + 16 * u64::from(ring.next);
            if i == 0 {
                // Shown last.
                first_flags = [bytes[14], bytes[15]];
                self.memory.put(place, &bytes[..14]);
            } else {
                self.memory.put(place, &bytes);
            }
            ring.next += 1;
            if ring.next == ENTRIES {
                ring.next = 0;
                ring.unwrapped = !ring.unwrapped;
            }
        }
        self.memory
            .put(at + 16 * u64::from(first.next) + 14, &first_flags);
        self.rings[usize::from(queue)] = ring;
    }

    /// The host's side does something.
    fn outside(&mut self, input: &mut Input<'_>) {
        match &mut self.host {
            Host::Blk(handle) => {
                if input.one_in(2) {
                    let _ = handle.resize(512 * u64::from(input.byte()));
                } else {
                    let _ = handle.flush();
                }
            }
            Host::Net(handle, far) => match input.byte() {
                0..16 => handle.set_link(input.byte() & 1 != 0),
                16..24 => handle.announce(),
                _ => {
                    let frame = frame(input);
                    let _ = far.transmit(&OffloadHeader::default(), &[IoSlice::new(&frame)]);
                    let _ = far.process();
                }
            },
            Host::Console(handle, ends) => {
                let end = &ends[usize::from(input.byte() & 1)];
                end.set_room(input.byte().into());
                match (input.byte() & 7, end.frontend()) {
                    (0, _) => handle.resize(input.word(1) as u16, input.word(2) as u16),
                    (1, Some(port)) => {
                        port.event(input.pick(&[CharEvent::Opened, CharEvent::Closed]));
                    }
                    (2, Some(port)) => port.writable(),
                    (_, Some(port)) => {
                        let count = usize::from(input.byte());
                        port.receive(input.bytes(count));
                    }
                    _ => {}
                }
            }
            Host::Rng => {}
            Host::Balloon(handle) => match input.byte() & 3 {
                0 => handle.set_target(input.number()),
                1 => handle.poll_statistics(input.word(2)),
                _ => drop(handle.statistics()),
            },
            Host::Vsock {
                directory, streams, ..
            } => {
                if input.one_in(2) || streams.is_empty() {
                    let stream = UnixStream::connect(directory.path().join("s"));
                    if let Some(mut stream) = stream.ok().filter(|_| streams.len() < 8) {
                        let _ = stream.set_nonblocking(true);
                        let _ = writeln!(stream, "CONNECT {}", input.byte() & 3);
                        streams.push(stream);
                    }
                    return;
                }
                let at = input.below(streams.len() as u64) as usize;
                if input.one_in(3) {
                    streams.swap_remove(at);
                } else {
                    let count = usize::from(input.byte());
                    let _ = streams[at].write(input.bytes(count));
                }
            }
        }
    }

    /// Any access to configuration space, and what it means for where the registers are undone.
    fn configure(&self, input: &mut Input<'_>) {
        if let Transport::Pci(function) = &self.transport {
            let at = u16::from(input.byte());
            let size = usize::from(input.byte() & 3) + 1;
            let data = input.number().to_le_bytes();
            config_write(&**function, at, &data[..size]);
            function.config_read(at, &mut [0; 4][..size]);
            self.map();
        }
    }

    fn reset(&self) {
        match &self.transport {
            Transport::Pci(function) => {
                device_model::Device::reset(&**function, ResetKind::Warm);
                self.map();
            }
            Transport::Mmio(device) => device_model::Device::reset(&**device, ResetKind::Warm),
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() {
            0..128 => self.request(input),
            128..150 => self.outside(input),
            150..164 => {
                access(&self.bus, &self.bus.regions(), input);
            }
            164..176 => self.configure(input),
            176..184 => {
                // A wild word in a ring.
                let at = RINGS + input.below(u64::from(self.queues) * 0x1000);
                self.memory.put(at, &input.number().to_le_bytes()[..2]);
                self.kick(input.below(u64::from(self.queues) + 2));
            }
            184..196 => {
                // The device's own configuration.
                let (pci, mmio) = (0x2000, mmio::CONFIG);
                let through_pci = matches!(self.transport, Transport::Pci(..));
                let base = REGISTERS + if through_pci { pci } else { mmio };
                let at = base + u64::from(input.byte() & 63);
                let size = input.pick(&[1, 2, 4, 8]);
                self.bus.write(at, &input.number().to_le_bytes()[..size]);
                self.bus.read(at, &mut [0; 8][..size]);
            }
            196..208 => {
                let queue = input.below(u64::from(self.queues)) as u16;
                self.set(common::QUEUE_SELECT, 2, queue.into());
                self.set(common::QUEUE_RESET, 2, 1);
                if input.byte() & 1 != 0 {
                    self.set_up_queue(queue, input.pick(&[1, 2, 4, 8, 16, ENTRIES]));
                }
            }
            208..212 => {
                // A queue that is anywhere.
                let queue = input.below(u64::from(self.queues));
                self.set(common::QUEUE_SELECT, 2, queue);
                self.set(common::QUEUE_RESET, 2, 1);
                self.set(common::QUEUE_SIZE, 2, input.number());
                for register in [
                    common::QUEUE_DESC,
                    common::QUEUE_DRIVER,
                    common::QUEUE_DEVICE,
                ] {
                    self.set(register, 8, Self::address(input) & !15);
                }
                self.set(common::QUEUE_ENABLE, 2, 1);
                self.kick(queue);
            }
            212..240 => {
                // Gives the device's threads a moment.
                std::thread::sleep(Duration::from_micros(50));
                self.clock.advance(input.word(2), 100);
            }
            240..244 => self.reset(),
            _ => self.start(input),
        }
    }
}

/// What the device reads of a disk request; returns what it may write.
fn disk_request(bytes: &mut Vec<u8>, input: &mut Input<'_>) -> u64 {
    let kind = input.pick(&[0, 0, 1, 1, 4, 8, 11, 13, 13, 2]);
    bytes.extend(u32::to_le_bytes(kind));
    bytes.extend([0; 4]);
    let sector = match input.byte() {
        0..16 => input.number(),
        _ => input.below(2100),
    };
    bytes.extend(sector.to_le_bytes());
    let data = 512 * (input.below(9));
    match kind {
        0 => data + 1,
        1 => {
            bytes.resize(16 + data as usize, input.byte());
            1
        }
        8 => 21,
        11 | 13 => {
            for _ in 0..1 + input.below(3) {
                bytes.extend(input.below(2100).to_le_bytes());
                bytes.extend((input.below(300) as u32).to_le_bytes());
                bytes.extend(u32::from(input.byte() & 1).to_le_bytes());
            }
            1
        }
        _ => 1,
    }
}

/// A packet of a guest's socket, with its data.
fn socket_packet(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    let ours = !input.one_in(30);
    bytes.extend((if ours { GUEST_CID } else { 2 }).to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(u32::from(input.byte() & 3).to_le_bytes());
    // The listener's port, one without a listener, and those that host programs get.
    let ports = [1, 1, 1, 2, 1 << 30, (1 << 30) + 1, input.byte().into()];
    bytes.extend(u32::to_le_bytes(input.pick(&ports)));
    let data = match input.byte() {
        0..128 => 0,
        128..250 => u32::from(input.byte()),
        _ => 70_000,
    };
    bytes.extend(data.to_le_bytes());
    let op = input.pick(&[1, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 0]);
    bytes.extend([1, 0, op, 0]);
    bytes.extend((u32::from(input.byte()) & 3).to_le_bytes());
    let credit = match input.byte() {
        0..32 => input.number() as u32,
        _ => 1 << 16,
    };
    bytes.extend(credit.to_le_bytes());
    bytes.extend(u32::from(input.byte()).to_le_bytes());
    bytes.resize(bytes.len() + data as usize, 5);
}

/// An Ethernet frame, or the start of one.
fn frame(input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = vec![2; 6];
    bytes.extend([2, 0, 0, 0, 0, 1]);
    let kinds: [[u8; 2]; 5] = [[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0], [0xff, 0xff]];
    bytes.extend(input.pick(&kinds));
    let count = usize::from(input.byte());
    bytes.extend(input.bytes(count));
    bytes.resize(bytes.len().max(60), 0);
    bytes.truncate(14 + count);
    bytes
}

/// Drives a device of a kind; the first byte says how it is reached. Nothing may panic or hang, a device writes RAM only,
/// and it can always be reset.
pub fn device(kind: Kind, data: &[u8]) {
    let mut input = Input::new(data);
    let mut guest = Guest::new(kind, input.byte() & 3 != 0);
    guest.start(&mut input);
    while input.more() {
        guest.step(&mut input);
    }
    guest.set(common::STATUS, 1, 0);
    guest.memory.check();
}
