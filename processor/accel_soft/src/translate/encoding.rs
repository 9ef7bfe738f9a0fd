//! The parts of an instruction's encoding, found in its bytes.

/// An instruction of legacy or VEX encoding in parts. What iced tells of operands is not repeated here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Encoding {
    /// 66h is there.
    pub(crate) p66: bool,
    /// The last of F2h and F3h, or zero.
    pub(crate) rep: u8,
    /// F0h is there.
    pub(crate) lock: bool,
    /// The REX prefix, or zero.
    pub(crate) rex: u8,
    /// VEX: W, L, pp, second source.
    pub(crate) vex: Option<Vex>,
    /// 0: one byte; 1: 0F; 2: 0F 38; 3: 0F 3A.
    pub(crate) map: u8,
    /// The opcode byte.
    pub(crate) byte: u8,
    /// The ModRM byte, where there is one.
    pub(crate) modrm: u8,
    /// Where the opcode byte is.
    pub(crate) opcode_at: usize,
    /// Where the immediate is: behind the ModRM byte and what belongs to it. Set by who knows.
    pub(crate) immediate_at: usize,
    /// There are prefixes that must not be copied: segments, address size.
    pub(crate) has_odd_prefixes: bool,
}

/// The fields of a VEX prefix that have no place elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vex {
    pub(crate) w: bool,
    pub(crate) l: bool,
    pub(crate) pp: u8,
    pub(crate) second: u8,
}

impl Encoding {
    /// Takes an instruction apart. `None` for encodings that are not handled (EVEX, XOP).
    pub(crate) fn parse(bytes: &[u8], code64: bool) -> Option<Self> {
        let mut e = Self::default();
        let mut at = 0;
        loop {
            match *bytes.get(at)? {
                0x66 => e.p66 = true,
                b @ (0xf2 | 0xf3) => e.rep = b,
                0xf0 => e.lock = true,
                0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x67 => e.has_odd_prefixes = true,
                b @ 0x40..=0x4f if code64 => {
                    // Only the last one before the opcode counts.
                    let next = *bytes.get(at + 1)?;
                    let prefix = matches!(
                        next,
                        0x66 | 0xf2
                            | 0xf3
                            | 0xf0
                            | 0x2e
                            | 0x36
                            | 0x3e
                            | 0x26
                            | 0x64
                            | 0x65
                            | 0x67
                            | 0x40..=0x4f
                    );
                    if !prefix {
                        e.rex = b;
                    }
                }
                _ => break,
            }
            at += 1;
        }
        let first = *bytes.get(at)?;
        let vex = matches!(first, 0xc4 | 0xc5) && (code64 || bytes.get(at + 1)? & 0xc0 == 0xc0);
        if vex {
            at = e.parse_vex(bytes, at)?;
        } else if first == 0x62 && code64 || first == 0x8f && bytes.get(at + 1)? & 0x38 != 0 {
            return None;
        } else if first == 0x0f {
            (e.map, at) = match *bytes.get(at + 1)? {
                0x38 => (2, at + 2),
                0x3a => (3, at + 2),
                _ => (1, at + 1),
            };
        }
        e.byte = *bytes.get(at)?;
        e.opcode_at = at;
        e.modrm = bytes.get(at + 1).copied().unwrap_or(0);
        Some(e)
    }

    fn parse_vex(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let second = *bytes.get(at + 1)?;
        let (w, last, next) = if bytes[at] == 0xc5 {
            self.map = 1;
            self.rex = (!second >> 7 & 1) << 2;
            (false, second, at + 2)
        } else {
            self.map = second & 31;
            self.rex = !second >> 5 & 7;
            let third = *bytes.get(at + 2)?;
            (third & 0x80 != 0, third, at + 3)
        };
        self.vex = Some(Vex {
            w,
            l: last & 4 != 0,
            pp: last & 3,
            second: !last >> 3 & 15,
        });
        (1..=3).contains(&self.map).then_some(next)
    }

    /// REX.W or VEX.W.
    pub(crate) fn w(&self) -> bool {
        self.vex.map_or(self.rex & 8 != 0, |v| v.w)
    }

    /// The register field, with its extension.
    pub(crate) fn reg(&self) -> u8 {
        self.modrm >> 3 & 7 | (self.rex & 4) << 1
    }

    /// The register or memory field, with its extension, where it is a register.
    pub(crate) fn rm(&self) -> u8 {
        self.modrm & 7 | (self.rex & 1) << 3
    }

    /// The register in the opcode byte, with its extension.
    pub(crate) fn opcode_register(&self) -> u8 {
        self.byte & 7 | (self.rex & 1) << 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found() {
        let add = Encoding::parse(&[0x4c, 0x01, 0xc8], true).unwrap();
        assert_eq!((add.w(), add.byte, add.reg(), add.rm()), (true, 1, 9, 0));
        let lock = Encoding::parse(&[0xf0, 0x66, 0x41, 0x0f, 0xc1, 0x19], true).unwrap();
        assert!(lock.lock && lock.p66);
        assert_eq!((lock.map, lock.byte, lock.reg()), (1, 0xc1, 3));
        // andn r9, r10, r11
        let andn = Encoding::parse(&[0xc4, 0x42, 0x28, 0xf2, 0xcb], true).unwrap();
        assert_eq!(
            (andn.map, andn.byte, andn.reg(), andn.rm()),
            (2, 0xf2, 9, 11)
        );
        assert_eq!(andn.vex.map(|v| v.second), Some(10));
        // A REX prefix before another prefix does not count.
        let lost = Encoding::parse(&[0x48, 0x66, 0x01, 0xc8], true).unwrap();
        assert!(!lost.w() && lost.p66);
    }
}
