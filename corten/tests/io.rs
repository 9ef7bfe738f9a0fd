//! `corten io` beside qemu-io: the same commands, the same words, exit codes and images.

use std::path::Path;
use std::process::Command;

/// Commands of one run each; rates and times are not compared.
const RUNS: &[&[&str]] = &[
    &[
        "write -P 0x11 0 64k",
        "write -P 1 100 200",
        "read -P 0x11 0 100",
        "read -v 96 40",
    ],
    &["read -P 5 0 1k", "length"],
    &["write 20M 1k"],
    &["read 20M 1k"],
    &["discard 20M 1k", "writev 20M 1k", "readv 20M 1k"],
    // Before zeroes are written where nothing is: we store nothing for them.
    &[
        "map",
        "alloc 0",
        "alloc 0 4M",
        "alloc 3M 64k",
        "alloc 20M",
        "alloc 1",
        "length",
        "info",
    ],
    &[
        "write -z 1M 64k",
        "write -zu 1088k 64k",
        "write -zf 2M 512",
        "write -z 1 512",
        "read -P 0 1 512",
    ],
    &[
        "write -c 3M 64k",
        "read -P 0xcd 3M 64k",
        "write -c 100 512",
        "write -c 0 100",
    ],
    &[
        "write -u 0 64k",
        "write -n 0 64k",
        "write -bz 0 512",
        "write -fc 0 64k",
        "write -z -P 1 0 512",
    ],
    &[
        "write -s pattern 4M 512",
        "read -v 4M 16",
        "write -s empty 0 5",
        "write -s missing 0 512",
    ],
    &[
        "read -P 1 -s 5 -l 5 0 10",
        "read -P 0 -s 50 0 10",
        "read -P 0 -l 20 0 10",
    ],
    &[
        "read 0 3G",
        "write 0 4E",
        "read 0 9E",
        "read 0 99999999999999999999",
        "readv 0 3G",
    ],
    &["discard 1M 64k", "discard -q 64k 64k", "read -P 0 1M 64k"],
    &[
        "truncate 12M",
        "length",
        "truncate 5x",
        "truncate 11M",
        "length",
    ],
    &[
        "aio_write -P 7 0 64k 1k",
        "aio_flush",
        "aio_read -P 7 0 64k",
        "aio_flush",
        "aio_read -P 8 0 512",
        "aio_flush",
    ],
    &[
        "aio_write -z 0 64k 64k",
        "aio_write -z 0 64k",
        "aio_flush",
        "aio_write -u 0 512",
        "aio_read -i 0 512",
    ],
    &[
        "aio_read 20M 1k",
        "aio_flush",
        "aio_write 20M 1k",
        "aio_flush",
    ],
    &[
        "writev -P 3 0 1k 2k",
        "readv -P 3 0 1k 2k",
        "readv -v 0 16",
        "readv -P 4 0 512",
    ],
    &[
        "read x 1",
        "read 0 x",
        "read -P zz 0 1",
        "read -P 300 0 1",
        "writev x 1",
        "discard x 1",
    ],
    &["sleep 1", "sleep x", "sigraise x", "alloc 0 1"],
    &[
        "close",
        "read 0 512",
        "foo",
        "length 1",
        "read 0",
        "truncate",
        "alloc",
    ],
    &[
        "open b",
        "close",
        "open -r image.qcow2",
        "write 0 512",
        "read -q 0 512",
        "close",
        "open -o driver=raw image.qcow2",
        "close",
    ],
    &[
        "reopen -r",
        "write 0 512",
        "reopen -w",
        "write -q -P 9 5M 512",
        "reopen -rw",
        "reopen -c foo",
    ],
    &[
        "open -o driver=qcow2,file.filename=image.qcow2",
        "close",
        "open -n image.qcow2",
    ],
    &["break a b", "resume a", "remove_break a"],
    &["flush", "quit", "foo"],
];

/// What is said, without what differs from run to run.
fn words(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let of_transfer = |line: &str| match line.split_once(" ops; ") {
        Some((before, _)) => before.to_owned(),
        None => line.to_owned(),
    };
    // How a command is used is told in words of our own.
    let lines = text
        .lines()
        .filter(|line| !line.contains(" -- ") || line.contains("error"));
    lines.map(of_transfer).collect()
}

