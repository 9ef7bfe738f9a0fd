//! The architectural state of a virtual processor, in a form that every accelerator can give and take.

/// Index of RAX in [`Registers::gpr`]; the others follow in encoding order: RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
pub const RAX: usize = 0;
/// Index of RCX.
pub const RCX: usize = 1;
/// Index of RDX.
pub const RDX: usize = 2;
/// Index of RBX.
pub const RBX: usize = 3;
/// Index of RSP.
pub const RSP: usize = 4;
/// Index of RBP.
pub const RBP: usize = 5;
/// Index of RSI.
pub const RSI: usize = 6;
/// Index of RDI.
pub const RDI: usize = 7;

/// General registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Registers {
    /// General-purpose registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

/// Index of ES in [`SystemRegisters::segments`]; the others follow in encoding order.
pub const ES: usize = 0;
/// Index of CS.
pub const CS: usize = 1;
/// Index of SS.
pub const SS: usize = 2;
/// Index of DS.
pub const DS: usize = 3;
/// Index of FS.
pub const FS: usize = 4;
/// Index of GS.
pub const GS: usize = 5;

/// A segment register with its hidden part (SDM volume 3, section 3.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes (granularity applied).
    pub limit: u32,
    /// Attributes as in bits 8 to 23 of a descriptor's second word, shifted to bit 0 with the limit's bits zero: type
    /// (0-3), S (4), DPL (5-6), P (7), AVL (12), L (13), D/B (14), G (15); bit 16 says unusable.
    pub attributes: u32,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// System registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SystemRegisters {
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8: the task priority.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XCR0.
    pub xcr0: u64,
}

/// What a vCPU is doing (ACPI's and the multiprocessor specification's states).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MpState {
    /// Executing.
    #[default]
    Runnable,
    /// An application processor before its first INIT.
    Uninitialized,
    /// After INIT, waiting for a startup IPI.
    WaitForSipi,
    /// In HLT.
    Halted,
}

/// Events on their way into a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Events {
    /// An exception to be delivered: vector and error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// An external interrupt that was taken from its controller and is not delivered yet.
    pub interrupt: Option<u8>,
    /// The instruction before was STI: no interrupt is taken now.
    pub sti_shadow: bool,
    /// The instruction before was MOV SS or POP SS: no interrupt or debug exception is taken now.
    pub mov_ss_shadow: bool,
    /// An NMI is pending.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
}

/// Bytes of [`VcpuState::lapic`].
pub const LAPIC_SIZE: usize = 1024;

/// All the state of a vCPU that a guest can see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuState {
    /// General registers.
    pub registers: Registers,
    /// System registers.
    pub system: SystemRegisters,
    /// x87, SSE and extended state in the standard (not compacted) XSAVE format (SDM volume 1, section 13.4): legacy
    /// area, header, then the components that CPUID leaf 0xD places. At least 576 bytes.
    pub xsave: Vec<u8>,
    /// MSRs that are not part of the above: number and value.
    pub msrs: Vec<(u32, u64)>,
    /// Events under way.
    pub events: Events,
    /// Running state.
    pub mp_state: MpState,
    /// The local APIC's registers, each 32-bit register at its xAPIC offset (SDM volume 3, table 12-1).
    pub lapic: Vec<u8>,
}
