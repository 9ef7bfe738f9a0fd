//! What targets of devices share: random accesses to buses, memory with something in it that no device may write, ends of wires.

use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use device_model::{CharBackend, CharFrontend, IoBus, IrqSink, MsiSink, PowerControl, PowerEvent};
use guest_memory::{Backing, BackingOptions, GuestMemory, Region};
use parking_lot::Mutex;

use crate::input::Input;

/// One access of 1 to 8 bytes to one of the bus's regions, or across the edge of one. Returns the address.
pub fn access(bus: &IoBus, regions: &[(u64, u64, String)], input: &mut Input<'_>) -> u64 {
    let Some((base, length, _)) = regions.get(input.below(regions.len() as u64) as usize) else {
        return 0;
    };
    let how = input.byte();
    // Most registers lie at the start of a large region.
    let within = match how >> 6 {
        0 | 1 => (*length).min(0x100),
        2 => (*length).min(0x1000),
        _ => *length + 8,
    };
    let mut address = base + input.below(within);
    if how & 0x20 != 0 {
        address = address.saturating_sub(4);
    }
    let size = usize::from(how & 7) + 1;
    if how & 0x18 == 0 {
        let mut data = [0x5a; 8];
        bus.read(address, &mut data[..size]);
    } else {
        bus.write(address, &input.number().to_le_bytes()[..size]);
    }
    address
}

/// Takes interrupts, messages and requests of power, and only counts them.
#[derive(Default)]
pub struct Ends(AtomicUsize);

impl Ends {
    fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl IrqSink for Ends {
    fn set_level(&self, _pin: u32, _high: bool) {
        self.count();
    }
}
impl MsiSink for Ends {
    fn send(&self, _address: u64, _data: u32) {
        self.count();
    }
}
impl PowerControl for Ends {
    fn request(&self, _event: PowerEvent) {
        self.count();
    }
}

/// The far end of a serial line, with as much room as it is given.
#[derive(Default)]
pub struct FarEnd {
    frontend: Mutex<Option<Weak<dyn CharFrontend>>>,
    room: AtomicUsize,
}

impl FarEnd {
    /// The device on the line.
    pub fn frontend(&self) -> Option<Arc<dyn CharFrontend>> {
        self.frontend.lock().as_ref()?.upgrade()
    }

    /// Takes so many bytes from now on, or is closed when it is none.
    pub fn set_room(&self, bytes: usize) {
        self.room.store(bytes, Ordering::SeqCst);
    }
}

impl CharBackend for FarEnd {
    fn connect(&self, frontend: Weak<dyn CharFrontend>) {
        *self.frontend.lock() = Some(frontend);
    }
    fn write(&self, data: &[u8]) -> usize {
        let room = self.room.load(Ordering::SeqCst);
        let taken = room.min(data.len());
        self.room.store(room - taken, Ordering::SeqCst);
        taken
    }
    fn accept_input(&self) {}
    fn is_open(&self) -> bool {
        self.room.load(Ordering::SeqCst) > 0
    }
    fn drain(&self, _at_most: Duration) {}
}

/// Guest memory: RAM, a hole, ROM, a hole, and RAM at the top of the address space.
pub struct Memory {
    /// The map.
    pub map: GuestMemory,
    rom: Arc<Backing>,
    aside: Arc<Backing>,
}

/// Bytes of RAM at address zero.
pub const RAM: u64 = 1 << 20;
/// Where the ROM is, a page.
pub const ROM: u64 = 0x11_0000;
/// Where the last page of RAM is.
pub const TOP: u64 = (1 << 52) - 0x1000;
const CANARY: u8 = 0xa5;

impl Memory {
    /// Memory, zero but for the ROM.
    pub fn new() -> Self {
        let map = GuestMemory::new();
        let options = BackingOptions::default;
        map.add_ram(0, RAM, options()).expect("memory");
        map.add_ram(TOP, 0x1000, options()).expect("memory");
        let rom = Arc::new(Backing::new(0x1000, options()).expect("memory"));
        // Shown in part only: what lies before and behind the part is nobody's to write.
        let aside = Arc::new(Backing::new(0x3000, options()).expect("memory"));
        let region = |base, backing: &Arc<Backing>, offset, read_only| Region {
            base,
            size: 0x1000,
            backing: backing.clone(),
            offset,
            read_only,
        };
        map.add(region(ROM, &rom, 0, true)).expect("a free place");
        map.add(region(ROM + 0x2000, &aside, 0x1000, false))
            .expect("a free place");
        let memory = Self { map, rom, aside };
        for slice in memory.untouchable() {
            slice.fill(CANARY);
        }
        memory
    }

    /// What no device may write.
    fn untouchable(&self) -> [guest_memory::GuestSlice; 3] {
        let map = GuestMemory::new();
        for (base, backing) in [(0, &self.rom), (0x10_0000, &self.aside)] {
            map.add(Region {
                base,
                size: backing.len(),
                backing: backing.clone(),
                offset: 0,
                read_only: false,
            })
            .expect("a free place");
        }
        [0, 0x10_0000, 0x10_2000].map(|at| map.slice(at, 0x1000).expect("memory"))
    }

    /// Puts bytes at an address, as far as there is RAM.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.map.write(at, bytes);
    }

    /// # Panics
    /// When a device has written where there is no RAM.
    pub fn check(&self) {
        for slice in self.untouchable() {
            let mut bytes = [0; 0x1000];
            slice.read_at(0, &mut bytes);
            assert!(bytes == [CANARY; 0x1000], "a device has written ROM");
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}
