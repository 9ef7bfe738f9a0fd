//! `corten img bitmap` and what else has to do with persistent bitmaps, beside qemu-img, qemu-io and qemu-nbd.

use std::path::Path;
use std::process::Command;

const OURS: &str = env!("CARGO_BIN_EXE_corten");

/// Runs one of the tools, ours or theirs; its exit status and all that it says. `None` if it is not there.
fn run(ours: bool, tool: &str, folder: &Path, arguments: &[&str]) -> Option<(i32, String)> {
    let mut command = if ours {
        let mut command = Command::new(OURS);
        command.arg(tool);
        command
    } else {
        Command::new(format!("qemu-{tool}"))
    };
    let Ok(output) = command.args(arguments).current_dir(folder).output() else {
        eprintln!("skipped: qemu-{tool} is not installed");
        return None;
    };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Some((output.status.code().unwrap_or(-1), text))
}

/// What `info` says of the format, without what is below.
fn specific(folder: &Path, name: &str) -> String {
    let (code, text) = run(true, "img", folder, &["info", name]).unwrap();
    assert_eq!(code, 0, "{text}");
    let from = text.find("Format specific").unwrap();
    let to = text.find("Child").unwrap_or(text.len());
    text[from..to].to_owned()
}

/// The dirty parts of a bitmap, as a server of ours or theirs tells them.
fn dirty(ours: bool, folder: &Path, image: &str, bitmap: &str) -> String {
    let socket = folder.join("socket");
    let _ = std::fs::remove_file(&socket);
    let path = socket.display().to_string();
    let serve = ["-r", "-f", "qcow2", "-k", &path, "-B", bitmap, image];
    let mut server = if ours {
        let mut server = Command::new(OURS);
        server.arg("nbd");
        server
    } else {
        Command::new("qemu-nbd")
    };
    let mut server = server.args(serve).current_dir(folder).spawn().unwrap();
    while !socket.exists() {
        assert!(server.try_wait().unwrap().is_none(), "the server has ended");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let name = format!(
        "driver=nbd,server.type=unix,server.path={path},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    );
    let map = ["map", "--output=json", "--image-opts", &name];
    let (code, text) = run(false, "img", folder, &map).unwrap();
    assert_eq!(code, 0, "{text}");
    // It ends with its client.
    server.wait().unwrap();
    text
}

#[test]
fn bitmaps_are_the_same_whoever_works_on_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let steps: &[(&str, &[&str])] = &[
        ("img", &["create", "-q", "-f", "qcow2", "NAME", "8M"]),
        ("img", &["bitmap", "--add", "NAME", "en"]),
        (
            "img",
            &["bitmap", "--add", "--disable", "-g", "4k", "NAME", "dis"],
        ),
        (
            "io",
            &[
                "-f",
                "qcow2",
                "-c",
                "write -P 1 1M 64k",
                "-c",
                "write -z 3M 128k",
                "NAME",
            ],
        ),
        ("io", &["-f", "qcow2", "-c", "discard 5M 64k", "NAME"]),
        ("img", &["bitmap", "--add", "-g", "32k", "NAME", "new"]),
        ("img", &["bitmap", "--merge", "en", "NAME", "dis"]),
        ("img", &["bitmap", "--clear", "NAME", "en"]),
        ("io", &["-f", "qcow2", "-c", "write -P 1 7M 4k", "NAME"]),
        ("img", &["resize", "-q", "NAME", "16M"]),
        ("io", &["-f", "qcow2", "-c", "write -P 1 15M 4k", "NAME"]),
        ("img", &["bitmap", "--disable", "NAME", "new"]),
        ("io", &["-f", "qcow2", "-c", "write -P 1 2M 4k", "NAME"]),
        (
            "img",
            &["convert", "--bitmaps", "-O", "qcow2", "NAME", "copy-NAME"],
        ),
        (
            "img",
            &[
                "bitmap",
                "--add",
                "--merge",
                "dis",
                "-b",
                "NAME",
                "-F",
                "qcow2",
                "copy-NAME",
                "third",
            ],
        ),
    ];
    for (ours, name) in [(true, "ours"), (false, "theirs")] {
        let copy = format!("copy-{name}");
        for (tool, arguments) in steps {
            let arguments = arguments.iter().map(|word| match *word {
                "NAME" => name,
                "copy-NAME" => copy.as_str(),
                word => word,
            });
            let arguments: Vec<&str> = arguments.collect();
            let Some((code, text)) = run(ours, tool, folder, &arguments) else {
                return;
            };
            assert_eq!(code, 0, "{arguments:?}: {text}");
        }
    }
    for (ours, theirs, bitmaps) in [
        ("ours", "theirs", &["en", "dis", "new"][..]),
        ("copy-ours", "copy-theirs", &["en", "dis", "new", "third"]),
    ] {
        assert_eq!(specific(folder, ours), specific(folder, theirs));
        let check = run(false, "img", folder, &["check", "-f", "qcow2", ours]).unwrap();
        assert!(check.0 == 0 && check.1.contains("No errors"), "{}", check.1);
        let measure = |name| run(true, "img", folder, &["measure", "-O", "qcow2", name]).unwrap();
        let peer = run(false, "img", folder, &["measure", "-O", "qcow2", ours]).unwrap();
        assert_eq!((measure(ours), measure(theirs)), (peer.clone(), peer));
        for bitmap in bitmaps {
            let said = dirty(true, folder, ours, bitmap);
            assert_eq!(said, dirty(false, folder, theirs, bitmap), "{bitmap}");
            assert_eq!(said, dirty(true, folder, theirs, bitmap), "{bitmap}");
            assert_eq!(said, dirty(false, folder, ours, bitmap), "{bitmap}");
        }
    }
}

/// The first line that follows the program's name, which is where the two may differ in advice.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let words = line.split_once(": ").map_or(line, |(_, words)| words);
    words.to_owned()
}

