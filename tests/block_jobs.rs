//! Jobs on the disks of a machine: as QEMU's, command for command, and under a guest that writes.

mod machine;
mod qmp;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use machine::{LIMIT, Machine, guest};
use qmp::Qmp;
use serde_json::{Value, json};

/// Runs qemu-img; false, with a line that says so, where it is missing.
fn qemu_img(test: &str, arguments: &[&str]) -> bool {
    let Ok(output) = Command::new("qemu-img").args(arguments).output() else {
        println!("skipped: {test}: needs qemu-img");
        return false;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
    true
}

/// A chain of three images, each with something of its own.
fn make_chain(test: &str, directory: &Path) -> bool {
    let path = |name: &str| directory.join(name).display().to_string();
    // More than QEMU has under way at once, so that a limit holds a job up.
    let mut content = vec![1; 48 << 20];
    content[32 << 20..].fill(0);
    std::fs::write(path("base"), &content).unwrap();
    let below = [("base", "raw", "middle"), ("middle", "qcow2", "top")];
    for (backing, format, name) in below {
        let backing = path(backing);
        let create = ["create", "-q", "-f", "qcow2", "-b", &backing, "-F", format];
        if !qemu_img(test, &[&create[..], &[&path(name)]].concat()) {
            return false;
        }
        let write = format!("write -q -P {} 2M 1M", name.len());
        let mut io = Command::new("qemu-io");
        let done = io.args(["-f", "qcow2", "-c", &write, &path(name)]).status();
        assert!(done.unwrap().success());
    }
    true
}

/// Waits until somebody listens.
fn connect(socket: &Path) -> Qmp {
    let end = Instant::now() + LIMIT;
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < end, "nobody listens");
        std::thread::sleep(Duration::from_millis(10));
    }
    Qmp::connect(socket)
}

/// One program of the two.
struct Side {
    machine: Machine,
    qmp: Qmp,
    heard: Vec<Value>,
}

impl Side {
    fn start(command: &mut Command, socket: &Path) -> Self {
        Self {
            machine: Machine::start(command),
            qmp: connect(socket),
            heard: Vec::new(),
        }
    }

    /// What a command brings: its answer, in a line.
    fn answer(&mut self, name: &str, arguments: &Value) -> String {
        let text = json!({ "execute": name, "arguments": arguments }).to_string();
        let answer = self.qmp.say(&text);
        match answer.get("error") {
            Some(error) => format!("{name}: {}: {}", error["class"], error["desc"]),
            None => format!("{name}: ok"),
        }
    }

    /// What the job tells until it says this; a state or an event.
    fn until(&mut self, last: &str) -> Vec<String> {
        let mut told = Vec::new();
        loop {
            let event = self.qmp.next_event();
            let name = event["event"].as_str().unwrap_or_default().to_owned();
            let data = &event["data"];
            let line = match name.as_str() {
                "JOB_STATUS_CHANGE" => format!("{} {}", data["id"], data["status"]),
                "BLOCK_JOB_PENDING" => format!("{name} {}", data["type"]),
                _ if name.starts_with("BLOCK_JOB") => {
                    let done = data["len"] == data["offset"];
                    format!("{name} {} {} {done}", data["device"], data["type"])
                }
                _ => continue,
            };
            self.heard.push(event.clone());
            // How far a cancelled job has come is a matter of time.
            told.push(if name == "BLOCK_JOB_CANCELLED" {
                name.clone()
            } else {
                line
            });
            if name == last || data["status"] == last {
                return told;
            }
            // QEMU stops a job for a moment, and says so, where it changes its graph.
            let ends = |suffix: &str, from_end: usize| {
                let line = told.len().checked_sub(from_end).map(|n| &told[n]);
                line.is_some_and(|line: &String| line.ends_with(suffix))
            };
            if (ends("\"paused\"", 2) && ends("\"running\"", 1))
                || (ends("\"standby\"", 2) && ends("\"ready\"", 1))
            {
                told.truncate(told.len() - 2);
            }
        }
    }
}

