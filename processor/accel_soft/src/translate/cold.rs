//! What goes out of line: the unusual ends of what a block does, behind its code.

use super::code::{Compiler, Kept};
use super::emit::{Label, R14, R15, RCX, cc, hot, mem};
use super::hot::{OpPlace, at};
use super::registers::STACK;
use crate::mmu::way;

/// What goes out of line.
pub(crate) enum Cold {
    /// The interpreter does the operation.
    Slow {
        from: Label,
        rejoin: Rejoin,
        op: u32,
        kept: Kept,
    },
    /// A store has hit a watched page, whose flag byte R14 points to.
    Watched {
        from: Label,
        kept: Kept,
        next: Target,
        /// Instructions of the block that are not executed then.
        rest: i32,
    },
    /// The way to a place that may not be translated yet.
    Link { from: Label, link: u32 },
    /// The address is in another page than the last time.
    OtherPage {
        from: Label,
        back: Label,
        slow: Label,
        size: u32,
        number: usize,
        write: bool,
        op: u32,
        /// R15 is to be kept.
        holds: bool,
    },
    /// The x87 unit is not in the host's.
    LoadX87 { from: Label, op: u32, back: Label },
    /// An event at a jump to a place in the page.
    Event {
        from: Label,
        target: i32,
        /// RCX is in R15.
        rcx_kept: bool,
    },
    /// There is no code for the target of a branch, which the interpreter does anew.
    Missed {
        from: Label,
        op: u32,
        /// What the branch has added to RSP.
        stack: i32,
        kept: Kept,
    },
}

/// Where the interpreter goes on behind an instruction.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rejoin {
    /// In the block.
    Back(Label),
    /// As a jump to this place in the page would: R15 held something that is no more. So many instructions of the block are
    /// not executed then.
    Next { place: i32, rest: i32 },
}

/// Where to go on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// A place relative to the page.
    Page(i32),
    /// An address that was kept.
    Saved,
}

impl Compiler<'_> {
    /// Puts what goes out of line behind the block.
    pub(crate) fn finish(&mut self) {
        let mut cold = std::mem::take(&mut self.cold).into_iter().peekable();
        while let Some(this) = cold.next() {
            match this {
                Cold::Slow {
                    from,
                    rejoin,
                    op,
                    kept,
                } => self.put_slow(from, rejoin, op, kept),
                Cold::Watched {
                    from,
                    kept,
                    next,
                    rest,
                } => self.put_watched(from, kept, next, rest),
                Cold::Link { from, link } => {
                    self.asm.bind(from);
                    self.asm.mov_u32(R15, link);
                    self.asm.jmp(self.stubs.link);
                }
                Cold::OtherPage {
                    from,
                    back,
                    slow,
                    size,
                    number,
                    write,
                    op,
                    holds,
                } => {
                    self.asm.bind(from);
                    if holds {
                        self.asm.store(hot(at::HELD), R15);
                    }
                    if number != way::SUPERVISOR_STACK {
                        self.asm.mov_u32(R15, op * size_of::<OpPlace>() as u32);
                    }
                    self.asm.call(self.stubs.find[number][usize::from(write)]);
                    if holds {
                        self.asm.load(R15, hot(at::HELD));
                    }
                    self.asm.alu_i(7, R14, 4096 - size as i32);
                    self.asm.jcc(cc::BE, back);
                    let follows =
                        |next: &Cold| matches!(next, Cold::Slow { from, .. } if *from == slow);
                    if !cold.peek().is_some_and(follows) {
                        self.asm.jmp_label(slow);
                    }
                }
                Cold::LoadX87 { from, op, back } => self.put_load_x87(from, op, back),
                Cold::Event {
                    from,
                    target,
                    rcx_kept,
                } => self.put_event(from, target, rcx_kept),
                Cold::Missed {
                    from,
                    op,
                    stack,
                    kept,
                } => self.put_missed(from, op, stack, kept),
            }
        }
    }

    fn put_slow(&mut self, from: Label, rejoin: Rejoin, op: u32, kept: Kept) {
        self.asm.bind(from);
        self.restore_flags(kept);
        self.asm.mov_u32(R15, op);
        self.asm.call(self.stubs.run_op);
        let (place, rest) = match rejoin {
            Rejoin::Back(label) => {
                self.asm.jmp_label(label);
                return;
            }
            Rejoin::Next { place, rest } => (place, rest),
        };
        self.count_instructions(-rest);
        if self.is_linkable(place) {
            let from = self.asm.label();
            let at = self.asm.jmp_label(from);
            self.asm.bind(from);
            let link = self.add_link(at, place);
            self.asm.mov_u32(R15, link);
            self.asm.jmp(self.stubs.link);
        } else {
            self.address_in_page(place);
            self.asm.store(hot(at::RIP), R14);
            self.asm.jmp(self.stubs.exit);
        }
    }

    fn put_watched(&mut self, from: Label, kept: Kept, next: Target, rest: i32) {
        self.asm.bind(from);
        self.asm.mov(R15, R14);
        if rest != 0 {
            self.count_instructions(-rest);
        }
        self.restore_flags(kept);
        match next {
            Target::Page(place) => self.address_in_page(place),
            Target::Saved => self.asm.load(R14, hot(at::SAVED_ENTRY)),
        }
        self.asm.store(hot(at::RIP), R14);
        self.asm.jmp(self.stubs.wrote);
    }

    fn put_load_x87(&mut self, from: Label, op: u32, back: Label) {
        self.asm.bind(from);
        self.asm.mov(RCX, R14);
        self.asm.mov_u32(R15, op);
        self.asm.call(self.stubs.load_x87);
        self.asm.mov(R14, RCX);
        self.asm.jmp_label(back);
    }

    fn put_event(&mut self, from: Label, target: i32, rcx_kept: bool) {
        self.asm.bind(from);
        if rcx_kept {
            self.asm.mov(RCX, R15);
        }
        self.address_in_page(target);
        self.asm.store(hot(at::RIP), R14);
        self.asm.jmp(self.stubs.exit);
    }

    fn put_missed(&mut self, from: Label, op: u32, stack: i32, kept: Kept) {
        self.asm.bind(from);
        self.restore_flags(kept);
        if stack != 0 {
            self.asm.ins(self.wide(0x8d), STACK, mem(STACK, -stack));
        }
        self.asm.mov_u32(R15, op);
        self.asm.jmp(self.stubs.run_last);
    }
}
