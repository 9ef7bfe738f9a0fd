//! The board that guests run on: memory, a few ports, a page of device registers, and a way for the guest to end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use accel::{Accel, CpuIo, Exit, Msi, Vcpu, VcpuConfig, VcpuHandle, Vm, VmConfig, entry};
use guest_clock::GuestClock;
use guest_memory::{BackingOptions, GuestMemory};
use parking_lot::{Condvar, Mutex};
use x86_defs::state::{Segment, VcpuState};

use crate::{Guest, Mode};

/// A test's error: what went wrong, in a line.
pub type Failure = String;

/// A failure out of any error.
pub fn fail(e: impl std::fmt::Display) -> Failure {
    e.to_string()
}

/// Bytes of RAM at address 0.
pub const RAM: u64 = 4 << 20;
/// Guest-physical address of the device registers.
pub const DEVICE: u64 = 0xd000_0000;
/// Bytes of them.
pub const DEVICE_SIZE: usize = 0x1_0000;

const PORT_SCRATCH: u16 = 0x300;
const PORT_STREAM: u16 = 0x400;
const PORT_TEXT: u16 = 0xe9;
const PORT_REPORT: u16 = 0xea;
const PORT_DETAIL: u16 = 0xeb;
const PORT_COMMAND: u16 = 0xec;
const PORT_EXIT: u16 = 0xf4;
const PORT_FAIL: u16 = 0xf5;

/// How a guest's run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It wrote this exit code.
    Exit(u32),
    /// A check failed, in this line of its source.
    Failed {
        /// The line.
        line: u32,
        /// What the guest said about it.
        detail: Vec<u32>,
    },
    /// A vCPU met a triple fault.
    Shutdown,
    /// A vCPU can't go on.
    InternalError(String),
    /// It took longer than the test allows.
    TimedOut,
}

type Command = Box<dyn Fn(&Io, u32) + Send + Sync>;

/// What the guest can reach outside its processors.
pub struct Io {
    /// The VM, for commands that send interrupts.
    pub vm: Arc<dyn Vm>,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Values that the guest reported.
    pub reports: Mutex<Vec<u32>>,
    /// Bytes that it wrote to the stream port.
    pub stream: Mutex<Vec<u8>>,
    /// Text that it wrote.
    pub text: Mutex<Vec<u8>>,
    /// Vectors of level-triggered interrupts that it ended.
    pub ended: Mutex<Vec<u8>>,
    /// Vectors that the next acknowledge cycles give; while there are some the 8259's output is raised.
    pub extint: Arc<Mutex<VecDeque<u8>>>,
    /// Writes to device space that is not the board's registers.
    pub stray_writes: Mutex<Vec<(u64, Vec<u8>)>>,
    handles: Mutex<Vec<Arc<dyn VcpuHandle>>>,
    detail: Mutex<Vec<u32>>,
    scratch: Mutex<[u8; 64]>,
    count: Mutex<u8>,
    device: Mutex<Vec<u8>>,
    outcome: Mutex<Option<Outcome>>,
    ended_signal: Condvar,
    finished: AtomicBool,
    command: Command,
}

impl Io {
    /// Ends the run, unless it has ended.
    pub fn finish(&self, outcome: Outcome) {
        self.outcome.lock().get_or_insert(outcome);
        self.ended_signal.notify_all();
        // A vCPU that ends the run by an I/O instruction goes no further than that.
        self.finished.store(true, Ordering::SeqCst);
        self.handles.lock().iter().for_each(|handle| handle.kick());
    }

    /// Forgets what an earlier guest has left in the ports.
    pub fn forget(&self) {
        self.scratch.lock().fill(0);
        *self.count.lock() = 0;
        self.stream.lock().clear();
        self.detail.lock().clear();
        self.extint.lock().clear();
        self.vm.set_extint(false);
    }

    /// The handle of a vCPU, in the order of their making.
    pub fn handle(&self, index: usize) -> Arc<dyn VcpuHandle> {
        self.handles.lock()[index].clone()
    }

