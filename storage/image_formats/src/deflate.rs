//! A quick deflate compressor whose matches reach back no further than 4 KiB.
//!
//! qcow2 and streamOptimized VMDK readers inflate with a window of 4 KiB; general compressors look 32
//! KiB back, or search a small window as slowly as a large one. This one is made for the small window:
//! its tables fit in the first-level cache.
//!
//! Source: RFC 1951.

/// The window that readers of qcow2 inflate with.
const WINDOW: usize = 4096;
const MIN_MATCH: usize = 4;
const MAX_MATCH: usize = 258;
const HASH_BITS: u32 = 12;
/// How many earlier places with the same hash are tried.
const MAX_CHAIN: usize = 6;
/// A match of this length is good enough to stop the search.
const NICE_MATCH: usize = 48;
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

/// The compressor; its tables are worth keeping from one buffer to the next.
pub struct Deflater {
    head: Box<[u32; 1 << HASH_BITS]>,
    previous: Box<[u32; WINDOW]>,
    tokens: Vec<Token>,
}

impl Default for Deflater {
    fn default() -> Self {
        Self {
            head: Box::new([0; 1 << HASH_BITS]),
            previous: Box::new([0; WINDOW]),
            tokens: Vec::with_capacity(BLOCK_TOKENS),
        }
    }
}

impl Deflater {
    /// Compresses `input` (less than 4 GiB) to a raw deflate stream; `None` if that is not shorter
    /// than `limit` bytes.
    pub fn compress(&mut self, input: &[u8], limit: usize) -> Option<Vec<u8>> {
        self.head.fill(0);
        let mut out = BitWriter::new(limit.min(input.len() + 64));
        let mut at = 0;
        while at < input.len() {
            at = self.find_matches(input, at);
            write_block(&mut out, &self.tokens, at == input.len());
            if out.bytes.len() >= limit {
                return None;
            }
        }
        if input.is_empty() {
            self.tokens.clear();
            write_block(&mut out, &self.tokens, true);
        }
        let bytes = out.finish();
        (bytes.len() < limit).then_some(bytes)
    }

    /// Turns input from `at` on into tokens until the block is full; returns where it stopped.
    fn find_matches(&mut self, input: &[u8], mut at: usize) -> usize {
        self.tokens.clear();
        let last = input.len().saturating_sub(MIN_MATCH + 4);
        let mut misses = 0usize;
        while at < input.len() && self.tokens.len() < BLOCK_TOKENS - 64 {
            if at >= last {
                self.tokens.push(Token::literal(input[at]));
                at += 1;
                continue;
            }
            let (mut length, mut distance) = self.longest_match(input, at);
            if length < MIN_MATCH {
                // Where nothing matches for long, look at fewer places.
                misses += 1;
                for _ in 0..(1 + (misses >> 6)).min(32) {
                    if at < input.len() {
                        self.tokens.push(Token::literal(input[at]));
                        at += 1;
                    }
                }
                continue;
            }
            misses = 0;
            // A longer match one byte later is worth a literal.
            if length < NICE_MATCH / 2 && at + 1 < last {
                let (next_length, next_distance) = self.longest_match(input, at + 1);
                if next_length > length + 1 {
                    self.tokens.push(Token::literal(input[at]));
                    at += 1;
                    (length, distance) = (next_length, next_distance);
                }
            }
            self.tokens.push(Token::copy(length, distance));
            let end = (at + length).min(last);
            let mut inside = at + 2;
            while inside < end {
                self.insert(input, inside);
                // Long matches are mostly runs; every place in them is not needed.
                inside += if length > 64 { 8 } else { 1 };
            }
            at += length;
        }
        at
    }

    fn hash(word: u32) -> usize {
        (word.wrapping_mul(0x9e37_79b1) >> (32 - HASH_BITS)) as usize
    }

    /// Enters `at` in the tables; returns one more than the last place with the same hash, or 0.
    fn insert(&mut self, input: &[u8], at: usize) -> u32 {
        let slot = &mut self.head[Self::hash(load32(input, at))];
        let before = *slot;
        self.previous[at % WINDOW] = before;
        *slot = at as u32 + 1;
        before
    }