/// What is done with both, and what both answer.
fn conversation(side: &mut Side, path: impl Fn(&str) -> String) -> Vec<String> {
    let mut said = Vec::new();
    let mut say = |side: &mut Side, name: &str, arguments: Value, until: &[&str]| {
        said.push(side.answer(name, &arguments));
        for last in until {
            said.extend(side.until(last));
        }
    };
    let ready = ["BLOCK_JOB_READY"];
    let end = ["null"];
    let device = "disk0";
    // Full backup, and one of which nothing is left to do by itself.
    let backup =
        json!({ "device": device, "target": path("backup"), "sync": "full", "format": "qcow2" });
    say(side, "drive-backup", backup, &end);
    let manual = json!({
        "device": device, "job-id": "manual", "target": path("manual"), "sync": "top", "format": "qcow2",
        "auto-finalize": false, "auto-dismiss": false,
    });
    say(side, "drive-backup", manual, &["BLOCK_JOB_PENDING"]);
    say(side, "block-job-pause", json!({ "device": "manual" }), &[]);
    say(side, "block-job-dismiss", json!({ "id": "manual" }), &[]);
    say(
        side,
        "job-finalize",
        json!({ "id": "manual" }),
        &["concluded"],
    );
    say(side, "block-job-finalize", json!({ "id": "manual" }), &[]);
    say(side, "job-dismiss", json!({ "id": "manual" }), &end);
    // Bitmaps and a backup of what they say.
    say(
        side,
        "block-dirty-bitmap-add",
        json!({ "node": device, "name": "b0" }),
        &[],
    );
    say(
        side,
        "block-dirty-bitmap-add",
        json!({ "node": device, "name": "b0" }),
        &[],
    );
    say(
        side,
        "block-dirty-bitmap-clear",
        json!({ "node": device, "name": "b1" }),
        &[],
    );
    let fine = json!({ "node": device, "name": "b1", "granularity": 100 });
    say(side, "block-dirty-bitmap-add", fine, &[]);
    let fine = json!({ "node": device, "name": "b1", "granularity": 512, "disabled": true });
    say(side, "block-dirty-bitmap-add", fine, &[]);
    say(
        side,
        "block-dirty-bitmap-enable",
        json!({ "node": device, "name": "b1" }),
        &[],
    );
    let merge = json!({ "node": device, "target": "b1", "bitmaps": ["b0"] });
    say(side, "block-dirty-bitmap-merge", merge, &[]);
    let incremental = json!({
        "device": device, "job-id": "inc", "target": path("inc"), "sync": "incremental", "bitmap": "b0",
        "format": "qcow2",
    });
    say(side, "drive-backup", incremental, &end);
    say(
        side,
        "block-dirty-bitmap-remove",
        json!({ "node": device, "name": "b1" }),
        &[],
    );
    // A mirror that is cancelled, first at work and then when it is ready.
    let slow = json!({ "device": device, "target": path("slow"), "sync": "full", "speed": 1, "format": "raw" });
    say(side, "drive-mirror", slow, &["running"]);
    say(side, "block-job-complete", json!({ "device": device }), &[]);
    say(
        side,
        "block-job-set-speed",
        json!({ "device": device, "speed": -1 }),
        &[],
    );
    say(
        side,
        "block-job-pause",
        json!({ "device": device }),
        &["paused"],
    );
    say(side, "block-job-pause", json!({ "device": device }), &[]);
    say(side, "block-job-cancel", json!({ "device": device }), &[]);
    say(
        side,
        "block-job-resume",
        json!({ "device": device }),
        &["running"],
    );
    say(side, "block-job-resume", json!({ "device": device }), &[]);
    say(side, "block-job-cancel", json!({ "device": device }), &end);
    let mirror =
        json!({ "device": device, "target": path("mirror"), "sync": "full", "format": "qcow2" });
    say(side, "drive-mirror", mirror, &ready);
    say(side, "job-pause", json!({ "id": device }), &["standby"]);
    say(side, "job-resume", json!({ "id": device }), &["ready"]);
    say(side, "block-job-cancel", json!({ "device": device }), &end);
    // The chain.
    let overlay = json!({ "device": device, "snapshot-file": path("overlay") });
    say(side, "blockdev-snapshot-sync", overlay, &[]);
    let commit =
        json!({ "device": device, "job-id": "down", "top": path("top"), "base": path("middle") });
    say(side, "block-commit", commit, &end);
    let missing = json!({ "device": device, "base": path("nowhere") });
    say(side, "block-stream", missing, &[]);
    let stream = json!({ "device": device, "base": path("base") });
    say(side, "block-stream", stream, &end);
    say(
        side,
        "block-commit",
        json!({ "device": device, "job-id": "all" }),
        &ready,
    );
    say(side, "block-job-complete", json!({ "device": "all" }), &end);
    let pivot = json!({
        "device": device, "target": path("pivot"), "sync": "full", "format": "qcow2", "copy-mode": "write-blocking",
    });
    say(side, "drive-mirror", pivot, &ready);
    say(
        side,
        "block-job-complete",
        json!({ "device": device }),
        &end,
    );
    // What is refused.
    for (name, arguments) in [
        ("block-job-cancel", json!({ "device": "nothing" })),
        ("job-cancel", json!({ "id": "nothing" })),
        (
            "drive-mirror",
            json!({ "device": "nothing", "target": "x", "sync": "full" }),
        ),
        (
            "drive-mirror",
            json!({ "device": device, "target": path("x") }),
        ),
        (
            "drive-mirror",
            json!({ "device": device, "target": path("x"), "sync": "some" }),
        ),
        ("block-stream", json!({ "device": device, "job-id": "0 a" })),
        (
            "block-dirty-bitmap-add",
            json!({ "node": "nothing", "name": "b" }),
        ),
    ] {
        say(side, name, arguments, &[]);
    }
    said
}

