//! The run loop of a vCPU.

use std::ops::ControlFlow;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use accel::{CpuIo, Exit};
use guest_memory::barrier_for_new_code;
use x86_defs::control::Rflags;
use x86_defs::state::CS;

use crate::apic::Event;
use crate::block::{self, Block, BlockCache, Link, NO_GENERATION, Second};
use crate::cpu::{Access, BLOCK_RIP, Cpu, Exception, Flow, Mode, Op, Privilege, Result, Waiting};
use crate::translate::{self, Home, Translator, exit};
use crate::vm::SoftOptions;

/// Bytes that a block is decoded from, at most.
const MAX_BYTES: usize = 512;

/// A vCPU and its decoded blocks.
pub(crate) struct Engine {
    pub(crate) cpu: Home,
    cache: BlockCache,
    /// Host code, once there is some.
    pub(crate) translator: Option<Box<Translator>>,
    pub(crate) options: SoftOptions,
    /// A block that must not be kept: one instruction that lies in two pages, or in device space.
    passing: Box<Option<Block>>,
    passing_ops: Vec<Op>,
}

// SAFETY: the raw pointers in blocks are into the cache itself and to generations in guest memory, which any thread may use.
unsafe impl Send for Engine {}

/// Whether the run loop goes on.
type Go = ControlFlow<Exit>;

impl Engine {
    /// An engine for a vCPU.
    pub(crate) fn new(cpu: Cpu, options: SoftOptions) -> Self {
        Self {
            cpu: Home::new(cpu),
            cache: BlockCache::new(),
            translator: None,
            options,
            passing: Box::new(None),
            passing_ops: Vec::with_capacity(2),
        }
    }

    /// Runs until something needs the caller.
    pub(crate) fn run(&mut self, io: &dyn CpuIo) -> Exit {
        self.enter(io);
        let mailbox = self.cpu.shared.mailbox.clone();
        let mut block: *const Block = std::ptr::null();
        let exit = loop {
            if mailbox.has_events() || self.cpu.attention {
                block = std::ptr::null();
                if let Go::Break(exit) = self.service() {
                    break exit;
                }
                // What was done in there may ask for attention again.
                continue;
            }
            match self.run_block(block) {
                ControlFlow::Continue(next) => block = next,
                ControlFlow::Break(exit) => break exit,
            }
        };
        self.leave();
        exit
    }

    /// Executes one instruction (for a repeated string instruction: some iterations), or delivers what it raises.
    ///
    /// # Errors
    /// A triple fault.
    pub(crate) fn step(&mut self, io: &dyn CpuIo) -> std::result::Result<(), Exit> {
        self.enter(io);
        let go = self.run_one();
        self.leave();
        match go {
            Go::Continue(()) => Ok(()),
            Go::Break(exit) => Err(exit),
        }
    }

