//! Guests that execute anything: no bytes in memory and no state that can be restored may make the software CPU panic or
//! stop it from coming back.

use std::sync::Arc;

use accel::CpuIo;
use guest_clock::GuestClock;
use guest_memory::{BackingOptions, GuestMemory};
use x86_defs::state::{CS, MpState, VcpuState};

use crate::cpu::{Cpu, Machine, VcpuShared};
use crate::run::Engine;
use crate::vm::SoftOptions;

/// Bytes of guest memory.
const MEMORY: u64 = 0x10_0000;
/// Paging structures that map everything to itself.
const TABLES: u64 = 0xf_0000;

/// A device space that answers with whatever comes.
struct Noise;

impl CpuIo for Noise {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        data.fill(addr as u8);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn acknowledge_extint(&self) -> Option<u8> {
        Some(0x21)
    }
    fn end_of_interrupt(&self, _: u8) {}
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A value of a kind that finds edges: small, near a power of two, an address in memory, or anything.
    fn value(&mut self) -> u64 {
        let any = self.next();
        match self.next() & 7 {
            0 => any & 0xff,
            1 => (1u64 << (any & 63)).wrapping_sub(any >> 6 & 3),
            2..=4 => any % MEMORY,
            5 => any | 0xffff_8000_0000_0000,
            6 => u64::MAX - (any & 0xf),
            _ => any,
        }
    }
}

/// Opcodes that lead to system instructions, among plain noise.
const PREFIXES: [&[u8]; 12] = [
    &[0x0f, 0x01],
    &[0x0f, 0x00],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0xcf],
    &[0xcb],
    &[0x8e],
    &[0xff],
];

fn fill(memory: &GuestMemory, random: &mut Random) {
    let mut bytes = Vec::with_capacity(MEMORY as usize);
    while bytes.len() < TABLES as usize {
        if random.next() & 7 == 0 {
            let which = random.next() as usize % PREFIXES.len();
            bytes.extend_from_slice(PREFIXES[which]);
        }
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(TABLES as usize);
    memory.write(0, &bytes).unwrap();
    let tables = [(0, TABLES + 0x1007), (0x1000, TABLES + 0x2007)];
    for (at, value) in tables {
        memory.write(TABLES + at, &u64::to_le_bytes(value)).unwrap();
    }
    for n in 0..512u64 {
        let entry = (n << 21 | 0x87).to_le_bytes();
        memory.write(TABLES + 0x2000 + n * 8, &entry).unwrap();
    }
}

/// Real, protected or long mode with random registers and tables.
fn scramble(state: &mut VcpuState, random: &mut Random) {
    let system = &mut state.system;
    let mode = random.next() % 3;
    for value in &mut state.registers.gpr {
        *value = random.value();
    }
    state.registers.rip = random.next() % 0x8000;
    state.registers.rflags = random.value() & 0x24_4fd7 | 2;
    let user = random.next() & 3 == 0 && mode != 0;
    let dpl = if user { 0x60 } else { 0 };
    for (i, segment) in system.segments.iter_mut().enumerate() {
        segment.selector = random.next() as u16 & 0x78 | if user { 3 } else { 0 };
        let code = if mode == 2 { 0xa09b } else { 0xc09b };
        segment.attributes = if i == CS { code } else { 0xc093 } | dpl;
        segment.limit = if mode == 0 { 0xffff } else { u32::MAX };
        segment.base = 0;
    }
    for table in [&mut system.gdtr, &mut system.idtr] {
        table.base = random.next() % TABLES;
        table.limit = random.next() as u16;
    }
    system.tr.base = random.next() % TABLES;
    system.tr.limit = random.next() as u32 & 0xfff;
    system.tr.attributes = 0x8b;
    system.cr0 = if mode == 0 { 0x10 } else { 0x11 };
    system.cr4 = 0x20 | random.next() & 0x0031_0e9f & !(1 << 17);
    if mode == 2 {
        system.cr0 |= 1 << 31;
        system.cr3 = TABLES;
        system.efer = 0xd01;
    } else {
        system.efer = 0;
    }
    system.dr7 = if random.next() & 7 == 0 {
        random.next() & 0xffff_00ff
    } else {
        0x400
    };
    state.mp_state = MpState::Runnable;
}

#[test]
fn nothing_that_a_guest_executes_ends_in_a_panic() {
    let memory = GuestMemory::new();
    memory
        .add_ram(0, MEMORY, BackingOptions::default())
        .unwrap();
    let machine = Arc::new(Machine::new(memory.clone(), GuestClock::new()));
    let shared = Arc::new(VcpuShared::new(0));
    let cpuid = crate::system::supported_cpuid();
    let cpu = Cpu::new(machine, shared, &cpuid, crate::system::TSC_KHZ);
    let mut engine = Engine::new(cpu, SoftOptions::default());
    let fresh = engine.cpu.save();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut steps, mut shutdowns) = (0, 0);
    for _ in 0..300 {
        fill(&memory, &mut random);
        let mut state = fresh.clone();
        scramble(&mut state, &mut random);
        engine.cpu.power_up();
        engine.cpu.restore(&state).unwrap();
        for _ in 0..200 {
            steps += 1;
            if engine.step(&Noise).is_err() {
                shutdowns += 1;
                break;
            }
            engine.cpu.halted = false;
        }
        // What comes out can go in again.
        let state = engine.cpu.save();
        engine.cpu.restore(&state).unwrap();
    }
    assert!(steps > 1000, "{steps} steps, {shutdowns} shutdowns");
}