    /// Sends an edge-triggered, fixed interrupt to an APIC ID.
    pub fn send(&self, apic_id: u32, vector: u8) {
        self.vm.send_msi(Msi {
            address: 0xfee0_0000 | u64::from(apic_id & 0xff) << 12 | u64::from(apic_id >> 8) << 40,
            data: vector.into(),
        });
    }

    /// Queues an interrupt of the 8259.
    pub fn raise_extint(&self, vector: u8) {
        self.extint.lock().push_back(vector);
        self.vm.set_extint(true);
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        let mut wide = [0; 4];
        wide[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(wide);
        match port {
            PORT_TEXT => self.text.lock().push(value as u8),
            PORT_REPORT => self.reports.lock().push(value),
            PORT_DETAIL => self.detail.lock().push(value),
            PORT_COMMAND => (self.command)(self, value),
            PORT_EXIT => self.finish(Outcome::Exit(value)),
            PORT_FAIL => {
                let detail = self.detail.lock().clone();
                self.finish(Outcome::Failed {
                    line: value,
                    detail,
                });
            }
            PORT_STREAM => {
                // A guest gone wild must not fill the host's memory.
                let mut stream = self.stream.lock();
                if stream.len() < 1 << 16 {
                    stream.extend_from_slice(data);
                }
            }
            _ => {
                let at = port.wrapping_sub(PORT_SCRATCH) as usize;
                if let Some(place) = self.scratch.lock().get_mut(at..at + data.len()) {
                    place.copy_from_slice(data);
                }
            }
        }
    }

    /// Where an access lies in the device registers.
    fn register(addr: u64, len: usize) -> Option<std::ops::Range<usize>> {
        let at = usize::try_from(addr.checked_sub(DEVICE)?).ok()?;
        let end = at.checked_add(len)?;
        (end <= DEVICE_SIZE).then_some(at..end)
    }
}

impl CpuIo for Io {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        assert!(
            matches!(data.len(), 1 | 2 | 4),
            "port read of {}",
            data.len()
        );
        match port {
            PORT_STREAM => {
                let mut count = self.count.lock();
                for byte in data {
                    *byte = *count;
                    *count = count.wrapping_add(1);
                }
            }
            _ => {
                let at = port.wrapping_sub(PORT_SCRATCH) as usize;
                match self.scratch.lock().get(at..at + data.len()) {
                    Some(bytes) => data.copy_from_slice(bytes),
                    None => data.fill(0xff),
                }
            }
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        assert!(
            matches!(data.len(), 1 | 2 | 4),
            "port write of {}",
            data.len()
        );
        self.write_port(port, data);
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        assert!((1..=8).contains(&data.len()), "read of {}", data.len());
        match Self::register(addr, data.len()) {
            Some(range) => data.copy_from_slice(&self.device.lock()[range]),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        assert!((1..=8).contains(&data.len()), "write of {}", data.len());
        match Self::register(addr, data.len()) {
            Some(range) => self.device.lock()[range].copy_from_slice(data),
            None => {
                let mut stray = self.stray_writes.lock();
                if stray.len() < 1000 {
                    stray.push((addr, data.to_vec()));
                }
            }
        }
    }

    fn acknowledge_extint(&self) -> Option<u8> {
        let mut queue = self.extint.lock();
        let vector = queue.pop_front();
        let more = !queue.is_empty();
        drop(queue);
        self.vm.set_extint(more);
        vector
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ended.lock().push(vector);
    }
}

/// A VM with a guest in it.
pub struct Board {
    /// What its guest reaches.
    pub io: Arc<Io>,
    /// The VM.
    pub vm: Arc<dyn Vm>,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Guest time, running.
    pub clock: GuestClock,
    /// The vCPUs, while they do not run.
    pub vcpus: Vec<Box<dyn Vcpu>>,
}

const TABLES: u64 = 0x1000;
const GDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
const TSS_LIMIT: u32 = 0x67;
const RING0_STACK: u64 = 0x8_8000;
const IST1: u64 = 0x7_8000;

/// The long-mode GDT from selector 0x18 on, as `guests/long.h` names it; the first three are [`entry::GDT`].
const MORE_DESCRIPTORS: [u64; 9] = [
    0x00cf_fb00_0000_ffff, // 0x18: 32-bit user code
    0x00cf_f300_0000_ffff, // 0x20: user data
    0x00af_fb00_0000_ffff, // 0x28: 64-bit user code
    0x00cf_9b00_0000_ffff, // 0x30: 32-bit code
    0x00cf_1300_0000_ffff, // 0x38: data, not present
    0x0000_8b00_7000_0067, // 0x40: TSS at 0x7000, busy
    0,                     // 0x48: its upper half
    0x0000_9b00_0000_ffff, // 0x50: 16-bit code
    0x0000_9300_0000_ffff, // 0x58: 16-bit data
];

impl Board {
    /// A board with a guest's image in its memory and `count` vCPUs, the first of which is about to enter it.
    ///
    /// # Errors
    /// Whatever the accelerator refuses.
    pub fn new(accel: &dyn Accel, guest: &Guest, count: u32) -> Result<Self, Failure> {
        Self::with_command(accel, guest, count, |_, _| {})
    }

