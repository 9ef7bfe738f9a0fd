//! Kernels as ELF files (System V ABI, chapters 4 and 5).

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
    pub(super) file: Range<usize>,
    /// Bytes in memory, not fewer than in the file.
    pub(super) memory_size: u64,
}

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
            .ok_or_else(|| "truncated ELF file".to_owned())
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
    pub(super) fn parse(data: &[u8]) -> Result<Self, String> {
        let class = *data.get(4).ok_or("truncated ELF file")?;
        let is_64 = match class {
            CLASS_32 => false,
            CLASS_64 => true,
            other => return Err(format!("ELF class {other}, expected 1 or 2")),
        };
        let file = Fields { data, is_64 };
        let machine = file.u16(18)?;
        if machine != MACHINE_X86_64 && machine != MACHINE_386 {
            return Err(format!("ELF file for machine {machine}, expected x86"));
        }
        let table = usize::try_from(file.word(28, 32)?).map_err(|_| "truncated ELF file")?;
        let size = usize::from(file.u16(if is_64 { 54 } else { 42 })?);
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
            let at = table.checked_add(n * size).ok_or("truncated ELF file")?;
            let header = Fields {
                data: data.get(at..).ok_or("truncated ELF file")?,
                is_64,
            };
            kernel.header(&header, data)?;
        }
        if kernel.segments.is_empty() {
            return Err("an ELF file with nothing to load, expected a kernel".into());
        }
        Ok(kernel)
    }

    fn header(&mut self, header: &Fields<'_>, data: &[u8]) -> Result<(), String> {
        let kind = header.u32(0)?;
        if kind != PT_LOAD && kind != PT_NOTE {
            return Ok(());
        }
        let offset = header.word(4, 8)?;
        let file_size = header.word(16, 32)?;
        let memory_size = header.word(20, 40)?;
        let end = offset
            .checked_add(file_size)
            .filter(|end| *end <= data.len() as u64);
        let end = end.ok_or("truncated: a segment lies past the end of the file")?;
        let file = offset as usize..end as usize;
        if kind == PT_NOTE {
            self.pvh_entry = self.pvh_entry.or(pvh_note(&data[file]));
        } else if memory_size != 0 {
            if memory_size < file_size {
                return Err("a segment is smaller in memory than in the file".into());
            }
            self.segments.push(Segment {
                address: header.word(12, 24)?,
                file,
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
