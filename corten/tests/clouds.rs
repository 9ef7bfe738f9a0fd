//! `corten img convert --for`: each result is what its taker asks for, and has the source's content.

use std::path::Path;
use std::process::Command;

const OURS: &str = env!("CARGO_BIN_EXE_corten");
const SIZE: usize = (3 << 20) + 512;

/// Runs a program; its exit status and all that it says. `None` if it is not there.
fn run(program: &str, folder: &Path, arguments: &[&str]) -> Option<(i32, String)> {
    let mut command = Command::new(program);
    let Ok(output) = command.args(arguments).current_dir(folder).output() else {
        eprintln!("skipped: {program} is not installed");
        return None;
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    Some((output.status.code().unwrap_or(-1), text))
}

fn convert(folder: &Path, cloud: &str, more: &[&str], target: &str) -> (i32, String) {
    let start = ["img", "convert", "-f", "raw", "--for", cloud];
    let arguments = [&start[..], more, &["source", target]].concat();
    run(OURS, folder, &arguments).unwrap()
}

fn source(folder: &Path) -> Vec<u8> {
    let content: Vec<u8> = (0..SIZE)
        .map(|n| (n / 512 % 251) as u8 ^ (n >> 16) as u8)
        .collect();
    std::fs::write(folder.join("source"), &content).unwrap();
    content
}

#[test]
fn images_are_as_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let content = source(folder);
    for (cloud, format, said) in [
        ("azure", "vpc", "file format: vpc"),
        ("aws", "vmdk", "create type: streamOptimized"),
        ("esxi", "vmdk", "create type: streamOptimized"),
    ] {
        let (code, text) = convert(folder, cloud, &[], cloud);
        assert_eq!(code, 0, "{cloud}: {text}");
        let Some((code, text)) = run("qemu-img", folder, &["info", "-f", format, cloud]) else {
            return;
        };
        assert!(code == 0 && text.contains(said), "{cloud}: {text}");
        let size = 4 << 20;
        assert!(text.contains(&format!("({size} bytes)")), "{cloud}: {text}");
        let raw = ["convert", "-f", format, "-O", "raw", cloud, "raw"];
        assert_eq!(run("qemu-img", folder, &raw).unwrap().0, 0, "{cloud}");
        let bytes = std::fs::read(folder.join("raw")).unwrap();
        assert!(bytes[..SIZE] == content, "{cloud}");
        assert!(
            bytes.len() == size && bytes[SIZE..].iter().all(|byte| *byte == 0),
            "{cloud}"
        );
    }
    // A fixed disk is the content and a footer, which says how large it is in the eight bytes from 48 on.
    let azure = std::fs::read(folder.join("azure")).unwrap();
    assert_eq!(azure.len(), (4 << 20) + 512);
    let footer = &azure[4 << 20..];
    assert_eq!(
        (&footer[..8], &footer[48..56]),
        (&b"conectix"[..], &(4u64 << 20).to_be_bytes()[..])
    );
    for name in ["aws", "esxi"] {
        let text = std::fs::read(folder.join(name)).unwrap();
        let text = String::from_utf8_lossy(&text[..4096]).into_owned();
        assert!(text.contains("ddb.adapterType = \"lsilogic\""), "{text}");
        // The header's version, without which ESXi calls the disk too old.
        assert_eq!(
            std::fs::read(folder.join(name)).unwrap()[4..8],
            3u32.to_le_bytes()
        );
    }
}

#[test]
fn an_archive_holds_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let content = source(folder);
    let (code, text) = convert(folder, "gcp", &[], "image.tar.gz");
    assert_eq!(code, 0, "{text}");
    let Some((code, text)) = run("tar", folder, &["-tvzf", "image.tar.gz"]) else {
        return;
    };
    assert!(
        code == 0 && text.contains(" 1073741824 ") && text.trim().ends_with("disk.raw"),
        "{text}"
    );
    let (code, text) = run("tar", folder, &["-xSzf", "image.tar.gz"]).unwrap();
    assert_eq!(code, 0, "{text}");
    let disk = folder.join("disk.raw");
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 1 << 30);
    let compare = [
        "img", "compare", "-f", "raw", "-F", "raw", "source", "disk.raw",
    ];
    let (code, text) = run(OURS, folder, &compare).unwrap();
    assert!(code == 0 && text.contains("Images are identical"), "{text}");
    assert!(std::fs::read(folder.join("source")).unwrap() == content);
}

#[test]
fn what_does_not_go_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    source(folder);
    for (cloud, more, words) in [
        (
            "moon",
            &[][..],
            "--for moon: expected one of azure, esxi, aws, gcp",
        ),
        ("aws", &["-O", "raw"], "-O cannot be given too"),
        (
            "azure",
            &["-o", "subformat=dynamic"],
            "-o cannot be given too",
        ),
        ("gcp", &["--checksum"], "--for gcp makes an archive"),
    ] {
        let (code, text) = convert(folder, cloud, more, "target");
        assert!(code == 1 && text.contains(words), "{text}");
        assert!(!folder.join("target").exists());
    }
    let (code, text) = convert(folder, "gcp", &[], "none/image.tar.gz");
    assert!(
        code == 1 && text.contains("cannot write 'none/image.tar.gz'"),
        "{text}"
    );
}
