//! The run loop.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use accel::{AccelError, CpuIo, Exit, Vcpu, VcpuConfig, VcpuHandle, VcpuStatistics};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
};
use kvm_ioctls::VcpuFd;
use x86_defs::cpuid::CpuidEntry;
use x86_defs::msr;
use x86_defs::state::VcpuState;

use crate::host::{self, refused};
use crate::ioctls;
use crate::run_page::{Doorman, KvmExit, MemoryExit, PortExit, RunPage, unblock_signal};
use crate::state;
use crate::statistics::KernelStatistics;
use crate::vm::Shared;

/// A vCPU under KVM.
pub(crate) struct KvmVcpu {
    // Configuration.
    fd: VcpuFd,
    shared: Arc<Shared>,
    cpuid: Vec<CpuidEntry>,
    tsc_khz: u32,
    msrs: Vec<u32>,
    bootstrap: bool,
    reset_state: VcpuState,
    // Runtime.
    handle: Arc<Handle>,
    doorman: Arc<Doorman>,
    /// KVM said that an interrupt from the 8259 can go in, and none has since.
    takes_extint: bool,
    /// Where guest time's zero stood when the TSC was last set by it.
    clock_zero: Option<i64>,
}

/// What other threads hold.
struct Handle {
    doorman: Arc<Doorman>,
    kernel: Option<KernelStatistics>,
}

impl KvmVcpu {
    pub(crate) fn new(shared: Arc<Shared>, config: VcpuConfig) -> Result<Self, AccelError> {
        let VcpuConfig {
            apic_id,
            cpuid,
            tsc_khz,
        } = config;
        let fd = shared
            .vm
            .create_vcpu(apic_id.into())
            .map_err(|e| refused("create a vCPU", e))?;
        fd.set_cpuid2(&host::to_kvm(&cpuid)?)
            .map_err(|e| refused("set CPUID", e))?;
        if fd.get_tsc_khz().ok() != Some(tsc_khz) {
            fd.set_tsc_khz(tsc_khz).map_err(|_| {
                AccelError::Unsupported(format!(
                    "a TSC of {tsc_khz} kHz: the host's processor can't scale it"
                ))
            })?;
        }
        let page = RunPage::map(&fd, shared.features.run_size)
            .map_err(|e| refused("map a vCPU's run page", e))?;
        let doorman = Arc::new(Doorman::new(page));
        let statistics = shared.features.statistics;
        let kernel = statistics.then(|| KernelStatistics::open(&fd)).flatten();
        let msrs = state::present_msrs(&fd, &shared.features.msrs)?;
        let mut reset_state = state::get(&fd, &msrs, shared.features.xsave_size)?;
        // Time goes on over a reset.
        reset_state
            .msrs
            .retain(|(index, _)| !matches!(*index, msr::TSC | msr::TSC_ADJUST));
        Ok(Self {
            fd,
            shared,
            cpuid,
            tsc_khz,
            msrs,
            bootstrap: apic_id == 0,
            reset_state,
            handle: Arc::new(Handle {
                doorman: doorman.clone(),
                kernel,
            }),
            doorman,
            takes_extint: false,
            clock_zero: None,
        })
    }

    pub(crate) fn doorman(&self) -> &Arc<Doorman> {
        &self.doorman
    }

