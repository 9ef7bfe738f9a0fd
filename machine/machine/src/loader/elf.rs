//! Kernels as ELF files (System V ABI, chapters 4 and 5).

use std::borrow::Cow;
use std::ops::Range;

pub(super) const MAGIC: &[u8] = b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Type of the note, of owner `Xen`, that names the 32-bit PVH entry point.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Most program headers that are looked at.
const MAX_HEADERS: usize = 64;

/// A piece to load.
#[derive(Debug)]
pub(super) struct Segment {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Its bytes in the file.
    pub(super) file: Range<u64>,
    /// Bytes in memory, not fewer than in the file.
    pub(super) memory_size: u64,
}

/// Where an ELF file's bytes come from.
pub(super) trait Source {
    /// Bytes in the file.
    fn len(&self) -> u64;
    /// Exactly `len` bytes from `offset`.
    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, String>;
}

impl Source for [u8] {
    fn len(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, String> {
        let start = usize::try_from(offset).map_err(|_| TRUNCATED)?;
        let bytes = start.checked_add(len).and_then(|end| self.get(start..end));
        Ok(bytes.ok_or(TRUNCATED)?.into())
    }
}

const TRUNCATED: &str = "truncated ELF file";
/// Bytes of the header of the file and of a program header, in 64-bit files, which have the larger ones.
const FILE_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// Most bytes of notes that are looked at.
const MAX_NOTES: u64 = 1 << 20;

/// What is needed to load and enter a kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) is_64: bool,
    pub(super) entry: u64,
    pub(super) pvh_entry: Option<u32>,
    pub(super) segments: Vec<Segment>,
}

/// Little-endian fields at offsets of a record, with the class's word size.
struct Fields<'a> {
    data: &'a [u8],
    is_64: bool,
}

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], String> {
        at.checked_add(N)
            .and_then(|end| self.data.get(at..end))
            .and_then(|b| b.try_into().ok())
            .ok_or_else(|| TRUNCATED.to_owned())
    }

    fn u16(&self, at: usize) -> Result<u16, String> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    /// An address or offset, at one place in 32-bit and at another in 64-bit files.
    fn word(&self, at_32: usize, at_64: usize) -> Result<u64, String> {
        if self.is_64 {
            self.bytes(at_64).map(u64::from_le_bytes)
        } else {
            self.u32(at_32).map(u64::from)
        }
    }
}

impl Kernel {
    pub(super) fn parse(source: &(impl Source + ?Sized)) -> Result<Self, String> {
        let bytes = source.read(0, source.len().min(FILE_HEADER) as usize)?;
        let is_64 = match *bytes.get(4).ok_or(TRUNCATED)? {
            CLASS_32 => false,
            CLASS_64 => true,
            other => return Err(format!("ELF class {other}, expected 1 or 2")),
        };
        let file = Fields {
            data: &bytes,
            is_64,
        };
        let machine = file.u16(18)?;
        if machine != MACHINE_X86_64 && machine != MACHINE_386 {
            return Err(format!("ELF file for machine {machine}, expected x86"));
        }
        let table = file.word(28, 32)?;
        let size = u64::from(file.u16(if is_64 { 54 } else { 42 })?);
        let count = usize::from(file.u16(if is_64 { 56 } else { 44 })?);
        if count > MAX_HEADERS {
            return Err(format!(
                "{count} program headers, expected at most {MAX_HEADERS}"
            ));
        }
        let mut kernel = Self {
            is_64,
            entry: file.word(24, 24)?,
            pvh_entry: None,
            segments: Vec::new(),
        };
        for n in 0..count {
            let at = table.checked_add(n as u64 * size).ok_or(TRUNCATED)?;
            let left = source.len().checked_sub(at).ok_or(TRUNCATED)?;
            let bytes = source.read(at, left.min(PROGRAM_HEADER) as usize)?;
            let header = Fields {
                data: &bytes,
                is_64,
            };
            kernel.header(&header, source)?;
        }
        if kernel.segments.is_empty() {
            return Err("an ELF file with nothing to load, expected a kernel".into());
        }
        Ok(kernel)
    }

    fn header(
        &mut self,
        header: &Fields<'_>,
        source: &(impl Source + ?Sized),
    ) -> Result<(), String> {
        let kind = header.u32(0)?;
        if kind != PT_LOAD && kind != PT_NOTE {
            return Ok(());
        }
        let offset = header.word(4, 8)?;
        let file_size = header.word(16, 32)?;
        let memory_size = header.word(20, 40)?;
        let end = offset
            .checked_add(file_size)
            .filter(|end| *end <= source.len());
        let end = end.ok_or("truncated: a segment lies past the end of the file")?;
        if kind == PT_NOTE {
            let notes = source.read(offset, file_size.min(MAX_NOTES) as usize)?;
            self.pvh_entry = self.pvh_entry.or(pvh_note(&notes));
        } else if memory_size != 0 {
            if memory_size < file_size {
                return Err("a segment is smaller in memory than in the file".into());
            }
            self.segments.push(Segment {
                address: header.word(12, 24)?,
                file: offset..end,
                memory_size,
            });
        }
        Ok(())
    }
}

/// Finds the PVH entry point among notes. Their parts are padded to four bytes.
fn pvh_note(mut notes: &[u8]) -> Option<u32> {
    loop {
        let fields = Fields {
            data: notes,
            is_64: false,
        };
        let name_len = fields.u32(0).ok()? as usize;
        let value_len = fields.u32(4).ok()? as usize;
        let kind = fields.u32(8).ok()?;
        let value_at = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let next = value_at.checked_add(value_len.checked_next_multiple_of(4)?)?;
        let name = notes.get(12..12usize.checked_add(name_len)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && value_len >= 4 {
            return fields.u32(value_at).ok();
        }
        notes = notes.get(next..)?;
    }
}
