//! The controller as a driver uses it.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::executor::{EngineKind, IoThread};
use block::{Disk, DiskOptions, MemoryMedium, RawBackend};
use device_model::{Device, IoBus, IrqPin, IrqSink, MsiSink, ResetKind};
use guest_memory::{BackingOptions, GuestMemory};
use pci::{Devfn, Fabric, PciBus, PciHandle, RootWindows, assign};

use super::spec::*;
use super::*;
use crate::ata::spec::*;

#[derive(Default)]
struct Irqs(AtomicUsize);
impl IrqSink for Irqs {
    fn set_level(&self, _pin: u32, high: bool) {
        if high {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}
impl MsiSink for Irqs {
    fn send(&self, _address: u64, _data: u32) {}
}

const DISK: usize = 1 << 20;
const LIST: u64 = 0x1000;
const RECEIVED: u64 = 0x2000;
const TABLES: u64 = 0x4000;
const DATA: u64 = 0x10_0000;

struct Bench {
    memory: GuestMemory,
    io: IoBus,
    ahci: Arc<Ahci>,
    base: u64,
    irqs: Arc<Irqs>,
    _handle: PciHandle,
}

fn disk(read_only: bool) -> AtaDisk {
    let thread = IoThread::start("disk", EngineKind::Threads).unwrap();
    AtaDisk::new(thread, "SERIAL42", move || async move {
        let bytes: Vec<u8> = (0..DISK).map(|n| (n / 512) as u8).collect();
        let backend = RawBackend::open(Rc::new(MemoryMedium::from_vec(bytes))).await?;
        let options = DiskOptions {
            read_only,
            discard: true,
            ..Default::default()
        };
        Ok(Disk::new(Rc::new(backend), options))
    })
    .unwrap()
}

fn bench(read_only: bool) -> Bench {
    let memory = GuestMemory::new();
    memory
        .add_ram(0, 4 << 20, BackingOptions::default())
        .unwrap();
    let ahci = Ahci::new("ahci", &memory, vec![Some(disk(read_only))]);
    let irqs = Arc::new(Irqs::default());
    let io = IoBus::memory();
    let fabric = Fabric {
        ports: IoBus::ports(),
        memory: io.clone(),
        msi: irqs.clone(),
    };
    let pin = IrqPin::new(irqs.clone(), 0);
    let bus = PciBus::root(fabric, Arc::new(move |_, _| pin.clone()));
    let handle = bus.add(Devfn::new(31, 2), ahci.clone()).unwrap();
    let windows = RootWindows {
        io: 0xc000..0xd000,
        memory32: 0xc000_0000..0xd000_0000,
        memory64: 0..0,
    };
    assign(&bus, &windows).unwrap();
    pci::config_write(ahci.as_ref(), 4, &[6, 0]);
    let base = ahci.function().bar_address(ABAR).unwrap();
    let bench = Bench {
        memory,
        io,
        ahci,
        base,
        irqs,
        _handle: handle,
    };
    bench.put(GHC, GHC_AE | GHC_IE);
    bench.put_port(PX_CLB, LIST as u32);
    bench.put_port(PX_FB, RECEIVED as u32);
    bench.put_port(PX_SERR, u32::MAX);
    bench.put_port(PX_CMD, CMD_FRE | CMD_ST);
    bench.put_port(PX_IE, 0x7dc0_007f);
    bench
}

impl Bench {
    fn put(&self, offset: u64, value: u32) {
        self.io.write(self.base + offset, &value.to_le_bytes());
    }
    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.io.read(self.base + offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn put_port(&self, register: u64, value: u32) {
        self.put(PORT_BASE + register, value);
    }
    fn get_port(&self, register: u64) -> u32 {
        self.get(PORT_BASE + register)
    }

    /// Puts a command into a slot, its data in pieces of 1000 bytes and the rest.
    fn prepare(&self, slot: u64, command: u8, lba: u64, count: u16, features: u16, bytes: u32) {
        let table = TABLES + slot * 0x400;
        let mut pieces = Vec::new();
        let mut at = DATA + slot * 0x2_0000;
        let mut left = bytes;
        while left > 0 {
            let len = if pieces.len() < 3 {
                left.min(1000)
            } else {
                left
            };
            pieces.push((at, len));
            at += u64::from(len);
            left -= len;
        }
        let mut header = (5u32 | (pieces.len() as u32) << 16).to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(table.to_le_bytes());
        self.memory.write(LIST + slot * 32, &header).unwrap();
        let l = lba.to_le_bytes();
        let [c0, c1] = count.to_le_bytes();
        let [f0, f1] = features.to_le_bytes();
        let fis = [
            FIS_H2D,
            FIS_COMMAND,
            command,
            f0,
            l[0],
            l[1],
            l[2],
            0x40,
            l[3],
            l[4],
            l[5],
            f1,
            c0,
            c1,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        self.memory.write(table, &fis).unwrap();
        for (n, (at, len)) in pieces.iter().enumerate() {
            let mut entry = at.to_le_bytes().to_vec();
            entry.extend([0; 4]);
            entry.extend((len - 1).to_le_bytes());
            let place = table + PRDT + 16 * n as u64;
            self.memory.write(place, &entry).unwrap();
        }
    }

    fn wait(&self, done: impl Fn() -> bool) {
        for _ in 0..5_000 {
            if done() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("no end of the command: {:#x}", self.get_port(PX_TFD));
    }

    fn run(&self, command: u8, lba: u64, count: u16, bytes: u32) -> u32 {
        self.prepare(0, command, lba, count, 0, bytes);
        self.put_port(PX_IS, u32::MAX);
        self.put_port(PX_CI, 1);
        self.wait(|| self.get_port(PX_IS) & (IS_DHRS | IS_PSS | IS_HBFS) != 0);
        self.get_port(PX_TFD)
    }

    fn data(&self, slot: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read(DATA + slot * 0x2_0000, &mut data).unwrap();
        data
    }
}

#[test]
fn the_disk_is_there_and_says_who_it_is() {
    let b = bench(false);
    assert_eq!(b.get(CAP), 0xc134_1f05);
    assert_eq!(b.get_port(PX_SSTS), SSTS_PRESENT);
    assert_eq!(b.get_port(PX_SIG), SIG_ATA);
    assert_eq!(b.get(PORT_BASE + PORT_STRIDE + PX_SSTS), 0);
    assert_eq!(b.run(IDENTIFY_DEVICE, 0, 0, 512), 0x50);
    assert_eq!(b.get_port(PX_CI), 0);
    let data = b.data(0, 512);
    assert_eq!(&data[20..28], b"ESIRLA24");
    assert_eq!(data[120..124], 2048u32.to_le_bytes());
    assert!(b.irqs.0.load(Ordering::SeqCst) > 0);
    assert_eq!(b.get(IS), 1);
}

#[test]
fn data_goes_both_ways() {
    let b = bench(false);
    assert_eq!(b.run(READ_DMA_EXT, 7, 20, 20 * 512), 0x50);
    let expected: Vec<u8> = (7 * 512..27 * 512).map(|n| (n / 512) as u8).collect();
    assert_eq!(b.data(0, 20 * 512), expected);
    let mut count = [0; 4];
    b.memory.read(LIST + 4, &mut count).unwrap();
    assert_eq!(u32::from_le_bytes(count), 20 * 512);

    b.memory.write(DATA, &[0xa5; 8 * 512]).unwrap();
    assert_eq!(b.run(WRITE_DMA_FUA_EXT, 100, 8, 8 * 512), 0x50);
    assert_eq!(b.run(FLUSH_CACHE_EXT, 0, 0, 0), 0x50);
    assert_eq!(b.run(READ_SECTORS_EXT, 99, 2, 1024), 0x50);
    assert_eq!(b.data(0, 1024), [[99; 512], [0xa5; 512]].concat());
}

#[test]
fn queued_commands_run_together() {
    let b = bench(false);
    for slot in 0..4 {
        b.prepare(
            slot,
            READ_FPDMA_QUEUED,
            10 * slot,
            (slot as u16) << 3,
            2,
            1024,
        );
    }
    b.put_port(PX_SACT, 0xf);
    b.put_port(PX_CI, 0xf);
    b.wait(|| b.get_port(PX_SACT) == 0);
    assert_eq!(b.get_port(PX_CI), 0);
    for slot in 0..4u64 {
        assert_eq!(b.data(slot, 1024)[600], 10 * slot as u8 + 1);
    }
    assert_ne!(b.get_port(PX_IS) & IS_SDBS, 0);
}

/// However fast the guest issues commands and gives them up, and however slow the disk is, there are no more tasks than slots.
#[test]
fn commands_do_not_pile_up_behind_a_slow_disk() {
    let b = bench(false);
    let (release, held) = std::sync::mpsc::channel::<()>();
    b.ahci._disks[0].link.spawn(move |_| async move {
        let _ = held.recv();
    });
    let tasks = || b.ahci.ports[0].tasks();
    b.prepare(0, READ_FPDMA_QUEUED, 0, 0, 2, 1024);
    b.put_port(PX_SACT, 1);
    b.put_port(PX_CI, 1);
    assert_eq!(tasks(), 1);
    // The same tag again.
    b.put_port(PX_CI, 1);
    assert_eq!(b.get_port(PX_TFD) >> 8, u32::from(ERROR_ABORT));
    for _ in 0..100 {
        b.put_port(PX_CMD, CMD_FRE);
        b.put_port(PX_CMD, CMD_FRE | CMD_ST);
        b.put_port(PX_SACT, 1);
        b.put_port(PX_CI, 1);
        assert_eq!(tasks(), 1);
    }
    drop(release);
    b.wait(|| b.get_port(PX_SACT) == 0);
    b.wait(|| tasks() == 0);
    assert_eq!(b.get_port(PX_CI), 0);
}

#[test]
fn errors_halt_the_port_until_it_is_stopped() {
    let b = bench(false);
    let failed = STATUS_READY | STATUS_SEEK_COMPLETE | STATUS_ERR;
    let tfd = |error: u8| u32::from(error) << 8 | u32::from(failed);
    assert_eq!(b.run(READ_DMA_EXT, 2047, 2, 1024), tfd(ERROR_ID_NOT_FOUND));
    assert_ne!(b.get_port(PX_IS) & IS_TFES, 0);
    assert_eq!(b.get_port(PX_CI), 1);
    b.put_port(PX_CMD, CMD_FRE);
    b.wait(|| b.get_port(PX_CMD) & CMD_CR == 0);
    b.put_port(PX_CMD, CMD_FRE | CMD_ST);
    assert_eq!(b.run(0xa1, 0, 0, 512), tfd(ERROR_ABORT));
    b.put_port(PX_CMD, CMD_FRE);
    b.put_port(PX_CMD, CMD_FRE | CMD_ST);
    // Too little memory for the data.
    assert_eq!(b.run(READ_DMA_EXT, 0, 2, 512), tfd(ERROR_ABORT));
    assert_ne!(b.get_port(PX_IS) & IS_HBFS, 0);
    b.put_port(PX_SCTL, 1);
    b.put_port(PX_CMD, CMD_FRE);
    b.put_port(PX_SCTL, 0);
    assert_eq!(b.get_port(PX_TFD), 0x150);
    b.put_port(PX_CMD, CMD_FRE | CMD_ST);
    assert_eq!(b.run(READ_DMA_EXT, 0, 1, 512), 0x50);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let b = bench(true);
    let tfd = b.run(WRITE_DMA_EXT, 0, 1, 512);
    assert_eq!(tfd >> 8, u32::from(ERROR_ABORT));
}

#[test]
fn trimmed_ranges_are_given_back() {
    let b = bench(false);
    let range = 4u64 | 2 << 48;
    b.memory.write(DATA, &[0; 512]).unwrap();
    b.memory.write(DATA, &range.to_le_bytes()).unwrap();
    b.prepare(0, DATA_SET_MANAGEMENT, 0, 1, 1, 512);
    b.put_port(PX_CI, 1);
    b.wait(|| b.get_port(PX_CI) == 0);
    assert_eq!(b.get_port(PX_TFD), 0x50);
}

#[test]
fn any_traffic_is_survived_and_reset_undoes_it() {
    let b = bench(false);
    let mut n = 0x1357_9bdf_2468_ace1u64;
    let mut next = || {
        n ^= n << 13;
        n ^= n >> 7;
        n ^= n << 17;
        n
    };
    for round in 0..20_000u64 {
        let offset = match round % 3 {
            0 => (next() % 0x40) & !3,
            _ => PORT_BASE + ((next() % 0x80) & !3),
        };
        // Bases that are sometimes in memory, with whatever lies there as commands.
        let value = match next() % 3 {
            0 => (next() % (4 << 20)) as u32,
            1 => 0x11,
            _ => next() as u32,
        };
        if round % 50 == 0 {
            let garbage: Vec<u8> = (0..256).map(|_| next() as u8).collect();
            b.memory
                .write((next() % (4 << 20)) & !0xff, &garbage)
                .unwrap();
        }
        b.put(offset, value);
        b.get(offset);
    }
    b.ahci.reset(ResetKind::Cold);
    assert_eq!(b.ahci.function().config(|c| c.u16(4)), 0);
    assert_eq!(b.ahci.read_global(GHC), GHC_AE);
    b.wait(|| b.ahci.ports[0].read(PX_CMD) & CMD_CR == 0);
    assert_eq!(b.ahci.ports[0].read(PX_TFD), 0x150);
}
