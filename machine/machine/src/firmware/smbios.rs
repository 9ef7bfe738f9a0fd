//! SMBIOS tables (DMTF DSP0134, version 3.0).

use guest_memory::{GuestMemory, MemoryError};
use uuid::Uuid;

use super::{SMBIOS_AREA, checksum};

/// What the tables describe.
pub struct SmbiosConfig {
    /// The machine's identity.
    pub uuid: Uuid,
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
}

/// A structure under construction: its formatted part and its strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let mut bytes = vec![kind, 0];
        bytes.extend(handle.to_le_bytes());
        Self {
            bytes,
            strings: Vec::new(),
            count: 0,
        }
    }

    fn string(&mut self, text: &str) -> &mut Self {
        self.strings.extend(text.bytes());
        self.strings.push(0);
        self.count += 1;
        self.bytes.push(self.count);
        self
    }

    fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn finish(&mut self, table: &mut Vec<u8>) {
        self.bytes[1] = self.bytes.len() as u8;
        table.append(&mut self.bytes);
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        table.append(&mut self.strings);
        table.push(0);
    }
}

const UNKNOWN: u8 = 2;
const SAFE: u8 = 3;
const OTHER: u8 = 1;

/// Writes the tables.
///
/// # Errors
/// When the area is not memory, or too small for them.
pub fn write(memory: &GuestMemory, config: &SmbiosConfig) -> Result<(), MemoryError> {
    let table = structures(config);
    let at = SMBIOS_AREA.start + 32;
    if at + table.len() as u64 > SMBIOS_AREA.end {
        return Err(MemoryError::NotMemory {
            addr: at,
            len: table.len() as u64,
        });
    }
    memory.load(at, &table)?;
    memory.load(SMBIOS_AREA.start, &entry_point(at, table.len() as u32))
}

/// The 64-bit entry point (section 5.2.2).
fn entry_point(table: u64, length: u32) -> Vec<u8> {
    let mut bytes = b"_SM3_".to_vec();
    bytes.extend([0, 24, 3, 0, 0, 1, 0]);
    bytes.extend(length.to_le_bytes());
    bytes.extend(table.to_le_bytes());
    bytes[5] = checksum(&bytes);
    bytes
}

fn structures(config: &SmbiosConfig) -> Vec<u8> {
    let mut table = Vec::new();
    bios(&mut table);
    system(config, &mut table);
    chassis(&mut table);
    for cpu in 0..config.cpus {
        processor(cpu, &mut table);
    }
    memory_devices(config.memory, &mut table);
    Structure::new(32, 0x2000)
        .u16(0)
        .u32(0)
        .u8(0)
        .finish(&mut table); // system boot: no errors
    Structure::new(127, 0x7f00).finish(&mut table);
    table
}

/// Type 0 (section 7.1).
fn bios(table: &mut Vec<u8>) {
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    const NO_CHARACTERISTICS: u64 = 1 << 3;
    let mut s = Structure::new(0, 0);
    s.string("Corten")
        .string(env!("CARGO_PKG_VERSION"))
        .u16(0xf000)
        .string("01/01/2026")
        .u8(0);
    s.u64(NO_CHARACTERISTICS)
        .u8(0)
        .u8(VIRTUAL_MACHINE)
        .u8(0)
        .u8(1)
        .u8(0xff)
        .u8(0xff);
    s.finish(table);
}

/// Type 1 (section 7.2). The UUID's first three fields are little-endian.
fn system(config: &SmbiosConfig, table: &mut Vec<u8>) {
    const POWER_SWITCH: u8 = 6;
    let mut s = Structure::new(1, 0x100);
    s.string("Corten")
        .string("Corten Virtual Machine")
        .string(env!("CARGO_PKG_VERSION"));
    s.string(&config.uuid.to_string());
    s.bytes.extend(config.uuid.to_bytes_le());
    s.u8(POWER_SWITCH).u8(0).u8(0);
    s.finish(table);
}

/// Type 3 (section 7.4).
fn chassis(table: &mut Vec<u8>) {
    let mut s = Structure::new(3, 0x300);
    s.string("Corten")
        .u8(OTHER)
        .u8(0)
        .u8(0)
        .u8(0)
        .u8(SAFE)
        .u8(SAFE)
        .u8(SAFE)
        .u8(UNKNOWN);
    s.u32(0).u8(0).u8(1).u8(0).u8(0).u8(0);
    s.finish(table);
}

