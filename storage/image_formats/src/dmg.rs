//! Apple's disk images (UDIF), read alone: a trailer says where the lists of chunks are, in a property
//! list or a resource fork; chunks are zero, stored, or compressed by ADC, zlib or bzip2.

use std::io::Read;
use std::rc::Rc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use block::executor::offload;
use block::{BlockBackend, BlockError, BlockFuture, IoBuf, Medium, Result};

use crate::cloop::inflate;
use crate::details::Description;
use crate::fields::Fields;
use crate::mapped::{Mapped, Place, Run};
use crate::qcow2::CheckReport;
use crate::read_only::{LastBlock, Layout, ReadOnlyImage};

const TRAILER_SIZE: u64 = 512;
const MAGIC: &[u8] = b"koly";
/// Lists of chunks that are longer than this are refused.
const MAX_LISTS: u64 = 16 << 20;
/// The most bytes of a compressed chunk, before and after.
const MAX_CHUNK: u64 = 64 << 20;
/// A list's header, and one entry.
const LIST_HEADER: usize = 204;
const ENTRY_SIZE: usize = 40;
const MAX_SECTORS: u64 = 1 << 51;

/// How a chunk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Raw,
    /// Apple Data Compression.
    Adc,
    Zlib,
    Bzip2,
    /// LZFSE, LZMA, or what nobody knows.
    Other(u32),
}

/// A stretch of the disk; all numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    kind: Kind,
    start: u64,
    size: u64,
    place: u64,
    stored: u64,
}

struct Dmg {
    medium: Rc<dyn Medium>,
    /// By their place on the disk, without overlaps.
    chunks: Vec<Chunk>,
    size: u64,
    last: LastBlock,
}

/// Opens the disk in `medium`.
///
/// # Errors
///
/// `InvalidImage` or `Unsupported` with what is wrong, or what the host reports.
pub async fn open(medium: Rc<dyn Medium>) -> Result<ReadOnlyImage> {
    ReadOnlyImage::open(&medium.clone(), Dmg::open(medium)).await
}

fn bad(what: impl Into<String>) -> BlockError {
    BlockError::invalid_image(what)
}

/// Reads the trailer; a file that was padded to whole sectors has it a little before its end.
async fn trailer(medium: &dyn Medium) -> Result<Option<Vec<u8>>> {
    let start = medium.len().saturating_sub(2 * TRAILER_SIZE - 1);
    let buffer = IoBuf::zeroed((2 * TRAILER_SIZE - 1) as usize);
    medium.read(start, buffer.clone()).await?;
    let bytes = buffer.to_vec();
    let at = (0..TRAILER_SIZE as usize)
        .rev()
        .find(|at| bytes[*at..].starts_with(MAGIC));
    Ok(at.map(|at| bytes[at..at + TRAILER_SIZE as usize].to_vec()))
}

/// Whether the file has a trailer.
pub(crate) async fn is_one(medium: &dyn Medium) -> Result<bool> {
    Ok(trailer(medium).await?.is_some())
}

async fn read_part(medium: &dyn Medium, place: u64, length: u64) -> Result<Vec<u8>> {
    let inside = place.checked_add(length).is_some_and(|e| e <= medium.len());
    if length > MAX_LISTS || !inside {
        return Err(bad(
            "the lists of chunks are too long, or past the end of the file",
        ));
    }
    let buffer = IoBuf::zeroed(length as usize);
    medium.read(place, buffer.clone()).await?;
    Ok(buffer.to_vec())
}

/// The data elements of a property list, decoded.
fn plist_data(text: &[u8]) -> Result<Vec<Vec<u8>>> {
    let text = String::from_utf8_lossy(text);
    let mut found = Vec::new();
    for part in text.split("<data>").skip(1) {
        let Some((encoded, _)) = part.split_once("</data>") else {
            return Err(bad("the property list is cut off"));
        };
        let encoded: String = encoded.split_ascii_whitespace().collect();
        let decoded = STANDARD.decode(encoded);
        found.push(decoded.map_err(|_| bad("the property list holds no valid base64"))?);
    }
    Ok(found)
}

