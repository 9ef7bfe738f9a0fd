//! What becomes of a guest's disks.

mod machine;
mod qmp;

use std::time::{Duration, Instant};

use machine::{Machine, guest, run_to_end};
use qmp::Qmp;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;

#[test]
fn disks_keep_what_was_written_in_every_format() {
    const NAME: &str = "disks_keep_what_was_written_in_every_format";
    let dir = tempfile::tempdir().unwrap();
    let mut disks = Vec::new();
    for format in ["raw", "qcow2", "vpc", "vhdx", "vmdk", "vdi"] {
        let Some(mut create) = machine::corten() else {
            println!("skipped: {NAME}: no binary");
            return;
        };
        let path = dir.path().join(format);
        create
            .args(["img", "create", "-q", "-f", format])
            .arg(&path);
        assert!(create.arg("64M").status().unwrap().success(), "{format}");
        disks.push((format, path));
    }
    let run = |script: &str| {
        let mut run = guest(NAME, script)?;
        for (format, path) in &disks {
            run.arg("--disk");
            run.arg(format!("{},format={format}", path.display()));
        }
        Some(run_to_end(&mut run))
    };
    let write = "for d in /dev/vd?;do seq 1 200000|dd of=$d bs=64k seek=3 conv=fsync;done";
    let read = "for d in /dev/vd?;do dd if=$d bs=64k skip=3|head -c 1288895|md5sum;done;seq 1 200000|md5sum";
    let (Some(_), Some(text)) = (run(write), run(read)) else {
        return;
    };
    let sums: Vec<&str> = text.lines().filter(|l| l.ends_with("  -")).collect();
    assert_eq!(sums.len(), disks.len() + 1, "{text}");
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
    // The peer reads the same.
    let numbers: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    for (format, path) in &disks {
        let (path, raw) = (path.to_str().unwrap(), dir.path().join("copy"));
        let convert = ["convert", "-f", format, "-O", "raw", path];
        let Some(done) = tool(
            NAME,
            "qemu-img",
            &[&convert[..], &[raw.to_str().unwrap()]].concat(),
        ) else {
            return;
        };
        assert!(done.status.success(), "{format}: {done:?}");
        let bytes = std::fs::read(&raw).unwrap();
        assert!(bytes[3 << 16..].starts_with(numbers.as_bytes()), "{format}");
    }
}

/// Runs a tool of the host; `None`, with a line that says so, where it is missing.
fn tool(test: &str, name: &str, arguments: &[&str]) -> Option<std::process::Output> {
    let output = std::process::Command::new(name).args(arguments).output();
    if output.is_err() {
        println!("skipped: {test}: needs {name}");
    }
    output.ok()
}

