//! `convert`, `dd` and `compare`.

use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{CacheMode, Disk, ErrorKind, IoBuf, Scope};
use image_formats::copy::{self, Comparison, CopyOptions};
use image_formats::qcow2::{BitmapInfo, Preallocation, Repair};
use image_formats::{Image, ImageOptions, open_image, resolve_name};

use super::args::{Parsed, flag, key_values, size, value};
use super::clouds::{self, Cloud};
use super::create::{ImageSpec, look_at_backing};
use super::output::{Progress, say};
use super::verify::{self, Manifest};
use super::{Failure, Outcome, Tool, as_disk, bitmap, cache, open};

/// The snapshot that `-l` means: `snapshot.name=x`, `snapshot.id=x`, or either of them alone.
pub(crate) fn snapshot_name(text: &str) -> &str {
    text.strip_prefix("snapshot.name=")
        .or(text.strip_prefix("snapshot.id="))
        .unwrap_or(text)
}

pub(crate) async fn convert(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "source-format"),
        value('O', "target-format"),
        value('o', "options"),
        value('b', "backing"),
        value('B', "target-backing"),
        value('F', "backing-format"),
        value('t', "target-cache"),
        value('T', "source-cache"),
        value('S', "sparse-size"),
        value('m', "parallel"),
        value('l', "snapshot"),
        flag('c', "compress"),
        flag('p', "progress"),
        flag('q', "quiet"),
        flag('n', "no-create"),
        flag('W', "oob"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
        flag('Z', "target-is-zero"),
        flag('A', "salvage"),
        flag('K', "checksum"),
        flag('R', "resume"),
        flag('M', "bitmaps"),
        flag('N', "skip-broken-bitmaps"),
        value('G', "for"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let conversion = Conversion::of(tool, &parsed)?;
    conversion.check()?;
    let sources = conversion.open_sources().await?;
    let total: u64 = sources.disks.iter().map(|disk| disk.size()).sum();
    let cloud = conversion.cloud;
    let target_size = cloud.map_or(total, |cloud| cloud.size(total));
    let progress = Progress::new(parsed.has('p') && !parsed.has('q'), total);
    if let Some(name) = cloud.and_then(|cloud| cloud.archived_as) {
        clouds::archive(
            &sources.disks,
            name,
            target_size,
            conversion.target,
            &progress,
        )
        .await?;
        progress.finish();
        return Ok(());
    }
    let target = conversion.open_target(target_size).await?;
    if target.disk.size() < total {
        return Err(Failure::plain("output file is smaller than input file"));
    }
    let options = conversion.copy_options(&target)?;
    let mut shift = 0;
    for source in &sources.disks {
        copy::copy(
            source,
            &target.disk,
            &target.image,
            shift,
            options,
            &progress.callback(),
        )
        .await?;
        shift += source.size();
    }
    if let Some((source, list)) = &sources.bitmaps {
        bitmap::copy(source, &target.image, list).await?;
    }
    target.disk.close().await?;
    progress.finish();
    if parsed.has('K') {
        let manifest = Manifest::of(&sources.disks, verify::EXTENT, &|_| {}).await?;
        manifest.write(&verify::beside(conversion.target))?;
    }
    Ok(())
}

/// What a command line asks for.
struct Conversion<'a> {
    tool: Tool,
    parsed: &'a Parsed,
    sources: &'a [String],
    target: &'a str,
    cloud: Option<&'static Cloud>,
    format: &'a str,
    backing: Option<&'a str>,
    /// The target is made, or made anew.
    create: bool,
}

/// What is read.
struct Sources {
    disks: Vec<Rc<Disk>>,
    /// The image whose bitmaps are copied, and which of them.
    bitmaps: Option<(Image, Vec<BitmapInfo>)>,
}

/// What is written.
struct Target {
    disk: Rc<Disk>,
    image: Image,
    /// Clusters have a place already, whatever they hold.
    preallocated: bool,
}

