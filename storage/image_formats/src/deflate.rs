//! A quick deflate compressor whose matches reach back no further than 4 KiB.
//!
//! qcow2 and streamOptimized VMDK readers inflate with a window of 4 KiB; general compressors look 32
//! KiB back, or search a small window as slowly as a large one. This one is made for the small window:
//! its tables fit in the first-level cache.
//!
//! Source: RFC 1951.

/// The window that readers of qcow2 inflate with.
const WINDOW: usize = 4096;
const MIN_MATCH: usize = 3;
const MAX_MATCH: usize = 258;
const HASH_BITS: u32 = 14;
const SHORT_BITS: u32 = 12;
/// A match of three bytes from further away is not shorter than three literals.
const SHORT_WINDOW: usize = 1024;
/// How many earlier places with the same hash are tried.
const MAX_CHAIN: usize = 2;
/// A match of this length is good enough to stop the search.
const NICE_MATCH: usize = 32;
/// A match shorter than this is compared with the one at the next byte.
const LAZY_MATCH: usize = 8;
/// A Huffman block has this many symbols at most.
const BLOCK_TOKENS: usize = 32 << 10;

const LITERAL_CODES: usize = 286;
const DISTANCE_CODES: usize = 30;
const END_OF_BLOCK: usize = 256;

/// Base lengths of codes 257 on, and their extra bits (RFC 1951, 3.2.5).
const LENGTH_BASE: [u16; 29] = [
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131,
    163, 195, 227, 258,
];
const LENGTH_EXTRA: [u8; 29] = [
    0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
];
/// Base distances and their extra bits, as far as the window reaches.
const DISTANCE_BASE: [u16; 24] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537,
    2049, 3073,
];
const DISTANCE_EXTRA: [u8; 24] = [
    0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10,
];

const LENGTH_CODE: [u8; 256] = length_codes();
const SMALL_DISTANCE_CODE: [u8; 256] = small_distance_codes();

const fn length_codes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut code = 0;
    while code < 29 {
        let mut length = LENGTH_BASE[code] as usize;
        let end = if code == 28 {
            259
        } else {
            LENGTH_BASE[code + 1] as usize
        };
        while length < end {
            table[length - 3] = code as u8;
            length += 1;
        }
        code += 1;
    }
    table
}

const fn small_distance_codes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut code = 0;
    while code < 16 {
        let mut distance = DISTANCE_BASE[code] as usize;
        while distance < DISTANCE_BASE[code + 1] as usize {
            table[distance - 1] = code as u8;
            distance += 1;
        }
        code += 1;
    }
    table
}

fn distance_code(distance: usize) -> usize {
    if distance <= 256 {
        return usize::from(SMALL_DISTANCE_CODE[distance - 1]);
    }
    // Above 256 two codes share each power of two.
    let value = distance - 1;
    let high = value.ilog2() as usize;
    2 * high + (value >> (high - 1) & 1)
}

/// A literal byte, or a length and a distance.
#[derive(Clone, Copy)]
struct Token(u32);

impl Token {
    fn literal(byte: u8) -> Self {
        Self(u32::from(byte))
    }

    fn copy(length: usize, distance: usize) -> Self {
        Self((distance as u32) << 16 | (length - 3) as u32)
    }

    fn parts(self) -> (usize, usize) {
        ((self.0 & 0xffff) as usize, (self.0 >> 16) as usize)
    }
}

/// The symbols of one block, and how often each comes.
struct Block {
    tokens: Vec<Token>,
    literals: [u32; LITERAL_CODES],
    distances: [u32; DISTANCE_CODES],
}

impl Block {
    fn clear(&mut self) {
        self.tokens.clear();
        self.literals = [0; LITERAL_CODES];
        self.literals[END_OF_BLOCK] = 1;
        self.distances = [0; DISTANCE_CODES];
    }

    fn literal(&mut self, byte: u8) {
        self.tokens.push(Token::literal(byte));
        self.literals[usize::from(byte)] += 1;
    }

    fn copy(&mut self, found: Match) {
        self.tokens.push(Token::copy(found.length, found.distance));
        self.literals[257 + usize::from(LENGTH_CODE[(found.length - 3) & 255])] += 1;
        self.distances[distance_code(found.distance)] += 1;
    }
}

