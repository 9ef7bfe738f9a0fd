//! From decoded blocks to host code of the same instruction set.
//!
//! | Module | What |
//! | --- | --- |
//! | `code`, `cold` | a compiler of blocks: memory operands, flags; what goes out of line |
//! | `held` | one look-up for several accesses to one object |
//! | `native` | instructions that are executed as they are |
//! | `branch`, `divide`, `string`, `system` | branches and the stack; division; REP MOVS and STOS; flags and bases of the system |
//! | `shape`, `encoding`, `flags`, `liveness` | what there is to know of an instruction |
//! | `emit`, `memory` | bytes of code, and where they are kept |
//! | `registers`, `hot`, `home` | where the guest's state is |
//! | `fpu` | the x87 unit in the host's |
//! | `stubs`, `runtime` | the ways between translated code and Rust |
//! | `jumps`, `far` | the table of indirect jumps; direct jumps to other pages |
//!
//! A block is compiled when it has run some times. Whatever has no template calls the interpreter for that one operation, so
//! that the interpreter stays the reference and the only home of what is rare.

mod branch;
mod code;
mod cold;
mod divide;
mod emit;
mod encoding;
mod far;
mod flags;
mod fpu;
mod held;
mod home;
mod hot;
mod jumps;
mod liveness;
mod memory;
mod native;
mod registers;
mod runtime;
mod shape;
mod string;
mod stubs;
mod system;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use accel::TranslationStatistics;
use iced_x86::{Decoder, FlowControl, Instruction, InstructionInfoFactory, OpKind};

pub(crate) use home::Home;
use hot::OpPlace;
pub(crate) use hot::{Gate, Hot};
pub(crate) use runtime::exit;

use crate::block::{Block, MAX_OPS, decoder_options};
use crate::cpu::{Cpu, Mode, Op};
use code::{At, Compiler, Link};
use emit::Asm;
use encoding::Encoding;
use far::FarLink;
use liveness::Successors;
use memory::CodeMemory;
use stubs::Stubs;

/// There are hardly more links than one in so many bytes of code.
const CODE_OF_LINK: usize = 64;
/// No block becomes longer than this.
const MOST_CODE: usize = 64 << 10;

/// True when no vector instruction can raise an exception of its own.
pub(crate) fn vectors_are_masked(cpu: &Cpu) -> bool {
    cpu.vectors.mxcsr & 0x1f80 == 0x1f80
}

/// True when code can be run as things are: nothing that it executes natively can raise an exception of its own.
pub(crate) fn can_run(cpu: &Cpu, code: &Code) -> bool {
    vectors_are_masked(cpu) && (!code.x87_first || fpu::is_masked(cpu))
}

/// True when code of this mode is compiled.
pub(crate) fn is_for(mode: Mode) -> bool {
    let flat = mode.contains(Mode::CODE32 | Mode::FLAT | Mode::PROTECTED);
    !mode.contains(Mode::STEP) && (mode.is_64bit() || flat)
}

/// Code of a block.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Code {
    /// Where code in the same page goes; zero: there is none.
    pub(crate) near: u64,
    /// Bytes from where code elsewhere goes to `near`.
    far: u16,
    /// Bytes from `near` to where it goes on when it is stale.
    stale: u16,
    /// The first bytes, when it is stale.
    first: [u8; 5],
    /// It is stale.
    pub(crate) is_stale: bool,
    /// It starts with an instruction of the x87 unit.
    x87_first: bool,
    /// Runs so far.
    pub(crate) runs: u16,
    /// The low bits of the number of the page, as the guest had it where the block was met first.
    pub(crate) page_number: u8,
}

impl Code {
    /// Where code elsewhere goes.
    pub(crate) fn far(&self) -> u64 {
        self.near - u64::from(self.far)
    }
}

/// What was compiled of a page.
struct Page {
    generation_at: *const AtomicU32,
    generation: u32,
    blocks: Vec<*mut Block>,
}