    fn enter(&mut self, io: &dyn CpuIo) {
        // SAFETY: only the lifetime changes; `leave` takes the reference away before `io` can go.
        let io: &'static dyn CpuIo =
            unsafe { std::mem::transmute::<&dyn CpuIo, &'static dyn CpuIo>(io) };
        self.cpu.io = Some(NonNull::from(io));
        self.cpu.shared.in_guest.store(true, Ordering::SeqCst);
        self.cpu.attention = true;
        self.follow_memory();
    }

    fn leave(&mut self) {
        // So that the state holds no promise to the guest that only a running processor can keep.
        self.cpu.settle_deferred_eoi();
        self.cpu.shared.in_guest.store(false, Ordering::SeqCst);
        self.cpu.io = None;
        self.publish();
    }

    /// Brings the statistics up to date.
    fn publish(&self) {
        let shared = &self.cpu.shared;
        let mut published = shared.published.lock();
        published.times += 1;
        published.instructions = self.cpu.instructions;
        published.counters = self.cpu.counters;
        published.translation = self.translator.as_ref().map(|t| t.statistics());
        shared.said.notify_all();
    }

    /// Forgets host addresses when the map of memory has changed.
    fn follow_memory(&mut self) {
        self.cpu.follow_memory();
        if std::mem::take(&mut self.cpu.code_stale) {
            self.clear_blocks();
        }
    }

    /// Throws all blocks and their code away.
    fn clear_blocks(&mut self) {
        self.cache.clear();
        // Keys and operations are numbered anew.
        self.cpu.hot.key = 0;
        self.cpu.gate.scattered = std::ptr::null();
        if let Some(translator) = &mut self.translator {
            translator.clear();
        }
    }

    /// Throws all away when another block may not fit.
    fn make_room(&mut self) {
        if self.cache.is_full() {
            self.cache.grow(self.cpu.instructions);
            self.clear_blocks();
        }
    }

    /// Runs a block (`block`, or what is at RIP when it is null or stale) and finds the next.
    #[inline(always)]
    fn run_block(&mut self, block: *const Block) -> ControlFlow<Exit, *const Block> {
        let mut block = block;
        let found = block.is_null();
        // SAFETY: a pointer to a block that comes back from here is good until the cache is cleared, which is only done in
        // `find` and `follow_memory`, and the caller drops it when it calls those.
        if block.is_null() || unsafe { !(*block).is_fresh() } {
            block = match self.find(self.cpu.mode) {
                Ok(block) => block,
                Err(_) => return self.deliver().map_continue(|()| std::ptr::null()),
            };
        }
        // SAFETY: as above.
        let this = unsafe { &*block };
        if this.mode.contains(Mode::STEP) {
            return self.single_step(this).map_continue(|()| std::ptr::null());
        }
        if self.options.translate && (this.code.near != 0 || self.is_hot(block)) {
            return self.run_translated(block, found);
        }
        match self.execute(this) {
            Flow::Next => ControlFlow::Continue(self.successor(block)),
            Flow::Left => {
                self.left(this);
                ControlFlow::Continue(std::ptr::null())
            }
            Flow::Fault => self.faulted(this).map_continue(|()| std::ptr::null()),
        }
    }

    /// Counts a run of a block that is not compiled. True: it is now.
    fn is_hot(&mut self, block: *const Block) -> bool {
        // SAFETY: as in `run_block`.
        let this = unsafe { &mut *block.cast_mut() };
        let hot_after = self.options.hot_after;
        if this.code.runs > hot_after || this.host.is_null() {
            return false;
        }
        this.code.runs += 1;
        this.code.runs > hot_after && translate::is_for(this.mode) && self.compile(block.cast_mut())
    }

    #[cold]
    fn compile(&mut self, block: *mut Block) -> bool {
        if self.translator.is_none() {
            match Translator::new(self.options.cache_size) {
                Ok(translator) => self.translator = Some(Box::new(translator)),
                Err(_) => {
                    self.options.translate = false;
                    return false;
                }
            }
        }
        let Some(translator) = &mut self.translator else {
            return false;
        };
        if translator.is_full() {
            // All goes at the next look at the state of things; until then the block is interpreted.
            self.cpu.code_stale = true;
            self.cpu.attention = true;
            return false;
        }
        // SAFETY: a live block of the cache.
        let this = unsafe { &mut *block };
        this.code.page_number = (self.cpu.rip >> 12) as u8;
        let first = self.cache.index_of(this);
        translator.compile(block, self.cache.source(this), first)
    }

    /// Runs the code of a block, and what it leads to. `found`: indirect jumps don't know it yet.
    fn run_translated(
        &mut self,
        block: *const Block,
        found: bool,
    ) -> ControlFlow<Exit, *const Block> {
        // SAFETY: as in `run_block`.
        let this = unsafe { &*block };
        let Some(translator) = &mut self.translator else {
            return ControlFlow::Continue(std::ptr::null());
        };
        if !translate::can_run(&self.cpu, &this.code) {
            return self.interpret(this);
        }
        if !translator.make_ready(block.cast_mut()) {
            return ControlFlow::Continue(std::ptr::null());
        }
        let code = this.code;
        if found {
            let rip = self.cpu.rip;
            translator.enter(&mut self.cpu, rip, code.far());
        }
        let why = translator.run(&mut self.cpu, code.near, self.cache.ops_at());
        if !self.cpu.gate.scattered.is_null() {
            self.follow_scattered();
        }
        let Some(translator) = &mut self.translator else {
            return ControlFlow::Continue(std::ptr::null());
        };
        let counts = &mut translator.statistics;
        match why & 0xff {
            exit::FAULT => counts.faults += 1,
            exit::LINK | exit::FAR_LINK => counts.links += 1,
            _ => counts.others += 1,
        }
        match why & 0xff {
            exit::FAULT => self.deliver().map_continue(|()| std::ptr::null()),
            exit::LINK => ControlFlow::Continue(self.link_code(why >> 8)),
            exit::FAR_LINK => {
                translator.patch_far(&self.cpu, why >> 8);
                ControlFlow::Continue(std::ptr::null())
            }
            _ => ControlFlow::Continue(std::ptr::null()),
        }
    }

    /// Compiles a block anew with an instruction in it that goes from page to page with its memory operand.
    #[cold]
    fn follow_scattered(&mut self) {
        let place = std::mem::replace(&mut self.cpu.gate.scattered, std::ptr::null());
        let Some(translator) = &mut self.translator else {
            return;
        };
        if translator.is_full() {
            return;
        }
        let Some(block) = translator
            .note_scattered(place)
            .and_then(|op| self.cache.block_of(op))
        else {
            return;
        };
        // SAFETY: a live block of the cache.
        let this = unsafe { &*block };
        let first = self.cache.index_of(this);
        translator.compile_again(block, self.cache.source(this), first);
    }

    /// Executes a block by the interpreter alone.
    fn interpret(&mut self, block: &Block) -> ControlFlow<Exit, *const Block> {
        match self.execute(block) {
            Flow::Next => ControlFlow::Continue(std::ptr::null()),
            Flow::Left => {
                self.left(block);
                ControlFlow::Continue(std::ptr::null())
            }
            Flow::Fault => self.faulted(block).map_continue(|()| std::ptr::null()),
        }
    }

    /// Code was left where it goes on at a place in its page that had no code. The block there.
    fn link_code(&mut self, link: u32) -> *const Block {
        let Some(translator) = &mut self.translator else {
            return std::ptr::null();
        };
        let cpu = &mut *self.cpu;
        let target = translator.link_target(link);
        cpu.rip = cpu.hot.page.wrapping_add(target as u64) & cpu.rip_mask;
        if cpu.attention || cpu.shared.mailbox.has_events() {
            return std::ptr::null();
        }
        let flushes = self.cache.flushes;
        let Ok(next) = self.find(self.cpu.mode) else {
            // The fault is found again, and delivered, by the next round.
            return std::ptr::null();
        };
        // SAFETY: `find` gives a live block.
        let this = unsafe { &*next };
        if self.cache.flushes != flushes
            || this.host.is_null()
            || this.is_across()
            || this.mode.contains(Mode::STEP)
        {
            return next;
        }
        if this.code.near == 0 && !self.is_hot(next) {
            return next;
        }
        // SAFETY: as above; it may have been compiled since.
        let near = unsafe { (*next).code.near };
        if let Some(translator) = &mut self.translator {
            translator.patch(link, near);
        }
        next
    }

    #[inline(always)]
    fn execute(&mut self, block: &Block) -> Flow {
        let cpu = &mut *self.cpu;
        cpu.regs[BLOCK_RIP] = cpu.rip;
        cpu.instructions += u64::from(block.count);
        // SAFETY: the operations of a block are there as long as the block.
        unsafe { ((*block.ops).handler)(cpu, block.ops) }
    }

    /// The block after one that ended at `Cpu::rip`, by its links, or null.
    #[inline(always)]
    fn successor(&mut self, block: *const Block) -> *const Block {
        // SAFETY: as in `run_block`.
        let this = unsafe { &*block };
        let (rip, version) = (self.cpu.rip, self.cpu.tlb.version);
        for link in &this.links {
            if link.rip == rip && (link.version == version || link.version == u64::MAX) {
                let next = link.block;
                // SAFETY: links hold null or blocks of the same cache.
                if !next.is_null() && unsafe { (*next).mode == self.cpu.mode } {
                    return next;
                }
            }
        }
        self.link(block)
    }

    /// Finds the block at `Cpu::rip` and links it behind `block`.
    #[inline(never)]
    fn link(&mut self, block: *const Block) -> *const Block {
        if self.cpu.attention || self.cpu.shared.mailbox.has_events() {
            return std::ptr::null();
        }
        let flushes = self.cache.flushes;
        let start = self.cpu.regs[BLOCK_RIP];
        let Ok(next) = self.find(self.cpu.mode) else {
            // The fault is found again, and delivered, by the next round.
            return std::ptr::null();
        };
        if self.cache.flushes != flushes || self.is_passing(next) || self.is_passing(block) {
            return next;
        }
        let rip = self.cpu.rip;
        // SAFETY: both are live blocks of the cache, which was not cleared.
        unsafe {
            let near = (rip ^ start) >> 12 == 0
                && ((*next).host as usize ^ (*block).host as usize) >> 12 == 0
                && (*next).mode == (*block).mode;
            let link = Link {
                rip,
                // Where the rest of an instruction lies is known for these translations only.
                version: if near && !(*next).is_across() {
                    u64::MAX
                } else {
                    self.cpu.tlb.version
                },
                block: next,
            };
            let this = &mut *block.cast_mut();
            let slot = usize::from(this.links[0].rip != rip && !this.links[0].block.is_null());
            if slot == 1 && this.links[1].rip != rip && !this.links[1].block.is_null() {
                this.links[0] = this.links[1];
            }
            this.links[slot] = link;
        }
        next
    }

    fn is_passing(&self, block: *const Block) -> bool {
        self.passing
            .as_ref()
            .as_ref()
            .is_some_and(|b| std::ptr::eq(b, block))
    }

    /// A block was left after `Cpu::left_at`: the rest of it was not executed.
    #[cold]
    fn left(&mut self, block: &Block) {
        let done = self.index_of(block, self.cpu.left_at) + 1;
        self.cpu.instructions -= u64::from(block.count).saturating_sub(done);
    }

    fn index_of(&self, block: &Block, op: *const Op) -> u64 {
        ((op as usize).wrapping_sub(block.ops as usize) / size_of::<Op>()) as u64
    }

    /// An operation of the block has faulted.
    #[cold]
    fn faulted(&mut self, block: &Block) -> Go {
        self.settle_fault(block);
        self.deliver()
    }

    /// Makes RIP and the count of instructions those of the operation that faulted.
    fn settle_fault(&mut self, block: &Block) {
        let op = self.cpu.fault_op;
        let done = self.index_of(block, op);
        self.cpu.instructions -= u64::from(block.count).saturating_sub(done);
        self.cpu.leave_block = false;
        if self.cpu.exception != Exception::Resume {
            // SAFETY: the operation belongs to the block that was just executed.
            self.cpu.rip = self.cpu.rip_of(unsafe { &*op });
        }
    }

    /// Executes the block at RIP, or its first instruction alone, and gives what it raises instead of delivering it.
    #[cfg(test)]
    pub(crate) fn run_uncaught(&mut self, single: bool) -> Option<Exception> {
        let step = if single { Mode::STEP } else { Mode::empty() };
        let Ok(block) = self.find(self.cpu.mode | step) else {
            return Some(self.cpu.exception);
        };
        // SAFETY: `find` gives a live block.
        let this = unsafe { &*block };
        let flow = self.execute(this);
        self.cpu.leave_block = false;
        if flow != Flow::Fault {
            return None;
        }
        self.settle_fault(this);
        Some(self.cpu.exception)
    }

    /// Executes the block at RIP as host code, where it can be compiled, and gives what it raises instead of delivering it.
    #[cfg(test)]
    pub(crate) fn run_code_uncaught(&mut self) -> Option<Exception> {
        let Ok(block) = self.find(self.cpu.mode) else {
            return Some(self.cpu.exception);
        };
        // SAFETY: `find` gives a live block.
        let this = unsafe { &*block };
        if this.code.near == 0 && !this.host.is_null() && !self.compile(block.cast_mut()) {
            self.clear_blocks();
            return None;
        }
        let translator = self.translator.as_mut();
        let masked = translate::can_run(&self.cpu, &this.code);
        let (Some(translator), true, false) = (translator, masked, this.host.is_null()) else {
            return self.run_uncaught(false);
        };
        if !translator.make_ready(block.cast_mut()) {
            return None;
        }
        let why = translator.run(&mut self.cpu, this.code.near, self.cache.ops_at());
        if why & 0xff == exit::LINK {
            let target = translator.link_target(why >> 8) as u64;
            self.cpu.rip = self.cpu.hot.page.wrapping_add(target) & self.cpu.rip_mask;
        }
        (why & 0xff == exit::FAULT).then_some(self.cpu.exception)
    }

    /// Delivers `Cpu::exception`.
    #[cold]
    fn deliver(&mut self) -> Go {
        match self.cpu.exception {
            Exception::Resume => return Go::Continue(()),
            Exception::Shutdown => return Go::Break(Exit::Shutdown),
            _ => {}
        }
        if self.cpu.deliver_exception().is_err() {
            return Go::Break(Exit::Shutdown);
        }
        Go::Continue(())
    }

    /// Executes the one instruction of a block with the debug checks around it.
    #[cold]
    fn single_step(&mut self, block: &Block) -> Go {
        if self.cpu.before_step().is_err() {
            return self.deliver();
        }
        let tf = self.cpu.system_flag(Rflags::TF);
        match self.execute(block) {
            Flow::Fault => return self.faulted(block),
            Flow::Left | Flow::Next => {}
        }
        self.cpu.leave_block = false;
        if self.cpu.after_step(tf).is_err() {
            return self.deliver();
        }
        Go::Continue(())
    }

    /// Executes exactly one instruction.
    fn run_one(&mut self) -> Go {
        let stepping = self.cpu.mode.contains(Mode::STEP);
        let block = match self.find(self.cpu.mode | Mode::STEP) {
            Ok(block) => block,
            Err(_) => return self.deliver(),
        };
        // SAFETY: `find` gives a live block.
        let this = unsafe { &*block };
        if stepping {
            return self.single_step(this);
        }
        let flow = self.execute(this);
        self.cpu.leave_block = false;
        match flow {
            Flow::Fault => self.faulted(this),
            Flow::Left | Flow::Next => Go::Continue(()),
        }
    }

    /// Looks at everything that can come between two instructions.
    #[cold]
    #[inline(never)]
    fn service(&mut self) -> Go {
        loop {
            self.cpu.attention = false;
            let events = self.cpu.shared.mailbox.take_events();
            self.take_events(events);
            if events.contains(Event::KICK) {
                return Go::Break(Exit::Kicked);
            }
            if self.cpu.waiting != Waiting::No {
                self.sleep();
                continue;
            }
            if self.cpu.sti_shadow || self.cpu.mov_ss_shadow {
                self.cpu.sti_shadow = false;
                self.cpu.mov_ss_shadow = false;
                // In HLT the instruction after it has been executed: it was that.
                if !self.cpu.halted {
                    let go = self.run_one();
                    self.cpu.attention = true;
                    return go;
                }
            }
            if self.interrupt().is_break() {
                return Go::Break(Exit::Shutdown);
            }
            if self.cpu.halted && self.cpu.take_kick() {
                self.cpu.halted = false;
            }
            if !self.cpu.halted {
                return Go::Continue(());
            }
            self.sleep();
        }
    }

    fn take_events(&mut self, events: Event) {
        if events.contains(Event::FLUSH_TLB) {
            self.follow_memory();
        }
        if events.contains(Event::STATISTICS) {
            self.publish();
        }
        if events.contains(Event::TIMER) {
            self.cpu.apic_timer();
        }
        if events.contains(Event::INIT) {
            self.cpu.init();
            self.cpu.halted = false;
        }
        if events.contains(Event::STARTUP) && self.cpu.waiting == Waiting::Sipi {
            let vector = self.cpu.shared.mailbox.startup_vector();
            self.cpu.start_up(vector);
        }
        if events.contains(Event::NMI) {
            self.cpu.nmi_pending = true;
        }
        if events.contains(Event::WAKE) {
            self.cpu.kicked();
        }
        self.follow_memory();
    }

    /// Delivers the NMI or interrupt that can be delivered now.
    fn interrupt(&mut self) -> Go {
        let cpu = &mut *self.cpu;
        let delivered = if cpu.nmi_pending && !cpu.nmi_masked {
            cpu.nmi_pending = false;
            cpu.halted = false;
            cpu.nmi_masked = true;
            // Nobody has looked for interrupts.
            cpu.held_back = true;
            cpu.deliver_interrupt(x86_defs::exception::NMI)
        } else if cpu.system_flag(Rflags::IF) {
            let Some(vector) = cpu.take_interrupt() else {
                cpu.held_back = cpu.may_be_interrupted();
                return Go::Continue(());
            };
            cpu.halted = false;
            // Another may wait behind this one.
            cpu.attention = true;
            cpu.deliver_interrupt(vector)
        } else {
            cpu.held_back = true;
            return Go::Continue(());
        };
        cpu.leave_block = false;
        if delivered.is_err() {
            return Go::Break(Exit::Shutdown);
        }
        Go::Continue(())
    }

    /// Sleeps until there is an event.
    fn sleep(&mut self) {
        self.publish();
        let shared = self.cpu.shared.clone();
        let start = Instant::now();
        self.cpu.before_sleep();
        shared.in_guest.store(false, Ordering::SeqCst);
        shared.mailbox.sleep(None);
        shared.in_guest.store(true, Ordering::SeqCst);
        self.follow_memory();
        self.cpu.after_sleep();
        let slept = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        shared.halted.fetch_add(slept, Ordering::Relaxed);
    }

    /// The block at `Cpu::rip`, decoded for `mode`.
    ///
    /// # Errors
    /// What fetching raises.
    fn find(&mut self, mode: Mode) -> Result<*const Block> {
        let linear = self.fetch_address()?;
        let host = match self.cpu.tlb.fetch_hit(linear) {
            Some(page) => page.wrapping_add(linear as usize & 0xfff),
            None => self.fetch_map(linear)?,
        };
        if host.is_null() {
            return self.fetch_from_device(linear, mode);
        }
        self.cpu.tlb.note_fetched(linear);
        if let Some(found) = self.cache.find(host, mode) {
            // SAFETY: a live block of the cache.
            let this = unsafe { &*found };
            let fits = match this.second() {
                Some(second) => self.second_page(linear)? == second.host,
                None => true,
            };
            if fits && (this.is_fresh() || self.revalidate(found)) {
                return Ok(found);
            }
            self.cache.forget(host, mode);
        }
        self.translate_block(linear, host, mode)
    }

    fn fetch_address(&mut self) -> Result<u64> {
        let cpu = &mut *self.cpu;
        if cpu.mode.is_64bit() {
            return Ok(cpu.rip);
        }
        if cpu.rip > u64::from(cpu.segments[CS].limit) {
            return Err(cpu.gp(0));
        }
        Ok(cpu.bases[CS].wrapping_add(cpu.rip) & 0xffff_ffff)
    }

    /// Translates for a fetch: the host address, null for device space.
    fn fetch_map(&mut self, linear: u64) -> Result<*const u8> {
        let mapping = self
            .cpu
            .map_for(linear, Access::Fetch, CS as u8, Privilege::Current)?;
        Ok(mapping.host)
    }

    /// Where the page of a host address keeps its generation; marks the page as code.
    fn mark(&self, host: *const u8) -> Option<(*const AtomicU32, u32)> {
        let at = host as usize;
        for region in self.cpu.memory_map.iter() {
            let start = region.backing.as_ptr() as usize;
            if (start..start + region.backing.len() as usize).contains(&at) {
                let page = ((at - start) >> 12) as u64;
                let (generation, new) = region.backing.mark_code(page);
                if new {
                    barrier_for_new_code();
                }
                return Some((region.backing.code_generation(page), generation));
            }
        }
        None
    }

    /// Makes a stale block fresh again if its bytes are what they were.
    #[cold]
    fn revalidate(&mut self, block: *mut Block) -> bool {
        // SAFETY: a live block of the cache.
        let this = unsafe { &mut *block };
        if this.is_across() {
            return false;
        }
        let Some((_, generation)) = self.mark(this.host) else {
            return false;
        };
        let mut bytes = [0; MAX_BYTES];
        let source = self.cache.source(this);
        let now = &mut bytes[..source.len()];
        // SAFETY: the bytes lie inside the page that the block starts in, which is mapped.
        unsafe { std::ptr::copy_nonoverlapping(this.host, now.as_mut_ptr(), now.len()) };
        if now != source {
            return false;
        }
        this.generation = generation;
        if let Some(translator) = &mut self.translator {
            translator.revive(block);
        }
        true
    }

    /// Decodes the block at a host address.
    #[cold]
    fn translate_block(
        &mut self,
        linear: u64,
        host: *const u8,
        mode: Mode,
    ) -> Result<*const Block> {
        self.make_room();
        let Some(generation) = self.mark(host) else {
            return self.fetch_from_device(linear, mode);
        };
        let in_page = 0x1000 - (linear & 0xfff) as usize;
        let mut bytes = [0; MAX_BYTES];
        let bytes = &mut bytes[..in_page.min(MAX_BYTES)];
        // SAFETY: the bytes lie inside the page, which is mapped.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
        let first = self.cache.ops().len();
        let decoded = block::decode(
            bytes,
            in_page <= MAX_BYTES || bytes.len() == MAX_BYTES,
            mode,
            self.cache.ops(),
        );
        if decoded.cut {
            return self.fetch_across(linear, host, in_page, mode);
        }
        let source = &bytes[..decoded.len];
        let block = self.cache.insert(host, mode, first, decoded.count);
        Ok(self.cache.know(block, source, generation, None))
    }

    /// The page behind the one of a linear address, in the host; null for device space.
    fn second_page(&mut self, linear: u64) -> Result<*const u8> {
        let second = self.cpu.wrap_linear((linear & !0xfff).wrapping_add(0x1000));
        let page = match self.cpu.tlb.fetch_hit(second) {
            Some(page) => page,
            None => self.fetch_map(second)?,
        };
        self.cpu.tlb.note_fetched(second);
        Ok(page)
    }

    /// An instruction that lies in two pages.
    #[cold]
    fn fetch_across(
        &mut self,
        linear: u64,
        host: *const u8,
        in_page: usize,
        mode: Mode,
    ) -> Result<*const Block> {
        let more = self.second_page(linear)?;
        let marked = if more.is_null() {
            None
        } else {
            self.mark(host).zip(self.mark(more))
        };
        let mut bytes = [0; 15];
        let first = in_page.min(15);
        // SAFETY: the bytes lie inside the page, which is mapped.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), first) };
        if !more.is_null() {
            // SAFETY: at most 14 bytes from the start of a page that is mapped.
            unsafe {
                std::ptr::copy_nonoverlapping(more, bytes[first..].as_mut_ptr(), 15 - first);
            }
        }
        let Some((generation, second)) = marked else {
            return Ok(self.pass(&bytes, mode));
        };
        self.make_room();
        let at = self.cache.ops().len();
        let decoded = block::decode(&bytes, false, mode | Mode::STEP, self.cache.ops());
        let block = self.cache.insert(host, mode, at, decoded.count);
        let second = Second {
            host: more,
            generation_at: second.0,
            generation: second.1,
        };
        Ok(self
            .cache
            .know(block, &bytes[..decoded.len], generation, Some(second)))
    }

    /// An instruction in device space.
    #[cold]
    fn fetch_from_device(&mut self, linear: u64, mode: Mode) -> Result<*const Block> {
        let mut bytes = [0; 15];
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = self.cpu.wrap_linear(linear.wrapping_add(i as u64));
            let mapping = self
                .cpu
                .map_for(at, Access::Fetch, CS as u8, Privilege::Current)?;
            if mapping.host.is_null() {
                self.cpu
                    .device_read(mapping.physical, std::slice::from_mut(byte));
            } else {
                // SAFETY: the mapping names one byte of live memory.
                *byte = unsafe { mapping.host.read_volatile() };
            }
        }
        Ok(self.pass(&bytes, mode))
    }

