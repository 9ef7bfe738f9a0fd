//! A raw emitter of x86-64 code.

/// A host register by its number.
pub(crate) type Reg = u8;
pub(crate) const RAX: Reg = 0;
pub(crate) const RCX: Reg = 1;
pub(crate) const RDX: Reg = 2;
pub(crate) const RBX: Reg = 3;
pub(crate) const RSP: Reg = 4;
pub(crate) const RBP: Reg = 5;
pub(crate) const RSI: Reg = 6;
pub(crate) const RDI: Reg = 7;
pub(crate) const R13: Reg = 13;
pub(crate) const R14: Reg = 14;
pub(crate) const R15: Reg = 15;

/// The second operand of an encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rm {
    /// A register.
    Reg(Reg),
    /// Memory: base, index with the logarithm of its scale, displacement.
    Mem(Option<Reg>, Option<(Reg, u8)>, i32),
}

/// Memory at a base and a displacement.
pub(crate) const fn mem(base: Reg, disp: i32) -> Rm {
    Rm::Mem(Some(base), None, disp)
}

/// A field of the structure that the stack pointer is at.
pub(crate) const fn hot(disp: i32) -> Rm {
    mem(RSP, disp)
}

/// An opcode with its mandatory prefix and operand size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Opcode {
    /// 66h as a prefix, of whatever meaning.
    pub(crate) p66: bool,
    /// F2h, F3h or zero.
    pub(crate) rep: u8,
    /// F0h.
    pub(crate) lock: bool,
    /// REX.W.
    pub(crate) w: bool,
    /// A REX prefix is needed to name a byte register.
    pub(crate) rex: bool,
    /// 0: one byte; 1: 0F; 2: 0F 38; 3: 0F 3A.
    pub(crate) map: u8,
    /// The opcode byte.
    pub(crate) byte: u8,
}

/// A one-byte opcode of 32-bit operands.
pub(crate) const fn op(byte: u8) -> Opcode {
    Opcode {
        p66: false,
        rep: 0,
        lock: false,
        w: false,
        rex: false,
        map: 0,
        byte,
    }
}

/// A one-byte opcode of 64-bit operands.
pub(crate) const fn op64(byte: u8) -> Opcode {
    Opcode {
        w: true,
        ..op(byte)
    }
}

/// A place that jumps go to, known or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// Code under construction for a fixed address.
pub(crate) struct Asm {
    pub(crate) bytes: Vec<u8>,
    /// The address that the first byte will have.
    base: u64,
    labels: Vec<Option<usize>>,
    fixups: Vec<(usize, Label)>,
}

