//! What can't be done is refused in one line, with the right status, and changes nothing.

mod machine;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;

/// Runs `corten run` with arguments; `None`, with a line that says so, where there is no binary.
fn refused(arguments: &[&str]) -> Option<Output> {
    let Some(mut run) = machine::corten() else {
        println!("skipped: needs the binary that 'cargo xtask test' makes");
        return None;
    };
    run.arg("run")
        .args(arguments)
        .stdin(std::process::Stdio::null());
    Some(run.output().expect("the binary starts"))
}

#[track_caller]
fn check(arguments: &[&str], status: i32, part: &str) {
    let Some(output) = refused(arguments) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
    assert!(
        said.contains(part),
        "{arguments:?}: {said:?} does not say {part:?}"
    );
    assert!(!said.contains("panicked"), "{said}");
    // Usage errors may show the usage too; the others are one line.
    if status == 1 {
        assert_eq!(
            said.lines().filter(|l| !l.starts_with("corten: ")).count(),
            1,
            "{said:?}"
        );
    }
}

fn path(dir: &Path, name: &str, content: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn usage_errors_end_with_status_2() {
    check(&["--warp"], 2, "--warp");
    check(&["--accel", "magic"], 2, "expected one of auto, kvm, soft");
    check(&["--cpus", "0"], 2, "expected 1 to");
    check(&["--memory", "lots"], 2, "expected a size");
    check(&["--disk", "a.img,format=bmp"], 2, "expected raw, qcow2");
    check(&["--net", "user,hostfwd=what"], 2, "hostfwd=what");
    check(&["--serial", "teletype"], 2, "expected stdio");
    check(&["--qmp", "/x"], 2, "expected unix:PATH");
    check(&["--append", "x"], 2, "--kernel");
    check(&["--object", "tls,id=x"], 2, "expected secret,id=ID");
    check(
        &["--object", "secret,id=x,data=xyzzy"],
        2,
        "expected file=FILE",
    );
    check(
        &["--disk", "a,key-secret=x"],
        2,
        "key-secret=x: expected the id",
    );
    check(&["--disk", "a,rerror=enospc"], 2, "report, ignore or stop");
    check(
        &["--disk", "a,throttling.bps-read-max=5"],
        2,
        "wants bps-read",
    );
}

#[test]
fn what_can_t_be_opened_ends_with_status_1() {
    let dir = tempfile::tempdir().unwrap();
    let soft = ["--accel", "soft", "--serial", "null", "--memory", "64M"];
    let with = |more: &[&'static str]| [&soft[..], more].concat();
    check(
        &with(&["--kernel", "/nonexistent/vmlinuz"]),
        1,
        "/nonexistent/vmlinuz: No such file",
    );
    check(&soft, 1, "--kernel");
    check(
        &["--accel", "soft", "--memory", "900T", "--kernel", "x"],
        1,
        "--memory",
    );

    let kernel = path(dir.path(), "text", b"this is no kernel");
    let elf = path(dir.path(), "elf", b"\x7fELF\x02\x01\x01");
    let empty = path(dir.path(), "empty", b"");
    for (file, part) in [
        (&kernel, "expected a bzImage or an ELF kernel"),
        (&elf, "truncated"),
        (&empty, "empty"),
    ] {
        let arguments = [&soft[..], &["--kernel", file]].concat();
        check(&arguments, 1, part);
    }
    let missing = [
        &soft[..],
        &["--kernel", &kernel, "--disk", "/nonexistent/disk"],
    ]
    .concat();
    check(&missing, 1, "/nonexistent/disk");
    let garbage = path(
        dir.path(),
        "garbage",
        &[b"QFI\xfb\0\0\0\x03".as_slice(), &[0xff; 500]].concat(),
    );
    let disk = format!("{garbage},format=qcow2");
    check(
        &[&soft[..], &["--kernel", &kernel, "--disk", &disk]].concat(),
        1,
        "garbage",
    );
    assert_eq!(std::fs::read(&garbage).unwrap()[8..], [0xff; 500]);

    // A compressed loop image's start, with the line of shell script that they all begin with.
    let script =
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    let mut cloop = script.to_vec();
    cloop.resize(128, 0);
    for number in [512u32, 0] {
        cloop.extend(number.to_be_bytes()); // sizes of blocks and of the index
    }
    cloop.extend(136u64.to_be_bytes());
    let cloop = path(dir.path(), "cloop", &cloop);
    let disk = format!("{cloop},format=cloop");
    check(
        &[&soft[..], &["--kernel", &kernel, "--disk", &disk]].concat(),
        1,
        "can only be read: expected readonly=on",
    );

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let net = format!("user,hostfwd=tcp:127.0.0.1:{port}-:22");
    check(
        &[&soft[..], &["--kernel", &kernel, "--net", &net]].concat(),
        1,
        "--net",
    );
}

/// Root may open everything, so it becomes somebody else for this.
#[test]
fn a_disk_that_may_not_be_opened_is_refused() {
    const NAME: &str = "a_disk_that_may_not_be_opened_is_refused";
    let dir = tempfile::tempdir().unwrap();
    let (kernel, disk) = (
        path(dir.path(), "kernel", &machine::elf_of(&[0xf4])),
        path(dir.path(), "disk", &[0x5a; 4096]),
    );
    let only = |file: &Path, mode| {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    only(dir.path(), 0o755);
    only(Path::new(&kernel), 0o644);
    let Some(binary) = machine::corten() else {
        println!("skipped: {NAME}: needs the binary that 'cargo xtask test' makes");
        return;
    };
    let program = dir.path().join("corten");
    std::fs::copy(binary.get_program(), &program).unwrap();
    for mode in [0o000, 0o444] {
        only(Path::new(&disk), mode);
        let mut run = if rustix::process::geteuid().is_root() {
            let mut setpriv = std::process::Command::new("setpriv");
            setpriv.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
            setpriv.arg(&program);
            setpriv
        } else {
            std::process::Command::new(&program)
        };
        run.args([
            "run", "--accel", "soft", "--memory", "64M", "--serial", "null",
        ]);
        run.args(["--kernel", &kernel, "--disk", &format!("{disk},format=raw")]);
        let Ok(output) = run.stdin(std::process::Stdio::null()).output() else {
            println!("skipped: {NAME}: needs setpriv");
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{mode:o}: {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(
            last.contains(&disk) && last.contains("Permission denied"),
            "{said}"
        );
        only(Path::new(&disk), 0o644);
        assert_eq!(std::fs::read(&disk).unwrap(), [0x5a; 4096]);
    }
}

#[test]
fn an_image_that_another_machine_has_open_is_refused() {
    const NAME: &str = "an_image_that_another_machine_has_open_is_refused";
    let dir = tempfile::tempdir().unwrap();
    let image = path(dir.path(), "shared", &[7; 65536]);
    let disk = format!("{image},format=raw");
    let Some(mut first) = machine::guest(NAME, "sleep 1000") else {
        return;
    };
    let mut first = machine::Machine::start(first.args(["--disk", &disk]));
    first.expect("GUEST-USER-SPACE");
    let Some(mut second) = machine::guest(NAME, "true") else {
        return;
    };
    let second = second
        .args(["--disk", &disk])
        .stdin(std::process::Stdio::null());
    let output = second.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let holder = format!("in use by process {}", first.id());
    assert!(said.contains(&image) && said.contains(&holder), "{said}");
    assert!(output.stdout.is_empty());
    // It is free as soon as the first is gone, however that ended.
    drop(first);
    let Some(mut third) = machine::guest(NAME, "md5sum /dev/vda") else {
        return;
    };
    machine::run_to_end(third.args(["--disk", &disk]));
    assert_eq!(std::fs::read(&image).unwrap(), [7; 65536]);
}

#[test]
fn broken_kernels_and_ram_disks_end_in_a_line() {
    const NAME: &str = "broken_kernels_and_ram_disks_end_in_a_line";
    let Some(whole) = std::env::var_os("CORTEN_TEST_KERNEL") else {
        println!("skipped: {NAME}: needs the guest that 'cargo xtask test' makes");
        return;
    };
    let initrd = std::env::var_os("CORTEN_TEST_INITRD").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let soft = ["--accel", "soft", "--serial", "null", "--memory", "256M"];
    let (kernel, whole) = (std::fs::read(&whole).unwrap(), whole.to_str().unwrap());
    for (name, bytes) in [
        ("half", &kernel[..kernel.len() / 2]),
        ("setup only", &kernel[..2048]),
        ("no setup", &kernel[..700]),
    ] {
        let broken = path(dir.path(), name, bytes);
        let none = ["--kernel-cache", "none", "--kernel", &broken];
        check(&[&soft[..], &none].concat(), 1, name);
    }
    let missing = ["--kernel", whole, "--initrd", "/nonexistent/initrd"];
    check(&[&soft[..], &missing].concat(), 1, "/nonexistent/initrd");
    let huge = path(dir.path(), "huge", b"");
    let file = std::fs::File::options().write(true).open(&huge).unwrap();
    file.set_len(300 << 20).unwrap();
    let large = ["--kernel", whole, "--initrd", &huge];
    check(&[&soft[..], &large].concat(), 1, "huge");

    // A RAM disk that is cut off is the kernel's to judge: it panics, and the machine ends.
    let initrd = std::fs::read(initrd).unwrap();
    let cut = path(dir.path(), "cut", &initrd[..initrd.len() / 2]);
    let Some(output) = refused(
        &[
            &soft[..],
            &["--no-reboot", "--append", "panic=-1", "--kernel", whole],
            &["--initrd", &cut],
        ]
        .concat(),
    ) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("corten: the guest has reset"), "{said}");
}

#[test]
fn the_specification_can_be_printed() {
    let Some(output) = refused(&["--print-spec", "--disk", "a.img", "--net", "user"]) else {
        return;
    };
    assert!(output.status.success());
    let spec: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(spec["disks"][0]["path"], "a.img");
    assert_eq!(spec["nets"][0]["link"]["type"], "user");
}
