//! The AHCI controller as a guest sees it: registers, command lists with anything in them, commands that are nearly right.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::executor::{EngineKind, IoThread};
use block::{Disk, DiskOptions, MemoryMedium, RawBackend};
use device_model::{Device, IoBus, IrqPin, ResetKind};
use pci::{Devfn, Fabric, PciBus, PciHandle, config_write};
use storage_controllers::ahci::spec::*;
use storage_controllers::ahci::{Ahci, AtaDisk};

use crate::input::Input;
use crate::registers::{Ends, Memory, RAM, ROM, TOP, access};

const REGISTERS: u64 = 0xe000_0000;
/// The command list of port 0; port 1's is behind it.
const LISTS: u64 = 0x1000;
/// Where FISes are received.
const RECEIVED: u64 = 0x3000;
const TABLES: u64 = 0x1_0000;
const DATA: u64 = 0x4_0000;
const DATA_SIZE: u64 = 0x4_0000;
/// Bytes of each disk.
const DISK: usize = 1 << 20;

/// Commands that the disk knows, the queued ones more than once.
const COMMANDS: [u8; 36] = [
    0x06, 0x20, 0x24, 0x25, 0x27, 0x29, 0x2f, 0x30, 0x34, 0x35, 0x39, 0x3d, 0x40, 0x42, 0x60, 0x60,
    0x60, 0x61, 0x61, 0x61, 0x91, 0xc4, 0xc5, 0xc6, 0xc8, 0xca, 0xe0, 0xe3, 0xe5, 0xe7, 0xea, 0xec,
    0xef, 0xf8, 0xa1, 0xff,
];

struct Guest {
    memory: Memory,
    bus: IoBus,
    ahci: Arc<Ahci>,
    _handle: PciHandle,
}

fn disk(read_only: bool) -> AtaDisk {
    let thread = IoThread::start("disk", EngineKind::Threads).expect("a thread");
    AtaDisk::new(thread, "SERIAL", move || async move {
        let medium = MemoryMedium::new(DISK).with_limit(DISK as u64);
        let backend = RawBackend::open(Rc::new(medium)).await?;
        let options = DiskOptions {
            read_only,
            discard: true,
            ..DiskOptions::default()
        };
        Ok(Disk::new(Rc::new(backend), options))
    })
    .expect("a disk")
}

impl Guest {
    fn new() -> Self {
        let (memory, bus) = (Memory::new(), IoBus::memory());
        let disks = vec![Some(disk(false)), Some(disk(true))];
        let ahci = Ahci::new("ahci", &memory.map, disks);
        let ends = Arc::new(Ends::default());
        let pin = IrqPin::new(ends.clone(), 0);
        let fabric = Fabric {
            ports: IoBus::ports(),
            memory: bus.clone(),
            msi: ends,
        };
        let root = PciBus::root(fabric, Arc::new(move |_, _| pin.clone()));
        let handle = root.add(Devfn::new(31, 2), ahci.clone());
        let guest = Self {
            memory,
            bus,
            ahci,
            _handle: handle.expect("a free slot"),
        };
        guest.start();
        guest
    }

    fn put(&self, offset: u64, value: u32) {
        self.bus.write(REGISTERS + offset, &value.to_le_bytes());
    }

    fn put_port(&self, port: u64, register: u64, value: u32) {
        self.put(PORT_BASE + port * PORT_STRIDE + register, value);
    }

    /// Puts the registers where we look for them.
    fn map(&self) {
        config_write(&*self.ahci, 0x24, &(REGISTERS as u32).to_le_bytes());
        config_write(&*self.ahci, 0x04, &[6, 0]);
    }

    /// As a driver leaves it.
    fn start(&self) {
        self.map();
        self.put(GHC, GHC_AE | GHC_IE);
        for port in 0..2 {
            self.restart(port);
        }
    }

    fn restart(&self, port: u64) {
        self.put_port(port, PX_CMD, 0);
        self.put_port(port, PX_CLB, (LISTS + port * 0x400) as u32);
        self.put_port(port, PX_CLBU, 0);
        self.put_port(port, PX_FB, (RECEIVED + port * 0x100) as u32);
        self.put_port(port, PX_FBU, 0);
        self.put_port(port, PX_SERR, u32::MAX);
        self.put_port(port, PX_IE, u32::MAX);
        self.put_port(port, PX_CMD, CMD_FRE | CMD_ST);
    }

    fn address(input: &mut Input<'_>) -> u64 {
        match input.byte() {
            0..4 => input.number(),
            4 => RAM - input.word(1),
            5 => ROM + input.word(1),
            6 => TOP + 0x1000 - input.word(1),
            _ => DATA + input.below(DATA_SIZE),
        }
    }

    fn get_port(&self, port: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        let at = PORT_BASE + port * PORT_STRIDE + register;
        self.bus.read(REGISTERS + at, &mut data);
        u32::from_le_bytes(data)
    }

