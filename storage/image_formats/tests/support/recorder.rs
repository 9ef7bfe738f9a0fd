//! A medium that remembers what was done to it, and images as power cuts leave them.

use std::cell::RefCell;
use std::rc::Rc;

use block::{BlockFuture, IoBuf, Medium, MemoryMedium, SparseRange, ZeroFlags};

/// A medium in memory that remembers what was done to it.
pub struct Recorder {
    pub memory: MemoryMedium,
    pub log: RefCell<Vec<Entry>>,
}

#[derive(Clone)]
pub enum Entry {
    Write { offset: u64, bytes: Vec<u8> },
    Length(u64),
    Flush,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            memory: MemoryMedium::new(0),
            log: RefCell::default(),
        }
    }
}

impl Recorder {
    pub fn position(&self) -> usize {
        self.log.borrow().len()
    }

    fn push(&self, entry: Entry) {
        self.log.borrow_mut().push(entry);
    }
}

impl Medium for Recorder {
    fn name(&self) -> Rc<str> {
        "recorder".into()
    }

    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        self.memory.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        self.push(Entry::Write {
            offset,
            bytes: buf.to_vec(),
        });
        self.memory.write(offset, buf)
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        self.push(Entry::Write {
            offset,
            bytes: vec![0; length as usize],
        });
        self.memory.write_zeroes(offset, length, flags)
    }

    /// A hole is punched: it reads as zeroes.
    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        let length = self.len().clamp(offset, offset + length) - offset;
        self.push(Entry::Write {
            offset,
            bytes: vec![0; length as usize],
        });
        self.memory.write_zeroes(offset, length, ZeroFlags::empty())
    }

    fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        self.memory.preallocate(offset, length)
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        self.push(Entry::Flush);
        self.memory.flush()
    }

    fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
        self.push(Entry::Length(length));
        self.memory.set_len(length)
    }

    fn sparse_range(&self, offset: u64, length: u64) -> block::Result<SparseRange> {
        self.memory.sparse_range(offset, length)
    }
}

/// What an operation may have left, from this place in the log on.
struct Effect {
    from: usize,
    content: Vec<u8>,
}

/// A flush that had ended at this place in the log.
struct Flushed {
    at: usize,
    content: Vec<u8>,
    /// How many effects it covers.
    effects: usize,
}

/// What was done to a disk, and what it may read as since.
pub struct Story {
    recorder: Rc<Recorder>,
    base: Vec<u8>,
    effects: Vec<Effect>,
    flushes: Vec<Flushed>,
}

/// The image that a power cut leaves.
pub struct Cut<'a> {
    pub image: Vec<u8>,
    pub what: String,
    floor: &'a [u8],
    effects: &'a [Effect],
}

impl Cut<'_> {
    /// Every sector has its content of the last flush, or a newer one.
    pub fn check_content(&self, seen: &[u8]) {
        assert_eq!(seen.len(), self.floor.len());
        for (n, sector) in seen.chunks(512).enumerate() {
            let range = n * 512..n * 512 + sector.len();
            let known = sector == &self.floor[range.clone()]
                || (self.effects.iter()).any(|e| sector == &e.content[range.clone()]);
            let what = &self.what;
            assert!(known, "{what}: sector {n} has neither old nor new content");
        }
    }
}

impl Story {
    /// Begins with what the medium is now.
    pub fn new(recorder: Rc<Recorder>, content: Vec<u8>) -> Self {
        recorder.log.borrow_mut().clear();
        Self {
            base: recorder.memory.to_vec(),
            recorder,
            effects: Vec::new(),
            flushes: vec![Flushed {
                at: 0,
                content,
                effects: 0,
            }],
        }
    }

    /// An operation that began at `from` in the log has made this of the disk.
    pub fn changed(&mut self, from: usize, content: Vec<u8>) {
        self.effects.push(Effect { from, content });
    }

    /// A flush has ended.
    pub fn flushed(&mut self, content: Vec<u8>) {
        self.flushes.push(Flushed {
            at: self.recorder.position(),
            content,
            effects: self.effects.len(),
        });
    }

    /// Cuts the power before every write and looks at what is left: all that was written, or parts.
    /// Returns the number of crash points.
    pub async fn cut(&self, seed: u64, verify: impl AsyncFn(Cut<'_>)) -> usize {
        let log = self.recorder.log.borrow().clone();
        let mut durable = self.base.clone();
        let mut last_flush = 0;
        let mut state = seed | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut points = 0;
        for at in 0..=log.len() {
            if at > 0 && matches!(log[at - 1], Entry::Flush) {
                apply(&mut durable, &log[last_flush..at], || true);
                last_flush = at;
            }
            let flushed = self.flushes.iter().rev().find(|f| f.at <= at).unwrap();
            let possible = &self.effects[flushed.effects..];
            let possible = &possible[..possible.iter().take_while(|e| e.from <= at).count()];
            let pending = &log[last_flush..at];
            for variant in 0..3 {
                let mut image = durable.clone();
                match variant {
                    0 => apply(&mut image, pending, || true),
                    1 => apply(&mut image, pending, || random() % 2 == 0),
                    _ => apply(&mut image, pending, || random() % 8 == 0),
                }
                let what = format!(
                    "power cut before write {at} of {}, variant {variant}",
                    log.len()
                );
                let cut = Cut {
                    image,
                    what,
                    floor: &flushed.content,
                    effects: possible,
                };
                verify(cut).await;
                points += 1;
            }
        }
        points
    }
}

/// Applies entries; `keep` decides for each sector of each write.
fn apply(image: &mut Vec<u8>, entries: &[Entry], mut keep: impl FnMut() -> bool) {
    for entry in entries {
        match entry {
            Entry::Write { offset, bytes } => {
                let start = *offset as usize;
                let mut at = 0;
                while at < bytes.len() {
                    // Sectors are written whole or not at all.
                    let sector_end = ((start + at) / 512 + 1) * 512 - start;
                    let end = sector_end.min(bytes.len());
                    if keep() {
                        if image.len() < start + end {
                            image.resize(start + end, 0);
                        }
                        image[start + at..start + end].copy_from_slice(&bytes[at..end]);
                    }
                    at = end;
                }
            }
            Entry::Length(length) => {
                if keep() {
                    image.resize(*length as usize, 0);
                }
            }
            Entry::Flush => {}
        }
    }
}
