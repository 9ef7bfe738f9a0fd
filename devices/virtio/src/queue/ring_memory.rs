//! The memory of a ring: mapped once, and again when the memory map changes.

use guest_memory::{GuestSlice, MemoryView};

use super::QueueError;

/// One part of a ring (descriptor table, driver area, device area).
#[derive(Debug)]
pub(super) struct RingArea {
    part: &'static str,
    addr: u64,
    len: usize,
    writable: bool,
    /// The host's view of it; `None` where the area lies across regions, which takes the slow path.
    direct: Option<GuestSlice>,
}

impl RingArea {
    /// Maps an area.
    pub(super) fn new(
        view: &mut MemoryView,
        part: &'static str,
        addr: u64,
        len: usize,
        writable: bool,
    ) -> Result<Self, QueueError> {
        let mut area = Self {
            part,
            addr,
            len,
            writable,
            direct: None,
        };
        area.map(view)?;
        Ok(area)
    }

    /// Maps it again after the memory map has changed.
    pub(super) fn map(&mut self, view: &mut MemoryView) -> Result<(), QueueError> {
        self.direct = view.slice(self.addr, self.len, self.writable);
        if self.direct.is_some() {
            return Ok(());
        }
        view.for_each(self.addr, self.len, self.writable, |_| {})
            .map_err(|_| self.missing())
    }

    fn missing(&self) -> QueueError {
        QueueError::RingNotMemory {
            part: self.part,
            addr: self.addr,
        }
    }

    /// Reads a value with acquire ordering. Offsets are the caller's own, inside the area.
    #[inline]
    pub(super) fn load_u16(&self, view: &MemoryView, at: usize) -> Result<u16, QueueError> {
        match &self.direct {
            Some(slice) => slice.load_u16(at).ok_or_else(|| self.missing()),
            None => self.slow(at, |addr| view.memory().load_u16(addr).ok()),
        }
    }

    /// Reads a value with acquire ordering.
    #[inline]
    pub(super) fn load_u32(&self, view: &MemoryView, at: usize) -> Result<u32, QueueError> {
        match &self.direct {
            Some(slice) => slice.load_u32(at).ok_or_else(|| self.missing()),
            None => self.slow(at, |addr| view.memory().load_u32(addr).ok()),
        }
    }

    /// Writes a value with release ordering.
    #[inline]
    pub(super) fn store_u16(
        &self,
        view: &MemoryView,
        at: usize,
        value: u16,
    ) -> Result<(), QueueError> {
        match &self.direct {
            Some(slice) if slice.store_u16(at, value) => Ok(()),
            Some(_) => Err(self.missing()),
            None => self.slow(at, |addr| view.memory().store_u16(addr, value).ok()),
        }
    }

    /// Writes a value with release ordering.
    #[inline]
    pub(super) fn store_u32(
        &self,
        view: &MemoryView,
        at: usize,
        value: u32,
    ) -> Result<(), QueueError> {
        match &self.direct {
            Some(slice) if slice.store_u32(at, value) => Ok(()),
            Some(_) => Err(self.missing()),
            None => self.slow(at, |addr| view.memory().store_u32(addr, value).ok()),
        }
    }

    /// Copies a descriptor.
    #[inline]
    pub(super) fn read(
        &self,
        view: &mut MemoryView,
        at: usize,
        to: &mut [u8],
    ) -> Result<(), QueueError> {
        match &self.direct {
            Some(slice) if slice.read_at(at, to) == to.len() => Ok(()),
            Some(_) => Err(self.missing()),
            None => {
                let addr = self.addr.wrapping_add(at as u64);
                view.read(addr, to).map_err(|_| self.missing())
            }
        }
    }

    #[cold]
    fn slow<T>(&self, at: usize, access: impl FnOnce(u64) -> Option<T>) -> Result<T, QueueError> {
        access(self.addr.wrapping_add(at as u64)).ok_or_else(|| self.missing())
    }
}
