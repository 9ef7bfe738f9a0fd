//! Segments, events, transfers and tasks, each against the manual: what is on the stack, in the registers, in the
//! descriptors, and which fault with which error code.

use std::sync::Arc;

use guest_clock::GuestClock;
use guest_memory::{BackingOptions, GuestMemory};
use x86_defs::control::{Cr0, Cr4, Efer, Rflags};
use x86_defs::exception::{DB, DF, GP, NP, PF, SS as STACK, TS, UD};
use x86_defs::state::{CS, DS, DescriptorTable, ES, FS, GS, RCX, RSP, SS, Segment};

use crate::cpu::{Cpu, Exception, Machine, VcpuShared};

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const TSS2: u64 = 0x3800;
const TABLES: u64 = 0x8000;

const CODE0: u16 = 0x08;
const DATA0: u16 = 0x10;
const CODE3: u16 = 0x1b;
const DATA3: u16 = 0x23;
const TR: u16 = 0x28;
const CODE64: u16 = 0x38;
const CONFORMING: u16 = 0x40;
const ABSENT: u16 = 0x48;
const OTHER_TSS: u16 = 0x50;
const GATE: u16 = 0x58;
const CODE64_3: u16 = 0x6b;

/// A descriptor by its attributes (bits 40 to 55), base and limit.
fn descriptor(attributes: u64, base: u64, limit: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (attributes & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (attributes >> 12 & 0xf) << 52
        | (base >> 24 & 0xff) << 56
}

fn gate(kind: u64, dpl: u64, selector: u16, offset: u64) -> u64 {
    (offset & 0xffff)
        | u64::from(selector) << 16
        | (0x80 | dpl << 5 | kind) << 40
        | (offset >> 16 & 0xffff) << 48
}

struct Rig {
    cpu: Box<Cpu>,
    memory: GuestMemory,
}

impl Rig {
    /// 32-bit protected mode without paging at privilege level 0, with all tables.
    fn protected() -> Self {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, 0x10_0000, BackingOptions::default())
            .unwrap();
        let machine = Arc::new(Machine::new(memory.clone(), GuestClock::new()));
        let shared = Arc::new(VcpuShared::new(0));
        let cpuid = super::supported_cpuid();
        let mut rig = Self {
            cpu: Box::new(Cpu::new(machine, shared, &cpuid, super::TSC_KHZ)),
            memory,
        };
        let flat = 0xf_ffff;
        for (at, value) in [
            (CODE0, descriptor(0xc09a, 0, flat)),
            (DATA0, descriptor(0xc092, 0, flat)),
            (CODE3, descriptor(0xc0fa, 0, flat)),
            (DATA3, descriptor(0xc0f2, 0, flat)),
            (TR, descriptor(0x89, TSS, 0x67)),
            (CODE64, descriptor(0xa09a, 0, flat)),
            (CONFORMING, descriptor(0xc09e, 0, flat)),
            (ABSENT, descriptor(0xc012, 0, flat)),
            (OTHER_TSS, descriptor(0x89, TSS2, 0x67)),
            (GATE, gate(0xc, 3, CODE0, 0x4444)),
            (CODE64_3, descriptor(0xa0fa, 0, flat)),
        ] {
            rig.put(GDT + u64::from(at & !7), value);
        }
        rig.cpu.gdtr = DescriptorTable {
            base: GDT,
            limit: 0x7f,
        };
        rig.cpu.idtr = DescriptorTable {
            base: IDT,
            limit: 0x7ff,
        };
        rig.put32(TSS + 4, 0x6000);
        rig.put32(TSS + 8, u32::from(DATA0));
        rig.cpu.cr0 |= Cr0::PE;
        rig.cpu.flush_translations();
        rig.cpu.segments[CS] = segment(CODE0, 0xc09b);
        for seg in [ES, SS, DS, FS, GS] {
            rig.cpu.segments[seg] = segment(DATA0, 0xc093);
        }
        rig.cpu.tr = Segment {
            selector: TR,
            base: TSS,
            limit: 0x67,
            attributes: 0x8b,
        };
        rig.cpu.rip = 0x1234;
        rig.cpu.regs[RSP] = 0x7000;
        rig.cpu.update_mode();
        rig
    }

    /// 64-bit mode with identity paging of 2 MiB pages for everybody.
    fn long() -> Self {
        let mut rig = Self::protected();
        rig.put(TABLES, TABLES + 0x1007);
        rig.put(TABLES + 0x1000, TABLES + 0x2007);
        rig.put(TABLES + 0x2000, 0x87);
        rig.cpu.cr3 = TABLES;
        rig.cpu.cr4 = Cr4::PAE;
        rig.cpu.efer = Efer::LME | Efer::LMA | Efer::SCE;
        rig.cpu.cr0 |= Cr0::PG | Cr0::WP;
        rig.cpu.segments[CS] = segment(CODE64, 0xa09b);
        rig.cpu.switch_address_space(false);
        rig.cpu.flush_translations();
        rig.cpu.update_mode();
        rig.put(TSS + 4, 0x6008);
        rig.put(TSS + 0x24, 0x5808);
        rig
    }

    /// Goes to privilege level 3.
    fn user(mut self) -> Self {
        let long = self.cpu.long_mode();
        self.cpu.segments[CS] = if long {
            segment(CODE64_3, 0xa0fb)
        } else {
            segment(CODE3, 0xc0fb)
        };
        for seg in [ES, SS, DS, FS, GS] {
            self.cpu.segments[seg] = segment(DATA3, 0xc0f3);
        }
        self.cpu.cpl = 3;
        self.cpu.update_mode();
        self
    }

    fn put(&self, at: u64, value: u64) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    fn put32(&self, at: u64, value: u32) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn get32(&self, at: u64) -> u32 {
        self.get(at) as u32
    }

    fn idt32(&self, vector: u64, value: u64) {
        self.put(IDT + vector * 8, value);
    }

    fn idt64(&self, vector: u64, value: u64, ist: u64) {
        self.put(IDT + vector * 16, value | ist << 32);
        self.put(IDT + vector * 16 + 8, 0);
    }

    fn raise(&mut self, exception: Exception) {
        self.cpu.exception = exception;
        self.cpu.deliver_exception().unwrap();
    }

    fn load(&mut self, seg: usize, selector: u16) -> Option<Exception> {
        let done = self.cpu.load_segment(seg, selector);
        done.err().map(|_| self.cpu.exception)
    }
}

