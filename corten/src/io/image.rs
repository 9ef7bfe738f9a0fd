//! Opening images, and what is asked of them as a whole.

use std::cell::Cell;
use std::rc::Rc;

use block::sync::WaitQueue;
use block::{ByteDisk, CacheMode, Disk, DiskOptions, ExtentKind, ExtentQuery, Scope};
use image_formats::luks::Secret;
use image_formats::{Image, ImageOptions, open_image};

use super::words::{self, Words};
use super::{Done, Failed, Session, print, usage};
use crate::img::output::{put, say};
use crate::img::{args, create, info, secrets, sizes};

/// Requests that nobody waits for.
#[derive(Default)]
pub(super) struct Pending {
    count: Cell<usize>,
    ended: WaitQueue,
}

/// One of them; it has ended when this is dropped.
pub(super) struct OnePending(Rc<Pending>);

impl Pending {
    pub(super) fn start(self: &Rc<Self>) -> OnePending {
        self.count.set(self.count.get() + 1);
        OnePending(self.clone())
    }

    /// Waits for all that have been started.
    pub(super) async fn wait(&self) {
        while self.count.get() > 0 {
            self.ended.wait().await;
        }
    }
}

impl Drop for OnePending {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
        self.0.ended.wake_all();
    }
}

/// The image that commands work on.
pub(super) struct Open {
    name: String,
    options: ImageOptions,
    pub(super) image: Image,
    bytes: Rc<ByteDisk>,
    /// Writes are refused, whether or not the image could take them.
    pub(super) read_only: bool,
    pub(super) pending: Rc<Pending>,
}

fn as_bytes(image: &Image, options: &ImageOptions) -> Rc<ByteDisk> {
    let policies = DiskOptions {
        cache: options.cache,
        discard: options.discard,
        ..DiskOptions::default()
    };
    let disk = Disk::new(image.backend.clone(), policies);
    Rc::new(ByteDisk::new(Rc::new(disk)))
}

impl Open {
    pub(super) fn bytes(&self) -> Rc<ByteDisk> {
        self.bytes.clone()
    }

    /// Ends what is under way, and closes the image.
    pub(super) async fn close(self) -> block::Result<()> {
        self.pending.wait().await;
        self.bytes.disk().close().await
    }
}

/// How to open: what the command line and the `open` command share.
pub(super) fn options(session: &Session, words: &Words) -> Result<ImageOptions, String> {
    let mut options = ImageOptions {
        write: !words.has('r'),
        snapshot: words.has('s'),
        discard: true,
        lock: !words.has('U'),
        external: session.external(),
        ..ImageOptions::default()
    };
    if words.has('C') {
        return Err("copy-on-read is not supported".to_owned());
    }
    let cache = if words.has('n') {
        Some("none")
    } else {
        words.get('t')
    };
    if let Some(name) = cache {
        options.cache =
            CacheMode::parse(name).map_err(|_| format!("Invalid cache option: {name}"))?;
    }
    options.discard = match words.get('d') {
        None | Some("unmap" | "on") => true,
        Some("ignore" | "off") => false,
        Some(mode) => return Err(format!("Invalid discard option: {mode}")),
    };
    if let Some(mode) = words.get('i')
        && !matches!(mode, "threads" | "native" | "io_uring")
    {
        return Err(format!("Invalid aio option: {mode}"));
    }
    Ok(options)
}

