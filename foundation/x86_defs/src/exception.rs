//! Exception vectors (SDM volume 3, table 7-1).

/// Divide error, #DE.
pub const DE: u8 = 0;
/// Debug, #DB.
pub const DB: u8 = 1;
/// Non-maskable interrupt.
pub const NMI: u8 = 2;
/// Breakpoint, #BP.
pub const BP: u8 = 3;
/// Overflow, #OF.
pub const OF: u8 = 4;
/// Bound range exceeded, #BR.
pub const BR: u8 = 5;
/// Invalid opcode, #UD.
pub const UD: u8 = 6;
/// Device not available, #NM.
pub const NM: u8 = 7;
/// Double fault, #DF.
pub const DF: u8 = 8;
/// Invalid TSS, #TS.
pub const TS: u8 = 10;
/// Segment not present, #NP.
pub const NP: u8 = 11;
/// Stack-segment fault, #SS.
pub const SS: u8 = 12;
/// General protection, #GP.
pub const GP: u8 = 13;
/// Page fault, #PF.
pub const PF: u8 = 14;
/// x87 floating-point error, #MF.
pub const MF: u8 = 16;
/// Alignment check, #AC.
pub const AC: u8 = 17;
/// Machine check, #MC.
pub const MC: u8 = 18;
/// SIMD floating-point exception, #XM.
pub const XM: u8 = 19;

/// Page-fault error code: the page was present.
pub const PF_PRESENT: u32 = 1 << 0;
/// Page-fault error code: the access was a write.
pub const PF_WRITE: u32 = 1 << 1;
/// Page-fault error code: the access was made in user mode.
pub const PF_USER: u32 = 1 << 2;
/// Page-fault error code: a reserved bit was set in an entry.
pub const PF_RESERVED: u32 = 1 << 3;
/// Page-fault error code: the access was an instruction fetch.
pub const PF_FETCH: u32 = 1 << 4;
