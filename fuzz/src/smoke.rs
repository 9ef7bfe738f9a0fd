//! Runs a target on seeded random input: what the normal tests do with each target for a moment.
//!
//! `CORTEN_FUZZ_SECONDS` in the environment makes it go on for so long, where the fuzzer itself can't be had.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A run that takes longer than this hangs.
const HANG: Duration = Duration::from_secs(60);

/// A generator of numbers that are the same in every run (splitmix64).
pub struct Numbers(u64);

impl Numbers {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// The input of a seed: one of `samples` with a few changes, or random bytes where there are none.
fn input(seed: u64, longest: usize, samples: &[Vec<u8>]) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let mut bytes = match samples.len() {
        0 => {
            let length = numbers.below(longest);
            return (0..length).map(|_| numbers.next() as u8).collect();
        }
        count => samples[numbers.below(count)].clone(),
    };
    // The first seeds take the samples as they are.
    if seed < samples.len() as u64 {
        return samples[seed as usize].clone();
    }
    for _ in 0..=numbers.below(6) {
        change(&mut bytes, &mut numbers, samples);
    }
    bytes.truncate(longest);
    bytes
}

fn change(bytes: &mut Vec<u8>, numbers: &mut Numbers, samples: &[Vec<u8>]) {
    let at = match numbers.below(2) {
        0 => numbers.below(bytes.len().min(600)),
        _ => numbers.below(bytes.len()),
    };
    let end = bytes.len();
    match numbers.below(12) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, numbers.next() as u8),
        2 if end > 0 => {
            let until = (at + numbers.below(9)).min(end);
            bytes.drain(at..until);
        }
        3 => {
            // A piece of another sample.
            let other = &samples[numbers.below(samples.len())];
            let from = numbers.below(other.len());
            let piece = &other[from..(from + numbers.below(64)).min(other.len())];
            bytes.splice(at..at, piece.iter().copied());
        }
        4 => {
            let value = numbers.next().to_le_bytes();
            let width = 1 << numbers.below(4);
            for (to, from) in bytes[at..].iter_mut().zip(&value[..width]) {
                *to = *from;
            }
        }
        5..8 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << numbers.below(8);
            }
        }
        _ => {
            let value = [0, 1, 2, 0x20, 0x7f, 0x80, 0xff, numbers.next() as u8];
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value[numbers.below(value.len())];
            }
        }
    }
}

/// The files of a target's corpus, in the order of their names.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let crate_folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    // Crates lie two folders down.
    let folder = crate_folder.join("../../fuzz/corpus").join(target);
    let entries = std::fs::read_dir(folder).expect("the corpus is there");
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let bytes = paths
        .iter()
        .map(|path| std::fs::read(path).expect("a file"));
    bytes.collect()
}

/// Runs the target on `rounds` inputs of at most `longest` bytes, as far as it gets in `at_most`.
///
/// # Panics
/// When a run panics, on any thread. A run that hangs ends the process.
pub fn smoke(
    name: &'static str,
    run: impl Fn(&[u8]),
    samples: &[Vec<u8>],
    (rounds, longest): (u64, usize),
    at_most: Duration,
) {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICKED.store(true, Ordering::SeqCst);
        before(info);
    }));
    let (seed, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let wanted = std::env::var("CORTEN_FUZZ_SECONDS").ok();
    let seconds = wanted.and_then(|seconds| seconds.parse().ok());
    let (rounds, at_most) = match seconds {
        Some(seconds) => (u64::MAX, Duration::from_secs(seconds)),
        None => (rounds, at_most),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| watch(name, &seed, &ended));
        let begin = Instant::now();
        // Told to the watch also when a run panics.
        let _end = OnDrop(&ended);
        while seed.load(Ordering::SeqCst) < rounds && begin.elapsed() < at_most {
            let number = seed.fetch_add(1, Ordering::SeqCst);
            run(&input(number, longest, samples));
            assert!(
                !PANICKED.load(Ordering::SeqCst),
                "{name}: a panic by seed {number}"
            );
        }
        if seconds.is_some() {
            println!("{name}: {} inputs", seed.load(Ordering::SeqCst));
        }
    });
}

struct OnDrop<'a>(&'a AtomicBool);
impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Ends the process when one seed takes too long.
fn watch(name: &str, seed: &AtomicU64, ended: &AtomicBool) {
    let (mut last, mut since) = (u64::MAX, Instant::now());
    while !ended.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(20));
        let now = seed.load(Ordering::SeqCst);
        if now != last {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > HANG {
            eprintln!("{name}: seed {} hangs", now.saturating_sub(1));
            std::process::abort();
        }
    }
}
