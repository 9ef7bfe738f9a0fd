//! `create` and `amend`, and what new images are like.

use std::rc::Rc;

use block::{BlockBackend, Medium};
use image_formats::luks::{self, KeyChange};
use image_formats::qcow2::{self, Compatible, CompressionType, CreateOptions, Preallocation};
use image_formats::{
    Image, ImageOptions, NewImage, Opener, create_file, open_image, probe, resolve_name,
};

use super::args::{Parsed, flag, key_values, size, value};
use super::formats;
use super::output::say;
use super::sizes::preallocate_raw;
use super::{Failure, Outcome, Tool, secrets};

/// A format and its options.
pub(crate) struct ImageSpec {
    pub(crate) raw: bool,
    pub(crate) qcow2: CreateOptions,
    /// Set if it is neither raw nor qcow2; then only size and backing file of `qcow2` count.
    pub(crate) other: Option<NewImage>,
    size_given: bool,
    version_given: bool,
    encrypt_format_given: bool,
}

/// Reads on or off.
pub(crate) fn switch(key: &str, text: &str) -> Result<bool, Failure> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Failure::plain(format!(
            "Parameter '{key}' expects 'on' or 'off'"
        ))),
    }
}

/// Reads a preallocation mode.
pub(crate) fn preallocation(text: &str) -> Result<Preallocation, Failure> {
    Ok(match text {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => return Err(Failure::plain(format!("Invalid parameter '{text}'"))),
    })
}

impl ImageSpec {
    /// Reads the options of a new image.
    pub(crate) fn new(
        format: &str,
        disk_size: Option<u64>,
        pairs: &[(String, String)],
        backing: Option<&str>,
        backing_format: Option<&str>,
    ) -> Result<Self, Failure> {
        let other = NewImage::of(format);
        let raw = match format {
            "raw" => true,
            "qcow2" => false,
            _ if other.is_some() => false,
            other => return Err(Failure::plain(format!("Unknown file format '{other}'"))),
        };
        let options = CreateOptions {
            size: disk_size.unwrap_or(0),
            backing_file: backing.map(str::to_owned),
            backing_format: backing_format.map(str::to_owned),
            ..CreateOptions::default()
        };
        let mut spec = Self {
            raw,
            qcow2: options,
            other,
            size_given: disk_size.is_some(),
            version_given: false,
            encrypt_format_given: false,
        };
        for (key, value) in pairs {
            spec.set(key, value)?;
        }
        if spec.raw && spec.qcow2.backing_file.is_some() {
            return Err(Failure::plain(
                "Backing file not supported for file format 'raw'",
            ));
        }
        spec.qcow2.size = spec.qcow2.size.next_multiple_of(512);
        spec.complete()?;
        Ok(spec)
    }

    /// Hands size and backing file on to the format.
    pub(crate) fn complete(&mut self) -> Outcome {
        if let Some(other) = &mut self.other {
            other.set_size(self.qcow2.size);
            let backing = self.qcow2.backing_file.clone();
            if !other.set_backing(backing.clone()) && backing.is_some() {
                let format = other.format();
                return Err(Failure::plain(format!(
                    "Backing file not supported for file format '{format}'"
                )));
            }
        }
        Ok(())
    }

    /// Finds the password that the options name.
    pub(crate) fn with_secrets(mut self, parsed: &Parsed) -> Result<Self, Failure> {
        if let Some(luks) = self.luks_mut()
            && let Some(id) = &luks.key_secret
        {
            luks.secret = Some(secrets::find(&parsed.secrets, id)?);
        }
        Ok(self)
    }

    fn luks_mut(&mut self) -> Option<&mut luks::CreateOptions> {
        match &mut self.other {
            Some(NewImage::Luks(luks)) => Some(luks),
            _ => self.qcow2.encryption.as_mut(),
        }
    }

    /// How the disk is encrypted, if it is.
    pub(crate) fn luks(&self) -> Option<&luks::CreateOptions> {
        match &self.other {
            Some(NewImage::Luks(luks)) => Some(luks),
            _ => self.qcow2.encryption.as_ref(),
        }
    }

