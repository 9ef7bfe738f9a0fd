//! The driver's side of both ring formats, for tests: what a guest does.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};

use guest_memory::GuestMemory;

use super::QueueConfig;
use crate::spec::descriptor::{AVAIL, INDIRECT, NEXT, SIZE, USED, WRITE};
use crate::spec::{event, feature};

/// A buffer of a request: address, bytes, whether the device writes it.
pub(crate) type Piece = (u64, u32, bool);

/// A used buffer: the request's number as `add` returned it, and the bytes written.
pub(crate) type Used = (u64, u32);

/// A driver's queue, with its rings at `base` (it needs `footprint` bytes).
pub(crate) struct DriverQueue {
    pub(crate) memory: GuestMemory,
    pub(crate) base: u64,
    pub(crate) size: u16,
    pub(crate) features: u64,
    /// Put the buffers of every request into an indirect table.
    pub(crate) indirect: bool,
    next_request: u64,
    /// By head or buffer ID: the request and its descriptors.
    requests: HashMap<u16, (u64, Vec<u16>)>,
    free: Vec<u16>,
    next: u16,
    wrap: bool,
    used_next: u16,
    used_wrap: bool,
    /// Where the available index stood at the last doorbell question.
    kicked: u16,
}

const fn align(at: u64) -> u64 {
    (at + 63) & !63
}

impl DriverQueue {
    pub(crate) fn new(memory: &GuestMemory, base: u64, size: u16, features: u64) -> Self {
        let driver = Self {
            memory: memory.clone(),
            base,
            size,
            features,
            indirect: false,
            next_request: 0,
            requests: HashMap::new(),
            free: (0..size).rev().collect(),
            next: 0,
            wrap: true,
            used_next: 0,
            used_wrap: true,
            kicked: 0,
        };
        memory
            .write(base, &vec![0; driver.footprint() as usize])
            .unwrap();
        driver
    }

