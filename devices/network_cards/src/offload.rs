//! Work that one side of a link leaves to the other: checksums and segmentation.
//!
//! A frame handed over at this seam can be up to 64 KiB long and may carry an unfinished checksum. An
//! [`OffloadHeader`] says what is left to do. Its content, and its byte form, are those of `struct virtio_net_hdr`
//! (Virtual I/O Device 1.2, section 5.1.6), which Linux's tap devices use as well.

use bitflags::bitflags;

/// The longest frame that passes at this seam: an Ethernet header with one VLAN tag and the largest IP packet, in bytes.
pub const MAX_FRAME: usize = 14 + 4 + 65_535;

/// The longest frame without segmentation offload for the usual MTU of 1500: Ethernet header, one VLAN tag, payload.
pub const MAX_PLAIN_FRAME: usize = 14 + 4 + 1500;

/// The bytes of an encoded [`OffloadHeader`]; virtio's own header puts `num_buffers` (two bytes) behind it.
pub const HEADER_LEN: usize = 10;

const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

bitflags! {
    /// What a receiver of frames can take.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
    pub struct Offloads: u32 {
        /// Frames whose checksum is unfinished ([`OffloadHeader::needs_csum`]). The others need this one.
        const CSUM = 1;
        /// TCP over IPv4 in segments larger than the MTU.
        const TSO4 = 1 << 1;
        /// TCP over IPv6 in segments larger than the MTU.
        const TSO6 = 1 << 2;
        /// Large TCP segments with CWR set.
        const ECN = 1 << 3;
        /// UDP datagrams that are to become IP fragments.
        const UFO = 1 << 4;
        /// Several UDP datagrams of the same size in one frame, over IPv4.
        const USO4 = 1 << 5;
        /// Several UDP datagrams of the same size in one frame, over IPv6.
        const USO6 = 1 << 6;
    }
}

impl Offloads {
    /// The set without members that need one that is missing: everything needs `CSUM`; `ECN` needs a TSO.
    pub fn consistent(self) -> Self {
        if !self.contains(Self::CSUM) {
            return Self::empty();
        }
        if self.intersects(Self::TSO4 | Self::TSO6) {
            self
        } else {
            self - Self::ECN
        }
    }

    /// True if frames longer than the MTU may come.
    pub fn any_segmentation(self) -> bool {
        self.intersects(Self::TSO4 | Self::TSO6 | Self::UFO | Self::USO4 | Self::USO6)
    }

    /// The longest frame that a receiver of this set must have room for, in bytes.
    pub fn max_frame(self) -> usize {
        if self.any_segmentation() {
            MAX_FRAME
        } else {
            MAX_PLAIN_FRAME
        }
    }
}

/// An unfinished checksum: the receiver sums the bytes from `start` to the end of the frame and stores the complement at
/// `start + offset`, where the sender has left the sum of the pseudo header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// First byte that is summed, counted from the start of the frame.
    pub start: u16,
    /// Where the 16-bit sum goes, counted from `start`.
    pub offset: u16,
}

/// How a large frame is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GsoKind {
    /// It is a single packet.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// One UDP datagram, to be fragmented by IP.
    Udp,
    /// Several UDP datagrams.
    UdpL4,
}

/// What is left to do for one frame. The default says: nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OffloadHeader {
    /// The unfinished checksum.
    pub needs_csum: Option<Checksum>,
    /// The checksums in the frame have been verified already.
    pub data_valid: bool,
    /// How to cut the frame.
    pub gso: GsoKind,
    /// The frame has CWR set, which must appear in the first segment only.
    pub ecn: bool,
    /// A hint: the length of all headers, in bytes. Not to be trusted.
    pub hdr_len: u16,
    /// Payload bytes of each segment; 0 without segmentation.
    pub gso_size: u16,
}

/// An [`OffloadHeader`] that no specification describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// `gso_type` has an unknown value.
    #[error("unknown segmentation type {0:#x} in a frame's offload header")]
    Gso(u8),
    /// A segmentation type with a segment size of zero.
    #[error("segment size 0 in a frame's offload header that asks for segmentation")]
    ZeroSegment,
}

impl OffloadHeader {
    /// Reads the little-endian form (virtio 1.x, and a tap on a little-endian host).
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, BadHeader> {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = *bytes;
        let gso = match gso_type & !GSO_ECN {
            GSO_NONE => GsoKind::None,
            GSO_TCPV4 => GsoKind::Tcp4,
            GSO_TCPV6 => GsoKind::Tcp6,
            GSO_UDP => GsoKind::Udp,
            GSO_UDP_L4 => GsoKind::UdpL4,
            _ => return Err(BadHeader::Gso(gso_type)),
        };
        let gso_size = u16::from_le_bytes([g0, g1]);
        if gso != GsoKind::None && gso_size == 0 {
            return Err(BadHeader::ZeroSegment);
        }
        let needs_csum = (flags & FLAG_NEEDS_CSUM != 0).then_some(Checksum {
            start: u16::from_le_bytes([s0, s1]),
            offset: u16::from_le_bytes([o0, o1]),
        });
        Ok(Self {
            needs_csum,
            data_valid: flags & FLAG_DATA_VALID != 0,
            gso,
            ecn: gso_type & GSO_ECN != 0,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: if gso == GsoKind::None { 0 } else { gso_size },
        })
    }

    /// The little-endian form, see [`decode`](Self::decode).
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let (csum_flag, start, offset) = match self.needs_csum {
            Some(c) => (FLAG_NEEDS_CSUM, c.start, c.offset),
            None => (0, 0, 0),
        };
        let gso_type = match self.gso {
            GsoKind::None => GSO_NONE,
            GsoKind::Tcp4 => GSO_TCPV4,
            GsoKind::Tcp6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP,
            GsoKind::UdpL4 => GSO_UDP_L4,
        } | if self.ecn { GSO_ECN } else { 0 };
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        let valid_flag = if self.data_valid { FLAG_DATA_VALID } else { 0 };
        [
            csum_flag | valid_flag,
            gso_type,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_decodes_encodes_to_something_equal(bytes: [u8; HEADER_LEN]) {
            if let Ok(header) = OffloadHeader::decode(&bytes) {
                prop_assert_eq!(OffloadHeader::decode(&header.encode()), Ok(header));
            }
        }
    }

    #[test]
    fn the_layout_is_that_of_virtio_net_hdr() {
        let header = OffloadHeader {
            needs_csum: Some(Checksum {
                start: 34,
                offset: 16,
            }),
            data_valid: false,
            gso: GsoKind::Tcp4,
            ecn: true,
            hdr_len: 54,
            gso_size: 1460,
        };
        assert_eq!(header.encode(), [1, 0x81, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    }

    #[test]
    fn headers_that_make_no_sense_are_refused() {
        assert_eq!(
            OffloadHeader::decode(&[0, 2, 0, 0, 9, 9, 0, 0, 0, 0]),
            Err(BadHeader::Gso(2))
        );
        assert_eq!(
            OffloadHeader::decode(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            Err(BadHeader::ZeroSegment)
        );
    }

    #[test]
    fn offloads_without_checksum_are_none() {
        assert_eq!(
            (Offloads::TSO4 | Offloads::ECN).consistent(),
            Offloads::empty()
        );
        assert_eq!(
            (Offloads::CSUM | Offloads::ECN).consistent(),
            Offloads::CSUM
        );
    }
}