fn run(program: &Path, directory: &Path, commands: &[&str]) -> Option<(i32, Vec<String>, usize)> {
    let output = Command::new(program)
        .args(commands.iter().flat_map(|c| ["-c", c]))
        .arg("image.qcow2")
        .current_dir(directory)
        .output()
        .ok()?;
    let complaints = words(&output.stderr).len();
    Some((
        output.status.code().unwrap_or(-1),
        words(&output.stdout),
        complaints,
    ))
}

fn prepare(directory: &Path) -> bool {
    std::fs::write(directory.join("pattern"), "abc").unwrap();
    std::fs::write(directory.join("empty"), "").unwrap();
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "image.qcow2", "10M"])
        .current_dir(directory)
        .status();
    created.is_ok_and(|status| status.success())
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

/// The program under the old name, in `directory`.
fn link(directory: &Path) -> std::path::PathBuf {
    let link = directory.join("qemu-io");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_corten"), &link).unwrap();
    link
}

#[test]
fn every_command_answers_as_qemu_io_does() {
    let (ours, theirs) = (folder(), folder());
    if !prepare(ours.path()) || !prepare(theirs.path()) {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let link = link(ours.path());
    for commands in RUNS {
        let got = run(&link, ours.path(), commands).unwrap();
        let Some(expected) = run(Path::new("qemu-io"), theirs.path(), commands) else {
            eprintln!("skipped: qemu-io is not installed");
            return;
        };
        assert_eq!(got, expected, "{commands:?}");
    }
    let (a, b) = (
        ours.path().join("image.qcow2"),
        theirs.path().join("image.qcow2"),
    );
    let compared = Command::new("qemu-img")
        .arg("compare")
        .args([&a, &b])
        .output()
        .unwrap();
    assert!(
        compared.status.success(),
        "{}",
        String::from_utf8_lossy(&compared.stdout)
    );
    let checked = Command::new("qemu-img")
        .arg("check")
        .arg(&a)
        .output()
        .unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stdout)
    );
}

#[test]
fn commands_come_from_standard_input_too() {
    use std::io::Write;
    let folder = folder();
    std::fs::write(folder.path().join("disk"), vec![0; 4096]).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_corten"))
        .args(["io", "-f", "raw", "disk"])
        .current_dir(folder.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let script =
        "write -q -P 5 100 200\n\nread -q -P 5 100 200\nlength\nread -P 6 0 1\nquit\nlength\n";
    child
        .stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.matches("corten io> 4 KiB\n").count(), 1, "{text}");
    assert!(text.contains("Pattern verification failed at offset 0, 1 bytes"));
    let disk = std::fs::read(folder.path().join("disk")).unwrap();
    assert!(disk[100..300] == [5; 200] && disk[99] == 0 && disk[300] == 0);
}

#[test]
fn an_image_that_can_t_be_preallocated_stays_as_it_is() {
    let folder = folder();
    let corten = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_corten"))
            .args(arguments)
            .current_dir(folder.path())
            .output()
            .unwrap()
    };
    std::fs::write(folder.path().join("raw"), vec![7; 1 << 20]).unwrap();
    let created = corten(&["img", "create", "-q", "-f", "vpc", "vpc", "8M"]);
    assert!(created.status.success());
    for (format, how) in [("raw", "metadata"), ("vpc", "falloc")] {
        let before = std::fs::read(folder.path().join(format)).unwrap();
        let truncate = format!("truncate -m {how} 16M");
        let preallocation = format!("--preallocation={how}");
        for arguments in [
            &["io", "-f", format, "-c", &truncate, format][..],
            &["img", "resize", "-f", format, &preallocation, format, "16M"],
        ] {
            assert_eq!(corten(arguments).status.code(), Some(1), "{arguments:?}");
            let after = std::fs::read(folder.path().join(format)).unwrap();
            assert!(before == after, "{arguments:?}");
        }
    }
}
