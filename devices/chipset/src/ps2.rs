//! PS/2 keyboard and mouse, as seen from their controller.
//!
//! IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device"; Microsoft's wheel
//! extension ("IntelliMouse").

use std::collections::VecDeque;

/// Commands and answers on the wire.
pub mod spec {
    /// Acknowledge.
    pub const ACK: u8 = 0xfa;
    /// Say it again.
    pub const RESEND: u8 = 0xfe;
    /// Self-test passed.
    pub const TEST_PASSED: u8 = 0xaa;
    /// Keyboard: set the lights; a byte follows.
    pub const SET_LEDS: u8 = 0xed;
    /// Keyboard: answer with the same byte.
    pub const ECHO: u8 = 0xee;
    /// Keyboard: get or set the scan code set; a byte follows.
    pub const SCAN_CODE_SET: u8 = 0xf0;
    /// Identify yourself.
    pub const IDENTIFY: u8 = 0xf2;
    /// Keyboard: set the typematic rate; mouse: the sample rate. A byte follows.
    pub const SET_RATE: u8 = 0xf3;
    /// Send keys or movements.
    pub const ENABLE: u8 = 0xf4;
    /// Don't.
    pub const DISABLE: u8 = 0xf5;
    /// Default settings.
    pub const SET_DEFAULTS: u8 = 0xf6;
    /// Reset with self-test.
    pub const RESET: u8 = 0xff;
    /// Mouse: scaling one to one.
    pub const SCALE_1_1: u8 = 0xe6;
    /// Mouse: scaling two to one.
    pub const SCALE_2_1: u8 = 0xe7;
    /// Mouse: set the resolution; a byte follows.
    pub const SET_RESOLUTION: u8 = 0xe8;
    /// Mouse: status request.
    pub const GET_STATUS: u8 = 0xe9;
    /// Mouse: stream mode.
    pub const STREAM: u8 = 0xea;
    /// Mouse: read a packet.
    pub const READ_PACKET: u8 = 0xeb;
    /// Mouse: leave wrap mode.
    pub const UNWRAP: u8 = 0xec;
    /// Mouse: wrap mode: echo everything.
    pub const WRAP: u8 = 0xee;
    /// Mouse: remote mode.
    pub const REMOTE: u8 = 0xf0;
}
use spec::*;

/// Bytes that a device keeps for a guest that does not fetch them.
const QUEUE: usize = 256;

/// Bytes on their way to the controller. Answers always fit; what a person does is lost when there are too many.
#[derive(Debug, Clone, Default)]
pub(crate) struct Queue(VecDeque<u8>);

impl Queue {
    fn answer(&mut self, bytes: &[u8]) {
        // A guest that sends commands without reading answers gets the latest ones.
        while self.0.len() + bytes.len() > 2 * QUEUE {
            self.0.pop_front();
        }
        self.0.extend(bytes);
    }

    /// Queues a whole event, or nothing of it.
    fn event(&mut self, bytes: &[u8]) -> bool {
        let fits = self.0.len() + bytes.len() <= QUEUE;
        if fits {
            self.0.extend(bytes);
        }
        fits
    }

    pub(crate) fn pop(&mut self) -> Option<u8> {
        self.0.pop_front()
    }
}

/// A keyboard with scan code set 2 (or 1, if the guest says so).
#[derive(Debug, Clone)]
pub(crate) struct Keyboard {
    pub(crate) queue: Queue,
    scanning: bool,
    set: u8,
    leds: u8,
    /// A command that waits for its byte.
    waiting: Option<u8>,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            queue: Queue::default(),
            scanning: true,
            set: 2,
            leds: 0,
            waiting: None,
        }
    }
}

impl Keyboard {
    pub(crate) fn leds(&self) -> u8 {
        self.leds
    }

    /// Queues the bytes of a key's make or break code.
    pub(crate) fn key(&mut self, scan_code: &[u8]) -> bool {
        self.scanning && self.queue.event(scan_code)
    }

