//! The pair of 8259A interrupt controllers, with the edge/level control registers of PCI chipsets.
//!
//! Intel 8259A datasheet (document 231468); ELCR: Intel ICH9 datasheet, section 13.4.13.

use std::sync::Arc;

use device_model::{
    Device, IoBus, IoError, IoHandler, IoRegion, IrqLine, IrqSink, ResetKind, Widths,
};
use parking_lot::Mutex;

/// Ports and bits.
pub mod spec {
    /// First port of the master.
    pub const MASTER_PORT: u64 = 0x20;
    /// First port of the slave.
    pub const SLAVE_PORT: u64 = 0xa0;
    /// First of the two edge/level control ports.
    pub const ELCR_PORT: u64 = 0x4d0;
    /// The master's input that the slave hangs on.
    pub const CASCADE: u8 = 2;
    /// ICW1: starts initialization.
    pub const ICW1: u8 = 0x10;
    /// ICW1: an ICW4 follows.
    pub const ICW1_IC4: u8 = 0x01;
    /// ICW1: single.
    pub const ICW1_SNGL: u8 = 0x02;
    /// ICW1: all inputs are level-triggered.
    pub const ICW1_LTIM: u8 = 0x08;
    /// ICW4: automatic end of interrupt.
    pub const ICW4_AEOI: u8 = 0x02;
    /// ICW4: special fully nested mode.
    pub const ICW4_SFNM: u8 = 0x10;
    /// Marks an OCW3.
    pub const OCW3: u8 = 0x08;
    /// OCW3: poll.
    pub const OCW3_POLL: u8 = 0x04;
    /// Inputs whose trigger mode the ELCR can set, master and slave.
    pub const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];
}
use spec::*;

/// What initialization waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// Volatile guest state of one controller.
#[derive(Debug, Clone, Default)]
struct Chip {
    /// Levels of the inputs.
    lines: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    elcr: u8,
    base: u8,
    /// The input with the highest priority.
    top: u8,
    init: Init,
    with_icw4: bool,
    single: bool,
    level: bool,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    auto_eoi: bool,
    rotate_auto_eoi: bool,
    nested: bool,
}

impl Chip {
    /// The set input of the highest priority, as a distance from the top.
    fn first(&self, inputs: u8) -> Option<u8> {
        (inputs != 0).then(|| inputs.rotate_right(u32::from(self.top)).trailing_zeros() as u8)
    }

    fn input(&self, distance: u8) -> u8 {
        (distance + self.top) & 7
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let level = self.level || self.elcr & bit != 0;
        let rises = high && self.lines & bit == 0;
        if rises || high && level {
            self.irr |= bit;
        } else if !high && level {
            self.irr &= !bit;
        }
        self.lines = self.lines & !bit | if high { bit } else { 0 };
    }