    /// The registers of a command, on sectors that are there, mostly.
    fn fis(command: u8, count: u8, wild: bool, input: &mut Input<'_>) -> [u8; 20] {
        let sector = match wild {
            true => input.number(),
            false => input.below(2040),
        };
        let [l0, l1, l2, l3, ..] = sector.to_le_bytes();
        let mut fis = [0; 20];
        fis[..4].copy_from_slice(&[FIS_H2D, FIS_COMMAND, command, count]);
        fis[4..8].copy_from_slice(&[l0, l1, l2, 0x40 | (input.byte() & 0x80)]);
        (fis[8], fis[12]) = (l3, count);
        match command {
            // Trim; settings; the log of queued errors.
            0x06 => fis[3] = 1,
            0xef => fis[3] = input.pick(&[0x02, 0x03, 0x55, 0x82, 0xaa, 0x66]),
            0x2f => (fis[4], fis[12]) = (0x10, 1),
            // The count of queued commands is in the features.
            0x60 | 0x61 => fis[12] = 0,
            _ => {}
        }
        if wild && input.byte() & 1 != 0 {
            let at = input.below(20) as usize;
            for (to, from) in fis[at..].iter_mut().zip(input.bytes(4)) {
                *to = *from;
            }
        }
        fis
    }

    /// Says where a command's data is, in some number of pieces; returns how many. A driver's are enough for `bytes`.
    fn pieces(&self, table: u64, bytes: u32, wild: bool, input: &mut Input<'_>) -> u64 {
        let mut number = 0;
        let mut left = bytes;
        while left > 0 && number < 6 {
            let length = match input.byte() {
                0..64 if wild => input.number() as u32,
                how @ 200.. if number < 5 => left.min(u32::from(how)),
                _ => left,
            };
            let address = match wild {
                true => Self::address(input),
                false => DATA + input.below(DATA_SIZE),
            };
            let mut entry = address.to_le_bytes().to_vec();
            entry.extend([0; 4]);
            entry.extend(length.wrapping_sub(1).to_le_bytes());
            self.memory.put(table + PRDT + 16 * number, &entry);
            left = left.saturating_sub(length);
            number += 1;
        }
        number
    }

    /// Puts a command into a slot and issues it.
    fn command(&self, input: &mut Input<'_>) {
        let port = u64::from(input.byte() & 1);
        // As a driver would, mostly: what has failed is stopped first.
        if self.get_port(port, PX_TFD) & 1 != 0 && input.byte() & 3 != 0 {
            self.restart(port);
        }
        let wild = input.one_in(16);
        let slot = u64::from(input.byte() & 31);
        let table = TABLES + (port * 32 + slot) * 0x200;
        let command = input.pick(&COMMANDS);
        let count = match input.byte() {
            0..8 => 255,
            how => 1 + (how & 7),
        };
        let fis = Self::fis(command, count, wild, input);
        self.memory.put(table, &fis);
        if command == 0x06 {
            // Ranges to trim, where the data is taken from.
            let range = input.below(2000) | input.below(40) << 48;
            self.memory
                .put(DATA + input.below(DATA_SIZE), &range.to_le_bytes());
        }
        let bytes = 512 * u32::from(count.max(1));
        let pieces = self.pieces(table, bytes, wild, input);
        let pieces = if wild && input.byte() & 7 == 0 {
            0xffff
        } else {
            pieces
        };
        let mut header = (5 | (pieces as u32) << 16).to_le_bytes().to_vec();
        header.extend([0; 4]);
        let elsewhere = (wild && input.byte() & 3 == 0).then(|| Self::address(input));
        header.extend(elsewhere.unwrap_or(table).to_le_bytes());
        let list = LISTS + port * 0x400;
        self.memory.put(list + slot * HEADER_SIZE, &header);
        if matches!(command, 0x60 | 0x61) && !(wild && input.byte() & 1 != 0) {
            self.put_port(port, PX_SACT, 1 << slot);
        }
        self.put_port(port, PX_CI, 1 << slot);
    }

    fn step(&self, input: &mut Input<'_>) {
        let port = u64::from(input.byte() & 1);
        match input.byte() {
            0..128 => self.command(input),
            128..152 => {
                let register = 4 * input.below(16);
                let value = match input.byte() & 1 {
                    0 => input.number() as u32,
                    _ => input.below(0x8_0000) as u32,
                };
                self.put_port(port, register, value);
            }
            152..164 => {
                access(&self.bus, &self.bus.regions(), input);
            }
            164..172 => {
                let at = u16::from(input.byte());
                config_write(&*self.ahci, at, &input.number().to_le_bytes()[..4]);
                self.map();
            }
            172..188 => {
                let at = LISTS + input.below(0x800);
                self.memory.put(at, &input.number().to_le_bytes());
            }
            188..200 => std::thread::sleep(Duration::from_micros(50)),
            200..208 => self.put_port(port, PX_SCTL, u32::from(input.byte() & 1)),
            208..212 => {
                self.put(GHC, GHC_HR);
                self.start();
            }
            212..215 => {
                self.ahci.reset(ResetKind::Warm);
                self.start();
            }
            _ => self.restart(port),
        }
    }
}

/// Random commands and registers. Nothing may panic or hang, and the controller writes RAM only.
pub fn commands(data: &[u8]) {
    let guest = Guest::new();
    let mut input = Input::new(data);
    while input.more() {
        guest.step(&mut input);
    }
    guest.ahci.reset(ResetKind::Cold);
    guest.memory.check();
}