/// The resources of a fork: each has its length before it.
fn fork_data(fork: &[u8]) -> Vec<Vec<u8>> {
    let f = Fields(fork);
    let (start, length) = (f.be32(0) as usize, f.be32(8) as usize);
    let mut rest = f.slice(start, length);
    let mut found = Vec::new();
    while let Some((head, tail)) = rest.split_at_checked(4) {
        let length = Fields(head).be32(0) as usize;
        let Some((data, tail)) = tail.split_at_checked(length) else {
            break;
        };
        found.push(data.to_vec());
        rest = tail;
    }
    found
}

/// Adds the chunks of a list; `data` is where the data fork begins.
fn add_chunks(list: &[u8], data: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    if !list.starts_with(b"mish") || list.len() < LIST_HEADER {
        return Ok(());
    }
    let f = Fields(list);
    let (first, base) = (f.be64(8), f.be64(24));
    for entry in list[LIST_HEADER..].chunks_exact(ENTRY_SIZE) {
        let f = Fields(entry);
        let kind = match f.be32(0) {
            0 | 2 => Kind::Zero,
            1 => Kind::Raw,
            0x8000_0004 => Kind::Adc,
            0x8000_0005 => Kind::Zlib,
            0x8000_0006 => Kind::Bzip2,
            // Comments and the list's end.
            0x7fff_fffe | 0xffff_ffff => continue,
            other => Kind::Other(other),
        };
        let sectors = f.be64(16);
        let start = first.checked_add(f.be64(8));
        let start = start.filter(|s| *s <= MAX_SECTORS && sectors <= MAX_SECTORS);
        let place = f.be64(24).checked_add(base);
        let place = place.and_then(|p| p.checked_add(data));
        let place = place.filter(|p| *p < 1 << 62 && f.be64(32) < 1 << 62);
        let (Some(start), Some(place)) = (start, place) else {
            return Err(bad("a chunk lies at an impossible place"));
        };
        let chunk = Chunk {
            kind,
            start: start * 512,
            size: sectors * 512,
            place,
            stored: f.be64(32),
        };
        check_chunk(&chunk)?;
        if sectors > 0 {
            chunks.push(chunk);
        }
    }
    Ok(())
}

fn check_chunk(chunk: &Chunk) -> Result<()> {
    let start = chunk.start / 512;
    match chunk.kind {
        Kind::Adc | Kind::Zlib | Kind::Bzip2 if chunk.size.max(chunk.stored) > MAX_CHUNK => Err(
            bad(format!("the chunk at sector {start} is larger than 64 MiB")),
        ),
        Kind::Raw if chunk.stored < chunk.size => Err(bad(format!(
            "the chunk at sector {start} is shorter than it says"
        ))),
        _ => Ok(()),
    }
}

impl Dmg {
    async fn open(medium: Rc<dyn Medium>) -> Result<Self> {
        let Some(trailer) = trailer(&*medium).await? else {
            return Err(bad("this is no Apple disk image: it has no trailer"));
        };
        let f = Fields(&trailer);
        let data = f.be64(24);
        let (fork, list) = ((f.be64(40), f.be64(48)), (f.be64(216), f.be64(224)));
        let lists = match (fork, list) {
            ((_, 0), (_, 0)) => return Err(bad("the trailer names no lists of chunks")),
            ((_, 0), (place, length)) => plist_data(&read_part(&*medium, place, length).await?)?,
            ((place, length), _) => fork_data(&read_part(&*medium, place, length).await?),
        };
        let mut chunks = Vec::new();
        for list in lists {
            add_chunks(&list, data, &mut chunks)?;
        }
        chunks.sort_by_key(|chunk| chunk.start);
        let overlap = chunks
            .windows(2)
            .find(|pair| pair[0].start + pair[0].size > pair[1].start);
        if let Some(pair) = overlap {
            let sector = pair[1].start / 512;
            return Err(bad(format!("two chunks hold sector {sector}")));
        }
        Ok(Self {
            size: chunks.last().map_or(0, |chunk| chunk.start + chunk.size),
            chunks,
            medium,
            last: LastBlock::default(),
        })
    }

    /// The chunk that holds `offset` with its number, or where the next one begins.
    fn chunk(&self, offset: u64) -> std::result::Result<(u64, Chunk), u64> {
        let number = self.chunks.partition_point(|c| c.start <= offset);
        let before = number.checked_sub(1).and_then(|n| self.chunks.get(n));
        match before.filter(|c| offset - c.start < c.size) {
            Some(chunk) => Ok((number as u64, *chunk)),
            None => Err(self.chunks.get(number).map_or(self.size, |c| c.start)),
        }
    }

