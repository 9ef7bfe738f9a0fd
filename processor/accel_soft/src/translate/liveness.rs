//! Which status flags matter behind a block: a look at the instructions that follow in the same page.
//!
//! A write to the page makes the block stale as well, so that what was seen holds as long as the block.

use std::cell::RefCell;

use iced_x86::{Decoder, FlowControl, Instruction};

use super::{flags, shape};
use crate::block::decoder_options;
use crate::cpu::Mode;

/// Instructions that are looked at.
const FAR_ENOUGH: usize = 8;
/// Bytes that are looked at.
const BYTES: usize = 64;

/// The rest of a block's page.
pub(crate) struct Successors<'a> {
    /// The page.
    page: &'a [u8; 4096],
    mode: Mode,
    known: RefCell<Vec<(i32, u32)>>,
}

impl<'a> Successors<'a> {
    /// The page that code of `mode` lies in.
    pub(crate) fn new(page: &'a [u8; 4096], mode: Mode) -> Self {
        Self {
            page,
            mode,
            known: RefCell::new(Vec::new()),
        }
    }

    /// Flags that matter at a place relative to the page.
    pub(crate) fn live_at(&self, place: i32) -> u32 {
        let known = self.known.borrow();
        if let Some((_, live)) = known.iter().find(|(at, _)| *at == place) {
            return *live;
        }
        drop(known);
        let live = usize::try_from(place).map_or(flags::ALL, |at| self.look(at));
        self.known.borrow_mut().push((place, live));
        live
    }

    /// True when an instruction at a place in the page goes on in the next: what it is depends on where that lies.
    pub(crate) fn is_across(&self, place: i32) -> bool {
        let Some(bytes) = usize::try_from(place)
            .ok()
            .and_then(|at| self.page.get(at..))
        else {
            return false;
        };
        if bytes.len() >= 15 {
            return false;
        }
        let options = decoder_options(self.mode);
        let mut decoder = Decoder::new(self.mode.bitness(), bytes, options);
        let _ = decoder.decode();
        decoder.last_error() == iced_x86::DecoderError::NoMoreBytes
    }

    fn look(&self, mut at: usize) -> u32 {
        let (mut live, mut unknown) = (0, flags::ALL);
        let mut i = Instruction::default();
        for _ in 0..FAR_ENOUGH {
            let Some(bytes) = self.page.get(at..) else {
                break;
            };
            let bytes = &bytes[..bytes.len().min(BYTES)];
            let options = decoder_options(self.mode);
            let mut decoder = Decoder::with_ip(self.mode.bitness(), bytes, at as u64, options);
            if !decoder.can_decode() {
                break;
            }
            decoder.decode_out(&mut i);
            if i.is_invalid() || !shape::is_known(&i, self.mode) {
                break;
            }
            let effect = flags::effect(&i);
            live |= effect.reads & unknown;
            unknown &= !effect.writes;
            if unknown == 0 {
                return live;
            }
            match i.flow_control() {
                FlowControl::Next => at += i.len(),
                FlowControl::UnconditionalBranch if i.is_jmp_short_or_near() => {
                    at = i.near_branch_target() as usize;
                }
                _ => break,
            }
        }
        live | unknown
    }
}
