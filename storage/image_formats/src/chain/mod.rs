//! Chains of images under a disk that is in use: jobs that move data between them, new images on top, images opened anew.
//!
//! Images are counted from the top, which is number 0. An image can be taken out of its place or put into it only where
//! the image above it is qcow2.

mod commit;
mod lost;
mod overlay;
mod stream;
mod target;

pub use commit::{Commit, commit_active, commit_below};
pub use overlay::{Overlay, put_overlay};
pub use stream::{Stream, stream};
pub use target::{NewTarget, open_target, pivot};

use std::any::Any;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::{
    BlockBackend, BlockError, CacheMode, Disk, ErrorKind, ImplicitFile, OpenGate, Result,
    StandStill,
};

use self::lost::Lost;
use crate::open::{Opener, identity, local_path, open_image};
use crate::qcow2::Qcow2;
use crate::{External, ImageOptions};

/// The images of a chain, from the top down.
pub fn layers(top: &Rc<dyn BlockBackend>) -> Vec<Rc<dyn BlockBackend>> {
    let mut found = vec![top.clone()];
    while let Some(below) = found.last().and_then(|layer| layer.backing()) {
        found.push(below);
    }
    found
}

/// The number of the image in the file `name`.
pub fn find_layer(top: &Rc<dyn BlockBackend>, name: &str) -> Option<usize> {
    let wanted = identity(name);
    layers(top).iter().position(|layer| {
        let file = layer.file_name();
        file.is_some_and(|file| *file == *name || (wanted.is_some() && identity(&file) == wanted))
    })
}

/// The image as what it is, if it is qcow2.
pub fn as_qcow2(backend: &Rc<dyn BlockBackend>) -> Option<Rc<Qcow2>> {
    let any: Rc<dyn Any> = backend.clone();
    any.downcast().ok()
}

/// Image number `index` of the disk, as qcow2.
fn qcow2_layer(disk: &Disk, index: usize) -> Result<Rc<Qcow2>> {
    let layer = layers(&disk.backend()).get(index).cloned();
    layer.as_ref().and_then(as_qcow2).ok_or_else(|| {
        let name = layer.map_or_else(|| "?".into(), |layer| file_of(&layer));
        BlockError::unsupported(format!(
            "'{name}': expected a qcow2 image, whose backing file can be changed"
        ))
    })
}

/// The file of an image, for messages and headers.
fn file_of(layer: &Rc<dyn BlockBackend>) -> String {
    layer
        .file_name()
        .map_or_else(|| layer.format_name().to_owned(), |name| name.to_string())
}

/// A name for `file` in the header of another image: it means the same wherever one stands.
fn lasting_name(file: &str) -> String {
    match local_path(file) {
        Ok(path) => std::path::absolute(&path)
            .unwrap_or(path)
            .display()
            .to_string(),
        Err(_) => file.to_owned(),
    }
}

/// What an image's header says of the image below it, if that is in the file `file`.
fn name_in_header(above: &Qcow2, file: &str) -> Option<String> {
    let name = above.header().backing_file?;
    let resolved = crate::resolve_name(&above.medium().name(), &name);
    (resolved == file || identity(&resolved).is_some_and(|id| identity(file) == Some(id)))
        .then_some(name)
}

fn directory(file: &str) -> Option<PathBuf> {
    let path = local_path(file).ok()?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    std::fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()
}

/// The name by which `image` may call `file`: as `above`, which is on it now, calls it, if that means the same in both.
fn name_for(image: &Qcow2, above: &Qcow2, file: &str) -> String {
    let (one, other) = (image.medium().name(), above.medium().name());
    match name_in_header(above, file) {
        Some(name) if name.starts_with('/') || directory(&one) == directory(&other) => name,
        _ => lasting_name(file),
    }
}

/// How images below the top are opened again.
fn options_below(options: &ImageOptions, format: &'static str, write: bool) -> ImageOptions {
    ImageOptions {
        format: Some(format.to_owned()),
        write,
        external: External::Follow,
        snapshot: false,
        backing: false,
        secret: None,
        discard: options.discard,
        cache: options.cache,
        ..ImageOptions::default()
    }
}

