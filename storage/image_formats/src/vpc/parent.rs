//! Finding a differencing disk's parent.

use std::rc::Rc;

use block::{BlockBackend, BlockError, ErrorKind, ImplicitFile, Medium, OpenGate, Result};

use super::header::DynamicHeader;
use super::{read_at, read_footer};

/// Names longer than this are not read.
const MAX_NAME: usize = 8192;

/// The names under which the parent may be found, best first.
pub(super) async fn candidates(medium: &dyn Medium, header: &DynamicHeader) -> Result<Vec<String>> {
    let mut relative = Vec::new();
    let mut absolute = Vec::new();
    for locator in &header.locators {
        let length = (locator.length as usize).min(MAX_NAME);
        if length == 0 || locator.offset > medium.len() {
            continue;
        }
        let bytes = read_at(medium, locator.offset, length).await?;
        match &locator.platform {
            b"W2ru" => relative.push(from_windows(&utf16le(&bytes))),
            b"W2ku" => absolute.push(from_windows(&utf16le(&bytes))),
            b"MacX" => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let path = text.trim_end_matches('\0').trim_start_matches("file://");
                absolute.push(path.trim_start_matches("localhost").to_owned());
            }
            _ => {}
        }
    }
    let mut names = relative;
    let is_drive = |name: &str| name.as_bytes().get(1) == Some(&b':');
    for name in absolute {
        // A path of another system is not one here; the parent may lie beside us all the same.
        let last = name.rsplit('/').next().unwrap_or(&name).to_owned();
        if !is_drive(&name) {
            names.push(name);
        }
        names.push(last);
    }
    names.push(from_windows(&header.parent_name));
    names.retain(|name| !name.is_empty() && !name.contains('\0'));
    let mut unique: Vec<String> = Vec::new();
    for name in names {
        if !unique.contains(&name) {
            unique.push(name);
        }
    }
    Ok(unique)
}

fn utf16le(bytes: &[u8]) -> String {
    let units = bytes
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]));
    let units: Vec<u16> = units.take_while(|u| *u != 0).collect();
    String::from_utf16_lossy(&units)
}

/// A relative Windows path as one of ours.
fn from_windows(name: &str) -> String {
    let name = name.replace('\\', "/");
    name.strip_prefix("./").unwrap_or(&name).to_owned()
}

/// Opens the parent; it must be the very disk that the child was made for.
pub(super) async fn open(
    medium: &dyn Medium,
    header: &DynamicHeader,
    gate: &dyn OpenGate,
) -> Result<(String, Rc<dyn BlockBackend>)> {
    let base = medium.name();
    let why = ImplicitFile::Backing {
        format: Some("vpc".to_owned()),
    };
    let names = candidates(medium, header).await?;
    for name in &names {
        let parent = match gate.open_medium(&base, name, why.clone(), false).await {
            Ok(parent) => parent,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let footer = read_footer(&*parent).await;
        let footer = footer.map_err(|e| e.context(format!("parent '{name}' of '{base}'")))?;
        if footer.uuid != header.parent_uuid {
            return Err(BlockError::invalid_image(format!(
                "'{name}' is not the disk that '{base}' was made on: its identity is another one"
            )));
        }
        drop(parent);
        let backend = gate.open_backend(&base, name, why).await?;
        return Ok((name.clone(), backend));
    }
    let tried = match &names[..] {
        [] => "it does not say where".to_owned(),
        names => format!("looked for '{}'", names.join("', '")),
    };
    Err(BlockError::new(
        ErrorKind::NotFound,
        format!("the parent of the differencing disk '{base}' is missing: {tried}"),
    ))
}