/// Applies `key=value` options; returns the file that they name.
pub(super) fn driver_options(
    texts: &[(char, &str)],
    passwords: &[(String, Secret)],
    options: &mut ImageOptions,
) -> Result<Option<String>, String> {
    let mut file = None;
    for (key, value) in args::key_values(texts) {
        let switch = || match value.as_str() {
            "on" | "yes" | "true" => Ok(true),
            "off" | "no" | "false" => Ok(false),
            _ => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
        };
        match key.as_str() {
            "driver" => options.format = Some(value.clone()),
            "filename" | "file.filename" => file = Some(value.clone()),
            "read-only" => options.write = !switch()?,
            "force-share" => options.lock = !switch()?,
            "file.driver" if value == "file" => {}
            "encrypt.format" if value == "luks" => {}
            "key-secret" | "encrypt.key-secret" => {
                let found = secrets::find(passwords, &value).map_err(|failure| failure.text())?;
                options.secret = Some(found);
            }
            "discard" => options.discard = matches!(value.as_str(), "unmap" | "on"),
            "cache.direct" => {
                if switch()? {
                    options.cache = CacheMode::None;
                }
            }
            "cache.no-flush" => {
                if switch()? {
                    options.cache = CacheMode::Unsafe;
                }
            }
            _ => return Err(format!("the option '{key}' is not supported")),
        }
    }
    Ok(file)
}

impl Session {
    /// Opens an image by name.
    pub(super) async fn open(&mut self, name: &str, options: ImageOptions) -> Done {
        if self.image.is_some() {
            return Err(self.complain("file open already, try 'help close'"));
        }
        let opened = open_image(name, &options).await;
        let image = opened
            .map_err(|e| self.complain(&format!("can't open device {name}: {}", e.one_line())))?;
        if options.format.is_none() && options.write && image.backend.format_name() == "raw" {
            eprintln!(
                "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
                 Specify the 'raw' format explicitly to remove the restrictions on writes to block 0."
            );
        }
        let bytes = as_bytes(&image, &options);
        let read_only = !options.write && !options.snapshot;
        self.image = Some(Open {
            name: name.to_owned(),
            options,
            image,
            bytes,
            read_only,
            pending: Rc::default(),
        });
        Ok(())
    }

    pub(super) async fn open_command(&mut self, words: &Words) -> Done {
        let mut options = options(self, words).map_err(|e| self.complain(&e))?;
        let file = driver_options(&words.all('o'), &self.secrets, &mut options)
            .map_err(|e| self.complain(&e))?;
        let name = match (&words.rest[..], file) {
            ([name], _) => name.clone(),
            ([], Some(name)) => name,
            _ => return Err(usage("open")),
        };
        self.open(&name, options).await
    }

    pub(super) async fn close(&mut self) -> Done {
        let Some(open) = self.image.take() else {
            return Ok(());
        };
        let closed = open.close().await;
        closed.map_err(|e| self.complain(&e.one_line()))
    }

    /// Changes the policies of the open image; opens it anew only if it must become writable.
    pub(super) async fn reopen(&mut self, words: &Words) -> Done {
        if !words.rest.is_empty() {
            return Err(usage("reopen"));
        }
        if words.has('r') && words.has('w') {
            return Err(self.complain("Only one -r/-w option may be given"));
        }
        let Some(open) = &self.image else {
            return Ok(());
        };
        let mut options = open.options.clone();
        if let Some(name) = words.get('c') {
            let mode = CacheMode::parse(name);
            options.cache =
                mode.map_err(|_| self.complain(&format!("Invalid cache option: {name}")))?;
        }
        driver_options(&words.all('o'), &self.secrets, &mut options)
            .map_err(|e| self.complain(&e))?;
        options.write |= words.has('w');
        let anew = (options.write && !open.options.write)
            || options.cache.is_direct() != open.options.cache.is_direct();
        if anew && open.options.snapshot {
            return Err(self.complain("a temporary image cannot be opened anew"));
        }
        if anew {
            let name = open.name.clone();
            self.close().await?;
            self.open(&name, options).await?;
        } else if let Some(open) = &mut self.image {
            open.pending.wait().await;
            open.bytes = as_bytes(&open.image, &options);
            open.options = options;
        }
        if let Some(open) = &mut self.image {
            open.read_only = (open.read_only || words.has('r')) && !words.has('w');
        }
        Ok(())
    }
}

