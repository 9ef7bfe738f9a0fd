//! Assembles the guests: `guests/MODE/NAME.S` becomes a flat binary, and all of them a table in `OUT_DIR/guests.rs`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The modes and where their images are linked to run.
const MODES: [(&str, &str, &str); 3] = [
    ("real", "Real", "0x1000"),
    ("protected", "Protected", "0x100000"),
    ("long", "Long", "0x100000"),
];

fn main() {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rerun-if-changed=guests");
    let mut table = String::from("/// All guests.\npub static GUESTS: &[Guest] = &[\n");
    for (folder, mode, address) in MODES {
        let folder = root.join("guests").join(folder);
        println!("cargo::rerun-if-changed={}", folder.display());
        for source in sources(&folder) {
            let name = source
                .file_stem()
                .and_then(|n| n.to_str())
                .expect("guests have plain names");
            let image = out.join(format!("{mode}_{name}.bin"));
            assemble(&root.join("guests"), &source, address, &image);
            writeln!(
                table,
                "    Guest {{ name: {name:?}, mode: Mode::{mode}, image: include_bytes!({image:?}) }},"
            )
            .expect("a string takes anything");
        }
    }
    table.push_str("];\n");
    std::fs::write(out.join("guests.rs"), table).expect("OUT_DIR can be written");
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "S"))
        .collect();
    found.sort();
    found
}

fn assemble(include: &Path, source: &Path, address: &str, image: &Path) {
    let object = image.with_extension("o");
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    run(Command::new(cc)
        .args(["-m64", "-c", "-I"])
        .arg(include)
        .arg("-o")
        .arg(&object)
        .arg(source));
    run(Command::new("ld")
        .args(["-m", "elf_x86_64", "--oformat", "binary", "-e", "0"])
        .args(["-Ttext", address, "-o"])
        .arg(image)
        .arg(&object));
}

fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|e| panic!("{command:?}: {e} (gcc and binutils are needed)"));
    assert!(status.success(), "{command:?} failed: {status}");
}