    /// Looks whether an encrypted image has all that it needs.
    pub(crate) fn check_encryption(&self) -> Outcome {
        let Some(luks) = self.luks() else {
            return Ok(());
        };
        let prefix = if self.other.is_some() { "" } else { "encrypt." };
        if !self.encrypt_format_given && self.other.is_none() {
            return Err(Failure::plain("Parameter 'encrypt.format' is missing"));
        }
        if luks.secret.is_none() {
            return Err(Failure::plain(format!(
                "Parameter '{prefix}key-secret' is required for cipher"
            )));
        }
        Ok(())
    }

    /// Sets an option of a new qcow2 image's encryption.
    fn set_encryption(&mut self, key: &str, value: &str) -> Outcome {
        let luks = self.qcow2.encryption.get_or_insert_default();
        match key {
            "format" if value == "luks" => self.encrypt_format_given = true,
            "format" if value == "aes" => {
                let message = "encrypt.format=aes is broken and not written: expected luks";
                return Err(Failure::plain(message));
            }
            "format" => return Err(Failure::plain(format!("Invalid parameter '{value}'"))),
            _ if formats::set_luks(luks, key, value)? => {}
            _ => {
                return Err(Failure::plain(format!("Invalid parameter 'encrypt.{key}'")));
            }
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Outcome {
        let number = || {
            size(value).ok_or_else(|| {
                Failure::plain(format!(
                    "Parameter '{key}' expects a non-negative number below 2^64"
                ))
            })
        };
        if let (None, false, Some(key)) = (&self.other, self.raw, key.strip_prefix("encrypt.")) {
            return self.set_encryption(key, value);
        }
        let options = &mut self.qcow2;
        if let Some(other) = &mut self.other
            && formats::set(other, key, value)?
        {
            return Ok(());
        }
        match key {
            "size" => {
                options.size = number()?;
                self.size_given = true;
            }
            "extent_size_hint" | "nocow" => {}
            "backing_file" if self.other.is_some() => {
                options.backing_file = Some(value.to_owned()).filter(|v| !v.is_empty());
            }
            "backing_fmt" if self.other.is_some() => {
                options.backing_format = Some(value.to_owned());
            }
            _ if self.other.is_some() => {
                return Err(Failure::plain(format!("Invalid parameter '{key}'")));
            }
            "preallocation" => options.preallocation = preallocation(value)?,
            _ if self.raw => return Err(Failure::plain(format!("Invalid parameter '{key}'"))),
            "backing_file" => {
                options.backing_file = Some(value.to_owned()).filter(|v| !v.is_empty());
            }
            "backing_fmt" => options.backing_format = Some(value.to_owned()),
            "cluster_size" => options.cluster_size = number()?,
            "refcount_bits" => {
                options.refcount_bits = u32::try_from(number()?).unwrap_or(u32::MAX);
            }
            "compat" | "version" => {
                self.version_given = true;
                options.version = match value {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => return Err(Failure::plain(format!("Invalid parameter '{value}'"))),
                };
            }
            "lazy_refcounts" => options.lazy_refcounts = switch(key, value)?,
            "extended_l2" => options.extended_l2 = switch(key, value)?,
            "compression_type" => {
                options.compression = match value {
                    "zlib" => CompressionType::Zlib,
                    "zstd" => CompressionType::Zstd,
                    _ => return Err(Failure::plain(format!("Invalid parameter '{value}'"))),
                };
            }
            "data_file" => options.data_file = Some(value.to_owned()).filter(|v| !v.is_empty()),
            "data_file_raw" => options.data_file_raw = switch(key, value)?,
            "encryption" if !switch(key, value)? => {}
            "encryption" => {
                let message =
                    "encryption=on is broken and not written: expected encrypt.format=luks";
                return Err(Failure::plain(message));
            }
            _ => return Err(Failure::plain(format!("Invalid parameter '{key}'"))),
        }
        Ok(())
    }

    /// Makes the image; what was there is gone. Returns it open for writing.
    pub(crate) async fn make(
        &self,
        tool: Tool,
        name: &str,
        options: &ImageOptions,
        open_backing: bool,
    ) -> Result<Image, Failure> {
        let medium: Rc<dyn Medium> = create_file(name, options.cache)?;
        let cache = options.cache;
        let format = self.format();
        let options = ImageOptions {
            format: Some(format.to_owned()),
            write: true,
            backing: open_backing,
            secret: self.luks().and_then(|luks| luks.secret.clone()),
            ..options.clone()
        };
        let opener = Opener::new(options);
        if let Some(other) = &self.other {
            for file in other.files(name) {
                create_file(&resolve_name(name, &file), cache)?;
            }
            let random = || uuid::Uuid::new_v4().into_bytes();
            let created = other.create(&medium, &opener, random).await;
            created.map_err(|e| Failure::plain(format!("{name}: {}", e.one_line())))?;
        } else if self.raw {
            medium.set_len(self.qcow2.size).await?;
            preallocate_raw(&*medium, 0, self.qcow2.size, self.qcow2.preallocation).await?;
        } else {
            if let Some(data) = &self.qcow2.data_file {
                // A data file that is there is kept; one that is not is made.
                let path = resolve_name(name, data);
                if !std::path::Path::new(&path).exists() {
                    create_file(&path, cache)?;
                }
            }
            let created = qcow2::create(&medium, &opener, &self.qcow2).await;
            if let Err(error) = created {
                let message = error.one_line();
                return Err(Failure::plain(format!("{name}: {message}")));
            }
        }
        let _ = tool;
        Ok(opener.open_format(medium).await?)
    }

    /// The format's name.
    pub(crate) fn format(&self) -> &'static str {
        match &self.other {
            Some(other) => other.format(),
            None if self.raw => "raw",
            None => "qcow2",
        }
    }

    /// The line that announces the image.
    fn describe(&self, name: &str) -> String {
        let o = &self.qcow2;
        if let Some(other) = &self.other {
            return formats::describe(other, name, o);
        }
        if self.raw {
            return format!("Formatting '{name}', fmt=raw size={}", o.size);
        }
        let on = |value: bool| if value { "on" } else { "off" };
        let mut text = format!("Formatting '{name}', fmt=qcow2");
        let mut add = |key: &str, value: &str| {
            text.push_str(&format!(" {key}={value}"));
        };
        if let Some(luks) = &o.encryption {
            add("encrypt.format", "luks");
            formats::describe_luks(luks, |key, value| add(&format!("encrypt.{key}"), value));
        }
        add("cluster_size", &o.cluster_size.to_string());
        add("extended_l2", on(o.extended_l2));
        match o.preallocation {
            Preallocation::Off => {}
            Preallocation::Metadata => add("preallocation", "metadata"),
            Preallocation::Falloc => add("preallocation", "falloc"),
            Preallocation::Full => add("preallocation", "full"),
        }
        add("compression_type", o.compression.name());
        add("size", &o.size.to_string());
        if self.version_given {
            add("compat", if o.version < 3 { "0.10" } else { "1.1" });
        }
        if let Some(file) = &o.backing_file {
            add("backing_file", file);
        }
        if let Some(format) = &o.backing_format {
            add("backing_fmt", format);
        }
        if let Some(file) = &o.data_file {
            add("data_file", file);
            add("data_file_raw", on(o.data_file_raw));
        }
        add("lazy_refcounts", on(o.lazy_refcounts));
        add("refcount_bits", &o.refcount_bits.to_string());
        text
    }
}

/// The size of a backing file, and its format.
pub(crate) async fn look_at_backing(
    image: &str,
    name: &str,
    format: Option<&str>,
    options: &ImageOptions,
) -> Result<(u64, &'static str), Failure> {
    let options = ImageOptions {
        format: format.map(str::to_owned),
        write: false,
        lock: false,
        ..options.clone()
    };
    let path = resolve_name(image, name);
    let opened = open_image(&path, &options).await;
    let opened = opened.map_err(|e| {
        Failure::plain(format!(
            "{image}: Could not open backing file '{name}': {}",
            e.one_line()
        ))
    })?;
    Ok((opened.backend.limits().size, probe(&*opened.medium).await?))
}

pub(crate) async fn create(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('o', "options"),
        value('b', "backing"),
        value('F', "backing-format"),
        flag('u', "backing-unsafe"),
        flag('q', "quiet"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let format = parsed.get('f').unwrap_or("raw");
    let pairs = key_values(&parsed.all(&['o']));
    if pairs.iter().any(|(key, _)| key == "help" || key == "?") {
        return option_help(format);
    }
    let (name, disk_size) = match &parsed.names[..] {
        [name] => (name, None),
        [name, text] => {
            let number = size(text);
            let message = format!("Invalid image size specified: '{text}'");
            (name, Some(number.ok_or_else(|| Failure::plain(message))?))
        }
        [] => return Err(Failure::usage("Expecting image file name")),
        _ => return Err(Failure::usage("Unexpected argument")),
    };
    let named = |f: Failure| Failure {
        message: f.message.map(|m| format!("{name}: {m}")),
        ..f
    };
    let mut spec = ImageSpec::new(format, disk_size, &pairs, parsed.get('b'), parsed.get('F'))
        .and_then(|spec| spec.with_secrets(&parsed))
        .map_err(named)?;
    let options = tool.options(&parsed);
    if let Some(backing) = spec.qcow2.backing_file.clone()
        && !parsed.has('u')
    {
        // The person names the file here, wherever it is.
        let follow = ImageOptions {
            external: image_formats::External::Follow,
            ..options.clone()
        };
        let format = spec.qcow2.backing_format.as_deref();
        let (below, detected) = look_at_backing(name, &backing, format, &follow).await?;
        if spec.qcow2.backing_format.is_none() {
            let message = format!(
                "{name}: Backing file specified without backing format\nDetected format of {detected}."
            );
            return Err(Failure::plain(message));
        }
        if !spec.size_given {
            spec.qcow2.size = below;
            spec.size_given = true;
        }
        spec.complete()?;
    }
    if !spec.size_given {
        return Err(Failure::plain(format!(
            "{name}: Image creation needs a size parameter"
        )));
    }
    // Refused before the file is touched.
    spec.check_encryption().map_err(named)?;
    if let Some(other) = &spec.other {
        other
            .measure(&[])
            .map_err(|e| Failure::plain(format!("{name}: {}", e.message())))?;
    } else if !spec.raw {
        spec.qcow2
            .measure(0)
            .map_err(|e| Failure::plain(format!("{name}: {}", e.message())))?;
    }
    if !parsed.has('q') {
        say(spec.describe(name));
    }
    // Whatever other files there are, the person has named them here.
    let follow = ImageOptions {
        external: image_formats::External::Follow,
        ..options
    };
    let image = spec.make(tool, name, &follow, false).await?;
    image.backend.close().await?;
    Ok(())
}

fn option_help(format: &str) -> Outcome {
    let common = [
        (
            "preallocation=<str>",
            "Preallocation mode (allowed values: off, metadata, falloc, full)",
        ),
        ("size=<size>", "Virtual disk size"),
    ];
    let qcow2 = [
        ("backing_file=<str>", "File name of a base image"),
        ("backing_fmt=<str>", "Image format of the base image"),
        ("cluster_size=<size>", "qcow2 cluster size"),
        (
            "compat=<str>",
            "Compatibility level (v2 [0.10] or v3 [1.1])",
        ),
        (
            "compression_type=<str>",
            "Compression method used for image cluster compression",
        ),
        ("data_file=<str>", "File name of an external data file"),
        (
            "data_file_raw=<bool (on/off)>",
            "The external data file must stay valid as a raw image",
        ),
        (
            "encrypt.format=<str>",
            "Encrypt the image: luks, with encrypt.key-secret=ID and luks's other options",
        ),
        ("extended_l2=<bool (on/off)>", "Extended L2 tables"),
        (
            "lazy_refcounts=<bool (on/off)>",
            "Postpone refcount updates",
        ),
        (
            "refcount_bits=<num>",
            "Width of a reference count entry in bits",
        ),
    ];
    let list: Vec<_> = match format {
        "qcow2" => qcow2.iter().chain(&common).collect(),
        "raw" => common.iter().collect(),
        other if formats::option_list(other).is_some() => formats::option_list(other)
            .unwrap_or_default()
            .iter()
            .collect(),
        other => return Err(Failure::plain(format!("Unknown file format '{other}'"))),
    };
    say("Supported options:");
    for (name, what) in list {
        say(format!("  {name:<22} - {what}"));
    }
    Ok(())
}

pub(crate) async fn amend(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('o', "options"),
        value('t', "cache"),
        flag('p', "progress"),
        flag('q', "quiet"),
        flag('Z', "force"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let pairs = key_values(&parsed.all(&['o']));
    let format = parsed.get('f').unwrap_or("qcow2");
    if pairs.iter().any(|(key, _)| key == "help") {
        return option_help(format);
    }
    if pairs.is_empty() {
        return Err(Failure::usage("Must specify options (-o)"));
    }
    let name = parsed.one_name()?;
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: true,
        ..tool.options(&parsed)
    };
    let image = open_image(name, &options).await?;
    if let ("luks", Some(luks)) = (image.backend.format_name(), &image.format) {
        let change = key_change(&parsed, &pairs, "")?;
        luks.amend_keys(change).await?;
        image.backend.close().await?;
        return Ok(());
    }
    let Some(qcow2) = image.qcow2 else {
        let format = image.backend.format_name();
        return Err(Failure::plain(format!(
            "Format driver '{format}' does not support option amendment"
        )));
    };
    let (of_keys, others): (Vec<_>, Vec<_>) = pairs
        .into_iter()
        .partition(|(key, _)| key.starts_with("encrypt."));
    if !of_keys.is_empty() {
        let change = key_change(&parsed, &of_keys, "encrypt.")?;
        qcow2.amend_keys(&change).await?;
    }
    for (key, value) in &others {
        amend_one(&qcow2, key, value).await?;
    }
    qcow2.close().await?;
    Ok(())
}

/// What the options say of passwords.
fn key_change(
    parsed: &Parsed,
    pairs: &[(String, String)],
    prefix: &str,
) -> Result<KeyChange, Failure> {
    let mut state = None;
    let mut change = KeyChange {
        active: false,
        slot: None,
        new: None,
        old: None,
        iteration_time: luks::CreateOptions::default().iteration_time,
        force: parsed.has('Z'),
    };
    for (key, text) in pairs {
        let number = || {
            let message = format!("Parameter '{key}' expects a number, not '{text}'");
            text.parse().map_err(|_| Failure::plain(message))
        };
        match key.strip_prefix(prefix).unwrap_or(key) {
            "format" if text == "luks" && !prefix.is_empty() => {}
            "state" if text == "active" => state = Some(true),
            "state" if text == "inactive" => state = Some(false),
            "state" => return Err(Failure::plain(format!("Invalid parameter '{text}'"))),
            "keyslot" => change.slot = Some(number()?),
            "iter-time" => change.iteration_time = number()?,
            "new-secret" => change.new = Some(secrets::find(&parsed.secrets, text)?),
            "old-secret" => change.old = Some(secrets::find(&parsed.secrets, text)?),
            _ => {
                let message = format!("Invalid option '{key}': it cannot be amended");
                return Err(Failure::plain(message));
            }
        }
    }
    let missing = || Failure::plain(format!("Parameter '{prefix}state' is missing"));
    change.active = state.ok_or_else(missing)?;
    Ok(change)
}

async fn amend_one(image: &qcow2::Qcow2, key: &str, text: &str) -> Outcome {
    let header = image.header();
    match key {
        "size" => {
            let bytes = size(text).ok_or_else(|| {
                Failure::plain(format!("Parameter 'size' expects a size, not '{text}'"))
            })?;
            image.resize(bytes.next_multiple_of(512)).await?;
        }
        "backing_file" => {
            let name = Some(text.to_owned()).filter(|n| !n.is_empty());
            let format = header.backing_format.filter(|_| name.is_some());
            image.change_backing_name(name, format).await?;
        }
        "backing_fmt" => {
            image
                .change_backing_name(header.backing_file, Some(text.to_owned()))
                .await?;
        }
        "lazy_refcounts" => {
            let on = switch(key, text)?;
            if on && header.version < 3 {
                return Err(Failure::plain(
                    "Lazy refcounts only supported with compatibility level 1.1 and above (use \
                     compat=1.1 or greater)",
                ));
            }
            // Whatever was put off is written before the promise changes.
            image.close().await?;
            image
                .change_header(|h| h.compatible.set(Compatible::LAZY_REFCOUNTS, on))
                .await?;
        }
        "compat" if (text == "1.1" || text == "v3") && header.version < 3 => {
            image.change_header(|h| h.version = 3).await?;
        }
        "compat" => {
            let now = if header.version < 3 {
                ["0.10", "v2"]
            } else {
                ["1.1", "v3"]
            };
            if !now.contains(&text) {
                return Err(Failure::plain(format!(
                    "compat={text} cannot be amended to"
                )));
            }
        }
        _ => {
            let message = format!("Invalid option '{key}': it cannot be amended");
            return Err(Failure::plain(message));
        }
    }
    Ok(())
}
