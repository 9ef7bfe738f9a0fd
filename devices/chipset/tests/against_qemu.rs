//! The same register accesses on our devices and on QEMU's, through QEMU's test protocol, with the same answers.
//!
//! QEMU's machine stands still (`-S`) so that no time passes there either. Without QEMU on the host there is nothing to compare with
//! and the tests say so.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Duration;

use chipset::*;
use device_model::{
    CharBackend, CharFrontend, IoBus, IoRegion, IrqLine, IrqPin, IrqSink, MsiSink, PowerControl,
    PowerEvent,
};
use guest_clock::GuestClock;
use guest_memory::GuestMemory;

struct Nothing;
impl IrqSink for Nothing {
    fn set_level(&self, _pin: u32, _high: bool) {}
}
impl MsiSink for Nothing {
    fn send(&self, _address: u64, _data: u32) {}
}
impl PowerControl for Nothing {
    fn request(&self, _event: PowerEvent) {}
}
impl CharBackend for Nothing {
    fn connect(&self, _frontend: Weak<dyn CharFrontend>) {}
    fn write(&self, data: &[u8]) -> usize {
        data.len()
    }
    fn accept_input(&self) {}
    fn is_open(&self) -> bool {
        true
    }
    fn drain(&self, _at_most: Duration) {}
}

