//! Finding a differencing disk's parent ([MS-VHDX] 2.6.2.6).

use std::rc::Rc;

use block::{BlockBackend, BlockError, ErrorKind, ImplicitFile, Medium, OpenGate, Result};

use super::header::{Guid, Locator, Metadata, guid_text};
use super::read_header;
use crate::names::{from_absolute, from_windows, usable};

fn value<'a>(locator: &'a Locator, key: &str) -> Option<&'a str> {
    let found = locator.iter().find(|(k, _)| k.eq_ignore_ascii_case(key));
    found.map(|(_, value)| value.as_str())
}

/// The names under which the parent may be found, best first.
pub(super) fn candidates(locator: &Locator) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    names.extend(value(locator, "relative_path").map(from_windows));
    for key in ["volume_path", "absolute_win32_path"] {
        if let Some(name) = value(locator, key) {
            names.extend(from_absolute(&name.replace('\\', "/")));
        }
    }
    usable(names)
}

/// What a differencing disk says of its parent: `name` as a person gave it, and the identity of its
/// content.
pub(super) fn locator_of(name: &str, data_write: &Guid) -> Locator {
    let windows = name.replace('/', "\\");
    let linkage = format!("{{{}}}", guid_text(data_write));
    let path = if name.starts_with('/') {
        ("absolute_win32_path", windows)
    } else {
        ("relative_path", windows)
    };
    [("parent_linkage", linkage), path]
        .map(|(key, value)| (key.to_owned(), value))
        .to_vec()
}

/// Whether the locator means a parent whose content has this identity.
fn links_to(locator: &Locator, data_write: &Guid) -> bool {
    let text = guid_text(data_write);
    ["parent_linkage", "parent_linkage2"].iter().any(|key| {
        value(locator, key)
            .map(|v| v.trim_matches(['{', '}']))
            .is_some_and(|v| v.eq_ignore_ascii_case(&text))
    })
}

/// Opens the parent; its content must be what it was when the child was made.
pub(super) async fn open(
    medium: &dyn Medium,
    metadata: &Metadata,
    gate: &dyn OpenGate,
) -> Result<(String, Rc<dyn BlockBackend>)> {
    let base = medium.name();
    let why = ImplicitFile::Backing {
        format: Some("vhdx".to_owned()),
    };
    let names = candidates(&metadata.locator);
    for name in &names {
        let parent = match gate.open_medium(&base, name, why.clone(), false).await {
            Ok(parent) => parent,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let header = read_header(&*parent).await;
        let (_, header) = header.map_err(|e| e.context(format!("parent '{name}' of '{base}'")))?;
        if !links_to(&metadata.locator, &header.data_write) {
            return Err(BlockError::invalid_image(format!(
                "'{name}' is not what '{base}' was made on: it is another disk, or has been written to since"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_looked_for_where_the_locator_says() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let locator = vec![
            pair("parent_linkage", "{2DC27766-F623-4200-9D64-115E9BFD4A08}"),
            pair("absolute_win32_path", "\\\\?\\d:\\disks\\base.vhdx"),
            pair("relative_path", ".\\old\\base.vhdx"),
        ];
        assert_eq!(candidates(&locator), ["old/base.vhdx", "base.vhdx"]);
        assert!(links_to(&locator, &super::super::header::BAT_REGION));
        assert!(!links_to(&locator, &[1; 16]));
        let own = locator_of("/x/b.vhdx", &[1; 16]);
        assert_eq!(candidates(&own), ["/x/b.vhdx", "b.vhdx"]);
        assert!(links_to(&own, &[1; 16]));
    }
}
