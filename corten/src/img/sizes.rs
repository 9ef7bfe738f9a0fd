//! `resize`, `measure` and `bench`.

use std::time::Instant;

use block::executor::spawn_local;
use block::{CacheMode, Disk, ErrorKind, Extent, ExtentKind, ExtentQuery, IoBuf, Scope};
use image_formats::qcow2::Preallocation;
use image_formats::{Image, ImageOptions};
use serde_json::json;

use super::args::{flag, key_values, size, value};
use super::create::{ImageSpec, preallocation};
use super::output::{self, say};
use super::{Failure, Outcome, Tool, bitmap, cache, open};

/// What a raw image, which has no metadata, says.
const NO_METADATA: &str = "Unsupported preallocation mode 'metadata'";

pub(crate) async fn resize(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        flag('q', "quiet"),
        flag('S', "shrink"),
        value('P', "preallocation"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let [name, wanted] = &parsed.names[..] else {
        return Err(Failure::usage("Expecting image file name and size"));
    };
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: true,
        ..tool.options(&parsed)
    };
    let how = preallocation(parsed.get('P').unwrap_or("off"))?;
    let (disk, image) = open(name, &options).await?;
    tool.warn_guess(&image, &options, name);
    let old = disk.size();
    let (sign, digits) = match wanted.as_bytes().first() {
        Some(b'+') => (1, &wanted[1..]),
        Some(b'-') => (-1, &wanted[1..]),
        _ => (0, wanted.as_str()),
    };
    let number = size(digits)
        .ok_or_else(|| Failure::plain(format!("Invalid image size specified: '{wanted}'")))?;
    let new = match sign {
        1 => old.checked_add(number),
        -1 => old.checked_sub(number),
        _ => Some(number),
    };
    let new = new
        .filter(|n| *n > 0)
        .ok_or_else(|| Failure::plain("New image size must be positive"))?
        .next_multiple_of(512);
    if new < old && !parsed.has('S') {
        eprintln!(
            "{}: warning: Shrinking an image will delete all data beyond the shrunken image's end. \
             Before performing such an operation, make sure there is no important data there.",
            tool.program
        );
        let message = "Use the --shrink option to perform a shrink operation.";
        return Err(Failure::plain(message));
    }
    if new < old && how != Preallocation::Off {
        return Err(Failure::plain(
            "Preallocation can only be used for growing images",
        ));
    }
    set_size(&disk, &image, new, how).await?;
    disk.close().await?;
    if !parsed.has('q') {
        say("Image resized.");
    }
    Ok(())
}

/// Gives a disk another size. If it grows, the new space is reserved or written as `how` says; an image whose format can't do that is
/// left as it is.
pub(crate) async fn set_size(disk: &Disk, image: &Image, new: u64, how: Preallocation) -> Outcome {
    let old = disk.size();
    if new > old {
        check_preallocation(image, how)?;
    }
    disk.resize(new).await?;
    if new <= old || how == Preallocation::Off {
        return Ok(());
    }
    let Some(qcow2) = &image.qcow2 else {
        return preallocate_raw(&*image.medium, old, new, how).await;
    };
    let start = old.next_multiple_of(qcow2.cluster_size());
    if start < new {
        qcow2.preallocate(start, new, how).await?;
    }
    Ok(())
}

fn check_preallocation(image: &Image, how: Preallocation) -> Outcome {
    if how == Preallocation::Off || image.qcow2.is_some() {
        return Ok(());
    }
    if image.format.is_some() {
        return Err(Failure::plain(
            "Preallocation can only be used with raw and qcow2 images",
        ));
    }
    if how == Preallocation::Metadata {
        return Err(Failure::plain(NO_METADATA));
    }
    Ok(())
}

/// Reserves or writes the space of a raw image.
pub(crate) async fn preallocate_raw(
    medium: &dyn block::Medium,
    start: u64,
    end: u64,
    how: Preallocation,
) -> Outcome {
    match how {
        Preallocation::Off => {}
        Preallocation::Metadata => {
            return Err(Failure::plain(NO_METADATA));
        }
        Preallocation::Falloc => medium.preallocate(start, end - start).await?,
        Preallocation::Full => {
            let zeroes = IoBuf::zeroed(1 << 20);
            let mut at = start;
            while at < end {
                let length = (end - at).min(1 << 20);
                medium.write(at, zeroes.slice(0, length as usize)).await?;
                at += length;
            }
        }
    }
    Ok(())
}