    fn run_at(&self, offset: u64, length: u64) -> Run {
        let (place, known) = match self.chunk(offset) {
            Err(next) => (Place::Zero, next - offset),
            Ok((_, chunk)) => {
                let within = offset - chunk.start;
                let place = match chunk.kind {
                    Kind::Zero => Place::Zero,
                    Kind::Raw => Place::Host {
                        medium: self.medium.clone(),
                        offset: chunk.place + within,
                        holes: false,
                    },
                    Kind::Adc | Kind::Zlib | Kind::Bzip2 | Kind::Other(_) => Place::Compressed,
                };
                (place, chunk.size - within)
            }
        };
        let length = length.min(known);
        Run { place, length }
    }

    async fn inflated(&self, chunk: Chunk) -> Result<Vec<u8>> {
        let start = chunk.start / 512;
        if let Kind::Other(kind) = chunk.kind {
            let method = match kind {
                0x8000_0007 => "LZFSE".to_owned(),
                0x8000_0008 => "LZMA".to_owned(),
                _ => format!("the unknown method {kind:#x}"),
            };
            return Err(BlockError::unsupported(format!(
                "the chunk at sector {start} is compressed by {method}, which is not supported"
            )));
        }
        if chunk.place + chunk.stored > self.medium.len() {
            return Err(bad(format!(
                "the chunk at sector {start} reaches past the end of the file"
            )));
        }
        let data = IoBuf::zeroed(chunk.stored as usize);
        self.medium.read(chunk.place, data.clone()).await?;
        let (data, size) = (data.to_vec(), chunk.size as usize);
        let inflated = offload(move || match chunk.kind {
            Kind::Bzip2 => unpack_bzip2(&data, size),
            Kind::Adc => unpack_adc(&data, size),
            _ => inflate(&data, size),
        });
        let inflated = inflated.await;
        inflated.ok_or_else(|| bad(format!("the chunk at sector {start} is damaged")))
    }
}

/// Inflates Apple Data Compression: runs of bytes, and copies of what came before.
fn unpack_adc(data: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(size);
    let mut rest = data;
    while out.len() < size {
        let (&head, tail) = rest.split_first()?;
        if head & 0x80 != 0 {
            let (run, tail) = tail.split_at_checked(usize::from(head & 0x7f) + 1)?;
            out.extend_from_slice(run);
            rest = tail;
            continue;
        }
        let (length, back, used) = if head & 0x40 != 0 {
            let back = usize::from(Fields(tail).be16(0));
            (usize::from(head & 0x3f) + 4, back, 2)
        } else {
            let back = usize::from(head & 3) << 8 | usize::from(*tail.first()?);
            (usize::from(head >> 2) + 3, back, 1)
        };
        rest = tail.get(used..)?;
        let from = out.len().checked_sub(back + 1)?;
        // The copy may overlap what it makes.
        for n in 0..length {
            out.push(out[from + n]);
        }
    }
    (out.len() == size).then_some(out)
}

fn unpack_bzip2(data: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; size];
    let mut decoder = bzip2::read::BzDecoder::new(data);
    decoder.read_exact(&mut out).ok()?;
    Some(out)
}

impl Mapped for Dmg {
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run> {
        Box::pin(async move { Ok(self.run_at(offset, length)) })
    }

    fn read_encoded(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let Ok((number, chunk)) = self.chunk(offset) else {
                return Err(bad("a chunk has gone"));
            };
            let bytes = self.last.get(number, self.inflated(chunk)).await?;
            let within = (offset - chunk.start) as usize;
            buf.copy_from(bytes.get(within..within + buf.len()).unwrap_or(&[]));
            Ok(())
        })
    }

    fn parent(&self) -> Option<Rc<dyn BlockBackend>> {
        None
    }

    fn tells_unallocated(&self) -> bool {
        false
    }
}

impl Layout for Dmg {
    fn format(&self) -> &'static str {
        "dmg"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn medium(&self) -> &Rc<dyn Medium> {
        &self.medium
    }

    fn describe(&self) -> Description {
        Description::default()
    }

    fn check(&self) -> BlockFuture<'_, Option<CheckReport>> {
        Box::pin(async { Ok(None) })
    }
}
