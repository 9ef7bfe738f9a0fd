//! `corten img`: the verbs, options, output and exit codes of `qemu-img`.

// Sizes are shown as fractions for people; nothing is computed with them.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

pub(crate) mod args;
mod bitmap;
mod check;
mod clouds;
mod confined;
pub(crate) mod convert;
pub(crate) mod create;
mod formats;
pub(crate) mod info;
mod layers;
mod map;
pub(crate) mod output;
pub(crate) mod secrets;
pub(crate) mod sizes;
mod snapshot;
mod verify;

use std::process::ExitCode;
use std::rc::Rc;

use block::{BlockError, CacheMode, Disk, DiskOptions};
use image_formats::{External, Image, ImageOptions, open_image};

use args::{Parsed, Spec, flag, value};

/// Why a verb ended without success.
#[derive(Debug)]
pub(crate) struct Failure {
    message: Option<String>,
    usage: bool,
    code: u8,
}

impl Failure {
    /// A command line that cannot be understood.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            message: Some(message.into()),
            usage: true,
            code: 1,
        }
    }

    /// Something that did not work.
    pub(crate) fn plain(message: impl Into<String>) -> Self {
        Self {
            message: Some(message.into()),
            usage: false,
            code: 1,
        }
    }

    /// What to say of it.
    pub(crate) fn text(self) -> String {
        self.message.unwrap_or_default()
    }

    /// An exit status whose reason has been printed.
    pub(crate) fn status(code: u8) -> Self {
        Self {
            message: None,
            usage: false,
            code,
        }
    }

    /// The same with another exit status.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }
}

impl From<BlockError> for Failure {
    fn from(error: BlockError) -> Self {
        Self::plain(error.one_line())
    }
}

/// What every verb ends with.
pub(crate) type Outcome = Result<(), Failure>;

/// What all verbs know.
#[derive(Clone, Copy)]
pub(crate) struct Tool {
    /// The name to begin messages with.
    program: &'static str,
    /// Follow every name in images, as the old tool does.
    compatible: bool,
}

const VERBS: [(&str, &str); 16] = [
    ("amend", "Update format-specific options of the image"),
    ("bench", "Run simple image benchmark"),
    ("bitmap", "Modify or create persistent bitmaps of the image"),
    ("check", "Check basic image integrity"),
    ("commit", "Commit image to its backing file"),
    ("compare", "Check if two images have the same contents"),
    (
        "convert",
        "Copy one image to another with optional format conversion",
    ),
    ("create", "Create and format new image file"),
    ("dd", "Copy input to output with optional format conversion"),
    ("info", "Display information about image"),
    ("map", "Dump image metadata"),
    ("measure", "Calculate file size required for a new image"),
    ("rebase", "Change backing file of the image"),
    ("resize", "Resize the image to the new size"),
    ("snapshot", "List or manipulate snapshots within image"),
    (
        "verify",
        "Check an image against the manifest that `convert --checksum` wrote",
    ),
];

/// Runs `corten img` with the arguments that follow it, or `qemu-img` with its arguments
/// (`compatible`: then names in images are followed wherever they lead).
pub(crate) fn main(arguments: &[String], compatible: bool) -> ExitCode {
    let program = if compatible { "qemu-img" } else { "corten img" };
    let tool = Tool {
        program,
        compatible,
    };
    let Some((verb, rest)) = arguments.split_first() else {
        eprintln!("{program}: Not enough arguments");
        eprintln!("Try '{program} --help' for more info");
        return ExitCode::FAILURE;
    };
    match verb.as_str() {
        "--help" | "-h" | "help" => {
            help(program);
            return ExitCode::SUCCESS;
        }
        "--version" | "-V" => {
            output::say(format!(
                "{program} (Corten) version {}",
                env!("CARGO_PKG_VERSION")
            ));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let outcome = if verb == "info" {
        // Its sandbox is a fork of this process, which must have no executor yet.
        info::info(tool, rest)
    } else {
        block::executor::block_on(run(tool, verb, rest)).unwrap_or_else(|e| Err(e.into()))
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message {
                eprintln!("{program}: {message}");
            }
            if failure.usage {
                eprintln!("Try '{program} {verb} --help' for more info");
            }
            ExitCode::from(failure.code)
        }
    }
}

fn help(program: &str) {
    output::say(format!(
        "Disk image utility. Usage: {program} COMMAND [options]\n"
    ));
    output::say("Commands (the options are those of qemu-img):\n");
    for (name, what) in VERBS {
        output::say(format!("  {name:<9} {what}"));
    }
    output::say(
        "\nFormats, read and written: raw qcow2 luks vdi vhdx vmdk vpc\n\
         Formats, read: bochs cloop dmg parallels qed",
    );
}

async fn run(tool: Tool, verb: &str, rest: &[String]) -> Outcome {
    match verb {
        "amend" => create::amend(tool, rest).await,
        "bench" => sizes::bench(tool, rest).await,
        "bitmap" => bitmap::bitmap(tool, rest).await,
        "check" => check::check(tool, rest).await,
        "commit" => layers::commit(tool, rest).await,
        "compare" => convert::compare(tool, rest).await,
        "convert" => convert::convert(tool, rest).await,
        "create" => create::create(tool, rest).await,
        "dd" => convert::dd(tool, rest).await,
        "map" => map::map(tool, rest).await,
        "measure" => sizes::measure(tool, rest).await,
        "rebase" => layers::rebase(tool, rest).await,
        "resize" => sizes::resize(tool, rest).await,
        "snapshot" => snapshot::snapshot(tool, rest).await,
        "verify" => verify::verify(tool, rest).await,
        _ => Err(Failure::plain(format!(
            "Command not found: {verb}\nTry '{} --help' for more info",
            tool.program
        ))),
    }
}

/// Options of several verbs.
pub(crate) const ALLOW_EXTERNAL: Spec = flag('E', "allow-external");
pub(crate) const OBJECT: Spec = value('@', "object");
pub(crate) const HELP: Spec = flag('h', "help");

/// What an option does that qemu-img does not have.
fn about(option: &str) -> &'static str {
    match option {
        "checksum" => {
            "write TARGET.blake3, a manifest for `verify`: the BLAKE3 digest of each 4 MiB of the \
             sources' content, zeroes at the end of an extent left out, null where all is zero"
        }
        "resume" => {
            "go on with an interrupted conversion: repair TARGET if it is there, compare it with the \
             sources and write what differs (options that shape a new image do not count then)"
        }
        "object" => "a password: secret,id=ID,data=TEXT or secret,id=ID,file=FILE",
        "image-opts" => "names are options: driver=FORMAT,file.filename=FILE,key-secret=ID",
        "for" => {
            "make what azure, esxi, aws or gcp imports: format, options, alignment and, for gcp, a \
             .tar.gz"
        }
        "no-sandbox" => "parse the image in this process, where a kernel lets no sandbox be made",
        "manifest" => "the manifest to check against (default: IMAGE.blake3)",
        "allow-external" => "open files outside the image's own directory that the image names",
        _ => "",
    }
}

