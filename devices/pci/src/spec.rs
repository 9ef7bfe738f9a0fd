//! Offsets and bits of configuration space.
//!
//! Names are those of PCI Local Bus 3.0 (chapter 6), PCI-to-PCI Bridge 1.2 (chapter 3) and PCI Express Base 4.0 (section 7.5).

/// Bytes of configuration space of a PCI Express function.
pub const CONFIG_SIZE: usize = 4096;
/// Bytes of configuration space of a conventional function.
pub const CONVENTIONAL_SIZE: usize = 256;

/// Vendor ID, 16 bits.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID, 16 bits.
pub const DEVICE_ID: u16 = 0x02;
/// Command, 16 bits.
pub const COMMAND: u16 = 0x04;
/// Status, 16 bits.
pub const STATUS: u16 = 0x06;
/// Revision ID, 8 bits.
pub const REVISION: u16 = 0x08;
/// Class code, 24 bits.
pub const CLASS: u16 = 0x09;
/// Cache line size, 8 bits.
pub const CACHE_LINE: u16 = 0x0c;
/// Header type, 8 bits.
pub const HEADER_TYPE: u16 = 0x0e;
/// First base address register.
pub const BAR0: u16 = 0x10;
/// Subsystem vendor ID, 16 bits; type 0.
pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
/// Subsystem ID, 16 bits; type 0.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Offset of the first capability, 8 bits.
pub const CAPABILITIES: u16 = 0x34;
/// Interrupt line, 8 bits.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin, 8 bits: 1 for INTA#.
pub const INTERRUPT_PIN: u16 = 0x3d;

/// Primary bus number, 8 bits; type 1, as the following.
pub const PRIMARY_BUS: u16 = 0x18;
/// Secondary bus number, 8 bits.
pub const SECONDARY_BUS: u16 = 0x19;
/// Subordinate bus number, 8 bits.
pub const SUBORDINATE_BUS: u16 = 0x1a;
/// I/O base, 8 bits; the limit follows.
pub const IO_BASE: u16 = 0x1c;
/// I/O limit, 8 bits.
pub const IO_LIMIT: u16 = 0x1d;
/// Secondary status, 16 bits.
pub const SECONDARY_STATUS: u16 = 0x1e;
/// Memory base, 16 bits.
pub const MEMORY_BASE: u16 = 0x20;
/// Memory limit, 16 bits.
pub const MEMORY_LIMIT: u16 = 0x22;
/// Prefetchable memory base, 16 bits.
pub const PREFETCH_BASE: u16 = 0x24;
/// Prefetchable memory limit, 16 bits.
pub const PREFETCH_LIMIT: u16 = 0x26;
/// Prefetchable base, upper 32 bits.
pub const PREFETCH_BASE_UPPER: u16 = 0x28;
/// Prefetchable limit, upper 32 bits.
pub const PREFETCH_LIMIT_UPPER: u16 = 0x2c;
/// I/O base, upper 16 bits.
pub const IO_BASE_UPPER: u16 = 0x30;
/// I/O limit, upper 16 bits.
pub const IO_LIMIT_UPPER: u16 = 0x32;
/// Bridge control, 16 bits.
pub const BRIDGE_CONTROL: u16 = 0x3e;

/// COMMAND: answers in port space.
pub const COMMAND_IO: u16 = 1 << 0;
/// COMMAND: answers in memory space.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// COMMAND: may master the bus (DMA and interrupt messages).
pub const COMMAND_MASTER: u16 = 1 << 2;
/// COMMAND: parity error response.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// COMMAND: SERR# enable.
pub const COMMAND_SERR: u16 = 1 << 8;
/// COMMAND: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// STATUS: INTx is asserted.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// STATUS: there is a capability list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// STATUS: the error bits, written with ones to clear.
pub const STATUS_ERRORS: u16 = 0xf900;
/// HEADER_TYPE: there are other functions in the slot.
pub const HEADER_MULTIFUNCTION: u8 = 0x80;
/// BRIDGE_CONTROL: what can be written: parity, SERR#, ISA, VGA, VGA 16-bit, reset.
pub const BRIDGE_CONTROL_WRITABLE: u16 = 0x005f;
/// BRIDGE_CONTROL: reset of the secondary bus.
pub const BRIDGE_CONTROL_RESET: u16 = 1 << 6;

/// Base address register: port space.
pub const BAR_IO: u32 = 1;
/// Base address register: 64 bits wide.
pub const BAR_64: u32 = 1 << 2;
/// Base address register: prefetchable.
pub const BAR_PREFETCHABLE: u32 = 1 << 3;

/// Capability: power management.
pub const CAP_PM: u8 = 0x01;
/// Capability: MSI.
pub const CAP_MSI: u8 = 0x05;
/// Capability: vendor-specific.
pub const CAP_VENDOR: u8 = 0x09;
/// Capability: subsystem IDs of a bridge.
pub const CAP_SUBSYSTEM: u8 = 0x0d;
/// Capability: PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;
/// Capability: MSI-X.
pub const CAP_MSIX: u8 = 0x11;

/// MSI message control: on.
pub const MSI_ENABLE: u16 = 1;
/// MSI message control: 64-bit addresses.
pub const MSI_64: u16 = 1 << 7;
/// MSI message control: per-vector masking.
pub const MSI_MASKABLE: u16 = 1 << 8;
/// MSI-X message control: on.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// MSI-X message control: all vectors are masked.
pub const MSIX_MASK_ALL: u16 = 1 << 14;