/// Type 4 (section 7.5).
fn processor(number: u32, table: &mut Vec<u8>) {
    const CENTRAL: u8 = 3;
    const POPULATED_ENABLED: u8 = 0x41;
    const NO_CACHE: u16 = 0xffff;
    let mut s = Structure::new(4, 0x400 + number as u16);
    s.string(&format!("CPU {number}"))
        .u8(CENTRAL)
        .u8(OTHER)
        .string("Corten")
        .u64(0);
    s.string("Virtual CPU")
        .u8(0)
        .u16(0)
        .u16(0)
        .u16(0)
        .u8(POPULATED_ENABLED)
        .u8(OTHER);
    s.u16(NO_CACHE)
        .u16(NO_CACHE)
        .u16(NO_CACHE)
        .u8(0)
        .u8(0)
        .u8(0);
    s.u8(1).u8(1).u8(1).u16(1 << 2).u16(1).u16(1).u16(1).u16(1);
    s.finish(table);
}

/// Types 16, 17 and 19 (sections 7.17, 7.18 and 7.20): memory in modules of at most 16 GiB.
fn memory_devices(size: u64, table: &mut Vec<u8>) {
    const MODULE: u64 = 16 << 30;
    const ARRAY: u16 = 0x1000;
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const MULTI_BIT_ECC: u8 = 6;
    const NO_ERROR_HANDLE: u16 = 0xfffe;
    const EXTENDED: u32 = 0x8000_0000;
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    let modules = size.div_ceil(MODULE).min(255);
    let kib = size >> 10;
    let mut s = Structure::new(16, ARRAY);
    s.u8(SYSTEM_BOARD).u8(SYSTEM_MEMORY).u8(MULTI_BIT_ECC);
    s.u32(
        u32::try_from(kib)
            .ok()
            .filter(|k| *k < EXTENDED)
            .unwrap_or(EXTENDED),
    );
    s.u16(NO_ERROR_HANDLE)
        .u16(modules as u16)
        .u64(if kib < u64::from(EXTENDED) { 0 } else { size });
    s.finish(table);
    for module in 0..modules {
        let here = if module + 1 == modules {
            size - module * MODULE
        } else {
            MODULE
        };
        let mut s = Structure::new(17, 0x1100 + module as u16);
        s.u16(ARRAY).u16(NO_ERROR_HANDLE).u16(64).u16(64);
        // Below 32 GiB less 1 MiB the size stands here in MiB.
        s.u16((here >> 20).min(0x7ffe) as u16).u8(DIMM).u8(0);
        s.string(&format!("DIMM {module}"))
            .u8(0)
            .u8(RAM)
            .u16(1 << 1)
            .u16(0)
            .string("Corten");
        s.u8(0).u8(0).u8(0).u8(0).u32(0).u16(0).u16(0).u16(0).u16(0);
        s.finish(table);
    }
    let mut s = Structure::new(19, 0x1300);
    let last = (kib.saturating_sub(1)).min(u64::from(u32::MAX - 1)) as u32;
    s.u32(0)
        .u32(last)
        .u16(ARRAY)
        .u8(modules as u8)
        .u64(0)
        .u64(0);
    s.finish(table);
}

#[cfg(test)]
mod tests {
    use guest_memory::BackingOptions;

    use super::*;

    #[test]
    fn structures_follow_one_another_to_the_end() {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, 1 << 20, BackingOptions::default())
            .unwrap();
        let config = SmbiosConfig {
            uuid: Uuid::from_u128(1),
            cpus: 255,
            memory: 40 << 30,
        };
        write(&memory, &config).unwrap();
        let mut bytes = vec![0; (SMBIOS_AREA.end - SMBIOS_AREA.start) as usize];
        memory.read(SMBIOS_AREA.start, &mut bytes).unwrap();
        assert_eq!(checksum(&bytes[..24]), 0);
        let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let mut rest = &bytes[32..32 + length];
        let mut kinds = Vec::new();
        while !rest.is_empty() {
            let formatted = usize::from(rest[1]);
            kinds.push((rest[0], formatted));
            let strings = rest[formatted..]
                .windows(2)
                .position(|w| w == [0, 0])
                .unwrap();
            rest = &rest[formatted + strings + 2..];
        }
        // The lengths are those of version 3.0 of the specification.
        assert_eq!(kinds[..3], [(0, 24), (1, 27), (3, 22)]);
        assert_eq!(kinds[3..258], [(4, 48); 255]);
        assert_eq!(
            kinds[258..],
            [
                (16, 23),
                (17, 40),
                (17, 40),
                (17, 40),
                (19, 31),
                (32, 11),
                (127, 4)
            ]
        );
    }
}
