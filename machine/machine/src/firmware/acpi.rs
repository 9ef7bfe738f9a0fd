//! ACPI tables (ACPI 6.5, chapter 5).

use std::ops::Range;

use guest_memory::{GuestMemory, MemoryError};

use chipset::ged::spec as ged;

use super::{ACPI_AREA, checksum, dsdt};
use crate::memory_map::{ECAM, GENERIC_EVENTS, HPET, IOAPIC, LAPIC};

/// I/O ports and interrupts of the power management block, at QEMU's addresses for ICH9.
pub(super) const PM_BASE: u16 = 0x600;
const SMI_COMMAND: u32 = 0xb2;
const ACPI_ENABLE: u8 = 2;
const ACPI_DISABLE: u8 = 3;
const GPE0: u16 = PM_BASE + 0x20;
const GPE0_LEN: u8 = 16;
/// System control interrupt.
pub(super) const SCI: u8 = 9;
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 0x0e;
/// FADT fixed feature flags (table 5.10).
const WBINVD: u32 = 1 << 0;
const PROC_C1: u32 = 1 << 2;
const SLP_BUTTON: u32 = 1 << 5;
const RTC_S4: u32 = 1 << 7;
const RESET_REG_SUP: u32 = 1 << 10;
const HW_REDUCED_ACPI: u32 = 1 << 20;
/// FADT IA-PC boot architecture flags (table 5.11).
const LEGACY_DEVICES: u16 = 1 << 0;
const HAS_8042: u16 = 1 << 1;
/// Address spaces of generic addresses (table 5.1).
const SPACE_MEMORY: u8 = 0;
const SPACE_IO: u8 = 1;
/// MPS INTI flags (table 5.26): active high, level triggered.
const HIGH_LEVEL: u16 = 0b1101;

/// What the tables describe.
pub struct AcpiConfig<'a> {
    /// Local APIC IDs of the vCPUs.
    pub apic_ids: &'a [u32],
    /// Stretches of RAM.
    pub ram: &'a [Range<u64>],
    /// Numbers of the serial ports that there are: 1 to 4.
    pub serial_ports: &'a [u8],
    /// What else there is.
    pub platform: Platform,
}

/// What tells boards from one another.
pub enum Platform {
    /// Q35: PCI Express and the PC's fixed hardware.
    Q35 {
        /// Window for 64-bit PCI memory above RAM.
        pci_memory_64: Range<u64>,
    },
    /// `microvm`: hardware-reduced ACPI, devices in memory space.
    Microvm {
        /// The virtio devices.
        transports: Vec<Transport>,
    },
}

/// A virtio device in memory space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// Its first register.
    pub address: u64,
    /// Its global interrupt, a level that others may share.
    pub gsi: u32,
}

/// A table under construction.
struct Table(Vec<u8>);

impl Table {
    fn new(signature: &[u8; 4], revision: u8) -> Self {
        let mut bytes = signature.to_vec();
        bytes.extend([0; 4]);
        bytes.extend([revision, 0]);
        bytes.extend(b"CORTENCORTENVM");
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(b"CRTN");
        bytes.extend(1u32.to_le_bytes());
        Self(bytes)
    }

    fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A generic address structure (section 5.2.3.2).
    fn address(&mut self, space: u8, bits: u8, access: u8, address: u64) -> &mut Self {
        self.u8(space).u8(bits).u8(0).u8(access).u64(address)
    }

    fn finish(mut self) -> Vec<u8> {
        let length = (self.0.len() as u32).to_le_bytes();
        self.0[4..8].copy_from_slice(&length);
        self.0[9] = checksum(&self.0);
        self.0
    }
}

/// Places tables one behind the other.
struct Area<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Area<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, MemoryError> {
        let at = self.next;
        let end = at + table.len() as u64;
        if end > ACPI_AREA.end {
            return Err(MemoryError::NotMemory {
                addr: at,
                len: table.len() as u64,
            });
        }
        self.memory.load(at, table)?;
        self.next = end.next_multiple_of(64);
        Ok(at)
    }
}

