//! `bitmap`, and copies of bitmaps for `convert`.

use image_formats::qcow2::{BitmapInfo, Qcow2};
use image_formats::{Image, ImageOptions, Property, Value};

use super::args::{flag, size, value};
use super::{Failure, Outcome, Tool, open};

/// The letters of the actions and what messages call them.
const ACTIONS: [(char, &str); 6] = [
    ('a', "add"),
    ('r', "remove"),
    ('c', "clear"),
    ('e', "enable"),
    ('d', "disable"),
    ('m', "merge"),
];

/// What may follow a message about a bitmap that cannot be trusted.
const HINT: &str = "Try 'bitmap --remove' to delete this bitmap from disk";

pub(crate) async fn bitmap(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        flag('a', "add"),
        flag('r', "remove"),
        flag('c', "clear"),
        flag('e', "enable"),
        flag('d', "disable"),
        value('m', "merge"),
        value('b', "source-file"),
        value('F', "source-format"),
        value('f', "format"),
        value('g', "granularity"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let [file, name] = &parsed.names[..] else {
        return Err(Failure::plain("Expecting filename and bitmap name"));
    };
    let actions = parsed.all(&['a', 'r', 'c', 'e', 'd', 'm']);
    if actions.is_empty() {
        let message =
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge";
        return Err(Failure::plain(message));
    }
    if parsed.has('g') && !parsed.has('a') {
        return Err(Failure::plain("granularity only supported with --add"));
    }
    if (parsed.has('b') || parsed.has('F')) && !parsed.has('m') {
        return Err(Failure::plain(
            "Merge bitmap source file only supported with --merge",
        ));
    }
    let granularity = match parsed.get('g') {
        None => None,
        Some(text) => {
            let number = size(text).and_then(|number| u32::try_from(number).ok());
            let message = format!("Invalid granularity specified: '{text}'");
            Some(number.ok_or_else(|| Failure::plain(message))?)
        }
    };
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: true,
        backing: false,
        ..tool.options(&parsed)
    };
    let (disk, image) = open(file, &options).await?;
    let qcow2 = with_bitmaps(&image)?;
    let source = match parsed.get('b') {
        None => None,
        Some(source) => {
            let options = ImageOptions {
                format: parsed.get('F').map(str::to_owned),
                write: false,
                ..options.clone()
            };
            Some(open(source, &options).await?.1)
        }
    };
    let mut result = Ok(());
    for (letter, text) in actions {
        let step = match letter {
            'a' => qcow2.add_bitmap(name, granularity, !parsed.has('d')),
            'r' => qcow2.remove_bitmap(name).await,
            'c' => qcow2
                .bitmap(name)
                .await
                .map(|bitmap| bitmap.clear(0, u64::MAX)),
            'e' => qcow2
                .bitmap(name)
                .await
                .map(|bitmap| bitmap.set_enabled(true)),
            'd' => qcow2
                .bitmap(name)
                .await
                .map(|bitmap| bitmap.set_enabled(false)),
            _ => {
                let from = source.as_ref().unwrap_or(&image);
                merge(with_bitmaps(from)?, text, qcow2, name).await
            }
        };
        if let Err(error) = step {
            let action = ACTIONS
                .iter()
                .find(|(l, _)| *l == letter)
                .map_or("", |(_, word)| word);
            let message = error.one_line();
            let hint = if message.contains("is inconsistent") {
                format!("\n{HINT}")
            } else {
                String::new()
            };
            let message = format!("Operation {action} on bitmap {name} failed: {message}{hint}");
            result = Err(Failure::plain(message));
            break;
        }
    }
    // What was done before stays, as it does with qemu-img.
    disk.close().await?;
    result
}

fn with_bitmaps(image: &Image) -> Result<&Qcow2, Failure> {
    image.qcow2.as_deref().ok_or_else(|| {
        let format = image.backend.format_name();
        Failure::plain(format!("Format driver '{format}' does not support bitmaps"))
    })
}

/// Adds what is dirty in one bitmap to another.
async fn merge(from: &Qcow2, source: &str, to: &Qcow2, name: &str) -> block::Result<()> {
    let target = to.bitmap(name).await?;
    let source = from.bitmap(source).await?;
    if source.size() != target.size() {
        return Err(block::BlockError::invalid_argument(format!(
            "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
            target.size(),
            source.size()
        )));
    }
    target.merge(&source);
    Ok(())
}

/// Which bitmaps of a source `convert --bitmaps` copies; refuses before anything is written.
pub(crate) fn to_copy(source: &Image, skip_broken: bool) -> Result<Vec<BitmapInfo>, Failure> {
    let lacks = || Failure::plain("Source lacks bitmap support");
    let qcow2 = source.qcow2.as_deref().filter(|q| q.header().version >= 3);
    let mut list = Vec::new();
    for info in qcow2.ok_or_else(lacks)?.bitmaps() {
        if !info.in_use {
            list.push(info);
        } else if skip_broken {
            eprintln!("warning: Skipping inconsistent bitmap '{}'", info.name);
        } else {
            return Err(Failure::plain(format!(
                "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use 'bitmap --remove' to delete it",
                info.name
            )));
        }
    }
    Ok(list)
}

/// Copies bitmaps to an image that has been written.
pub(crate) async fn copy(source: &Image, target: &Image, list: &[BitmapInfo]) -> Outcome {
    let (from, to) = (with_bitmaps(source)?, with_bitmaps(target)?);
    for info in list {
        let granularity = u32::try_from(info.granularity).ok();
        to.add_bitmap(&info.name, granularity, info.auto)?;
        merge(from, &info.name, to, &info.name).await?;
    }
    Ok(())
}

/// The most that the bitmaps of an image take in one with clusters of `cluster` bytes.
pub(crate) fn measure(list: &[BitmapInfo], disk: u64, cluster: u64) -> u64 {
    if list.is_empty() {
        return 0;
    }
    let mut total = 0;
    let mut directory = 0;
    for info in list {
        let bits = disk.div_ceil(info.granularity);
        let clusters = bits.div_ceil(8).div_ceil(cluster);
        total += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + info.name.len() as u64).next_multiple_of(8);
    }
    total + directory.next_multiple_of(cluster)
}

/// Bitmaps as `info` shows them.
pub(crate) fn properties(list: &[BitmapInfo]) -> Vec<Vec<Property>> {
    let of = |label, key, value| Property { label, key, value };
    let one = |info: &BitmapInfo| {
        let mut flags = Vec::new();
        flags.extend(info.in_use.then(|| "in-use".to_owned()));
        flags.extend(info.auto.then(|| "auto".to_owned()));
        let mut list = vec![
            of("flags", "flags", Value::Texts(flags)),
            of("name", "name", Value::Text(info.name.clone())),
        ];
        if info.unknown_flags != 0 {
            let flags = Value::Number(i64::from(info.unknown_flags));
            list.push(of("unknown flags", "unknown-flags", flags));
        }
        let granularity = Value::Number(info.granularity as i64);
        list.push(of("granularity", "granularity", granularity));
        list
    };
    list.iter().map(one).collect()
}
