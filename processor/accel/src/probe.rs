//! How fast a processor runs ring 0.
//!
//! There are KVMs that run user mode natively but interpret kernel mode; an unmodified kernel takes minutes on them, or
//! dies on an instruction that they do not know. The probe runs a counted loop in ring 0 and two such instructions, for a few
//! milliseconds at most.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest_clock::GuestClock;
use guest_memory::{BackingOptions, GuestMemory, MemoryError};
use x86_defs::state::{RAX, RCX, RDX, VcpuState};

use crate::entry;
use crate::{Accel, AccelError, CpuIo, Exit, VcpuConfig, VcpuHandle, VmConfig};

/// What the probe has seen.
#[derive(Debug, Clone, PartialEq)]
pub struct RingZero {
    /// Million instructions in a second.
    pub mips: f64,
    /// Why an ordinary kernel would not run, when the guest could not finish.
    pub stuck: Option<String>,
}

/// Below this an unmodified kernel is better off on a good interpreter.
const HARDWARE_MIPS: f64 = 100.0;

impl RingZero {
    /// True when this looks like hardware (or a translator no worse than it).
    pub fn is_hardware_speed(&self) -> bool {
        self.stuck.is_none() && self.mips >= HARDWARE_MIPS
    }
}

/// The longest that the guest may run.
const TIME: Duration = Duration::from_millis(6);
/// Turns of the counted loop, two instructions each.
const TURNS: u32 = 500_000;

const TABLES: u64 = 0x1000;
const CODE: u64 = 0x4000;
const HANDLER: u64 = CODE + 0x80;
const IDT: u64 = 0x5000;
const GDT: u64 = 0x5800;
const STACK: u64 = 0x8000;
const SIZE: u64 = 0x8000;
/// Where the guest reports the end.
const DONE_PORT: u16 = 0xf4;

/// `dec ecx; jnz` on itself, `int3`, `lock cmpxchg16b [0x6000]`, `out DONE_PORT, al`, `hlt` for ever.
const PROGRAM: [u8; 26] = [
    0xff, 0xc9, 0x75, 0xfc, // loop
    0xcc, // int3
    0x31, 0xc0, 0x31, 0xd2, // eax = edx = 0
    0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x00, 0x60, 0x00, 0x00, // cmpxchg16b
    0xe6, 0xf4, 0xf4, 0xeb, 0xfd, // out, hlt
    0x90, 0x90,
];
/// `iretq`.
const HANDLER_CODE: [u8; 2] = [0x48, 0xcf];

struct Report {
    done: AtomicBool,
    vcpu: Arc<dyn VcpuHandle>,
}

impl CpuIo for Report {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, port: u16, _: &[u8]) {
        if port == DONE_PORT {
            self.done.store(true, Ordering::SeqCst);
            self.vcpu.kick();
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn acknowledge_extint(&self) -> Option<u8> {
        None
    }
    fn end_of_interrupt(&self, _: u8) {}
}

fn guest_memory() -> Result<GuestMemory, MemoryError> {
    let memory = GuestMemory::new();
    memory.add_ram(0, SIZE, BackingOptions::default())?;
    // One table of each level; the last maps the first 2 MiB on themselves.
    let present_writable = 3;
    let large = 1 << 7;
    for (at, entry) in [
        (TABLES, (TABLES + 0x1000) | present_writable),
        (TABLES + 0x1000, (TABLES + 0x2000) | present_writable),
        (TABLES + 0x2000, large | present_writable),
    ] {
        memory.write(at, &u64::to_le_bytes(entry))?;
    }
    for (i, descriptor) in entry::GDT.iter().enumerate() {
        memory.write(GDT + 8 * i as u64, &descriptor.to_le_bytes())?;
    }
    // A 64-bit interrupt gate, present (SDM volume 3, section 7.14.1), for the breakpoint.
    let gate = HANDLER | u64::from(entry::CODE) << 16 | 0x8e00 << 32;
    let at = IDT + 16 * u64::from(x86_defs::exception::BP);
    memory.write(at, &gate.to_le_bytes())?;
    memory.write(CODE, &PROGRAM)?;
    memory.write(HANDLER, &HANDLER_CODE)?;
    Ok(memory)
}

fn prepare(state: &mut VcpuState) {
    entry::long_mode(state, TABLES, GDT, CODE, STACK);
    state.system.idtr.base = IDT;
    state.system.idtr.limit = 0xff;
    state.registers.gpr[RCX] = TURNS.into();
}

/// Runs the probe.
///
/// # Errors
/// When the accelerator can't make the machine that it needs.
pub fn ring_zero(accel: &dyn Accel) -> Result<RingZero, AccelError> {
    let memory = guest_memory().map_err(|e| AccelError::Unsupported(e.to_string()))?;
    let vm = accel.create_vm(VmConfig {
        memory,
        clock: GuestClock::new(),
        max_vcpus: 1,
    })?;
    let mut vcpu = vm.create_vcpu(VcpuConfig {
        apic_id: 0,
        cpuid: accel.supported_cpuid()?,
        tsc_khz: accel.tsc_khz(),
    })?;
    let mut state = vcpu.state()?;
    prepare(&mut state);
    vcpu.set_state(&state)?;
    let report = Report {
        done: AtomicBool::new(false),
        vcpu: vcpu.handle(),
    };
    let alarm = Alarm::set(vcpu.handle());
    let start = Instant::now();
    let exit = vcpu.run(&report)?;
    let seconds = start.elapsed().as_secs_f64();
    alarm.cancel();
    let done = report.done.load(Ordering::SeqCst);
    let state = vcpu.state()?;
    // A host's kernel takes milliseconds to take a VM down, and nothing waits for it.
    std::thread::spawn(move || drop((vcpu, vm)));
    let turns = if state.registers.rip == CODE || state.registers.rip == CODE + 2 {
        u64::from(TURNS).saturating_sub(state.registers.gpr[RCX])
    } else {
        TURNS.into()
    };
    Ok(RingZero {
        mips: turns as f64 * 2.0 / seconds / 1e6,
        stuck: match exit {
            Exit::Kicked if done && state.registers.gpr[RAX] | state.registers.gpr[RDX] == 0 => {
                None
            }
            Exit::Kicked if done => Some("cmpxchg16b does not work".into()),
            Exit::Kicked => Some("it did not finish in time".into()),
            Exit::Shutdown => Some("it ended in a triple fault".into()),
            Exit::InternalError(why) => Some(why),
        },
    })
}

/// Kicks a vCPU after a while.
struct Alarm(std::thread::JoinHandle<()>, Arc<AtomicBool>);

impl Alarm {
    fn set(vcpu: Arc<dyn VcpuHandle>) -> Self {
        let cancelled = Arc::new(AtomicBool::new(false));
        let seen = cancelled.clone();
        let thread = std::thread::spawn(move || {
            let end = Instant::now() + TIME;
            while !seen.load(Ordering::SeqCst) {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return vcpu.kick();
                }
                std::thread::park_timeout(left);
            }
        });
        Self(thread, cancelled)
    }

    fn cancel(self) {
        self.1.store(true, Ordering::SeqCst);
        self.0.thread().unpark();
        let _ = self.0.join();
    }
}
