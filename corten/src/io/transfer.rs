//! Reading, writing and discarding.

use std::rc::Rc;
use std::time::{Duration, Instant};

use block::executor::spawn_local;
use block::{BlockError, ByteDisk, ErrorKind, IoBuf, ZeroFlags};
use image_formats::qcow2::ClusterCompressor;

use super::image::Open;
use super::words::{self, Words};
use super::{Done, Failed, print, usage};
use crate::img::output::put;

/// The longest transfer in bytes.
const MAX_LENGTH: u64 = 2_147_483_136;
/// What is written if no pattern is given.
const DEFAULT_PATTERN: u8 = 0xcd;

/// The system's words for what went wrong; requests past the end are failures of the device to a tool.
fn reason(error: &BlockError) -> String {
    let number = match error.kind() {
        ErrorKind::OutOfRange => 5,
        _ => error.errno(),
    };
    let text = std::io::Error::from_raw_os_error(number).to_string();
    let end = text.find(" (os error ").unwrap_or(text.len());
    text[..end].to_owned()
}

fn failed(what: &str, error: &BlockError) -> Failed {
    print(format!("{what} failed: {}", reason(error)))
}

/// Where and how much: the last two words of most commands.
fn range(text: &[String], limit: &str) -> Result<(u64, u64), Failed> {
    let offset = words::number(&text[0]).map_err(print)?;
    let length = words::number(&text[1]).map_err(print)?;
    if length > MAX_LENGTH {
        let text = format!(
            "length cannot exceed {MAX_LENGTH}{limit}, given {}",
            text[1]
        );
        return Err(print(text));
    }
    Ok((offset, length))
}

fn zeroed(length: u64) -> IoBuf {
    IoBuf::zeroed(usize::try_from(length).unwrap_or(0))
}

fn filled(length: u64, pattern: u8) -> IoBuf {
    let buf = zeroed(length);
    buf.fill_at(0, buf.len(), pattern);
    buf
}

/// What to say of a transfer when it has ended.
#[derive(Clone)]
struct Manner {
    quiet: bool,
    for_programs: bool,
    dump: bool,
    pattern: Option<u8>,
}

impl Manner {
    fn of(words: &Words) -> Result<Self, Failed> {
        let pattern = words.get('P').map(words::pattern).transpose();
        Ok(Self {
            quiet: words.has('q'),
            for_programs: words.has('C'),
            dump: words.has('v'),
            pattern: pattern.map_err(print)?,
        })
    }

    fn report(&self, did: &str, offset: u64, length: u64, elapsed: Duration) {
        if !self.quiet {
            let amount = (length, length);
            let text = words::report(did, offset, amount, elapsed, self.for_programs);
            put(&format!("{text}\n"));
        }
    }

    /// Checks what has been read from `offset` on, of which the part `(skip, length)` counts.
    fn verify(&self, offset: u64, data: &[u8], (skip, length): (u64, u64)) -> Done {
        let Some(pattern) = self.pattern else {
            return Ok(());
        };
        let start = usize::try_from(skip).unwrap_or(0);
        let end = usize::try_from(skip + length).unwrap_or(0);
        if data[start..end].iter().all(|b| *b == pattern) {
            return Ok(());
        }
        let at = offset + skip;
        let text = format!("Pattern verification failed at offset {at}, {length} bytes");
        Err(print(text))
    }

    fn after_read(&self, offset: u64, data: &[u8], part: (u64, u64), elapsed: Duration) -> Done {
        let verified = self.verify(offset, data, part);
        if self.dump {
            put(&words::dump(offset, data));
        }
        self.report("read", offset, data.len() as u64, elapsed);
        verified
    }
}

fn no_vm_state(what: &str) -> Failed {
    let error = BlockError::unsupported("the image's area for a machine's state");
    failed(what, &error)
}

pub(super) async fn read(open: &Open, words: &Words) -> Done {
    let manner = Manner::of(words)?;
    let part = |letter| words.get(letter).map(words::number).transpose();
    let skip = part('s').map_err(print)?;
    let most = part('l').map_err(print)?;
    if words.rest.len() != 2 || (manner.pattern.is_none() && (skip.is_some() || most.is_some())) {
        return Err(usage("read"));
    }
    let (offset, length) = range(&words.rest, "")?;
    let skip = skip.unwrap_or(0);
    let counted = most.or(length.checked_sub(skip)).unwrap_or(0);
    if skip > length || skip.checked_add(counted).is_none_or(|end| end > length) {
        return Err(print("pattern verification range exceeds end of read data"));
    }
    if words.has('b') {
        return Err(no_vm_state("read"));
    }
    let buf = zeroed(length);
    let begun = Instant::now();
    let result = open.bytes().read(offset, buf.clone()).await;
    let elapsed = begun.elapsed();
    result.map_err(|e| failed("read", &e))?;
    manner.after_read(offset, &buf.to_vec(), (skip, counted), elapsed)
}