#[test]
fn refusals_are_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for arguments in [
        &["create", "-q", "-f", "qcow2", "a", "8M"][..],
        &["bitmap", "--add", "a", "en"],
        &["bitmap", "--add", "--disable", "a", "dis"],
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            "old",
            "8M",
        ],
        &["create", "-q", "-f", "raw", "raw", "8M"],
    ] {
        let (code, text) = run(true, "img", folder, arguments).unwrap();
        assert_eq!(code, 0, "{text}");
    }
    // Open for writing and gone: its enabled bitmap can't be trusted any more.
    std::fs::copy(folder.join("a"), folder.join("broken")).unwrap();
    let script = ["-f", "qcow2", "-c", "write 0 4k", "-c", "abort", "broken"];
    run(true, "io", folder, &script);
    let (_, text) = run(true, "img", folder, &["info", "broken"]).unwrap();
    assert!(text.contains("[0]: in-use"), "{text}");
    for arguments in [
        &["bitmap", "a", "en"][..],
        &["bitmap", "--add", "a"],
        &["bitmap", "--add", "a", "en"],
        &["bitmap", "--remove", "a", "none"],
        &["bitmap", "--clear", "a", "none"],
        &["bitmap", "--merge", "none", "a", "en"],
        &["bitmap", "--add", "-g", "3000", "a", "new"],
        &["bitmap", "--add", "-g", "256", "a", "new"],
        &["bitmap", "--clear", "broken", "en"],
        &["bitmap", "--merge", "en", "broken", "dis"],
        &["resize", "broken", "16M"],
        &["convert", "--bitmaps", "-O", "qcow2", "broken", "b"],
        &["convert", "--bitmaps", "-O", "raw", "a", "b"],
        &[
            "convert",
            "--bitmaps",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "raw",
            "b",
        ],
        &["convert", "--bitmaps", "-O", "qcow2", "a", "old", "b"],
    ] {
        let ours = run(true, "img", folder, arguments).unwrap();
        let Some(theirs) = run(false, "img", folder, arguments) else {
            return;
        };
        assert_eq!(
            (ours.0, theirs.0),
            (1, 1),
            "{arguments:?}: {} {}",
            ours.1,
            theirs.1
        );
        assert_eq!(first_line(&ours.1), first_line(&theirs.1), "{arguments:?}");
    }
    // Theirs names a node of its own.
    let (code, text) = run(true, "img", folder, &["bitmap", "--add", "old", "b"]).unwrap();
    assert!(
        code == 1 && text.contains("Cannot store dirty bitmaps in qcow2 v2 files"),
        "{text}"
    );
    let skip = [
        "convert",
        "--bitmaps",
        "--skip-broken-bitmaps",
        "-O",
        "qcow2",
        "broken",
        "c",
    ];
    let (code, text) = run(true, "img", folder, &skip).unwrap();
    assert!(
        code == 0 && text.contains("Skipping inconsistent bitmap 'en'"),
        "{text}"
    );
    assert!(specific(folder, "c").contains("name: dis"));
    let (code, _) = run(true, "img", folder, &["bitmap", "--remove", "broken", "en"]).unwrap();
    assert_eq!(code, 0);
}
