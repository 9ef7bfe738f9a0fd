//! The 8042 keyboard controller, with keyboard and mouse, and port 92h.
//!
//! IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".

use std::sync::Arc;

use device_model::{
    Device, IoBus, IoError, IoHandler, IoRegion, IrqLine, PowerControl, PowerEvent, ResetCause,
    ResetKind, Widths,
};
use parking_lot::Mutex;

use crate::ps2::{Keyboard, Mouse, translate};

/// Ports, commands and bits.
pub mod spec {
    /// Data port.
    pub const DATA: u64 = 0x60;
    /// Status (read) and command (write) port.
    pub const COMMAND: u64 = 0x64;
    /// System control port A.
    pub const PORT_92: u64 = 0x92;

    /// Status: the output buffer is full.
    pub const OBF: u8 = 0x01;
    /// Status: system flag.
    pub const SYS: u8 = 0x04;
    /// Status: the last write went to the command port.
    pub const CMD: u8 = 0x08;
    /// Status: the keyboard is not locked.
    pub const UNLOCKED: u8 = 0x10;
    /// Status: the byte in the output buffer is the mouse's.
    pub const AUX_OBF: u8 = 0x20;

    /// Command byte: keyboard interrupt.
    pub const MODE_KBD_INT: u8 = 0x01;
    /// Command byte: mouse interrupt.
    pub const MODE_AUX_INT: u8 = 0x02;
    /// Command byte: system flag.
    pub const MODE_SYS: u8 = 0x04;
    /// Command byte: the keyboard's clock is off.
    pub const MODE_KBD_OFF: u8 = 0x10;
    /// Command byte: the mouse's clock is off.
    pub const MODE_AUX_OFF: u8 = 0x20;
    /// Command byte: translate to scan code set 1.
    pub const MODE_TRANSLATE: u8 = 0x40;

    /// Output port: not reset.
    pub const OUT_NO_RESET: u8 = 0x01;
    /// Output port: A20 gate.
    pub const OUT_A20: u8 = 0x02;

    /// Output port: lines that are always high: the keyboard's and the mouse's data and clock.
    pub const OUT_ONES: u8 = 0xcc;

    /// Port 92h: fast reset.
    pub const PORT_92_RESET: u8 = 0x01;
    /// Port 92h: A20 gate.
    pub const PORT_92_A20: u8 = 0x02;
}
use spec::*;

/// What the next byte at the data port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Keyboard,
    Memory(u8),
    OutputPort,
    KeyboardOutput,
    AuxOutput,
    Mouse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Controller,
    Keyboard,
    Mouse,
}

/// Volatile guest state.
struct State {
    /// The controller's memory; byte 0 is the command byte.
    memory: [u8; 32],
    output_port: u8,
    last_was_command: bool,
    next: Next,
    /// The byte that the guest reads next.
    output: Option<(u8, Source)>,
    /// The last byte, which stays on the port.
    last_output: u8,
    /// The controller's own answers, which go before the devices' bytes.
    answer: Option<(u8, Source)>,
    keyboard: Keyboard,
    mouse: Mouse,
    /// A break prefix of scan code set 2 has been translated away.
    break_prefix: bool,
    port_92: u8,
}

impl State {
    fn new() -> Self {
        let mut memory = [0; 32];
        memory[0] = MODE_KBD_INT | MODE_AUX_INT | MODE_SYS | MODE_TRANSLATE;
        Self {
            memory,
            output_port: OUT_NO_RESET | OUT_A20,
            last_was_command: false,
            next: Next::Keyboard,
            output: None,
            last_output: 0,
            answer: None,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
            break_prefix: false,
            port_92: PORT_92_A20,
        }
    }

    fn mode(&self) -> u8 {
        self.memory[0]
    }

    /// Moves the next byte into the output buffer if that is empty.
    fn fill_output(&mut self) {
        if self.output.is_some() {
            return;
        }
        self.output = self.answer.take();
        if self.output.is_none() && self.mode() & MODE_KBD_OFF == 0 {
            self.output = self.keyboard_byte().map(|byte| (byte, Source::Keyboard));
        }
        if self.output.is_none() && self.mode() & MODE_AUX_OFF == 0 {
            self.output = self.mouse.queue.pop().map(|byte| (byte, Source::Mouse));
        }
    }