impl<'a> Conversion<'a> {
    fn of(tool: Tool, parsed: &'a Parsed) -> Result<Self, Failure> {
        let [sources @ .., target] = &parsed.names[..] else {
            return Err(Failure::usage("Must specify image file name"));
        };
        if sources.is_empty() {
            return Err(Failure::usage("Must specify image file name"));
        }
        let cloud = Cloud::of(parsed)?;
        let goes_on = parsed.has('R') && std::path::Path::new(target).exists();
        Ok(Self {
            tool,
            parsed,
            sources,
            target,
            cloud,
            format: cloud.map_or(parsed.get('O').unwrap_or("raw"), |cloud| cloud.format),
            backing: parsed.get('B').or(parsed.get('b')),
            create: !parsed.has('n') && !goes_on,
        })
    }

    /// Refuses what does not go together.
    fn check(&self) -> Outcome {
        let (parsed, format) = (self.parsed, self.format);
        let refused = |message: String| Err(Failure::plain(message));
        if parsed.has('c') && !["qcow2", "vmdk"].contains(&format) {
            return refused(format!(
                "Compression not supported for file format '{format}'"
            ));
        }
        if parsed.has('Z') && self.create {
            return refused("--target-is-zero requires use of -n flag".into());
        }
        let with_bitmaps = parsed.has('M');
        if with_bitmaps && self.sources.len() != 1 {
            return refused("Copying bitmaps only possible with single source".into());
        }
        if parsed.has('N') && !with_bitmaps {
            return refused("Use of --skip-broken-bitmaps requires --bitmaps".into());
        }
        if with_bitmaps && format != "qcow2" {
            return refused(format!("Format driver '{format}' does not support bitmaps"));
        }
        Ok(())
    }

    async fn open_sources(&self) -> Result<Sources, Failure> {
        let parsed = self.parsed;
        let options = ImageOptions {
            format: parsed.get('f').map(str::to_owned),
            lock: !parsed.has('U'),
            cache: cache(parsed, 'T', CacheMode::Writeback)?,
            ..self.tool.options(parsed)
        };
        let mut sources = Sources {
            disks: Vec::new(),
            bitmaps: None,
        };
        for name in self.sources {
            let (disk, image) = open(name, &options).await?;
            if parsed.has('M') {
                let list = bitmap::to_copy(&image, parsed.has('N'))?;
                sources.bitmaps = Some((image.clone(), list));
            }
            if let Some(which) = parsed.get('l') {
                let Some(qcow2) = &image.qcow2 else {
                    let message = "Failed to load snapshot: this format has none";
                    return Err(Failure::plain(message));
                };
                qcow2.view_snapshot(snapshot_name(which)).await?;
            }
            sources.disks.push(disk);
        }
        Ok(sources)
    }

    /// Opens the target, which is made first where that is asked for.
    async fn open_target(&self, size: u64) -> Result<Target, Failure> {
        let parsed = self.parsed;
        let options = ImageOptions {
            format: Some(self.format.to_owned()),
            write: true,
            cache: cache(parsed, 't', CacheMode::Unsafe)?,
            secret: None,
            ..self.tool.options(parsed)
        };
        let mut preallocated = false;
        let image = if self.create {
            let spec = self.spec(size, &options).await?;
            preallocated = spec.qcow2.preallocation != Preallocation::Off;
            // The person named the backing file on this very command line.
            let follow = following(&options);
            let backing = spec.qcow2.backing_file.is_some();
            spec.make(self.tool, self.target, &follow, backing).await?
        } else if parsed.has('R') {
            repair_interrupted(self.target, &options).await?;
            open_released(self.target, &options).await?.1
        } else {
            open(self.target, &options).await?.1
        };
        Ok(Target {
            disk: as_disk(&image, options.cache),
            image,
            preallocated,
        })
    }

    /// What a new target is like.
    async fn spec(&self, size: u64, options: &ImageOptions) -> Result<ImageSpec, Failure> {
        let parsed = self.parsed;
        let mut pairs = key_values(&parsed.all(&['o']));
        pairs.extend(self.cloud.into_iter().flat_map(Cloud::options));
        let backing_format = parsed.get('F');
        let mut spec = ImageSpec::new(
            self.format,
            Some(size),
            &pairs,
            self.backing,
            backing_format,
        )?
        .with_secrets(parsed)?;
        spec.check_encryption()?;
        if parsed.has('c') && spec.luks().is_some() {
            let message = "Compression and encryption not supported at the same time";
            return Err(Failure::plain(message));
        }
        if let Some(backing) = spec.qcow2.backing_file.clone()
            && spec.qcow2.backing_format.is_none()
        {
            let follow = following(options);
            let (_, detected) = look_at_backing(self.target, &backing, None, &follow).await?;
            spec.qcow2.backing_format = Some(detected.to_owned());
            spec.complete()?;
        }
        Ok(spec)
    }