/// Offsets in the PCI Express capability.
pub mod express {
    /// Capabilities register, 16 bits.
    pub const FLAGS: u16 = 0x02;
    /// Device capabilities, 32 bits.
    pub const DEVICE_CAP: u16 = 0x04;
    /// Device control, 16 bits.
    pub const DEVICE_CONTROL: u16 = 0x08;
    /// Device status, 16 bits.
    pub const DEVICE_STATUS: u16 = 0x0a;
    /// Link capabilities, 32 bits.
    pub const LINK_CAP: u16 = 0x0c;
    /// Link control, 16 bits.
    pub const LINK_CONTROL: u16 = 0x10;
    /// Link status, 16 bits.
    pub const LINK_STATUS: u16 = 0x12;
    /// Slot capabilities, 32 bits.
    pub const SLOT_CAP: u16 = 0x14;
    /// Slot control, 16 bits.
    pub const SLOT_CONTROL: u16 = 0x18;
    /// Slot status, 16 bits.
    pub const SLOT_STATUS: u16 = 0x1a;
    /// Root control, 16 bits.
    pub const ROOT_CONTROL: u16 = 0x1c;
    /// Root status, 32 bits.
    pub const ROOT_STATUS: u16 = 0x20;
    /// Device capabilities 2, 32 bits.
    pub const DEVICE_CAP2: u16 = 0x24;
    /// Device control 2, 16 bits.
    pub const DEVICE_CONTROL2: u16 = 0x28;
    /// Link capabilities 2, 32 bits.
    pub const LINK_CAP2: u16 = 0x2c;
    /// Link control 2, 16 bits.
    pub const LINK_CONTROL2: u16 = 0x30;
    /// Bytes of the capability, version 2.
    pub const SIZE: u16 = 0x3c;

    /// FLAGS: a slot is implemented.
    pub const FLAGS_SLOT: u16 = 1 << 8;
    /// LINK_CAP: data link layer link active reporting.
    pub const LINK_CAP_ACTIVE_REPORTING: u32 = 1 << 20;
    /// LINK_STATUS: the data link layer is up.
    pub const LINK_STATUS_ACTIVE: u16 = 1 << 13;
    /// DEVICE_CONTROL: function level reset.
    pub const DEVICE_CONTROL_FLR: u16 = 1 << 15;
    /// DEVICE_CAP: function level reset is possible.
    pub const DEVICE_CAP_FLR: u32 = 1 << 28;
    /// DEVICE_CAP: role-based error reporting.
    pub const DEVICE_CAP_RBER: u32 = 1 << 15;

    /// SLOT_CAP: attention button.
    pub const SLOT_CAP_BUTTON: u32 = 1 << 0;
    /// SLOT_CAP: power controller.
    pub const SLOT_CAP_POWER: u32 = 1 << 1;
    /// SLOT_CAP: attention indicator.
    pub const SLOT_CAP_ATTENTION: u32 = 1 << 3;
    /// SLOT_CAP: power indicator.
    pub const SLOT_CAP_POWER_INDICATOR: u32 = 1 << 4;
    /// SLOT_CAP: hot-plug capable.
    pub const SLOT_CAP_HOT_PLUG: u32 = 1 << 6;
    /// SLOT_CAP: no command completed events.
    pub const SLOT_CAP_NO_COMMAND_COMPLETED: u32 = 1 << 18;

    /// SLOT_CONTROL: what can be written.
    pub const SLOT_CONTROL_WRITABLE: u16 = 0x1fff;
    /// SLOT_CONTROL: hot-plug interrupt enable.
    pub const SLOT_CONTROL_HOT_PLUG_INTERRUPT: u16 = 1 << 5;
    /// SLOT_CONTROL: attention indicator off.
    pub const SLOT_CONTROL_ATTENTION_OFF: u16 = 3 << 6;
    /// SLOT_CONTROL: power indicator field.
    pub const SLOT_CONTROL_POWER_INDICATOR: u16 = 3 << 8;
    /// SLOT_CONTROL: power indicator on.
    pub const SLOT_CONTROL_POWER_INDICATOR_ON: u16 = 1 << 8;
    /// SLOT_CONTROL: power indicator off.
    pub const SLOT_CONTROL_POWER_INDICATOR_OFF: u16 = 3 << 8;
    /// SLOT_CONTROL: power controller control; set: power off.
    pub const SLOT_CONTROL_POWER_OFF: u16 = 1 << 10;
    /// SLOT_CONTROL: data link layer state changed enable.
    pub const SLOT_CONTROL_LINK_CHANGED: u16 = 1 << 12;

    /// SLOT_STATUS: the attention button was pressed.
    pub const SLOT_STATUS_BUTTON: u16 = 1 << 0;
    /// SLOT_STATUS: presence has changed.
    pub const SLOT_STATUS_PRESENCE_CHANGED: u16 = 1 << 3;
    /// SLOT_STATUS: a command has completed.
    pub const SLOT_STATUS_COMMAND_COMPLETED: u16 = 1 << 4;
    /// SLOT_STATUS: a card is in the slot.
    pub const SLOT_STATUS_PRESENT: u16 = 1 << 6;
    /// SLOT_STATUS: the link's state has changed.
    pub const SLOT_STATUS_LINK_CHANGED: u16 = 1 << 8;
    /// SLOT_STATUS: the event bits, written with ones to clear.
    pub const SLOT_STATUS_EVENTS: u16 = 0x011f;
}
