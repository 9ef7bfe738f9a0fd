//! Execution by the software CPU, in a small virtual machine whose user pages lie where the host's test pages do.

use std::sync::Arc;

use guest_clock::GuestClock;
use guest_memory::{Backing, BackingOptions, GuestMemory};
use x86_defs::control::{Cr0, Cr4, Efer, Xcr0};
use x86_defs::cpuid::CpuidEntry;
use x86_defs::state::{CS, DS, ES, FS, GS, SS, Segment};

use super::native::{CODE, CODE_SIZE, DATA, DATA_SIZE, DATA_WRITABLE, End, STACK, STACK_SIZE};
use super::state::State;
use crate::cpu::{Cpu, Exception, Machine, VcpuShared};
use crate::run::Engine;
use crate::vm::SoftOptions;

const RAM: u64 = 0x20_0000;
const PAGE_TABLES: u64 = 0x1000;
/// Guest-physical addresses of the pages.
const CODE_AT: u64 = 0x10_0000;
const DATA_AT: u64 = 0x11_0000;
const STACK_AT: u64 = 0x12_0000;

/// How the software CPU executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// Instruction by instruction.
    Single,
    /// Block by block.
    Block,
    /// Host code for every block.
    Translated,
}

/// A vCPU in ring 3 of 64-bit mode.
pub(crate) struct Guest {
    engine: Engine,
    ram: Arc<Backing>,
}

impl Guest {
    /// A vCPU with the test's pages mapped.
    pub(crate) fn new() -> Self {
        let memory = GuestMemory::new();
        let ram = memory
            .add_ram(0, RAM, BackingOptions::default())
            .expect("memory for the test's guest");
        let machine = Arc::new(Machine::new(memory, GuestClock::new()));
        // The two vendors' processors differ in a few instructions: the guest's is of the host's vendor.
        let vendor = std::arch::x86_64::__cpuid(0);
        let mut leaf = CpuidEntry {
            leaf: 0,
            ..CpuidEntry::default()
        };
        (leaf.ebx, leaf.ecx, leaf.edx) = (vendor.ebx, vendor.ecx, vendor.edx);
        let shared = Arc::new(VcpuShared::new(0));
        let mut cpu = Cpu::new(machine, shared, &[leaf], 2_000_000);
        let mut guest_ram = Tables {
            ram: &ram,
            next: PAGE_TABLES + 0x1000,
        };
        for (linear, physical, size) in [
            (CODE, CODE_AT, CODE_SIZE),
            (DATA, DATA_AT, DATA_SIZE),
            (STACK, STACK_AT, STACK_SIZE),
        ] {
            for page in (0..size).step_by(0x1000) {
                let writable = match linear {
                    CODE => false,
                    DATA => page < DATA_WRITABLE,
                    _ => true,
                };
                guest_ram.map(linear + page, physical + page, writable);
            }
        }
        let protection = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
        cpu.cr0 = protection;
        cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE | Cr4::FSGSBASE;
        cpu.efer = Efer::LME | Efer::LMA | Efer::SCE | Efer::NXE;
        cpu.xcr0 = Xcr0::X87 | Xcr0::SSE | Xcr0::AVX;
        cpu.cr3 = PAGE_TABLES;
        cpu.cpl = 3;
        let code = Segment {
            selector: 0x33,
            base: 0,
            limit: u32::MAX,
            attributes: 0xa0fb,
        };
        let data = Segment {
            selector: 0x2b,
            base: 0,
            limit: u32::MAX,
            attributes: 0xc0f3,
        };
        cpu.segments[CS] = code;
        for segment in [SS, DS, ES, FS, GS] {
            cpu.segments[segment] = data;
        }
        cpu.update_paging();
        cpu.update_mode();
        let mut guest = Self {
            engine: Engine::new(cpu, SoftOptions::default()),
            ram,
        };
        // JMP to itself: ends a block and changes nothing.
        let ends = [0xeb, 0xfe].repeat(CODE_SIZE as usize / 2);
        guest.write(CODE, &ends);
        guest
    }

    /// 64-bit or compatibility mode.
    fn set_mode(&mut self, bits: u32) {
        let (selector, attributes) = if bits == 64 {
            (0x33, 0xa0fb)
        } else {
            (0x23, 0xc0fb)
        };
        let cpu = &mut self.engine.cpu;
        if cpu.segments[CS].selector != selector {
            cpu.segments[CS] = Segment {
                selector,
                base: 0,
                limit: u32::MAX,
                attributes,
            };
            cpu.update_mode();
        }
    }

    fn physical(address: u64) -> u64 {
        match address {
            a if a >= STACK => STACK_AT + (a - STACK),
            a if a >= DATA => DATA_AT + (a - DATA),
            a => CODE_AT + (a - CODE),
        }
    }

