//! Descriptors, and chains made of them.

use guest_memory::MemoryView;

use super::{Buffers, QueueError};
use crate::spec::descriptor::{INDIRECT, NEXT, SIZE, WRITE};

/// The most descriptors that a chain may have: what `preadv` takes, and more than any driver uses. The specification's
/// limit is the queue's size, but drivers with small queues and large indirect tables exist.
pub(super) const MAX_CHAIN: u32 = 1024;

/// A descriptor as both formats have it; `next` is the packed format's `flags`, and `flags` its `id`, so the formats
/// decode the last two fields themselves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) third: u16,
    pub(super) fourth: u16,
}

impl Descriptor {
    pub(super) fn decode(bytes: &[u8; SIZE]) -> Self {
        let word = u128::from_le_bytes(*bytes);
        Self {
            addr: word as u64,
            len: (word >> 64) as u32,
            third: (word >> 96) as u16,
            fourth: (word >> 112) as u16,
        }
    }
}

/// Collects a chain's buffers.
pub(super) struct ChainBuilder<'a> {
    view: &'a mut MemoryView,
    indirect_allowed: bool,
    count: u32,
    bytes: u64,
    pub(super) readable: Buffers,
    pub(super) writable: Buffers,
}

impl<'a> ChainBuilder<'a> {
    pub(super) fn new(view: &'a mut MemoryView, indirect_allowed: bool) -> Self {
        Self {
            view,
            indirect_allowed,
            count: 0,
            bytes: 0,
            readable: Buffers::default(),
            writable: Buffers::default(),
        }
    }

    pub(super) fn view(&mut self) -> &mut MemoryView {
        self.view
    }

    /// Adds a buffer.
    pub(super) fn add(&mut self, addr: u64, len: u32, flags: u16) -> Result<(), QueueError> {
        self.count += 1;
        if self.count > MAX_CHAIN {
            return Err(QueueError::ChainTooLong(MAX_CHAIN));
        }
        self.bytes += u64::from(len);
        if self.bytes > u64::from(u32::MAX) {
            return Err(QueueError::TooManyBytes);
        }
        let writable = flags & WRITE != 0;
        if !writable && !self.writable.is_empty() {
            return Err(QueueError::ReadableBehindWritable);
        }
        let side = if writable {
            &mut self.writable
        } else {
            &mut self.readable
        };
        self.view
            .for_each(addr, len as usize, writable, |slice| side.push(slice))
            .map_err(|_| QueueError::Buffer { addr, len })
    }

    /// Checks that a descriptor of the ring may be indirect; returns how many descriptors its table has.
    fn check_indirect(&self, len: u32, flags: u16) -> Result<u32, QueueError> {
        if !self.indirect_allowed {
            return Err(QueueError::Indirect("that was not negotiated"));
        }
        if flags & NEXT != 0 {
            return Err(QueueError::Indirect("with a successor"));
        }
        let size = SIZE as u32;
        if len == 0 || !len.is_multiple_of(size) {
            return Err(QueueError::IndirectSize(len));
        }
        Ok(len / size)
    }

    fn indirect_entry(&mut self, table: u64, index: u32) -> Result<Descriptor, QueueError> {
        let mut bytes = [0; SIZE];
        let missing = QueueError::Buffer {
            addr: table,
            len: SIZE as u32,
        };
        let addr = table
            .checked_add(u64::from(index) * SIZE as u64)
            .ok_or_else(|| missing.clone())?;
        self.view.read(addr, &mut bytes).map_err(|_| missing)?;
        Ok(Descriptor::decode(&bytes))
    }

    /// Adds the chain in a split ring's indirect table (section 2.7.5.3).
    pub(super) fn add_split_table(&mut self, d: Descriptor) -> Result<(), QueueError> {
        let size = self.check_indirect(d.len, d.third)?;
        let mut index = 0;
        loop {
            let entry = self.indirect_entry(d.addr, index)?;
            if entry.third & INDIRECT != 0 {
                return Err(QueueError::Indirect("inside an indirect table"));
            }
            self.add(entry.addr, entry.len, entry.third)?;
            if entry.third & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(entry.fourth);
            if index >= size {
                return Err(QueueError::DescriptorIndex {
                    index: entry.fourth,
                    size,
                });
            }
        }
    }

    /// Adds the buffers in a packed ring's indirect table (section 2.8.7): all of them, in order.
    pub(super) fn add_packed_table(&mut self, d: Descriptor) -> Result<(), QueueError> {
        let size = self.check_indirect(d.len, d.fourth)?;
        for index in 0..size {
            let entry = self.indirect_entry(d.addr, index)?;
            if entry.fourth & INDIRECT != 0 {
                return Err(QueueError::Indirect("inside an indirect table"));
            }
            self.add(entry.addr, entry.len, entry.fourth)?;
        }
        Ok(())
    }
}