    fn longest_match(&mut self, input: &[u8], at: usize) -> (usize, usize) {
        let word = load32(input, at);
        let slot = Self::hash(word);
        let mut candidate = self.head[slot];
        if candidate != at as u32 + 1 {
            self.insert(input, at);
        } else {
            candidate = self.previous[at % WINDOW];
        }
        let (mut best, mut distance) = (MIN_MATCH - 1, 0);
        for _ in 0..MAX_CHAIN {
            if candidate == 0 {
                break;
            }
            let place = candidate as usize - 1;
            if place >= at || at - place > WINDOW {
                break;
            }
            let promising = load32(input, place) == word
                && (best < MIN_MATCH || input.get(place + best) == input.get(at + best));
            if promising {
                let length = match_length(input, place, at);
                if length > best {
                    (best, distance) = (length, at - place);
                    if length >= NICE_MATCH {
                        break;
                    }
                }
            }
            candidate = self.previous[place % WINDOW];
            // A slot of the ring that was overwritten points forward.
            if candidate as usize > place {
                break;
            }
        }
        if distance == 0 {
            (0, 0)
        } else {
            (best, distance)
        }
    }
}

fn load32(input: &[u8], at: usize) -> u32 {
    input
        .get(at..at + 4)
        .map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap_or([0; 4])))
}

fn load64(input: &[u8], at: usize) -> Option<u64> {
    input
        .get(at..at + 8)
        .map(|b| u64::from_le_bytes(b.try_into().unwrap_or([0; 8])))
}

fn match_length(input: &[u8], place: usize, at: usize) -> usize {
    let max = MAX_MATCH.min(input.len() - at);
    let mut length = 0;
    while length + 8 <= max {
        let (Some(a), Some(b)) = (load64(input, place + length), load64(input, at + length)) else {
            break;
        };
        if a != b {
            return length + ((a ^ b).trailing_zeros() / 8) as usize;
        }
        length += 8;
    }
    while length < max && input[place + length] == input[at + length] {
        length += 1;
    }
    length
}

struct BitWriter {
    bytes: Vec<u8>,
    bits: u64,
    count: u32,
}

impl BitWriter {
    fn new(capacity: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(capacity),
            bits: 0,
            count: 0,
        }
    }

    /// Adds up to 32 bits, the lowest first.
    fn put(&mut self, value: u32, count: u32) {
        self.bits |= u64::from(value) << self.count;
        self.count += count;
        if self.count >= 32 {
            self.bytes
                .extend_from_slice(&(self.bits as u32).to_le_bytes());
            self.bits >>= 32;
            self.count -= 32;
        }
    }

    fn finish(mut self) -> Vec<u8> {
        while self.count > 0 {
            self.bytes.push(self.bits as u8);
            self.bits >>= 8;
            self.count = self.count.saturating_sub(8);
        }
        self.bytes
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
            u32::from(self.codes[symbol]),
            u32::from(self.lengths[symbol]),
        );
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

fn write_block(out: &mut BitWriter, tokens: &[Token], last: bool) {
    let mut literals = [0u32; LITERAL_CODES];
    let mut distances = [0u32; DISTANCE_CODES];
    literals[END_OF_BLOCK] = 1;
    for token in tokens {
        let (value, distance) = token.parts();
        if distance == 0 {
            literals[value] += 1;
        } else {
            literals[257 + usize::from(LENGTH_CODE[value])] += 1;
            distances[distance_code(distance)] += 1;
        }
    }
    let literal_codes = Codes::for_frequencies(&literals, 15);
    let distance_codes = Codes::for_frequencies(&distances, 15);
    out.put(u32::from(last), 1);
    out.put(2, 2);
    write_code_lengths(out, &literal_codes.lengths, &distance_codes.lengths);
    for token in tokens {
        let (value, distance) = token.parts();
        if distance == 0 {
            literal_codes.put(out, value);
            continue;
        }
        let length_code = usize::from(LENGTH_CODE[value]);
        literal_codes.put(out, 257 + length_code);
        let extra = u32::from(LENGTH_EXTRA[length_code]);
        out.put(
            (value + 3) as u32 - u32::from(LENGTH_BASE[length_code]),
            extra,
        );
        let code = distance_code(distance);
        distance_codes.put(out, code);
        let extra = u32::from(DISTANCE_EXTRA[code]);
        out.put(distance as u32 - u32::from(DISTANCE_BASE[code]), extra);
    }
    literal_codes.put(out, END_OF_BLOCK);
}

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
    out.put((literal_count - 257) as u32, 5);
    out.put((distance_count - 1) as u32, 5);
    out.put((stored - 4) as u32, 4);
    for symbol in &LENGTH_ORDER[..stored] {
        out.put(u32::from(codes.lengths[*symbol]), 3);
    }
    for (symbol, extra, bits) in runs {
        codes.put(out, usize::from(symbol));
        out.put(u32::from(extra), u32::from(bits));
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

    /// Inflates and checks that no match reaches back further than the window.
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

    proptest! {
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