    fn copy_options(&self, target: &Target) -> Result<CopyOptions, Failure> {
        let (parsed, image) = (self.parsed, &target.image);
        // Some images store nothing that is not compressed.
        let compression = image.format.as_ref().and_then(|f| f.compression());
        // What is stored of a new encrypted disk reads as anything.
        let encrypted = image
            .qcow2
            .as_ref()
            .is_some_and(|qcow2| qcow2.encryption().is_some());
        let is_new_file = self.create
            && !is_block_device(self.target)
            && self.backing.is_none()
            && self.format != "luks"
            && !(encrypted && target.preallocated);
        let sparse_size = match parsed.get('S') {
            None => 4096,
            Some(text) => size(text)
                .filter(|n| n.is_multiple_of(512))
                .ok_or_else(|| {
                    Failure::plain("Invalid buffer size for sparse output specified.")
                })?,
        };
        Ok(CopyOptions {
            // Bare data must be overwritten with zeroes where nothing is known of the target.
            sparse_size,
            compress: parsed.has('c') || compression.is_some(),
            target_is_zero: (is_new_file && sparse_size > 0) || parsed.has('Z'),
            scope: if self.backing.is_some() { Scope::Layer } else { Scope::Chain },
            parallel: match parsed.get('m') {
                None => copy::DEFAULT_PARALLEL,
                Some(text) => text.parse().ok().filter(|n| (1..=16).contains(n)).ok_or_else(|| {
                    Failure::plain("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
                })?,
            },
            salvage: parsed.has('A'),
            only_differences: parsed.has('R') && !self.create,
        })
    }
}

/// The same, but names are followed wherever they lead.
fn following(options: &ImageOptions) -> ImageOptions {
    ImageOptions {
        external: image_formats::External::Follow,
        ..options.clone()
    }
}

/// How long a lock may outlive the process that held it: the kernel takes a ring of io_uring apart, and
/// with it the files, some time after a killed process is gone.
const LOCK_LINGERS: Duration = Duration::from_secs(5);

/// Opens a target that a process which has just ended may still hold.
async fn open_released(name: &str, options: &ImageOptions) -> Result<(Rc<Disk>, Image), Failure> {
    let begin = Instant::now();
    loop {
        match open_image(name, options).await {
            Err(e) if e.kind() == ErrorKind::Locked && begin.elapsed() < LOCK_LINGERS => {
                block::executor::sleep(Duration::from_millis(20)).await?;
            }
            result => {
                let image = result?;
                return Ok((as_disk(&image, options.cache), image));
            }
        }
    }
}

/// Makes an image whole that a conversion has left when it was interrupted: clusters may be lost to
/// it, and some formats are marked as in use.
async fn repair_interrupted(target: &str, options: &ImageOptions) -> Outcome {
    let options = ImageOptions {
        for_check: true,
        backing: false,
        ..options.clone()
    };
    let (disk, image) = open_released(target, &options).await?;
    match (&image.qcow2, &image.format) {
        (Some(qcow2), _) => drop(qcow2.check(Repair::All).await?),
        (None, Some(other)) => drop(other.check(Repair::All).await?),
        (None, None) => {}
    }
    disk.close().await?;
    Ok(())
}

fn is_block_device(name: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(name).is_ok_and(|m| m.file_type().is_block_device())
}

pub(crate) async fn dd(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('O', "output-format"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let (mut input, mut output) = (None, None);
    let (mut block, mut count, mut skip) = (512u64, None, 0u64);
    for operand in &parsed.names {
        let Some((key, value)) = operand.split_once('=') else {
            return Err(Failure::plain(format!("unrecognized operand {operand}")));
        };
        let number =
            || size(value).ok_or_else(|| Failure::plain(format!("invalid number: '{value}'")));
        match key {
            "if" => input = Some(value),
            "of" => output = Some(value),
            "bs" => block = number()?,
            "count" => count = Some(number()?),
            "skip" => skip = number()?,
            _ => return Err(Failure::plain(format!("unrecognized operand {operand}"))),
        }
    }
    let (Some(input), Some(output)) = (input, output) else {
        return Err(Failure::plain("Must specify both input and output files"));
    };
    if block == 0 {
        return Err(Failure::plain("invalid number: '0'"));
    }
    let format = parsed.get('O').unwrap_or("raw");
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        lock: !parsed.has('U'),
        ..tool.options(&parsed)
    };
    let (source, _) = open(input, &options).await?;
    let too_large = || Failure::plain("the range is too large");
    let begin = block.checked_mul(skip).ok_or_else(too_large)?;
    let end = match count {
        Some(count) => {
            let length = block.checked_mul(count).ok_or_else(too_large)?;
            begin.saturating_add(length).min(source.size())
        }
        None => source.size(),
    };
    if begin > source.size() {
        eprintln!("{}: {input}: cannot skip to specified offset", tool.program);
    }
    let length = end.saturating_sub(begin);
    let spec = ImageSpec::new(format, Some(length), &[], None, None)?;
    let image = spec
        .make(tool, output, &tool.options(&parsed), false)
        .await?;
    let target = as_disk(&image, CacheMode::Writeback);
    let mut done = 0;
    while done < length {
        let piece = (length - done).min(1 << 20);
        // Blocks of any size are allowed here, disks want whole sectors.
        let at = begin + done;
        let (low, high) = (at / 512 * 512, (at + piece).next_multiple_of(512));
        let buffer = IoBuf::zeroed((high.min(source.size()) - low) as usize);
        source.read(low, buffer.clone()).await?;
        let part = buffer.slice((at - low) as usize, piece as usize);
        let whole = IoBuf::zeroed(piece.next_multiple_of(512) as usize);
        whole.copy_from(&part.to_vec());
        if !whole.is_zero() {
            target.write(done, whole, false).await?;
        }
        done += piece;
    }
    target.close().await?;
    if spec.raw {
        image.medium.set_len(length).await?;
    }
    Ok(())
}

pub(crate) async fn compare(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "a-format"),
        value('F', "b-format"),
        value('T', "cache"),
        flag('s', "strict"),
        flag('p', "progress"),
        flag('q', "quiet"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
    ];
    let failed = |f: Failure| f.with_code(2);
    let parsed = tool
        .parse(rest, &specs)
        .map_err(|f| if f.code == 0 { f } else { failed(f) })?;
    let [first, second] = &parsed.names[..] else {
        return Err(failed(Failure::usage("Expecting two image file names")));
    };
    let mut disks = Vec::new();
    for (name, format) in [(first, 'f'), (second, 'F')] {
        let options = ImageOptions {
            format: parsed.get(format).map(str::to_owned),
            lock: !parsed.has('U'),
            ..tool.options(&parsed)
        };
        disks.push(open(name, &options).await.map_err(failed)?.0);
    }
    let total = disks[0].size().max(disks[1].size());
    let progress = Progress::new(parsed.has('p') && !parsed.has('q'), total);
    let callback = progress.callback();
    let strict = parsed.has('s');
    let result = copy::compare(&disks[0], &disks[1], strict, &*callback).await;
    let result = result.map_err(|e| failed(e.into()))?;
    progress.finish();
    let quiet = parsed.has('q');
    let tell = |text: &str| {
        if !quiet {
            say(text);
        }
    };
    match result {
        Comparison::Identical { sizes_differ } => {
            if sizes_differ {
                tell("Warning: Image size mismatch!");
            }
            tell("Images are identical.");
            Ok(())
        }
        Comparison::Content { offset } => {
            tell(&format!("Content mismatch at offset {offset}!"));
            Err(Failure::status(1))
        }
        Comparison::Allocation { offset } => {
            tell(&format!(
                "Strict mode: Offset {offset} block status mismatch!"
            ));
            Err(Failure::status(1))
        }
        Comparison::Size => {
            tell("Strict mode: Image size mismatch!");
            Err(Failure::status(1))
        }
    }
}

/// The name of the file below `image` as it can be opened from here.
pub(crate) fn name_below(image_name: &str, image: &Image) -> Option<(String, Option<String>)> {
    if let Some(qcow2) = &image.qcow2 {
        let header = qcow2.header();
        let name = resolve_name(image_name, &header.backing_file?);
        return Some((name, header.backing_format));
    }
    let description = image.format.as_ref()?.describe();
    let name = resolve_name(image_name, &description.backing_file?);
    Some((name, description.backing_format))
}
