//! Running the corten binary and talking to the guest in it.

#![allow(dead_code)] // each test binary uses a part of it

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longest time for a guest on a slow machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(240);

/// The binary under test: the one that `cargo xtask test` has built.
pub(crate) fn corten() -> Option<Command> {
    let path = PathBuf::from(std::env::var_os("CORTEN")?);
    path.is_file().then(|| Command::new(path))
}

/// A command that runs the test guest with a script as its work; `None`, with a line that says so, where there is no guest.
pub(crate) fn guest(test: &str, script: &str) -> Option<Command> {
    guest_with(test, script, "panic=-1")
}

/// The same with more arguments for the kernel.
pub(crate) fn guest_with(test: &str, script: &str, arguments: &str) -> Option<Command> {
    let (kernel, initrd) = (
        std::env::var_os("CORTEN_TEST_KERNEL"),
        std::env::var_os("CORTEN_TEST_INITRD"),
    );
    let (Some(kernel), Some(initrd), Some(mut run)) = (kernel, initrd, corten()) else {
        println!("skipped: {test}: needs the guest and the binary that 'cargo xtask test' makes");
        return None;
    };
    let script = script.replace(' ', "+");
    run.args([
        "run",
        "--accel",
        "soft",
        "--memory",
        "512M",
        "--no-reboot",
        "--serial",
        "stdio",
    ]);
    run.arg("--append")
        .arg(format!("console=ttyS0 {arguments} run={script}"));
    // The tests leave the user's folders alone.
    let cache = concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels");
    run.args(["--kernel-cache", cache]);
    run.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    Some(run)
}

/// A running machine.
pub(crate) struct Machine {
    child: Child,
    output: Receiver<Vec<u8>>,
    text: String,
}

impl Machine {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut from = child.stdout.take().expect("a pipe");
        let (send, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            output,
            text: String::new(),
        }
    }

    /// A process whose console is elsewhere.
    pub(crate) fn of(child: Child) -> Self {
        Self {
            child,
            output: channel().1,
            text: String::new(),
        }
    }

    /// All that the console has shown.
    pub(crate) fn shown(&self) -> &str {
        &self.text
    }

    /// Waits for text on the console.
    pub(crate) fn expect(&mut self, wanted: &str) {
        self.wait_for(wanted, None);
    }

    /// The same, but text that tells of a failure may come first.
    pub(crate) fn expect_or(&mut self, wanted: &str, failure: &str) {
        self.wait_for(wanted, Some(failure));
    }

    fn wait_for(&mut self, wanted: &str, failure: Option<&str>) {
        let end = Instant::now() + LIMIT;
        while !self.text.contains(wanted) {
            let failed = failure.is_some_and(|failure| self.text.contains(failure));
            assert!(!failed, "{}", self.text);
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("no {wanted:?} on the console:\n{}", self.text),
            }
        }
    }

    /// Types text.
    pub(crate) fn send(&mut self, text: &str) {
        let input = self.child.stdin.as_mut().expect("a pipe");
        input
            .write_all(text.as_bytes())
            .and_then(|()| input.flush())
            .expect("the guest reads");
    }

    /// All that it says on standard error until it ends, where that is a pipe.
    pub(crate) fn errors(&mut self) -> std::thread::JoinHandle<String> {
        let mut from = self.child.stderr.take().expect("a pipe");
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = from.read_to_string(&mut text);
            text
        })
    }

    /// Asks the process to end (SIGTERM).
    pub(crate) fn terminate(&self) {
        use rustix::process::{Pid, Signal, kill_process};
        let process = Pid::from_raw(self.child.id().cast_signed()).expect("a process");
        // It may have ended by itself.
        let _ = kill_process(process, Signal::TERM);
    }

    /// True until the process has ended.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end; returns how it ended and all that the console showed.
    pub(crate) fn wait(mut self) -> (ExitStatus, String) {
        let end = Instant::now() + LIMIT;
        while let Ok(bytes) = self
            .output
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
        (self.end(), std::mem::take(&mut self.text))
    }

    /// Waits for the end of the process.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(
                Instant::now() < end,
                "the machine did not end:\n{}",
                self.text
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a guest to its end; it must power off.
pub(crate) fn run_to_end(command: &mut Command) -> String {
    let (status, text) = Machine::start(command).wait();
    assert!(status.success(), "{status}:\n{text}");
    assert!(
        text.contains("GUEST-DONE"),
        "the guest did not come to its end:\n{text}"
    );
    text.replace('\r', "")
}

/// A 64-bit ELF file with this code at 1 MiB.
pub(crate) fn elf_of(code: &[u8]) -> Vec<u8> {
    const START: u64 = 0x10_0000;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [START, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    for half in [0u16, 0, 64, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(0x5_0000_0001u64.to_le_bytes()); // PT_LOAD, readable and executable
    let size = code.len() as u64;
    for word in [120, START, START, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}
