//! `corten img` beside qemu-img: the same commands, the same output and exit codes.

use std::path::Path;
use std::process::Command;

/// Commands that run in order, in a directory of their own for each program.
const SCRIPT: &[&[&str]] = &[
    &["create", "-f", "qcow2", "a.qcow2", "10M"],
    &[
        "create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2",
    ],
    &["create", "-f", "raw", "x.raw", "1.5M"],
    &[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "v2.qcow2",
        "1M",
    ],
    &["create", "-f", "qcow2", "x"],
    &["create", "-f", "foo", "x", "1M"],
    &["create", "-f", "qcow2", "-o", "foo=1", "x", "1M"],
    &["info", "v2.qcow2"],
    &["info", "--backing-chain", "b.qcow2"],
    &["info", "--backing-chain", "--output=json", "b.qcow2"],
    &["check", "a.qcow2"],
    &["check", "--output=json", "a.qcow2"],
    &["check", "base.raw"],
    &["convert", "-f", "raw", "-O", "qcow2", "base.raw", "c.qcow2"],
    &["check", "c.qcow2"],
    &["map", "c.qcow2"],
    &["map", "--output=json", "c.qcow2"],
    &["map", "--output=json", "-f", "raw", "base.raw"],
    &["map", "--output=json", "b.qcow2"],
    &["compare", "-f", "raw", "base.raw", "-F", "qcow2", "c.qcow2"],
    &["compare", "a.qcow2", "c.qcow2"],
    &[
        "convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "z.qcow2",
    ],
    &["compare", "-f", "raw", "base.raw", "z.qcow2"],
    &[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "compression_type=zstd",
        "base.raw",
        "s.qcow2",
    ],
    &["compare", "-f", "raw", "base.raw", "s.qcow2"],
    &["snapshot", "-c", "s1", "c.qcow2"],
    &["snapshot", "-c", "s2", "c.qcow2"],
    &["resize", "c.qcow2", "+2M"],
    &["resize", "c.qcow2", "5M"],
    &["resize", "--shrink", "c.qcow2", "5M"],
    &["check", "c.qcow2"],
    &["snapshot", "-a", "s1", "c.qcow2"],
    &["compare", "-f", "raw", "base.raw", "-F", "qcow2", "c.qcow2"],
    &["snapshot", "-d", "s2", "c.qcow2"],
    &["snapshot", "-d", "nope", "c.qcow2"],
    &["check", "c.qcow2"],
    &["measure", "-O", "qcow2", "c.qcow2"],
    &["measure", "--size", "10G", "-O", "qcow2"],
    &[
        "measure",
        "--output=json",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "base.raw",
    ],
    &["measure", "--size", "3G", "-O", "raw"],
    &[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "top.qcow2",
    ],
    &[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "top.qcow2",
        "-F",
        "qcow2",
        "top2.qcow2",
    ],
    &["resize", "top2.qcow2", "12M"],
    &["rebase", "-b", "base.raw", "-F", "raw", "top2.qcow2"],
    &["compare", "-f", "raw", "base.raw", "top2.qcow2"],
    &["rebase", "-b", "", "top2.qcow2"],
    &["compare", "-f", "raw", "base.raw", "top2.qcow2"],
    &["check", "top2.qcow2"],
    &["commit", "top.qcow2"],
    &["commit", "a.qcow2"],
    &["convert", "-l", "s1", "-O", "raw", "c.qcow2", "s.raw"],
    &["compare", "-f", "raw", "-F", "raw", "s.raw", "base.raw"],
    &["dd", "if=base.raw", "of=dd.raw", "bs=1M", "count=3"],
    &["amend", "-o", "lazy_refcounts=on", "a.qcow2"],
    &["info", "a.qcow2"],
    &["foo"],
];

/// Lines that differ because the programs lay files out differently.
fn is_layout(line: &str) -> bool {
    [
        "disk size:",
        "file length:",
        "\"actual-size\"",
        "\"virtual-size\"",
        "Image end offset",
        "image-end-offset",
    ]
    .iter()
    .any(|word| line.contains(word))
}

fn prepare(directory: &Path) {
    // Some data that compresses, with holes around it.
    let path = directory.join("base.raw");
    let file = std::fs::File::create(path).unwrap();
    file.set_len(10 << 20).unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32)
        .map(|n| ((n / 7) ^ (n >> 9)) as u8 | 1)
        .collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 640 << 10).unwrap();
}

fn run(program: &Path, directory: &Path, arguments: &[&str]) -> Option<(i32, String)> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !is_layout(line)).collect();
    Some((output.status.code().unwrap_or(-1), lines.join("\n")))
}

/// The oldest qemu-img whose every word we follow; older ones show fewer fields.
const ORACLE: u32 = 10;

/// The major version of the qemu-img that is installed.
fn oracle_version() -> Option<u32> {
    let (_, text) = run(Path::new("qemu-img"), Path::new("."), &["--version"])?;
    let number = text.split_whitespace().nth(2)?;
    number.split('.').next()?.parse().ok()
}

