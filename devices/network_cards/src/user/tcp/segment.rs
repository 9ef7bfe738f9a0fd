//! TCP headers (RFC 9293, section 3.1).

use std::net::SocketAddr;

use bitflags::bitflags;

use crate::user::checksum::Sum;
use crate::user::wire::{be16, be32, protocol};

/// The bytes of a header without options.
pub(crate) const TCP_LEN: usize = 20;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 3;
/// RFC 7323, section 2.3.
const LARGEST_SCALE: u8 = 14;

bitflags! {
    /// Control bits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) struct Flags: u8 {
        const FIN = 1;
        const SYN = 1 << 1;
        const RST = 1 << 2;
        const PSH = 1 << 3;
        const ACK = 1 << 4;
        const URG = 1 << 5;
        const ECE = 1 << 6;
        const CWR = 1 << 7;
    }
}

/// A header, and the length of what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Segment {
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: Flags,
    /// As in the header, not scaled.
    pub(crate) window: u16,
    /// Of a SYN.
    pub(crate) mss: Option<u16>,
    /// Of a SYN.
    pub(crate) window_scale: Option<u8>,
    /// With options, in bytes.
    pub(crate) header_len: usize,
    /// In bytes.
    pub(crate) payload_len: usize,
}

impl Segment {
    /// Reads the header at the start of `head`, of a segment of `len` bytes in all.
    pub(crate) fn parse(head: &[u8], len: usize) -> Option<Self> {
        let word = be16(head, 12)?;
        let header_len = usize::from(word >> 12) * 4;
        if header_len < TCP_LEN || header_len > len {
            return None;
        }
        let mut segment = Self {
            src_port: be16(head, 0)?,
            dst_port: be16(head, 2)?,
            seq: be32(head, 4)?,
            ack: be32(head, 8)?,
            flags: Flags::from_bits_truncate(word as u8),
            window: be16(head, 14)?,
            mss: None,
            window_scale: None,
            header_len,
            payload_len: len - header_len,
        };
        if segment.flags.contains(Flags::SYN) {
            segment.parse_options(head.get(TCP_LEN..header_len)?);
        }
        Some(segment)
    }

    fn parse_options(&mut self, mut options: &[u8]) {
        while let Some((&kind, rest)) = options.split_first() {
            match kind {
                OPTION_END => return,
                OPTION_NOP => options = rest,
                _ => {
                    let Some(&len) = rest.first() else { return };
                    let Some(body) = options.get(2..usize::from(len)) else {
                        return;
                    };
                    match (kind, body) {
                        (OPTION_MSS, [a, b]) => self.mss = Some(u16::from_be_bytes([*a, *b])),
                        (OPTION_WINDOW_SCALE, [n]) => {
                            self.window_scale = Some(*n.min(&LARGEST_SCALE))
                        }
                        _ => {}
                    }
                    options = &options[usize::from(len)..];
                }
            }
        }
    }

    /// The sequence numbers that it takes: one for each byte, one for SYN, one for FIN.
    pub(crate) fn sequence_len(&self) -> u32 {
        let flag = |f| u32::from(self.flags.contains(f));
        // Shorter than 64 KiB, being part of an IP packet.
        (self.payload_len as u32)
            .wrapping_add(flag(Flags::SYN))
            .wrapping_add(flag(Flags::FIN))
    }

    /// The bytes of the header that [`write`](Self::write) makes.
    pub(crate) fn written_len(&self) -> usize {
        TCP_LEN + self.mss.map_or(0, |_| 4) + self.window_scale.map_or(0, |_| 4)
    }

    /// Writes the header, with the sum of the pseudo header in the checksum field.
    pub(crate) fn write(&self, out: &mut Vec<u8>, src: SocketAddr, dst: SocketAddr) {
        let len = self.written_len();
        out.extend_from_slice(&src.port().to_be_bytes());
        out.extend_from_slice(&dst.port().to_be_bytes());
        out.extend_from_slice(&self.seq.to_be_bytes());
        out.extend_from_slice(&self.ack.to_be_bytes());
        out.extend_from_slice(&[(len as u8 / 4) << 4, self.flags.bits()]);
        out.extend_from_slice(&self.window.to_be_bytes());
        let total = len + self.payload_len;
        out.extend_from_slice(&Sum::pseudo(src.ip(), dst.ip(), protocol::TCP, total).partial());
        out.extend_from_slice(&[0, 0]);
        if let Some(mss) = self.mss {
            out.extend_from_slice(&[OPTION_MSS, 4]);
            out.extend_from_slice(&mss.to_be_bytes());
        }
        if let Some(scale) = self.window_scale {
            out.extend_from_slice(&[OPTION_NOP, OPTION_WINDOW_SCALE, 3, scale]);
        }
    }
}

/// Sequence numbers are compared modulo 2^32 (RFC 9293, section 3.4).
pub(crate) fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), more in 0usize..2000) {
            let _ = Segment::parse(&bytes, bytes.len() + more);
        }

        #[test]
        fn what_is_written_is_read(
            seq: u32, ack: u32, flags: u8, window: u16, mss: Option<u16>,
            scale in prop::option::of(0u8..15), payload_len in 0usize..60_000,
        ) {
            let flags = Flags::from_bits_truncate(flags);
            let syn = flags.contains(Flags::SYN);
            let segment = Segment {
                src_port: 80, dst_port: 1024, seq, ack, flags, window, payload_len,
                mss: mss.filter(|_| syn), window_scale: scale.filter(|_| syn), header_len: 0,
            };
            let mut bytes = Vec::new();
            segment.write(&mut bytes, "10.0.2.2:80".parse().unwrap(), "10.0.2.15:1024".parse().unwrap());
            prop_assert_eq!(bytes.len(), segment.written_len());
            let read = Segment::parse(&bytes, bytes.len() + payload_len).unwrap();
            prop_assert_eq!(read, Segment { header_len: bytes.len(), ..segment });
        }
    }

    #[test]
    fn sequence_numbers_wrap() {
        assert!(before(u32::MAX, 0) && !before(0, u32::MAX) && !before(5, 5));
    }
}