    fn keyboard_byte(&mut self) -> Option<u8> {
        while let Some(byte) = self.keyboard.queue.pop() {
            if self.mode() & MODE_TRANSLATE == 0 {
                return Some(byte);
            }
            if byte == 0xf0 {
                self.break_prefix = true;
                continue;
            }
            let released = if std::mem::take(&mut self.break_prefix) {
                0x80
            } else {
                0
            };
            return Some(translate(byte) | released);
        }
        None
    }

    fn status(&self) -> u8 {
        let full = match self.output {
            Some((_, Source::Mouse)) => OBF | AUX_OBF,
            Some(_) => OBF,
            None => 0,
        };
        full | self.mode() & MODE_SYS | if self.last_was_command { CMD } else { 0 } | UNLOCKED
    }
}

/// The controller.
pub struct I8042 {
    keyboard_irq: IrqLine,
    mouse_irq: IrqLine,
    power: Arc<dyn PowerControl>,
    state: Mutex<State>,
}

impl I8042 {
    /// The controller in its reset state. The lines are ISA interrupts 1 and 12.
    pub fn new(
        keyboard_irq: IrqLine,
        mouse_irq: IrqLine,
        power: Arc<dyn PowerControl>,
    ) -> Arc<Self> {
        Arc::new(Self {
            keyboard_irq,
            mouse_irq,
            power,
            state: Mutex::new(State::new()),
        })
    }

