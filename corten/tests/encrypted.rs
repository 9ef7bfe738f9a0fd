//! `corten img` on encrypted volumes, beside qemu-img.

use std::path::Path;
use std::process::Command;

/// Runs a program; its exit status and all that it says. `None` if it is not there. (On a busy machine qemu-img may
/// give up measuring how fast keys are derived; then it is asked again.)
fn run(program: &str, folder: &Path, arguments: &[&str]) -> Option<(i32, String)> {
    for _ in 0..20 {
        let (code, text) = run_once(program, folder, arguments)?;
        if !text.contains("accurate CPU usage") {
            return Some((code, text));
        }
    }
    panic!("{arguments:?}: {program} does not get round to it");
}

fn run_once(program: &str, folder: &Path, arguments: &[&str]) -> Option<(i32, String)> {
    let mut command = Command::new(program);
    if program != "qemu-img" {
        command.arg("img");
    }
    let Ok(output) = command.args(arguments).current_dir(folder).output() else {
        eprintln!("skipped: {program} is not installed");
        return None;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    Some((output.status.code().unwrap_or(-1), text + &error))
}

const OURS: &str = env!("CARGO_BIN_EXE_corten");
const OBJECT: &str = "secret,id=s,file=password";

/// The lines without what differs from one volume to the next, and without what lies below.
fn same_of_all(text: &str) -> Vec<&str> {
    let lines = text.lines().take_while(|line| !line.starts_with("Child"));
    lines
        .filter(|l| !["uuid", "iters", "disk size"].iter().any(|w| l.contains(w)))
        .collect()
}

/// A format that encrypts, and what its options begin with.
const FORMATS: [(&str, &str); 2] = [("luks", ""), ("qcow2", "encrypt.")];

#[test]
fn volumes_go_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("password"), "hush, hush").unwrap();
    let content: Vec<u8> = (0..2 << 20).map(|n: u32| (n >> 8) as u8 & 0x7f).collect();
    std::fs::write(folder.join("base.raw"), &content).unwrap();
    for (format, prefix) in FORMATS {
        let start = if format == "qcow2" {
            "encrypt.format=luks,"
        } else {
            ""
        };
        let options = format!("{start}{prefix}key-secret=s,{prefix}iter-time=10");
        let make = [
            "convert", "--object", OBJECT, "-f", "raw", "-O", format, "-o", &options, "base.raw",
        ];
        for (maker, name) in [(OURS, "ours.img"), ("qemu-img", "theirs.img")] {
            let make = [&make[..], &[name]].concat();
            let made = run(maker, folder, &make);
            let Some((code, text)) = made else {
                return;
            };
            assert_eq!(code, 0, "{text}");
            let image = format!("driver={format},file.filename={name},{prefix}key-secret=s");
            for reader in [OURS, "qemu-img"] {
                let read = [
                    "convert",
                    "--object",
                    OBJECT,
                    "--image-opts",
                    &image,
                    "-O",
                    "raw",
                ];
                let (code, text) = run(reader, folder, &[&read[..], &["o.raw"]].concat()).unwrap();
                assert_eq!(code, 0, "{reader} {name}: {text}");
                assert!(std::fs::read(folder.join("o.raw")).unwrap() == content);
            }
            let (code, ours) = run(OURS, folder, &["info", name]).unwrap();
            assert_eq!(code, 0, "no password is needed: {ours}");
            let (_, theirs) = run("qemu-img", folder, &["info", name]).unwrap();
            assert_eq!(same_of_all(&ours), same_of_all(&theirs));
        }
        let object = ["--object", OBJECT];
        let unknown = format!("{start}{prefix}key-secret=x");
        let create = ["create", "-f", format, "-o", &options, "n.img", "1M"];
        let bare = ["convert", "-f", format, "theirs.img", "-O", "raw", "o.raw"];
        let lacking = ["create", "-f", format, "-o", &unknown, "n.img", "1M"];
        for arguments in [&[&create[..], &object].concat()[..], &bare, &lacking] {
            let ours = run(OURS, folder, arguments).unwrap();
            let theirs = run("qemu-img", folder, arguments).unwrap();
            assert_eq!(ours.0, theirs.0, "{arguments:?}: {}", ours.1);
        }
        let key = format!("{start}{prefix}key-secret=s");
        let measure = [
            "measure", "-O", format, "--size", "1M", "--object", OBJECT, "-o", &key,
        ];
        let ours = run(OURS, folder, &measure).unwrap();
        assert_eq!(ours, run("qemu-img", folder, &measure).unwrap());
    }
    let compressed = [
        "convert", "-c", "--object", OBJECT, "-f", "raw", "-O", "qcow2", "-o",
    ];
    let options = "encrypt.format=luks,encrypt.key-secret=s";
    let compressed = [&compressed[..], &[options, "base.raw", "c.qcow2"]].concat();
    assert_eq!(run(OURS, folder, &compressed).unwrap().0, 1);
    assert!(
        !folder.join("c.qcow2").exists(),
        "refused before anything is made"
    );
}

