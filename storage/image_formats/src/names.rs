//! Names of files as Windows writes them.

/// A relative Windows path as one of ours.
pub(crate) fn from_windows(name: &str) -> String {
    let name = name.replace('\\', "/");
    name.strip_prefix("./").unwrap_or(&name).to_owned()
}

/// The names under which a file with the absolute name `name` (with our slashes) may be found: a path of
/// another system is not one here, but the file may lie beside us all the same.
pub(crate) fn from_absolute(name: &str) -> Vec<String> {
    let name = name.strip_prefix("//?/").unwrap_or(name);
    let last = name.rsplit('/').next().unwrap_or(name).to_owned();
    let is_foreign = name.as_bytes().get(1) == Some(&b':') || name.starts_with("Volume{");
    if is_foreign {
        vec![last]
    } else {
        vec![name.to_owned(), last]
    }
}

/// Names worth trying, each once, in order.
pub(crate) fn usable(names: Vec<String>) -> Vec<String> {
    let mut unique: Vec<String> = Vec::new();
    for name in names {
        if !name.is_empty() && !name.contains('\0') && !unique.contains(&name) {
            unique.push(name);
        }
    }
    unique
}

/// Text in UTF-16 with the lowest byte first, up to the first zero.
pub(crate) fn utf16le(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2);
    let units = units.map(|b| u16::from_le_bytes([b[0], b[1]]));
    let units: Vec<u16> = units.take_while(|u| *u != 0).collect();
    String::from_utf16_lossy(&units)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_systems_are_looked_for_beside_us() {
        assert_eq!(from_windows(".\\a\\b.vhd"), "a/b.vhd");
        assert_eq!(from_absolute("//?/d:/x/b.vhdx"), ["b.vhdx"]);
        assert_eq!(from_absolute("/x/b.vhdx"), ["/x/b.vhdx", "b.vhdx"]);
        let names = ["a", "", "a", "b"].map(str::to_owned).to_vec();
        assert_eq!(usable(names), ["a", "b"]);
    }
}
