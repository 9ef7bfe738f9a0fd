//! The PC's own devices, wired up as on a board: their registers, the other ends of their lines, time, resets.

use std::sync::Arc;

use chipset::{
    AcpiPm, CmosConfig, DebugConsole, DmaPages, FwCfg, GenericEvents, Hpet, HpetPins, I8042,
    InterruptPins, IoApic, Pic, Pit, PvPanic, ResetControl, Rtc, Serial, serial::PC_PORTS,
};
use device_model::{CharEvent, Device, IoBus, IoRegion, IrqPin, ResetKind, WakeCause};
use guest_clock::GuestClock;

use crate::input::Input;
use crate::registers::{Ends, FarEnd, Memory, access};

/// More calls of timers than this for one step of time is a timer that is always due.
const MOST_CALLS: usize = 1000;

struct Board {
    ports: IoBus,
    memory_space: IoBus,
    memory: Memory,
    clock: GuestClock,
    line: Arc<FarEnd>,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
    pins: InterruptPins,
    pm: Arc<AcpiPm>,
    keyboard: Arc<I8042>,
    events: Arc<GenericEvents>,
    fw_cfg: Arc<FwCfg>,
    rtc: Arc<Rtc>,
    devices: Vec<Arc<dyn Device>>,
    _regions: Vec<IoRegion>,
}

const PLACES: &str = "the devices have places of their own";

impl Board {
    fn new() -> Self {
        let (ports, memory_space) = (IoBus::ports(), IoBus::memory());
        let (memory, clock) = (Memory::new(), GuestClock::stepped());
        let (ends, line) = (Arc::new(Ends::default()), Arc::new(FarEnd::default()));
        let pic = Pic::new(IrqPin::new(ends.clone(), 0).line());
        let ioapic = IoApic::new(ends.clone());
        let pins = InterruptPins::new(&pic, &ioapic);
        let isa = |n: usize| pins.isa[n].line();
        let pit = Pit::new(clock.clone(), isa(0));
        let config = CmosConfig {
            cpus: 2,
            ..CmosConfig::default()
        };
        let rtc = Rtc::new(clock.clone(), isa(8), config);
        let hpet = hpet(&clock, &pins, &ends, &pit, &rtc);
        let pm = AcpiPm::new(clock.clone(), ports.clone(), isa(9), ends.clone());
        pm.set_base(Some(0x600));
        let keyboard = I8042::new(isa(1), isa(12), ends.clone());
        let serial = Serial::new("serial", isa(4), line.clone());
        let fw_cfg = FwCfg::new(memory.map.clone());
        fw_cfg.add_file("opt/file", vec![7; 5000]).expect("a name");
        let panic = PvPanic::new(ends.clone());
        let console = DebugConsole::new(line.clone());
        let (pages, reset) = (DmaPages::new(), ResetControl::new(ends.clone()));
        let events = GenericEvents::new(pins.gsi[20].line(), ends.clone());
        let mut regions = vec![
            serial.attach(&ports, PC_PORTS[0].0).expect(PLACES),
            rtc.attach(&ports).expect(PLACES),
            pm.attach().expect(PLACES),
            panic.attach(&ports).expect(PLACES),
            console.attach(&ports).expect(PLACES),
            pages.attach(&ports).expect(PLACES),
            ports.add(0xcf9, 1, "reset", reset.clone()).expect(PLACES),
            hpet.attach(&memory_space).expect(PLACES),
            ioapic.attach(&memory_space).expect(PLACES),
            events.attach(&memory_space, 0xd000_0000).expect(PLACES),
        ];
        for more in [
            pic.attach(&ports),
            pit.attach(&ports),
            keyboard.attach(&ports),
            fw_cfg.attach(&ports),
        ] {
            regions.extend(more.expect(PLACES));
        }
        let devices: Vec<Arc<dyn Device>> = vec![
            pit,
            rtc.clone(),
            hpet,
            pm.clone(),
            keyboard.clone(),
            serial,
            fw_cfg.clone(),
            panic,
            console,
            pages,
            reset,
            events.clone(),
            pic.clone(),
            ioapic.clone(),
        ];
        Self {
            ports,
            memory_space,
            memory,
            clock,
            line,
            pic,
            ioapic,
            pins,
            pm,
            keyboard,
            events,
            fw_cfg,
            rtc,
            devices,
            _regions: regions,
        }
    }

