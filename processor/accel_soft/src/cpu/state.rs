//! The state of a vCPU.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use accel::CpuIo;
use guest_memory::Region;
use x86_defs::control::{Cr0, Cr4, Efer, Xcr0};
use x86_defs::cpuid::CpuidEntry;
use x86_defs::state::{DescriptorTable, Segment};

use super::{Counters, Exception, Machine, Mode, Op, RegisterFile, Status, VcpuShared};
use crate::apic::LocalApic;
use crate::mmu::Tlb;
use crate::simd::Vectors;
use crate::system::SystemState;
use crate::translate::{Gate, Hot};
use crate::x87::X87;

/// A vCPU: the architectural state and what is derived from it.
///
/// The fields that every instruction touches come first. `rip` is exact only at the ends of blocks; in between it follows
/// from [`Cpu::next_rip`].
///
/// Translated code runs with the stack pointer at this structure, and reaches the first 128 bytes by short displacements.
#[repr(C, align(64))]
pub(crate) struct Cpu {
    /// What translated code keeps here and only it.
    pub(crate) hot: Hot,
    /// Instructions executed up to the start of the running block.
    pub(crate) instructions: u64,
    /// Translation buffers.
    pub(crate) tlb: Tlb,
    /// Instruction pointer.
    pub(crate) rip: u64,
    /// CF, PF, AF, ZF, SF, OF.
    pub(crate) status: Status,
    /// The rest of the running block may be stale: leave it after this instruction.
    pub(crate) leave_block: bool,
    /// The run loop shall look at interrupts and shadows before the next block.
    pub(crate) attention: bool,
    /// The x87 registers are in the host's: those in `x87` are old.
    pub(crate) x87_live: bool,
    /// General registers, RIP of the running block's first instruction, and a zero.
    pub(crate) regs: RegisterFile,
    /// What blocks are decoded for. Derived ([`Cpu::update_mode`]).
    pub(crate) mode: Mode,
    /// Current privilege level: DPL of SS; 3 in virtual-8086 mode, 0 in real mode.
    pub(crate) cpl: u8,
    /// What entering and leaving translated code needs.
    pub(crate) gate: Gate,
    /// Segment bases by number, zero where 64-bit mode ignores them, and two zeroes. Derived.
    pub(crate) bases: [u64; 8],
    /// All ones in 64-bit mode, 32 ones elsewhere. Derived.
    pub(crate) rip_mask: u64,
    /// RFLAGS without the status flags.
    pub(crate) system_flags: u64,
    /// The exception of the last fault.
    pub(crate) exception: Exception,
    /// The operation that raised it.
    pub(crate) fault_op: *const Op,
    /// The operation after which a block was left early, or null.
    pub(crate) left_at: *const Op,

    /// ES, CS, SS, DS, FS, GS.
    pub(crate) segments: [Segment; 6],
    /// Task register.
    pub(crate) tr: Segment,
    /// Local descriptor table register.
    pub(crate) ldtr: Segment,
    /// GDTR.
    pub(crate) gdtr: DescriptorTable,
    /// IDTR.
    pub(crate) idtr: DescriptorTable,
    /// CR0.
    pub(crate) cr0: Cr0,
    /// CR2.
    pub(crate) cr2: u64,
    /// CR3.
    pub(crate) cr3: u64,
    /// CR4.
    pub(crate) cr4: Cr4,
    /// IA32_EFER.
    pub(crate) efer: Efer,
    /// XCR0.
    pub(crate) xcr0: Xcr0,
    /// DR0 to DR3.
    pub(crate) dr: [u64; 4],
    /// DR6.
    pub(crate) dr6: u64,
    /// DR7.
    pub(crate) dr7: u64,
    /// XMM and YMM registers, MXCSR.
    pub(crate) vectors: Vectors,
    /// x87 and MMX.
    pub(crate) x87: X87,
    /// MSRs and what else the system instructions keep.
    pub(crate) system: SystemState,
    /// Local APIC.
    pub(crate) apic: LocalApic,

    /// Interrupts were looked for while IF was clear: one may wait for it.
    pub(crate) held_back: bool,
    /// STI shadow: no interrupt before the next instruction has ended.
    pub(crate) sti_shadow: bool,
    /// MOV SS shadow: no interrupt, NMI or debug trap before the next instruction has ended.
    pub(crate) mov_ss_shadow: bool,
    /// NMIs wait for IRET.
    pub(crate) nmi_masked: bool,
    /// An NMI waits.
    pub(crate) nmi_pending: bool,
    /// In HLT.
    pub(crate) halted: bool,
    /// Waiting for INIT or a startup IPI; executes nothing.
    pub(crate) waiting: Waiting,