    /// The same, with a function that carries out the guest's commands, on its vCPU's thread.
    ///
    /// # Errors
    /// Whatever the accelerator refuses.
    pub fn with_command(
        accel: &dyn Accel,
        guest: &Guest,
        count: u32,
        command: impl Fn(&Io, u32) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, RAM, BackingOptions::default())
            .map_err(fail)?;
        memory
            .write(guest.mode.address(), guest.image)
            .map_err(fail)?;
        let clock = GuestClock::new();
        clock.resume();
        let vm = accel
            .create_vm(VmConfig {
                memory: memory.clone(),
                clock: clock.clone(),
                max_vcpus: count,
            })
            .map_err(fail)?;
        let mut vcpus = Vec::new();
        for apic_id in 0..count {
            let config = vcpu_config(accel, apic_id)?;
            vcpus.push(vm.create_vcpu(config).map_err(fail)?);
        }
        let io = Arc::new(Io {
            vm: vm.clone(),
            memory: memory.clone(),
            reports: Mutex::default(),
            stream: Mutex::default(),
            text: Mutex::default(),
            ended: Mutex::default(),
            extint: Arc::default(),
            stray_writes: Mutex::default(),
            handles: Mutex::new(vcpus.iter().map(|vcpu| vcpu.handle()).collect()),
            detail: Mutex::default(),
            scratch: Mutex::new([0; 64]),
            count: Mutex::default(),
            device: Mutex::new(vec![0; DEVICE_SIZE]),
            outcome: Mutex::default(),
            ended_signal: Condvar::new(),
            finished: AtomicBool::new(false),
            command: Box::new(command),
        });
        let mut board = Self {
            io,
            vm,
            memory,
            clock,
            vcpus,
        };
        board.enter(guest.mode)?;
        Ok(board)
    }

    /// Puts the first vCPU at the start of the image.
    ///
    /// # Errors
    /// Whatever the accelerator refuses.
    pub fn enter(&mut self, mode: Mode) -> Result<(), Failure> {
        if mode == Mode::Long {
            self.write_tables()?;
        }
        let mut state = self.vcpus[0].state().map_err(fail)?;
        enter(&mut state, mode);
        self.vcpus[0].set_state(&state).map_err(fail)
    }

