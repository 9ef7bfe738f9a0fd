//! The disk below, which must have the content that it had when the child was made.

use std::rc::Rc;

use block::{BlockBackend, BlockError, ImplicitFile, Medium, OpenGate, Result};

use super::descriptor::Descriptor;
use super::read_text;

/// The identity of an image's content.
pub(super) async fn read_cid(medium: &dyn Medium) -> Result<u32> {
    let Some(text) = read_text(medium).await? else {
        let message = "it has no descriptor that would say what its content is";
        return Err(BlockError::invalid_image(message));
    };
    Ok(Descriptor::parse(&text.bytes)?.cid)
}

/// Opens the parent of the image in `medium`.
pub(super) async fn open(
    medium: &dyn Medium,
    name: &str,
    cid: u32,
    gate: &dyn OpenGate,
) -> Result<Rc<dyn BlockBackend>> {
    let base = medium.name();
    let why = ImplicitFile::Backing {
        format: Some("vmdk".to_owned()),
    };
    let parent = gate.open_medium(&base, name, why.clone(), false).await?;
    let found = read_cid(&*parent).await;
    let found = found.map_err(|e| e.context(format!("parent '{name}' of '{base}'")))?;
    if found != cid {
        return Err(BlockError::invalid_image(format!(
            "'{name}' is not what '{base}' was made on: it is another disk, or has been written to since"
        )));
    }
    drop(parent);
    gate.open_backend(&base, name, why).await
}
