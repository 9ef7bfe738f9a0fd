//! The cache of decoded blocks of one vCPU.
//!
//! A block is found by the host address of its first byte, which stands for the physical address, and the mode that it was
//! decoded for. Blocks and operations live in arenas of fixed size that are emptied all at once, so that a pointer to a
//! block stays good until then, also when the block itself is stale.

use std::sync::atomic::{AtomicU32, Ordering};

use super::decode::{MAX_BYTES, MAX_INSTRUCTIONS};
use crate::cpu::{Mode, Op};
use crate::translate::Code;

/// A successor of a block that was found once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    /// RIP at which it starts.
    pub(crate) rip: u64,
    /// The [`crate::mmu::Tlb::version`] under which it was found, or `u64::MAX` when it lies in the same page as the block and so
    /// needs no translation of its own.
    pub(crate) version: u64,
    /// The block, or null.
    pub(crate) block: *const Block,
}

const NO_LINK: Link = Link {
    rip: 0,
    version: 0,
    block: std::ptr::null(),
};

/// The generation of code that is in no memory.
pub(crate) static NO_GENERATION: AtomicU32 = AtomicU32::new(0);

/// The second page of an instruction that lies in two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Second {
    /// The page in the host.
    pub(crate) host: *const u8,
    /// Where its generation stands.
    pub(crate) generation_at: *const AtomicU32,
    /// The generation under which the bytes were decoded.
    pub(crate) generation: u32,
}

/// A decoded block.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Block {
    /// Its operations.
    pub(crate) ops: *const Op,
    /// Where the page's generation stands.
    pub(crate) generation_at: *const AtomicU32,
    /// The generation under which the bytes were decoded.
    pub(crate) generation: u32,
    /// Instructions.
    pub(crate) count: u16,
    /// The mode that it was decoded for.
    pub(crate) mode: Mode,
    /// Its first byte in the host.
    pub(crate) host: *const u8,
    /// The blocks that came after it.
    pub(crate) links: [Link; 2],
    /// Bytes that it was decoded from: where in the cache's bytes, and how many.
    pub(crate) bytes: (u32, u16),
    /// Where the rest of its only instruction is, when it lies in two pages; or null.
    second: *const Second,
    /// Its translation.
    pub(crate) code: Code,
    next: u32,
}

const _: () = assert!(size_of::<Block>() == 128);

impl Block {
    /// A block of one instruction that is not in the cache.
    pub(crate) fn passing(ops: &[Op], mode: Mode, generation: &'static AtomicU32) -> Self {
        Self {
            ops: ops.as_ptr(),
            generation_at: generation,
            generation: 0,
            count: 1,
            mode,
            host: std::ptr::null(),
            links: [NO_LINK; 2],
            bytes: (0, 0),
            second: std::ptr::null(),
            code: Code::default(),
            next: 0,
        }
    }

    /// True while nobody has written to the page since the block was decoded.
    #[inline(always)]
    pub(crate) fn is_fresh(&self) -> bool {
        // SAFETY: the generations live as long as the backing, and the cache is emptied before a backing goes.
        let first = unsafe { (*self.generation_at).load(Ordering::Relaxed) };
        first == self.generation && (self.second.is_null() || self.second_is_fresh())
    }

    #[cold]
    fn second_is_fresh(&self) -> bool {
        self.second().is_none_or(|second| {
            // SAFETY: as in `is_fresh`.
            let now = unsafe { (*second.generation_at).load(Ordering::Relaxed) };
            now == second.generation
        })
    }

    /// The second page of its only instruction, when that lies in two.
    pub(crate) fn second(&self) -> Option<&Second> {
        // SAFETY: null, or in an arena of the cache that the block is in, which are emptied together.
        unsafe { self.second.as_ref() }
    }

    /// True for an instruction that lies in two pages.
    #[inline(always)]
    pub(crate) fn is_across(&self) -> bool {
        !self.second.is_null()
    }
}

/// Blocks that there is room for at first.
const BLOCKS: usize = 3 << 13;
/// Most blocks.
const BLOCKS_MAX: usize = 3 << 15;
/// Operations for a block.
const OPS: usize = 6;
/// Most operations of a cache.
pub(crate) const MAX_OPS: usize = BLOCKS_MAX * OPS;
/// Bytes of source that are kept to compare, for a block.
const BYTES: usize = 24;
/// Instructions that lie in two pages, for so many blocks.
const SECONDS: usize = 16;
const BUCKETS: usize = 1 << 16;
/// A cache that is full again after fewer instructions than this is too small for what runs.
const SOON: u64 = 75_000_000;

/// See the module.
pub(crate) struct BlockCache {
    buckets: Vec<u32>,
    blocks: Vec<Block>,
    ops: Vec<Op>,
    bytes: Vec<u8>,
    seconds: Vec<Second>,
    /// Blocks that there is room for.
    room: usize,
    /// Instructions that had been executed when it was last full.
    full_at: u64,
    /// Times that everything was thrown away.
    pub(crate) flushes: u64,
}