/// Writes the tables; returns the address of the root pointer.
///
/// # Errors
/// When the area is not memory, or too small for them.
pub fn write(memory: &GuestMemory, config: &AcpiConfig<'_>) -> Result<u64, MemoryError> {
    let root = ACPI_AREA.start;
    let mut area = Area {
        memory,
        next: root + 64,
    };
    let dsdt = area.place(&dsdt_table(config))?;
    let described = match config.platform {
        Platform::Q35 { .. } => {
            let facs = area.place(&facs())?;
            vec![fadt(facs, dsdt), madt(config), mcfg(), hpet(), srat(config)]
        }
        Platform::Microvm { .. } => vec![reduced_fadt(dsdt), madt(config), srat(config)],
    };
    let mut tables = Vec::new();
    for table in described {
        tables.push(area.place(&table)?);
    }
    let mut xsdt = Table::new(b"XSDT", 1);
    for table in &tables {
        xsdt.u64(*table);
    }
    let xsdt = area.place(&xsdt.finish())?;
    let mut rsdt = Table::new(b"RSDT", 1);
    for table in &tables {
        rsdt.u32(*table as u32);
    }
    let rsdt = area.place(&rsdt.finish())?;
    memory.load(root, &rsdp(rsdt, xsdt))?;
    Ok(root)
}

/// Root system description pointer (section 5.2.5.3).
fn rsdp(rsdt: u64, xsdt: u64) -> Vec<u8> {
    let mut bytes = b"RSD PTR ".to_vec();
    bytes.push(0);
    bytes.extend(b"CORTEN");
    bytes.push(2);
    bytes.extend((rsdt as u32).to_le_bytes());
    bytes[8] = checksum(&bytes);
    bytes.extend(36u32.to_le_bytes());
    bytes.extend(xsdt.to_le_bytes());
    bytes.extend([0; 4]);
    bytes[32] = checksum(&bytes);
    bytes
}

/// Firmware ACPI control structure (section 5.2.10). It has no header of the common kind.
fn facs() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4..8].copy_from_slice(&64u32.to_le_bytes());
    bytes[32] = 2;
    bytes
}

fn dsdt_table(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut table = Table::new(b"DSDT", 2);
    table.0.extend(dsdt::build(config));
    table.finish()
}

/// Fixed ACPI description table (section 5.2.9).
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let mut t = Table::new(b"FACP", 6);
    t.u32(facs as u32).u32(dsdt as u32).u8(0);
    t.u8(0); // preferred power profile: unspecified
    t.u16(u16::from(SCI))
        .u32(SMI_COMMAND)
        .u8(ACPI_ENABLE)
        .u8(ACPI_DISABLE)
        .u8(0)
        .u8(0);
    let pm = u32::from(PM_BASE);
    t.u32(pm)
        .u32(0)
        .u32(pm + 4)
        .u32(0)
        .u32(0)
        .u32(pm + 8)
        .u32(u32::from(GPE0))
        .u32(0);
    t.u8(4).u8(2).u8(0).u8(4).u8(GPE0_LEN).u8(0).u8(0).u8(0);
    t.u16(0xfff).u16(0xfff); // C2 and C3 latencies: neither is there
    t.u16(0).u16(0).u8(0).u8(0); // flush, duty cycle
    t.u8(0x0d).u8(0).u8(0x32); // day alarm, no month alarm, century
    t.u16(LEGACY_DEVICES | HAS_8042).u8(0);
    t.u32(WBINVD | PROC_C1 | SLP_BUTTON | RTC_S4 | RESET_REG_SUP);
    t.address(SPACE_IO, 8, 1, RESET_PORT)
        .u8(RESET_VALUE)
        .u16(0)
        .u8(5);
    t.u64(facs).u64(dsdt);
    let pm = u64::from(PM_BASE);
    t.address(SPACE_IO, 32, 2, pm).address(0, 0, 0, 0);
    t.address(SPACE_IO, 16, 2, pm + 4)
        .address(0, 0, 0, 0)
        .address(0, 0, 0, 0);
    t.address(SPACE_IO, 32, 3, pm + 8);
    t.address(SPACE_IO, GPE0_LEN * 8, 1, u64::from(GPE0))
        .address(0, 0, 0, 0);
    t.address(0, 0, 0, 0).address(0, 0, 0, 0); // sleep control and status: only in reduced hardware
    t.u64(0); // hypervisor vendor
    t.finish()
}