/// The options that contradict each other, in the order in which they are looked at.
fn check_write(words: &Words) -> Done {
    let has = |letter| words.has(letter);
    if has('b') && has('z') {
        return Err(print("-b and -z cannot be specified at the same time"));
    }
    if has('f') && (has('b') || has('c')) {
        let text = "-f and -b or -c cannot be specified at the same time";
        return Err(print(text));
    }
    for letter in ['n', 'u'] {
        if has(letter) && !has('z') {
            return Err(print(format!("-{letter} requires -z to be specified")));
        }
    }
    if [has('z'), has('P'), has('s')]
        .iter()
        .filter(|b| **b)
        .count()
        > 1
    {
        let text = "Only one of -z, -P, and -s can be specified at the same time";
        return Err(print(text));
    }
    Ok(())
}

/// `length` bytes of the file's content, over and over.
fn from_file(path: &str, length: u64) -> Result<IoBuf, Failed> {
    let content = std::fs::read(path).map_err(|e| {
        let text = e.to_string();
        let end = text.find(" (os error ").unwrap_or(text.len());
        eprintln!("{path}: {}", &text[..end]);
        Failed
    })?;
    if content.is_empty() {
        eprintln!("{path}: file is empty");
        return Err(Failed);
    }
    let length = usize::try_from(length).unwrap_or(0);
    let bytes: Vec<u8> = content.iter().copied().cycle().take(length).collect();
    Ok(IoBuf::from_slice(&bytes))
}

fn zero_flags(words: &Words) -> ZeroFlags {
    let mut flags = ZeroFlags::empty();
    flags.set(ZeroFlags::MAY_UNMAP, words.has('u'));
    flags.set(ZeroFlags::NO_FALLBACK, words.has('n'));
    flags
}

pub(super) async fn write(open: &Open, words: &Words) -> Done {
    let manner = Manner::of(words)?;
    check_write(words)?;
    if words.rest.len() != 2 {
        return Err(usage("write"));
    }
    let (offset, length) = range(&words.rest, " without -n")?;
    if words.has('b') || words.has('c') {
        for (value, what) in [(offset, "offset"), (length, "count")] {
            if !value.is_multiple_of(512) {
                let text = format!("{value} is not a sector-aligned value for '{what}'");
                return Err(print(text));
            }
        }
    }
    if words.has('b') {
        return Err(no_vm_state("write"));
    }
    let (bytes, through) = (open.bytes(), words.has('f'));
    let data = match words.get('s') {
        _ if words.has('z') => None,
        Some(path) => Some(from_file(path, length)?),
        None => Some(filled(length, manner.pattern.unwrap_or(DEFAULT_PATTERN))),
    };
    let begun = Instant::now();
    let result = match data {
        None => {
            let flags = zero_flags(words);
            bytes.write_zeroes(offset, length, flags, through).await
        }
        Some(data) if words.has('c') => write_compressed(open, offset, &data).await,
        Some(data) => bytes.write(offset, data, through).await,
    };
    let elapsed = begun.elapsed();
    result.map_err(|e| failed("write", &e))?;
    manner.report("wrote", offset, length, elapsed);
    Ok(())
}

/// Stores whole clusters compressed; those that would not become shorter are stored as they are.
async fn write_compressed(open: &Open, offset: u64, data: &IoBuf) -> block::Result<()> {
    let Some(qcow2) = &open.image.qcow2 else {
        return Err(BlockError::unsupported("compressed data"));
    };
    let cluster = qcow2.cluster_size();
    let end = offset.saturating_add(data.len() as u64);
    let size = open.bytes().disk().size();
    if end > size {
        let text = "compressed data past the end";
        return Err(BlockError::new(ErrorKind::OutOfRange, text));
    }
    if !offset.is_multiple_of(cluster) || (!end.is_multiple_of(cluster) && end != size) {
        return Err(BlockError::invalid_argument(
            "compressed data in parts of clusters",
        ));
    }
    let mut compressor = ClusterCompressor::new(qcow2.header().compression);
    let bytes = data.to_vec();
    let cluster = usize::try_from(cluster).unwrap_or(usize::MAX);
    for (n, part) in bytes.chunks(cluster).enumerate() {
        let at = offset + (n * cluster) as u64;
        let mut whole = part.to_vec();
        whole.resize(cluster, 0);
        match compressor.compress(&whole) {
            Some(short) => qcow2.write_compressed(at, &short).await?,
            None => {
                open.bytes()
                    .write(at, IoBuf::from_slice(part), false)
                    .await?
            }
        }
    }
    Ok(())
}