/// An earlier place with the same bytes; length 0 if there is none.
#[derive(Clone, Copy, Default)]
struct Match {
    length: usize,
    distance: usize,
}

/// The compressor; its tables are worth keeping from one buffer to the next.
///
/// Places are kept modulo 64 Ki: whatever place the tables name is compared before it is used, so one
/// that is stale does no harm, and the tables stay small.
pub struct Deflater {
    /// The last place with a hash of four bytes.
    head: Box<[u16; 1 << HASH_BITS]>,
    /// The last place with a hash of three bytes.
    short: Box<[u16; 1 << SHORT_BITS]>,
    /// The place before each place of the window that has the same hash.
    previous: Box<[u16; WINDOW]>,
    block: Block,
    /// Room for output.
    written: Vec<u8>,
}

impl Default for Deflater {
    fn default() -> Self {
        Self {
            head: Box::new([0; 1 << HASH_BITS]),
            short: Box::new([0; 1 << SHORT_BITS]),
            previous: Box::new([0; WINDOW]),
            block: Block {
                tokens: Vec::with_capacity(BLOCK_TOKENS),
                literals: [0; LITERAL_CODES],
                distances: [0; DISTANCE_CODES],
            },
            written: Vec::new(),
        }
    }
}

impl Deflater {
    /// Compresses `input` (less than 4 GiB) to a raw deflate stream; `None` if that is not shorter
    /// than `limit` bytes.
    pub fn compress(&mut self, input: &[u8], limit: usize) -> Option<Vec<u8>> {
        // The output depends on the input alone.
        self.head.fill(0);
        self.short.fill(0);
        self.previous.fill(0);
        let mut out = BitWriter::reusing(std::mem::take(&mut self.written));
        let result = self.compress_into(&mut out, input, limit);
        self.written = out.bytes;
        result
    }

    fn compress_into(
        &mut self,
        out: &mut BitWriter,
        input: &[u8],
        limit: usize,
    ) -> Option<Vec<u8>> {
        let mut at = 0;
        while at < input.len() {
            at = self.find_matches(input, at);
            write_block(out, &self.block, at == input.len());
            if out.length >= limit {
                return None;
            }
        }
        if input.is_empty() {
            self.block.clear();
            write_block(out, &self.block, true);
        }
        let bytes = out.finish();
        (bytes.len() < limit).then(|| bytes.to_vec())
    }

    /// Turns input from `at` on into tokens until the block is full; returns where it stopped.
    fn find_matches(&mut self, input: &[u8], mut at: usize) -> usize {
        self.block.clear();
        let last = input.len().saturating_sub(8);
        let mut misses = 0usize;
        while at < last && self.block.tokens.len() < BLOCK_TOKENS - 64 {
            let mut found = self.longest_match(input, at, MIN_MATCH - 1);
            if found.length < MIN_MATCH {
                // Where nothing matches for long, look at fewer places.
                misses += 1;
                let end = (at + 1 + (misses >> 6).min(31)).min(last);
                for byte in &input[at..end] {
                    self.block.literal(*byte);
                }
                at = end;
                continue;
            }
            misses = 0;
            // A longer match one byte later is worth a literal.
            let mut next = at + 1;
            while found.length < LAZY_MATCH && next < last {
                let later = self.longest_match(input, next, found.length);
                if later.length <= found.length {
                    next += 1;
                    break;
                }
                self.block.literal(input[at]);
                at = next;
                next += 1;
                found = later;
            }
            self.block.copy(found);
            let end = at + found.length;
            // Long matches are mostly runs; every place in them is not needed.
            let step = if found.length > 64 { 8 } else { 1 };
            while next < end.min(last) {
                self.insert(load64(input, next), next);
                next += step;
            }
            at = end;
        }
        if at >= last && self.block.tokens.len() < BLOCK_TOKENS - 64 {
            for byte in &input[at..] {
                self.block.literal(*byte);
            }
            return input.len();
        }
        at
    }

    fn hash(word: u64) -> usize {
        ((word as u32).wrapping_mul(0x9e37_79b1) >> (32 - HASH_BITS)) as usize
    }

    fn short_hash(word: u64) -> usize {
        (((word as u32) << 8).wrapping_mul(0x9e37_79b1) >> (32 - SHORT_BITS)) as usize
    }