impl BlockCache {
    /// An empty cache. The arenas take memory only as they fill.
    pub(crate) fn new() -> Self {
        Self {
            buckets: vec![0; BUCKETS],
            blocks: Vec::with_capacity(BLOCKS_MAX),
            ops: Vec::with_capacity(MAX_OPS),
            bytes: Vec::with_capacity(BLOCKS_MAX * BYTES),
            seconds: Vec::with_capacity(BLOCKS_MAX / SECONDS),
            room: BLOCKS,
            full_at: 0,
            flushes: 0,
        }
    }

    fn bucket(host: *const u8, mode: Mode) -> usize {
        let key = (host as u64) ^ u64::from(mode.bits()) << 48;
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize & (BUCKETS - 1)
    }

    /// The block at a host address, stale or not.
    #[inline]
    pub(crate) fn find(&mut self, host: *const u8, mode: Mode) -> Option<*mut Block> {
        let mut at = self.buckets[Self::bucket(host, mode)];
        while at != 0 {
            let block = &mut self.blocks[at as usize - 1];
            if block.host == host && block.mode == mode {
                return Some(block);
            }
            at = block.next;
        }
        None
    }

    /// True when another block may not fit.
    pub(crate) fn is_full(&self) -> bool {
        self.blocks.len() == self.room
            || self.ops.len() + MAX_INSTRUCTIONS + 1 > self.room * OPS
            || self.bytes.len() + MAX_BYTES > self.room * BYTES
            || self.seconds.len() == self.room / SECONDS
    }

    /// Has room for more when it is full again too soon. To be called before it is cleared for being full.
    pub(crate) fn grow(&mut self, instructions: u64) {
        if instructions.wrapping_sub(self.full_at) < SOON {
            self.room = (self.room * 2).min(BLOCKS_MAX);
        }
        self.full_at = instructions;
    }

    /// Throws everything away. No pointer to a block may be used afterwards.
    pub(crate) fn clear(&mut self) {
        self.buckets.fill(0);
        self.blocks.clear();
        self.ops.clear();
        self.bytes.clear();
        self.seconds.clear();
        self.flushes += 1;
    }

    /// Where the operations are.
    pub(crate) fn ops_at(&self) -> *const Op {
        self.ops.as_ptr()
    }

    /// The number of a block's first operation.
    pub(crate) fn index_of(&self, block: &Block) -> usize {
        (block.ops as usize - self.ops.as_ptr() as usize) / size_of::<Op>()
    }

    /// The block that an operation of this number belongs to.
    pub(crate) fn block_of(&mut self, op: usize) -> Option<*mut Block> {
        let start = self.ops.as_ptr();
        // Blocks are in the order of their operations.
        let behind = self
            .blocks
            .partition_point(|block| block.ops <= start.wrapping_add(op));
        let block = self.blocks.get_mut(behind.checked_sub(1)?)?;
        Some(block)
    }

    /// The arena to decode into; operations that are appended become a block with [`Self::insert`].
    pub(crate) fn ops(&mut self) -> &mut Vec<Op> {
        &mut self.ops
    }

    /// Makes a block of the operations from `first` on, which [`Self::know`] completes. The cache must not be full.
    pub(crate) fn insert(
        &mut self,
        host: *const u8,
        mode: Mode,
        first: usize,
        count: usize,
    ) -> *mut Block {
        let bucket = Self::bucket(host, mode);
        let block = Block {
            ops: &raw const self.ops[first],
            generation_at: &raw const NO_GENERATION,
            generation: 0,
            count: count as u16,
            mode,
            host,
            links: [NO_LINK; 2],
            bytes: (0, 0),
            second: std::ptr::null(),
            code: Code::default(),
            next: self.buckets[bucket],
        };
        self.blocks.push(block);
        self.buckets[bucket] = self.blocks.len() as u32;
        self.blocks.last_mut().expect("just pushed")
    }

    /// Notes what a new block was decoded from: bytes, and the generations of their pages.
    pub(crate) fn know(
        &mut self,
        block: *mut Block,
        bytes: &[u8],
        generation: (*const AtomicU32, u32),
        second: Option<Second>,
    ) -> *const Block {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        // SAFETY: a block that `insert` has just made.
        let this = unsafe { &mut *block };
        this.bytes = (at as u32, bytes.len() as u16);
        (this.generation_at, this.generation) = generation;
        if let Some(second) = second {
            self.seconds.push(second);
            this.second = self
                .seconds
                .last()
                .map_or(std::ptr::null(), std::ptr::from_ref);
        }
        block
    }

    /// The bytes that a block was decoded from.
    pub(crate) fn source(&self, block: &Block) -> &[u8] {
        let (at, len) = block.bytes;
        &self.bytes[at as usize..at as usize + usize::from(len)]
    }

    /// Takes a stale block out of its bucket, so that another can take its place.
    pub(crate) fn forget(&mut self, host: *const u8, mode: Mode) {
        let bucket = Self::bucket(host, mode);
        let mut before = 0u32;
        let mut at = self.buckets[bucket];
        while at != 0 {
            let (matches, next) = {
                let block = &self.blocks[at as usize - 1];
                (block.host == host && block.mode == mode, block.next)
            };
            if matches {
                if before == 0 {
                    self.buckets[bucket] = next;
                } else {
                    self.blocks[before as usize - 1].next = next;
                }
                return;
            }
            before = at;
            at = next;
        }
    }
}