#[test]
fn a_killed_machine_loses_nothing_that_the_guest_has_flushed() {
    const NAME: &str = "a_killed_machine_loses_nothing_that_the_guest_has_flushed";
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (raw, qcow2, after) = (path("a.raw"), path("a.qcow2"), path("after.raw"));
    if tool(NAME, "/sbin/mke2fs", &["-q", "-t", "ext4", &raw, "64M"]).is_none() {
        return;
    }
    let script = "mount -t ext4 /dev/vda /root;i=0;while true;do i=$((i- -1));echo data-$i > /root/f$i;sync;echo SYNCED-$i-;done";
    for last in [3, 11] {
        let img = |arguments: &[&str]| {
            let mut img = machine::corten()?;
            let status = img.arg("img").args(arguments).status().unwrap();
            assert!(status.success(), "corten img {arguments:?}: {status}");
            Some(())
        };
        if img(&["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2]).is_none() {
            println!("skipped: {NAME}: no binary");
            return;
        }
        let Some(mut run) = guest(NAME, script) else {
            return;
        };
        let mut machine = Machine::start(run.arg("--disk").arg(format!("{qcow2},format=qcow2")));
        machine.expect(&format!("SYNCED-{last}-"));
        drop(machine); // by SIGKILL
        img(&["check", "-q", "-r", "leaks", &qcow2]);
        img(&["convert", "-f", "qcow2", "-O", "raw", &qcow2, &after]);
        let Some(replayed) = tool(NAME, "/sbin/e2fsck", &["-p", &after]) else {
            return;
        };
        let said = String::from_utf8_lossy(&replayed.stdout).into_owned();
        assert!(replayed.status.code().is_some_and(|c| c <= 1), "{said}");
        let Some(checked) = tool(NAME, "/sbin/e2fsck", &["-f", "-n", &after]) else {
            return;
        };
        assert!(
            checked.status.success(),
            "{}",
            String::from_utf8_lossy(&checked.stdout)
        );
        for n in 1..=last {
            let cat = format!("cat f{n}");
            let Some(found) = tool(NAME, "/sbin/debugfs", &["-R", &cat, &after]) else {
                return;
            };
            assert_eq!(
                String::from_utf8_lossy(&found.stdout),
                format!("data-{n}\n")
            );
        }
    }
}

#[test]
fn a_guest_works_on_encrypted_disks() {
    const NAME: &str = "a_guest_works_on_encrypted_disks";
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("password"), "open sesame").unwrap();
    let object = format!("secret,id=s,file={}", path("password"));
    for (format, options) in [
        (
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ),
        ("luks", "key-secret=s,iter-time=10"),
    ] {
        let Some(mut create) = machine::corten() else {
            println!("skipped: {NAME}: no binary");
            return;
        };
        create.args([
            "img", "create", "-q", "--object", &object, "-f", format, "-o", options,
        ]);
        assert!(
            create
                .args([&path(format), "16M"])
                .status()
                .unwrap()
                .success(),
            "{format}"
        );
    }
    let script = "for d in /dev/vd?;do seq 1 200000|dd of=$d bs=64k seek=3 conv=fsync;done";
    let Some(mut run) = guest(NAME, script) else {
        return;
    };
    run.args(["--object", &object]);
    run.args([
        "--disk",
        &format!("{},format=qcow2,encrypt.key-secret=s", path("qcow2")),
    ]);
    run.args([
        "--disk",
        &format!("{},format=luks,key-secret=s", path("luks")),
    ]);
    run_to_end(&mut run);
    let numbers: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    for (format, key) in [("qcow2", "encrypt.key-secret"), ("luks", "key-secret")] {
        let stored = std::fs::read(path(format)).unwrap();
        assert!(
            !stored.windows(64).any(|w| *w == numbers.as_bytes()[..64]),
            "{format}"
        );
        let image = format!("driver={format},{key}=s,file.filename={}", path(format));
        let convert = [
            "convert",
            "--object",
            &object,
            "--image-opts",
            &image,
            "-O",
            "raw",
        ];
        let Some(done) = tool(NAME, "qemu-img", &[&convert[..], &[&path("raw")]].concat()) else {
            return;
        };
        assert!(done.status.success(), "{format}: {done:?}");
        let bytes = std::fs::read(path("raw")).unwrap();
        assert!(bytes[3 << 16..].starts_with(numbers.as_bytes()), "{format}");
    }
}

/// The guest with an empty raw disk and QMP.
fn with_empty_disk(
    test: &str,
    dir: &tempfile::TempDir,
    options: &str,
    script: &str,
) -> Option<Machine> {
    let (disk, socket) = (dir.path().join("disk"), dir.path().join("qmp"));
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut run = guest(test, script)?;
    run.arg("--disk")
        .arg(format!("{},format=raw,{options}", disk.display()));
    run.arg("--qmp").arg(format!("unix:{}", socket.display()));
    Some(Machine::start(&mut run))
}

fn qmp(dir: &tempfile::TempDir) -> Qmp {
    Qmp::connect(&dir.path().join("qmp"))
}

fn ask(qmp: &mut Qmp, name: &str, arguments: &serde_json::Value) -> serde_json::Value {
    let answer = qmp.say(&json!({ "execute": name, "arguments": arguments }).to_string());
    assert!(answer.get("error").is_none(), "{name}: {answer}");
    answer["return"].clone()
}