fn segment(selector: u16, attributes: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    }
}

fn fault(vector: u8, code: u32) -> Option<Exception> {
    Some(Exception::WithCode(vector, code))
}

#[test]
fn segment_loads_check_what_the_manual_lists() {
    let mut r = Rig::protected();
    assert_eq!(r.load(DS, DATA3), None);
    assert_eq!(r.get(GDT + 0x20) >> 40 & 1, 1, "accessed");
    assert_eq!(r.load(DS, 3), None, "null");
    assert!(!r.cpu.segment_allows(DS, 0, 1, crate::cpu::Access::Read));
    assert_eq!(r.load(DS, 0x88), fault(GP, 0x88), "outside the table");
    assert_eq!(r.load(DS, ABSENT), fault(NP, u32::from(ABSENT)));
    assert_eq!(r.load(DS, TR), fault(GP, u32::from(TR)), "system segment");
    assert_eq!(r.load(DS, 0x0c), fault(GP, 0x0c), "no LDT");
    assert_eq!(r.load(SS, 0), fault(GP, 0));
    assert_eq!(r.load(SS, CODE0), fault(GP, u32::from(CODE0)));
    assert_eq!(r.load(SS, DATA3), fault(GP, u32::from(DATA3 & !3)));
    assert_eq!(r.load(SS, ABSENT), fault(STACK, u32::from(ABSENT)));
    assert_eq!(r.load(SS, DATA0), None);
    let mut r = Rig::protected().user();
    assert_eq!(r.load(DS, DATA0), fault(GP, u32::from(DATA0)));
    assert_eq!(
        r.load(ES, CONFORMING | 3),
        None,
        "conforming code is readable by all"
    );
    // 64-bit mode takes a null SS below privilege level 3.
    let mut r = Rig::long();
    assert_eq!(r.load(SS, 0), None);
    assert_eq!(r.load(SS, 1), fault(GP, 0));
    assert_eq!(Rig::long().user().load(SS, 3), fault(GP, 0));
}