    pub(crate) fn command(&mut self, byte: u8) {
        if let Some(command) = self.waiting.take() {
            self.parameter(command, byte);
            return;
        }
        match byte {
            ECHO => self.queue.answer(&[ECHO]),
            IDENTIFY => self.queue.answer(&[ACK, 0xab, 0x83]),
            SET_LEDS | SCAN_CODE_SET | SET_RATE => {
                self.waiting = Some(byte);
                self.queue.answer(&[ACK]);
            }
            ENABLE => {
                self.scanning = true;
                self.queue.answer(&[ACK]);
            }
            DISABLE | SET_DEFAULTS => {
                *self = Self {
                    queue: std::mem::take(&mut self.queue),
                    leds: self.leds,
                    scanning: byte != DISABLE,
                    ..Self::default()
                };
                self.queue.answer(&[ACK]);
            }
            RESET => {
                *self = Self::default();
                self.queue.answer(&[ACK, TEST_PASSED]);
            }
            // Key types of scan code set 3: taken, without effect on set 2.
            0xf7..=0xfa => self.queue.answer(&[ACK]),
            _ => self.queue.answer(&[RESEND]),
        }
    }

    fn parameter(&mut self, command: u8, byte: u8) {
        match (command, byte) {
            (SET_LEDS, _) => self.leds = byte & 7,
            (SCAN_CODE_SET, 0) => {
                self.queue.answer(&[ACK, self.set]);
                return;
            }
            (SCAN_CODE_SET, 1..=3) => self.set = byte,
            (SCAN_CODE_SET, _) => {
                self.queue.answer(&[RESEND]);
                return;
            }
            _ => {}
        }
        self.queue.answer(&[ACK]);
    }
}

/// A mouse with three buttons, and a wheel for guests that ask for it.
#[derive(Debug, Clone)]
pub(crate) struct Mouse {
    pub(crate) queue: Queue,
    reporting: bool,
    remote: bool,
    wrap: bool,
    double_scale: bool,
    resolution: u8,
    rate: u8,
    /// The last three sample rates: 200, 100, 80 asks for the wheel.
    knock: [u8; 3],
    wheel: bool,
    buttons: u8,
    /// Movement that has not been reported: right, up, wheel down.
    moved: [i32; 3],
    waiting: Option<u8>,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            queue: Queue::default(),
            reporting: false,
            remote: false,
            wrap: false,
            double_scale: false,
            resolution: 2,
            rate: 100,
            knock: [0; 3],
            wheel: false,
            buttons: 0,
            moved: [0; 3],
            waiting: None,
        }
    }
}

impl Mouse {
    /// Takes a movement (right, up, wheel down) and the buttons that are down now (1 left, 2 right, 4 middle).
    pub(crate) fn movement(&mut self, moved: [i32; 3], buttons: u8) {
        for (sum, more) in self.moved.iter_mut().zip(moved) {
            *sum = sum.saturating_add(more);
        }
        self.buttons = buttons & 7;
        if self.reporting && !self.remote {
            let packet = self.packet();
            self.queue.event(&packet);
        }
    }

    /// Takes as much of the movement as fits into a packet.
    fn packet(&mut self) -> Vec<u8> {
        let mut take = |n: usize, limit: i32| {
            let part = self.moved[n].clamp(-limit, limit);
            self.moved[n] -= part;
            part
        };
        let (x, y) = (take(0, 255), take(1, 255));
        let z = if self.wheel { take(2, 7) } else { 0 };
        let signs = u8::from(x < 0) << 4 | u8::from(y < 0) << 5;
        let mut packet = vec![0x08 | self.buttons | signs, x as u8, y as u8];
        if self.wheel {
            packet.push(z as u8);
        }
        packet
    }

