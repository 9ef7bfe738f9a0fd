//! The seam to a processor.
//!
//! An [`Accel`] makes a [`Vm`] over a machine's guest memory; a [`Vm`] makes [`Vcpu`]s, each driven by a thread of its own in
//! [`Vcpu::run`]. What the processor does outside itself comes back through one trait, [`CpuIo`], as calls on that
//! thread, so that an accelerator which runs translated code need not unwind for each access.
//!
//! The local APICs belong to the accelerator. All other interrupt controllers are the machine's: an I/O APIC or a device
//! sends its interrupts with [`Vm::send_msi`] and hears of the end of level-triggered ones by [`CpuIo::end_of_interrupt`];
//! the 8259 pair raises [`Vm::set_extint`] and is acknowledged by [`CpuIo::acknowledge_extint`].

pub mod entry;
pub mod probe;

use std::sync::Arc;
use std::time::Duration;

use guest_clock::GuestClock;
use guest_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;
use x86_defs::cpuid::CpuidEntry;
use x86_defs::state::VcpuState;

/// What can go wrong in an accelerator.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// The accelerator can't be used on this host.
    #[error("{accel} is not available: {reason}")]
    Unavailable {
        /// The accelerator's name.
        accel: &'static str,
        /// Why, in a few words.
        reason: String,
    },
    /// The host refused an operation.
    #[error("{operation}: {source}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The configuration asks for what the accelerator has not got.
    #[error("{0}")]
    Unsupported(String),
    /// State that no processor can be in.
    #[error("vCPU state refused: {0}")]
    BadState(String),
}

/// What a vCPU does outside itself. All calls come on the vCPU's own thread, may come from several vCPUs at
/// once, and must not block for long.
pub trait CpuIo: Send + Sync {
    /// IN of `data.len()` (1, 2 or 4) bytes.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// OUT of `data.len()` (1, 2 or 4) bytes.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A read of 1 to 8 bytes of guest-physical device space.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// A write of 1 to 8 bytes to guest-physical device space or ROM.
    fn mmio_write(&self, addr: u64, data: &[u8]);
    /// The 8259's interrupt acknowledge cycle: the vector, or `None` when its output has fallen meanwhile.
    fn acknowledge_extint(&self) -> Option<u8>;
    /// A local APIC has ended a level-triggered interrupt of this vector.
    fn end_of_interrupt(&self, vector: u8);
}

/// A message-signalled interrupt: a write of `data` to the local APICs' address space at `address` (SDM volume 3, section
/// 12.11; bits 32 to 63 of the address carry bits 8 to 31 of the destination where extended destinations are on).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// A doorbell: guest writes to it signal an event and do nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doorbell {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes of the write that count (1, 2, 4, 8), or 0 for any.
    pub len: u32,
    /// Only writes of this value, or any.
    pub value: Option<u64>,
}

/// How a VM is made.
#[derive(Clone)]
pub struct VmConfig {
    /// The map of guest memory, which the accelerator follows ([`GuestMemory::listen`]).
    pub memory: GuestMemory,
    /// Guest time, from which TSC, paravirtual clocks and local APIC timers derive.
    pub clock: GuestClock,
    /// Most vCPUs that will ever be made.
    pub max_vcpus: u32,
}

/// How a vCPU is made.
#[derive(Debug, Clone)]
pub struct VcpuConfig {
    /// Its local APIC's ID. The vCPU with ID 0 is the bootstrap processor; the others wait for INIT and SIPI.
    pub apic_id: u32,
    /// What CPUID answers. Must be what [`Accel::supported_cpuid`] allows, with APIC IDs and topology filled in.
    pub cpuid: Vec<CpuidEntry>,
    /// TSC frequency in kHz.
    pub tsc_khz: u32,
}

/// A kind of processor.
pub trait Accel: Send + Sync {
    /// `kvm` or `soft`.
    fn name(&self) -> &'static str;
    /// Everything that CPUID may promise.
    ///
    /// # Errors
    /// When the host can't tell.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, AccelError>;
    /// The TSC frequency in kHz that guests get without scaling.
    fn tsc_khz(&self) -> u32;
    /// Makes a VM.
    ///
    /// # Errors
    /// When the host refuses, or the configuration asks too much.
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, AccelError>;
}

/// A virtual machine's processor side.
pub trait Vm: Send + Sync {
    /// Makes a vCPU in its reset state.
    ///
    /// # Errors
    /// When the host refuses, the ID is taken or CPUID promises too much.
    fn create_vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, AccelError>;
    /// Sends an interrupt message to the local APICs.
    fn send_msi(&self, msi: Msi);
    /// Sets the level of the 8259 pair's output, which goes to LINT0 of the bootstrap processor.
    fn set_extint(&self, raised: bool);
    /// Lets guest writes to a doorbell signal `event` without [`CpuIo`]. Returns false when the accelerator has no such
    /// short cut: the write then reaches [`CpuIo::mmio_write`], as it may in any case.
    fn add_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> bool;
    /// Undoes [`Self::add_doorbell`].
    fn remove_doorbell(&self, doorbell: Doorbell, event: &EventFd);
    /// Lets a signal of `event` send an interrupt message from the host's kernel, until [`Self::remove_irq_event`]; calling
    /// it again changes the message. Returns false when the accelerator has no such short cut.
    fn set_irq_event(&self, event: &EventFd, msi: Msi) -> bool;
    /// Undoes [`Self::set_irq_event`].
    fn remove_irq_event(&self, event: &EventFd);
    /// Adds the pages that the processor has written since the last call to the logs of the memory's backings
    /// ([`guest_memory::Backing::take_log`]). Nothing to do for an accelerator that logs there itself.
    ///
    /// Follows [`guest_memory::Backing::start_log`] and `stop_log`: the call after `start_log` begins the processor's log, so it
    /// must come before the first page is read.
    ///
    /// # Errors
    /// When the host refuses.
    fn sync_dirty_log(&self) -> Result<(), AccelError>;
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// [`VcpuHandle::kick`] asked for it.
    Kicked,
    /// Triple fault: the machine resets.
    Shutdown,
    /// The vCPU can't go on; a person reads the text.
    InternalError(String),
}

