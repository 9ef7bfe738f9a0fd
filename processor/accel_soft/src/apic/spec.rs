//! Registers of the local APIC (SDM volume 3, chapter 12).

/// Offsets in the xAPIC page; an x2APIC MSR is 0x800 plus the offset divided by 16 (SDM volume 3, tables 12-1 and 12-6).
pub mod offset {
    /// Local APIC ID.
    pub const ID: u16 = 0x20;
    /// Version.
    pub const VERSION: u16 = 0x30;
    /// Task priority.
    pub const TPR: u16 = 0x80;
    /// Arbitration priority.
    pub const APR: u16 = 0x90;
    /// Processor priority.
    pub const PPR: u16 = 0xa0;
    /// End of interrupt.
    pub const EOI: u16 = 0xb0;
    /// Remote read.
    pub const RRD: u16 = 0xc0;
    /// Logical destination.
    pub const LDR: u16 = 0xd0;
    /// Destination format.
    pub const DFR: u16 = 0xe0;
    /// Spurious interrupt vector.
    pub const SVR: u16 = 0xf0;
    /// First of eight in-service registers.
    pub const ISR: u16 = 0x100;
    /// First of eight trigger mode registers.
    pub const TMR: u16 = 0x180;
    /// First of eight interrupt request registers.
    pub const IRR: u16 = 0x200;
    /// Error status.
    pub const ESR: u16 = 0x280;
    /// LVT for corrected machine checks.
    pub const LVT_CMCI: u16 = 0x2f0;
    /// Interrupt command, low half.
    pub const ICR_LOW: u16 = 0x300;
    /// Interrupt command, high half.
    pub const ICR_HIGH: u16 = 0x310;
    /// LVT for the timer.
    pub const LVT_TIMER: u16 = 0x320;
    /// LVT for the thermal sensor.
    pub const LVT_THERMAL: u16 = 0x330;
    /// LVT for performance counters.
    pub const LVT_PERFORMANCE: u16 = 0x340;
    /// LVT for the LINT0 pin.
    pub const LVT_LINT0: u16 = 0x350;
    /// LVT for the LINT1 pin.
    pub const LVT_LINT1: u16 = 0x360;
    /// LVT for errors.
    pub const LVT_ERROR: u16 = 0x370;
    /// Initial count of the timer.
    pub const TIMER_INITIAL: u16 = 0x380;
    /// Current count of the timer.
    pub const TIMER_CURRENT: u16 = 0x390;
    /// Divide configuration of the timer.
    pub const TIMER_DIVIDE: u16 = 0x3e0;
    /// Self-IPI (x2APIC only).
    pub const SELF_IPI: u16 = 0x3f0;
}

/// Integrated APIC, six LVT entries after the first, EOI broadcasts can be suppressed (SDM volume 3, section 12.4.8).
pub const VERSION: u32 = 0x14 | 5 << 16 | 1 << 24;

/// LVT: delivery status (read-only).
pub const LVT_PENDING: u32 = 1 << 12;
/// LVT: level-triggered interrupt accepted and not ended yet (read-only).
pub const LVT_REMOTE_IRR: u32 = 1 << 14;
/// LVT: level-triggered.
pub const LVT_LEVEL: u32 = 1 << 15;
/// LVT: masked.
pub const LVT_MASKED: u32 = 1 << 16;
/// LVT: mode of the timer.
pub const LVT_TIMER_MODE: u32 = 3 << 17;
/// Timer mode: once.
pub const TIMER_ONE_SHOT: u32 = 0;
/// Timer mode: again and again.
pub const TIMER_PERIODIC: u32 = 1 << 17;
/// Timer mode: at a value of the TSC.
pub const TIMER_TSC_DEADLINE: u32 = 2 << 17;

/// SVR: the APIC is enabled by software.
pub const SVR_ENABLED: u32 = 1 << 8;
/// SVR: no EOI broadcast.
pub const SVR_EOI_SUPPRESS: u32 = 1 << 12;

/// ESR: an interrupt with a vector below 16 was sent.
pub const ESR_SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: an interrupt with a vector below 16 was received.
pub const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: a register that is not there was accessed.
pub const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// ICR and MSI: the destination is logical.
pub const ICR_LOGICAL: u32 = 1 << 11;
/// ICR: asserted, not de-asserted.
pub const ICR_ASSERT: u32 = 1 << 14;
/// ICR: level-triggered.
pub const ICR_LEVEL: u32 = 1 << 15;
/// ICR: the bits that software may set: vector, delivery and destination mode, level, trigger, shorthand.
pub const ICR_WRITABLE: u32 = 0xc_cfff;

/// IA32_APIC_BASE: this is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: enabled.
pub const BASE_ENABLED: u64 = 1 << 11;
/// IA32_APIC_BASE: the page's address.
pub const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Where the registers are after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

/// How an interrupt is delivered (SDM volume 3, section 12.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryMode {
    /// As the vector says, to all destinations.
    Fixed,
    /// As the vector says, to one of the destinations.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Startup IPI; in an LVT reserved.
    Startup,
    /// The vector comes from the 8259.
    ExtInt,
    /// Not a mode.
    Reserved,
}

impl DeliveryMode {
    /// From bits 8 to 10 of an ICR, an LVT or MSI data.
    pub const fn from_bits(register: u32) -> Self {
        match register >> 8 & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }
}
