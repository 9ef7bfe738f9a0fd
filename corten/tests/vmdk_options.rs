//! `corten img create -f vmdk` with options for VMware's versions, beside qemu-img.

use std::path::Path;
use std::process::{Command, Output};

/// The version of a VMDK image, and its descriptor without what is made up for each image.
fn described(path: &Path) -> (u32, Vec<String>) {
    let bytes = std::fs::read(path).unwrap();
    let version = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let (place, sectors) = (number(28), number(36));
    let text = String::from_utf8_lossy(&bytes[place * 512..(place + sectors) * 512]).into_owned();
    let lines = text.trim_end_matches('\0').lines();
    let fixed = lines.filter(|l| !l.starts_with("CID=") && !l.starts_with("ddb.uuid"));
    (version, fixed.map(str::to_owned).collect())
}

fn run(mut command: Command, options: &str, path: &Path) -> Option<Output> {
    command.args(["create", "-f", "vmdk", "-o", options]);
    command.arg(path).arg("10M").output().ok()
}

#[test]
fn vmware_versions_are_written_as_qemu_img_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vmdk");
    for options in [
        "hwversion=13",
        "hwversion=undefined",
        "toolsversion=2147483647",
        "toolsversion=11269",
        "compat6=on",
        "compat6=off,hwversion=7,toolsversion=10",
        "compat6=on,hwversion=6",
        "compat6=on,hwversion=4",
        "hwversion=4,compat6=off",
    ] {
        let Some(theirs) = run(Command::new("qemu-img"), options, &path) else {
            eprintln!("skipped: qemu-img is not installed");
            return;
        };
        let their_image = theirs.status.success().then(|| described(&path));
        let mut corten = Command::new(env!("CARGO_BIN_EXE_corten"));
        corten.arg("img");
        let ours = run(corten, options, &path).unwrap();
        let error = String::from_utf8_lossy(&ours.stderr).into_owned();
        assert_eq!(
            ours.status.code(),
            theirs.status.code(),
            "{options}: {error}"
        );
        let our_image = ours.status.success().then(|| described(&path));
        assert_eq!(our_image, their_image, "{options}");
        if ours.status.success() {
            assert_eq!(ours.stdout, theirs.stdout, "{options}");
        }
    }
}
