//! Guessing a file's format from its first bytes.

use block::{IoBuf, Medium, Result};

/// Formats that are recognized, with their names as people write them, and where what stands in a file.
/// Only some of them can be opened; the others are known so that they are not taken for raw disks.
const MAGICS: [(&str, usize, &[u8]); 12] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image\0"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
];

/// The format that a file beginning with `bytes` has; `raw` if it is none that is known.
pub fn probe_bytes(bytes: &[u8]) -> &'static str {
    let found = MAGICS
        .iter()
        .find(|(_, at, magic)| bytes.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    match found {
        Some((name, ..)) => name,
        None if crate::vmdk::is_descriptor(bytes) => "vmdk",
        None => "raw",
    }
}

/// The format that a file seems to have.
///
/// # Errors
///
/// If it cannot be read.
pub async fn probe(medium: &dyn Medium) -> Result<&'static str> {
    let first = IoBuf::zeroed(512);
    medium.read(0, first.clone()).await?;
    Ok(probe_bytes(&first.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_are_found_where_they_belong() {
        assert_eq!(probe_bytes(b"QFI\xfb\0\0\0\x03"), "qcow2");
        assert_eq!(probe_bytes(b"vhdxfile"), "vhdx");
        assert_eq!(probe_bytes(b"xQFI\xfb"), "raw");
        assert_eq!(probe_bytes(b""), "raw");
        assert_eq!(
            probe_bytes(b"# Disk DescriptorFile\nversion=1\nCID=1\n"),
            "vmdk"
        );
        let mut vdi = vec![0; 100];
        vdi[64..68].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(probe_bytes(&vdi), "vdi");
    }
}
