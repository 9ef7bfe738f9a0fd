//! A machine's control socket.

#![allow(dead_code)] // each test binary uses a part of it

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use crate::machine::LIMIT;

/// A client of QMP.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came while an answer was waited for.
    events: VecDeque<serde_json::Value>,
}

impl Qmp {
    pub(crate) fn connect(socket: &std::path::Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
        };
        assert!(qmp.read()["QMP"].is_object());
        qmp.say(r#"{"execute":"qmp_capabilities"}"#);
        qmp
    }

    fn read(&mut self) -> serde_json::Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub(crate) fn say(&mut self, text: &str) -> serde_json::Value {
        writeln!(self.stream.get_mut(), "{text}").unwrap();
        loop {
            let answer = self.read();
            if answer.get("event").is_none() {
                return answer;
            }
            self.events.push_back(answer);
        }
    }

    /// The next event, whichever it is.
    pub(crate) fn next_event(&mut self) -> serde_json::Value {
        self.events.pop_front().unwrap_or_else(|| self.read())
    }

    /// Waits for an event.
    pub(crate) fn hear(&mut self, event: &str) -> serde_json::Value {
        loop {
            let message = self.next_event();
            if message["event"] == event {
                return message["data"].clone();
            }
        }
    }
}