    /// Enters `at`, whose bytes are `word`, in the tables; returns the last places with the same hashes.
    #[inline(always)]
    fn insert(&mut self, word: u64, at: usize) -> (u16, u16) {
        let place = at as u16;
        let before = std::mem::replace(&mut self.head[Self::hash(word)], place);
        self.previous[at % WINDOW] = before;
        let short = std::mem::replace(&mut self.short[Self::short_hash(word)], place);
        (before, short)
    }

    /// Finds a match longer than `least` for the place `at`, which has eight bytes, and enters it in
    /// the tables.
    #[inline(always)]
    fn longest_match(&mut self, input: &[u8], at: usize, least: usize) -> Match {
        let word = load64(input, at);
        let (mut candidate, short) = self.insert(word, at);
        let mut best = Match {
            length: least,
            distance: 0,
        };
        let mut before = 0;
        for _ in 0..MAX_CHAIN {
            let distance = usize::from((at as u16).wrapping_sub(candidate));
            // A slot of the ring that was overwritten leads forward.
            if distance <= before || distance > WINDOW.min(at) {
                break;
            }
            before = distance;
            let place = at - distance;
            let differ = load64(input, place) ^ word;
            if differ as u32 == 0 {
                let length = if differ == 0 {
                    match_length(input, place, at)
                } else {
                    (differ.trailing_zeros() / 8) as usize
                };
                if length > best.length {
                    best = Match { length, distance };
                    if length >= NICE_MATCH {
                        break;
                    }
                }
            }
            candidate = self.previous[place % WINDOW];
        }
        if best.distance == 0 && least < 3 {
            let distance = usize::from((at as u16).wrapping_sub(short));
            if distance > 0 && distance <= SHORT_WINDOW.min(at) {
                let differ = load64(input, at - distance) ^ word;
                if differ << 40 == 0 {
                    let length = (differ.trailing_zeros() / 8) as usize;
                    return Match {
                        length: length.min(8),
                        distance,
                    };
                }
            }
        }
        if best.distance == 0 {
            return Match::default();
        }
        best
    }
}

#[inline(always)]
fn load64(input: &[u8], at: usize) -> u64 {
    match input.get(at..).and_then(<[u8]>::first_chunk) {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => 0,
    }
}

/// How far the bytes at two places agree, given that the first eight do.
fn match_length(input: &[u8], place: usize, at: usize) -> usize {
    let max = MAX_MATCH.min(input.len() - at);
    let (a, b) = (&input[place..place + max], &input[at..at + max]);
    let mut length = 8;
    while length + 8 <= max {
        let differ = load64(a, length) ^ load64(b, length);
        if differ != 0 {
            return length + (differ.trailing_zeros() / 8) as usize;
        }
        length += 8;
    }
    while length < max && a[length] == b[length] {
        length += 1;
    }
    length
}

/// Writes bits, the lowest first.
struct BitWriter {
    /// Room that grows ahead of what is written.
    bytes: Vec<u8>,
    /// Whole bytes that have been written.
    length: usize,
    bits: u64,
    count: u32,
}

impl BitWriter {
    fn reusing(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            length: 0,
            bits: 0,
            count: 0,
        }
    }

    /// Adds up to 56 bits.
    #[inline(always)]
    fn put(&mut self, value: u64, count: u32) {
        self.bits |= value << self.count;
        self.count += count;
        if let Some(room) = self.bytes.get_mut(self.length..self.length + 8) {
            room.copy_from_slice(&self.bits.to_le_bytes());
        } else {
            self.grow();
        }
        self.length += (self.count / 8) as usize;
        self.bits >>= self.count & !7;
        self.count &= 7;
    }

    #[cold]
    fn grow(&mut self) {
        self.bytes.resize(self.length * 2 + 64, 0);
        self.bytes[self.length..self.length + 8].copy_from_slice(&self.bits.to_le_bytes());
    }

    fn finish(&mut self) -> &[u8] {
        self.put(0, (8 - self.count) % 8);
        &self.bytes[..self.length]
    }
}

/// Huffman codes by symbol: the code with its first bit lowest, and its length.
struct Codes {
    codes: Vec<u16>,
    lengths: Vec<u8>,
}