pub(super) fn length(open: &Open) {
    say(words::size(open.bytes.disk().size()));
}

pub(super) fn describe(open: &Open) {
    let qcow2 = open.image.qcow2.as_ref();
    say(format!("format name: {}", open.image.backend.format_name()));
    let cluster = qcow2.map_or(0, |q| q.cluster_size());
    say(format!("cluster size: {}", words::size(cluster)));
    // A machine's state lies behind the last L2 table that the disk needs.
    let state = qcow2.map_or(0, |qcow2| {
        let header = qcow2.header();
        let entry_bits = if header.has_subclusters() { 4 } else { 3 };
        header.l1_entries_for(header.size) << (header.cluster_bits * 2 - entry_bits)
    });
    say(format!("vm state offset: {}", words::size(state)));
    if let Some(qcow2) = qcow2 {
        say("Format specific information:");
        let list = info::qcow2_properties(qcow2);
        put(&info::property_lines(&list));
    }
}

/// Whether the bytes at `offset` are stored in the image itself, and how far that goes.
async fn stored(open: &Open, offset: u64, length: u64) -> Result<(bool, u64), Failed> {
    let mut whole: Option<(bool, u64)> = None;
    let disk = open.bytes.disk();
    let size = disk.size();
    let end = offset.saturating_add(length).min(size);
    while whole.is_none_or(|(_, done)| offset + done < end) {
        let at = offset + whole.map_or(0, |(_, done)| done);
        let query = ExtentQuery {
            offset: at / 512 * 512,
            length: end.next_multiple_of(512).min(size) - at / 512 * 512,
            scope: Scope::Layer,
            limit: 64,
        };
        let extents = disk
            .extents(query)
            .await
            .map_err(|e| print(format!("is_allocated failed: {}", e.one_line())))?;
        for extent in extents {
            let here = !matches!(extent.kind, ExtentKind::Unallocated);
            let reach = extent.end().min(end);
            match &mut whole {
                Some((first, _)) if *first != here => return Ok(whole.unwrap_or((here, 0))),
                _ => whole = Some((here, reach - offset)),
            }
        }
    }
    Ok(whole.unwrap_or((false, 0)))
}

pub(super) async fn alloc(open: &Open, words: &Words) -> Done {
    let offset = words::number(&words.rest[0]).map_err(print)?;
    let wanted = words.rest.get(1).map(|text| words::number(text));
    let wanted = wanted.transpose().map_err(print)?.unwrap_or(512);
    let left = open.bytes.disk().size().saturating_sub(offset);
    let count = wanted.min(left);
    let (mut sum, mut done) = (0, 0);
    while done < count {
        let (here, length) = stored(open, offset + done, count - done).await?;
        sum += if here { length } else { 0 };
        done += length.max(1);
    }
    let at = words::size(offset);
    say(format!("{sum}/{count} bytes allocated at offset {at}"));
    Ok(())
}

pub(super) async fn map(open: &Open) -> Done {
    let size = open.bytes.disk().size();
    let mut at = 0;
    while at < size {
        let (here, length) = stored(open, at, size - at).await?;
        let what = if here {
            "    allocated"
        } else {
            "not allocated"
        };
        let (shown, place) = (words::size(length), words::size(at));
        say(format!(
            "{shown} ({length:#x}) bytes {what} at offset {place} ({at:#x})"
        ));
        at += length.max(1);
    }
    Ok(())
}

pub(super) async fn truncate(session: &Session, open: &Open, words: &Words) -> Done {
    let [size] = &words.rest[..] else {
        return Err(usage("truncate"));
    };
    let complain = |text: String| session.complain(&text);
    let how = create::preallocation(words.get('m').unwrap_or("off"));
    let how = how.map_err(|f| complain(f.text()))?;
    let size = words::number(size).map_err(print)?;
    let resized = sizes::set_size(open.bytes.disk(), &open.image, size, how).await;
    resized.map_err(|f| complain(f.text()))
}