impl Page {
    /// The generation of what is in the page now.
    fn now(&self) -> u32 {
        // SAFETY: the generation lives as long as the backing, and all is cleared before a backing goes.
        unsafe { (*self.generation_at).load(Ordering::SeqCst) }
    }
}

/// The host code of a vCPU.
pub(crate) struct Translator {
    memory: CodeMemory,
    asm: Asm,
    stubs: Stubs,
    links: Vec<Link>,
    far_links: Vec<FarLink>,
    jumps: jumps::Jumps,
    pages: HashMap<usize, Page>,
    /// Entries of stale code, by what it was compiled of.
    dead: HashMap<(usize, u16), Vec<u64>>,
    places: Vec<OpPlace>,
    /// Tells which registers instructions change.
    registers: InstructionInfoFactory,
    /// The host has RORX.
    has_rorx: bool,
    /// Bytes of common code.
    common: usize,
    /// What was done so far.
    pub(crate) statistics: TranslationStatistics,
    /// [`guest_memory::code_writes`] when the pages were last looked at.
    seen_writes: u64,
}

// SAFETY: the pointers are to blocks of the cache that goes with the translator, and to generations, which any thread may read.
unsafe impl Send for Translator {}

impl Translator {
    /// Nothing compiled yet, with room for `size` bytes.
    ///
    /// # Errors
    /// What the host says.
    pub(crate) fn new(size: usize) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new(size)?;
        let mut asm = Asm::new();
        let stubs = stubs::build(&mut asm, &mut memory);
        let common = memory.used();
        Ok(Self {
            memory,
            asm,
            stubs,
            // These take memory only as they fill, and never need to move.
            links: Vec::with_capacity(size / CODE_OF_LINK),
            far_links: Vec::with_capacity(size / CODE_OF_LINK),
            jumps: jumps::Jumps::new(),
            pages: HashMap::new(),
            dead: HashMap::new(),
            places: Vec::with_capacity(MAX_OPS),
            registers: InstructionInfoFactory::new(),
            has_rorx: stubs::has_rorx(),
            common,
            statistics: TranslationStatistics::default(),
            seen_writes: guest_memory::code_writes(),
        })
    }

    /// What was done so far, and how full the memory for code is.
    pub(crate) fn statistics(&self) -> TranslationStatistics {
        TranslationStatistics {
            cache_used: self.memory.used() as u64,
            cache_size: (self.memory.used() + self.memory.left()) as u64,
            ..self.statistics
        }
    }

    /// True when another block may not fit.
    pub(crate) fn is_full(&self) -> bool {
        self.memory.left() < MOST_CODE
    }

    /// Forgets all code, because the blocks go.
    pub(crate) fn clear(&mut self) {
        self.statistics.flushes += 1;
        self.memory.truncate(self.common);
        self.links.clear();
        self.far_links.clear();
        self.jumps.clear();
        self.pages.clear();
        self.dead.clear();
        self.places.clear();
    }

    /// Runs code from `near`, of a block at `Cpu::rip`. Gives why it was left ([`exit`]).
    pub(crate) fn run(&mut self, cpu: &mut Cpu, near: u64, ops: *const Op) -> u32 {
        let of = (cpu.mode.bits(), cpu.tlb.version);
        if cpu.gate.key_of != of || cpu.hot.key == 0 {
            cpu.gate.key_of = of;
            cpu.hot.key = self.key(of);
        }
        cpu.hot.jumps = self.jumps.as_ptr();
        cpu.gate.jumps = &raw mut self.jumps;
        cpu.gate.ops = ops;
        cpu.gate.places = self.places.as_ptr();
        cpu.hot.page = cpu.rip & !0xfff;
        // SAFETY: the stub keeps to this convention; the code was compiled for the state's mode and is not stale.
        let why = unsafe {
            let enter: unsafe extern "sysv64" fn(*mut Cpu, u64) -> u32 =
                std::mem::transmute(self.stubs.enter as usize);
            enter(cpu, near)
        };
        fpu::leave(cpu);
        why
    }

    /// The place that a link leads to, relative to the page.
    pub(crate) fn link_target(&self, link: u32) -> i32 {
        self.links[link as usize].target
    }

    /// Makes a link lead to code.
    pub(crate) fn patch(&mut self, link: u32, near: u64) {
        let place = self.memory.start() + u64::from(self.links[link as usize].place);
        self.memory.patch_jump(place, near);
    }

    /// Makes a jump to another page lead to the code that it has found there: at `Cpu::rip`.
    pub(crate) fn patch_far(&mut self, cpu: &Cpu, link: u32) {
        let lookup = self.stubs.lookup;
        let link = self.far_links[link as usize];
        link.link(&mut self.memory, &self.jumps, cpu.rip, cpu.hot.key, lookup);
    }

    /// The key of a mode and of a version of the translations.
    fn key(&mut self, of: (u16, u64)) -> u64 {
        if let Some(key) = self.jumps.key(of) {
            return key;
        }
        // All numbers are taken: none means anything any more.
        self.jumps.clear();
        let memory = &mut self.memory;
        self.far_links.iter().for_each(|link| link.unlink(memory));
        self.jumps.key(of).expect("a number in an empty table")
    }

    /// Lets indirect jumps to `rip` find the code.
    pub(crate) fn enter(&mut self, cpu: &mut Cpu, rip: u64, far: u64) {
        let of = (cpu.mode.bits(), cpu.tlb.version);
        let key = self.key(of);
        // The table may have been emptied, and keys given out anew.
        (cpu.gate.key_of, cpu.hot.key) = (of, key);
        self.jumps.enter(rip, key, far);
    }

    /// Makes code stale whose page has been written to. True when there was any.
    fn follow_writes(&mut self) {
        let writes = guest_memory::code_writes();
        if writes == self.seen_writes {
            return;
        }
        self.seen_writes = writes;
        let stale: Vec<usize> = self
            .pages
            .iter()
            .filter(|(_, page)| page.now() != page.generation)
            .map(|(at, _)| *at)
            .collect();
        for at in stale {
            let blocks = self.pages.remove(&at).map_or_else(Vec::new, |p| p.blocks);
            blocks.into_iter().for_each(|block| self.kill(block));
        }
    }

    /// Code that has become stale can't be reached any more. True when that of `block` can.
    pub(crate) fn make_ready(&mut self, block: *mut Block) -> bool {
        self.follow_writes();
        // SAFETY: a live block.
        let this = unsafe { &*block };
        if this.code.is_stale && this.is_fresh() {
            // It is known already to be what it was.
            self.revive(block);
        }
        !this.code.is_stale
    }

    /// Code of this block is not to be entered any more.
    fn kill(&mut self, block: *mut Block) {
        // SAFETY: blocks live until the cache is cleared, and this with it.
        let block = unsafe { &mut *block };
        let code = &mut block.code;
        if code.is_stale {
            return;
        }
        code.is_stale = true;
        self.statistics.stale += 1;
        code.first = self.memory.bytes(code.near);
        self.memory
            .put_jump(code.near, code.near + u64::from(code.stale));
        self.dead
            .entry((block.host as usize, block.mode.bits()))
            .or_default()
            .push(code.near);
    }

    /// Takes note of fresh code, to find it when its page is written to.
    fn note(&mut self, block: *mut Block) {
        // SAFETY: a live block.
        let this = unsafe { &*block };
        let first = (
            this.host as usize & !0xfff,
            this.generation_at,
            this.generation,
        );
        self.note_in_page(block, first);
        if let Some(second) = this.second() {
            let second = (
                second.host as usize,
                second.generation_at,
                second.generation,
            );
            self.note_in_page(block, second);
        }
    }

    fn note_in_page(&mut self, block: *mut Block, page: (usize, *const AtomicU32, u32)) {
        let (at, generation_at, generation) = page;
        let page = self.pages.entry(at).or_insert(Page {
            generation_at,
            generation,
            blocks: Vec::new(),
        });
        if page.generation == generation {
            page.blocks.push(block);
        } else if page.now() == generation {
            page.generation = generation;
            let old = std::mem::replace(&mut page.blocks, vec![block]);
            old.into_iter().for_each(|block| self.kill(block));
        } else {
            self.kill(block);
        }
    }

    /// The bytes of a stale block have turned out to be what they were.
    pub(crate) fn revive(&mut self, block: *mut Block) {
        // SAFETY: a live block.
        let this = unsafe { &mut *block };
        if this.code.near == 0 || !this.code.is_stale {
            return;
        }
        this.code.is_stale = false;
        self.memory.put(this.code.near, &this.code.first);
        if let Some(dead) = self.dead.get_mut(&(this.host as usize, this.mode.bits())) {
            dead.retain(|near| *near != this.code.near);
        }
        self.note(block);
    }

    /// Compiles a block, whose bytes these are. False: it can't be.
    pub(crate) fn compile(&mut self, block: *mut Block, bytes: &[u8], first_op: usize) -> bool {
        let started = Instant::now();
        // SAFETY: a live block.
        let this = unsafe { &mut *block };
        let mut instructions = Vec::with_capacity(usize::from(this.count));
        let mut decoder =
            Decoder::with_ip(this.mode.bitness(), bytes, 0, decoder_options(this.mode));
        for _ in 0..this.count {
            if !decoder.can_decode() {
                return false;
            }
            let i = decoder.decode();
            let offsets = decoder.get_constant_offsets(&i);
            let immediates = offsets.immediate_size()
                + offsets.immediate_size2()
                + usize::from(shape::names_register_last(&i));
            instructions.push((i, i.len() - immediates));
        }
        if instructions.is_empty() {
            return false;
        }
        let base = self.memory.next();
        self.asm.start(base);
        let mut page = [0; 4096];
        let start = this.host.wrapping_sub(this.host as usize & 0xfff);
        // SAFETY: the page that the block lies in is mapped; whatever a writer makes of the copy, it is bytes.
        unsafe { std::ptr::copy_nonoverlapping(start, page.as_mut_ptr(), page.len()) };
        let successors = Successors::new(&page, this.mode);
        let scattered = self.scattered(first_op, instructions.len());
        let mut c = Compiler {
            has_rorx: self.has_rorx,
            x87_ready: false,
            successors: &successors,
            asm: &mut self.asm,
            stubs: self.stubs,
            mode: this.mode,
            start: (this.host as usize & 0xfff) as i32,
            count: i32::from(this.count),
            first_op: first_op as u32,
            scattered,
            page_number: this.code.page_number,
            ops: this.ops,
            instructions: &instructions,
            bytes,
            registers: &mut self.registers,
            accesses: Vec::new(),
            held: None,
            keeps_held: false,
            unlooked: false,
            cold: Vec::new(),
            links: Vec::new(),
            first_link: self.links.len() as u32,
            far_links: Vec::new(),
            first_far_link: self.far_links.len() as u32,
        };
        let entries = c.block(this);
        let links = std::mem::take(&mut c.links);
        let far_links = std::mem::take(&mut c.far_links);
        drop(c);
        self.asm.finish();
        if self.asm.len() > MOST_CODE / 2 {
            return false;
        }
        self.memory.append(&self.asm.bytes);
        let offset = base - self.memory.start();
        self.links
            .extend(links.into_iter().map(|(at, target)| Link {
                place: (offset + at as u64) as u32,
                target,
            }));
        self.far_links
            .extend(far_links.into_iter().map(|link| link.moved(offset)));
        self.statistics.blocks += 1;
        self.statistics.guest_bytes += bytes.len() as u64;
        self.statistics.code_bytes += self.asm.len() as u64;
        let (near, stale) = entries;
        this.code = Code {
            near: base + near as u64,
            far: near as u16,
            stale: (stale - near) as u16,
            ..this.code
        };
        this.code.is_stale = false;
        this.code.x87_first = shape::is_x87(&instructions[0].0);
        self.set_places(this, first_op, &instructions);
        self.note(block);
        for old in self
            .dead
            .remove(&(this.host as usize, this.mode.bits()))
            .unwrap_or_default()
        {
            self.memory.put_jump(old, this.code.near);
        }
        self.statistics.translating += started.elapsed();
        true
    }

    /// Bits of the instructions that go from page to page with their memory operand.
    fn scattered(&self, first_op: usize, count: usize) -> u64 {
        let places = self.places.get(first_op..).unwrap_or_default();
        let all = places.iter().take(count).enumerate();
        all.fold(0, |bits, (k, place)| bits | u64::from(place.scattered) << k)
    }

    /// The number of an operation that goes from page to page with its memory operand, if that is news.
    pub(crate) fn note_scattered(&mut self, place: *const OpPlace) -> Option<usize> {
        let number = (place as usize - self.places.as_ptr() as usize) / size_of::<OpPlace>();
        let place = self.places.get_mut(number)?;
        (!std::mem::replace(&mut place.scattered, true)).then_some(number)
    }

    /// True when a jump to another page is linked.
    #[cfg(test)]
    pub(crate) fn is_linked_far(&self) -> bool {
        self.far_links
            .iter()
            .any(|link| link.is_linked(&self.memory))
    }

    /// Gives keys out until the next one is the first again; no jump is linked then.
    #[cfg(test)]
    pub(crate) fn take_all_keys(&mut self) {
        for version in 1 << 40.. {
            self.key((0, version));
            if !self.is_linked_far() {
                break;
            }
        }
    }

    /// True when there is such an operation.
    #[cfg(test)]
    pub(crate) fn has_scattered(&self) -> bool {
        self.places.iter().any(|place| place.scattered)
    }

    /// Compiles a block once more, with what is known now.
    pub(crate) fn compile_again(&mut self, block: *mut Block, bytes: &[u8], first_op: usize) {
        // SAFETY: a live block.
        let before = unsafe { (*block).code };
        if before.near != 0 && !before.is_stale && self.compile(block, bytes, first_op) {
            // SAFETY: as above.
            let near = unsafe { (*block).code.near };
            self.memory.put_jump(before.near, near);
        }
    }

    fn set_places(
        &mut self,
        block: &Block,
        first_op: usize,
        instructions: &[(Instruction, usize)],
    ) {
        let end = first_op + usize::from(block.count) + 1;
        if self.places.len() < end {
            self.places.resize(end, OpPlace::default());
        }
        for (k, place) in self.places[first_op..end].iter_mut().enumerate() {
            place.start = (block.host as usize & 0xfff) as u16;
            place.rest = usize::from(block.count).saturating_sub(k + 1) as u8;
            place.x87 = instructions
                .get(k)
                .is_some_and(|(i, _)| shape::touches_x87(i));
        }
    }
}