impl Codes {
    fn for_frequencies(frequencies: &[u32], max_length: u8) -> Self {
        let lengths = code_lengths(frequencies, max_length);
        let mut counts = [0u16; 16];
        for length in &lengths {
            counts[usize::from(*length)] += 1;
        }
        counts[0] = 0;
        let mut next = [0u16; 16];
        for bits in 1..16 {
            next[bits] = (next[bits - 1] + counts[bits - 1]) << 1;
        }
        let codes = lengths.iter().map(|length| {
            if *length == 0 {
                return 0;
            }
            let slot = &mut next[usize::from(*length)];
            let code = *slot;
            *slot += 1;
            code.reverse_bits() >> (16 - length)
        });
        Self {
            codes: codes.collect(),
            lengths: lengths.clone(),
        }
    }

    fn put(&self, out: &mut BitWriter, symbol: usize) {
        out.put(
            u64::from(self.codes[symbol]),
            u32::from(self.lengths[symbol]),
        );
    }

    /// The code and its extra bits, with their number in the upper bits.
    fn packed(&self, symbol: usize, extra: u32, extra_bits: u8) -> u32 {
        let width = self.lengths[symbol];
        let bits = u32::from(self.codes[symbol]) | extra << width;
        bits | u32::from(width + extra_bits) << PACKED_SHIFT
    }
}

/// Huffman code lengths, none longer than `max_length`, at least two symbols with a code.
fn code_lengths(frequencies: &[u32], max_length: u8) -> Vec<u8> {
    let mut lengths = vec![0u8; frequencies.len()];
    let mut used: Vec<(u32, usize)> = frequencies
        .iter()
        .enumerate()
        .filter(|(_, f)| **f > 0)
        .map(|(s, f)| (*f, s))
        .collect();
    // Decoders want a complete code; with one symbol its sibling stays unused.
    for symbol in 0..2 {
        if used.len() < 2 && !used.iter().any(|(_, s)| *s == symbol) {
            used.push((1, symbol));
        }
    }
    used.sort_unstable();
    let depths = tree_depths(&used);
    let mut per_length = [0usize; 33];
    for depth in depths {
        per_length[usize::from(depth).min(32)] += 1;
    }
    limit_lengths(&mut per_length, usize::from(max_length));
    // The rarest symbols get the longest codes.
    let mut symbols = used.iter().map(|(_, symbol)| *symbol);
    for length in (1..=usize::from(max_length)).rev() {
        for symbol in symbols.by_ref().take(per_length[length]) {
            lengths[symbol] = length as u8;
        }
    }
    lengths
}

/// The depth of each leaf in the Huffman tree of symbols sorted by frequency.
fn tree_depths(used: &[(u32, usize)]) -> Vec<u8> {
    let n = used.len();
    let mut weights: Vec<u64> = used.iter().map(|(f, _)| u64::from(*f)).collect();
    let mut parents = vec![0usize; 2 * n - 1];
    // Two queues, leaves and inner nodes, each in ascending order.
    let (mut leaf, mut inner) = (0, n);
    for node in n..2 * n - 1 {
        let mut sum = 0;
        for _ in 0..2 {
            let take_leaf = leaf < n && (inner >= node || weights[leaf] <= weights[inner]);
            let chosen = if take_leaf { &mut leaf } else { &mut inner };
            sum += weights[*chosen];
            parents[*chosen] = node;
            *chosen += 1;
        }
        weights.push(sum);
    }
    let mut depths = vec![0u8; 2 * n - 1];
    for node in (0..2 * n - 2).rev() {
        depths[node] = depths[parents[node]].saturating_add(1);
    }
    depths.truncate(n);
    depths
}

/// Makes code lengths fit in `max` bits while the code stays complete.
fn limit_lengths(per_length: &mut [usize; 33], max: usize) {
    for length in max + 1..33 {
        per_length[max] += per_length[length];
        per_length[length] = 0;
    }
    let mut total: u64 = (1..=max).map(|l| (per_length[l] as u64) << (max - l)).sum();
    while total > 1 << max {
        // One code of the full length becomes the sibling of a shorter one.
        per_length[max] -= 1;
        if let Some(length) = (1..max).rev().find(|l| per_length[*l] > 0) {
            per_length[length] -= 1;
            per_length[length + 1] += 2;
        }
        total -= 1;
    }
}