pub(crate) async fn measure(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('O', "target-format"),
        value('o', "options"),
        value('s', "size"),
        value('l', "snapshot"),
        value('J', "output"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let json = parsed.json()?;
    let format = parsed.get('O').unwrap_or("raw");
    let given = match parsed.get('s') {
        Some(text) => Some(
            size(text)
                .ok_or_else(|| Failure::plain(format!("Invalid image size specified: '{text}'")))?,
        ),
        None => None,
    };
    let mut data = 0;
    let mut bitmaps = None;
    let pairs = key_values(&parsed.all(&['o']));
    let (total, extents) = match (given, &parsed.names[..]) {
        (Some(total), []) => (total, Vec::new()),
        (None, [name]) => {
            let options = ImageOptions {
                format: parsed.get('f').map(str::to_owned),
                lock: !parsed.has('U'),
                ..tool.options(&parsed)
            };
            let (disk, image) = open(name, &options).await?;
            if let (Some(which), Some(qcow2)) = (parsed.get('l'), &image.qcow2) {
                qcow2
                    .view_snapshot(super::convert::snapshot_name(which))
                    .await?;
            }
            let qcow2 = image.qcow2.as_ref().filter(|q| q.header().version >= 3);
            bitmaps = qcow2.map(|qcow2| qcow2.bitmaps());
            let mut extents = Vec::new();
            let mut offset = 0;
            while offset < disk.size() {
                let length = disk.size() - offset;
                let query = ExtentQuery {
                    offset,
                    length,
                    scope: Scope::Chain,
                    limit: 4096,
                };
                let found = disk.extents(query).await?;
                offset = found.last().map_or(disk.size(), Extent::end);
                extents.extend(found);
            }
            (disk.size(), extents)
        }
        (Some(_), _) => {
            return Err(Failure::plain(
                "--size N cannot be used together with a filename.",
            ));
        }
        (None, []) => {
            return Err(Failure::plain(
                "Either --size N or one filename must be specified.",
            ));
        }
        (None, _) => return Err(Failure::plain("At most one filename argument is allowed.")),
    };
    let spec = ImageSpec::new(format, Some(total), &pairs, None, None)?;
    let (required, full) = if let Some(other) = &spec.other {
        let stored = extents
            .iter()
            .filter(|e| matches!(e.kind, ExtentKind::Data(_) | ExtentKind::Compressed));
        let stored: Vec<(u64, u64)> = stored.map(|e| (e.offset, e.length)).collect();
        other.measure(&stored)?
    } else if format == "qcow2" {
        let cluster = spec.qcow2.cluster_size;
        let mut counted = 0;
        for extent in extents
            .iter()
            .filter(|e| matches!(e.kind, ExtentKind::Data(_) | ExtentKind::Compressed))
        {
            let start = (extent.offset / cluster * cluster).max(counted);
            let end = extent.end().next_multiple_of(cluster);
            data += end.saturating_sub(start);
            counted = counted.max(end);
        }
        if matches!(
            spec.qcow2.preallocation,
            Preallocation::Falloc | Preallocation::Full
        ) {
            data = u64::MAX;
        }
        spec.qcow2.measure(data)?
    } else {
        (total.next_multiple_of(512), total.next_multiple_of(512))
    };
    let bitmaps = bitmaps.filter(|_| format == "qcow2");
    let bitmaps = bitmaps.map(|list| bitmap::measure(&list, total, spec.qcow2.cluster_size));
    if json {
        let mut object = serde_json::Map::new();
        if let Some(size) = bitmaps {
            object.insert("bitmaps".into(), json!(size));
        }
        object.insert("required".into(), json!(required));
        object.insert("fully-allocated".into(), json!(full));
        say(output::json(&object.into()));
    } else {
        say(format!("required size: {required}"));
        say(format!("fully allocated size: {full}"));
        if let Some(size) = bitmaps {
            say(format!("bitmaps size: {size}"));
        }
    }
    Ok(())
}

pub(crate) async fn bench(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('c', "count"),
        value('d', "depth"),
        value('s', "buffer-size"),
        value('S', "step-size"),
        value('o', "offset"),
        value('t', "cache"),
        flag('w', "write"),
        flag('q', "quiet"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
        value('F', "flush-interval"),
        value('p', "pattern"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let name = parsed.one_name()?;
    let number = |option, default: u64| match parsed.get(option) {
        None => Ok(default),
        Some(text) => {
            size(text).ok_or_else(|| Failure::plain(format!("Invalid number specified: '{text}'")))
        }
    };
    let (count, depth) = (number('c', 75_000)?, number('d', 64)?.clamp(1, 1024));
    let length = number('s', 4096)?.max(1);
    let step = number('S', 0)?;
    let step = if step == 0 { length } else { step };
    let start = number('o', 0)?;
    let flush_interval = number('F', 0)?;
    let pattern = number('p', 0)?;
    let write = parsed.has('w');
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write,
        lock: !parsed.has('U'),
        cache: cache(&parsed, 't', CacheMode::Writeback)?,
        ..tool.options(&parsed)
    };
    let (disk, _) = open(name, &options).await?;
    let room = disk.size().checked_sub(length).ok_or_else(|| {
        Failure::from(block::BlockError::new(
            ErrorKind::InvalidArgument,
            "the image is smaller than a request",
        ))
    })?;
    if !parsed.has('q') {
        let what = if write { "write" } else { "read" };
        say(format!(
            "Sending {count} {what} requests, {length} bytes each, {depth} in parallel (starting at \
             offset {start}, step size {step})"
        ));
    }
    let begin = Instant::now();
    let next = std::rc::Rc::new(std::cell::Cell::new(0u64));
    let workers: Vec<_> = (0..depth.min(count.max(1)))
        .map(|_| {
            let (disk, next) = (disk.clone(), next.clone());
            spawn_local(async move {
                let buffer = IoBuf::zeroed(length as usize);
                buffer.fill_at(0, buffer.len(), pattern as u8);
                loop {
                    let number = next.get();
                    if number >= count {
                        return Ok(());
                    }
                    next.set(number + 1);
                    let offset = start.wrapping_add(number.wrapping_mul(step)) % (room + 1);
                    let offset = offset / 512 * 512;
                    if write {
                        disk.write(offset, buffer.clone(), false).await?;
                        if flush_interval > 0 && (number + 1) % flush_interval == 0 {
                            disk.flush().await?;
                        }
                    } else {
                        disk.read(offset, buffer.clone()).await?;
                    }
                }
            })
        })
        .collect();
    let mut result = Ok::<(), block::BlockError>(());
    for worker in workers {
        let ended = worker.await;
        result = result.and(ended);
    }
    result?;
    disk.close().await?;
    if !parsed.has('q') {
        say(format!(
            "Run completed in {:.3} seconds.",
            begin.elapsed().as_secs_f64()
        ));
    }
    Ok(())
}