/// QEMU with a stopped Q35 machine.
struct Qemu {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Qemu {
    fn start() -> Option<Self> {
        let child = Command::new("qemu-system-x86_64")
            .args("-M q35 -S -m 256 -display none -nodefaults -serial null -qtest stdio".split(' '))
            .args(["-qtest-log", "none", "-device", "pvpanic"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            eprintln!("no qemu-system-x86_64 here: nothing to compare with");
            return None;
        };
        let to = child.stdin.take()?;
        let from = BufReader::new(child.stdout.take()?);
        Some(Self { child, to, from })
    }

    fn ask(&mut self, command: &str) -> u64 {
        writeln!(self.to, "{command}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("OK"), "{command}: {line}");
        let value = words.next().map(|w| w.trim_start_matches("0x"));
        value.map_or(0, |v| u64::from_str_radix(v, 16).unwrap())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both machines.
struct Pair {
    qemu: Qemu,
    ports: IoBus,
    memory: IoBus,
    history: Vec<String>,
    _regions: Vec<IoRegion>,
}

impl Pair {
    fn new() -> Option<Self> {
        let qemu = Qemu::start()?;
        let (ports, memory, clock) = (IoBus::ports(), IoBus::memory(), GuestClock::new());
        let nothing = Arc::new(Nothing);
        let pic = Pic::new(IrqLine::unconnected());
        let apic = IoApic::new(nothing.clone());
        let pins = InterruptPins::new(&pic, &apic);
        let pit = Pit::new(clock.clone(), IrqLine::unconnected());
        let rtc = Rtc::new(clock.clone(), IrqLine::unconnected(), CmosConfig::default());
        let hpet_pins = HpetPins {
            legacy: [pins.isa[0].clone(), pins.isa[8].clone()],
            gsi: (0..24).map(|n| IrqPin::new(nothing.clone(), n)).collect(),
        };
        let hpet = Hpet::new(clock.clone(), hpet_pins, nothing.clone(), Box::new(|_| {}));
        let line = IrqLine::unconnected;
        let keyboard = I8042::new(line(), line(), nothing.clone());
        let serial = Serial::new("serial0", line(), nothing.clone());
        let pm = AcpiPm::new(clock, ports.clone(), line(), nothing.clone());
        let fw_cfg = FwCfg::new(GuestMemory::new());
        let mut regions = vec![
            apic.attach(&memory).unwrap(),
            rtc.attach(&ports).unwrap(),
            hpet.attach(&memory).unwrap(),
            serial.attach(&ports, 0x3f8).unwrap(),
            pm.attach().unwrap(),
            PvPanic::new(nothing).attach(&ports).unwrap(),
        ];
        regions.extend(pic.attach(&ports).unwrap());
        regions.extend(pit.attach(&ports).unwrap());
        regions.extend(keyboard.attach(&ports).unwrap());
        regions.extend(fw_cfg.attach(&ports).unwrap());
        pm.set_base(Some(0x600));
        let mut pair = Self {
            qemu,
            ports,
            memory,
            history: Vec::new(),
            _regions: regions,
        };
        // QEMU's power management ports are where its LPC bridge (00:1f.0) is told to have them.
        for (address, value) in [(0x8000_f840u32, 0x601u32), (0x8000_f844, 0x80)] {
            pair.qemu.ask(&format!("outl 0xcf8 {address:#x}"));
            pair.qemu.ask(&format!("outl 0xcfc {value:#x}"));
        }
        Some(pair)
    }

    fn outb(&mut self, port: u64, value: u8) {
        let command = format!("outb {port:#x} {value:#x}");
        self.qemu.ask(&command);
        self.ports.write(port, &[value]);
        self.history.push(command);
    }

    fn out(&mut self, port: u64, size: usize, value: u64) {
        let letter = [' ', 'b', 'w', ' ', 'l'][size];
        let command = format!("out{letter} {port:#x} {value:#x}");
        self.qemu.ask(&command);
        self.ports.write(port, &value.to_le_bytes()[..size]);
        self.history.push(command);
    }

    fn inb(&mut self, port: u64) -> u8 {
        self.in_masked(port, 1, 0xff) as u8
    }

    /// Reads on both sides and compares the bits of `mask`.
    fn in_masked(&mut self, port: u64, size: usize, mask: u64) -> u64 {
        let letter = [' ', 'b', 'w', ' ', 'l'][size];
        let command = format!("in{letter} {port:#x}");
        let theirs = self.qemu.ask(&command);
        let mut data = [0; 8];
        self.ports.read(port, &mut data[..size]);
        let ours = u64::from_le_bytes(data);
        self.compare(command, ours & mask, theirs & mask);
        ours
    }

    fn writel(&mut self, address: u64, value: u32) {
        let command = format!("writel {address:#x} {value:#x}");
        self.qemu.ask(&command);
        self.memory.write(address, &value.to_le_bytes());
        self.history.push(command);
    }

    fn readl(&mut self, address: u64, mask: u32) {
        let command = format!("readl {address:#x}");
        let theirs = self.qemu.ask(&command) & u64::from(mask);
        let mut data = [0; 4];
        self.memory.read(address, &mut data);
        let ours = u64::from(u32::from_le_bytes(data) & mask);
        self.compare(command, ours, theirs);
    }

    fn compare(&mut self, command: String, ours: u64, theirs: u64) {
        let recent = self.history.len().saturating_sub(25);
        assert_eq!(
            ours,
            theirs,
            "{command}: ours {ours:#x}, QEMU's {theirs:#x}, after {:#?}",
            &self.history[recent..]
        );
        self.history.push(command);
    }
}

struct Numbers(u64);
impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn byte(&mut self) -> u8 {
        (self.next() >> 24) as u8
    }
}

#[test]
fn pic() {
    let Some(mut pair) = Pair::new() else { return };
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    pair.outb(0x43, 0x30); // the interval timer's output is low
    for port in [0x20, 0xa0] {
        pair.outb(port, 0x11);
        for value in [0x20, 0x02, 0x01] {
            pair.outb(port + 1, value);
        }
    }
    for _ in 0..3000 {
        let chip = if numbers.next() & 1 == 0 { 0x20 } else { 0xa0 };
        match numbers.next() % 8 {
            0 => pair.outb(chip + 1, numbers.byte()),
            1 => pair.outb(chip, numbers.byte() & !0x18),
            2 => pair.outb(chip, numbers.byte() & !0x14 | 0x08),
            3 => {
                // No ICW1 with ICW4 off or level mode: QEMU has no level mode.
                pair.outb(chip, 0x11);
                for _ in 0..3 {
                    pair.outb(chip + 1, numbers.byte());
                }
            }
            4 => pair.outb(0x4d0 + (numbers.next() & 1), numbers.byte()),
            _ => {}
        }
        for port in [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1] {
            pair.inb(port);
        }
    }
}

#[test]
fn ioapic() {
    let Some(mut pair) = Pair::new() else { return };
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    for index in 0..0x40 {
        pair.writel(0xfec0_0000, index);
        pair.readl(0xfec0_0010, u32::MAX);
    }
    for _ in 0..3000 {
        let index = (numbers.next() % 0x40) as u32;
        pair.writel(0xfec0_0000, index);
        // Masked, so that QEMU's stopped processor gets nothing.
        let value = numbers.next() as u32 | if index & 1 == 0 { 0x1_0000 } else { 0 };
        pair.writel(0xfec0_0010, value);
        // Reserved bits read back as written there.
        let mask = match index {
            0..=3 => u32::MAX,
            _ if index & 1 == 0 => 0x1_ffff,
            _ => 0xff00_0000,
        };
        pair.readl(0xfec0_0010, mask);
    }
}

#[test]
fn serial() {
    let Some(mut pair) = Pair::new() else { return };
    let mut numbers = Numbers(0xfeed_f00d_dead_beef);
    for round in 0..3000 {
        let offset = numbers.next() % 8;
        let value = match offset {
            // Loopback is compared below: there characters take time in QEMU.
            4 => numbers.byte() & 0x0f,
            _ => numbers.byte(),
        };
        if offset != 0 || round % 7 == 0 {
            pair.outb(0x3f8 + offset, value);
        }
        for offset in [1, 3, 4, 6, 7] {
            pair.inb(0x3f8 + offset);
        }
    }
    pair.outb(0x3fb, 3);
    pair.outb(0x3fc, 0x1a);
    pair.in_masked(0x3fe, 1, 0xf0);
}

#[test]
fn pit() {
    let Some(mut pair) = Pair::new() else { return };
    let mut numbers = Numbers(0x0bad_cafe_0bad_cafe);
    for _ in 0..1500 {
        let channel = numbers.next() % 3;
        let access = 1 + numbers.next() % 3;
        let mode = numbers.next() % 6;
        pair.outb(0x43, (channel << 6 | access << 4 | mode << 1) as u8);
        pair.outb(0x40 + channel, numbers.byte() | 8);
        if access == 3 {
            pair.outb(0x40 + channel, numbers.byte());
        }
        // Time stands still: the counter is where it was loaded, in the modes that count at once.
        pair.outb(0x43, 0xe0 | 2 << channel);
        pair.in_masked(0x40 + channel, 1, 0x3f);
        if channel != 2 && !matches!(mode, 1 | 5 | 3) {
            pair.outb(0x43, (channel << 6) as u8);
            pair.inb(0x40 + channel);
            if access == 3 {
                pair.inb(0x40 + channel);
            }
        }
    }
    pair.outb(0x61, 0xff);
    pair.in_masked(0x61, 1, 0x0f & !0x0c);
}

#[test]
fn hpet() {
    let Some(mut pair) = Pair::new() else { return };
    let mut numbers = Numbers(0x5555_aaaa_1234_4321);
    let base = 0xfed0_0000;
    pair.readl(base, u32::MAX);
    pair.readl(base + 4, u32::MAX);
    for _ in 0..1500 {
        let timer = numbers.next() % 3;
        let at = base + 0x100 + 0x20 * timer;
        // QEMU's has no messages unless asked for; interrupts stay off.
        pair.writel(at, numbers.next() as u32 & !0x4004);
        pair.readl(at, 0x7fff & !0x40);
        let value = numbers.next() as u32;
        pair.writel(base + 0xf0, value);
        pair.readl(base + 0xf0, u32::MAX);
        pair.writel(base + 0xf4, value ^ 0x55);
        pair.readl(base + 0xf4, u32::MAX);
    }
    // A one-shot comparator, in halves.
    pair.writel(base + 0x100, 0);
    for at in [0x108, 0x10c] {
        pair.writel(base + at, 0x1234_5678 + at as u32);
        pair.readl(base + at, u32::MAX);
    }
}

#[test]
fn rtc() {
    let Some(mut pair) = Pair::new() else { return };
    let mut numbers = Numbers(0x7777_8888_9999_aaaa);
    pair.outb(0x70, 0x0b);
    pair.outb(0x71, 0x82); // stopped, 24 hours, BCD
    for _ in 0..500 {
        for (index, limit) in [(0, 60), (2, 60), (4, 24), (7, 28), (8, 12), (9, 99)] {
            let plain = (numbers.next() % limit) as u8 + u8::from(index == 7 || index == 8);
            pair.outb(0x70, index);
            pair.outb(0x71, ((plain / 10) << 4) | (plain % 10));
        }
        for index in [0, 2, 4, 7, 8, 9, 10, 11, 13] {
            pair.outb(0x70, index);
            pair.inb(0x71);
        }
        let scratch = (0x40 + numbers.next() % 0x10) as u8;
        pair.outb(0x70, scratch);
        pair.outb(0x71, numbers.byte());
        pair.inb(0x71);
    }
}

#[test]
fn keyboard_controller() {
    let Some(mut pair) = Pair::new() else { return };
    // The state that firmware leaves.
    pair.outb(0x64, 0xaa);
    assert_eq!(pair.inb(0x60), 0x55);
    pair.outb(0x64, 0x60);
    pair.outb(0x60, 0x47);
    let drain = |pair: &mut Pair| {
        // QEMU's command/data flag never changes.
        while pair.in_masked(0x64, 1, !0x08) & 1 != 0 {
            pair.inb(0x60);
        }
    };
    for command in [
        0x20, 0xa7, 0x20, 0xa8, 0xa9, 0xab, 0xad, 0x20, 0xae, 0x20, 0xc0, 0xd0,
    ] {
        pair.outb(0x64, command);
        drain(&mut pair);
    }
    for byte in [
        0xff, 0xf2, 0xed, 0x02, 0xf0, 0x00, 0xf3, 0x20, 0xf5, 0xf4, 0xee, 0xf6,
    ] {
        pair.outb(0x60, byte);
        drain(&mut pair);
    }
    for byte in [
        0xff, 0xf2, 0xe9, 0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf2, 0xe8, 3, 0xe7, 0xe9, 0xf4, 0xe9,
        0xf5, 0xf6, 0xe9,
    ] {
        pair.outb(0x64, 0xd4);
        pair.outb(0x60, byte);
        drain(&mut pair);
    }
    for command in [0xd2, 0xd3] {
        pair.outb(0x64, command);
        pair.outb(0x60, 0xa5);
        drain(&mut pair);
    }
    pair.outb(0x92, 0x02);
    pair.inb(0x92);
}

#[test]
fn power_management() {
    let Some(mut pair) = Pair::new() else { return };
    let mut numbers = Numbers(0x2468_ace0_1357_9bdf);
    for _ in 0..500 {
        pair.out(0x602, 2, numbers.next() & 0x4521);
        pair.in_masked(0x602, 2, 0xffff);
        pair.out(0x628, 4, numbers.next() & 0xffff_ffff);
        pair.in_masked(0x628, 4, 0xffff_ffff);
        pair.out(0x620, 4, numbers.next() & 0xffff_ffff);
        pair.in_masked(0x620, 4, 0xffff_ffff);
    }
    for command in [2, 3, 2] {
        pair.outb(0xb2, command);
        pair.in_masked(0x604, 2, 1);
        pair.inb(0xb2);
    }
}

#[test]
fn firmware_configuration() {
    let Some(mut pair) = Pair::new() else { return };
    for key in [0u64, 1] {
        pair.out(0x510, 2, key);
        for _ in 0..6 {
            pair.inb(0x511);
        }
    }
    pair.in_masked(0x514, 4, 0xffff_ffff);
    pair.in_masked(0x518, 4, 0xffff_ffff);
    pair.in_masked(0x505, 1, 3);
}
