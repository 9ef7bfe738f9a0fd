//! The software CPU behind the seams of [`accel`].

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use accel::{
    Accel, AccelError, CpuIo, Doorbell, Emulator, Exit, Msi, Vcpu, VcpuConfig, VcpuHandle,
    VcpuStatistics, Vm, VmConfig,
};
use guest_clock::GuestClock;
use guest_memory::{CodeListener, GuestMemory, MemoryListener, Region};
use vmm_sys_util::eventfd::EventFd;
use x86_defs::cpuid::CpuidEntry;
use x86_defs::state::VcpuState;

use crate::apic::Event;
use crate::cpu::{Cpu, Machine, Published, VcpuShared};
use crate::run::Engine;

/// The software CPU as an accelerator.
#[derive(Debug, Default)]
pub struct SoftAccel {
    options: SoftOptions,
}

/// How the software CPU works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SoftOptions {
    /// Code that runs often is translated to host code; else the interpreter executes everything.
    pub translate: bool,
    /// Runs of a block of code before it is translated.
    pub hot_after: u16,
    /// Bytes of translated code that a vCPU keeps, less than 2 GiB.
    pub cache_size: usize,
}

impl Default for SoftOptions {
    fn default() -> Self {
        Self {
            translate: true,
            hot_after: 16,
            cache_size: 64 << 20,
        }
    }
}

impl SoftAccel {
    /// The accelerator; it is available on every x86-64 host.
    pub fn new(options: SoftOptions) -> Self {
        Self { options }
    }
}

impl Accel for SoftAccel {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, AccelError> {
        Ok(crate::system::supported_cpuid())
    }

    fn tsc_khz(&self) -> u32 {
        crate::system::TSC_KHZ
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, AccelError> {
        let machine = Arc::new(Machine::new(config.memory, config.clock));
        let listener = Arc::new(Remap(machine.clone()));
        let dynamic: Arc<dyn MemoryListener> = listener.clone();
        machine
            .memory
            .listen(&dynamic)
            .map_err(|e| AccelError::Unsupported(e.to_string()))?;
        Ok(Arc::new(SoftVm {
            machine,
            max_vcpus: config.max_vcpus,
            options: self.options,
            _listener: listener,
        }))
    }
}

/// Makes the vCPUs follow changes of the memory map.
struct Remap(Arc<Machine>);

impl MemoryListener for Remap {
    fn region_added(&self, region: &Region) -> Result<(), String> {
        let written = CodeWritten(Arc::downgrade(&self.0));
        region.backing.listen_to_code(Arc::new(written));
        self.tell();
        Ok(())
    }

    fn region_removed(&self, _: &Region) {
        self.tell();
        // Nothing may use the region when this returns: each vCPU has looked up, or is outside its guest and will look before
        // it goes on. One that calls from inside a device access is outside.
        let generation = self.0.memory.generation();
        for vcpu in self.0.vcpus.read().iter() {
            while vcpu.in_guest.load(Ordering::SeqCst)
                && vcpu.map_seen.load(Ordering::SeqCst) < generation
            {
                std::thread::yield_now();
            }
        }
    }
}

/// Makes the vCPUs look for code that has become stale.
struct CodeWritten(Weak<Machine>);

impl CodeListener for CodeWritten {
    fn code_written(&self) {
        let Some(machine) = self.0.upgrade() else {
            return;
        };
        for vcpu in machine.vcpus.read().iter() {
            // Who is outside its guest looks before it goes on.
            if vcpu.in_guest.load(Ordering::SeqCst) {
                vcpu.mailbox.raise(Event::CODE);
            }
        }
    }
}

impl Remap {
    fn tell(&self) {
        for vcpu in self.0.vcpus.read().iter() {
            vcpu.mailbox.raise(Event::FLUSH_TLB);
        }
    }
}

struct SoftVm {
    machine: Arc<Machine>,
    max_vcpus: u32,
    options: SoftOptions,
    _listener: Arc<Remap>,
}

impl Vm for SoftVm {
    fn create_vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, AccelError> {
        let mut vcpus = self.machine.vcpus.write();
        if vcpus.len() as u64 >= u64::from(self.max_vcpus) {
            return Err(AccelError::Unsupported(format!(
                "more vCPUs than the {} that the machine was made for",
                self.max_vcpus
            )));
        }
        let shared = Arc::new(VcpuShared::new(config.apic_id));
        if !self.machine.apics.attach(shared.mailbox.clone()) {
            return Err(AccelError::Unsupported(format!(
                "a second vCPU with APIC ID {}, or too high an ID",
                config.apic_id
            )));
        }
        vcpus.push(shared.clone());
        drop(vcpus);
        let cpu = Cpu::new(
            self.machine.clone(),
            shared.clone(),
            &config.cpuid,
            config.tsc_khz,
        );
        Ok(Box::new(SoftVcpu {
            engine: Engine::new(cpu, self.options),
            shared,
        }))
    }

    fn send_msi(&self, msi: Msi) {
        self.machine.apics.send_msi(msi);
    }

    fn set_extint(&self, raised: bool) {
        if let Some(mailbox) = self.machine.apics.get(0) {
            mailbox.set_extint(raised);
        }
    }

    fn add_doorbell(&self, _: Doorbell, _: &EventFd) -> bool {
        false
    }

    fn remove_doorbell(&self, _: Doorbell, _: &EventFd) {}

    fn set_irq_event(&self, _: &EventFd, _: Msi) -> bool {
        false
    }

    fn remove_irq_event(&self, _: &EventFd) {}