/// The same for hardware-reduced ACPI (section 3.11.1): what belongs to fixed hardware is zero.
fn reduced_fadt(dsdt: u64) -> Vec<u8> {
    let mut t = Table::new(b"FACP", 6);
    t.u32(0).u32(dsdt as u32).u8(0).u8(0);
    // From the SCI's number to the century's index.
    t.0.resize(109, 0);
    t.u16(LEGACY_DEVICES).u8(0);
    t.u32(WBINVD | PROC_C1 | RESET_REG_SUP | HW_REDUCED_ACPI);
    t.address(SPACE_MEMORY, 8, 1, GENERIC_EVENTS + ged::RESET)
        .u8(ged::RESET_VALUE)
        .u16(0)
        .u8(5);
    t.u64(0).u64(dsdt);
    // The extended addresses of fixed hardware.
    t.0.resize(244, 0);
    t.address(SPACE_MEMORY, 8, 1, GENERIC_EVENTS + ged::SLEEP_CONTROL)
        .address(SPACE_MEMORY, 8, 1, GENERIC_EVENTS + ged::SLEEP_STATUS);
    t.u64(0); // hypervisor vendor
    t.finish()
}

/// Multiple APIC description table (section 5.2.12).
fn madt(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut t = Table::new(b"APIC", 5);
    t.u32(LAPIC as u32).u32(1); // there are 8259s too
    for (uid, &id) in config.apic_ids.iter().enumerate() {
        if id < 255 {
            t.u8(0).u8(8).u8(uid as u8).u8(id as u8).u32(1);
        } else {
            t.u8(9).u8(16).u16(0).u32(id).u32(1).u32(uid as u32);
        }
    }
    t.u8(1).u8(12).u8(0).u8(0).u32(IOAPIC as u32).u32(0);
    // Source overrides: the timer's pin, and interrupts that are levels.
    t.u8(2).u8(10).u8(0).u8(0).u32(2).u16(0);
    if matches!(config.platform, Platform::Q35 { .. }) {
        t.u8(2)
            .u8(10)
            .u8(0)
            .u8(SCI)
            .u32(u32::from(SCI))
            .u16(HIGH_LEVEL);
    }
    // LINT1 of every processor takes NMIs.
    t.u8(4).u8(6).u8(0xff).u16(0).u8(1);
    if config.apic_ids.iter().any(|id| *id >= 255) {
        t.u8(10).u8(12).u16(0).u32(u32::MAX).u8(1).u8(0).u16(0);
    }
    t.finish()
}

/// PCI Express configuration space (PCI firmware specification 3.3, section 4.1.2).
fn mcfg() -> Vec<u8> {
    let mut t = Table::new(b"MCFG", 1);
    t.u64(0);
    t.u64(ECAM.start)
        .u16(0)
        .u8(0)
        .u8((((ECAM.end - ECAM.start) >> 20) - 1) as u8)
        .u32(0);
    t.finish()
}

/// High precision event timer (IA-PC HPET 1.0a, section 3.2.4).
fn hpet() -> Vec<u8> {
    let mut t = Table::new(b"HPET", 1);
    t.u32(0x8086_a201)
        .address(SPACE_MEMORY, 0, 0, HPET)
        .u8(0)
        .u16(0)
        .u8(0);
    t.finish()
}

