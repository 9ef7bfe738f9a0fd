//! The parts of a bzImage (Linux `Documentation/arch/x86/boot.rst`).

use super::boot_params::SetupHeader;
use super::decompress::decompress;

/// Offset of the setup header in the image and in the boot parameters.
pub(super) const HEADER: usize = 0x1f1;
const SECTOR: usize = 512;
/// The oldest protocol with a 64-bit entry and payload fields; Linux 3.8 of 2013.
const OLDEST: u16 = 0x20c;
/// Largest decompressed kernel, in bytes.
const MAX_PAYLOAD: usize = 512 << 20;

/// Reads the setup header.
pub(super) fn parse(image: &[u8]) -> Result<SetupHeader, String> {
    let unknown = "expected a bzImage or an ELF kernel";
    if image.len() < HEADER + 0x80 || image[0x1fe..0x200] != [0x55, 0xaa] {
        return Err(unknown.into());
    }
    if &image[0x202..0x206] != b"HdrS" {
        return Err(unknown.into());
    }
    // The header's length stands in the jump over it (boot.rst, "The Real-Mode Kernel Header").
    let end = (0x202 + usize::from(image[0x201]))
        .clamp(0x230, 0x290)
        .min(image.len());
    let setup = SetupHeader::from_image(&image[HEADER..end]);
    if setup.version() < OLDEST {
        let (major, minor) = (setup.version() >> 8, setup.version() & 0xff);
        return Err(format!(
            "boot protocol {major}.{minor}, expected 2.12 or newer"
        ));
    }
    if setup.load_flags() & 1 == 0 {
        return Err("a zImage that loads below 64 KiB, expected a bzImage".into());
    }
    if code_offset(&setup) >= image.len() {
        return Err("truncated: no protected-mode kernel".into());
    }
    Ok(setup)
}

fn code_offset(setup: &SetupHeader) -> usize {
    let sectors = match setup.setup_sectors() {
        0 => 4,
        n => usize::from(n),
    };
    (sectors + 1) * SECTOR
}

/// The part that is loaded at 1 MiB in the 32-bit protocol.
pub(super) fn protected_mode_code<'a>(image: &'a [u8], setup: &SetupHeader) -> &'a [u8] {
    &image[code_offset(setup)..]
}

/// The decompressed payload when it is an ELF file; `None` when there is none or it is something else.
pub(super) fn payload(image: &[u8], setup: &SetupHeader) -> Result<Option<Vec<u8>>, String> {
    let (offset, length) = (
        setup.payload_offset() as usize,
        setup.payload_length() as usize,
    );
    if length == 0 {
        return Ok(None);
    }
    let start = code_offset(setup).saturating_add(offset);
    let end = start.saturating_add(length);
    let Some(packed) = image.get(start..end) else {
        return Err(format!(
            "truncated: the kernel's payload ends at byte {end} of {}",
            image.len()
        ));
    };
    let data = decompress(packed, MAX_PAYLOAD)?;
    Ok(data.starts_with(super::elf::MAGIC).then_some(data))
}