    /// Sets TSC and paravirtual clock back by the time that guest time has stood still.
    fn follow_clock(&mut self) {
        let Some(zero) = self.shared.clock.zero() else {
            return;
        };
        self.shared.follow_clock(zero);
        let Some(old) = self.clock_zero.replace(zero).filter(|old| *old != zero) else {
            return;
        };
        let ticks = i128::from(zero - old) * i128::from(self.tsc_khz) / 1_000_000;
        let (group, attr) = (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into());
        if let Ok(offset) = ioctls::vcpu_attribute(&self.fd, group, attr) {
            let offset = offset.wrapping_sub(ticks as u64);
            // A kernel without the attribute, or that refuses, lets the TSC run on: the guest sees a leap.
            let _ = ioctls::set_vcpu_attribute(&self.fd, group, attr, offset);
        }
        // Tells the guest's watchdogs; refused when the guest does not use the clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Puts in what waits outside the local APIC: NMIs and the 8259's interrupts.
    fn deliver(&mut self, io: &dyn CpuIo) -> Result<(), AccelError> {
        if self.doorman.take_nmi() {
            self.fd.nmi().map_err(|e| refused("send an NMI", e))?;
        }
        if !self.bootstrap {
            return Ok(());
        }
        let raised = |vcpu: &Self| vcpu.shared.extint.load(Ordering::SeqCst);
        if raised(self) && self.takes_extint {
            self.count_io();
            if let Some(vector) = io.acknowledge_extint() {
                self.takes_extint = false;
                ioctls::interrupt(&self.fd, vector)
                    .map_err(|e| refused("deliver the 8259's interrupt", e))?;
            }
        }
        let waits = raised(self) && !self.takes_extint;
        self.doorman.page().request_interrupt_window(waits);
        Ok(())
    }

    fn count_io(&self) {
        self.doorman.io_calls.fetch_add(1, Ordering::Relaxed);
    }

    fn port(&self, exit: &PortExit, io: &dyn CpuIo) {
        let size = exit.size.clamp(1, 4);
        let mut data = [0; 4];
        let data = &mut data[..size];
        for index in 0..exit.count {
            self.count_io();
            if exit.read {
                data.fill(0xff);
                io.port_read(exit.port, data);
                self.doorman.page().write_port_data(exit, index, data);
            } else {
                self.doorman.page().read_port_data(exit, index, data);
                io.port_write(exit.port, data);
            }
        }
    }

    fn memory(&self, exit: &MemoryExit, io: &dyn CpuIo) {
        self.count_io();
        if exit.write {
            io.mmio_write(exit.address, &exit.data[..exit.len]);
        } else {
            let mut data = [0xff; 8];
            io.mmio_read(exit.address, &mut data[..exit.len]);
            self.doorman.page().write_memory_data(data);
        }
    }

    /// KVM can't go on: the emulator completes the instruction, or a person gets to read what it was.
    fn complete(&mut self, suberror: u32, io: &dyn CpuIo) -> Result<Option<Exit>, AccelError> {
        let before = self.state()?;
        let reason = match &self.shared.emulator {
            None => "and there is no emulator to do it".to_owned(),
            Some(emulator) => {
                let mut after = before.clone();
                let memory = &self.shared.memory;
                match emulator.step(&mut after, &self.cpuid, memory, io) {
                    Ok(()) => {
                        let size = self.shared.features.xsave_size;
                        state::put(&self.fd, size, Some(&before), &after)?;
                        return Ok(None);
                    }
                    Err(why) => format!("nor can the emulator: {why}"),
                }
            }
        };
        let error = match suberror {
            KVM_INTERNAL_ERROR_EMULATION => "can't emulate the instruction".to_owned(),
            KVM_INTERNAL_ERROR_SIMUL_EX => "met two exceptions at once".to_owned(),
            KVM_INTERNAL_ERROR_DELIVERY_EV => "failed to deliver an event".to_owned(),
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "met an unexpected exit".to_owned(),
            other => format!("has internal error {other}"),
        };
        let place = self.place(&before);
        let text = format!("KVM {error} at {place}, {reason}");
        Ok(Some(Exit::InternalError(text)))
    }

    /// Where the vCPU stands, for a person.
    fn place(&self, state: &VcpuState) -> String {
        let cs = &state.system.segments[x86_defs::state::CS];
        let rip = state.registers.rip;
        let linear = cs.base.wrapping_add(rip);
        let mut bytes = [0; 15];
        let found = self.fd.translate_gva(linear).ok().filter(|t| t.valid != 0);
        let read = found.and_then(|t| {
            let left = (4096 - (t.physical_address & 4095)).min(15) as usize;
            let bytes = &mut bytes[..left];
            self.shared.memory.read(t.physical_address, bytes).ok()?;
            Some(bytes)
        });
        let bytes = match read {
            Some(bytes) => bytes.iter().map(|b| format!(" {b:02x}")).collect(),
            None => " not readable".to_owned(),
        };
        format!("{:#x}:{rip:#x} (bytes:{bytes})", cs.selector)
    }

    fn serve(&mut self, exit: &KvmExit, io: &dyn CpuIo) -> Result<Option<Exit>, AccelError> {
        match exit {
            KvmExit::Port(exit) => self.port(exit, io),
            KvmExit::Memory(exit) => self.memory(exit, io),
            KvmExit::EndOfInterrupt(vector) => {
                self.count_io();
                io.end_of_interrupt(*vector);
            }
            KvmExit::Interrupted => {}
            KvmExit::Shutdown => return Ok(Some(Exit::Shutdown)),
            KvmExit::InternalError(suberror) => return self.complete(*suberror, io),
            KvmExit::FailedEntry(reason) => {
                let place = self.place(&self.state()?);
                return Ok(Some(Exit::InternalError(format!(
                    "the processor refused to enter the guest at {place}: reason {reason:#x}"
                ))));
            }
            KvmExit::SystemEvent(kind) => {
                return Ok(Some(Exit::InternalError(format!(
                    "KVM reports system event {kind}"
                ))));
            }
            KvmExit::Other(reason) => {
                return Ok(Some(Exit::InternalError(format!(
                    "KVM came back for reason {reason}, which was not asked for"
                ))));
            }
        }
        Ok(None)
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit, AccelError> {
        unblock_signal();
        self.follow_clock();
        let doorman = self.doorman.clone();
        let inside = doorman.enter();
        if self.bootstrap && self.shared.extint.load(Ordering::SeqCst) {
            // A halted vCPU asks for no interrupt window: have KVM say afresh whether it takes interrupts.
            doorman.refresh();
        }
        let exit = loop {
            self.deliver(io)?;
            let result = ioctls::run(&self.fd);
            self.takes_extint = doorman.page().ready_for_interrupt();
            match result {
                Ok(()) => {
                    if let Some(exit) = self.serve(&doorman.page().exit(), io)? {
                        break exit;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    if doorman.take_kick() {
                        break Exit::Kicked;
                    }
                }
                // An application processor was told to start.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(e) => return Err(refused("run a vCPU", e)),
            }
        };
        drop(inside);
        Ok(exit)
    }

    fn state(&self) -> Result<VcpuState, AccelError> {
        state::get(&self.fd, &self.msrs, self.shared.features.xsave_size)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), AccelError> {
        self.takes_extint = false;
        state::put(&self.fd, self.shared.features.xsave_size, None, state)
    }

    fn reset(&mut self) -> Result<(), AccelError> {
        self.takes_extint = false;
        self.doorman.forget();
        let size = self.shared.features.xsave_size;
        state::put(&self.fd, size, None, &self.reset_state)
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.doorman.kick();
    }

    fn nmi(&self) {
        self.doorman.nmi();
    }

    fn statistics(&self) -> VcpuStatistics {
        let kernel = self.kernel.as_ref();
        VcpuStatistics {
            // KVM does not count them.
            instructions: 0,
            io_calls: self.doorman.io_calls.load(Ordering::Relaxed),
            interrupts: kernel.map_or(0, KernelStatistics::interrupts),
            halted: Duration::from_nanos(kernel.map_or(0, KernelStatistics::halted_ns)),
            ..VcpuStatistics::default()
        }
    }
}