#[test]
fn same_level_interrupts_push_three_words_and_the_code() {
    let mut r = Rig::protected();
    r.idt32(0x30, gate(0xe, 0, CODE0, 0x4321));
    r.idt32(u64::from(GP), gate(0xf, 0, CODE0, 0x5555));
    r.cpu.set_rflags(0x202);
    r.cpu.deliver_interrupt(0x30).unwrap();
    assert_eq!((r.cpu.rip, r.cpu.regs[RSP]), (0x4321, 0x7000 - 12));
    assert_eq!(r.get32(0x6ff4), 0x1234);
    assert_eq!(r.get32(0x6ff8), u32::from(CODE0));
    assert_eq!(r.get32(0x6ffc), 0x202);
    assert!(!r.cpu.system_flag(Rflags::IF));
    // A trap gate leaves IF, and a fault's image has RF set.
    r.cpu.set_rflags(0x202);
    r.raise(Exception::WithCode(GP, 0x18));
    assert_eq!(r.cpu.rip, 0x5555);
    assert_eq!(r.get32(r.cpu.regs[RSP]), 0x18);
    assert_eq!(r.get32(r.cpu.regs[RSP] + 12), 0x1_0202);
    assert!(r.cpu.system_flag(Rflags::IF));
}

#[test]
fn interrupts_from_user_mode_switch_stacks() {
    let mut r = Rig::protected().user();
    r.idt32(0x30, gate(0xe, 0, CODE0, 0x4321));
    r.cpu.deliver_interrupt(0x30).unwrap();
    assert_eq!(
        (r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]),
        (0, 0x4321, 0x6000 - 20)
    );
    assert_eq!(r.cpu.segments[SS].selector, DATA0);
    let frame: Vec<_> = (0..5).map(|i| r.get32(0x5fec + i * 4)).collect();
    let expected = [0x1234, u32::from(CODE3), 2, 0x7000, u32::from(DATA3)];
    assert_eq!(frame, expected);
    // And back.
    super::interrupt::iret::<u32>(&mut r.cpu, &nothing()).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]), (3, 0x1234, 0x7000));
    assert_eq!(r.cpu.segments[CS].selector, CODE3);
}

/// An operation without operands.
fn nothing() -> crate::cpu::Op {
    crate::cpu::Op {
        handler: crate::cpu::last_instruction(|_, _| Ok(())),
        imm: 0,
        disp: 0,
        a: 0,
        b: 0,
        c: 0,
        base: 0,
        index: 0,
        scale: 0,
        seg: 0,
        ea_len: 5,
        next: 0,
        code: 0,
    }
}

#[test]
fn bad_gates_fault_with_the_vector_as_code() {
    let mut r = Rig::protected().user();
    let op = crate::cpu::Op {
        imm: 0x31,
        ..nothing()
    };
    r.idt32(0x31, gate(0xe, 0, CODE0, 0x4321));
    assert!(super::interrupt::int_n(&mut r.cpu, &op).is_err());
    assert_eq!(Some(r.cpu.exception), fault(GP, 0x31 * 8 + 2), "gate's DPL");
    r.idt32(0x31, gate(0xe, 3, CODE0, 0x4321) & !(1 << 47));
    assert!(super::interrupt::int_n(&mut r.cpu, &op).is_err());
    assert_eq!(Some(r.cpu.exception), fault(NP, 0x31 * 8 + 2));
    r.idt32(0x31, gate(0xc, 3, CODE0, 0x4321));
    assert!(super::interrupt::int_n(&mut r.cpu, &op).is_err());
    assert_eq!(Some(r.cpu.exception), fault(GP, 0x31 * 8 + 2));
    r.cpu.idtr.limit = 0x31 * 8 + 6;
    r.idt32(0x31, gate(0xe, 3, CODE0, 0x4321));
    assert!(super::interrupt::int_n(&mut r.cpu, &op).is_err());
    assert_eq!(Some(r.cpu.exception), fault(GP, 0x31 * 8 + 2), "limit");
    r.cpu.idtr.limit = 0x7ff;
    r.put32(TSS + 8, 0);
    assert!(super::interrupt::int_n(&mut r.cpu, &op).is_err());
    assert_eq!(Some(r.cpu.exception), fault(TS, 0), "null inner stack");
    r.put32(TSS + 8, u32::from(DATA3));
    assert!(super::interrupt::int_n(&mut r.cpu, &op).is_err());
    assert_eq!(Some(r.cpu.exception), fault(TS, u32::from(DATA3 & !3)));
    assert_eq!((r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]), (3, 0x1234, 0x7000));
}