#[test]
fn limits_hold_until_they_are_changed() {
    const NAME: &str = "limits_hold_until_they_are_changed";
    let dir = tempfile::tempdir().unwrap();
    // 4 MiB take a minute at this rate.
    let script = "dd if=/dev/zero of=/dev/vda bs=64k count=64 conv=fsync;echo WRITTEN-$?";
    let options = "id=slow,throttling.bps-write=65536";
    let Some(mut machine) = with_empty_disk(NAME, &dir, options, script) else {
        return;
    };
    machine.expect("GUEST-USER-SPACE");
    let mut qmp = qmp(&dir);
    let written = |qmp: &mut Qmp| {
        let stats = ask(qmp, "query-blockstats", &json!({}));
        stats[0]["stats"]["wr_bytes"].as_u64().unwrap()
    };
    while written(&mut qmp) == 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
    let (start, before) = (Instant::now(), written(&mut qmp));
    std::thread::sleep(Duration::from_secs(2));
    let (more, time) = (written(&mut qmp) - before, start.elapsed());
    // One request may be larger than what is due.
    let most = 65536.0 * (time.as_secs_f64() + 0.2) + f64::from(2 << 20);
    assert!((more as f64) < most, "{more} bytes in {time:?}");
    assert!(!machine.shown().contains("WRITTEN-0"));
    let block = ask(&mut qmp, "query-block", &json!({}));
    assert_eq!(
        (&block[0]["device"], &block[0]["inserted"]["bps_wr"]),
        (&json!("slow"), &json!(65536))
    );
    let none = json!({
        "device": "slow", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
    });
    ask(&mut qmp, "block_set_io_throttle", &none);
    let start = Instant::now();
    machine.expect("WRITTEN-0");
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
}

/// How large a file the process may write.
fn limit_files(machine: &Machine, bytes: Option<u64>) {
    let process = Pid::from_raw(machine.id().cast_signed());
    let limit = Rlimit {
        current: bytes,
        maximum: None,
    };
    prlimit(process, Resource::Fsize, limit).unwrap();
}

#[test]
fn a_guest_whose_disk_fails_stands_until_it_is_mended() {
    const NAME: &str = "a_guest_whose_disk_fails_stands_until_it_is_mended";
    let dir = tempfile::tempdir().unwrap();
    let script = "read x;seq 1 200000|dd of=/dev/vda bs=64k seek=100 conv=fsync;echo WRITTEN-$?;dd if=/dev/vda bs=64k skip=100|head -c 1288895|md5sum;seq 1 200000|md5sum";
    let Some(mut machine) = with_empty_disk(NAME, &dir, "werror=stop", script) else {
        return;
    };
    machine.expect("GUEST-USER-SPACE");
    let mut qmp = qmp(&dir);
    limit_files(&machine, Some(1 << 20));
    machine.send("go\n");
    let event = qmp.hear("BLOCK_IO_ERROR");
    assert_eq!(
        (&event["device"], &event["operation"], &event["action"]),
        (&json!("disk0"), &json!("write"), &json!("stop"))
    );
    qmp.hear("STOP");
    assert_eq!(
        ask(&mut qmp, "query-status", &json!({}))["status"],
        "io-error"
    );
    let block = ask(&mut qmp, "query-block", &json!({}));
    assert_eq!(block[0]["io-status"], "failed");
    // It fails again.
    ask(&mut qmp, "cont", &json!({}));
    qmp.hear("BLOCK_IO_ERROR");
    qmp.hear("STOP");
    limit_files(&machine, None);
    ask(&mut qmp, "cont", &json!({}));
    let (status, text) = machine.wait();
    assert!(status.success(), "{text}");
    assert!(text.contains("WRITTEN-0"), "{text}");
    let sums: Vec<&str> = text.lines().filter(|l| l.ends_with("  -")).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{text}");
}
