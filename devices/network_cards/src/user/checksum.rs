//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A ones' complement sum in progress, over bytes that may come in pieces of any length.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum {
    /// Native-endian 16-bit words; the sum is byte-order independent until it is finished.
    words: u64,
    /// The next byte is the second one of its word.
    odd: bool,
}

impl Sum {
    /// The sum over the pseudo header of TCP, UDP (RFC 9293, section 3.1) and ICMPv6 (RFC 8200, section 8.1).
    pub(crate) fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Self {
        let mut sum = Self::default();
        for addr in [src, dst] {
            match addr {
                IpAddr::V4(a) => sum.add(&a.octets()),
                IpAddr::V6(a) => sum.add(&a.octets()),
            }
        }
        // No packet is longer than 65,535 bytes.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        sum.add(&len.to_be_bytes());
        sum.add(&[0, protocol]);
        sum
    }

    /// Adds bytes.
    pub(crate) fn add(&mut self, mut bytes: &[u8]) {
        if self.odd
            && let Some((&first, rest)) = bytes.split_first()
        {
            self.words += u64::from(u16::from_ne_bytes([0, first]));
            self.odd = false;
            bytes = rest;
        }
        let (fours, rest) = bytes.as_chunks::<4>();
        // A 64 KiB packet adds less than 2^46.
        self.words += fours
            .iter()
            .map(|c| u64::from(u32::from_ne_bytes(*c)))
            .sum::<u64>();
        let (twos, rest) = rest.as_chunks::<2>();
        self.words += twos
            .iter()
            .map(|c| u64::from(u16::from_ne_bytes(*c)))
            .sum::<u64>();
        if let [last] = rest {
            self.words += u64::from(u16::from_ne_bytes([*last, 0]));
            self.odd = true;
        }
    }

    /// The sum folded to 16 bits, not complemented, in network byte order: what a sender leaves in the checksum field for the
    /// side that finishes it.
    pub(crate) fn partial(self) -> [u8; 2] {
        let mut words = self.words;
        while words >> 16 != 0 {
            words = (words & 0xffff) + (words >> 16);
        }
        (words as u16).to_ne_bytes()
    }

    /// The checksum, in network byte order.
    pub(crate) fn finish(self) -> [u8; 2] {
        (!u16::from_ne_bytes(self.partial())).to_ne_bytes()
    }

    /// True if the sum went over data that includes its right checksum.
    pub(crate) fn is_valid(self) -> bool {
        self.finish() == [0, 0]
    }
}

/// The checksum of one slice.
pub(crate) fn of(bytes: &[u8]) -> [u8; 2] {
    let mut sum = Sum::default();
    sum.add(bytes);
    sum.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071's definition, word by word.
    fn reference(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    }

    proptest! {
        #[test]
        fn pieces_give_the_checksum_of_the_whole(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            cuts in prop::collection::vec(0usize..300, 0..6),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.sort_unstable();
            let mut sum = Sum::default();
            let mut from = 0;
            for cut in cuts {
                sum.add(&bytes[from..cut]);
                from = cut;
            }
            sum.add(&bytes[from..]);
            prop_assert_eq!(sum.finish(), reference(&bytes));
            prop_assert_eq!(of(&bytes), reference(&bytes));
        }
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        let mut sum = Sum::default();
        sum.add(&bytes);
        assert_eq!(sum.partial(), [0xdd, 0xf2]);
    }
}