fn write_block(out: &mut BitWriter, block: &Block, last: bool) {
    let literal_codes = Codes::for_frequencies(&block.literals, 15);
    let distance_codes = Codes::for_frequencies(&block.distances, 15);
    out.put(u64::from(last), 1);
    out.put(2, 2);
    write_code_lengths(out, &literal_codes.lengths, &distance_codes.lengths);
    let literals: [u32; 256] = std::array::from_fn(|n| literal_codes.packed(n, 0, 0));
    let lengths: [u32; 256] = std::array::from_fn(|n| {
        let code = usize::from(LENGTH_CODE[n]);
        let extra = (n + 3) as u32 - u32::from(LENGTH_BASE[code]);
        literal_codes.packed(257 + code, extra, LENGTH_EXTRA[code])
    });
    for token in &block.tokens {
        let (value, distance) = token.parts();
        if distance == 0 {
            let code = literals[value & 255];
            out.put(u64::from(code & PACKED_BITS), code >> PACKED_SHIFT);
            continue;
        }
        let length = lengths[value & 255];
        let code = distance_code(distance) % DISTANCE_BASE.len();
        let extra = distance as u64 - u64::from(DISTANCE_BASE[code]);
        let width = u32::from(distance_codes.lengths[code]);
        let place = u64::from(distance_codes.codes[code]) | extra << width;
        let count = length >> PACKED_SHIFT;
        out.put(
            u64::from(length & PACKED_BITS) | place << count,
            count + width + u32::from(DISTANCE_EXTRA[code]),
        );
    }
    literal_codes.put(out, END_OF_BLOCK);
}

/// A code with its extra bits takes 20 bits at most; its width stands above.
const PACKED_SHIFT: u32 = 27;
const PACKED_BITS: u32 = (1 << PACKED_SHIFT) - 1;

/// The order in which the lengths of the code length code are stored (RFC 1951, 3.2.7).
const LENGTH_ORDER: [usize; 19] = [
    16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
];

fn write_code_lengths(out: &mut BitWriter, literals: &[u8], distances: &[u8]) {
    let used = |lengths: &[u8], least: usize| {
        lengths
            .iter()
            .rposition(|l| *l != 0)
            .map_or(least, |p| (p + 1).max(least))
    };
    let (literal_count, distance_count) = (used(literals, 257), used(distances, 1));
    let all: Vec<u8> = literals[..literal_count]
        .iter()
        .chain(&distances[..distance_count])
        .copied()
        .collect();
    let runs = run_lengths(&all);
    let mut frequencies = [0u32; 19];
    for (symbol, _, _) in &runs {
        frequencies[usize::from(*symbol)] += 1;
    }
    let codes = Codes::for_frequencies(&frequencies, 7);
    let stored = LENGTH_ORDER
        .iter()
        .rposition(|s| codes.lengths[*s] != 0)
        .map_or(4, |p| p + 1)
        .max(4);
    out.put((literal_count - 257) as u64, 5);
    out.put((distance_count - 1) as u64, 5);
    out.put((stored - 4) as u64, 4);
    for symbol in &LENGTH_ORDER[..stored] {
        out.put(u64::from(codes.lengths[*symbol]), 3);
    }
    for (symbol, extra, bits) in runs {
        codes.put(out, usize::from(symbol));
        out.put(u64::from(extra), u32::from(bits));
    }
}

