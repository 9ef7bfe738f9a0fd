//! The server's socket.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::Event;
use crate::client::Client;
use crate::commands::Control;

/// Most clients at a time.
const MAX_CLIENTS: usize = 64;

/// Why the server can't be.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot listen for QMP clients: {source}", path.display())]
pub struct ServerError {
    /// The socket.
    pub path: PathBuf,
    /// The host's reason.
    pub source: std::io::Error,
}

struct Shared {
    clients: Mutex<Vec<Arc<Client>>>,
    ended: AtomicBool,
}

/// A listening server. Dropping it ends all conversations and removes the socket.
pub struct Server {
    shared: Arc<Shared>,
    path: PathBuf,
}

impl Server {
    /// Listens on a Unix socket, in place of one that a dead server left behind.
    ///
    /// # Errors
    /// When the socket can't be made, or somebody listens on it.
    pub fn listen(path: &Path, machine: Arc<dyn Control>) -> Result<Self, ServerError> {
        let error = |source| ServerError {
            path: path.to_owned(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(error(e));
                }
                std::fs::remove_file(path).map_err(error)?;
                UnixListener::bind(path).map_err(error)?
            }
            other => other.map_err(error)?,
        };
        let shared = Arc::new(Shared {
            clients: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let served = shared.clone();
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || accept(&listener, &served, &machine))
            .map_err(error)?;
        Ok(Self {
            shared,
            path: path.to_owned(),
        })
    }