    /// The input whose request the processor should get, if any.
    fn request(&self, master: bool) -> Option<u8> {
        let wanted = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.nested && master {
            in_service &= !(1 << CASCADE);
        }
        match self.first(in_service) {
            Some(current) if current <= wanted => None,
            _ => Some(self.input(wanted)),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.auto_eoi {
            if self.rotate_auto_eoi {
                self.top = (input + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
        // A level-triggered request lasts as long as its line.
        if !(self.level || self.elcr & bit != 0) {
            self.irr &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            let level = value & ICW1_LTIM != 0;
            *self = Self {
                lines: self.lines,
                elcr: self.elcr,
                init: Init::Icw2,
                with_icw4: value & ICW1_IC4 != 0,
                single: value & ICW1_SNGL != 0,
                level,
                irr: self.lines & if level { 0xff } else { self.elcr },
                ..Self::default()
            };
        } else if value & OCW3 != 0 {
            self.poll = value & OCW3_POLL != 0;
            match value & 3 {
                2 => self.read_isr = false,
                3 => self.read_isr = true,
                _ => {}
            }
            match value >> 5 & 3 {
                2 => self.special_mask = false,
                3 => self.special_mask = true,
                _ => {}
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            0 => self.rotate_auto_eoi = false,
            4 => self.rotate_auto_eoi = true,
            // Non-specific end of interrupt, without and with rotation.
            command @ (1 | 5) => {
                if let Some(distance) = self.first(self.isr) {
                    let input = self.input(distance);
                    self.isr &= !(1 << input);
                    if command == 5 {
                        self.top = (input + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << named),
            6 => self.top = (named + 1) & 7,
            7 => {
                self.isr &= !(1 << named);
                self.top = (named + 1) & 7;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = match (self.single, self.with_icw4) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Done,
                };
            }
            Init::Icw3 => {
                self.init = if self.with_icw4 {
                    Init::Icw4
                } else {
                    Init::Done
                };
            }
            Init::Icw4 => {
                self.nested = value & ICW4_SFNM != 0;
                self.auto_eoi = value & ICW4_AEOI != 0;
                self.init = Init::Done;
            }
        }
    }

    /// The answer to a read after a poll command: takes the request.
    fn read_poll(&mut self, master: bool) -> u8 {
        self.poll = false;
        match self.request(master) {
            Some(input) => {
                self.acknowledge(input);
                0x80 | input
            }
            None => 0,
        }
    }

    fn read(&mut self, data_port: bool, master: bool) -> u8 {
        if self.poll {
            self.read_poll(master)
        } else if data_port {
            self.imr
        } else if self.read_isr {
            self.isr
        } else {
            self.irr
        }
    }
}

/// The pair. As an [`IrqSink`] it has inputs 0 to 15.
pub struct Pic {
    output: IrqLine,
    chips: Mutex<[Chip; 2]>,
}

impl Pic {
    /// The pair in its reset state. `output` goes to the processor's external interrupt input.
    pub fn new(output: IrqLine) -> Arc<Self> {
        Arc::new(Self {
            output,
            chips: Mutex::default(),
        })
    }

    /// Claims the ports 20h, 21h, A0h, A1h, 4D0h and 4D1h.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<Vec<IoRegion>, IoError> {
        let side = |part| {
            Arc::new(PicPorts {
                pic: self.clone(),
                part,
            })
        };
        Ok(vec![
            ports.add(MASTER_PORT, 2, "pic master", side(Part::Chip(0)))?,
            ports.add(SLAVE_PORT, 2, "pic slave", side(Part::Chip(1)))?,
            ports.add(ELCR_PORT, 2, "pic elcr", side(Part::Elcr))?,
        ])
    }

    /// Derives the cascade input and the output.
    fn sync(&self, chips: &mut [Chip; 2]) {
        let [master, slave] = chips;
        // The slave's output falls when its request is withdrawn and stays up from one request to the next, so the
        // request goes by its level.
        let bit = 1 << CASCADE;
        master.irr = master.irr & !bit
            | if slave.request(false).is_some() {
                bit
            } else {
                0
            };
        self.output.set(master.request(true).is_some());
    }

    /// The processor's acknowledge cycle: the vector of the request that it gets, or `None` when there is none any more.
    pub fn acknowledge(&self) -> Option<u8> {
        let mut chips = self.chips.lock();
        let [master, slave] = &mut *chips;
        let input = master.request(true)?;
        master.acknowledge(input);
        let vector = if input == CASCADE {
            // The slave answers with its lowest priority when the request has gone meanwhile.
            let below = slave.request(false);
            if let Some(input) = below {
                slave.acknowledge(input);
            }
            slave.base | below.unwrap_or(7)
        } else {
            master.base | input
        };
        self.sync(&mut chips);
        Some(vector)
    }
}

impl IrqSink for Pic {
    fn set_level(&self, pin: u32, high: bool) {
        let mut chips = self.chips.lock();
        if let Some(chip) = chips.get_mut(pin as usize / 8) {
            chip.set_line(pin as u8 % 8, high);
        }
        self.sync(&mut chips);
    }
}

impl Device for Pic {
    fn name(&self) -> String {
        "pic".into()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut chips = self.chips.lock();
        for chip in chips.iter_mut() {
            *chip = Chip {
                lines: chip.lines,
                ..Chip::default()
            };
        }
        self.sync(&mut chips);
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    Chip(usize),
    Elcr,
}

struct PicPorts {
    pic: Arc<Pic>,
    part: Part,
}

impl IoHandler for PicPorts {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut chips = self.pic.chips.lock();
        let value = match self.part {
            Part::Chip(n) => chips[n].read(offset & 1 != 0, n == 0),
            Part::Elcr => chips[offset as usize & 1].elcr,
        };
        data.fill(value);
        self.pic.sync(&mut chips);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut chips = self.pic.chips.lock();
        match self.part {
            Part::Chip(n) if offset & 1 == 0 => chips[n].write_command(*value),
            Part::Chip(n) => chips[n].write_data(*value),
            Part::Elcr => {
                let n = offset as usize & 1;
                chips[n].elcr = value & ELCR_WRITABLE[n];
                // A line that is high and has become level-triggered is a request.
                let requests = chips[n].lines & chips[n].elcr;
                chips[n].irr |= requests;
            }
        }
        self.pic.sync(&mut chips);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, smoke};

    fn pair() -> (Arc<Pic>, IoBus, Vec<IoRegion>, Line) {
        let line = Line::new();
        let pic = Pic::new(line.line());
        let ports = IoBus::ports();
        let regions = pic.attach(&ports).unwrap();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 2),
            (0xa1, 1),
        ] {
            ports.write(port, &[value]);
        }
        (pic, ports, regions, line)
    }

    fn get(ports: &IoBus, port: u64) -> u8 {
        let mut data = [0];
        ports.read(port, &mut data);
        data[0]
    }

    #[test]
    fn priorities_nest() {
        let (pic, ports, _r, line) = pair();
        pic.set_level(4, true);
        pic.set_level(4, false);
        assert!(line.is_high());
        assert_eq!(pic.acknowledge(), Some(0x34));
        assert!(!line.is_high());
        pic.set_level(7, true);
        assert!(!line.is_high());
        pic.set_level(1, true);
        assert_eq!(pic.acknowledge(), Some(0x31));
        ports.write(0x20, &[0x20]);
        ports.write(0x20, &[0x0b]);
        assert_eq!(get(&ports, 0x20), 0x10);
        ports.write(0x20, &[0x20]);
        assert_eq!(pic.acknowledge(), Some(0x37));
        assert_eq!(pic.acknowledge(), None);
    }

    #[test]
    fn the_slave_answers_through_the_cascade() {
        let (pic, ports, _r, line) = pair();
        pic.set_level(10, true);
        assert!(line.is_high());
        assert_eq!(pic.acknowledge(), Some(0x3a));
        ports.write(0xa0, &[0x62]);
        ports.write(0x20, &[0x62]);
        assert!(!line.is_high()); // an edge
        ports.write(0x4d1, &[0xff]);
        assert_eq!(get(&ports, 0x4d1), 0xde);
        assert!(line.is_high()); // a level
        pic.set_level(10, false);
        assert!(!line.is_high());
    }

    #[test]
    fn masks_hold_back() {
        let (pic, ports, _r, line) = pair();
        ports.write(0x21, &[0xff]);
        pic.set_level(0, true);
        assert!(!line.is_high());
        assert_eq!(get(&ports, 0x20), 1);
        ports.write(0x21, &[0xfe]);
        assert!(line.is_high());
        ports.write(0x20, &[0x0c]);
        assert_eq!(get(&ports, 0x20), 0x80);
        assert!(!line.is_high());
    }

    #[test]
    fn any_traffic_is_survived() {
        let (pic, ports, _r, line) = pair();
        for part in [Part::Chip(0), Part::Chip(1), Part::Elcr] {
            let pic = pic.clone();
            smoke(&PicPorts { pic, part }, 2, &[1], 5000);
            while line.is_high() && pic_acknowledge_ends(&ports) {}
        }
        pic.reset(ResetKind::Cold);
        assert!(!line.is_high());
        assert_eq!((get(&ports, 0x21), get(&ports, 0x4d0)), (0, 0));
    }

    fn pic_acknowledge_ends(ports: &IoBus) -> bool {
        ports.write(0x21, &[0xff]);
        false
    }
}