    pub(crate) fn packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }

    pub(crate) fn event_idx(&self) -> bool {
        self.features & feature::EVENT_IDX != 0
    }

    pub(crate) fn driver_area(&self) -> u64 {
        self.base + align(u64::from(self.size) * SIZE as u64)
    }

    pub(crate) fn device_area(&self) -> u64 {
        self.driver_area() + align(6 + 2 * u64::from(self.size))
    }

    fn tables(&self) -> u64 {
        self.device_area() + align(6 + 8 * u64::from(self.size))
    }

    /// Room for an indirect table of 32 descriptors for each entry.
    pub(crate) fn footprint(&self) -> u64 {
        self.tables() - self.base + u64::from(self.size) * 32 * SIZE as u64
    }

    pub(crate) fn config(&self, index: u16) -> QueueConfig {
        QueueConfig {
            index,
            size: self.size,
            descriptors: self.base,
            driver: self.driver_area(),
            device: self.device_area(),
            next_available: QueueConfig::fresh(self.features),
            next_used: QueueConfig::fresh(self.features),
        }
    }

    pub(crate) fn descriptor(&self, table: u64, index: u16, d: (u64, u32, u16, u16)) {
        let at = table + u64::from(index) * SIZE as u64;
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&d.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&d.1.to_le_bytes());
        bytes[12..14].copy_from_slice(&d.2.to_le_bytes());
        bytes[14..].copy_from_slice(&d.3.to_le_bytes());
        self.memory.write(at, &bytes).unwrap();
    }

    /// Makes a request available, or returns `None` when there is no room.
    pub(crate) fn add(&mut self, pieces: &[Piece]) -> Option<u64> {
        let needed = if self.indirect { 1 } else { pieces.len() };
        if self.free.len() < needed {
            return None;
        }
        let request = self.next_request;
        self.next_request += 1;
        if self.packed() {
            self.add_packed(pieces, request);
        } else {
            self.add_split(pieces, request);
        }
        Some(request)
    }

    fn table_of(&self, slot: u16) -> u64 {
        self.tables() + u64::from(slot) * 32 * SIZE as u64
    }

    fn add_split(&mut self, pieces: &[Piece], request: u64) {
        let flag = |w: bool| if w { WRITE } else { 0 };
        let last = pieces.len() - 1;
        let slots: Vec<u16>;
        if self.indirect {
            let slot = self.free.pop().unwrap();
            let table = self.table_of(slot);
            for (i, (addr, len, w)) in pieces.iter().enumerate() {
                let next = if i == last { 0 } else { NEXT };
                self.descriptor(
                    table,
                    i as u16,
                    (*addr, *len, flag(*w) | next, i as u16 + 1),
                );
            }
            let bytes = (pieces.len() * SIZE) as u32;
            self.descriptor(self.base, slot, (table, bytes, INDIRECT, 0));
            slots = vec![slot];
        } else {
            slots = pieces.iter().map(|_| self.free.pop().unwrap()).collect();
            for (i, (addr, len, w)) in pieces.iter().enumerate() {
                let (next, to) = match slots.get(i + 1) {
                    Some(slot) => (NEXT, *slot),
                    None => (0, 0),
                };
                self.descriptor(self.base, slots[i], (*addr, *len, flag(*w) | next, to));
            }
        }
        let at = self.driver_area() + 4 + 2 * u64::from(self.next % self.size);
        self.memory.store_u16(at, slots[0]).unwrap();
        self.next = self.next.wrapping_add(1);
        self.memory
            .store_u16(self.driver_area() + 2, self.next)
            .unwrap();
        self.requests.insert(slots[0], (request, slots));
    }

    fn add_packed(&mut self, pieces: &[Piece], request: u64) {
        let flag = |w: bool| if w { WRITE } else { 0 };
        let id = self.free.pop().unwrap();
        let (first, mut first_flags) = (self.next, 0);
        let entries: Vec<(u64, u32, u16)> = if self.indirect {
            let table = self.table_of(id);
            for (i, (addr, len, w)) in pieces.iter().enumerate() {
                self.descriptor(table, i as u16, (*addr, *len, 0, flag(*w)));
            }
            vec![(table, (pieces.len() * SIZE) as u32, INDIRECT)]
        } else {
            let next = |i| if i + 1 < pieces.len() { NEXT } else { 0 };
            pieces
                .iter()
                .enumerate()
                .map(|(i, (addr, len, w))| (*addr, *len, flag(*w) | next(i)))
                .collect()
        };
        let mut slots = vec![id];
        for (i, (addr, len, flags)) in entries.into_iter().enumerate() {
            let flags = flags | if self.wrap { AVAIL } else { USED };
            if i == 0 {
                first_flags = flags;
            } else {
                slots.push(self.free.pop().unwrap());
            }
            // The first one's flags come last; until then it keeps those that it has.
            let at = self.base + u64::from(self.next) * SIZE as u64;
            let old = self.memory.load_u16(at + 14).unwrap();
            let shown = if i == 0 { old } else { flags };
            self.descriptor(self.base, self.next, (addr, len, id, shown));
            self.next += 1;
            if self.next == self.size {
                self.next = 0;
                self.wrap = !self.wrap;
            }
        }
        let at = self.base + u64::from(first) * SIZE as u64 + 14;
        self.memory.store_u16(at, first_flags).unwrap();
        self.requests.insert(id, (request, slots));
    }

    /// Takes a used buffer.
    pub(crate) fn used(&mut self) -> Option<Used> {
        let (id, len) = if self.packed() {
            self.used_packed()?
        } else {
            self.used_split()?
        };
        let (request, slots) = self.requests.remove(&id).expect("the device uses what is");
        if self.packed() {
            self.used_next += slots.len() as u16;
            if self.used_next >= self.size {
                self.used_next -= self.size;
                self.used_wrap = !self.used_wrap;
            }
        }
        self.free.extend(slots);
        Some((request, len))
    }

    /// Takes all descriptors for free, used or not: a driver that has lost its mind.
    pub(crate) fn forget_used(&mut self) {
        self.requests.clear();
        self.free = (0..self.size).rev().collect();
    }

    fn used_split(&mut self) -> Option<(u16, u32)> {
        let area = self.device_area();
        if self.memory.load_u16(area + 2).unwrap() == self.used_next {
            return None;
        }
        let at = area + 4 + 8 * u64::from(self.used_next % self.size);
        self.used_next = self.used_next.wrapping_add(1);
        let id = self.memory.load_u32(at).unwrap();
        Some((id as u16, self.memory.load_u32(at + 4).unwrap()))
    }

    fn used_packed(&self) -> Option<(u16, u32)> {
        let at = self.base + u64::from(self.used_next) * SIZE as u64;
        let flags = self.memory.load_u16(at + 14).unwrap();
        let (a, u) = (flags & AVAIL != 0, flags & USED != 0);
        if a != u || u != self.used_wrap {
            return None;
        }
        let id = self.memory.load_u16(at + 12).unwrap();
        let len = self.memory.load_u32(at + 8).unwrap();
        Some((id, if flags & WRITE != 0 { len } else { 0 }))
    }

    /// Asks for a signal at the next used buffer, or for none.
    pub(crate) fn want_signal(&self, wanted: bool) {
        let area = self.driver_area();
        if self.packed() {
            let wrap = if self.used_wrap { 1 << 15 } else { 0 };
            let flags = match (wanted, self.event_idx()) {
                (false, _) => event::DISABLE,
                (true, true) => event::DESC,
                (true, false) => event::ENABLE,
            };
            self.memory.store_u16(area, self.used_next | wrap).unwrap();
            self.memory.store_u16(area + 2, flags).unwrap();
        } else if self.event_idx() {
            let at = area + 4 + 2 * u64::from(self.size);
            let event = if wanted {
                self.used_next
            } else {
                self.used_next.wrapping_sub(1)
            };
            self.memory.store_u16(at, event).unwrap();
        } else {
            self.memory.store_u16(area, u16::from(!wanted)).unwrap();
        }
        fence(Ordering::SeqCst);
    }

    /// Whether the doorbell must be rung for what has been added since the last call.
    pub(crate) fn must_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let area = self.device_area();
        if self.packed() {
            let flags = self.memory.load_u16(area + 2).unwrap() & 3;
            if flags != event::DESC {
                return flags == event::ENABLE;
            }
            // For a test it is enough to know whether the position has been filled.
            let position = self.memory.load_u16(area).unwrap();
            let at = self.base + u64::from(position & 0x7fff) * SIZE as u64;
            let flags = self.memory.load_u16(at + 14).unwrap();
            let wrap = position >> 15 != 0;
            return (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap;
        }
        if !self.event_idx() {
            return self.memory.load_u16(area).unwrap() & 1 == 0;
        }
        let at = area + 4 + 8 * u64::from(self.size);
        let event = self.memory.load_u16(at).unwrap();
        let old = std::mem::replace(&mut self.kicked, self.next);
        self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
    }
}
