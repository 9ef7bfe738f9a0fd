//! `corten img convert`: what it promises beyond qemu-img.

use std::path::Path;
use std::process::{Command, Output};

/// A directory with a disk `base.raw`: text, noise and holes.
fn scratch() -> tempfile::TempDir {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = std::fs::File::create(directory.path().join("base.raw")).unwrap();
    file.set_len(24 << 20).unwrap();
    let text: Vec<u8> = (0..250_000u32)
        .flat_map(|n| {
            format!(
                "line {} of {}\n",
                n.wrapping_mul(2_654_435_761) >> 9,
                n / 50
            )
            .into_bytes()
        })
        .collect();
    let noise: Vec<u8> = (0..3_000_000u32)
        .scan(1u64, |state, _| {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            Some((*state >> 56) as u8)
        })
        .collect();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&text, 300 << 10).unwrap();
    file.write_all_at(&noise, 16 << 20).unwrap();
    directory
}

fn img(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_corten"))
        .arg("img")
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap()
}

fn succeed(directory: &Path, arguments: &[&str]) -> String {
    let output = img(directory, arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn compressed_images_are_the_same_whatever_runs_beside() {
    let directory = scratch();
    for kind in ["zlib", "zstd"] {
        let option = format!("compression_type={kind}");
        let convert = |parallel: &str, name: &str| {
            succeed(
                directory.path(),
                &[
                    "convert", "-c", "-m", parallel, "-f", "raw", "-O", "qcow2", "-o", &option,
                    "base.raw", name,
                ],
            );
            std::fs::read(directory.path().join(name)).unwrap()
        };
        let alone = convert("1", "alone.qcow2");
        for parallel in ["2", "8", "16"] {
            assert!(
                convert(parallel, "beside.qcow2") == alone,
                "{kind}, -m {parallel}"
            );
        }
        succeed(directory.path(), &["check", "alone.qcow2"]);
        for verb in [
            &["check", "alone.qcow2"][..],
            &[
                "compare",
                "-f",
                "raw",
                "-F",
                "qcow2",
                "base.raw",
                "alone.qcow2",
            ],
        ] {
            let peer = Command::new("qemu-img")
                .args(verb)
                .current_dir(directory.path())
                .output();
            let Ok(peer) = peer else {
                eprintln!("skipped: qemu-img is not installed");
                return;
            };
            let text = String::from_utf8_lossy(&peer.stderr);
            assert!(peer.status.success(), "qemu-img {verb:?}: {text}");
        }
    }
}

#[test]
fn manifests_tell_equal_content_from_other_content() {
    let directory = scratch();
    let path = directory.path();
    let formats: [(&str, &[&str]); 3] = [
        ("a.raw", &["-O", "raw"]),
        ("a.qcow2", &["-c", "-O", "qcow2"]),
        ("a.vhd", &["-O", "vpc"]),
    ];
    for (name, options) in formats {
        let words = [
            &["convert", "--checksum", "-f", "raw"],
            options,
            &["base.raw", name],
        ]
        .concat();
        succeed(path, &words);
        let format = options[options.len() - 1];
        let text = succeed(path, &["verify", "-f", format, name]);
        assert_eq!(text, "All 6 extents are as the manifest says.\n");
    }
    // Any format is checked against the manifest of another one.
    succeed(
        path,
        &[
            "verify",
            "-f",
            "qcow2",
            "--manifest",
            "a.vhd.blake3",
            "a.qcow2",
        ],
    );
    // One byte, in a hole, in the second extent.
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path.join("a.raw"))
        .unwrap();
    file.write_all_at(&[1], (12 << 20) + 5).unwrap();
    let output = img(path, &["verify", "-f", "raw", "--output", "json", "a.raw"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\"valid\": false"), "{text}");
    assert!(text.contains("\"offset\": 12582912"), "{text}");
    assert_eq!(text.matches("\"offset\"").count(), 1, "{text}");
    // A disk that has been cut is not whole, one that cannot be looked at is neither.
    file.set_len(20 << 20).unwrap();
    assert_eq!(
        img(path, &["verify", "-f", "raw", "a.raw"]).status.code(),
        Some(1)
    );
    for bad in [
        "",
        "[]",
        "{\"kind\": \"corten-manifest\", \"version\": 1, \"size\": 1e30}",
    ] {
        std::fs::write(path.join("bad"), bad).unwrap();
        let output = img(path, &["verify", "-f", "raw", "--manifest", "bad", "a.raw"]);
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    }
    assert_eq!(
        img(path, &["verify", "base.raw"]).status.code(),
        Some(2),
        "no manifest"
    );
}

/// Starts a conversion and kills it once some of the target is there; true if it had not ended.
fn interrupt(directory: &Path, words: &[&str], target: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::process::ExitStatusExt;
    let mut child = Command::new(env!("CARGO_BIN_EXE_corten"))
        .arg("img")
        .args(words)
        .current_dir(directory)
        .spawn()
        .unwrap();
    let some = |m: std::fs::Metadata| m.blocks() * 512 > 1 << 20;
    while child.try_wait().unwrap().is_none() {
        if std::fs::metadata(directory.join(target)).is_ok_and(some) {
            break;
        }
    }
    let _ = child.kill();
    child.wait().unwrap().signal() == Some(9)
}

#[test]
fn an_interrupted_conversion_goes_on() {
    let directory = scratch();
    let path = directory.path();
    let cases: [(&str, &[&str]); 4] = [
        ("r.raw", &["-O", "raw"]),
        ("p.qcow2", &["-O", "qcow2"]),
        ("c.qcow2", &["-c", "-O", "qcow2"]),
        ("v.vhd", &["-O", "vpc"]),
    ];
    let mut interrupted = 0;
    for (name, options) in cases {
        let words = |resume: &'static [&'static str]| {
            [
                &["convert", "-m", "1", "-f", "raw"],
                resume,
                options,
                &["base.raw", name],
            ]
            .concat()
        };
        interrupted += u32::from(interrupt(path, &words(&[]), name));
        succeed(path, &words(&["--resume", "--checksum"]));
        let format = options[options.len() - 1];
        succeed(path, &["verify", "-f", format, name]);
        succeed(
            path,
            &["compare", "-f", "raw", "-F", format, "base.raw", name],
        );
        if format == "qcow2" {
            succeed(path, &["check", "-f", format, name]);
        }
        // What is there already is not written again.
        let before = std::fs::read(path.join(name)).unwrap();
        succeed(path, &words(&["--resume"]));
        assert!(std::fs::read(path.join(name)).unwrap() == before, "{name}");
    }
    assert!(
        interrupted > 0,
        "every conversion was quicker than its interruption"
    );
    // A target that holds other data becomes what the source is, holes included.
    std::fs::write(path.join("other.raw"), vec![7; 24 << 20]).unwrap();
    succeed(
        path,
        &[
            "convert",
            "--resume",
            "-f",
            "raw",
            "-O",
            "raw",
            "base.raw",
            "other.raw",
        ],
    );
    assert!(
        std::fs::read(path.join("other.raw")).unwrap()
            == std::fs::read(path.join("base.raw")).unwrap()
    );
}
