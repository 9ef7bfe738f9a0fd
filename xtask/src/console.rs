//! A guest's serial console, driven as a person would.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::Result;

/// A running machine whose standard input and output are its console.
pub(crate) struct Console {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// What came and has not been asked for yet.
    text: String,
    echo: bool,
}

impl Console {
    /// Starts the machine; with `echo`, what it prints is shown.
    pub(crate) fn start(command: &mut Command, echo: bool) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{}: {e}", crate::host::line(command)))?;
        let (input, mut from) = match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => (input, output),
            _ => return Err("no pipes to the machine".into()),
        };
        let (send, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            input,
            output,
            text: String::new(),
            echo,
        })
    }

    /// The machine's process.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Waits for `wanted`; returns what came before it.
    pub(crate) fn expect(&mut self, wanted: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.text.find(wanted) {
                let before = self.text[..at].to_owned();
                self.text.drain(..at + wanted.len());
                return Ok(before);
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => {
                    if self.echo {
                        let mut out = std::io::stdout().lock();
                        let _ = out.write_all(&bytes).and_then(|()| out.flush());
                    }
                    self.text.push_str(&String::from_utf8_lossy(&bytes));
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("no {wanted:?} within {} s", limit.as_secs()));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("the machine ended before {wanted:?}"));
                }
            }
        }
    }

    /// Types text.
    pub(crate) fn send(&mut self, text: &str) -> Result<()> {
        let sent = self
            .input
            .write_all(text.as_bytes())
            .and_then(|()| self.input.flush());
        sent.map_err(|e| format!("typing to the guest: {e}"))
    }

    /// Runs a command in the guest's shell; returns what it printed.
    pub(crate) fn shell(&mut self, command: &str, limit: Duration) -> Result<String> {
        // The marks are written so that the echo of the typed line does not hold them.
        self.send(&format!("echo BE\"\"GIN; {command}; echo E\"\"ND-$?\n"))?;
        self.expect("BEGIN", limit)?;
        let text = self.expect("END-", limit)?;
        let status = self.expect("\n", limit)?;
        if status.trim() != "0" {
            return Err(format!(
                "in the guest, {command}: exit status {}",
                status.trim()
            ));
        }
        Ok(text.replace('\r', "").trim().to_owned())
    }

    /// Waits until the machine ends.
    pub(crate) fn wait(mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            while let Ok(bytes) = self.output.try_recv() {
                if self.echo {
                    let _ = std::io::stdout().write_all(&bytes);
                }
            }
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                return Ok(status);
            }
            if Instant::now() > end {
                return Err(format!(
                    "the machine did not end within {} s",
                    limit.as_secs()
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
