//! The firmware configuration device: how firmware and kernels get files from the machine.
//!
//! QEMU's specification "QEMU Firmware Configuration (fw_cfg) Device" (docs/specs/fw_cfg); values are big-endian unless noted.

use std::sync::Arc;

use device_model::{Device, IoBus, IoError, IoHandler, IoRegion, ResetKind, Widths};
use guest_memory::GuestMemory;
use parking_lot::Mutex;

/// Ports, keys and bits.
pub mod spec {
    /// Selector and data port.
    pub const PORT: u64 = 0x510;
    /// DMA address, 64 bits.
    pub const DMA_PORT: u64 = 0x514;
    /// Key: signature.
    pub const SIGNATURE: u16 = 0x00;
    /// Key: what the device can do.
    pub const ID: u16 = 0x01;
    /// Key: the directory of files.
    pub const FILE_DIR: u16 = 0x19;
    /// Key of the first file.
    pub const FILE_FIRST: u16 = 0x20;
    /// Key bit of architecture-specific items.
    pub const ARCH_LOCAL: u16 = 0x8000;
    /// ID: ports for selecting and reading.
    pub const ID_TRADITIONAL: u32 = 1;
    /// ID: DMA.
    pub const ID_DMA: u32 = 2;
    /// DMA control: went wrong.
    pub const DMA_ERROR: u32 = 1;
    /// DMA control: read.
    pub const DMA_READ: u32 = 2;
    /// DMA control: skip.
    pub const DMA_SKIP: u32 = 4;
    /// DMA control: select the item in the upper half first.
    pub const DMA_SELECT: u32 = 8;
    /// DMA control: write.
    pub const DMA_WRITE: u32 = 16;
    /// What the DMA address reads as.
    pub const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
    /// Longest file name, with its end.
    pub const NAME_SIZE: usize = 56;
}
use spec::*;

/// A file that the device offers.
#[derive(Debug, Clone)]
struct File {
    name: String,
    content: Arc<[u8]>,
}

#[derive(Default)]
struct Items {
    files: Vec<File>,
    /// Numbered items.
    numbered: Vec<(u16, Arc<[u8]>)>,
    directory: Arc<[u8]>,
}

/// Volatile guest state.
#[derive(Default)]
struct State {
    items: Items,
    /// The content of the selected item.
    selected: Option<Arc<[u8]>>,
    offset: usize,
    dma_high: u32,
}

/// The device.
pub struct FwCfg {
    memory: GuestMemory,
    state: Mutex<State>,
}

/// A name that no file can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("fw_cfg file name {0:?} is empty, longer than 55 bytes, or not plain text")]
pub struct BadFileName(pub String);

impl FwCfg {
    /// The device, with no files yet, which does DMA to `memory`.
    pub fn new(memory: GuestMemory) -> Arc<Self> {
        let device = Self {
            memory,
            state: Mutex::default(),
        };
        device.add_item(SIGNATURE, b"QEMU".to_vec());
        let id = ID_TRADITIONAL | ID_DMA;
        device.add_item(ID, id.to_le_bytes().to_vec());
        device.state.lock().items.list_files();
        Arc::new(device)
    }

