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