#[test]
fn every_verb_answers_as_qemu_img_does() {
    let same_words = oracle_version().is_some_and(|version| version >= ORACLE);
    if !same_words {
        eprintln!("skipped: the words of qemu-img: it is older than {ORACLE}, or not installed");
    }
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (ours, theirs) = (
        tempfile::tempdir_in(scratch).unwrap(),
        tempfile::tempdir_in(scratch).unwrap(),
    );
    prepare(ours.path());
    prepare(theirs.path());
    // Under the old name the program is the old tool.
    let link = ours.path().join("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_corten"), &link).unwrap();
    for arguments in SCRIPT {
        let (code, text) = run(&link, ours.path(), arguments).unwrap();
        let Some((their_code, their_text)) = run(Path::new("qemu-img"), theirs.path(), arguments)
        else {
            eprintln!("skipped: qemu-img is not installed");
            return;
        };
        assert_eq!(code, their_code, "exit code of {arguments:?}: {text}");
        // What is said before a refusal is not part of the bargain.
        if same_words && (code == 0 || arguments[0] == "compare") {
            assert_eq!(text, their_text, "output of {arguments:?}");
        }
        // Each reads and checks what the other has written.
        if let Some(image) = arguments.last().filter(|a| a.ends_with(".qcow2")) {
            for (program, directory) in [
                (Path::new("qemu-img"), ours.path()),
                (&*link, theirs.path()),
            ] {
                let (code, text) = run(program, directory, &["check", image]).unwrap();
                assert_eq!(
                    code,
                    0,
                    "after {arguments:?}, {}: {text}",
                    program.display()
                );
            }
        }
    }
    for image in ["a.qcow2", "c.qcow2", "z.qcow2", "s.qcow2", "top2.qcow2"] {
        let (a, b) = (ours.path().join(image), theirs.path().join(image));
        let pair = ["compare", a.to_str().unwrap(), b.to_str().unwrap()];
        for program in [Path::new("qemu-img"), &*link] {
            let (code, text) = run(program, ours.path(), &pair).unwrap();
            assert_eq!(code, 0, "{image}: {text}");
        }
    }
}

#[test]
fn under_our_own_name_images_cannot_name_files_elsewhere() {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (inside, outside) = (
        tempfile::tempdir_in(scratch).unwrap(),
        tempfile::tempdir_in(scratch).unwrap(),
    );
    let secret = outside.path().join("secret");
    std::fs::write(&secret, vec![7; 65536]).unwrap();
    let corten = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_corten"))
            .arg("img")
            .args(arguments)
            .current_dir(inside.path())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), error)
    };
    let path = secret.to_str().unwrap();
    assert_eq!(
        corten(&[
            "create", "-q", "-f", "qcow2", "-b", path, "-F", "raw", "i.qcow2"
        ])
        .0,
        Some(0)
    );
    let (code, error) = corten(&["convert", "-O", "raw", "i.qcow2", "o.raw"]);
    assert_eq!(code, Some(1));
    assert!(
        error.contains(path) && error.lines().count() == 1,
        "{error}"
    );
    assert_eq!(
        corten(&[
            "convert",
            "--allow-external",
            "-O",
            "raw",
            "i.qcow2",
            "o.raw"
        ])
        .0,
        Some(0)
    );
    assert!(std::fs::read(inside.path().join("o.raw")).unwrap() == [7; 65536]);
}

#[test]
fn info_of_a_file_is_told_from_a_sandbox() {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let directory = tempfile::tempdir_in(scratch).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_corten"));
    let corten = |arguments: &[&str]| {
        let arguments = [&["img"], arguments].concat();
        let mut command = Command::new(program);
        let output = command
            .args(arguments)
            .current_dir(directory.path())
            .output();
        let output = output.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        (output.status.code(), out, error)
    };
    // Images of one file and of several: the child has to ask for the others.
    let elsewhere = tempfile::tempdir_in(scratch).unwrap();
    let data = elsewhere.path().join("data").display().to_string();
    let images: [(&str, &[&str]); 4] = [
        ("plain", &["-f", "qcow2"]),
        (
            "flat.vmdk",
            &["-f", "vmdk", "-o", "subformat=monolithicFlat"],
        ),
        ("here", &["-f", "qcow2", "-o", "data_file=here.data"]),
        (
            "there",
            &["-f", "qcow2", "-o", &format!("data_file={data}")],
        ),
    ];
    for (name, options) in images {
        let create = [&["create", "-q", "-E"], options, &[name, "8M"]].concat();
        assert_eq!(corten(&create).0, Some(0), "{name}");
        let outside = name == "there";
        let (code, text, error) = corten(&["info", name]);
        assert_eq!(code, Some(i32::from(outside)), "{name}: {error}");
        if outside {
            let refused = error.contains(&data) && error.contains("--allow-external");
            assert!(refused && error.lines().count() == 1, "{error}");
        } else {
            let here = corten(&["info", "--no-sandbox", name]).1;
            let disk_size = |line: &&str| !line.contains("disk size");
            let lines = |text: &str| -> Vec<String> {
                let lines = text.lines().filter(disk_size);
                lines.map(str::to_owned).collect()
            };
            assert_eq!(lines(&text), lines(&here), "{name}");
            assert!(text.contains("virtual size: 8 MiB"), "{text}");
        }
        assert_eq!(corten(&["info", "--allow-external", name]).0, Some(0));
    }
    // A chain leads out of the directory only if that is allowed.
    let base = elsewhere.path().join("base").display().to_string();
    std::fs::write(&base, vec![0; 8 << 20]).unwrap();
    let create = [
        "create", "-q", "-E", "-f", "qcow2", "-b", &base, "-F", "raw", "top",
    ];
    assert_eq!(corten(&create).0, Some(0));
    let (code, _, error) = corten(&["info", "--backing-chain", "top"]);
    assert!(code == Some(1) && error.contains(&base), "{error}");
    let (code, text, _) = corten(&["info", "-C", "--allow-external", "top"]);
    assert!(
        code == Some(0) && text.matches("image: ").count() == 2,
        "{text}"
    );
}