/// System resource affinity table: one node (section 5.2.16).
fn srat(config: &AcpiConfig<'_>) -> Vec<u8> {
    const ENABLED: u32 = 1;
    let mut t = Table::new(b"SRAT", 3);
    t.u32(1).u64(0);
    for &id in config.apic_ids {
        if id < 255 {
            t.u8(0).u8(16).u8(0).u8(id as u8).u32(ENABLED).u32(0).u32(0);
        } else {
            t.u8(2)
                .u8(24)
                .u16(0)
                .u32(0)
                .u32(id)
                .u32(ENABLED)
                .u32(0)
                .u32(0);
        }
    }
    for range in config.ram {
        t.u8(1)
            .u8(40)
            .u32(0)
            .u16(0)
            .u64(range.start)
            .u64(range.end - range.start);
        t.u32(0).u32(ENABLED).u64(0);
    }
    t.finish()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use guest_memory::BackingOptions;

    use super::*;

    fn q35() -> Platform {
        Platform::Q35 {
            pci_memory_64: 1 << 40..2 << 40,
        }
    }

    fn microvm() -> Platform {
        let transport = |n: u32| Transport {
            address: 0xfeb0_0000 + 0x200 * u64::from(n),
            gsi: 16 + n % 8,
        };
        Platform::Microvm {
            transports: (0..12).map(transport).collect(),
        }
    }

    fn tables(apic_ids: &[u32], platform: Platform) -> Vec<u8> {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, 1 << 20, BackingOptions::default())
            .unwrap();
        let config = AcpiConfig {
            apic_ids,
            ram: &[0..0xa_0000, 0x10_0000..0x8000_0000],
            serial_ports: &[1, 2],
            platform,
        };
        assert_eq!(write(&memory, &config).unwrap(), ACPI_AREA.start);
        let mut bytes = vec![0; (ACPI_AREA.end - ACPI_AREA.start) as usize];
        memory.read(ACPI_AREA.start, &mut bytes).unwrap();
        bytes
    }

    fn at(bytes: &[u8], address: u64) -> &[u8] {
        let from = &bytes[(address - ACPI_AREA.start) as usize..];
        let length = u32::from_le_bytes(from[4..8].try_into().unwrap());
        &from[..length as usize]
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let on_q35: &[&str] = &["FACP", "APIC", "MCFG", "HPET", "SRAT"];
        let on_microvm: &[&str] = &["FACP", "APIC", "SRAT"];
        for (cpus, platform, wanted) in [
            (1, q35(), on_q35),
            (4, microvm(), on_microvm),
            (300, q35(), on_q35),
        ] {
            let ids: Vec<u32> = (0..cpus).collect();
            let bytes = tables(&ids, platform);
            assert_eq!(checksum(&bytes[..20]), 0);
            assert_eq!(checksum(&bytes[..36]), 0);
            let xsdt = at(
                &bytes,
                u64::from_le_bytes(bytes[24..32].try_into().unwrap()),
            );
            assert_eq!(checksum(xsdt), 0);
            let mut seen = Vec::new();
            for entry in xsdt[36..].chunks(8) {
                let table = at(&bytes, u64::from_le_bytes(entry.try_into().unwrap()));
                assert_eq!(checksum(table), 0);
                seen.push(String::from_utf8_lossy(&table[..4]).into_owned());
            }
            assert_eq!(seen, wanted);
        }
    }

    /// The peer is the ACPI Component Architecture's own disassembler and compiler, where it is installed.
    #[test]
    fn iasl_reads_the_dsdts_and_compiles_them_again() {
        for platform in [q35(), microvm()] {
            iasl_agrees(platform);
        }
    }

    fn iasl_agrees(platform: Platform) {
        let bytes = tables(&[0, 1], platform);
        let xsdt = at(
            &bytes,
            u64::from_le_bytes(bytes[24..32].try_into().unwrap()),
        );
        let fadt = at(&bytes, u64::from_le_bytes(xsdt[36..44].try_into().unwrap()));
        assert_eq!(fadt.len(), 276);
        let dsdt = at(
            &bytes,
            u64::from_le_bytes(fadt[140..148].try_into().unwrap()),
        );
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("dsdt.dat"), dsdt).unwrap();
        let run = |args: &[&str]| {
            Command::new("iasl")
                .args(args)
                .current_dir(dir.path())
                .output()
        };
        let Ok(out) = run(&["-d", "dsdt.dat"]) else {
            eprintln!("skipped: iasl is not installed (package acpica-tools)");
            return;
        };
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let out = run(&["-we", "dsdt.dsl"]).unwrap();
        let text = String::from_utf8_lossy(&out.stderr) + String::from_utf8_lossy(&out.stdout);
        assert!(
            out.status.success() && text.contains("0 Errors, 0 Warnings"),
            "{text}"
        );
    }
}