    /// Tells every client that has negotiated of an event.
    pub fn event(&self, event: &Event) {
        let message = event.to_json();
        let clients = self.shared.clients.lock().clone();
        clients.iter().for_each(|client| client.event(&message));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // The listening thread wakes for one more client.
        let _ = std::os::unix::net::UnixStream::connect(&self.path);
        // A client that goes by itself takes itself off the list meanwhile.
        let clients = self.shared.clients.lock().clone();
        clients.iter().for_each(|client| client.finish());
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, machine: &Arc<dyn Control>) {
    for stream in listener.incoming() {
        if shared.ended.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let client = Client::new(stream);
        {
            let mut clients = shared.clients.lock();
            if clients.len() >= MAX_CLIENTS {
                client.close();
                continue;
            }
            clients.push(client.clone());
        }
        let (shared, machine) = (shared.clone(), machine.clone());
        let spawned = std::thread::Builder::new()
            .name("qmp-client".into())
            .spawn(move || {
                let _ = client.serve(&*machine);
                client.close();
                shared
                    .clients
                    .lock()
                    .retain(|other| !Arc::ptr_eq(other, &client));
            });
        if spawned.is_err() {
            continue;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    use block::{CacheMode, DetectZeroes, DiskStatistics, Operations, ThrottleLimits};
    use serde_json::{Value, json};

    use super::*;
    use crate::RunState;

    #[derive(Default)]
    struct Machine(Mutex<Vec<&'static str>>, Mutex<ThrottleLimits>);

    impl Control for Machine {
        fn status(&self) -> RunState {
            RunState::Running
        }
        fn stop(&self) {
            self.0.lock().push("stop");
        }
        fn cont(&self) {
            self.0.lock().push("cont");
        }
        fn system_reset(&self) {
            self.0.lock().push("reset");
        }
        fn system_powerdown(&self) {
            self.0.lock().push("powerdown");
        }
        fn quit(&self) {
            self.0.lock().push("quit");
            // The server may be gone before this returns.
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        fn balloon(&self, _target: u64) -> bool {
            self.0.lock().push("balloon");
            true
        }
        fn query_balloon(&self) -> Option<u64> {
            Some(1 << 20)
        }
        fn set_link(&self, name: &str, up: bool) -> bool {
            self.0.lock().push(if up { "up" } else { "down" });
            name == "net0"
        }
        fn disks(&self) -> Vec<crate::DiskReport> {
            vec![crate::DiskReport {
                name: "disk0".into(),
                file: "/a.qcow2".into(),
                format: "qcow2",
                size: 1 << 20,
                allocated: Some(4096),
                backing_depth: 2,
                read_only: false,
                encrypted: true,
                cache: CacheMode::None,
                detect_zeroes: DetectZeroes::Off,
                io_status: crate::IoStatus::NoSpace,
                group: "slow".into(),
                limits: *self.1.lock(),
                statistics: DiskStatistics {
                    reads: Operations {
                        done: 2,
                        bytes: 1024,
                        nanoseconds: 77,
                        failed: 1,
                    },
                    ..DiskStatistics::default()
                },
                bitmaps: Vec::new(),
            }]
        }
        fn set_throttle(&self, disk: &str, group: Option<&str>, limits: ThrottleLimits) {
            assert_eq!((disk, group), ("disk0", None));
            *self.1.lock() = limits;
        }
        fn resize_disk(&self, _disk: &str, size: u64) -> Result<(), String> {
            if size > 1 << 30 {
                return Err("too large".into());
            }
            Ok(())
        }
        fn jobs(&self) -> Vec<crate::JobReport> {
            Vec::new()
        }
        fn block(&self, _call: crate::BlockCall) -> Result<(), String> {
            Err("refused".into())
        }
        fn statistics(&self) -> crate::Statistics {
            crate::Statistics {
                vm: vec![("instructions", 7)],
                vcpus: vec![
                    vec![("instructions", 3), ("halted-time", 9)],
                    vec![("instructions", 4), ("halted-time", u64::MAX)],
                ],
            }
        }
        fn statistics_names(&self) -> &'static [(&'static str, crate::Meaning)] {
            &[
                ("instructions", crate::Meaning::Count),
                ("halted-time", crate::Meaning::Time),
            ]
        }
    }

    struct Talk(BufReader<UnixStream>);

    impl Talk {
        fn read(&mut self) -> Value {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        }

        fn say(&mut self, text: &str) -> Value {
            self.0.get_mut().write_all(text.as_bytes()).unwrap();
            self.read()
        }
    }

    fn server() -> (tempfile::TempDir, Arc<Machine>, Server, Talk) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let machine = Arc::new(Machine::default());
        let server = Server::listen(&path, machine.clone()).unwrap();
        let mut talk = Talk(BufReader::new(UnixStream::connect(&path).unwrap()));
        assert_eq!(talk.read()["QMP"]["capabilities"], json!([]));
        (dir, machine, server, talk)
    }

    fn error(answer: &Value) -> (&str, &str) {
        let error = &answer["error"];
        (
            error["class"].as_str().unwrap(),
            error["desc"].as_str().unwrap(),
        )
    }

    #[test]
    fn quit_is_answered_though_the_server_goes() {
        let (_dir, machine, server, mut talk) = server();
        talk.say(r#"{"execute":"qmp_capabilities"}"#);
        let ender = std::thread::spawn(move || {
            while !machine.0.lock().contains(&"quit") {
                std::thread::yield_now();
            }
            drop(server);
        });
        assert_eq!(talk.say(r#"{"execute":"quit"}"#), json!({ "return": {} }));
        ender.join().unwrap();
    }

    #[test]
    fn negotiates_answers_and_tells_events() {
        let (_dir, machine, server, mut talk) = server();
        let early = talk.say(r#"{"execute":"query-status"}"#);
        assert_eq!(error(&early).0, "CommandNotFound");
        server.event(&Event::Stop); // before negotiation: not heard
        assert_eq!(
            talk.say(r#"{"execute":"qmp_capabilities"}"#),
            json!({ "return": {} })
        );
        let status = talk.say(r#"{"execute":"query-status","id":[1,"a"]}"#);
        let expected = json!({ "status": "running", "running": true });
        assert_eq!(status, json!({ "return": expected, "id": [1, "a"] }));
        let commands = talk.say(r#"{"execute":"query-commands"}"#);
        assert!(
            commands["return"]
                .as_array()
                .unwrap()
                .contains(&json!({ "name": "quit" }))
        );
        for command in ["stop", "cont", "system_reset", "system_powerdown", "quit"] {
            let text = format!(r#"{{"execute":"{command}"}}"#);
            assert_eq!(talk.say(&text), json!({ "return": {} }));
        }
        assert_eq!(
            *machine.0.lock(),
            ["stop", "cont", "reset", "powerdown", "quit"]
        );
        server.event(&Event::Reset {
            guest: true,
            reason: "guest-reset",
        });
        let event = talk.read();
        assert_eq!(event["event"], "RESET");
        assert_eq!(
            event["data"],
            json!({ "guest": true, "reason": "guest-reset" })
        );
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
    }

    #[test]
    fn refuses_as_qemu_does() {
        let (_dir, _machine, _server, mut talk) = server();
        talk.say(r#"{"execute":"qmp_capabilities"}"#);
        let mut refused = |text: &str, class: &str, part: &str| {
            let answer = talk.say(text);
            let (got, desc) = error(&answer);
            assert!(got == class && desc.contains(part), "{text}: {answer}");
        };
        refused(
            r#"{"execute":"fly"}"#,
            "CommandNotFound",
            "The command fly has not been found",
        );
        refused(
            r#"{"execute":"qmp_capabilities"}"#,
            "CommandNotFound",
            "already complete",
        );
        refused(
            r#"{"execute":"stop","arguments":{"x":1}}"#,
            "GenericError",
            "'x' is unexpected",
        );
        refused(
            r#"{"execute":"stop","arguments":1}"#,
            "GenericError",
            "must be an object",
        );
        refused(r#"{"execute":1}"#, "GenericError", "must be a string");
        refused(
            r#"{"arguments":{}}"#,
            "GenericError",
            "lacks member 'execute'",
        );
        refused(
            r#"{"execute":"stop","y":1}"#,
            "GenericError",
            "'y' is unexpected",
        );
        refused("[]", "GenericError", "must be a JSON object");
        refused("{nonsense}\n", "GenericError", "JSON parse error");
        refused(
            &("[".repeat(500) + "\n"),
            "GenericError",
            "JSON parse error",
        );
    }

    /// The words are those of QEMU 7.2 for the same lines.
    #[test]
    fn arguments_are_checked_in_qemus_words() {
        let (_dir, machine, server, mut talk) = server();
        talk.say(r#"{"execute":"qmp_capabilities"}"#);
        let command = |name: &str, arguments: Value| {
            json!({ "execute": name, "arguments": arguments }).to_string()
        };
        for (name, arguments, words) in [
            ("balloon", json!({}), "Parameter 'value' is missing"),
            (
                "balloon",
                json!({ "value": 0 }),
                "Parameter 'target' expects a size",
            ),
            (
                "balloon",
                json!({ "value": -5 }),
                "Parameter 'target' expects a size",
            ),
            (
                "balloon",
                json!({ "value": "x" }),
                "Invalid parameter type for 'value', expected: integer",
            ),
            (
                "balloon",
                json!({ "value": 5, "x": 1 }),
                "Parameter 'x' is unexpected",
            ),
            (
                "query-balloon",
                json!({ "x": 1 }),
                "Parameter 'x' is unexpected",
            ),
            (
                "set_link",
                json!({ "name": "net0" }),
                "Parameter 'up' is missing",
            ),
            (
                "set_link",
                json!({ "name": 7, "up": true }),
                "Invalid parameter type for 'name', expected: string",
            ),
            (
                "set_link",
                json!({ "name": "net0", "up": 1 }),
                "Invalid parameter type for 'up', expected: boolean",
            ),
        ] {
            let answer = talk.say(&command(name, arguments));
            assert_eq!(error(&answer), ("GenericError", words));
        }
        assert!(machine.0.lock().is_empty());
        let missing = talk.say(&command("set_link", json!({ "name": "net7", "up": true })));
        assert_eq!(
            error(&missing),
            ("DeviceNotFound", "Device 'net7' not found")
        );
        let actual = talk.say(&command("query-balloon", json!({})));
        assert_eq!(actual, json!({ "return": { "actual": 1 << 20 } }));
        for (name, arguments) in [
            ("balloon", json!({ "value": 5 })),
            ("set_link", json!({ "name": "net0", "up": false })),
        ] {
            let done = talk.say(&command(name, arguments));
            assert_eq!(done, json!({ "return": {} }));
        }
        assert_eq!(*machine.0.lock(), ["up", "balloon", "down"]);
        server.event(&Event::BalloonChange { actual: 7 });
        let event = talk.read();
        assert_eq!(event["event"], "BALLOON_CHANGE");
        assert_eq!(event["data"], json!({ "actual": 7 }));
    }

    #[test]
    fn disks_are_told_of_and_changed() {
        let (_dir, machine, server, mut talk) = server();
        talk.say(r#"{"execute":"qmp_capabilities"}"#);
        let mut ask = |name: &str, arguments: Value| {
            talk.say(&json!({ "execute": name, "arguments": arguments }).to_string())
        };
        let none =
            json!({ "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0 });
        let with = |more: Value| {
            let mut all = none.as_object().unwrap().clone();
            all.extend(more.as_object().unwrap().clone());
            Value::Object(all)
        };
        let limits = json!({ "device": "disk0", "bps_wr": 1000, "bps_wr_max": 5000, "bps_wr_max_length": 2 });
        assert_eq!(
            ask("block_set_io_throttle", with(limits)),
            json!({ "return": {} })
        );
        let set = machine.1.lock().bps_write;
        assert_eq!((set.average, set.max, set.max_length), (1000, 5000, 2));
        let disk = &ask("query-block", json!({}))["return"][0];
        assert_eq!(
            (&disk["device"], &disk["io-status"]),
            (&json!("disk0"), &json!("nospace"))
        );
        let inserted = &disk["inserted"];
        assert_eq!(
            (&inserted["bps"], &inserted["bps_wr"]),
            (&json!(0), &json!(1000))
        );
        assert_eq!(
            (&inserted["bps_wr_max"], &inserted["group"]),
            (&json!(5000), &json!("slow"))
        );
        assert_eq!(
            inserted["cache"],
            json!({ "writeback": true, "direct": true, "no-flush": false })
        );
        assert_eq!(
            (&inserted["drv"], &inserted["backing_file_depth"]),
            (&json!("qcow2"), &json!(2))
        );
        assert_eq!(inserted["image"]["actual-size"], 4096);
        assert_eq!(
            (&inserted["encrypted"], &inserted["ro"]),
            (&json!(true), &json!(false))
        );
        let stats = &ask("query-blockstats", json!({}))["return"][0]["stats"];
        assert_eq!(
            (&stats["rd_operations"], &stats["rd_bytes"]),
            (&json!(2), &json!(1024))
        );
        assert_eq!(
            (&stats["rd_total_time_ns"], &stats["wr_bytes"]),
            (&json!(77), &json!(0))
        );
        // The words are those of QEMU 7.2 for the same lines, but for what is wrong with limits.
        for (name, arguments, words) in [
            (
                "block_set_io_throttle",
                none.clone(),
                "Need exactly one of 'device' and 'id'",
            ),
            (
                "block_set_io_throttle",
                json!({ "device": "disk0", "bps": 1 }),
                "Parameter 'bps_rd' is missing",
            ),
            (
                "block_set_io_throttle",
                with(json!({ "id": "disk0", "iops": "x" })),
                "Invalid parameter type for 'iops', expected: integer",
            ),
            (
                "block_set_io_throttle",
                with(json!({ "id": "disk0", "bps": -1 })),
                "bps-total: expected 0 to 1000000000000000",
            ),
            (
                "block_resize",
                json!({ "device": "disk0", "size": 5 }),
                "The new size must be a multiple of 512",
            ),
            (
                "block_resize",
                json!({ "device": "disk0", "size": -5 }),
                "Parameter 'size' expects a >0 size",
            ),
            (
                "block_resize",
                json!({ "device": "x", "size": 5 }),
                "Cannot find device='x' nor node-name=''",
            ),
            (
                "block_resize",
                json!({ "device": "disk0", "size": 1u64 << 40 }),
                "too large",
            ),
        ] {
            assert_eq!(error(&ask(name, arguments)), ("GenericError", words));
        }
        let missing = ask("block_set_io_throttle", with(json!({ "device": "disk7" })));
        assert_eq!(
            error(&missing),
            ("DeviceNotFound", "Device 'disk7' not found")
        );
        let done = ask("block_resize", json!({ "device": "disk0", "size": 1024 }));
        assert_eq!(done, json!({ "return": {} }));
        server.event(&Event::BlockIoError {
            device: "disk0".into(),
            write: true,
            action: crate::IoErrorAction::Stop,
            no_space: true,
            reason: "full".into(),
        });
        let event = talk.read();
        assert_eq!(event["event"], "BLOCK_IO_ERROR");
        let data = json!({
            "device": "disk0", "operation": "write", "action": "stop", "nospace": true, "reason": "full"
        });
        assert_eq!(event["data"], data);
    }

    /// The words of the refusals are those of QEMU 7.2 for the same lines.
    #[test]
    fn statistics_are_asked_for_as_qemu_s_are() {
        let (_dir, _machine, _server, mut talk) = server();
        talk.say(r#"{"execute":"qmp_capabilities"}"#);
        let mut ask = |name: &str, arguments: Value| {
            talk.say(&json!({ "execute": name, "arguments": arguments }).to_string())
        };
        let figure = |name: &str, value: u64| json!({ "name": name, "value": value });
        let vcpu = |number: u32, stats: &[Value]| {
            let path = format!("/machine/cpu[{number}]");
            json!({ "provider": "corten", "qom-path": path, "stats": stats })
        };
        let one = [figure("instructions", 3), figure("halted-time", 9)];
        let two = [figure("instructions", 4), figure("halted-time", u64::MAX)];
        let vm = json!({ "provider": "corten", "stats": [figure("instructions", 7)] });
        let named = |names: &[&str]| json!([{ "provider": "corten", "names": names }]);
        for (arguments, expected) in [
            (json!({ "target": "vm" }), json!([vm])),
            (
                json!({ "target": "vcpu" }),
                json!([vcpu(0, &one), vcpu(1, &two)]),
            ),
            (
                json!({ "target": "vcpu", "vcpus": ["/machine/cpu[1]", "/nowhere"],
                        "providers": named(&["instructions", "dust"]) }),
                json!([vcpu(1, &two[..1])]),
            ),
            (
                json!({ "target": "vm", "providers": named(&["dust"]) }),
                json!([]),
            ),
            (
                json!({ "target": "vm", "providers": [{ "provider": "kvm" }] }),
                json!([]),
            ),
            (json!({ "target": "cryptodev" }), json!([])),
        ] {
            let got = ask("query-stats", arguments.clone());
            assert_eq!(got, json!({ "return": expected }), "{arguments}");
        }
        let schemas = ask("query-stats-schemas", json!({ "provider": "corten" }));
        let stats = json!([
            { "name": "instructions", "type": "cumulative" },
            { "name": "halted-time", "type": "cumulative", "unit": "seconds", "base": 10,
              "exponent": -9 },
        ]);
        let of = |target: &str| json!({ "provider": "corten", "target": target, "stats": stats });
        assert_eq!(schemas, json!({ "return": [of("vm"), of("vcpu")] }));
        for (arguments, words) in [
            (json!({}), "Parameter 'target' is missing"),
            (
                json!({ "target": 3 }),
                "Invalid parameter type for 'target', expected: string",
            ),
            (
                json!({ "target": "foo" }),
                "Parameter 'target' does not accept value 'foo'",
            ),
            (
                json!({ "target": "vm", "vcpus": [] }),
                "Parameter 'vcpus' is unexpected",
            ),
            (
                json!({ "target": "vcpu", "vcpus": [3] }),
                "Invalid parameter type for 'vcpus[0]', expected: string",
            ),
            (
                json!({ "target": "vcpu", "providers": 3 }),
                "Invalid parameter type for 'providers', expected: array",
            ),
            (
                json!({ "target": "vcpu", "providers": [3] }),
                "Invalid parameter type for 'providers[0]', expected: object",
            ),
            (
                json!({ "target": "vcpu", "providers": [{}] }),
                "Parameter 'providers[0].provider' is missing",
            ),
            (
                json!({ "target": "vcpu", "providers": [{ "provider": "x" }] }),
                "Parameter 'provider' does not accept value 'x'",
            ),
            (
                json!({ "target": "vcpu", "providers": [{ "provider": "kvm", "names": 3 }] }),
                "Invalid parameter type for 'providers[0].names', expected: array",
            ),
            (
                json!({ "target": "vcpu", "providers": [{ "provider": "kvm", "q": 1 }] }),
                "Parameter 'providers[0].q' is unexpected",
            ),
        ] {
            let answer = ask("query-stats", arguments);
            assert_eq!(error(&answer), ("GenericError", words));
        }
    }

    #[test]
    fn requests_come_in_any_pieces() {
        let (_dir, _machine, _server, mut talk) = server();
        let text = r#"{"execute":"qmp_capabilities"}{"execute":"query-status"}"#;
        for byte in text.as_bytes() {
            talk.0.get_mut().write_all(&[*byte]).unwrap();
        }
        assert_eq!(talk.read(), json!({ "return": {} }));
        assert_eq!(talk.read()["return"]["status"], "running");
    }

    #[test]
    fn a_socket_in_use_is_refused_and_a_dead_one_replaced() {
        let (dir, machine, server, _talk) = server();
        let path = dir.path().join("qmp");
        assert!(Server::listen(&path, machine.clone()).is_err());
        drop(server);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        Server::listen(&path, machine).unwrap();
    }
}
