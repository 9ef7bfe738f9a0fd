//! The arithmetic of clusters and the meaning of table entries, without I/O.
//!
//! Source: the qcow2 specification, sections "Host cluster management" and "Cluster mapping".

use block::{BlockError, Result};

use super::header::Header;

/// Entry flag: the refcount is exactly one, so writes may go in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// L2 entry flag: a compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// L2 entry flag without subclusters: reads as zeroes.
pub(crate) const ZERO: u64 = 1;
/// The offset in L1, L2 and refcount table entries.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The subclusters of a cluster with extended L2 entries.
pub(crate) const SUBCLUSTERS: u32 = 32;

/// The constants of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) cluster_bits: u32,
    pub(crate) subclusters: bool,
    pub(crate) zero_flag: bool,
    /// The entries of an L2 table, as a power of two.
    pub(crate) l2_bits: u32,
    pub(crate) refcount_order: u32,
}

/// An L2 entry: the entry itself and, with subclusters, the bitmap (else 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct L2Entry {
    pub(crate) word: u64,
    pub(crate) bitmap: u64,
}

/// What an L2 entry says about a whole cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Nothing is allocated. `zero` has a bit for each subcluster that reads as zeroes.
    Plain { zero: u32 },
    /// A host cluster: subclusters in `data` are stored there, those in `zero` read as zeroes.
    Host {
        offset: u64,
        copied: bool,
        data: u32,
        zero: u32,
    },
    /// Compressed data of at most `length` bytes.
    Compressed { offset: u64, length: u64 },
}

/// What one subcluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Unallocated,
    /// Reads as zeroes; with the place that is reserved, if any.
    Zero(Option<u64>),
    Data(u64),
    Compressed,
}

