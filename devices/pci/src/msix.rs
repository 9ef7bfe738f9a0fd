//! MSI-X: the table of messages in a device's memory space (PCI Local Bus 3.0, section 6.8.2).

use std::sync::Arc;

use device_model::MsiSink;
use parking_lot::Mutex;

/// Bytes of a table entry.
pub(crate) const ENTRY_SIZE: u64 = 16;
/// Most vectors of a function.
pub(crate) const MAX_VECTORS: u16 = 2048;

const VECTOR_CONTROL_MASKED: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Entry {
    const RESET: Self = Self {
        address: 0,
        data: 0,
        control: VECTOR_CONTROL_MASKED,
        pending: false,
    };
}

struct State {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
    master: bool,
    sink: Option<Arc<dyn MsiSink>>,
}

/// A function's MSI-X table and pending bits. Shared by the function and by who raises the vectors.
pub struct Msix {
    vectors: u16,
    bar: usize,
    table: u64,
    pba: u64,
    state: Mutex<State>,
}

impl Msix {
    pub(crate) fn new(vectors: u16, bar: usize, table: u64, pba: u64) -> Self {
        Self {
            vectors,
            bar,
            table,
            pba,
            state: Mutex::new(State {
                entries: vec![Entry::RESET; usize::from(vectors)],
                enabled: false,
                masked: false,
                master: false,
                sink: None,
            }),
        }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// The base address register that the table lies in.
    pub fn bar(&self) -> usize {
        self.bar
    }

    /// Bytes of the pending bit array: whole quadwords.
    pub(crate) fn pba_size(vectors: u16) -> u64 {
        u64::from(vectors).div_ceil(64) * 8
    }

    /// True when the guest uses MSI-X: then there are no INTx interrupts and no MSI.
    pub fn is_enabled(&self) -> bool {
        self.state.lock().enabled
    }

    /// Raises a vector: sends its message, or remembers it while it is masked. Nothing happens while MSI-X is off or for a
    /// vector that is not there.
    pub fn notify(&self, vector: u16) {
        let mut state = self.state.lock();
        let silent = !state.enabled;
        let blocked = state.masked || !state.master;
        let State { entries, sink, .. } = &mut *state;
        let Some(entry) = entries.get_mut(usize::from(vector)).filter(|_| !silent) else {
            return;
        };
        if blocked || entry.control & VECTOR_CONTROL_MASKED != 0 {
            entry.pending = true;
        } else if let Some(sink) = sink {
            sink.send(entry.address, entry.data);
        }
    }

    /// The message of a vector, when notifying would send it now: for short cuts in the host's kernel.
    pub fn message(&self, vector: u16) -> Option<(u64, u32)> {
        let state = self.state.lock();
        let entry = state.entries.get(usize::from(vector))?;
        let live = state.enabled
            && !state.masked
            && state.master
            && entry.control & VECTOR_CONTROL_MASKED == 0;
        live.then_some((entry.address, entry.data))
    }

    pub(crate) fn connect(&self, sink: Option<Arc<dyn MsiSink>>) {
        self.state.lock().sink = sink;
    }

    /// Takes over what configuration space says.
    pub(crate) fn configure(&self, enabled: bool, masked: bool, master: bool) {
        let mut state = self.state.lock();
        (state.enabled, state.masked, state.master) = (enabled, masked, master);
        if enabled && !masked && master {
            for vector in 0..state.entries.len() {
                state.send_pending(vector);
            }
        }
    }

    pub(crate) fn reset(&self) {
        let mut state = self.state.lock();
        state.entries.fill(Entry::RESET);
        (state.enabled, state.masked, state.master) = (false, false, false);
    }

    /// True if an offset in [`Self::bar`] is the table's or the pending bits'.
    pub(crate) fn claims(&self, offset: u64) -> bool {
        let table_end = self.table + u64::from(self.vectors) * ENTRY_SIZE;
        let pba_end = self.pba + Self::pba_size(self.vectors);
        (self.table..table_end).contains(&offset) || (self.pba..pba_end).contains(&offset)
    }

    /// A guest's read at an offset that [`Self::claims`] has accepted.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.byte(&state, offset + i as u64);
        }
    }

    fn byte(&self, state: &State, offset: u64) -> u8 {
        let at = offset.wrapping_sub(self.pba);
        if at < Self::pba_size(self.vectors) {
            let first = at as usize * 8;
            return (0..8)
                .filter(|bit| state.entries.get(first + bit).is_some_and(|e| e.pending))
                .fold(0, |byte, bit| byte | 1 << bit);
        }
        let Some(at) = offset.checked_sub(self.table) else {
            return 0;
        };
        let Some(entry) = state.entries.get((at / ENTRY_SIZE) as usize) else {
            return 0;
        };
        let within = (at % ENTRY_SIZE) as usize;
        match within {
            0..8 => entry.address.to_le_bytes()[within],
            8..12 => entry.data.to_le_bytes()[within - 8],
            _ => entry.control.to_le_bytes()[within - 12],
        }
    }

    /// A guest's write; see [`Self::read`].
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let Some(at) = offset.checked_sub(self.table) else {
            return;
        };
        let vector = (at / ENTRY_SIZE) as usize;
        let within = (at % ENTRY_SIZE) as usize;
        let mut state = self.state.lock();
        let Some(entry) = state.entries.get_mut(vector) else {
            return;
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
        bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
        for (to, from) in bytes[within..].iter_mut().zip(data) {
            *to = *from;
        }
        let word =
            |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        entry.address = u64::from(word(4)) << 32 | u64::from(word(0) & !3);
        entry.data = word(8);
        entry.control = word(12) & VECTOR_CONTROL_MASKED;
        if state.enabled && !state.masked && state.master {
            state.send_pending(vector);
        }
    }
}

impl State {
    fn send_pending(&mut self, vector: usize) {
        let Some(entry) = self.entries.get_mut(vector) else {
            return;
        };
        if entry.pending && entry.control & VECTOR_CONTROL_MASKED == 0 {
            entry.pending = false;
            if let Some(sink) = &self.sink {
                sink.send(entry.address, entry.data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u32)>>);
    impl MsiSink for Log {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().push((address, data));
        }
    }

    fn msix() -> (Arc<Log>, Msix) {
        let log = Arc::new(Log::default());
        let msix = Msix::new(3, 1, 0, 0x800);
        msix.connect(Some(log.clone()));
        msix.write(16, &0xfee0_1000u64.to_le_bytes());
        msix.write(24, &0x41u32.to_le_bytes());
        (log, msix)
    }

    #[test]
    fn masked_vectors_wait() {
        let (log, msix) = msix();
        msix.notify(1);
        msix.configure(true, false, true);
        assert_eq!(*log.0.lock(), []); // not pending: it was off
        msix.notify(1);
        let mut pending = [0; 8];
        msix.read(0x800, &mut pending);
        assert_eq!(pending[0], 0b10);
        msix.write(28, &0u32.to_le_bytes());
        assert_eq!(*log.0.lock(), [(0xfee0_1000, 0x41)]);
        msix.configure(true, true, true);
        msix.notify(1);
        assert_eq!(msix.message(1), None);
        msix.configure(true, false, true);
        assert_eq!(log.0.lock().len(), 2);
        assert_eq!(msix.message(1), Some((0xfee0_1000, 0x41)));
        msix.notify(77);
        msix.reset();
        let mut control = [0; 4];
        msix.read(28, &mut control);
        assert_eq!(control, [1, 0, 0, 0]);
    }
}