#[test]
fn double_and_triple_faults() {
    let mut r = Rig::protected();
    r.idt32(u64::from(DF), gate(0xe, 0, CODE0, 0x8888));
    // #GP's gate is absent: #NP while delivering it, hence #DF with code 0.
    r.raise(Exception::WithCode(GP, 0x18));
    assert_eq!((r.cpu.rip, r.get32(r.cpu.regs[RSP])), (0x8888, 0));
    r.idt32(u64::from(DF), 0);
    r.cpu.exception = Exception::WithCode(GP, 0);
    assert!(r.cpu.deliver_exception().is_err());
    assert_eq!(r.cpu.exception, Exception::Shutdown);
}

#[test]
fn long_mode_frames_are_aligned_and_use_the_ist() {
    let mut r = Rig::long();
    r.idt64(0x30, gate(0xe, 0, CODE64, 0x4321), 0);
    r.idt64(u64::from(PF), gate(0xe, 0, CODE64, 0x5555), 1);
    r.cpu.regs[RSP] = 0x700c;
    r.cpu.deliver_interrupt(0x30).unwrap();
    assert_eq!(r.cpu.regs[RSP], 0x7000 - 40);
    let frame: Vec<_> = (0..5).map(|i| r.get(0x7000 - 40 + i * 8)).collect();
    let (cs, ss) = (u64::from(CODE64), u64::from(DATA0));
    assert_eq!(frame, [0x1234, cs, 2, 0x700c, ss]);
    // Through the IST, with an error code.
    r.raise(Exception::Page {
        code: 2,
        address: 0xdead,
    });
    assert_eq!((r.cpu.cr2, r.cpu.rip), (0xdead, 0x5555));
    assert_eq!(r.cpu.regs[RSP], 0x5800 - 48);
    assert_eq!(r.get(r.cpu.regs[RSP]), 2);
    // From user mode: RSP0, null SS.
    let mut r = Rig::long().user();
    r.idt64(0x30, gate(0xe, 0, CODE64, 0x4321), 0);
    r.cpu.deliver_interrupt(0x30).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.segments[SS].selector), (0, 0));
    assert_eq!(r.cpu.regs[RSP], 0x6000 - 40);
    assert_eq!(r.get(0x5ff8), u64::from(DATA3));
    super::interrupt::iret::<u64>(&mut r.cpu, &nothing()).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]), (3, 0x1234, 0x7000));
    assert_eq!(r.cpu.segments[SS].selector, DATA3);
}

#[test]
fn fast_system_calls_go_and_come_back() {
    let mut r = Rig::long().user();
    r.cpu.system.star = u64::from(CODE64) << 32 | 0x5b << 48;
    r.cpu.system.lstar = 0x9000;
    r.cpu.system.fmask = Rflags::IF.bits();
    r.cpu.set_rflags(0x246);
    super::syscall::syscall(&mut r.cpu, &nothing()).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip), (0, 0x9000));
    assert_eq!((r.cpu.regs[RCX], r.cpu.regs[11]), (0x1234, 0x246));
    assert_eq!(r.cpu.rflags(), 0x46);
    assert_eq!(r.cpu.segments[SS].selector, CODE64 + 8);
    super::syscall::sysret::<u64>(&mut r.cpu, &nothing()).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip, r.cpu.rflags()), (3, 0x1234, 0x246));
    assert_eq!(r.cpu.segments[CS].selector, 0x6b);
    assert_eq!(r.cpu.segments[SS].selector, 0x63);
    // Not canonical: #GP before anything changes.
    super::syscall::syscall(&mut r.cpu, &nothing()).unwrap();
    r.cpu.regs[RCX] = 1 << 47;
    assert!(super::syscall::sysret::<u64>(&mut r.cpu, &nothing()).is_err());
    assert_eq!(
        (r.cpu.cpl, r.cpu.exception),
        (0, Exception::WithCode(GP, 0))
    );
}

