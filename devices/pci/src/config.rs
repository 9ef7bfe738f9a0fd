//! The bytes of a function's configuration space, and which of them the guest can change.

use crate::spec::{CAPABILITIES, CONFIG_SIZE, STATUS, STATUS_CAPABILITIES};

/// Configuration space as an array of bytes with, for each bit, what a write does to it.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that take what is written.
    writable: Vec<u8>,
    /// Bits that are cleared by writing one.
    clear: Vec<u8>,
    /// What [`Self::reset`] restores.
    initial: Vec<u8>,
    last_capability: Option<u16>,
    next_capability: u16,
    last_extended: Option<u16>,
    next_extended: u16,
}

impl Default for ConfigSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl ConfigSpace {
    /// All zero, nothing writable.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; CONFIG_SIZE],
            writable: vec![0; CONFIG_SIZE],
            clear: vec![0; CONFIG_SIZE],
            initial: vec![0; CONFIG_SIZE],
            last_capability: None,
            next_capability: 0x40,
            last_extended: None,
            next_extended: 0x100,
        }
    }

    /// Sets reset values.
    pub fn define(&mut self, offset: u16, value: &[u8]) {
        let at = usize::from(offset);
        self.bytes[at..at + value.len()].copy_from_slice(value);
        self.initial[at..at + value.len()].copy_from_slice(value);
    }

    /// Lets the guest write the bits of a mask.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (to, bits) in self.writable[usize::from(offset)..].iter_mut().zip(mask) {
            *to |= bits;
        }
    }

    /// Lets the guest clear the bits of a mask by writing ones.
    pub fn allow_clear(&mut self, offset: u16, mask: &[u8]) {
        for (to, bits) in self.clear[usize::from(offset)..].iter_mut().zip(mask) {
            *to |= bits;
        }
    }

    /// Adds a capability behind the others and returns its offset. `body` is what follows the ID and the link.
    ///
    /// # Panics
    /// When there is no room: a device's set of capabilities is fixed when it is written.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let at = self.next_capability;
        let end = at + 2 + body.len() as u16;
        assert!(end <= 0x100, "capabilities fit into 256 bytes");
        self.define(at, &[id, 0]);
        self.define(at + 2, body);
        let link = self.last_capability.map_or(CAPABILITIES, |last| last + 1);
        self.define(link, &[at as u8]);
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.define(STATUS, &status.to_le_bytes());
        self.last_capability = Some(at);
        self.next_capability = end.next_multiple_of(4);
        at
    }

    /// Adds an extended capability and returns its offset. `body` is what follows the 32-bit header.
    ///
    /// # Panics
    /// When there is no room.
    pub fn add_extended_capability(&mut self, id: u16, version: u8, body: &[u8]) -> u16 {
        let at = self.next_extended;
        let end = usize::from(at) + 4 + body.len();
        assert!(end <= CONFIG_SIZE, "extended capabilities fit");
        let header = u32::from(id) | u32::from(version & 0xf) << 16;
        self.define(at, &header.to_le_bytes());
        self.define(at + 4, body);
        if let Some(last) = self.last_extended {
            let link = self.u32(last) | u32::from(at) << 20;
            self.define(last, &link.to_le_bytes());
        }
        self.last_extended = Some(at);
        self.next_extended = end.next_multiple_of(8) as u16;
        at
    }

    /// Restores the reset values.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.initial);
    }

    /// A guest's read.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = *self.bytes.get(usize::from(offset) + i).unwrap_or(&0xff);
        }
    }

    /// A guest's write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, new) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            let Some(byte) = self.bytes.get_mut(at) else {
                return;
            };
            let mask = self.writable[at];
            *byte = (*byte & !mask | new & mask) & !(new & self.clear[at]);
        }
    }

    fn array<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut bytes = [0xff; N];
        self.read(offset, &mut bytes);
        bytes
    }

    /// The byte at an offset.
    pub fn u8(&self, offset: u16) -> u8 {
        self.array::<1>(offset)[0]
    }

    /// The 16-bit value at an offset.
    pub fn u16(&self, offset: u16) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    /// The 32-bit value at an offset.
    pub fn u32(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    /// Changes current bytes, whatever the guest may write; reset undoes it.
    pub fn set(&mut self, offset: u16, value: &[u8]) {
        for (to, from) in self.bytes[usize::from(offset)..].iter_mut().zip(value) {
            *to = *from;
        }
    }

    /// Sets and clears bits of a 16-bit register.
    pub fn change_u16(&mut self, offset: u16, clear: u16, set: u16) {
        let value = self.u16(offset) & !clear | set;
        self.set(offset, &value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn masks_decide_what_a_write_does() {
        let mut config = ConfigSpace::new();
        config.define(0x10, &[0x5a, 0xff]);
        config.allow(0x10, &[0x0f]);
        config.allow_clear(0x11, &[0x3c]);
        config.write(0x10, &[0xf3, 0x14]);
        assert_eq!(config.u16(0x10), 0xeb53);
        config.reset();
        assert_eq!(config.u16(0x10), 0xff5a);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut config = ConfigSpace::new();
        let a = config.add_capability(1, &[0; 6]);
        let b = config.add_capability(5, &[7; 3]);
        assert_eq!((a, b), (0x40, 0x48));
        assert_eq!(config.u8(CAPABILITIES), 0x40);
        assert_eq!(config.u16(0x40), 0x4801);
        assert_eq!(config.u16(0x48), 0x0005);
        assert_eq!(config.u16(STATUS), STATUS_CAPABILITIES);
        let x = config.add_extended_capability(1, 2, &[0; 0x44]);
        let y = config.add_extended_capability(3, 1, &[0; 8]);
        assert_eq!((x, y), (0x100, 0x148));
        assert_eq!(config.u32(0x100), 0x1482_0001);
    }

    proptest! {
        #[test]
        fn nothing_outside_the_masks_changes(writes: Vec<(u16, u32)>) {
            let mut config = ConfigSpace::new();
            config.define(0, &[0xa5; 64]);
            for (offset, value) in writes {
                config.write(offset, &value.to_le_bytes());
            }
            let mut now = [0; 64];
            config.read(0, &mut now);
            prop_assert_eq!(now, [0xa5; 64]);
        }
    }
}