impl Tool {
    /// Takes a verb's command line apart; prints its options if that is asked for.
    pub(crate) fn parse(self, rest: &[String], specs: &[Spec]) -> Result<Parsed, Failure> {
        let mut all = specs.to_vec();
        all.extend([ALLOW_EXTERNAL, OBJECT, HELP]);
        let mut parsed = args::parse(rest, &all)?;
        if parsed.has('h') {
            for spec in &all {
                let value = if spec.value { " VALUE" } else { "" };
                let long = if spec.long.is_empty() {
                    String::new()
                } else {
                    format!("--{}", spec.long)
                };
                let short = if spec.short.is_ascii_lowercase() || "FOSTBUWLQ".contains(spec.short) {
                    format!("-{}", spec.short)
                } else {
                    "  ".to_owned()
                };
                let about = about(spec.long);
                let gap = if about.is_empty() { "" } else { "  " };
                output::say(format!("  {short} {long}{value}{gap}{about}"));
            }
            return Err(Failure::status(0));
        }
        parsed.secrets = secrets::objects(&parsed.all(&['@']))?;
        if parsed.has('I') {
            secrets::image_options(&mut parsed)?;
        }
        Ok(parsed)
    }

    /// How a verb opens images.
    pub(crate) fn options(self, parsed: &Parsed) -> ImageOptions {
        let follow = self.compatible || parsed.has('E');
        ImageOptions {
            external: if follow {
                External::Follow
            } else {
                External::SameDirectory
            },
            secret: parsed.key.clone(),
            ..ImageOptions::default()
        }
    }

    /// Says that a raw disk's format was guessed, where that matters.
    pub(crate) fn warn_guess(self, image: &Image, options: &ImageOptions, name: &str) {
        if options.format.is_none() && options.write && image.backend.format_name() == "raw" {
            eprintln!(
                "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
                 Automatically detecting the format is dangerous for raw images, write operations on \
                 block 0 will be restricted.\n         Specify the 'raw' format explicitly to remove \
                 the restrictions."
            );
        }
    }
}

/// Reads a cache mode.
pub(crate) fn cache(
    parsed: &Parsed,
    option: char,
    default: CacheMode,
) -> Result<CacheMode, Failure> {
    match parsed.get(option) {
        None => Ok(default),
        Some(name) => CacheMode::parse(name)
            .map_err(|_| Failure::plain(format!("Invalid cache option: {name}"))),
    }
}

/// Opens an image as a disk without policies, except the cache mode's.
pub(crate) async fn open(name: &str, options: &ImageOptions) -> Result<(Rc<Disk>, Image), Failure> {
    let image = open_image(name, options).await?;
    let disk = as_disk(&image, options.cache);
    Ok((disk, image))
}

/// Wraps an image in a disk on which a tool may do everything.
pub(crate) fn as_disk(image: &Image, cache: CacheMode) -> Rc<Disk> {
    let options = DiskOptions {
        cache,
        discard: true,
        ..DiskOptions::default()
    };
    Rc::new(Disk::new(image.backend.clone(), options))
}
