//! QMP clients: any bytes on the socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use qmp::{Control, Meaning, RunState, Server, Statistics};

/// A machine that takes every command.
struct Machine;

impl Control for Machine {
    fn jobs(&self) -> Vec<qmp::JobReport> {
        Vec::new()
    }
    fn block(&self, _call: qmp::BlockCall) -> Result<(), String> {
        Ok(())
    }
    fn disks(&self) -> Vec<qmp::DiskReport> {
        vec![qmp::DiskReport {
            name: "disk0".into(),
            file: "disk.img".into(),
            format: "raw",
            size: 1 << 20,
            allocated: None,
            backing_depth: 0,
            read_only: false,
            encrypted: false,
            cache: block::CacheMode::Writeback,
            detect_zeroes: block::DetectZeroes::Off,
            io_status: qmp::IoStatus::Ok,
            group: "disk0".into(),
            limits: block::ThrottleLimits::default(),
            statistics: block::DiskStatistics::default(),
            bitmaps: Vec::new(),
        }]
    }
    fn set_throttle(&self, _: &str, _: Option<&str>, _: block::ThrottleLimits) {}
    fn resize_disk(&self, _: &str, _: u64) -> Result<(), String> {
        Ok(())
    }
    fn statistics(&self) -> Statistics {
        Statistics {
            vm: vec![("instructions", 1)],
            vcpus: vec![vec![("instructions", 1)]],
        }
    }
    fn statistics_names(&self) -> &'static [(&'static str, Meaning)] {
        &[("instructions", Meaning::Count)]
    }
    fn status(&self) -> RunState {
        RunState::Running
    }
    fn stop(&self) {}
    fn cont(&self) {}
    fn system_reset(&self) {}
    fn system_powerdown(&self) {}
    fn quit(&self) {}
    fn balloon(&self, target: u64) -> bool {
        target.is_multiple_of(2)
    }
    fn query_balloon(&self) -> Option<u64> {
        Some(1 << 30)
    }
    fn set_link(&self, name: &str, _up: bool) -> bool {
        name == "net0"
    }
}

/// Sends the bytes, in two pieces, and hears the server out: every line that it says is JSON, and an answer, and it hangs up
/// when we do.
pub fn client(data: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("qmp");
    let server = Server::listen(&path, Arc::new(Machine)).expect("a socket");
    let mut stream = UnixStream::connect(&path).expect("a client");
    let mut sender = stream.try_clone().expect("a descriptor");
    let mut heard = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The server need not listen to the end.
            let (first, second) = data.split_at(data.len() / 2);
            let _ = sender.write_all(first);
            let _ = sender.write_all(second);
            let _ = sender.shutdown(Shutdown::Write);
        });
        let _ = stream.read_to_end(&mut heard);
    });
    let text = String::from_utf8(heard).expect("the server speaks UTF-8");
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("a line is JSON");
        let known = ["QMP", "return", "error", "event"];
        assert!(known.iter().any(|key| value.get(key).is_some()), "{line}");
    }
    drop(server);
}