impl Geometry {
    pub(crate) fn of(header: &Header) -> Self {
        let subclusters = header.has_subclusters();
        Self {
            cluster_bits: header.cluster_bits,
            subclusters,
            zero_flag: header.version >= 3,
            l2_bits: header.cluster_bits - if subclusters { 4 } else { 3 },
            refcount_order: header.refcount_order,
        }
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The offset inside its cluster.
    pub(crate) fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    pub(crate) fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// How many clusters `bytes` fill, the last one perhaps in part.
    pub(crate) fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    pub(crate) fn subcluster_size(&self) -> u64 {
        if self.subclusters {
            self.cluster_size() / u64::from(SUBCLUSTERS)
        } else {
            self.cluster_size()
        }
    }

    /// All subclusters of a cluster.
    pub(crate) fn all_parts(&self) -> u32 {
        if self.subclusters { u32::MAX } else { 1 }
    }

    /// The subclusters that `[start, end)` of a cluster touches.
    pub(crate) fn parts(&self, start: u64, end: u64) -> u32 {
        if start >= end {
            return 0;
        }
        if !self.subclusters {
            return 1;
        }
        let size = self.subcluster_size();
        let first = start / size;
        let last = (end - 1) / size;
        let width = last - first + 1;
        let ones = if width >= 32 {
            u32::MAX
        } else {
            (1u32 << width) - 1
        };
        ones << first
    }

    pub(crate) fn l1_index(&self, offset: u64) -> u64 {
        offset >> (self.cluster_bits + self.l2_bits)
    }

    pub(crate) fn l2_index(&self, offset: u64) -> u64 {
        (offset >> self.cluster_bits) & ((1 << self.l2_bits) - 1)
    }

    /// The words of an L2 entry.
    pub(crate) fn entry_words(&self) -> usize {
        if self.subclusters { 2 } else { 1 }
    }

    /// The entries of a refcount block.
    pub(crate) fn refcounts_per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    pub(crate) fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Reads an L2 entry.
    pub(crate) fn decode(&self, entry: L2Entry) -> Result<Mapping> {
        if entry.word & COMPRESSED != 0 {
            let (offset, length) = self.decode_compressed(entry.word);
            return Ok(Mapping::Compressed { offset, length });
        }
        let offset = entry.word & OFFSET_MASK;
        if self.in_cluster(offset) != 0 {
            return Err(BlockError::invalid_image(format!(
                "a cluster is said to be at {offset:#x}, which is not a multiple of the cluster size"
            )));
        }
        let (data, zero) = if self.subclusters {
            let [data, zero] = [entry.bitmap, entry.bitmap >> 32].map(|b| b as u32);
            if data & zero != 0 {
                let message = "a subcluster is said to be both allocated and zero";
                return Err(BlockError::invalid_image(message));
            }
            (data, zero)
        } else if self.zero_flag && entry.word & ZERO != 0 {
            (0, 1)
        } else {
            (u32::from(offset != 0 || entry.word & COPIED != 0), 0)
        };
        // Offset 0 with the copied flag is a real place only in an external data file.
        if offset == 0 && entry.word & COPIED == 0 {
            if data != 0 {
                return Err(BlockError::invalid_image(
                    "subclusters are allocated without a cluster",
                ));
            }
            return Ok(Mapping::Plain { zero });
        }
        Ok(Mapping::Host {
            offset,
            copied: entry.word & COPIED != 0,
            data,
            zero,
        })
    }

    /// Writes an L2 entry.
    pub(crate) fn encode(&self, mapping: Mapping) -> L2Entry {
        let bitmap = |data: u32, zero: u32| u64::from(data) | u64::from(zero) << 32;
        match mapping {
            Mapping::Plain { zero } if self.subclusters => L2Entry {
                word: 0,
                bitmap: bitmap(0, zero),
            },
            Mapping::Plain { zero } => L2Entry {
                word: u64::from(zero & 1),
                bitmap: 0,
            },
            Mapping::Host {
                offset,
                copied,
                data,
                zero,
            } => {
                let flag = if copied { COPIED } else { 0 };
                if self.subclusters {
                    L2Entry {
                        word: offset | flag,
                        bitmap: bitmap(data, zero),
                    }
                } else {
                    L2Entry {
                        word: offset | flag | u64::from(zero & 1),
                        bitmap: 0,
                    }
                }
            }
            Mapping::Compressed { offset, length } => {
                let shift = self.compressed_shift();
                let last_sector = (offset + length.max(1) - 1) / 512;
                let sectors = last_sector - offset / 512;
                L2Entry {
                    word: COMPRESSED | sectors << shift | offset,
                    bitmap: 0,
                }
            }
        }
    }

    fn compressed_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    fn decode_compressed(&self, word: u64) -> (u64, u64) {
        let shift = self.compressed_shift();
        let offset = word & ((1 << shift) - 1);
        let sectors = (word & !(COMPRESSED | COPIED)) >> shift;
        // The data ends with its last sector at the latest.
        (offset, (sectors + 1) * 512 - offset % 512)
    }

    /// What subcluster `number` of a cluster is. `Data` and `Zero` have the subcluster's own place.
    pub(crate) fn part(&self, mapping: Mapping, number: u32) -> Part {
        let bit = 1u32 << number;
        match mapping {
            Mapping::Compressed { .. } => Part::Compressed,
            Mapping::Plain { zero } if zero & bit != 0 => Part::Zero(None),
            Mapping::Plain { .. } => Part::Unallocated,
            Mapping::Host {
                offset, data, zero, ..
            } => {
                let place = offset + u64::from(number) * self.subcluster_size();
                if zero & bit != 0 {
                    Part::Zero(Some(place))
                } else if data & bit != 0 {
                    Part::Data(place)
                } else {
                    Part::Unallocated
                }
            }
        }
    }
}

/// Reads entry `index` of a refcount block with entries of `2^order` bits.
///
/// # Panics
///
/// If the index is outside the block.
pub(crate) fn get_refcount(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let per_byte = 8usize >> order;
        let width = 1u32 << order;
        let shift = (index % per_byte) as u32 * width;
        return u64::from(block[index / per_byte] >> shift) & ((1 << width) - 1);
    }
    let bytes = 1usize << (order - 3);
    block[index * bytes..][..bytes]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes entry `index` of a refcount block; the value must fit.
///
/// # Panics
///
/// If the index is outside the block.
pub(crate) fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    if order < 3 {
        let per_byte = 8usize >> order;
        let width = 1u32 << order;
        let shift = (index % per_byte) as u32 * width;
        let mask = (((1u32 << width) - 1) << shift) as u8;
        let byte = &mut block[index / per_byte];
        *byte = *byte & !mask | ((value as u32) << shift) as u8 & mask;
        return;
    }
    let bytes = 1usize << (order - 3);
    block[index * bytes..][..bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(cluster_bits: u32, subclusters: bool) -> Geometry {
        let l2_bits = cluster_bits - if subclusters { 4 } else { 3 };
        Geometry {
            cluster_bits,
            subclusters,
            zero_flag: true,
            l2_bits,
            refcount_order: 4,
        }
    }

    #[test]
    fn parts_are_the_subclusters_touched() {
        let with = geometry(16, true);
        assert_eq!(with.parts(0, 65536), u32::MAX);
        assert_eq!(with.parts(0, 1), 1);
        assert_eq!(with.parts(2047, 2049), 3);
        assert_eq!(with.parts(63488, 65536), 1 << 31);
        assert_eq!(geometry(16, false).parts(5, 6), 1);
        assert_eq!(with.parts(5, 5), 0);
    }

    proptest! {
        #[test]
        fn refcounts_of_every_width_read_back(
            order in 0u32..=6,
            values in prop::collection::vec((0usize..64, any::<u64>()), 1..50),
        ) {
            let mut block = vec![0u8; 512];
            let mut model = vec![0u64; 64];
            for (index, value) in values {
                let value = value & (u64::MAX >> (64 - (1 << order)));
                set_refcount(&mut block, order, index, value);
                model[index] = value;
            }
            for (index, value) in model.iter().enumerate() {
                prop_assert_eq!(get_refcount(&block, order, index), *value);
            }
        }

        #[test]
        fn entries_read_back(
            bits in 14u32..=21, sub: bool, cluster in 1u64..1 << 20,
            data: u32, zero: u32, copied: bool,
        ) {
            let g = geometry(bits, sub);
            let (data, zero) = if sub { (data & !zero, zero) } else { (!zero & 1, zero & 1) };
            let mapping = Mapping::Host { offset: cluster << bits, copied, data, zero };
            prop_assert_eq!(g.decode(g.encode(mapping)).unwrap(), mapping);
            let plain = Mapping::Plain { zero };
            prop_assert_eq!(g.decode(g.encode(plain)).unwrap(), plain);
        }

        #[test]
        fn compressed_entries_cover_their_data(
            bits in 9u32..=21, place in 1u64..1 << 35, length in 1u64..1 << 21,
        ) {
            let g = geometry(bits, false);
            let length = length.min(g.cluster_size());
            let entry = g.encode(Mapping::Compressed { offset: place, length });
            let Mapping::Compressed { offset, length: found } = g.decode(entry).unwrap() else {
                panic!("not compressed");
            };
            prop_assert_eq!(offset, place);
            prop_assert!(found >= length && found < length + 512);
            prop_assert_eq!((offset + found) % 512, 0);
        }
    }
}
