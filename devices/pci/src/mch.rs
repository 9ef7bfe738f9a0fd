//! The host bridge of Q35: the memory controller hub's function 00:00.0.
//!
//! Intel 3 Series Express Chipset Family datasheet (document 316966), chapter 5.1.

use std::sync::Arc;

use device_model::{Device, IoBus, IoRegion, ResetKind};
use parking_lot::Mutex;

use crate::builder::{FunctionBuilder, Identity};
use crate::function::{PciDevice, PciFunction};
use crate::host::{ConfigAccess, ECAM_BYTES_PER_BUS, Ecam};

/// Registers of the host bridge.
pub mod spec {
    /// Egress port base address, 64 bits.
    pub const PXPEPBAR: u16 = 0x40;
    /// Memory-mapped registers' base address, 64 bits.
    pub const MCHBAR: u16 = 0x48;
    /// Graphics control, 16 bits.
    pub const GGC: u16 = 0x52;
    /// Device enable, 32 bits.
    pub const DEVEN: u16 = 0x54;
    /// Base address of memory-mapped configuration space, 64 bits.
    pub const PCIEXBAR: u16 = 0x60;
    /// Base address of the link to the I/O hub, 64 bits.
    pub const DMIBAR: u16 = 0x68;
    /// First of seven registers that say who answers for C0000h to FFFFFh.
    pub const PAM0: u16 = 0x90;
    /// Legacy access control.
    pub const LAC: u16 = 0x97;
    /// System management RAM control.
    pub const SMRAM: u16 = 0x9d;
    /// Extended system management RAM control.
    pub const ESMRAMC: u16 = 0x9e;
    /// Top of memory, 16 bits.
    pub const TOM: u16 = 0xa0;
    /// Top of upper usable memory, 16 bits.
    pub const TOUUD: u16 = 0xa2;
    /// Top of low usable memory, 16 bits.
    pub const TOLUD: u16 = 0xb0;

    /// PCIEXBAR: on.
    pub const PCIEXBAR_ENABLE: u64 = 1;
    /// PCIEXBAR: length; 0: 256 buses, 1: 128, 2: 64.
    pub const PCIEXBAR_LENGTH: u64 = 3 << 1;
    /// PCIEXBAR: bits of the address that can be set.
    pub const PCIEXBAR_ADDRESS: u64 = 0xf_f000_0000;
    /// PCIEXBAR: bits 27 and 26, which the shorter lengths use as address.
    pub const PCIEXBAR_ADDRESS_LOW: u64 = 3 << 26;
    /// SMRAM: reset value: open, not locked, at A0000h.
    pub const SMRAM_RESET: u8 = 0x02;
    /// SMRAM: locked.
    pub const SMRAM_LOCK: u8 = 1 << 4;
    /// SMRAM: open for all.
    pub const SMRAM_OPEN: u8 = 1 << 6;
    /// ESMRAMC: reset value: the cached SMRAM attribute bits.
    pub const ESMRAMC_RESET: u8 = 0x38;
}

/// Where PC firmware puts memory-mapped configuration space.
pub const ECAM_DEFAULT_BASE: u64 = 0xb000_0000;

/// The host bridge.
pub struct Mch {
    function: PciFunction,
    access: Arc<ConfigAccess>,
    memory: IoBus,
    ecam: Mutex<Option<((u64, u64), IoRegion)>>,
}

impl Mch {
    /// A host bridge that maps configuration space into `memory` where the guest asks for it.
    pub fn new(access: Arc<ConfigAccess>, memory: IoBus) -> Arc<Self> {
        let id = Identity {
            vendor: 0x8086,
            device: 0x29c0,
            class: 0x06_0000,
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut builder = FunctionBuilder::new("mch", id);
        let config = builder.config();
        for (at, mask) in [
            (spec::PXPEPBAR, 0xf_ffff_f001u64),
            (spec::MCHBAR, 0xf_ffff_c001),
            (spec::DMIBAR, 0xf_ffff_f001),
            (
                spec::PCIEXBAR,
                spec::PCIEXBAR_ADDRESS
                    | spec::PCIEXBAR_ADDRESS_LOW
                    | spec::PCIEXBAR_LENGTH
                    | spec::PCIEXBAR_ENABLE,
            ),
        ] {
            config.allow(at, &mask.to_le_bytes());
        }
        config.define(spec::PCIEXBAR, &ECAM_DEFAULT_BASE.to_le_bytes());
        config.allow(
            spec::PAM0,
            &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33, 0x8f],
        );
        config.define(spec::SMRAM, &[spec::SMRAM_RESET, spec::ESMRAMC_RESET]);
        config.allow(spec::SMRAM, &[0x58, 0x87]);
        config.allow(spec::TOM, &[0xff, 0x01, 0xff, 0xff]);
        config.allow(spec::TOLUD, &[0xf0, 0xff]);
        Arc::new(Self {
            function: builder.build(),
            access,
            memory,
            ecam: Mutex::new(None),
        })
    }