    /// What CPUID answers, by leaf and subleaf (`u32::MAX` where the subleaf does not matter).
    pub(crate) cpuid: BTreeMap<(u32, u32), CpuidEntry>,
    /// TSC frequency.
    pub(crate) tsc_khz: u32,
    /// What the vCPUs share.
    pub(crate) machine: Arc<Machine>,
    /// What other threads see of this one.
    pub(crate) shared: Arc<VcpuShared>,
    /// The map of guest memory that host addresses in the TLB were taken from.
    pub(crate) memory_map: Arc<Vec<Region>>,
    /// The generation of that map.
    pub(crate) map_generation: u64,
    /// Decoded blocks rest on a map that is no longer.
    pub(crate) code_stale: bool,
    /// Where port and memory accesses go while `run` is active.
    pub(crate) io: Option<NonNull<dyn CpuIo>>,
    /// What is counted for people.
    pub(crate) counters: Counters,
    /// PAUSE instructions executed.
    pub(crate) pauses: u32,
}

/// What an application processor that does not run waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// Nothing: it runs or is halted.
    No,
    /// The first INIT.
    Init,
    /// A startup IPI.
    Sipi,
}

// SAFETY: the raw pointers are into this vCPU's own block cache, into guest memory (which any thread may use) and to the
// `CpuIo` (which is Sync) of a `run` that is going on, and then only on its thread.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A vCPU in its power-up state.
    pub(crate) fn new(
        machine: Arc<Machine>,
        shared: Arc<VcpuShared>,
        cpuid: &[CpuidEntry],
        tsc_khz: u32,
    ) -> Self {
        let memory_map = machine.memory.regions();
        let apic = LocalApic::new(
            shared.mailbox.clone(),
            machine.apics.clone(),
            machine.clock.clone(),
        );
        let system = SystemState::new(cpuid);
        let cpuid = cpuid
            .iter()
            .map(|e| ((e.leaf, e.subleaf.unwrap_or(u32::MAX)), *e))
            .collect();
        let mut regs = RegisterFile::new();
        regs[crate::block::FAR_SLOT] = crate::block::FAR as u64;
        let events = std::ptr::from_ref(shared.mailbox.events_word());
        let mut cpu = Self {
            tlb: Tlb::new(),
            hot: Hot::new(events),
            gate: Gate::new(),
            x87_live: false,
            regs,
            status: Status::default(),
            leave_block: false,
            attention: false,
            mode: Mode::empty(),
            cpl: 0,
            bases: [0; 8],
            rip: 0,
            rip_mask: u64::MAX,
            system_flags: 2,
            exception: Exception::Resume,
            fault_op: std::ptr::null(),
            left_at: std::ptr::null(),
            segments: [Segment::default(); 6],
            tr: Segment::default(),
            ldtr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: Cr0::empty(),
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            efer: Efer::empty(),
            xcr0: Xcr0::X87,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            vectors: Vectors::default(),
            x87: X87::default(),
            system,
            apic,
            held_back: false,
            sti_shadow: false,
            mov_ss_shadow: false,
            nmi_masked: false,
            nmi_pending: false,
            halted: false,
            waiting: Waiting::No,
            cpuid,
            tsc_khz,
            machine,
            shared,
            memory_map,
            map_generation: u64::MAX,
            code_stale: false,
            instructions: 0,
            io: None,
            counters: Counters::default(),
            pauses: 0,
        };
        cpu.power_up();
        cpu
    }

    /// Calls the machine. Host addresses taken before the call may be stale after it: the call may have changed the map of
    /// memory. Does nothing when no `run` is going on.
    pub(crate) fn outside<R: Default>(&mut self, call: impl FnOnce(&dyn CpuIo) -> R) -> R {
        let Some(io) = self.io else {
            return R::default();
        };
        let start = Instant::now();
        let shared = self.shared.clone();
        shared.in_guest.store(false, Ordering::SeqCst);
        // SAFETY: `io` is set for the time of `run` from the reference that it was given.
        let result = call(unsafe { io.as_ref() });
        let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.io_calls += 1;
        self.counters.io_time = self.counters.io_time.saturating_add(took);
        shared.in_guest.store(true, Ordering::SeqCst);
        self.follow_memory();
        if shared.mailbox.has_events() {
            self.leave_block = true;
        }
        result
    }
}