#[test]
fn amd_processors_have_system_calls_outside_64_bit_mode() {
    let mut r = Rig::long().user();
    r.cpu.system.star = u64::from(CODE64) << 32 | 0x5b << 48;
    r.cpu.system.cstar = 0x8800;
    r.cpu.set_rflags(0x246);
    r.cpu.segments[CS].attributes &= !(1 << 13);
    r.cpu.update_mode();
    assert!(super::syscall::syscall(&mut r.cpu, &nothing()).is_err());
    r.cpu.system.amd = true;
    super::syscall::syscall(&mut r.cpu, &nothing()).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip), (0, 0x8800));
    assert_eq!((r.cpu.regs[RCX], r.cpu.regs[11]), (0x1234, 0x246));
    assert!(r.cpu.mode.is_64bit());
    // SYSENTER is there in legacy mode alone.
    r.cpu.system.sysenter_cs = u64::from(CODE64);
    assert!(super::syscall::sysenter(&mut r.cpu, &nothing()).is_err());
    assert_eq!(r.cpu.exception.vector(), Some(UD));

    let mut r = Rig::protected().user();
    r.cpu.system.amd = true;
    r.cpu.efer |= Efer::SCE;
    r.cpu.system.star = 0x4444 | u64::from(CODE0) << 32 | 0x5b << 48;
    r.cpu.set_rflags(0x246);
    super::syscall::syscall(&mut r.cpu, &nothing()).unwrap();
    assert_eq!(
        (r.cpu.cpl, r.cpu.rip, r.cpu.rflags(), r.cpu.regs[RCX]),
        (0, 0x4444, 0x46, 0x1234)
    );
    super::syscall::sysret::<u32>(&mut r.cpu, &nothing()).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip, r.cpu.rflags()), (3, 0x1234, 0x246));
    assert_eq!(r.cpu.segments[CS].selector, 0x5b);
}

#[test]
fn call_gates_switch_stacks_and_copy_parameters() {
    let mut r = Rig::protected().user();
    r.put(GDT + u64::from(GATE), gate(0xc, 3, CODE0, 0x4444) | 2 << 32);
    r.put32(0x7000, 0x1111);
    r.put32(0x7004, 0x2222);
    let op = crate::cpu::Op {
        imm: u64::from(GATE | 3) << 32,
        ..nothing()
    };
    super::transfer::call_far_immediate::<u32>(&mut r.cpu, &op).unwrap();
    assert_eq!(
        (r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]),
        (0, 0x4444, 0x6000 - 24)
    );
    let frame: Vec<_> = (0..6).map(|i| r.get32(0x5fe8 + i * 4)).collect();
    let (cs, ss) = (u32::from(CODE3), u32::from(DATA3));
    assert_eq!(frame, [0x1234, cs, 0x1111, 0x2222, 0x7000, ss]);
    // RET 8 goes back and releases the parameters on both stacks; DS that is too privileged becomes null.
    r.cpu.load_segment(DS, DATA0).unwrap();
    let op = crate::cpu::Op {
        imm: 8,
        ..nothing()
    };
    super::transfer::ret_far::<u32>(&mut r.cpu, &op).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]), (3, 0x1234, 0x7008));
    assert_eq!(r.cpu.segments[DS].selector, 0);
}