    /// What comes from the other side: input, buttons, other devices' interrupts, the processor's acknowledgements.
    fn outside(&self, input: &mut Input<'_>) {
        match input.below(16) {
            0 => self.line.set_room(input.byte().into()),
            1 => {
                if let Some(serial) = self.line.frontend() {
                    let count = usize::from(input.byte() & 31);
                    serial.receive(input.bytes(count));
                }
            }
            2 => {
                if let Some(serial) = self.line.frontend() {
                    serial.writable();
                    serial.event(input.pick(&[
                        CharEvent::Opened,
                        CharEvent::Closed,
                        CharEvent::Break,
                    ]));
                }
            }
            3 => drop(self.pic.acknowledge()),
            4 => self.ioapic.end_of_interrupt(input.byte()),
            5 => {
                let line = self.pins.isa[input.below(16) as usize].line();
                line.set(true);
                self.pic.acknowledge();
            }
            6 => self.pins.gsi[input.below(24) as usize].line().pulse(),
            7 => {
                self.pm.press_power_button();
                self.events.press_power_button();
            }
            8 => self.pm.raise_event(input.byte()),
            9 => self.pm.note_wake(input.pick(&[
                WakeCause::Rtc,
                WakeCause::PowerButton,
                WakeCause::GeneralPurposeEvent,
                WakeCause::Other,
            ])),
            10 => {
                let base = input.one_in(4).then(|| input.word(2) as u16);
                self.pm.set_base(base);
            }
            11 => {
                let count = usize::from(input.byte() & 7);
                self.keyboard.key(input.bytes(count));
                self.keyboard.leds();
            }
            12 => {
                let moved = std::array::from_fn(|_| input.number() as i32);
                self.keyboard.mouse(moved, input.byte());
            }
            13 => self.rtc.set_memory(input.byte(), input.byte()),
            14 => {
                // A descriptor for fw_cfg's DMA, with what it may say.
                let mut descriptor = Vec::new();
                descriptor.extend((input.number() as u32).to_be_bytes());
                descriptor.extend((input.number() as u32).to_be_bytes());
                descriptor.extend(input.number().to_be_bytes());
                let at = input.below(0x12_0000);
                self.memory.put(at, &descriptor);
                self.ports.write(0x514, &at.to_be_bytes());
            }
            _ => {
                let content = vec![1; input.word(2) as usize];
                let _ = self.fw_cfg.add_file("opt/other", content);
            }
        }
    }

    fn step(&self, regions: &[Vec<(u64, u64, String)>; 2], input: &mut Input<'_>) {
        match input.byte() {
            0..144 => {
                access(&self.ports, &regions[0], input);
            }
            144..192 => {
                access(&self.memory_space, &regions[1], input);
            }
            192..224 => self.outside(input),
            224..252 => {
                // From a nanosecond to two years, now and then.
                let time = input.word(8) >> (8 + input.byte() % 56);
                let calls = self.clock.advance(time, MOST_CALLS);
                assert!(calls < MOST_CALLS, "a timer is always due");
            }
            252 => {
                self.devices[input.below(self.devices.len() as u64) as usize].reset(ResetKind::Warm)
            }
            _ => self.devices.iter().for_each(|d| d.reset(ResetKind::Cold)),
        }
    }
}

fn hpet(
    clock: &GuestClock,
    pins: &InterruptPins,
    ends: &Arc<Ends>,
    pit: &Arc<Pit>,
    rtc: &Arc<Rtc>,
) -> Arc<Hpet> {
    let wires = HpetPins {
        legacy: [pins.isa[0].clone(), pins.isa[8].clone()],
        gsi: pins.gsi.clone(),
    };
    let (pit, rtc) = (pit.clone(), rtc.clone());
    let legacy = Box::new(move |replaced| {
        pit.set_replaced(replaced);
        rtc.set_replaced(replaced);
    });
    Hpet::new(clock.clone(), wires, ends.clone(), legacy)
}

/// Random accesses, time and events. Nothing may panic or hang, and no timer may be due for ever.
pub fn registers(data: &[u8]) {
    let board = Board::new();
    let regions = [board.ports.regions(), board.memory_space.regions()];
    let mut input = Input::new(data);
    while input.more() {
        board.step(&regions, &mut input);
    }
    board.memory.check();
}
