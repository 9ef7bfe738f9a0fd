//! What can't be done is refused in one line, with the right status, and changes nothing.

mod machine;

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

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let net = format!("user,hostfwd=tcp:127.0.0.1:{port}-:22");
    check(
        &[&soft[..], &["--kernel", &kernel, "--net", &net]].concat(),
        1,
        "--net",
    );
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