/// Code lengths as symbols with extra bits: 16 repeats the last one, 17 and 18 are runs of zero.
fn run_lengths(all: &[u8]) -> Vec<(u8, u8, u8)> {
    let mut runs = Vec::with_capacity(all.len());
    let mut at = 0;
    while at < all.len() {
        let value = all[at];
        let mut run = all[at..].iter().take_while(|l| **l == value).count();
        at += run;
        if value != 0 {
            runs.push((value, 0, 0));
            run -= 1;
        }
        while run >= 3 {
            let (symbol, least, most, bits) = match value {
                0 if run >= 11 => (18, 11, 138, 7),
                0 => (17, 3, 10, 3),
                _ => (16, 3, 6, 2),
            };
            let n = run.min(most);
            runs.push((symbol, (n - least) as u8, bits));
            run -= n;
        }
        for _ in 0..run {
            runs.push((value, 0, 0));
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Inflates with another library.
    fn inflate(bytes: &[u8], length: usize) -> Vec<u8> {
        let mut inflater = flate2::Decompress::new(false);
        let mut out = vec![0; length + 1];
        let status = inflater
            .decompress(bytes, &mut out, flate2::FlushDecompress::Finish)
            .unwrap();
        assert_eq!(status, flate2::Status::StreamEnd);
        assert_eq!(inflater.total_out(), length as u64);
        out.truncate(length);
        out
    }

    fn round_trip(input: &[u8]) -> usize {
        let bytes = Deflater::default().compress(input, usize::MAX).unwrap();
        assert!(
            inflate(&bytes, input.len()) == input,
            "{} bytes differ",
            input.len()
        );
        bytes.len()
    }

    #[test]
    fn simple_inputs_round_trip() {
        round_trip(&[]);
        round_trip(&[7]);
        round_trip(&[0; 100_000]);
        round_trip(&(0..=255).collect::<Vec<u8>>());
        let text = b"the quick brown fox jumps over the lazy dog. ".repeat(2000);
        assert!(round_trip(&text) < text.len() / 50);
    }

    #[test]
    fn skewed_frequencies_keep_codes_within_fifteen_bits() {
        // Fibonacci frequencies make the deepest trees.
        let mut frequencies = vec![0u32; 40];
        let (mut a, mut b) = (1, 1);
        for f in &mut frequencies {
            *f = a;
            (a, b) = (b, a + b);
        }
        for max in [7, 15] {
            let lengths = code_lengths(&frequencies, max);
            let sum: u64 = lengths
                .iter()
                .filter(|l| **l > 0)
                .map(|l| 1 << (max - l))
                .sum();
            assert_eq!(sum, 1 << max);
            assert!(lengths.iter().all(|l| *l <= max));
        }
    }

    #[test]
    fn incompressible_input_is_refused() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        assert!(Deflater::default().compress(&noise, noise.len()).is_none());
        round_trip(&noise);
    }

    #[test]
    fn output_depends_on_the_input_alone() {
        let mut used = Deflater::default();
        let inputs: [Vec<u8>; 3] = [
            (0..200_000u32)
                .map(|n| ((n / 7) ^ (n >> 9)) as u8)
                .collect(),
            (0..65_536u32).map(|n| ((n * n) >> 5) as u8).collect(),
            b"a line of a log, number 1234\n".repeat(3000),
        ];
        for input in &inputs {
            let again = used.compress(input, usize::MAX).unwrap();
            let fresh = Deflater::default().compress(input, usize::MAX).unwrap();
            assert!(again == fresh);
        }
    }

    /// Inputs as clusters hold them: a kind, a seed and a length.
    fn cluster(kind: u8, seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut out = Vec::new();
        while out.len() < length {
            match kind {
                // Noise, as encrypted data.
                0 => out.extend(random().to_le_bytes()),
                // Words of a small vocabulary.
                1 => out.extend(format!("word{} ", random() % 300).into_bytes()),
                // Records of a table with small differences.
                2 => out.extend([1, 0, 0, 0, random() as u8, 0, 0x40, (random() % 3) as u8]),
                // Runs of one byte.
                3 => out.extend(std::iter::repeat_n(
                    random() as u8,
                    (random() % 700) as usize,
                )),
                // What has been compressed already.
                _ => {
                    let text = cluster(1, random(), 4000);
                    out.extend(Deflater::default().compress(&text, usize::MAX).unwrap());
                }
            }
        }
        out.truncate(length);
        out
    }

    proptest! {
        #[test]
        fn clusters_of_every_kind_round_trip(
            kind in 0u8..5,
            seed: u64,
            length in prop_oneof![Just(512usize), Just(65536), 0usize..200_000],
        ) {
            round_trip(&cluster(kind, seed, length));
        }

        #[test]
        fn anything_round_trips(
            pieces in prop::collection::vec((any::<u8>(), 1usize..300, any::<bool>()), 0..400),
        ) {
            let mut input = Vec::new();
            for (value, length, repeat) in pieces {
                for n in 0..length {
                    input.push(if repeat { value } else { (n as u8).wrapping_mul(value) });
                }
            }
            round_trip(&input);
        }
    }
}