    /// Claims the ports 60h, 64h and 92h.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<Vec<IoRegion>, IoError> {
        let port = |part| {
            Arc::new(Port {
                controller: self.clone(),
                part,
            })
        };
        Ok(vec![
            ports.add(DATA, 1, "i8042 data", port(Part::Data))?,
            ports.add(COMMAND, 1, "i8042 command", port(Part::Command))?,
            ports.add(PORT_92, 1, "system control port A", port(Part::Control))?,
        ])
    }

    /// A key goes down or up: the bytes of its make or break code in scan code set 2. False when they are lost, because the guest
    /// does not listen.
    pub fn key(&self, scan_code: &[u8]) -> bool {
        let mut state = self.state.lock();
        let taken = state.keyboard.key(scan_code);
        self.sync(&mut state);
        taken
    }

    /// The mouse moves right, up and its wheel down by so many counts, with these buttons down (1 left, 2 right, 4 middle).
    pub fn mouse(&self, moved: [i32; 3], buttons: u8) {
        let mut state = self.state.lock();
        state.mouse.movement(moved, buttons);
        self.sync(&mut state);
    }

    /// The keyboard's lights: 1 scroll lock, 2 num lock, 4 caps lock.
    pub fn leds(&self) -> u8 {
        self.state.lock().keyboard.leds()
    }

    /// Drives the interrupts from the output buffer.
    fn sync(&self, state: &mut State) {
        state.fill_output();
        let mode = state.mode();
        let source = state.output.map(|(_, source)| source);
        let keyboard = matches!(source, Some(Source::Keyboard | Source::Controller));
        self.keyboard_irq.set(keyboard && mode & MODE_KBD_INT != 0);
        self.mouse_irq
            .set(source == Some(Source::Mouse) && mode & MODE_AUX_INT != 0);
    }

    fn command(&self, state: &mut State, command: u8) {
        state.last_was_command = true;
        state.next = Next::Keyboard;
        let mut answer = |byte| state.answer = Some((byte, Source::Controller));
        match command {
            0x20..=0x3f => {
                let byte = state.memory[usize::from(command & 0x1f)];
                answer(byte);
            }
            0x60..=0x7f => state.next = Next::Memory(command & 0x1f),
            0xa7 => state.memory[0] |= MODE_AUX_OFF,
            0xa8 => state.memory[0] &= !MODE_AUX_OFF,
            0xa9 | 0xab => answer(0), // both interfaces test good
            0xaa => {
                state.memory[0] |= MODE_SYS;
                state.answer = Some((0x55, Source::Controller));
            }
            0xad => state.memory[0] |= MODE_KBD_OFF,
            0xae => state.memory[0] &= !MODE_KBD_OFF,
            0xc0 => answer(0x80), // not locked
            0xd0 => {
                let byte = state.output_port | OUT_ONES;
                answer(byte);
            }
            0xd1 => state.next = Next::OutputPort,
            0xd2 => state.next = Next::KeyboardOutput,
            0xd3 => state.next = Next::AuxOutput,
            0xd4 => state.next = Next::Mouse,
            0xdd => self.write_output_port(state, state.output_port & !OUT_A20),
            0xdf => self.write_output_port(state, state.output_port | OUT_A20),
            0xe0 => answer(0),
            // Pulses the output lines whose bits are zero: line 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => self.request_reset(ResetCause::KeyboardController),
            _ => {}
        }
    }

    fn data(&self, state: &mut State, byte: u8) {
        state.last_was_command = false;
        match std::mem::replace(&mut state.next, Next::Keyboard) {
            Next::Keyboard => {
                // Talking to the keyboard turns its clock on.
                state.memory[0] &= !MODE_KBD_OFF;
                state.keyboard.command(byte);
            }
            Next::Memory(at) => state.memory[usize::from(at & 0x1f)] = byte,
            Next::OutputPort => self.write_output_port(state, byte),
            Next::KeyboardOutput => state.answer = Some((byte, Source::Keyboard)),
            Next::AuxOutput => state.answer = Some((byte, Source::Mouse)),
            Next::Mouse => {
                state.memory[0] &= !MODE_AUX_OFF;
                state.mouse.command(byte);
            }
        }
    }

    fn write_output_port(&self, state: &mut State, value: u8) {
        state.output_port = value;
        // There is one A20 gate; whoever wrote last has set it, and both ports show it.
        let gate = if value & OUT_A20 != 0 { PORT_92_A20 } else { 0 };
        state.port_92 = state.port_92 & !PORT_92_A20 | gate;
        if value & OUT_NO_RESET == 0 {
            self.request_reset(ResetCause::KeyboardController);
        }
    }

    fn write_port_92(&self, state: &mut State, value: u8) {
        let rises = value & !state.port_92 & PORT_92_RESET != 0;
        state.port_92 = value & (PORT_92_A20 | PORT_92_RESET);
        let gate = if value & PORT_92_A20 != 0 { OUT_A20 } else { 0 };
        state.output_port = state.output_port & !OUT_A20 | gate;
        if rises {
            self.request_reset(ResetCause::FastA20);
        }
    }

    fn request_reset(&self, cause: ResetCause) {
        self.power.request(PowerEvent::Reset(cause));
    }
}

impl Device for I8042 {
    fn name(&self) -> String {
        "i8042".into()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut state = self.state.lock();
        *state = State::new();
        self.sync(&mut state);
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    Data,
    Command,
    Control,
}

struct Port {
    controller: Arc<I8042>,
    part: Part,
}

impl IoHandler for Port {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        let mut state = self.controller.state.lock();
        let value = match self.part {
            Part::Data => {
                if let Some((byte, _)) = state.output.take() {
                    state.last_output = byte;
                    // The interrupt falls between two bytes, so that each has its edge.
                    self.controller.keyboard_irq.set(false);
                    self.controller.mouse_irq.set(false);
                }
                state.last_output
            }
            Part::Command => state.status(),
            Part::Control => state.port_92,
        };
        data.fill(value);
        self.controller.sync(&mut state);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut state = self.controller.state.lock();
        match self.part {
            Part::Data => self.controller.data(&mut state, *value),
            Part::Command => self.controller.command(&mut state, *value),
            Part::Control => self.controller.write_port_92(&mut state, *value),
        }
        self.controller.sync(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, Recorder, smoke};

    struct Bench {
        ports: IoBus,
        lines: [Line; 2],
        power: Arc<Recorder>,
        controller: Arc<I8042>,
        _regions: Vec<IoRegion>,
    }

    fn bench() -> Bench {
        let ports = IoBus::ports();
        let lines = [Line::new(), Line::new()];
        let power = Arc::new(Recorder::default());
        let controller = I8042::new(lines[0].line(), lines[1].line(), power.clone());
        Bench {
            _regions: controller.attach(&ports).unwrap(),
            ports,
            lines,
            power,
            controller,
        }
    }