#[test]
fn jobs_speak_as_those_of_qemu() {
    const NAME: &str = "jobs_speak_as_those_of_qemu";
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for directory in [&ours, &theirs] {
        if !make_chain(NAME, directory.path()) {
            return;
        }
    }
    let (disk, socket) = (theirs.path().join("top"), theirs.path().join("qmp"));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "none", "-nodefaults", "-nographic", "-drive"])
        .arg(format!(
            "file={},format=qcow2,if=none,id=disk0",
            disk.display()
        ))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()));
    if Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        println!("skipped: {NAME}: needs qemu-system-x86_64");
        return;
    }
    let Some(mut run) = guest(NAME, "read x") else {
        return;
    };
    let (disk, own_socket) = (ours.path().join("top"), ours.path().join("qmp"));
    run.arg("--disk")
        .arg(format!("{},format=qcow2,id=disk0", disk.display()));
    run.arg("--qmp")
        .arg(format!("unix:{}", own_socket.display()));
    let mut own = Side::start(run.arg("--paused"), &own_socket);
    let mut peer = Side::start(&mut qemu, &socket);
    let there = |directory: &tempfile::TempDir, name: &str| {
        directory.path().join(name).display().to_string()
    };
    let expected = conversation(&mut peer, |name| there(&theirs, name));
    let found = conversation(&mut own, |name| there(&ours, name));
    // Messages name files, which differ in their folder.
    let plain = |lines: Vec<String>, directory: &tempfile::TempDir| {
        let folder = directory.path().display().to_string();
        lines
            .into_iter()
            .map(|line| line.replace(&folder, "FOLDER"))
            .collect::<Vec<_>>()
    };
    let (expected, found) = (plain(expected, &theirs), plain(found, &ours));
    for (n, line) in expected.iter().enumerate() {
        assert_eq!(
            Some(line),
            found.get(n),
            "line {n} after {:?}",
            &found[n.saturating_sub(4)..n.min(found.len())]
        );
    }
    assert_eq!(expected.len(), found.len());
    for side in [&mut own, &mut peer] {
        side.qmp.say(r#"{"execute":"quit"}"#);
        side.machine.end();
    }
    // What is left says the same.
    for name in [
        "backup", "manual", "inc", "mirror", "middle", "base", "pivot",
    ] {
        let (a, b) = (there(&ours, name), there(&theirs, name));
        let format = if name == "base" { "raw" } else { "qcow2" };
        qemu_img(NAME, &["compare", "-f", format, "-F", format, &a, &b]);
    }
}