/// A virtual processor. One thread runs it and reads and writes its state between runs.
pub trait Vcpu: Send {
    /// Runs guest code until something needs the caller. HLT and waiting for SIPI happen inside.
    ///
    /// # Errors
    /// When the host refuses to run it at all.
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit, AccelError>;
    /// Its state.
    ///
    /// # Errors
    /// When the host refuses.
    fn state(&self) -> Result<VcpuState, AccelError>;
    /// Replaces its state.
    ///
    /// # Errors
    /// [`AccelError::BadState`] for a state that can't be; nothing is changed then as far as the host allows.
    fn set_state(&mut self, state: &VcpuState) -> Result<(), AccelError>;
    /// Puts it into its reset state (SDM volume 3, table 11-1); an application processor waits for INIT and SIPI.
    ///
    /// # Errors
    /// When the host refuses.
    fn reset(&mut self) -> Result<(), AccelError>;
    /// A handle for other threads.
    fn handle(&self) -> Arc<dyn VcpuHandle>;
}

/// What other threads may do to a vCPU.
pub trait VcpuHandle: Send + Sync {
    /// Makes the current or the next [`Vcpu::run`] return [`Exit::Kicked`] soon.
    fn kick(&self);
    /// Sends a non-maskable interrupt.
    fn nmi(&self);
    /// What it has done so far.
    fn statistics(&self) -> VcpuStatistics;
}

/// Counters of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuStatistics {
    /// Guest instructions executed, where the accelerator counts them.
    pub instructions: u64,
    /// Times that [`CpuIo`] was called.
    pub io_calls: u64,
    /// Interrupts delivered, where the accelerator counts them.
    pub interrupts: u64,
    /// Time spent halted.
    pub halted: Duration,
    /// Time spent in [`CpuIo`], where the accelerator measures it.
    pub in_devices: Duration,
    /// Walks of the guest's page tables, where the accelerator makes them.
    pub page_walks: u64,
    /// What the guest asked of the paravirtual interface, where the accelerator sees it.
    pub paravirtual: Option<ParavirtualStatistics>,
    /// Of the translation of code, where there is one.
    pub translation: Option<TranslationStatistics>,
}

/// Counters of what a vCPU asked of the hypervisor so that a guest with more vCPUs than the host has processors gets on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParavirtualStatistics {
    /// Kicks of other vCPUs out of HLT: a lock that they wait for is free (KVM_HC_KICK_CPU).
    pub kicks: u64,
    /// Interrupts sent to other vCPUs by hypercall (KVM_HC_SEND_IPI), counted by destination.
    pub ipis: u64,
    /// Flushes of its TLB that other vCPUs left for it to do, instead of interrupting it while it was halted.
    pub tlb_flushes: u64,
    /// Times that its thread let others run, in a loop of PAUSE or because the guest asked (KVM_HC_SCHED_YIELD).
    pub yields: u64,
}

/// Counters of the translation of guest code to host code, for a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TranslationStatistics {
    /// Time spent translating.
    pub translating: Duration,
    /// Blocks translated.
    pub blocks: u64,
    /// Bytes of guest code in them.
    pub guest_bytes: u64,
    /// Bytes of host code that they became.
    pub code_bytes: u64,
    /// Blocks whose page was written to afterwards.
    pub stale: u64,
    /// Times that all blocks were thrown away.
    pub flushes: u64,
    /// Bytes of host code that are kept now.
    pub cache_used: u64,
    /// Most bytes of host code that are kept.
    pub cache_size: u64,
    /// Times that translated code was left because a jump had no target yet.
    pub links: u64,
    /// Times that it was left to deliver an exception.
    pub faults: u64,
    /// Times that it was left for events, unknown targets of indirect jumps and system instructions.
    pub others: u64,
}

/// Completes single instructions on a vCPU's state. KVM hands instructions that it can't emulate to the software CPU by
/// this trait.
pub trait Emulator: Send + Sync {
    /// Executes one instruction (for a string instruction with a repeat prefix: one or more iterations), or delivers the
    /// exception that it raises.
    ///
    /// # Errors
    /// The reason for which the software CPU can't do it either, for a person to read.
    fn step(
        &self,
        state: &mut VcpuState,
        cpuid: &[CpuidEntry],
        memory: &GuestMemory,
        io: &dyn CpuIo,
    ) -> Result<(), String>;
}