/// The buffers that the words after the offset ask for.
fn vector(words: &[String], fill: u8) -> Result<(u64, IoBuf), Failed> {
    let offset = words::number(&words[0]).map_err(print)?;
    let mut parts = Vec::new();
    let mut total = 0u64;
    for text in &words[1..] {
        let length = words::number(text).map_err(print)?;
        if length > MAX_LENGTH {
            let text = format!("Argument '{text}' exceeds maximum size {MAX_LENGTH}");
            return Err(print(text));
        }
        total += length;
        if total > MAX_LENGTH {
            let text = "The total number of bytes exceed the maximum size";
            return Err(print(format!("{text} {MAX_LENGTH}")));
        }
        parts.push(filled(length, fill));
    }
    Ok((offset, IoBuf::concat(&parts)))
}

pub(super) async fn readv(open: &Open, words: &Words) -> Done {
    let manner = Manner::of(words)?;
    if words.rest.len() < 2 {
        return Err(usage("readv"));
    }
    let (offset, buf) = vector(&words.rest, 0xab)?;
    let begun = Instant::now();
    let result = open.bytes().read(offset, buf.clone()).await;
    let elapsed = begun.elapsed();
    result.map_err(|e| failed("readv", &e))?;
    let data = buf.to_vec();
    manner.after_read(offset, &data, (0, data.len() as u64), elapsed)
}

pub(super) async fn writev(open: &Open, words: &Words) -> Done {
    let manner = Manner::of(words)?;
    if words.rest.len() < 2 {
        return Err(usage("writev"));
    }
    let fill = manner.pattern.unwrap_or(DEFAULT_PATTERN);
    let (offset, buf) = vector(&words.rest, fill)?;
    let length = buf.len() as u64;
    let begun = Instant::now();
    let result = open.bytes().write(offset, buf, words.has('f')).await;
    let elapsed = begun.elapsed();
    result.map_err(|e| failed("writev", &e))?;
    manner.report("wrote", offset, length, elapsed);
    Ok(())
}

pub(super) fn aio_read(open: &Open, words: &Words) -> Done {
    let manner = Manner::of(words)?;
    if words.has('i') {
        put("injecting invalid read request\n");
        return Ok(());
    }
    if words.rest.len() < 2 {
        return Err(usage("aio_read"));
    }
    let (offset, buf) = vector(&words.rest, 0xab)?;
    let (bytes, pending) = (open.bytes(), open.pending.start());
    spawn_local(async move {
        let begun = Instant::now();
        let result = bytes.read(offset, buf.clone()).await;
        let data = buf.to_vec();
        // The command that began it has long succeeded.
        let _ = match result {
            Ok(()) => manner.after_read(offset, &data, (0, data.len() as u64), begun.elapsed()),
            Err(error) => Err(failed("readv", &error)),
        };
        drop(pending);
    });
    Ok(())
}

pub(super) fn aio_write(open: &Open, words: &Words) -> Done {
    let manner = Manner::of(words)?;
    if words.has('i') {
        put("injecting invalid write request\n");
        return Ok(());
    }
    if words.rest.len() < 2 {
        return Err(usage("aio_write"));
    }
    if words.has('z') && words.rest.len() != 2 {
        return Err(print("-z supports only a single length parameter"));
    }
    if words.has('u') && !words.has('z') {
        return Err(print("-u requires -z to be specified"));
    }
    if words.has('z') && words.has('P') {
        return Err(print("-z and -P cannot be specified at the same time"));
    }
    let (offset, what) = if words.has('z') {
        let (offset, length) = range(&words.rest, "")?;
        (offset, Payload::Zeroes(length, zero_flags(words)))
    } else {
        let fill = manner.pattern.unwrap_or(DEFAULT_PATTERN);
        let (offset, buf) = vector(&words.rest, fill)?;
        (offset, Payload::Data(buf))
    };
    let (bytes, pending, through) = (open.bytes(), open.pending.start(), words.has('f'));
    spawn_local(async move {
        let begun = Instant::now();
        match what.write(&bytes, offset, through).await {
            Ok(length) => manner.report("wrote", offset, length, begun.elapsed()),
            Err(error) => {
                failed("aio_write", &error);
            }
        }
        drop(pending);
    });
    Ok(())
}

enum Payload {
    Data(IoBuf),
    Zeroes(u64, ZeroFlags),
}

impl Payload {
    async fn write(self, bytes: &Rc<ByteDisk>, offset: u64, through: bool) -> block::Result<u64> {
        match self {
            Self::Data(buf) => {
                let length = buf.len() as u64;
                bytes.write(offset, buf, through).await.map(|()| length)
            }
            Self::Zeroes(length, flags) => {
                let zero = bytes.write_zeroes(offset, length, flags, through);
                zero.await.map(|()| length)
            }
        }
    }
}

pub(super) async fn discard(open: &Open, words: &Words) -> Done {
    let manner = Manner::of(words)?;
    if words.rest.len() != 2 {
        return Err(usage("discard"));
    }
    let (offset, length) = range(&words.rest, "")?;
    let begun = Instant::now();
    let result = open.bytes().discard(offset, length).await;
    let elapsed = begun.elapsed();
    result.map_err(|e| failed("discard", &e))?;
    manner.report("discard", offset, length, elapsed);
    Ok(())
}