/// An encrypted image with a text in its first sector and a snapshot of another one.
fn with_snapshot(folder: &Path) {
    std::fs::write(folder.join("password"), "hush, hush").unwrap();
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let create = [
        "create", "-q", "-f", "qcow2", "--object", OBJECT, "-o", options, "a.qcow2", "1M",
    ];
    assert_eq!(run(OURS, folder, &create).unwrap().0, 0);
    let write = |pattern: &str| {
        let command = format!("write -P {pattern} 0 4096");
        let (code, text) = io(folder, &["-c", &command]);
        assert_eq!(code, 0, "{text}");
    };
    write("0x11");
    let snapshot = [
        "snapshot",
        "--object",
        OBJECT,
        "--image-opts",
        "-c",
        "then",
        IMAGE,
    ];
    assert_eq!(run(OURS, folder, &snapshot).unwrap().0, 0);
    write("0x22");
}

const IMAGE: &str = "driver=qcow2,file.filename=a.qcow2,encrypt.key-secret=s";

/// Runs `corten io` on the encrypted image.
fn io(folder: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(OURS);
    command.args(["io", "--object", OBJECT, "--image-opts", IMAGE]);
    let output = command
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

#[test]
fn io_and_nbd_take_passwords() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    with_snapshot(folder);
    let (code, text) = io(folder, &["-r", "-c", "read -P 0x22 0 4096"]);
    assert!(code == 0 && !text.contains("failed"), "{text}");
    let (code, text) = io(folder, &["-r", "-c", "read -P 0x11 0 4096"]);
    assert!(code != 0 || text.contains("failed"), "{text}");
    for (more, byte) in [(&[][..], 0x22), (&["-l", "then"], 0x11)] {
        // The server before may still be about to end: it shares the image, and has a socket of its own.
        let socket = folder.join(format!("socket-{byte}"));
        let mut server = Command::new(OURS);
        server
            .args([
                "nbd",
                "--fork",
                "-r",
                "--object",
                OBJECT,
                "--image-opts",
                "-k",
            ])
            .arg(&socket);
        let started = server
            .args(more)
            .arg(IMAGE)
            .current_dir(folder)
            .status()
            .unwrap();
        assert!(started.success());
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let read = ["convert", "-f", "raw", "-O", "raw", &uri, "o.raw"];
        let (code, text) = run(OURS, folder, &read).unwrap();
        assert_eq!(code, 0, "{text}");
        let content = std::fs::read(folder.join("o.raw")).unwrap();
        assert!(content[..4096].iter().all(|b| *b == byte), "{more:?}");
        assert!(content[4096..].iter().all(|b| *b == 0) && content.len() == 1 << 20);
    }
}

#[test]
fn passwords_are_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let with = |object: &str, key: &str| {
        let options = format!("key-secret={key},iter-time=1");
        let create = ["create", "-f", "luks", "--object", object, "-o", &options];
        run(OURS, folder, &[&create[..], &["a.luks", "1M"]].concat()).unwrap()
    };
    let (code, text) = with("secret,id=s,data=xyzzy", "s");
    assert_eq!(code, 0, "{text}");
    let mut texts = vec![text];
    for (object, key) in [
        ("secret,id=s,data=xyz,plugh", "s"),
        ("secret,id=t,data=xyzzy", "s"),
        ("secret,data=xyzzy", "s"),
        ("tls-creds,id=s,data=xyzzy", "s"),
    ] {
        let (code, text) = with(object, key);
        assert_eq!(code, 1, "{object}: {text}");
        texts.push(text);
    }
    let wrong = [
        "convert",
        "--object",
        "secret,id=s,data=frotz",
        "--image-opts",
    ];
    let image = "driver=luks,file.filename=a.luks,key-secret=s";
    let (code, text) = run(OURS, folder, &[&wrong[..], &[image, "b.raw"]].concat()).unwrap();
    assert_eq!(code, 1);
    assert!(text.contains("Invalid password"), "{text}");
    texts.push(text);
    for text in texts {
        let shown = ["xyz", "plugh", "frotz"]
            .iter()
            .any(|word| text.contains(word));
        assert!(!shown, "{text}");
    }
}

