//! The keys of a terminal that are not the guest's: Ctrl-A and one more.

const ESCAPE: u8 = 0x01;
/// What Ctrl-A H shows.
pub(crate) const HELP: &str = "\r\n\
    Ctrl-A X       end the machine\r\n\
    Ctrl-A B       send a break\r\n\
    Ctrl-A H       this help\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A\r\n";

/// What the keys ask for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// For the guest.
    Input(Vec<u8>),
    /// End the machine.
    Quit,
    /// Send a break.
    Break,
    /// Show the help.
    Help,
}

/// Splits what is typed.
#[derive(Debug, Default)]
pub(crate) struct Menu {
    escaped: bool,
}

impl Menu {
    pub(crate) fn typed(&mut self, bytes: &[u8]) -> Vec<Key> {
        let mut keys = Vec::new();
        let mut input = Vec::new();
        for &byte in bytes {
            if !self.escaped {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    input.push(byte);
                }
                continue;
            }
            self.escaped = false;
            let key = match byte {
                b'x' | b'X' => Key::Quit,
                b'b' | b'B' => Key::Break,
                b'h' | b'H' | b'?' => Key::Help,
                ESCAPE => {
                    input.push(ESCAPE);
                    continue;
                }
                _ => continue,
            };
            if !input.is_empty() {
                keys.push(Key::Input(std::mem::take(&mut input)));
            }
            keys.push(key);
        }
        if !input.is_empty() {
            keys.push(Key::Input(input));
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_may_come_in_pieces() {
        let mut menu = Menu::default();
        let input = |text: &[u8]| Key::Input(text.to_vec());
        assert_eq!(menu.typed(b"ab\x01"), [input(b"ab")]);
        assert_eq!(menu.typed(b"xcd"), [Key::Quit, input(b"cd")]);
        assert_eq!(
            menu.typed(b"\x01\x01\x01h\x01q\x01b"),
            [input(b"\x01"), Key::Help, Key::Break]
        );
    }
}
