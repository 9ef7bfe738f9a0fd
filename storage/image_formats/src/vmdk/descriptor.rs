//! The descriptor: text that says what a disk consists of (Virtual Disk Format 5.0, "The Descriptor
//! File"). No I/O here.

use block::{BlockError, Result};

/// A descriptor larger than this is refused.
pub(crate) const MAX_SIZE: u64 = 1 << 20;
/// More extents than this are refused.
const MAX_EXTENTS: usize = 4096;
/// The content identity that says "no parent".
pub(crate) const NO_PARENT: u32 = u32::MAX;
/// The most sectors that a disk has.
const MAX_SECTORS: u64 = 1 << 53;

/// A line that describes an extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExtentLine {
    /// May be written.
    pub(crate) writable: bool,
    pub(crate) sectors: u64,
    /// `FLAT`, `SPARSE` and so on.
    pub(crate) kind: String,
    pub(crate) name: Option<String>,
    /// Where a flat extent begins in its file, in sectors.
    pub(crate) offset: u64,
}

/// What a descriptor says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Descriptor {
    pub(crate) cid: u32,
    pub(crate) parent_cid: Option<u32>,
    pub(crate) create_type: String,
    pub(crate) parent_name: Option<String>,
    pub(crate) extents: Vec<ExtentLine>,
}

fn bad(what: impl Into<String>) -> BlockError {
    BlockError::invalid_image(what)
}

/// The text up to the first zero byte, which pads it.
fn text_of(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

/// Whether a file that begins so is a descriptor: comments and empty lines, then the version.
pub(crate) fn is_descriptor(bytes: &[u8]) -> bool {
    for line in text_of(bytes).split(|b| *b == b'\n') {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        return [&b"version=1"[..], b"version=2", b"version=3"].contains(&line);
    }
    false
}

impl Descriptor {
    /// Reads a descriptor.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported`, naming the line.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(text_of(bytes));
        let mut descriptor = Self::default();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(extent) = parse_extent(line)? {
                if descriptor.extents.len() >= MAX_EXTENTS {
                    return Err(bad(format!("the disk has more than {MAX_EXTENTS} extents")));
                }
                descriptor.extents.push(extent);
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            let value = value.trim().trim_matches('"');
            match key.trim() {
                "CID" => descriptor.cid = parse_cid(value)?,
                "parentCID" => {
                    let cid = parse_cid(value)?;
                    descriptor.parent_cid = Some(cid).filter(|c| *c != NO_PARENT);
                }
                "createType" => value.clone_into(&mut descriptor.create_type),
                "parentFileNameHint" if !value.is_empty() => {
                    descriptor.parent_name = Some(value.to_owned());
                }
                _ => {}
            }
        }
        let total = descriptor.extents.iter().map(|e| e.sectors);
        if total.fold(0, u64::saturating_add) > MAX_SECTORS {
            return Err(bad("the extents are impossibly large"));
        }
        Ok(descriptor)
    }
}

fn parse_cid(value: &str) -> Result<u32> {
    u32::from_str_radix(value, 16).map_err(|_| bad(format!("'{value}' is no content identity")))
}

/// Reads an extent line; `None` if it is none.
fn parse_extent(line: &str) -> Result<Option<ExtentLine>> {
    let mut words = line.splitn(4, char::is_whitespace);
    let access = words.next().unwrap_or_default();
    let writable = match access {
        "RW" => true,
        "RDONLY" => false,
        "NOACCESS" => {
            let message = format!("an extent that may not be accessed: '{line}'");
            return Err(BlockError::unsupported(message));
        }
        _ => return Ok(None),
    };
    let broken = || bad(format!("the extent line '{line}' cannot be understood"));
    let sectors = words.next().and_then(|w| w.parse::<u64>().ok());
    let sectors = sectors.ok_or_else(broken)?;
    let kind = words.next().ok_or_else(broken)?.to_owned();
    let rest = words.next().unwrap_or_default().trim();
    let (name, rest) = match rest.strip_prefix('"') {
        Some(quoted) => {
            let (name, rest) = quoted.split_once('"').ok_or_else(broken)?;
            (Some(name.to_owned()), rest.trim())
        }
        None => (None, rest),
    };
    let offset = match rest.split_whitespace().next() {
        Some(word) => word.parse::<u64>().map_err(|_| broken())?,
        None => 0,
    };
    if offset > MAX_SECTORS || sectors > MAX_SECTORS {
        return Err(bad(format!("the extent line '{line}' is impossible")));
    }
    Ok(Some(ExtentLine {
        writable,
        sectors,
        kind,
        name,
        offset,
    }))
}

/// The text with another content identity in it; `None` if it has none.
pub(crate) fn with_cid(bytes: &[u8], cid: u32) -> Option<Vec<u8>> {
    let text = text_of(bytes);
    let mut at = 0;
    for line in text.split_inclusive(|b| *b == b'\n') {
        if let Some(equals) = line.iter().position(|b| *b == b'=')
            && line[..equals].trim_ascii() == b"CID"
        {
            let value = &line[equals + 1..];
            let end = value.iter().position(|b| b"\r\n".contains(b));
            let end = at + equals + 1 + end.unwrap_or(value.len());
            let mut new = text[..=at + equals].to_vec();
            new.extend_from_slice(format!("{cid:08x}").as_bytes());
            new.extend_from_slice(&text[end..]);
            return Some(new);
        }
        at += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\r\nCID=fffffffe\nparentCID=12ab\n\
        createType=\"vmfs\"\nparentFileNameHint=\"a b.vmdk\"\n\n# Extents\n\
        RW 63 FLAT \"x y-flat.vmdk\" 7\nRDONLY 5 ZERO\nRW 10 SPARSE \"s.vmdk\"\nddb.x = \"1\"\n";

    #[test]
    fn descriptors_say_what_there_is() {
        let found = Descriptor::parse(TEXT.as_bytes()).unwrap();
        assert_eq!((found.cid, found.parent_cid), (0xffff_fffe, Some(0x12ab)));
        assert_eq!(found.parent_name.as_deref(), Some("a b.vmdk"));
        let flat = &found.extents[0];
        assert_eq!(flat.name.as_deref(), Some("x y-flat.vmdk"));
        assert_eq!((flat.sectors, flat.offset), (63, 7));
        assert_eq!(found.extents[1].name, None);
        assert!(!found.extents[1].writable);
        assert!(is_descriptor(TEXT.as_bytes()));
        assert!(!is_descriptor(b"#!/bin/sh\nversion=4\n"));
        assert!(!is_descriptor(b""));
    }

    #[test]
    fn broken_lines_are_named() {
        for line in [
            "RW x FLAT \"a\"",
            "RW 5",
            "RW 5 FLAT \"a",
            "RW 5 FLAT \"a\" x",
            "RW 99999999999999999999 FLAT \"a\"",
            "RW 9999999999999999999 FLAT \"a\"",
            "CID=xyz",
            "NOACCESS 5 FLAT \"a\"",
        ] {
            assert!(Descriptor::parse(line.as_bytes()).is_err(), "{line}");
        }
    }

    #[test]
    fn the_identity_is_replaced_where_it_stands() {
        let new = with_cid(TEXT.as_bytes(), 0xabc).unwrap();
        assert_eq!(new.len(), TEXT.len());
        assert_eq!(Descriptor::parse(&new).unwrap().cid, 0xabc);
        let short = with_cid(b"CID=1\nparentCID=ffffffff\n", 2).unwrap();
        assert_eq!(short, b"CID=00000002\nparentCID=ffffffff\n");
        assert!(with_cid(b"parentCID=1\n", 2).is_none());
    }
}
