//! The parts of a bzImage (Linux `Documentation/arch/x86/boot.rst`).

use std::ops::Range;

use super::boot_params::SetupHeader;
use super::decompress::decompress;

/// Offset of the setup header in the image and in the boot parameters.
pub(super) const HEADER: usize = 0x1f1;
const SECTOR: u64 = 512;
/// The oldest protocol with a 64-bit entry and payload fields; Linux 3.8 of 2013.
const OLDEST: u16 = 0x20c;
/// Largest decompressed kernel, in bytes.
const MAX_PAYLOAD: usize = 512 << 20;

/// Bytes from the start of an image in which the setup header lies.
pub(super) const HEAD: usize = 0x290;

/// Reads the setup header from the first [`HEAD`] bytes of an image of `length` bytes.
pub(super) fn parse(head: &[u8], length: u64) -> Result<SetupHeader, String> {
    let unknown = "expected a bzImage or an ELF kernel";
    if head.len() < HEADER + 0x80 || head[0x1fe..0x200] != [0x55, 0xaa] {
        return Err(unknown.into());
    }
    if &head[0x202..0x206] != b"HdrS" {
        return Err(unknown.into());
    }
    // The header's length stands in the jump over it (boot.rst, "The Real-Mode Kernel Header").
    let end = (0x202 + usize::from(head[0x201]))
        .clamp(0x230, HEAD)
        .min(head.len());
    let setup = SetupHeader::from_image(&head[HEADER..end]);
    if setup.version() < OLDEST {
        let (major, minor) = (setup.version() >> 8, setup.version() & 0xff);
        return Err(format!(
            "boot protocol {major}.{minor}, expected 2.12 or newer"
        ));
    }
    if setup.load_flags() & 1 == 0 {
        return Err("a zImage that loads below 64 KiB, expected a bzImage".into());
    }
    if code_offset(&setup) >= length {
        return Err("truncated: no protected-mode kernel".into());
    }
    Ok(setup)
}

/// Where in the image the part lies that is loaded at 1 MiB in the 32-bit protocol.
pub(super) fn code_offset(setup: &SetupHeader) -> u64 {
    let sectors = match setup.setup_sectors() {
        0 => 4,
        n => u64::from(n),
    };
    (sectors + 1) * SECTOR
}

/// Where in an image of `length` bytes the compressed kernel lies; `None` when there is none.
pub(super) fn payload(setup: &SetupHeader, length: u64) -> Result<Option<Range<u64>>, String> {
    let size = u64::from(setup.payload_length());
    if size == 0 {
        return Ok(None);
    }
    let start = code_offset(setup) + u64::from(setup.payload_offset());
    let end = start + size;
    if end > length {
        return Err(format!(
            "truncated: the kernel's payload ends at byte {end} of {length}"
        ));
    }
    Ok(Some(start..end))
}

/// The decompressed payload when it is an ELF file; `None` when it is something else.
pub(super) fn unpack(packed: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let data = decompress(packed, MAX_PAYLOAD)?;
    Ok(data.starts_with(super::elf::MAGIC).then_some(data))
}
