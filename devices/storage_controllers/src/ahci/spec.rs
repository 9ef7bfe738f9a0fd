//! Registers and structures of Serial ATA AHCI 1.3.1; section numbers are that specification's.

/// Bytes of the register space (section 3).
pub const ABAR_SIZE: u64 = 0x1000;
/// Offset of the first port's registers.
pub const PORT_BASE: u64 = 0x100;
/// Bytes of a port's registers.
pub const PORT_STRIDE: u64 = 0x80;
/// Command slots of a port.
pub const SLOTS: u32 = 32;

/// Host capabilities (3.1.1).
pub const CAP: u64 = 0x00;
/// Global host control (3.1.2).
pub const GHC: u64 = 0x04;
/// Interrupt status (3.1.3).
pub const IS: u64 = 0x08;
/// Ports implemented (3.1.4).
pub const PI: u64 = 0x0c;
/// Version (3.1.5).
pub const VS: u64 = 0x10;

/// CAP: 64-bit addressing.
pub const CAP_S64A: u32 = 1 << 31;
/// CAP: native command queueing.
pub const CAP_SNCQ: u32 = 1 << 30;
/// CAP: command list override.
pub const CAP_SCLO: u32 = 1 << 24;
/// CAP: speed, here 6 Gbit/s.
pub const CAP_ISS_GEN3: u32 = 3 << 20;
/// CAP: AHCI only.
pub const CAP_SAM: u32 = 1 << 18;
/// VS: 1.3.1.
pub const VERSION: u32 = 0x0001_0301;
/// GHC: reset.
pub const GHC_HR: u32 = 1 << 0;
/// GHC: interrupts enabled.
pub const GHC_IE: u32 = 1 << 1;
/// GHC: AHCI enabled.
pub const GHC_AE: u32 = 1 << 31;

/// Command list base (3.3.1); the upper half follows.
pub const PX_CLB: u64 = 0x00;
/// Upper half of the command list base.
pub const PX_CLBU: u64 = 0x04;
/// Received FIS base (3.3.3).
pub const PX_FB: u64 = 0x08;
/// Upper half of the received FIS base.
pub const PX_FBU: u64 = 0x0c;
/// Interrupt status (3.3.5).
pub const PX_IS: u64 = 0x10;
/// Interrupt enable (3.3.6).
pub const PX_IE: u64 = 0x14;
/// Command and status (3.3.7).
pub const PX_CMD: u64 = 0x18;
/// Task file data (3.3.8).
pub const PX_TFD: u64 = 0x20;
/// Signature (3.3.9).
pub const PX_SIG: u64 = 0x24;
/// Serial ATA status (3.3.10).
pub const PX_SSTS: u64 = 0x28;
/// Serial ATA control (3.3.11).
pub const PX_SCTL: u64 = 0x2c;
/// Serial ATA error (3.3.12).
pub const PX_SERR: u64 = 0x30;
/// Serial ATA active (3.3.13).
pub const PX_SACT: u64 = 0x34;
/// Command issue (3.3.14).
pub const PX_CI: u64 = 0x38;

/// PxIS: device to host register FIS.
pub const IS_DHRS: u32 = 1 << 0;
/// PxIS: PIO setup FIS.
pub const IS_PSS: u32 = 1 << 1;
/// PxIS: set device bits FIS.
pub const IS_SDBS: u32 = 1 << 3;
/// PxIS: port connect change; follows PxSERR.DIAG.X.
pub const IS_PCS: u32 = 1 << 6;
/// PxIS: host bus data error.
pub const IS_HBDS: u32 = 1 << 28;
/// PxIS: host bus fatal error.
pub const IS_HBFS: u32 = 1 << 29;
/// PxIS: task file error.
pub const IS_TFES: u32 = 1 << 30;
/// PxIE: what can be written.
pub const IE_WRITABLE: u32 = 0xfdc0_007f;

/// PxCMD: start.
pub const CMD_ST: u32 = 1 << 0;
/// PxCMD: spin up.
pub const CMD_SUD: u32 = 1 << 1;
/// PxCMD: power on.
pub const CMD_POD: u32 = 1 << 2;
/// PxCMD: command list override.
pub const CMD_CLO: u32 = 1 << 3;
/// PxCMD: FIS receive enable.
pub const CMD_FRE: u32 = 1 << 4;
/// PxCMD: FIS receive running.
pub const CMD_FR: u32 = 1 << 14;
/// PxCMD: command list running.
pub const CMD_CR: u32 = 1 << 15;
/// PxCMD: what can be written and stays: ST, FRE, ATAPI, LED, power management and ICC.
pub const CMD_WRITABLE: u32 = 0x0f00_0011;

/// PxSSTS: device present, 6 Gbit/s, active.
pub const SSTS_PRESENT: u32 = 0x133;
/// PxSCTL: device detection initialization.
pub const SCTL_DET: u32 = 0x0f;
/// PxSERR: DIAG.X, exchanged.
pub const SERR_X: u32 = 1 << 26;
/// PxSIG of an ATA disk.
pub const SIG_ATA: u32 = 0x0000_0101;
/// PxSIG before a device has told.
pub const SIG_NONE: u32 = 0xffff_ffff;
/// PxTFD without a device.
pub const TFD_NONE: u32 = 0x7f;

/// Command header: bytes in one (4.2.2).
pub const HEADER_SIZE: u64 = 32;
/// Command table: offset of the region descriptors (4.2.3).
pub const PRDT: u64 = 0x80;
/// Region descriptor: bytes in one.
pub const PRD_SIZE: u64 = 16;
/// Region descriptor: the count field, less one.
pub const PRD_COUNT: u32 = 0x3f_ffff;

/// Received FIS structure: PIO setup (4.2.1).
pub const RFIS_PIO: u64 = 0x20;
/// Received FIS structure: device to host register.
pub const RFIS_D2H: u64 = 0x40;
/// Received FIS structure: set device bits.
pub const RFIS_SDB: u64 = 0x58;

/// FIS type: host to device register.
pub const FIS_H2D: u8 = 0x27;
/// FIS type: device to host register.
pub const FIS_D2H: u8 = 0x34;
/// FIS type: PIO setup.
pub const FIS_PIO: u8 = 0x5f;
/// FIS type: set device bits.
pub const FIS_SDB: u8 = 0xa1;
/// FIS: raises an interrupt.
pub const FIS_INTERRUPT: u8 = 0x40;
/// FIS: from device to host.
pub const FIS_TO_HOST: u8 = 0x20;
/// Host to device FIS: a command, not a control update.
pub const FIS_COMMAND: u8 = 0x80;
/// Device control: software reset.
pub const CONTROL_SRST: u8 = 0x04;