/// Opens the image below the disk's image number `above` again, writable or not, in its place.
///
/// # Errors
///
/// What opening reports; then the image is as it was, or, if even that fails, requests for what it held fail.
async fn reopen_below(
    disk: &Disk,
    _still: &StandStill,
    above: usize,
    write: bool,
    options: &ImageOptions,
) -> Result<Rc<dyn BlockBackend>> {
    let above = qcow2_layer(disk, above)?;
    let Some(image) = above.backing() else {
        return Err(BlockError::invalid_argument("there is no backing file"));
    };
    let (Some(name), format, below) = (image.file_name(), image.format_name(), image.backing())
    else {
        return Err(BlockError::unsupported("the backing file has no name"));
    };
    let limits = image.limits();
    let was_writable = !limits.read_only;
    let is_qcow2 = as_qcow2(&image).is_some();
    if below.is_some() && !is_qcow2 {
        let message = format!("'{name}': a {format} image cannot be opened again under its child");
        return Err(BlockError::unsupported(message));
    }
    if was_writable {
        image.close().await?;
    }
    // Both at once would be in each other's way: their locks say so.
    above.set_backing(None);
    drop(image);
    let open = async |write| {
        let opened = open_image(&name, &options_below(options, format, write)).await?;
        if let Some(qcow2) = &opened.qcow2 {
            qcow2.set_backing(below.clone());
        }
        Ok::<_, BlockError>(opened.backend)
    };
    let result = open(write).await;
    let put = match &result {
        Ok(backend) => backend.clone(),
        Err(_) => match open(was_writable).await {
            Ok(backend) => backend,
            Err(_) => Rc::new(Lost {
                limits,
                format,
                file: name.clone(),
            }),
        },
    };
    above.set_backing(Some(put));
    result
}

/// Opens the backing files that an image's header names and puts them under it.
async fn open_backing(image: &Qcow2, options: &ImageOptions) -> Result<()> {
    let header = image.header();
    let Some(name) = header.backing_file else {
        return Ok(());
    };
    let gate = Opener::new(ImageOptions {
        backing: true,
        external: External::Follow,
        snapshot: false,
        secret: None,
        ..options.clone()
    });
    let why = ImplicitFile::Backing {
        format: header.backing_format,
    };
    let backing = gate
        .open_backend(&image.medium().name(), &name, why)
        .await?;
    image.set_backing(Some(backing));
    Ok(())
}

/// Lets the disk go over to `image`, with what its header names under it. The old image may be among that, so it is closed
/// first, and is open for reading only afterwards. If it can't be opened again after a failure, requests fail from then on.
///
/// # Errors
///
/// What closing and opening report; then the disk is as it was.
async fn go_over(
    disk: &Disk,
    still: &StandStill,
    image: Rc<Qcow2>,
    options: &ImageOptions,
) -> Result<()> {
    let old = disk.replace_backend(still, image.clone());
    let (name, format, limits) = (file_of(&old), old.format_name(), old.limits());
    let below = async {
        old.close().await?;
        drop(old);
        open_backing(&image, options).await
    };
    let Err(error) = below.await else {
        return Ok(());
    };
    let again = ImageOptions {
        format: Some(format.to_owned()),
        external: External::Follow,
        snapshot: false,
        ..options.clone()
    };
    let restored = match open_image(&name, &again).await {
        Ok(restored) => restored.backend,
        Err(_) => Rc::new(Lost {
            limits,
            format,
            file: name.into(),
        }),
    };
    disk.replace_backend(still, restored);
    Err(error)
}

/// Refuses to touch what is open for reading only.
fn need_writable(disk: &Disk) -> Result<()> {
    if disk.limits().read_only {
        let message = "the disk can only be read";
        return Err(BlockError::new(ErrorKind::ReadOnly, message));
    }
    Ok(())
}

/// Whether files are read past the host's cache.
fn cache_of(disk: &Disk) -> CacheMode {
    disk.options().cache
}
