//! One client's conversation.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::commands::{Control, Refusal, Request, Session, version};

/// How long an answer may take to be sent when the server ends.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most bytes of one request.
const MAX_REQUEST: usize = 16 << 20;

/// Takes requests out of a stream of bytes, in which they need not be separated.
#[derive(Default)]
pub(crate) struct Input {
    bytes: Vec<u8>,
}

impl Input {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// The next whole value, or what is wrong with it; `None` when more bytes are needed.
    pub(crate) fn next(&mut self) -> Option<Result<Value, Refusal>> {
        let mut values = serde_json::Deserializer::from_slice(&self.bytes).into_iter::<Value>();
        match values.next() {
            None => {
                self.bytes.clear();
                None
            }
            Some(Ok(value)) => {
                let used = values.byte_offset();
                self.bytes.drain(..used);
                Some(Ok(value))
            }
            Some(Err(e)) if e.is_eof() && self.bytes.len() <= MAX_REQUEST => None,
            Some(Err(e)) => {
                // What follows on the line belongs to the broken value.
                let line = self.bytes.iter().position(|b| *b == b'\n');
                match line {
                    Some(end) if self.bytes.len() <= MAX_REQUEST => {
                        self.bytes.drain(..=end);
                    }
                    _ => self.bytes.clear(),
                }
                Some(Err(Refusal::generic(format!("JSON parse error, {e}"))))
            }
        }
    }
}

/// A client that the server knows.
pub(crate) struct Client {
    stream: UnixStream,
    session: Session,
    /// Messages go out one after the other.
    sending: Mutex<()>,
    /// Held from a request to its answer.
    answering: Mutex<()>,
}

impl Client {
    pub(crate) fn new(stream: UnixStream) -> Arc<Self> {
        Arc::new(Self {
            stream,
            session: Session::default(),
            sending: Mutex::default(),
            answering: Mutex::default(),
        })
    }

    /// Sends a message; one line each, as QEMU does.
    fn send(&self, message: &Value) -> std::io::Result<()> {
        let mut line = message.to_string();
        line.push_str("\r\n");
        let _sending = self.sending.lock();
        (&self.stream).write_all(line.as_bytes())
    }

    /// Sends an event to a client that has negotiated.
    pub(crate) fn event(&self, event: &Value) {
        if self.session.is_negotiated() && self.send(event).is_err() {
            self.close();
        }
    }

    /// Ends the conversation.
    pub(crate) fn close(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Ends the conversation once the request at hand has been answered, which for `quit` is after the machine has heard of
    /// it. A client that takes no answer is not waited for long.
    pub(crate) fn finish(&self) {
        let _answered = self.answering.try_lock_for(PATIENCE);
        self.close();
    }

    /// Converses until the client goes.
    pub(crate) fn serve(&self, machine: &dyn Control) -> std::io::Result<()> {
        self.send(&json!({ "QMP": { "version": version(), "capabilities": [] } }))?;
        let mut input = Input::default();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = (&self.stream).read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            input.push(&buffer[..n]);
            while let Some(value) = input.next() {
                self.answer(value, machine)?;
            }
        }
    }

    fn answer(&self, value: Result<Value, Refusal>, machine: &dyn Control) -> std::io::Result<()> {
        let _answering = self.answering.lock();
        let (id, result) = match value.map_err(|r| (None, r)).and_then(Request::parse) {
            Err((id, refusal)) => (id, Err(refusal)),
            Ok(request) => {
                let result = self.session.execute(&request, machine);
                (request.id, result)
            }
        };
        let mut message = match result {
            Ok(value) => json!({ "return": value }),
            Err(refusal) => {
                json!({ "error": { "class": refusal.class, "desc": refusal.text } })
            }
        };
        if let (Some(id), Some(object)) = (id, message.as_object_mut()) {
            object.insert("id".into(), id);
        }
        self.send(&message)
    }
}
