//! A new image on top of a disk that is in use: what the guest has written so far stays in the image below.

use std::rc::Rc;

use block::{BlockError, Disk, Medium, Result};

use super::{file_of, go_over, lasting_name, need_writable};
use crate::qcow2::{self, CreateOptions, OpenOptions, Qcow2};
use crate::{External, ImageOptions, create_file, open_image};

/// The image that goes on top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Its file.
    pub file: String,
    /// Whether somebody has made it, with its backing file; else it is made, and what was in the file is gone.
    pub existing: bool,
}

/// Puts a qcow2 image on top of the disk. `options` are those that the disk was opened with.
///
/// # Errors
///
/// What making or opening an image reports; then the disk is as it was.
pub async fn put_overlay(disk: &Disk, overlay: &Overlay, options: &ImageOptions) -> Result<()> {
    need_writable(disk)?;
    let still = disk.stand_still().await;
    let old = disk.backend();
    let (name, format) = (file_of(&old), old.format_name());
    if super::find_layer(&old, &overlay.file).is_some() {
        let message = format!("'{}' is in use by the disk itself", overlay.file);
        return Err(BlockError::invalid_argument(message));
    }
    let size = disk.size();
    old.flush().await?;
    let image = open_new(overlay, options, size, &name, format).await?;
    drop(old);
    go_over(disk, &still, image, options).await
}

/// Makes the image, or opens the one that is there; nothing is below it yet.
async fn open_new(
    overlay: &Overlay,
    options: &ImageOptions,
    size: u64,
    backing: &str,
    format: &str,
) -> Result<Rc<Qcow2>> {
    if overlay.existing {
        let below = ImageOptions {
            format: Some("qcow2".to_owned()),
            backing: false,
            snapshot: false,
            external: External::Follow,
            secret: None,
            write: true,
            ..options.clone()
        };
        let image = open_image(&overlay.file, &below).await?;
        let image = image.qcow2.ok_or_else(|| {
            BlockError::invalid_image(format!("'{}' is no qcow2 image", overlay.file))
        })?;
        if block::BlockBackend::limits(&*image).size != size {
            let message = format!("'{}' is not as large as the disk", overlay.file);
            return Err(BlockError::invalid_argument(message));
        }
        return Ok(image);
    }
    let medium: Rc<dyn Medium> = create_file(&overlay.file, options.cache)?;
    let create = CreateOptions {
        size,
        backing_file: Some(lasting_name(backing)),
        backing_format: Some(format.to_owned()),
        ..CreateOptions::default()
    };
    let open = OpenOptions {
        l2_cache: options.l2_cache,
        discard: true,
        backing: false,
        ..OpenOptions::default()
    };
    let made = async {
        qcow2::create(&medium, &block::Refusing, &create).await?;
        Qcow2::open(medium.clone(), &block::Refusing, &open).await
    };
    made.await
        .map(Rc::new)
        .map_err(|e| e.context(format!("'{}'", overlay.file)))
}