    /// Claims the ports 510h, 511h and 514h to 51Bh.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<Vec<IoRegion>, IoError> {
        Ok(vec![
            ports.add(PORT, 2, "fw_cfg", self.clone())?,
            ports.add(DMA_PORT, 8, "fw_cfg dma", Arc::new(Dma(self.clone())))?,
        ])
    }

    /// Offers a numbered item, in place of an earlier one. Numbers: QEMU's `FW_CFG_*`, as firmware expects them.
    pub fn add_item(&self, key: u16, content: Vec<u8>) {
        let mut state = self.state.lock();
        state.items.numbered.retain(|(k, _)| *k != key);
        state.items.numbered.push((key, content.into()));
    }

    /// Offers a file, in place of an earlier one of the name.
    ///
    /// # Errors
    /// [`BadFileName`].
    pub fn add_file(&self, name: &str, content: Vec<u8>) -> Result<(), BadFileName> {
        let plain = name.bytes().all(|b| (0x20..0x7f).contains(&b));
        if name.is_empty() || name.len() >= NAME_SIZE || !plain {
            return Err(BadFileName(name.to_owned()));
        }
        let mut state = self.state.lock();
        let content: Arc<[u8]> = content.into();
        match state.items.files.iter_mut().find(|f| f.name == name) {
            Some(file) => file.content = content,
            None => state.items.files.push(File {
                name: name.to_owned(),
                content,
            }),
        }
        state.items.list_files();
        Ok(())
    }

    fn do_dma(&self, state: &mut State, at: u64) {
        let mut descriptor = [0; 16];
        if self.memory.read(at, &mut descriptor).is_err() {
            return;
        }
        let word = |i: usize| {
            let bytes: [u8; 4] = std::array::from_fn(|n| descriptor[i + n]);
            u32::from_be_bytes(bytes)
        };
        let (control, length) = (word(0), word(4));
        let address = u64::from(word(8)) << 32 | u64::from(word(12));
        let done = self.transfer(state, control, address, length);
        let result = if done { 0 } else { DMA_ERROR };
        // The guest waits for the control word to change; if it is not memory any more, nobody does.
        let _ = self.memory.write(at, &result.to_be_bytes());
    }

    fn transfer(&self, state: &mut State, control: u32, address: u64, length: u32) -> bool {
        if control & DMA_SELECT != 0 {
            state.select((control >> 16) as u16);
        }
        if control & DMA_READ != 0 {
            return self.copy_out(state, address, length);
        }
        if control & DMA_SKIP != 0 {
            state.offset = state.offset.saturating_add(length as usize);
            return true;
        }
        // Items can't be written, which is all that is left.
        control & DMA_WRITE == 0
    }

    /// Copies the selected item from the present offset to memory; what lies behind its end reads as zeros.
    fn copy_out(&self, state: &mut State, address: u64, length: u32) -> bool {
        const ZEROS: [u8; 4096] = [0; 4096];
        let content = state.selected.clone().unwrap_or_default();
        let start = state.offset.min(content.len());
        let end = state
            .offset
            .saturating_add(length as usize)
            .min(content.len());
        let part = &content[start..end];
        state.offset = state.offset.saturating_add(length as usize);
        if self.memory.write(address, part).is_err() {
            return false;
        }
        let mut done = part.len() as u64;
        while done < u64::from(length) {
            let step = (u64::from(length) - done).min(ZEROS.len() as u64);
            let Some(at) = address.checked_add(done) else {
                return false;
            };
            if self.memory.write(at, &ZEROS[..step as usize]).is_err() {
                return false;
            }
            done += step;
        }
        true
    }
}

impl Items {
    /// Makes the directory anew: a count, and for each file its size, key and name.
    fn list_files(&mut self) {
        let mut bytes = (self.files.len() as u32).to_be_bytes().to_vec();
        for (n, file) in self.files.iter().enumerate() {
            bytes.extend((file.content.len() as u32).to_be_bytes());
            bytes.extend((FILE_FIRST + n as u16).to_be_bytes());
            bytes.extend([0; 2]);
            let mut name = [0; NAME_SIZE];
            name[..file.name.len()].copy_from_slice(file.name.as_bytes());
            bytes.extend(name);
        }
        self.directory = bytes.into();
    }

    fn get(&self, key: u16) -> Option<Arc<[u8]>> {
        if key == FILE_DIR {
            return Some(self.directory.clone());
        }
        if let Some((_, content)) = self.numbered.iter().find(|(k, _)| *k == key) {
            return Some(content.clone());
        }
        let n = key.checked_sub(FILE_FIRST)?;
        Some(self.files.get(usize::from(n))?.content.clone())
    }
}

impl State {
    fn select(&mut self, key: u16) {
        self.selected = self.items.get(key);
        self.offset = 0;
    }

    fn next_byte(&mut self) -> u8 {
        let byte = self.selected.as_ref().and_then(|c| c.get(self.offset));
        let byte = byte.copied().unwrap_or(0);
        self.offset = self.offset.saturating_add(1);
        byte
    }
}

impl IoHandler for FwCfg {
    fn widths(&self) -> Widths {
        Widths { min: 1, max: 2 }
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (1, [byte]) => *byte = self.state.lock().next_byte(),
            (_, data) => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The selector is little-endian on x86; data can't be written.
        if let (0, [low, high]) = (offset, data) {
            self.state.lock().select(u16::from_le_bytes([*low, *high]));
        }
    }
}