impl Compiler<'_> {
    /// Compiles a block. Gives where its near entry and the way out of stale code are.
    fn block(&mut self, block: &Block) -> (usize, usize) {
        let instructions = self.instructions;
        self.accesses = self.find_accesses();
        // The far entry: R14 is the address.
        self.asm.ins(
            self.wide(0x8d),
            emit::R14,
            emit::mem(emit::R14, -self.start),
        );
        self.asm.store(emit::hot(hot::at::PAGE), emit::R14);
        let near = self.asm.len();
        let live = self.liveness(block, instructions);
        self.count_block(live[0] != 0);
        let mut ended = false;
        for (k, (i, immediate_at)) in instructions.iter().enumerate() {
            let at = At {
                i,
                op: self.op(k),
                k,
                live_before: live[k] != 0,
                live_after: live[k + 1] != 0,
            };
            let last = k + 1 == instructions.len();
            self.before_instruction(at);
            if self.template(at, self.own_bytes(k), *immediate_at, last, &mut ended) {
                self.after_instruction(at);
                continue;
            }
            self.held = None;
            if last {
                self.end_by_interpreter(at);
                ended = true;
            } else {
                self.call_interpreter(at);
            }
        }
        if !ended {
            let k = instructions.len() - 1;
            let at = At {
                i: &instructions[k].0,
                op: self.op(k),
                k,
                live_before: true,
                live_after: true,
            };
            self.look_at_last_stores(at);
            self.fall_through(at);
        }
        // A block of fewer bytes than a jump would be overwritten beyond its end.
        while self.asm.len() < near + 5 {
            self.asm.u8(0x90);
        }
        self.finish();
        let stale = self.asm.len();
        let start = self.start;
        self.address_in_page(start);
        self.asm.store(emit::hot(hot::at::RIP), emit::R14);
        let exit = self.stubs.exit;
        self.asm.jmp(exit);
        (near, stale)
    }

    /// Flags that matter before each instruction, and after the last.
    fn liveness(&self, block: &Block, instructions: &[(Instruction, usize)]) -> Vec<u32> {
        let mut live = vec![self.live_behind(block, instructions); instructions.len() + 1];
        for (k, (i, _)) in instructions.iter().enumerate().rev() {
            // SAFETY: as in `block`.
            let op = unsafe { &*block.ops.add(k) };
            let effect = flags::effect(i);
            live[k] = if self.has_template(i, op) {
                live[k + 1] & !effect.writes | effect.reads
            } else {
                flags::ALL
            };
        }
        live
    }

    /// Flags that matter behind the block.
    fn live_behind(&self, block: &Block, instructions: &[(Instruction, usize)]) -> u32 {
        let k = instructions.len() - 1;
        let i = &instructions[k].0;
        // SAFETY: as in `block`.
        let op = unsafe { &*block.ops.add(k) };
        if !self.has_template(i, op) {
            return flags::ALL;
        }
        let next = || self.successors.live_at(self.start + i32::from(op.next));
        let target = || match i.op0_kind() {
            OpKind::NearBranch64 => {
                let place = i.near_branch_target() as i64 + i64::from(self.start);
                i32::try_from(place).map_or(flags::ALL, |place| self.successors.live_at(place))
            }
            OpKind::NearBranch32 => {
                let relative = i.near_branch_target() as u32 as i32;
                self.successors.live_at(self.start.wrapping_add(relative))
            }
            _ => flags::ALL,
        };
        match i.flow_control() {
            FlowControl::Next => next(),
            FlowControl::UnconditionalBranch | FlowControl::Call => target(),
            FlowControl::ConditionalBranch => target() | next(),
            _ => flags::ALL,
        }
    }

    /// True when the interpreter is not needed for what the instruction usually does.
    fn has_template(&self, i: &Instruction, op: &Op) -> bool {
        op.handler as usize != crate::exec::undefined().handler as usize
            && shape::is_known(i, self.mode)
    }

    fn template(
        &mut self,
        at: At,
        bytes: &[u8],
        immediate_at: usize,
        last: bool,
        ended: &mut bool,
    ) -> bool {
        if !self.has_template(at.i, at.op) {
            return false;
        }
        if native::is_nop(at.i) {
            self.keeps_held = true;
            return true;
        }
        if shape::is_branch(at.i) {
            *ended = last && self.branch(at);
            return *ended;
        }
        if string::is_string(at.i) {
            *ended = last && self.string(at);
            return *ended;
        }
        if system::is_system(at.i, self.mode) {
            return self.system(at, last);
        }
        if shape::is_stack(at.i) {
            return self.stack_instruction(at);
        }
        if divide::is_division(at.i) {
            return self.divide(at);
        }
        let Some(mut e) = Encoding::parse(bytes, self.code64()) else {
            return false;
        };
        e.immediate_at = immediate_at;
        if e.map == 0 && e.byte == 0x82 {
            // An alias that 64-bit code has not.
            (e.byte, e.has_odd_prefixes) = (0x80, true);
        }
        if at.i.mnemonic() == iced_x86::Mnemonic::Lea {
            return self.lea(at, &e);
        }
        match shape::shape(at.i, &e) {
            Some(s) => self.native(at, &e, &s, bytes),
            None => false,
        }
    }
}