impl Asm {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(4096),
            base: 0,
            labels: Vec::new(),
            fixups: Vec::new(),
        }
    }

    /// Starts anew for an address.
    pub(crate) fn start(&mut self, base: u64) {
        self.bytes.clear();
        self.labels.clear();
        self.fixups.clear();
        self.base = base;
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The address of the next byte.
    pub(crate) fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    pub(crate) fn u8(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub(crate) fn i32(&mut self, value: i32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A label to bind later.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// The label is here.
    pub(crate) fn bind(&mut self, label: Label) {
        self.labels[label.0] = Some(self.bytes.len());
    }

    /// Fills in the distances of jumps to labels.
    pub(crate) fn finish(&mut self) {
        for (at, label) in std::mem::take(&mut self.fixups) {
            let target = self.labels[label.0].expect("every label is bound");
            let distance = target as i64 - (at as i64 + 4);
            self.bytes[at..at + 4].copy_from_slice(&(distance as i32).to_le_bytes());
        }
    }

    fn rex(&mut self, o: Opcode, reg: Reg, rm: Rm) {
        let (b, x) = match rm {
            Rm::Reg(r) => (r, 0),
            Rm::Mem(base, index, _) => (base.unwrap_or(0), index.map_or(0, |i| i.0)),
        };
        let rex = u8::from(o.w) << 3 | reg >> 3 << 2 | x >> 3 << 1 | b >> 3;
        if rex != 0 || o.rex {
            self.u8(0x40 | rex);
        }
    }

    fn modrm(&mut self, reg: Reg, rm: Rm) {
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => self.u8(0xc0 | reg | r & 7),
            Rm::Mem(None, None, disp) => {
                self.u8(reg | 4);
                self.u8(0x25);
                self.i32(disp);
            }
            Rm::Mem(None, Some((index, scale)), disp) => {
                self.u8(reg | 4);
                self.u8(scale << 6 | (index & 7) << 3 | 5);
                self.i32(disp);
            }
            Rm::Mem(Some(base), index, disp) => {
                let short = i8::try_from(disp).is_ok();
                let mode = match disp {
                    0 if base & 7 != 5 => 0,
                    _ if short => 0x40,
                    _ => 0x80,
                };
                if index.is_some() || base & 7 == 4 {
                    let (index, scale) = index.map_or((4, 0), |(i, s)| (i & 7, s));
                    self.u8(mode | reg | 4);
                    self.u8(scale << 6 | index << 3 | base & 7);
                } else {
                    self.u8(mode | reg | base & 7);
                }
                match mode {
                    0 => {}
                    0x40 => self.u8(disp as u8),
                    _ => self.i32(disp),
                }
            }
        }
    }

    /// An instruction with a register field and another operand; immediates follow by the caller.
    pub(crate) fn ins(&mut self, o: Opcode, reg: Reg, rm: Rm) {
        if o.lock {
            self.u8(0xf0);
        }
        if o.p66 {
            self.u8(0x66);
        }
        if o.rep != 0 {
            self.u8(o.rep);
        }
        self.rex(o, reg, rm);
        match o.map {
            0 => {}
            1 => self.u8(0x0f),
            2 => self.bytes.extend_from_slice(&[0x0f, 0x38]),
            _ => self.bytes.extend_from_slice(&[0x0f, 0x3a]),
        }
        self.u8(o.byte);
        self.modrm(reg, rm);
    }

    /// A VEX instruction: `pp` (0, 66h, F3h, F2h by number), map, W, L, the second source.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn vex(
        &mut self,
        pp: u8,
        map: u8,
        w: bool,
        l: bool,
        byte: u8,
        reg: Reg,
        second: Reg,
        rm: Rm,
    ) {
        let (b, x) = match rm {
            Rm::Reg(r) => (r >> 3, 0),
            Rm::Mem(base, index, _) => (base.unwrap_or(0) >> 3, index.map_or(0, |i| i.0) >> 3),
        };
        let last = (!second & 15) << 3 | u8::from(l) << 2 | pp;
        if b == 0 && x == 0 && map == 1 && !w {
            self.u8(0xc5);
            self.u8((!reg >> 3 & 1) << 7 | last);
        } else {
            self.u8(0xc4);
            self.u8((!reg >> 3 & 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | map);
            self.u8(u8::from(w) << 7 | last);
        }
        self.u8(byte);
        self.modrm(reg, rm);
    }

    /// `mov reg, [..]` of 64 bits.
    pub(crate) fn load(&mut self, reg: Reg, from: Rm) {
        self.ins(op64(0x8b), reg, from);
    }

    /// `mov [..], reg` of 64 bits.
    pub(crate) fn store(&mut self, to: Rm, reg: Reg) {
        self.ins(op64(0x89), reg, to);
    }

    /// `mov to, from` of 64 bits.
    pub(crate) fn mov(&mut self, to: Reg, from: Reg) {
        self.ins(op64(0x8b), to, Rm::Reg(from));
    }

    /// `lea reg, [..]` of 64 bits.
    pub(crate) fn lea(&mut self, reg: Reg, from: Rm) {
        self.ins(op64(0x8d), reg, from);
    }

    /// One of the eight two-operand operations (/n of 81h) of 64 bits with an immediate.
    pub(crate) fn alu_i(&mut self, n: u8, reg: Reg, imm: i32) {
        if i8::try_from(imm).is_ok() {
            self.ins(op64(0x83), n, Rm::Reg(reg));
            self.u8(imm as u8);
        } else {
            self.ins(op64(0x81), n, Rm::Reg(reg));
            self.i32(imm);
        }
    }

    /// `mov reg32, imm`.
    pub(crate) fn mov_u32(&mut self, reg: Reg, imm: u32) {
        if reg >= 8 {
            self.u8(0x41);
        }
        self.u8(0xb8 | reg & 7);
        self.i32(imm as i32);
    }

    /// `mov reg64, imm`.
    pub(crate) fn mov_u64(&mut self, reg: Reg, imm: u64) {
        self.u8(0x48 | reg >> 3);
        self.u8(0xb8 | reg & 7);
        self.u64(imm);
    }

    fn distance(&self, target: u64) -> i32 {
        // All code lies in one cache of less than 2 GiB.
        target.wrapping_sub(self.here() + 4) as i64 as i32
    }

    /// `jmp` to an address.
    pub(crate) fn jmp(&mut self, target: u64) {
        self.u8(0xe9);
        let distance = self.distance(target);
        self.i32(distance);
    }

    /// `call` to an address.
    pub(crate) fn call(&mut self, target: u64) {
        self.u8(0xe8);
        let distance = self.distance(target);
        self.i32(distance);
    }

    /// `jmp` to a label. Gives the place of the distance.
    pub(crate) fn jmp_label(&mut self, label: Label) -> usize {
        self.u8(0xe9);
        self.fixups.push((self.bytes.len(), label));
        self.i32(0);
        self.bytes.len() - 4
    }

    /// A conditional jump to a label. Gives the place of the distance.
    pub(crate) fn jcc(&mut self, condition: u8, label: Label) -> usize {
        self.u8(0x0f);
        self.u8(0x80 | condition);
        self.fixups.push((self.bytes.len(), label));
        self.i32(0);
        self.bytes.len() - 4
    }
}

/// Conditions of jumps.
pub(crate) mod cc {
    pub(crate) const AE: u8 = 3;
    pub(crate) const E: u8 = 4;
    pub(crate) const NE: u8 = 5;
    pub(crate) const BE: u8 = 6;
    pub(crate) const A: u8 = 7;
}
