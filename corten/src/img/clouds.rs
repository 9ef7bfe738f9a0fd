//! `convert --for`: what those who import disks accept.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::rc::Rc;

use block::{Disk, IoBuf};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::args::Parsed;
use super::output::Progress;
use super::{Failure, Outcome};

/// Where a disk is to go.
pub(crate) struct Cloud {
    /// What people call it.
    name: &'static str,
    /// The format that it takes.
    pub(crate) format: &'static str,
    /// Options of that format.
    options: &'static [(&'static str, &'static str)],
    /// The disk's size is a multiple of this, in bytes.
    alignment: u64,
    /// The image goes into a compressed archive under this name.
    pub(crate) archived_as: Option<&'static str>,
}

const MIB: u64 = 1 << 20;

/// Everybody who is known.
const CLOUDS: [Cloud; 4] = [
    // Microsoft, "Prepare Linux for imaging in Azure", section "Resizing VHDs": fixed VHDs whose size is a multiple of 1 MiB and not
    // rounded to a geometry.
    Cloud {
        name: "azure",
        format: "vpc",
        options: &[("subformat", "fixed"), ("force_size", "on")],
        alignment: MIB,
        archived_as: None,
    },
    // VMware, "Virtual Disk Format 5.0", section "Stream-Optimized Compressed Sparse Extents", which OVF packages hold; ESXi's
    // own drivers expect a SCSI adapter.
    Cloud {
        name: "esxi",
        format: "vmdk",
        options: &[
            ("subformat", "streamOptimized"),
            ("adapter_type", "lsilogic"),
        ],
        alignment: MIB,
        archived_as: None,
    },
    // Amazon, "VM Import/Export User Guide", section "Image formats": stream-optimized ESX VMDK.
    Cloud {
        name: "aws",
        format: "vmdk",
        options: &[
            ("subformat", "streamOptimized"),
            ("adapter_type", "lsilogic"),
        ],
        alignment: MIB,
        archived_as: None,
    },
    // Google, "Manually import boot disks", section "Requirements": disk.raw in a tar archive (oldgnu) under gzip, its size a
    // multiple of 1 GB, by which 1 GiB is meant.
    Cloud {
        name: "gcp",
        format: "raw",
        options: &[],
        alignment: 1 << 30,
        archived_as: Some("disk.raw"),
    },
];

impl Cloud {
    /// The one that `--for` names.
    pub(crate) fn of(parsed: &Parsed) -> Result<Option<&'static Self>, Failure> {
        let Some(name) = parsed.get('G') else {
            return Ok(None);
        };
        let found = CLOUDS.iter().find(|cloud| cloud.name == name);
        let names = CLOUDS.map(|cloud| cloud.name).join(", ");
        let message = format!("--for {name}: expected one of {names}");
        let cloud = found.ok_or_else(|| Failure::plain(message))?;
        for (letter, option) in [
            ('O', "-O"),
            ('o', "-o"),
            ('n', "-n"),
            ('b', "-b"),
            ('B', "-B"),
            ('c', "-c"),
            ('M', "--bitmaps"),
        ] {
            if parsed.has(letter) {
                let message =
                    format!("--for {name} decides about the format: {option} cannot be given too");
                return Err(Failure::plain(message));
            }
        }
        if cloud.archived_as.is_some() && (parsed.has('R') || parsed.has('K')) {
            let message =
                format!("--for {name} makes an archive: --resume and --checksum are for images");
            return Err(Failure::plain(message));
        }
        Ok(Some(cloud))
    }

    /// The format's options, as if they had been given.
    pub(crate) fn options(&self) -> Vec<(String, String)> {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        self.options.iter().map(owned).collect()
    }

    /// The size that a disk of `size` bytes gets.
    pub(crate) fn size(&self, size: u64) -> u64 {
        size.max(1).next_multiple_of(self.alignment)
    }
}

/// The header of the archive's one file (GNU tar manual, "Basic Tar Format", the type `OLDGNU_FORMAT`).
fn tar_header(name: &str, size: u64) -> [u8; 512] {
    let mut header = [0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if size < 1 << 33 {
        put(124, format!("{size:011o}\0").as_bytes());
    } else {
        // What twelve octal digits don't hold is a number in base 256.
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar  \0");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// Writes disks, one after the other, as a file of `size` bytes in a compressed archive. What has been written of it is removed again
/// when that fails.
pub(crate) async fn archive(
    disks: &[Rc<Disk>],
    name: &str,
    size: u64,
    target: &str,
    progress: &Rc<Progress>,
) -> Outcome {
    let failed = |e: std::io::Error| Failure::plain(format!("cannot write '{target}': {e}"));
    let file = File::create(target).map_err(failed)?;
    let written = write_archive(disks, name, size, file, progress).await;
    if written.is_err() {
        let _ = std::fs::remove_file(target);
    }
    written.map_err(|error| match error {
        ArchiveError::Target(error) => failed(error),
        ArchiveError::Source(failure) => failure,
    })
}

enum ArchiveError {
    Source(Failure),
    Target(std::io::Error),
}

impl From<std::io::Error> for ArchiveError {
    fn from(error: std::io::Error) -> Self {
        Self::Target(error)
    }
}

async fn write_archive(
    disks: &[Rc<Disk>],
    name: &str,
    size: u64,
    file: File,
    progress: &Rc<Progress>,
) -> Result<(), ArchiveError> {
    let mut out = GzEncoder::new(BufWriter::new(file), Compression::default());
    out.write_all(&tar_header(name, size))?;
    let mut left = size;
    for disk in disks {
        let mut offset = 0;
        while offset < disk.size() {
            let length = (disk.size() - offset).min(MIB);
            let buffer = IoBuf::zeroed(length as usize);
            let read = disk.read(offset, buffer.clone()).await;
            read.map_err(|e| ArchiveError::Source(e.into()))?;
            out.write_all(&buffer.to_vec())?;
            progress.add(length);
            offset += length;
            left -= length;
        }
    }
    // Up to the size, to a whole block, and two blocks at the end.
    let mut zeroes = left + (512 - size % 512) % 512 + 1024;
    let block = vec![0; MIB as usize];
    while zeroes > 0 {
        let length = zeroes.min(MIB);
        out.write_all(&block[..length as usize])?;
        zeroes -= length;
    }
    let file = out.finish()?.into_inner().map_err(|e| e.into_error())?;
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_all_kinds_fit_into_a_header() {
        let header = tar_header("disk.raw", 1 << 30);
        assert_eq!(&header[124..136], b"10000000000\0");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        let stored: u32 = header[148..156].iter().map(|byte| u32::from(*byte)).sum();
        let wanted = format!("{:06o}\0 ", sum - stored + 8 * u32::from(b' '));
        assert_eq!(&header[148..156], wanted.as_bytes());
        let large = tar_header("disk.raw", 5 << 40);
        assert_eq!(large[124..136], [0x80, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0]);
    }
}