    fn write_tables(&self) -> Result<(), Failure> {
        let write = |at: u64, value: u64| self.memory.write(at, &value.to_le_bytes());
        let user = 7; // present, writable, user
        let large = 1 << 7;
        write(TABLES, (TABLES + 0x1000) | user).map_err(fail)?;
        for (gib, table) in [(0, TABLES + 0x2000), (3, TABLES + 0x3000)] {
            write(TABLES + 0x1000 + 8 * gib, table | user).map_err(fail)?;
            for i in 0..512u64 {
                let address = gib << 30 | i << 21;
                write(table + 8 * i, address | large | user).map_err(fail)?;
            }
        }
        let descriptors = entry::GDT.iter().chain(&MORE_DESCRIPTORS);
        for (i, descriptor) in (0u64..).zip(descriptors) {
            write(GDT + 8 * i, *descriptor).map_err(fail)?;
        }
        // RSP0, IST1; the I/O map lies beyond the limit, so there is none.
        write(TSS + 4, RING0_STACK).map_err(fail)?;
        write(TSS + 0x24, IST1).map_err(fail)?;
        self.memory
            .write(TSS + 0x66, &0x68u16.to_le_bytes())
            .map_err(fail)
    }

    /// Runs all vCPUs, each on a thread, until the guest ends its test or `time` is over. May be called again.
    pub fn run(&mut self, time: Duration) -> Outcome {
        let io = &self.io;
        *io.outcome.lock() = None;
        io.finished.store(false, Ordering::SeqCst);
        let end = Instant::now() + time;
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .vcpus
                .iter_mut()
                .map(|vcpu| scope.spawn(move || drive(vcpu.as_mut(), io)))
                .collect();
            let mut outcome = io.outcome.lock();
            while outcome.is_none() {
                if io.ended_signal.wait_until(&mut outcome, end).timed_out() {
                    outcome.get_or_insert(Outcome::TimedOut);
                }
            }
            drop(outcome);
            io.finished.store(true, Ordering::SeqCst);
            while threads.iter().any(|thread| !thread.is_finished()) {
                io.handles.lock().iter().for_each(|handle| handle.kick());
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        io.outcome.lock().clone().unwrap_or(Outcome::TimedOut)
    }
}

/// Runs a vCPU until the board's run is over.
fn drive(vcpu: &mut dyn Vcpu, io: &Io) {
    while !io.finished.load(Ordering::SeqCst) {
        match vcpu.run(io) {
            Ok(Exit::Kicked) => {}
            Ok(Exit::Shutdown) => return io.finish(Outcome::Shutdown),
            Ok(Exit::InternalError(why)) => return io.finish(Outcome::InternalError(why)),
            Err(e) => return io.finish(Outcome::InternalError(e.to_string())),
        }
    }
}

/// A vCPU's configuration: all that the accelerator supports, with its APIC ID.
///
/// # Errors
/// When the accelerator can't tell what it supports.
pub fn vcpu_config(accel: &dyn Accel, apic_id: u32) -> Result<VcpuConfig, Failure> {
    let mut cpuid = accel.supported_cpuid().map_err(fail)?;
    for entry in &mut cpuid {
        match entry.leaf {
            1 => entry.ebx = entry.ebx & 0xff_ffff | apic_id << 24,
            0xb | 0x1f => entry.edx = apic_id,
            _ => {}
        }
    }
    Ok(VcpuConfig {
        apic_id,
        cpuid,
        tsc_khz: accel.tsc_khz(),
    })
}

/// The state in which a guest of a mode is entered.
pub fn enter(state: &mut VcpuState, mode: Mode) {
    let address = mode.address();
    match mode {
        Mode::Real => entry::real_mode(state, 0, address as u16, 0x7000),
        Mode::Protected => entry::protected_mode(state, address as u32, 0x9_0000),
        Mode::Long => {
            entry::long_mode(state, TABLES, GDT, address, 0x9_0000);
            state.system.gdtr.limit = ((3 + MORE_DESCRIPTORS.len()) * 8 - 1) as u16;
            state.system.tr = Segment {
                selector: 0x40,
                base: TSS,
                limit: TSS_LIMIT,
                attributes: 0x8b,
            };
        }
    }
}