#[test]
fn tasks_switch_and_return() {
    let mut r = Rig::protected();
    for (at, value) in [
        (0x20, 0x9999u32),
        (0x24, 0x202),
        (0x38, 0x6800),
        (0x48, u32::from(DATA0)),
        (0x4c, u32::from(CODE0)),
        (0x50, u32::from(DATA0)),
        (0x54, u32::from(DATA0)),
    ] {
        r.put32(TSS2 + at, value);
    }
    r.put(GDT + u64::from(TR), descriptor(0x8b, TSS, 0x67));
    r.cpu.regs[RCX] = 0x77;
    let op = crate::cpu::Op {
        imm: u64::from(OTHER_TSS) << 32,
        ..nothing()
    };
    super::transfer::call_far_immediate::<u32>(&mut r.cpu, &op).unwrap();
    assert_eq!(
        (r.cpu.rip, r.cpu.regs[RSP], r.cpu.regs[RCX]),
        (0x9999, 0x6800, 0)
    );
    assert_eq!(r.cpu.tr.selector, OTHER_TSS);
    assert!(r.cpu.system_flag(Rflags::NT) && r.cpu.cr0.contains(Cr0::TS));
    assert_eq!(r.get32(TSS2) as u16, TR, "link");
    assert_eq!(r.get32(TSS + 0x20), 0x1234);
    assert_eq!(r.get32(TSS + 0x2c), 0x77);
    assert_eq!(r.get(GDT + u64::from(OTHER_TSS)) >> 40 & 0xf, 0xb, "busy");
    super::interrupt::iret::<u32>(&mut r.cpu, &nothing()).unwrap();
    assert_eq!(
        (r.cpu.rip, r.cpu.regs[RSP], r.cpu.regs[RCX]),
        (0x1234, 0x7000, 0x77)
    );
    assert_eq!(r.cpu.tr.selector, TR);
    assert_eq!(
        r.get(GDT + u64::from(OTHER_TSS)) >> 40 & 0xf,
        9,
        "available"
    );
    assert!(!r.cpu.system_flag(Rflags::NT));
}

#[test]
fn virtual_8086_mode_is_entered_and_left() {
    let mut r = Rig::protected();
    let frame = [
        0x100u32, 0x2000, 0x2_3202, 0x80, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000,
    ];
    for (i, value) in frame.into_iter().enumerate() {
        r.put32(0x7000 + i as u64 * 4, value);
    }
    super::interrupt::iret::<u32>(&mut r.cpu, &nothing()).unwrap();
    assert_eq!((r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]), (3, 0x100, 0x80));
    assert_eq!(r.cpu.segments[CS].base, 0x2_0000);
    assert_eq!(r.cpu.segments[GS].base, 0x7_0000);
    r.idt32(u64::from(GP), gate(0xe, 0, CODE0, 0x5555));
    r.raise(Exception::WithCode(GP, 0));
    assert_eq!(
        (r.cpu.cpl, r.cpu.rip, r.cpu.regs[RSP]),
        (0, 0x5555, 0x6000 - 40)
    );
    let saved: Vec<_> = (0..10).map(|i| r.get32(0x6000 - 40 + i * 4)).collect();
    assert_eq!(
        saved,
        [
            0, 0x100, 0x2000, 0x3_3202, 0x80, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000
        ]
    );
    assert!(!r.cpu.system_flag(Rflags::VM));
    assert_eq!(r.cpu.segments[DS].selector, 0);
}

#[test]
fn ports_are_allowed_by_iopl_and_bitmap() {
    let mut r = Rig::protected().user();
    r.put32(TSS + 0x64, 0x68 << 16);
    assert!(r.cpu.check_port(0x80, 1).is_err(), "no bitmap");
    r.cpu.tr.limit = 0xfff;
    r.put32(TSS + 0x64, 0x68 << 16);
    r.memory
        .write(TSS + 0x68 + 0x10, &[0b1111_0000, 0])
        .unwrap();
    assert!(r.cpu.check_port(0x80, 4).is_ok());
    assert!(r.cpu.check_port(0x81, 4).is_err());
    assert!(r.cpu.check_port(0x88, 2).is_ok());
    r.cpu.set_rflags(0x3002);
    assert!(r.cpu.check_port(0x84, 1).is_ok());
}