    fn sync_dirty_log(&self) -> Result<(), AccelError> {
        // Every store looks at its page's flag, which is the log.
        Ok(())
    }
}

struct SoftVcpu {
    engine: Engine,
    shared: Arc<VcpuShared>,
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit, AccelError> {
        Ok(self.engine.run(io))
    }

    fn state(&self) -> Result<VcpuState, AccelError> {
        Ok(self.engine.cpu.save())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), AccelError> {
        self.engine.cpu.restore(state)
    }

    fn reset(&mut self) -> Result<(), AccelError> {
        self.engine.cpu.power_up();
        Ok(())
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(Handle(self.shared.clone()))
    }
}

struct Handle(Arc<VcpuShared>);

/// How long to wait for a vCPU that runs to say what it has done; its thread may be waiting for a processor.
const PATIENCE: Duration = Duration::from_millis(5);

impl Handle {
    /// The counters of now where the vCPU's thread gets to say them in time, else those that it last said. One that is outside
    /// its guest has said them when it went, but for the device access that it is in.
    fn published_now(&self) -> Published {
        let mut published = self.0.published.lock();
        if self.0.in_guest.load(Ordering::SeqCst) {
            let (before, end) = (published.times, Instant::now() + PATIENCE);
            self.0.mailbox.raise(Event::STATISTICS);
            while published.times == before {
                if self.0.said.wait_until(&mut published, end).timed_out() {
                    break;
                }
            }
        }
        *published
    }
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.0.mailbox.raise(Event::KICK);
    }

    fn nmi(&self) {
        self.0.mailbox.raise(Event::NMI);
    }

    fn statistics(&self) -> VcpuStatistics {
        let now = self.published_now();
        VcpuStatistics {
            instructions: now.instructions,
            io_calls: now.counters.io_calls,
            interrupts: self.0.mailbox.interrupts(),
            halted: Duration::from_nanos(self.0.halted.load(Ordering::Relaxed)),
            in_devices: Duration::from_nanos(now.counters.io_time),
            page_walks: now.counters.page_walks,
            paravirtual: Some(now.counters.paravirtual),
            translation: now.translation,
        }
    }
}

/// Completes single instructions that KVM can't.
#[derive(Default)]
pub struct SoftEmulator {
    /// Stands still: no instruction that gets here looks at the time.
    clock: GuestClock,
}

impl SoftEmulator {
    /// An emulator.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Emulator for SoftEmulator {
    fn step(
        &self,
        state: &mut VcpuState,
        cpuid: &[CpuidEntry],
        memory: &GuestMemory,
        io: &dyn CpuIo,
    ) -> Result<(), String> {
        let machine = Arc::new(Machine::new(memory.clone(), self.clock.clone()));
        let shared = Arc::new(VcpuShared::new(0));
        let cpu = Cpu::new(machine, shared, cpuid, crate::system::TSC_KHZ);
        let options = SoftOptions {
            translate: false,
            ..SoftOptions::default()
        };
        let mut engine = Engine::new(cpu, options);
        let fresh = engine.cpu.save();
        let known = what_both_know(state, &fresh);
        engine.cpu.restore(&known).map_err(|e| e.to_string())?;
        let before = engine.cpu.save();
        engine
            .step(io)
            .map_err(|exit| format!("the instruction ends in {exit:?}"))?;
        take_over_changes(state, &before, &engine.cpu.save());
        Ok(())
    }
}

/// The MSRs that go by the clock, which stands still here.
fn is_time(msr: u32) -> bool {
    matches!(msr, x86_defs::msr::TSC | x86_defs::msr::TSC_DEADLINE)
}

/// The part of another accelerator's state that this one has a place for; the rest can't matter to an instruction that it can
/// do.
fn what_both_know(state: &VcpuState, fresh: &VcpuState) -> VcpuState {
    let mut known = state.clone();
    known.system.xcr0 &= fresh_xcr0(fresh);
    known
        .msrs
        .retain(|(msr, _)| !is_time(*msr) && fresh.msrs.iter().any(|(m, _)| m == msr));
    known
}

/// The components that an area saved by this CPU carries.
fn fresh_xcr0(fresh: &VcpuState) -> u64 {
    let header = fresh.xsave.get(512..520);
    header
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(3, u64::from_le_bytes)
}

/// Puts what an instruction has changed into a state that may hold more than this CPU knows.
fn take_over_changes(state: &mut VcpuState, before: &VcpuState, after: &VcpuState) {
    state.registers = after.registers;
    if after.system != before.system {
        let unknown = state.system.xcr0 & !fresh_xcr0(after);
        state.system = after.system;
        state.system.xcr0 |= unknown;
    }
    if after.xsave != before.xsave {
        let carried = fresh_xcr0(after);
        let (header, end) = (512..576, after.xsave.len().min(state.xsave.len()));
        for (at, byte) in after.xsave[..end].iter().enumerate() {
            if !header.contains(&at) {
                state.xsave[at] = *byte;
            }
        }
        for (byte, bits) in state.xsave[512..520].iter_mut().zip(carried.to_le_bytes()) {
            *byte |= bits;
        }
    }
    for (msr, value) in &after.msrs {
        let changed = !before.msrs.contains(&(*msr, *value)) && !is_time(*msr);
        if let Some(place) = state.msrs.iter_mut().find(|(m, _)| changed && m == msr) {
            place.1 = *value;
        }
    }
    if after.events != before.events {
        state.events = after.events;
    }
    if after.mp_state != before.mp_state {
        state.mp_state = after.mp_state;
    }
    if after.lapic != before.lapic {
        state.lapic.clone_from(&after.lapic);
    }
}