    /// Writes bytes of the test's pages.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) {
        let physical = Self::physical(address);
        assert!(physical + bytes.len() as u64 <= RAM);
        // SAFETY: inside the guest's memory, which only this thread uses.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.ram.as_ptr().add(physical as usize),
                bytes.len(),
            );
        }
        self.ram.note_write(physical, bytes.len() as u64);
    }

    /// Bytes of the test's pages.
    pub(crate) fn bytes(&self, address: u64, len: u64) -> &[u8] {
        let physical = Self::physical(address);
        assert!(physical + len <= RAM);
        // SAFETY: as in `write`; nothing writes while the slice lives.
        unsafe {
            std::slice::from_raw_parts(self.ram.as_ptr().add(physical as usize), len as usize)
        }
    }

    /// Executes from `state.rip` until RIP is where `stops` says, or a fault.
    pub(crate) fn run(
        &mut self,
        state: &mut State,
        bits: u32,
        stops: impl Fn(u64) -> bool,
        how: How,
    ) -> End {
        self.set_mode(bits);
        self.load(state);
        let end = self.execute(stops, how);
        self.save(state);
        end
    }

    /// Runs one block from a state, for its time.
    pub(crate) fn run_block(&mut self, state: &State) {
        self.engine.cpu.regs[7] = state.gpr[7];
        if self.engine.cpu.vectors.mxcsr != state.mxcsr
            || self.engine.cpu.x87.tags != state.x87.tags
        {
            self.load(state);
        }
        self.engine.cpu.rip = state.rip;
        let raised = self.engine.run_uncaught(false);
        assert_eq!(raised, None);
    }

    fn load(&mut self, state: &State) {
        let cpu = &mut self.engine.cpu;
        for (i, value) in state.gpr.iter().enumerate() {
            cpu.regs[i] = *value;
        }
        cpu.rip = state.rip;
        cpu.set_rflags(state.rflags);
        cpu.vectors.ymm = state.ymm;
        cpu.vectors.mxcsr = state.mxcsr;
        cpu.x87 = state.x87;
    }

    fn save(&self, state: &mut State) {
        let cpu = &self.engine.cpu;
        for (i, value) in state.gpr.iter_mut().enumerate() {
            *value = cpu.regs[i];
        }
        state.rip = cpu.rip;
        state.rflags = cpu.rflags();
        state.ymm = cpu.vectors.ymm;
        state.mxcsr = cpu.vectors.mxcsr;
        state.x87 = cpu.x87;
    }

    /// Runs in one of the ways.
    fn execute(&mut self, stops: impl Fn(u64) -> bool, how: How) -> End {
        // More than any case needs, with repeated string instructions counted as often as they are interrupted.
        for _ in 0..2000 {
            if stops(self.engine.cpu.rip) {
                return End {
                    vector: 3,
                    error: 0,
                    address: 0,
                };
            }
            let raised = match how {
                How::Translated => self.engine.run_code_uncaught(),
                _ => self.engine.run_uncaught(how == How::Single),
            };
            let Some(exception) = raised else {
                continue;
            };
            return match exception {
                Exception::Plain(vector) => End {
                    vector,
                    error: 0,
                    address: 0,
                },
                Exception::WithCode(vector, error) => End {
                    vector,
                    error,
                    address: 0,
                },
                Exception::Page { code, address } => End {
                    vector: 14,
                    error: code,
                    address,
                },
                Exception::Resume => continue,
                other => panic!("{other:?}"),
            };
        }
        // Not an end that the host can have.
        End {
            vector: 0xff,
            error: 0,
            address: 0,
        }
    }
}

struct Tables<'a> {
    ram: &'a Backing,
    next: u64,
}

impl Tables<'_> {
    fn entry(&self, table: u64, index: u64) -> *mut u64 {
        assert!(table < RAM);
        // SAFETY: inside the guest's memory.
        unsafe { self.ram.as_ptr().add((table + index * 8) as usize).cast() }
    }

    fn map(&mut self, linear: u64, physical: u64, writable: bool) {
        let mut table = PAGE_TABLES;
        for level in [39, 30, 21] {
            let entry = self.entry(table, linear >> level & 511);
            // SAFETY: inside the guest's memory, aligned.
            unsafe {
                if *entry == 0 {
                    *entry = self.next | 7;
                    self.next += 0x1000;
                }
                table = *entry & !0xfff;
            }
        }
        // SAFETY: as above.
        unsafe { *self.entry(table, linear >> 12 & 511) = physical | 5 | u64::from(writable) << 1 };
    }
}