#[test]
fn control_registers_refuse_bad_combinations() {
    let mut r = Rig::protected();
    let gp = Exception::WithCode(GP, 0);
    for bad in [1u64 << 31, 1 << 29, 1 << 32] {
        let value = if bad == 1 << 31 {
            bad
        } else {
            r.cpu.cr0.bits() | bad
        };
        assert!(
            r.cpu.set_cr0(value & !(Cr0::CD.bits())).is_err(),
            "{bad:#x}"
        );
        assert_eq!(r.cpu.exception, gp);
    }
    assert!(r.cpu.set_cr4(Cr4::VMXE.bits()).is_err());
    assert!(
        r.cpu.set_cr4(Cr4::PCIDE.bits()).is_err(),
        "not in long mode"
    );
    let mut r = Rig::long();
    assert!(r.cpu.set_cr4(0).is_err(), "PAE in long mode");
    assert!(r.cpu.set_cr0(0x11).is_err(), "paging off in 64-bit mode");
    assert!(r.cpu.set_cr3(1 << 46).is_err());
    r.cpu.set_cr4((Cr4::PAE | Cr4::PCIDE).bits()).unwrap();
    r.cpu.set_cr3(1 << 63 | TABLES | 5).unwrap();
    assert_eq!(r.cpu.cr3, TABLES | 5);
    assert!(
        r.cpu.write_msr(x86_defs::msr::EFER, 0).is_none(),
        "LME under paging"
    );
    assert!(r.cpu.write_msr(x86_defs::msr::LSTAR, 1 << 47).is_none());
    assert!(r.cpu.write_msr(0xdead, 0).is_none() && r.cpu.read_msr(0xdead).is_none());
}

#[test]
fn state_goes_out_and_in() {
    let mut r = Rig::long().user();
    r.cpu.vectors.ymm[3] = [7, 8];
    r.cpu.write_msr(x86_defs::msr::LSTAR, 0x1234).unwrap();
    r.cpu
        .write_msr(x86_defs::msr::PAT, 0x0606_0606_0606_0606)
        .unwrap();
    let state = r.cpu.save();
    let mut other = Rig::protected();
    other.cpu.restore(&state).unwrap();
    assert_eq!(other.cpu.save(), state);
    assert_eq!((other.cpu.cpl, other.cpu.vectors.ymm[3]), (3, [7, 8]));
    let mut bad = state.clone();
    bad.system.cr0 &= !1;
    assert!(other.cpu.restore(&bad).is_err());
    let mut bad = state.clone();
    bad.xsave.truncate(100);
    assert!(other.cpu.restore(&bad).is_err());
    other.cpu.restore(&state).unwrap();
    assert_eq!(other.cpu.save(), state);
}

#[test]
fn breakpoints_and_single_steps() {
    let mut r = Rig::protected();
    r.cpu.dr[1] = 0x1234;
    r.cpu.dr7 = 0x400 | 1 << 2;
    r.cpu.update_mode();
    assert!(r.cpu.before_step().is_err());
    assert_eq!(r.cpu.exception, Exception::Debug(2));
    r.idt32(u64::from(DB), gate(0xe, 0, CODE0, 0x4321));
    r.cpu.deliver_exception().unwrap();
    assert_eq!(r.cpu.dr6 & 0xf, 2);
    r.cpu.rip = 0x1234;
    r.cpu.set_rflags(0x1_0002);
    assert!(r.cpu.before_step().is_ok(), "RF");
    assert!(r.cpu.after_step(false).is_ok());
    assert!(!r.cpu.system_flag(Rflags::RF));
    assert!(r.cpu.after_step(true).is_err());
    assert_eq!(r.cpu.exception, Exception::Debug(1 << 14));
    // Four bytes at 0x2000, writes.
    r.cpu.dr[0] = 0x2000;
    r.cpu.dr7 = 0x400 | 1 | 0b1101 << 16;
    r.cpu.note_data_access(0x2003, 1, false);
    assert!(r.cpu.after_step(false).is_ok());
    r.cpu.note_data_access(0x1ffe, 4, true);
    assert!(r.cpu.after_step(false).is_err());
    assert_eq!(r.cpu.exception, Exception::Debug(1));
}
