//! A vCPU with flat memory for tests.

use std::sync::Arc;

use accel::CpuIo;
use guest_clock::GuestClock;
use guest_memory::GuestMemory;
use parking_lot::Mutex;
use x86_defs::control::{Cr0, Cr4, Efer};
use x86_defs::state::{CS, DS, ES, SS, Segment};

use crate::cpu::{Cpu, Machine, VcpuShared};
use crate::run::Engine;
use crate::vm::SoftOptions;

/// Where programs start.
pub(crate) const CODE: u64 = 0x1000;
/// Bytes of memory, from zero.
pub(crate) const MEMORY: u64 = 1 << 20;

/// A machine that remembers what was written to its ports.
#[derive(Default)]
pub(crate) struct Ports(pub(crate) Mutex<Vec<(u16, Vec<u8>)>>);

impl CpuIo for Ports {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        self.0.lock().push((port, data.to_vec()));
    }
    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        data.fill(addr as u8);
    }
    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.0.lock().push((addr as u16, data.to_vec()));
    }
    fn acknowledge_extint(&self) -> Option<u8> {
        None
    }
    fn end_of_interrupt(&self, _: u8) {}
}

/// An engine over a megabyte of memory, in ring 0, without paging, in flat segments of 16, 32 or 64 bits.
pub(crate) fn engine(bits: u32, code: &[u8]) -> Engine {
    let memory = GuestMemory::new();
    memory
        .add_ram(0, MEMORY, guest_memory::BackingOptions::default())
        .expect("a megabyte");
    memory.load(CODE, code).expect("room for the code");
    let machine = Arc::new(Machine::new(memory, GuestClock::new()));
    let shared = Arc::new(VcpuShared::new(0));
    let mut cpu = Cpu::new(machine, shared, &[], 1_000_000);
    cpu.cr0 = Cr0::PE | Cr0::ET;
    cpu.cr4 = Cr4::OSFXSR | Cr4::OSXSAVE | Cr4::PAE;
    let (kind, stack) = match bits {
        64 => (0xa09b, 0xc093),
        32 => (0xc09b, 0xc093),
        _ => (0x809b, 0x8093),
    };
    if bits == 64 {
        cpu.efer = Efer::LME | Efer::LMA;
    }
    let segment = |attributes| Segment {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        attributes,
    };
    cpu.segments[CS] = segment(kind);
    for seg in [ES, SS, DS] {
        cpu.segments[seg] = segment(stack);
    }
    cpu.cpl = 0;
    cpu.rip = CODE;
    cpu.regs[4] = 0x8000;
    cpu.update_mode();
    Engine::new(cpu, SoftOptions::default())
}

/// Runs a program to its HLT; panics when it faults or does not end.
pub(crate) fn run_to_halt(engine: &mut Engine) {
    let ports = Ports::default();
    for _ in 0..100_000 {
        engine.step(&ports).expect("no triple fault");
        if engine.cpu.halted {
            return;
        }
    }
    panic!("the program did not halt; rip {:#x}", engine.cpu.rip);
}

/// Runs until HLT by the block loop, as a machine does.
pub(crate) fn run_blocks_to_halt(engine: &mut Engine) {
    let shared = engine.cpu.shared.clone();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let watch = done.clone();
    let kicker = std::thread::spawn(move || {
        for _ in 0..10_000 {
            if shared.mailbox.is_asleep() || watch.load(std::sync::atomic::Ordering::SeqCst) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        shared.mailbox.raise(crate::apic::Event::KICK);
    });
    let exit = engine.run(&Ports::default());
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    kicker.join().expect("the kicker ends");
    assert_eq!(exit, accel::Exit::Kicked, "rip {:#x}", engine.cpu.rip);
    assert!(engine.cpu.halted, "rip {:#x}", engine.cpu.rip);
}