impl Device for FwCfg {
    fn name(&self) -> String {
        "fw_cfg".into()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut state = self.state.lock();
        state.select(SIGNATURE);
        state.dma_high = 0;
    }
}

/// The DMA address register.
struct Dma(Arc<FwCfg>);

impl IoHandler for Dma {
    fn widths(&self) -> Widths {
        Widths::ANY
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = DMA_SIGNATURE.iter().skip(offset as usize);
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.0.state.lock();
        match (offset, data) {
            (0, [a, b, c, d]) => state.dma_high = u32::from_be_bytes([*a, *b, *c, *d]),
            (4, [a, b, c, d]) => {
                let low = u32::from_be_bytes([*a, *b, *c, *d]);
                let high = std::mem::take(&mut state.dma_high);
                self.0
                    .do_dma(&mut state, u64::from(high) << 32 | u64::from(low));
            }
            (0, [a, b, c, d, e, f, g, h]) => {
                let at = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
                self.0.do_dma(&mut state, at);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::BackingOptions;

    fn device() -> (Arc<FwCfg>, IoBus, Vec<IoRegion>, GuestMemory) {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, 0x4000, BackingOptions::default())
            .unwrap();
        let device = FwCfg::new(memory.clone());
        let ports = IoBus::ports();
        let regions = device.attach(&ports).unwrap();
        (device, ports, regions, memory)
    }

    fn read(ports: &IoBus, key: u16, count: usize) -> Vec<u8> {
        ports.write(PORT, &key.to_le_bytes());
        (0..count)
            .map(|_| {
                let mut byte = [0];
                ports.read(PORT + 1, &mut byte);
                byte[0]
            })
            .collect()
    }

    #[test]
    fn files_are_listed_and_read() {
        let (device, ports, _r, _) = device();
        assert_eq!(read(&ports, SIGNATURE, 5), b"QEMU\0");
        assert_eq!(read(&ports, ID, 4), [3, 0, 0, 0]);
        device.add_file("etc/e820", vec![1, 2, 3]).unwrap();
        device.add_file("etc/e820", vec![4, 5]).unwrap();
        let list = read(&ports, FILE_DIR, 68);
        assert_eq!(list[..12], [0, 0, 0, 1, 0, 0, 0, 2, 0, 0x20, 0, 0]);
        assert_eq!(&list[12..20], b"etc/e820");
        assert_eq!(read(&ports, 0x20, 3), [4, 5, 0]);
        assert!(device.add_file(&"x".repeat(56), Vec::new()).is_err());
    }

    fn dma(ports: &IoBus, memory: &GuestMemory, control: u32, len: u32, to: u64) -> u32 {
        let mut descriptor = control.to_be_bytes().to_vec();
        descriptor.extend(len.to_be_bytes());
        descriptor.extend(to.to_be_bytes());
        memory.write(0x100, &descriptor).unwrap();
        ports.write(DMA_PORT + 4, &0x100u32.to_be_bytes());
        let mut result = [0; 4];
        memory.read(0x100, &mut result).unwrap();
        u32::from_be_bytes(result)
    }

    #[test]
    fn dma_copies_and_fills_with_zeros() {
        let (device, ports, _r, memory) = device();
        device.add_file("f", (0..=255).collect()).unwrap();
        let mut signature = [0; 8];
        ports.read(DMA_PORT, &mut signature);
        assert_eq!(&signature, b"QEMU CFG");
        memory.write(0x1000, &[9; 0x200]).unwrap();
        let select = 0x20 << 16 | DMA_SELECT;
        assert_eq!(dma(&ports, &memory, select | DMA_SKIP, 250, 0), 0);
        assert_eq!(dma(&ports, &memory, DMA_READ, 10, 0x1000), 0);
        let mut got = [0; 11];
        memory.read(0x1000, &mut got).unwrap();
        assert_eq!(got, [250, 251, 252, 253, 254, 255, 0, 0, 0, 0, 9]);
        assert_eq!(dma(&ports, &memory, select | DMA_READ, u32::MAX, 0x3f00), 1);
        assert_eq!(dma(&ports, &memory, select | DMA_READ, 16, u64::MAX - 3), 1);
        assert_eq!(dma(&ports, &memory, select | DMA_WRITE, 16, 0x1000), 1);
    }
}