/// The file that the disk is in.
fn file_of(qmp: &mut Qmp) -> String {
    let block = qmp.say(r#"{"execute":"query-block"}"#);
    let file = &block["return"][0]["inserted"]["file"];
    file.as_str().expect("a file").to_owned()
}

#[test]
fn a_guest_writes_on_while_its_disk_moves() {
    const NAME: &str = "a_guest_writes_on_while_its_disk_moves";
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (disk, socket) = (path("disk"), directory.path().join("qmp"));
    if !qemu_img(NAME, &["create", "-q", "-f", "qcow2", &disk, "64M"]) {
        return;
    }
    // Numbers that grow, at places that repeat, until it is told to stop; then what it sees in the end.
    let script = "while true;do seq 1 20000|dd of=/dev/vda bs=64k seek=3 conv=notrunc 2>/dev/null;\
                  for i in 1 7 300 511;do seq $i 9999|dd of=/dev/vda bs=64k seek=$i conv=fsync,notrunc 2>/dev/null;done;\
                  read -t 0 x&&break;done;read x;sync;echo SUM-$(dd if=/dev/vda bs=1M 2>/dev/null|md5sum)";
    let Some(mut run) = guest(NAME, script) else {
        return;
    };
    run.arg("--disk").arg(format!("{disk},format=qcow2"));
    run.arg("--qmp").arg(format!("unix:{}", socket.display()));
    let mut machine = Machine::start(&mut run);
    machine.expect("GUEST-USER-SPACE");
    let mut qmp = Qmp::connect(&socket);
    let mut tell = |name: &str, arguments: Value| {
        let answer = qmp.say(&json!({ "execute": name, "arguments": arguments }).to_string());
        assert!(answer.get("error").is_none(), "{name}: {answer}");
    };
    let device = "disk0";
    tell(
        "blockdev-snapshot-sync",
        json!({ "device": device, "snapshot-file": path("one") }),
    );
    tell(
        "blockdev-snapshot-sync",
        json!({ "device": device, "snapshot-file": path("two") }),
    );
    tell(
        "drive-backup",
        json!({ "device": device, "target": path("backup"), "sync": "full" }),
    );
    let ended = |qmp: &mut Qmp| {
        let event = qmp.hear("BLOCK_JOB_COMPLETED");
        assert!(event.get("error").is_none(), "{event}");
        while qmp.hear("JOB_STATUS_CHANGE")["status"] != "null" {}
    };
    ended(&mut qmp);
    let tell = |qmp: &mut Qmp, name: &str, arguments: Value| {
        let answer = qmp.say(&json!({ "execute": name, "arguments": arguments }).to_string());
        assert!(answer.get("error").is_none(), "{name}: {answer}");
    };
    // The image in the middle goes into the lowest, then all into one file elsewhere, and back into a chain.
    let commit = json!({ "device": device, "top": path("one"), "base": disk });
    tell(&mut qmp, "block-commit", commit);
    ended(&mut qmp);
    let mirror =
        json!({ "device": device, "target": path("copy"), "sync": "full", "format": "raw" });
    tell(&mut qmp, "drive-mirror", mirror);
    qmp.hear("BLOCK_JOB_READY");
    tell(&mut qmp, "block-job-complete", json!({ "device": device }));
    ended(&mut qmp);
    assert_eq!(file_of(&mut qmp), path("copy"));
    let overlay = json!({ "device": device, "snapshot-file": path("three") });
    tell(&mut qmp, "blockdev-snapshot-sync", overlay);
    tell(&mut qmp, "block-stream", json!({ "device": device }));
    ended(&mut qmp);
    let overlay = json!({ "device": device, "snapshot-file": path("four") });
    tell(&mut qmp, "blockdev-snapshot-sync", overlay);
    tell(&mut qmp, "block-commit", json!({ "device": device }));
    qmp.hear("BLOCK_JOB_READY");
    tell(&mut qmp, "block-job-complete", json!({ "device": device }));
    ended(&mut qmp);
    assert_eq!(file_of(&mut qmp), path("three"));
    machine.send("stop\nstop\n");
    let (status, text) = machine.wait();
    assert!(status.success(), "{text}");
    // The kernel shows its command line, with the script, first.
    let sum = text
        .rsplit("SUM-")
        .next()
        .and_then(|rest| rest.split_whitespace().next());
    let sum = sum.unwrap_or_else(|| panic!("no sum: {text}"));
    for (format, name) in [("qcow2", "three"), ("qcow2", "backup")] {
        qemu_img(NAME, &["check", "-q", "-f", format, &path(name)]);
    }
    qemu_img(
        NAME,
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            &path("three"),
            &path("raw"),
        ],
    );
    let md5sum = Command::new("md5sum").arg(path("raw")).output().unwrap();
    let said = String::from_utf8_lossy(&md5sum.stdout).into_owned();
    assert!(
        said.starts_with(sum),
        "the guest saw {sum}, the file has {said}"
    );
    let numbers = std::fs::read(path("raw")).unwrap();
    assert!(numbers[3 << 16..].starts_with(b"1\n2\n3\n"));
}