    pub(crate) fn command(&mut self, byte: u8) {
        if self.wrap && byte != UNWRAP && byte != RESET {
            self.queue.answer(&[byte]);
            return;
        }
        if let Some(command) = self.waiting.take() {
            self.parameter(command, byte);
            return;
        }
        match byte {
            SCALE_1_1 => self.double_scale = false,
            SCALE_2_1 => self.double_scale = true,
            SET_RESOLUTION | SET_RATE => self.waiting = Some(byte),
            GET_STATUS => {
                let flags = self.buttons
                    | u8::from(self.remote) << 6
                    | u8::from(self.reporting) << 5
                    | u8::from(self.double_scale) << 4;
                self.queue.answer(&[ACK, flags, self.resolution, self.rate]);
                return;
            }
            STREAM => self.remote = false,
            REMOTE => self.remote = true,
            UNWRAP => self.wrap = false,
            WRAP => self.wrap = true,
            READ_PACKET => {
                let packet = self.packet();
                self.queue.answer(&[ACK]);
                self.queue.answer(&packet);
                return;
            }
            IDENTIFY => {
                self.queue.answer(&[ACK, if self.wheel { 3 } else { 0 }]);
                return;
            }
            ENABLE => self.reporting = true,
            DISABLE => self.reporting = false,
            SET_DEFAULTS => {
                *self = Self {
                    queue: std::mem::take(&mut self.queue),
                    wheel: self.wheel,
                    buttons: self.buttons,
                    ..Self::default()
                };
            }
            RESET => {
                *self = Self::default();
                self.queue.answer(&[ACK, TEST_PASSED, 0]);
                return;
            }
            _ => {
                self.queue.answer(&[RESEND]);
                return;
            }
        }
        self.queue.answer(&[ACK]);
    }

    fn parameter(&mut self, command: u8, byte: u8) {
        if command == SET_RESOLUTION {
            self.resolution = byte & 3;
        } else {
            self.rate = byte;
            self.knock.rotate_left(1);
            self.knock[2] = byte;
            if self.knock == [200, 100, 80] {
                self.wheel = true;
            }
        }
        self.queue.answer(&[ACK]);
    }
}

/// Translates a byte of scan code set 2 to set 1, as the controller does for PC software. Break prefixes are the caller's.
pub(crate) fn translate(code: u8) -> u8 {
    const TABLE: [u8; 132] = [
        0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29,
        0x59, 0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11,
        0x03, 0x5b, 0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14,
        0x13, 0x06, 0x5d, 0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24,
        0x16, 0x08, 0x09, 0x5f, 0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35,
        0x26, 0x27, 0x19, 0x0c, 0x61, 0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36,
        0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, 0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c,
        0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, 0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45,
        0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54, 0x80, 0x81, 0x82, 0x41,
    ];
    TABLE.get(usize::from(code)).copied().unwrap_or(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(queue: &mut Queue) -> Vec<u8> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn the_keyboard_answers_what_drivers_ask() {
        let mut keyboard = Keyboard::default();
        for byte in [
            RESET,
            IDENTIFY,
            SET_LEDS,
            0x05,
            SCAN_CODE_SET,
            0,
            ECHO,
            0x12,
        ] {
            keyboard.command(byte);
        }
        assert_eq!(
            drain(&mut keyboard.queue),
            [
                ACK,
                TEST_PASSED,
                ACK,
                0xab,
                0x83,
                ACK,
                ACK,
                ACK,
                ACK,
                2,
                ECHO,
                RESEND
            ]
        );
        assert_eq!(keyboard.leds(), 5);
        keyboard.command(DISABLE);
        assert!(!keyboard.key(&[0x1c]));
    }

    #[test]
    fn the_mouse_learns_to_use_its_wheel() {
        let mut mouse = Mouse::default();
        for byte in [SET_RATE, 200, SET_RATE, 100, SET_RATE, 80, IDENTIFY, ENABLE] {
            mouse.command(byte);
        }
        assert_eq!(drain(&mut mouse.queue)[6..], [ACK, 3, ACK]);
        mouse.movement([-3, 300, 1], 1);
        assert_eq!(drain(&mut mouse.queue), [0x19, 0xfd, 0xff, 1]);
        mouse.movement([0, 0, 0], 0);
        assert_eq!(drain(&mut mouse.queue), [0x08, 0, 45, 0]);
    }

    #[test]
    fn codes_are_translated() {
        assert_eq!(translate(0x1c), 0x1e); // A
        assert_eq!(translate(0x76), 0x01); // escape
        assert_eq!(translate(0x5a), 0x1c); // enter
        assert_eq!(translate(0xe0), 0xe0);
    }
}
