//! Where mirrors and backups go.

use std::rc::Rc;

use block::{BlockBackend, BlockError, Disk, DiskOptions, Medium, Result, StandStill};

use super::{as_qcow2, cache_of, go_over, lasting_name};
use crate::identity::random_bytes;
use crate::open::{Opener, identity};
use crate::qcow2::{self, CreateOptions};
use crate::{External, ImageOptions, NewImage, create_file, open_image};

/// An image that a job writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTarget {
    /// Its file.
    pub file: String,
    /// Its format; `None`: that of the disk, or what the file that is there has.
    pub format: Option<String>,
    /// Whether somebody has made it; else it is made, and what was in the file is gone.
    pub existing: bool,
    /// The backing file, and its format, that a new image shall name.
    pub backing: Option<(String, String)>,
}

/// Opens a target for a disk, or makes it; nothing is below it yet. Tells whether it reads as zeroes.
///
/// # Errors
///
/// What making or opening an image reports.
pub async fn open_target(
    disk: &Disk,
    target: &NewTarget,
    options: &ImageOptions,
) -> Result<(Rc<Disk>, bool)> {
    let top = disk.backend();
    if identity(&target.file).is_some() && super::find_layer(&top, &target.file).is_some() {
        let message = format!("'{}' is in use by the disk itself", target.file);
        return Err(BlockError::invalid_argument(message));
    }
    let format = match &target.format {
        Some(format) => Some(format.clone()),
        None if target.existing => None,
        None => Some(top.format_name().to_owned()),
    };
    if let (false, Some(format)) = (target.existing, &format) {
        make(target, format, disk.size(), options).await?;
    }
    let opening = ImageOptions {
        format,
        write: true,
        backing: false,
        snapshot: false,
        external: External::Follow,
        secret: None,
        ..options.clone()
    };
    let image = open_image(&target.file, &opening).await?;
    if image.backend.limits().read_only {
        let message = format!("'{}' can only be read", target.file);
        return Err(BlockError::invalid_argument(message));
    }
    let policies = DiskOptions {
        cache: cache_of(disk),
        discard: true,
        ..DiskOptions::default()
    };
    let is_zero = !target.existing && target.backing.is_none();
    Ok((Rc::new(Disk::new(image.backend, policies)), is_zero))
}

async fn make(target: &NewTarget, format: &str, size: u64, options: &ImageOptions) -> Result<()> {
    let NewTarget { file, backing, .. } = target;
    let refuse = || {
        let message = format!("'{file}': a {format} image cannot have a backing file here");
        BlockError::unsupported(message)
    };
    let is_simple = matches!(format, "raw" | "qcow2");
    let other = (!is_simple).then(|| NewImage::of(format)).flatten();
    if !is_simple && other.is_none() {
        let message = format!("Unknown file format '{format}'");
        return Err(BlockError::invalid_argument(message));
    }
    if format != "qcow2" && backing.is_some() {
        return Err(refuse());
    }
    let medium: Rc<dyn Medium> = create_file(file, options.cache)?;
    let made = match other {
        Some(mut other) => {
            other.set_size(size);
            let gate = Opener::new(ImageOptions {
                write: true,
                external: External::Follow,
                ..ImageOptions::default()
            });
            for part in other.files(file) {
                create_file(&crate::resolve_name(file, &part), options.cache)?;
            }
            other.create(&medium, &gate, random_bytes).await
        }
        None if format == "raw" => medium.set_len(size).await,
        None => {
            let create = CreateOptions {
                size,
                backing_file: backing.as_ref().map(|(name, _)| lasting_name(name)),
                backing_format: backing.as_ref().map(|(_, format)| format.clone()),
                ..CreateOptions::default()
            };
            qcow2::create(&medium, &block::Refusing, &create).await
        }
    };
    made.map_err(|e| e.context(format!("'{file}'")))
}

/// Lets a disk, which stands still, go over to a target that holds the same.
///
/// # Errors
///
/// If what the target's header names cannot be opened under it; then the disk is as it was.
pub async fn pivot(
    disk: &Disk,
    still: &StandStill,
    target: Rc<dyn BlockBackend>,
    options: &ImageOptions,
) -> Result<()> {
    let needs_backing = as_qcow2(&target).filter(|t| t.header().backing_file.is_some());
    if let Some(image) = needs_backing {
        return go_over(disk, still, image, options).await;
    }
    let old = disk.replace_backend(still, target);
    // Nothing is lost if the old image cannot be closed in order: the target has it all.
    let _ = old.close().await;
    Ok(())
}