    /// Does what firmware does first: turns memory-mapped configuration space on at `base`, a multiple of 256 MiB below 4 GiB, for
    /// 256 buses. A machine that boots a kernel without firmware calls this after each reset.
    pub fn enable_ecam(&self, base: u64) {
        let value = base & spec::PCIEXBAR_ADDRESS | spec::PCIEXBAR_ENABLE;
        self.function
            .change_config(|c| c.set(spec::PCIEXBAR, &value.to_le_bytes()));
        self.sync();
    }

    /// Where memory-mapped configuration space is: first address and bytes.
    pub fn ecam(&self) -> Option<(u64, u64)> {
        self.function.config(|c| {
            let low = u64::from(c.u32(spec::PCIEXBAR));
            let value = u64::from(c.u32(spec::PCIEXBAR + 4)) << 32 | low;
            let (mask, buses) = match (value & spec::PCIEXBAR_LENGTH) >> 1 {
                0 => (spec::PCIEXBAR_ADDRESS, 256),
                1 => (spec::PCIEXBAR_ADDRESS | 1 << 27, 128),
                2 => (spec::PCIEXBAR_ADDRESS | 3 << 26, 64),
                _ => return None,
            };
            let on = value & spec::PCIEXBAR_ENABLE != 0;
            on.then_some((value & mask, buses * ECAM_BYTES_PER_BUS))
        })
    }

    /// Maps what the registers say, and locks what is locked.
    fn sync(&self) {
        self.function.change_config(|c| {
            if c.u8(spec::SMRAM) & spec::SMRAM_LOCK != 0 {
                let closed = c.u8(spec::SMRAM) & !spec::SMRAM_OPEN;
                c.set(spec::SMRAM, &[closed]);
            }
        });
        let mut mapped = self.ecam.lock();
        let wanted = self.ecam();
        if mapped.as_ref().map(|(place, _)| *place) == wanted {
            return;
        }
        *mapped = None;
        *mapped = wanted.and_then(|(base, len)| {
            let handler = Arc::new(Ecam::new(self.access.clone()));
            let region = self
                .memory
                .add_movable(base, len, "PCI Express configuration", handler)
                .ok()?;
            Some(((base, len), region))
        });
    }
}

impl Device for Mch {
    fn name(&self) -> String {
        "mch".into()
    }

    fn reset(&self, _kind: ResetKind) {
        self.function.reset();
        self.sync();
    }
}

impl PciDevice for Mch {
    fn function(&self) -> &PciFunction {
        &self.function
    }
    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}
    fn config_written(&self, _offset: u16, _len: usize) {
        self.sync();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Devfn;
    use crate::bus::config_write;
    use crate::testing::Board;

    #[test]
    fn configuration_space_appears_where_the_guest_wants_it() {
        let board = Board::new();
        let access = ConfigAccess::new(board.bus.clone());
        let mch = Mch::new(access, board.memory.clone());
        let _handle = board.bus.add(Devfn::new(0, 0), mch.clone()).unwrap();
        assert_eq!(mch.ecam(), None);
        mch.enable_ecam(ECAM_DEFAULT_BASE);
        let mut id = [0; 4];
        board.memory.read(ECAM_DEFAULT_BASE, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x29c0_8086);
        board.memory.read(ECAM_DEFAULT_BASE + 0x8000, &mut id);
        assert_eq!(id, [0xff; 4]);
        config_write(mch.as_ref(), spec::PCIEXBAR, &0xc400_0005u32.to_le_bytes());
        assert_eq!(mch.ecam(), Some((0xc400_0000, 64 << 20)));
        assert_eq!(board.memory.owner(ECAM_DEFAULT_BASE), None);
        mch.reset(ResetKind::Cold);
        assert!(board.memory.regions().is_empty());
    }
}
