//! `commit` and `rebase`: moving content between the layers of a chain.

use block::{BlockBackend, CacheMode};
use image_formats::copy;
use image_formats::{External, ImageOptions, open_image, resolve_name};

use super::args::{flag, value};
use super::convert::name_below;
use super::create::look_at_backing;
use super::output::{Progress, say};
use super::{Failure, Outcome, Tool, as_disk, cache, open};

pub(crate) async fn commit(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('t', "cache"),
        value('b', "base"),
        flag('d', "drop"),
        flag('p', "progress"),
        flag('q', "quiet"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let name = parsed.one_name()?;
    let mode = cache(&parsed, 't', CacheMode::Writeback)?;
    let base = tool.options(&parsed);
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: true,
        backing: false,
        cache: mode,
        ..base.clone()
    };
    // From the top down to the layer that takes the content.
    let mut layers = vec![(name.to_owned(), open(name, &options).await?)];
    let wanted = parsed.get('b').map(|base| resolve_name(name, base));
    while let Some((upper, (_, image))) = layers.last() {
        let Some((below, format)) = name_below(upper, image) else {
            return Err(Failure::plain(match &wanted {
                Some(base) => format!("Did not find '{base}' in the backing chain of '{name}'"),
                None => "Image does not have a backing file".to_owned(),
            }));
        };
        let is_target = wanted.as_ref().is_none_or(|base| {
            *base == below || parsed.get('b').is_some_and(|given| *given == *below)
        });
        check_allowed(upper, &below, &base)?;
        let options = ImageOptions {
            format,
            write: is_target,
            ..options.clone()
        };
        layers.push((below.clone(), open(&below, &options).await?));
        if is_target {
            break;
        }
    }
    let Some((_, (target, _))) = layers.pop() else {
        return Ok(());
    };
    let total: u64 = layers.iter().map(|(_, (disk, _))| disk.size()).sum();
    let progress = Progress::new(parsed.has('p') && !parsed.has('q'), total);
    // The lowest first, so that upper layers win.
    for (_, (disk, _)) in layers.iter().rev() {
        copy::commit(disk, &target, &*progress.callback()).await?;
    }
    target.close().await?;
    let keep = parsed.has('d') || parsed.has('b');
    if let Some((_, (disk, image))) = layers.first() {
        if !keep && let Some(qcow2) = &image.qcow2 {
            qcow2.make_empty().await?;
        }
        disk.close().await?;
    }
    progress.finish();
    if !parsed.has('q') {
        say("Image committed.");
    }
    Ok(())
}

/// Files outside the image's directory are written only if that is allowed.
fn check_allowed(image: &str, below: &str, options: &ImageOptions) -> Outcome {
    if options.external == External::Follow {
        return Ok(());
    }
    let directory = |name: &str| {
        let path = std::fs::canonicalize(name).ok()?;
        path.parent().map(std::path::Path::to_path_buf)
    };
    match (directory(image), directory(below)) {
        (Some(image), Some(below)) if below.starts_with(&image) => Ok(()),
        _ => Err(Failure::plain(format!(
            "'{image}' asks for the backing file '{below}' outside its directory (--allow-external)"
        ))),
    }
}

pub(crate) async fn rebase(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('b', "backing"),
        value('F', "backing-format"),
        value('B', "backing-format-long"),
        value('t', "cache"),
        value('T', "backing-cache"),
        flag('u', "backing-unsafe"),
        flag('c', "compress"),
        flag('p', "progress"),
        flag('q', "quiet"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let name = parsed.one_name()?;
    let unsafe_mode = parsed.has('u');
    let Some(new_name) = parsed.get('b') else {
        return Err(Failure::usage("Must specify backing file (-b)"));
    };
    let format = parsed.get('F').or(parsed.get('B')).map(str::to_owned);
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: true,
        backing: !unsafe_mode,
        cache: cache(&parsed, 't', CacheMode::Writeback)?,
        ..tool.options(&parsed)
    };
    let image = open_image(name, &options).await?;
    let Some(qcow2) = image.qcow2.clone() else {
        return Err(Failure::plain(format!(
            "Could not change the backing file to '{new_name}': {} images have none",
            image.backend.format_name()
        )));
    };
    let new_name = Some(new_name).filter(|n| !n.is_empty());
    if !unsafe_mode {
        // The person names the new backing file here, wherever it is.
        let follow = ImageOptions {
            external: External::Follow,
            write: false,
            format: format.clone(),
            ..options.clone()
        };
        let new = match new_name {
            Some(new) => {
                let path = resolve_name(name, new);
                let opened = open_image(&path, &follow).await;
                let opened = opened.map_err(|e| {
                    Failure::plain(format!(
                        "Could not open new backing file '{new}': {}",
                        e.one_line()
                    ))
                })?;
                Some(opened.backend)
            }
            None => None,
        };
        let old = qcow2.backing();
        let disk = as_disk(&image, options.cache);
        let progress = Progress::new(parsed.has('p') && !parsed.has('q'), disk.size());
        let callback = progress.callback();
        copy::rebase(&disk, old.as_deref(), new.as_deref(), &*callback).await?;
        progress.finish();
    }
    let format = match (new_name, format) {
        (Some(_), Some(format)) => Some(format),
        (Some(new), None) if !unsafe_mode => {
            let follow = ImageOptions {
                external: External::Follow,
                ..options.clone()
            };
            let (_, detected) = look_at_backing(name, new, None, &follow).await?;
            Some(detected.to_owned())
        }
        _ => None,
    };
    qcow2
        .change_backing_name(new_name.map(str::to_owned), format)
        .await?;
    qcow2.close().await?;
    Ok(())
}