/// How many places for passwords are taken.
fn active(folder: &Path, name: &str) -> usize {
    let (code, text) = run(OURS, folder, &["info", name]).unwrap();
    assert_eq!(code, 0, "{text}");
    text.matches("active: true").count()
}

#[test]
fn passwords_are_changed_as_qemu_img_does() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (format, prefix) in FORMATS {
        let start = if format == "qcow2" {
            "encrypt.format=luks,"
        } else {
            ""
        };
        let options = format!("{start}{prefix}key-secret=s0,{prefix}iter-time=10");
        let objects: Vec<String> = (0..3)
            .flat_map(|n| ["--object".to_owned(), format!("secret,id=s{n},data=pw{n}")])
            .collect();
        let objects: Vec<&str> = objects.iter().map(String::as_str).collect();
        let create = [
            &["create", "-q", "-f", format, "-o", &options],
            &objects[..],
            &["a", "1M"],
        ]
        .concat();
        assert_eq!(run(OURS, folder, &create).unwrap().0, 0);
        let amend = |program: &str, key: &str, words: &str| {
            let image = format!("driver={format},{prefix}key-secret={key},file.filename=a");
            let words: Vec<String> = words
                .split(',')
                .map(|word| format!("{prefix}{word}"))
                .collect();
            let words = words.join(",");
            let end = ["--image-opts", &image, "-o", &words];
            run(
                program,
                folder,
                &[&["amend"], &objects[..], &end[..]].concat(),
            )
        };
        let opens = |program: &str, key: &str| {
            let image = format!("driver={format},{prefix}key-secret={key},file.filename=a");
            let read = ["convert", "--image-opts", &image, "-O", "raw", "o.raw"];
            run(
                program,
                folder,
                &[&read[..1], &objects[..], &read[1..]].concat(),
            )
            .unwrap()
            .0 == 0
        };
        // Each adds and takes away what the other has made.
        for (program, other, words, left) in [
            (
                OURS,
                "qemu-img",
                "state=active,new-secret=s1,iter-time=10",
                2,
            ),
            (
                OURS,
                "qemu-img",
                "state=active,new-secret=s2,keyslot=5,iter-time=10",
                3,
            ),
            ("qemu-img", OURS, "state=inactive,keyslot=5", 2),
            (
                "qemu-img",
                OURS,
                "state=active,new-secret=s2,iter-time=10",
                3,
            ),
            (OURS, "qemu-img", "state=inactive,old-secret=s2", 2),
        ] {
            let Some((code, text)) = amend(program, "s0", words) else {
                return;
            };
            assert_eq!(code, 0, "{program} {words}: {text}");
            assert_eq!(active(folder, "a"), left, "{words}");
            for program in [program, other] {
                assert!(opens(program, "s0") && opens(program, "s1"), "{words}");
                assert_eq!(opens(program, "s2"), left == 3, "{words}");
            }
        }
        for words in [
            "state=active",
            "state=active,new-secret=s2,old-secret=s1",
            "state=active,new-secret=s2,keyslot=1",
            "state=active,new-secret=s2,keyslot=8",
            "state=inactive",
            "state=inactive,keyslot=7",
            "state=inactive,old-secret=s2",
            "state=inactive,new-secret=s2,keyslot=1",
        ] {
            let (ours, theirs) = (
                amend(OURS, "s0", words).unwrap(),
                amend("qemu-img", "s0", words).unwrap(),
            );
            assert_eq!(
                (ours.0, theirs.0),
                (1, 1),
                "{words}: {} {}",
                ours.1,
                theirs.1
            );
            let said = |text: &str| {
                text.split_once(": ")
                    .map_or("", |(_, text)| text)
                    .trim()
                    .to_owned()
            };
            assert_eq!(said(&ours.1), said(&theirs.1), "{words}");
        }
        assert_eq!(
            amend(OURS, "s1", "state=inactive,old-secret=s0").unwrap().0,
            0
        );
        assert!(!opens("qemu-img", "s0") && opens("qemu-img", "s1"));
        for words in ["state=inactive,old-secret=s1", "state=inactive,keyslot=1"] {
            let (code, text) = amend(OURS, "s1", words).unwrap();
            assert!(code == 1 && text.contains("refusing operation"), "{text}");
            assert_eq!(active(folder, "a"), 1);
        }
    }
}
