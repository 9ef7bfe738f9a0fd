//! Finding a differencing disk's parent.

use std::rc::Rc;

use block::{BlockBackend, BlockError, ErrorKind, ImplicitFile, Medium, OpenGate, Result};

use super::header::DynamicHeader;
use super::{read_at, read_footer};
use crate::names::{from_absolute, from_windows, usable, utf16le};

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
    for name in absolute {
        names.extend(from_absolute(&name));
    }
    names.push(from_windows(&header.parent_name));
    Ok(usable(names))
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