    /// Makes a block of one instruction that is not kept.
    fn pass(&mut self, bytes: &[u8], mode: Mode) -> *const Block {
        self.passing_ops.clear();
        block::decode(bytes, false, mode | Mode::STEP, &mut self.passing_ops);
        let block = Block::passing(&self.passing_ops, mode, &NO_GENERATION);
        self.passing.insert(block)
    }
}

impl Cpu {
    /// True when nothing has to come before the next block: `attention` is put down then.
    pub(crate) fn settle_attention(&mut self) -> bool {
        if self.shared.mailbox.has_events() {
            return false;
        }
        if !self.attention {
            return true;
        }
        let halts = self.waiting != Waiting::No || self.halted || self.code_stale;
        // A shadow stays until the next look at the state of things, which then lets one instruction more go first.
        let nmi = self.nmi_pending && !self.nmi_masked;
        self.attention = halts || nmi || self.may_be_interrupted();
        self.held_back |= !self.attention && !self.system_flag(Rflags::IF);
        !self.attention
    }

    /// True when an interrupt waits that can be delivered, or may once the end of the last one is known.
    fn may_be_interrupted(&self) -> bool {
        self.system_flag(Rflags::IF)
            && (self.has_deferred_eoi() || self.apic.has_extint() || self.apic.pending().is_some())
    }

    /// Takes over a changed map of memory: translations go.
    pub(crate) fn follow_memory(&mut self) {
        let generation = self.machine.memory.generation();
        if generation != self.map_generation {
            self.map_generation = generation;
            self.memory_map = self.machine.memory.regions();
            self.tlb.flush_all();
            self.code_stale = true;
            self.attention = true;
            self.leave_block = true;
        }
        self.shared.map_seen.store(generation, Ordering::SeqCst);
    }
}