    impl Bench {
        fn put(&self, port: u64, value: u8) {
            self.ports.write(port, &[value]);
        }
        fn get(&self, port: u64) -> u8 {
            let mut data = [0];
            self.ports.read(port, &mut data);
            data[0]
        }
        fn drain(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.get(COMMAND) & OBF != 0 {
                bytes.push(self.get(DATA));
            }
            bytes
        }
    }

    #[test]
    fn linuxs_probe_finds_both_ports() {
        let b = bench();
        b.put(COMMAND, 0x20);
        assert_eq!(b.drain(), [0x47]);
        b.put(COMMAND, 0x60);
        b.put(DATA, 0x74); // interrupts and keyboard off
        b.put(COMMAND, 0xaa);
        assert_eq!(b.drain(), [0x55]);
        b.put(COMMAND, 0xd3);
        b.put(DATA, 0xa5);
        assert_eq!(b.get(COMMAND) & (OBF | AUX_OBF), OBF | AUX_OBF);
        assert_eq!(b.drain(), [0xa5]);
        b.put(COMMAND, 0xa9);
        assert_eq!(b.drain(), [0]);
        b.put(COMMAND, 0xa7);
        b.put(COMMAND, 0x20);
        assert_eq!(b.drain(), [0x74]);
        b.put(COMMAND, 0xa8);
        b.put(COMMAND, 0xd4);
        b.put(DATA, 0xff);
        assert_eq!(b.drain(), [0xfa, 0xaa, 0]);
    }

    #[test]
    fn keys_come_translated_with_an_interrupt_each() {
        let b = bench();
        assert!(b.controller.key(&[0x1c]));
        assert!(b.controller.key(&[0xf0, 0x1c]));
        assert!(b.lines[0].is_high());
        assert_eq!(b.get(DATA), 0x1e);
        assert!(b.lines[0].is_high());
        assert_eq!(b.get(DATA), 0x9e);
        assert!(!b.lines[0].is_high());
        assert_eq!(b.lines[0].edges(), 2);
        assert_eq!(b.get(COMMAND) & OBF, 0);
    }

    #[test]
    fn three_ways_to_reset() {
        let b = bench();
        b.put(COMMAND, 0xfe);
        b.put(COMMAND, 0xd1);
        b.put(DATA, 0xfe);
        b.put(PORT_92, 3);
        assert_eq!(
            *b.power.requests.lock(),
            [
                PowerEvent::Reset(ResetCause::KeyboardController),
                PowerEvent::Reset(ResetCause::KeyboardController),
                PowerEvent::Reset(ResetCause::FastA20),
            ]
        );
    }

    #[test]
    fn both_ports_show_the_one_a20_gate() {
        let b = bench();
        let output_port = || {
            b.put(COMMAND, 0xd0);
            b.get(DATA) & OUT_A20
        };
        assert_eq!((output_port(), b.get(PORT_92)), (OUT_A20, PORT_92_A20));
        b.put(PORT_92, 0);
        assert_eq!((output_port(), b.get(PORT_92)), (0, 0));
        b.put(COMMAND, 0xdf);
        assert_eq!((output_port(), b.get(PORT_92)), (OUT_A20, PORT_92_A20));
        b.put(COMMAND, 0xd1);
        b.put(DATA, OUT_NO_RESET);
        assert_eq!((output_port(), b.get(PORT_92)), (0, 0));
        assert!(b.power.requests.lock().is_empty());
    }

    #[test]
    fn any_traffic_is_survived_and_reset_undoes_it() {
        let b = bench();
        for part in [Part::Data, Part::Command, Part::Control, Part::Data] {
            let port = Port {
                controller: b.controller.clone(),
                part,
            };
            smoke(&port, 1, &[1], 5000);
        }
        b.controller.reset(ResetKind::Cold);
        assert!(!b.lines[0].is_high() && !b.lines[1].is_high());
        assert_eq!((b.get(COMMAND), b.get(PORT_92)), (0x14, 2));
    }
}
