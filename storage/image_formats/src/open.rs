//! Opening images by name, with everything below them.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::{
    BlockBackend, BlockError, BlockFuture, CacheMode, DetectZeroes, Disk, DiskOptions, ErrorKind,
    FileOptions, HostFile, ImplicitFile, LockMode, Medium, OpenGate, RawBackend, Result,
};

use nbd::NbdName;
use nbd::client::{NbdDisk, NbdMedium};

use crate::details::ImageFormat;
use crate::luks::{Luks, Secret};
use crate::probe::{probe, probe_bytes};
use crate::qcow2::{self, CreateOptions, Qcow2};
use crate::vdi::Vdi;
use crate::vhdx::Vhdx;
use crate::vmdk::Vmdk;
use crate::vpc::Vpc;
use crate::{bochs, cloop, dmg, parallels, qed};

/// A chain of backing files longer than this is taken for a circle.
const MAX_CHAIN: u32 = 200;

/// Which files an image may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum External {
    /// Only files in the directory of the image that names them, or below.
    #[default]
    SameDirectory,
    /// Any file.
    Follow,
}

impl External {
    /// Checks that the image `base` may name the file `name`; returns the name to open.
    ///
    /// # Errors
    ///
    /// `Refused`, naming both files.
    pub fn admit(self, base: &str, name: &str, why: &ImplicitFile) -> Result<String> {
        let resolved = resolve_name(base, name);
        if self == Self::Follow {
            return Ok(resolved);
        }
        let directory = |path: &Path| {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
            std::fs::canonicalize(parent.unwrap_or(Path::new(".")))
        };
        let target = local_path(&resolved)?;
        let inside = match (
            directory(&local_path(base)?),
            std::fs::canonicalize(&target),
        ) {
            (Ok(base), Ok(target)) => target.starts_with(base),
            // What is not there is reported as such when it is opened.
            (Ok(base), Err(_)) => directory(&target).is_ok_and(|d| d.starts_with(base)),
            (Err(_), _) => false,
        };
        if inside {
            return Ok(resolved);
        }
        let what = why.describe();
        Err(BlockError::new(
            ErrorKind::Refused,
            format!(
                "'{base}' asks for the {what} '{name}' outside its directory (--allow-external)"
            ),
        ))
    }
}

/// Where an image's files come from for a process that can't open them itself.
pub trait Files {
    /// The file that the image `base` names. Whoever gives it decides whether the image may have it.
    ///
    /// # Errors
    ///
    /// One line that names the file.
    fn file(&self, base: &str, name: &str, why: &ImplicitFile) -> Result<Rc<dyn Medium>>;
}

/// How an image is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageOptions {
    /// The format; `None` guesses from the first bytes, and then keeps a raw disk's first sector from
    /// becoming another format's.
    pub format: Option<String>,
    /// Open for writing.
    pub write: bool,
    /// When written data reaches stable storage.
    pub cache: CacheMode,
    /// Pass discards on to the file.
    pub discard: bool,
    /// What to do with written zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Lock images against use by others; without it, they may change under us.
    pub lock: bool,
    /// Which files the image may name.
    pub external: External,
    /// Open backing files; without them, what they would say reads as zeroes.
    pub backing: bool,
    /// Keep writes in a temporary file that is gone at the end.
    pub snapshot: bool,
    /// Bytes of memory for the mapping tables of each qcow2 image.
    pub l2_cache: u64,
    /// Open damaged qcow2 images too, for checking, and encrypted ones without their password.
    pub for_check: bool,
    /// The password of an encrypted image.
    pub secret: Option<Secret>,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            format: None,
            write: false,
            cache: CacheMode::Writeback,
            discard: false,
            detect_zeroes: DetectZeroes::Off,
            lock: true,
            external: External::SameDirectory,
            backing: true,
            snapshot: false,
            l2_cache: qcow2::OpenOptions::default().l2_cache,
            for_check: false,
            secret: None,
        }
    }
}

/// An open image: the seam that everything uses, and the format's own type for what only it can do.
#[derive(Clone)]
pub struct Image {
    /// The disk.
    pub backend: Rc<dyn BlockBackend>,
    /// The same, if it is a qcow2 image.
    pub qcow2: Option<Rc<Qcow2>>,
    /// What only tools ask, if it is neither qcow2 nor raw.
    pub format: Option<Rc<dyn ImageFormat>>,
    /// The file that was opened.
    pub medium: Rc<dyn Medium>,
}

impl Image {
    /// An image of a format with nothing but the common sides.
    fn of<F: BlockBackend + ImageFormat + 'static>(image: Rc<F>, medium: Rc<dyn Medium>) -> Self {
        Self {
            backend: image.clone(),
            qcow2: None,
            format: Some(image),
            medium,
        }
    }
}

/// Opens image files and what they name.
#[derive(Clone, Default)]
pub struct Opener {
    options: ImageOptions,
    depth: u32,
    /// Device and inode of the files whose backing files are being opened.
    above: Vec<(u64, u64)>,
    /// Where data and extent files come from, if they are not opened here.
    files: Option<Rc<dyn Files>>,
}

/// Opens an image and everything below it, on this thread's executor.
///
/// # Errors
///
/// One line that names the file and what is wrong with it.
pub async fn open_image(name: &str, options: &ImageOptions) -> Result<Image> {
    if options.snapshot {
        return open_with_overlay(name, options).await;
    }
    Opener::new(options.clone()).open(name).await
}

/// Opens an image as a disk with the policies of `options`, for a machine.
///
/// # Errors
///
/// As [`open_image`].
pub async fn open_disk(name: &str, options: &ImageOptions) -> Result<Disk> {
    let image = open_image(name, options).await?;
    let disk = DiskOptions {
        cache: options.cache,
        discard: options.discard || options.snapshot,
        detect_zeroes: options.detect_zeroes,
        read_only: !options.write && !options.snapshot,
        ..DiskOptions::default()
    };
    Ok(Disk::new(image.backend, disk))
}

/// A temporary qcow2 image on top of the named one.
async fn open_with_overlay(name: &str, options: &ImageOptions) -> Result<Image> {
    let below = ImageOptions {
        snapshot: false,
        write: false,
        ..options.clone()
    };
    let base = Opener::new(below).open(name).await?;
    let directory = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let file = HostFile::temporary(&directory)
        .or_else(|e| HostFile::temporary(Path::new("/tmp")).map_err(|_| e))?;
    let medium: Rc<dyn Medium> = Rc::new(file);
    let create = CreateOptions {
        size: base.backend.limits().size,
        ..CreateOptions::default()
    };
    qcow2::create(&medium, &block::Refusing, &create).await?;
    let open = qcow2::OpenOptions {
        l2_cache: options.l2_cache,
        ..qcow2::OpenOptions::default()
    };
    let overlay = Rc::new(Qcow2::open(medium.clone(), &block::Refusing, &open).await?);
    overlay.set_backing(Some(base.backend));
    Ok(Image {
        backend: overlay.clone(),
        qcow2: Some(overlay),
        format: None,
        medium,
    })
}

/// Makes an empty file for a new image; what was there is gone.
///
/// # Errors
///
/// One line that names the file.
pub fn create_file(name: &str, cache: CacheMode) -> Result<Rc<dyn Medium>> {
    let options = FileOptions {
        write: true,
        create: true,
        direct: cache.is_direct(),
        lock: LockMode::Write,
        ignore_flush: cache == CacheMode::Unsafe,
        ..FileOptions::default()
    };
    Ok(Rc::new(HostFile::open(&local_path(name)?, &options)?))
}

/// The path that a file name means: `file:` in front is dropped, other protocols are refused.
///
/// # Errors
///
/// `Unsupported`, naming the protocol.
pub fn local_path(name: &str) -> Result<PathBuf> {
    if let Some(path) = name.strip_prefix("file:") {
        return Ok(path
            .strip_prefix("//")
            .filter(|p| p.starts_with('/'))
            .unwrap_or(path)
            .into());
    }
    let protocol = name.split_once(':').map(|(protocol, _)| protocol);
    let is_protocol = |p: &str| {
        !p.is_empty()
            && p.chars()
                .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    };
    match protocol.filter(|p| is_protocol(p)) {
        Some(protocol) => {
            let message = format!("'{name}': unknown protocol '{protocol}'");
            Err(BlockError::unsupported(message))
        }
        None => Ok(name.into()),
    }
}

/// The name that `name`, found in the image `base`, has from where we are.
pub fn resolve_name(base: &str, name: &str) -> String {
    let has_protocol = name.split_once(':').is_some_and(|(p, _)| !p.contains('/'));
    if name.starts_with('/') || has_protocol {
        return name.to_owned();
    }
    let base = base.strip_prefix("file:").unwrap_or(base);
    match base.rfind('/') {
        Some(at) => format!("{}{name}", &base[..=at]),
        None => name.to_owned(),
    }
}

/// The format of a file by its first bytes, or, where its name ends with `.dmg`, by its last: only then, or a guest
/// could turn any raw disk into an image.
async fn guess(medium: &dyn Medium) -> Result<&'static str> {
    let found = probe(medium).await?;
    let named = medium.name().to_ascii_lowercase().ends_with(".dmg");
    if found == "raw" && named && dmg::is_one(medium).await? {
        return Ok("dmg");
    }
    Ok(found)
}

impl Opener {
    /// A gate that opens what images name under the given policies.
    pub fn new(options: ImageOptions) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// The same for a process that can't open files: data and extent files come from `files`.
    pub fn with_files(options: ImageOptions, files: Rc<dyn Files>) -> Self {
        Self {
            options,
            files: Some(files),
            ..Self::default()
        }
    }

    fn file_options(&self) -> FileOptions {
        let lock = match (self.options.lock, self.options.write) {
            (false, _) => LockMode::None,
            (true, false) => LockMode::Read,
            (true, true) => LockMode::Write,
        };
        FileOptions {
            write: self.options.write,
            direct: self.options.cache.is_direct(),
            lock,
            ignore_flush: self.options.cache == CacheMode::Unsafe,
            ..FileOptions::default()
        }
    }

    async fn open(&self, name: &str) -> Result<Image> {
        if NbdName::is_nbd(name) {
            return self.open_nbd(name).await;
        }
        let path = local_path(name)?;
        let medium: Rc<dyn Medium> = Rc::new(HostFile::open(&path, &self.file_options())?);
        self.open_format(medium).await
    }

    /// Opens an export of an NBD server, and the image in it.
    async fn open_nbd(&self, name: &str) -> Result<Image> {
        let disk = NbdDisk::connect(&NbdName::parse(name)?, self.options.write).await?;
        let medium: Rc<dyn Medium> = Rc::new(NbdMedium(disk.clone()));
        let format = match &self.options.format {
            Some(format) => format.as_str(),
            None => probe(&*medium).await?,
        };
        if format != "raw" {
            return self.open_format(medium).await;
        }
        // The server knows where the data is; a medium cannot ask it.
        Ok(Image {
            backend: disk,
            qcow2: None,
            format: None,
            medium,
        })
    }

    /// Opens what is in `medium`, by the format asked for or guessed.
    ///
    /// # Errors
    ///
    /// `Unsupported` for formats that are not known or not supported.
    pub async fn open_format(&self, medium: Rc<dyn Medium>) -> Result<Image> {
        let guessed = self.options.format.is_none();
        let format = match &self.options.format {
            Some(format) => format.as_str(),
            None => guess(&*medium).await?,
        };
        match format {
            "raw" => {
                let raw = RawBackend::open(medium.clone()).await?;
                let backend: Rc<dyn BlockBackend> = if guessed {
                    Rc::new(raw.guarded(|bytes| probe_bytes(bytes) == "raw"))
                } else {
                    Rc::new(raw)
                };
                Ok(Image {
                    backend,
                    qcow2: None,
                    format: None,
                    medium,
                })
            }
            "qcow2" => {
                let options = qcow2::OpenOptions {
                    l2_cache: self.options.l2_cache,
                    discard: true,
                    backing: self.options.backing,
                    for_check: self.options.for_check,
                    secret: self.options.secret.clone(),
                    ..qcow2::OpenOptions::default()
                };
                let image = Rc::new(Qcow2::open(medium.clone(), self, &options).await?);
                Ok(Image {
                    backend: image.clone(),
                    qcow2: Some(image),
                    format: None,
                    medium,
                })
            }
            "vpc" => {
                let image = Vpc::open(medium.clone(), self, self.options.backing).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "vdi" => {
                let image = Vdi::open(medium.clone()).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "vhdx" => {
                let image = Vhdx::open(medium.clone(), self, self.options.backing).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "vmdk" => {
                let image = Vmdk::open(medium.clone(), self, self.options.backing).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "qed" => {
                let image = qed::open(medium.clone(), self, self.options.backing).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "parallels" => {
                let image = parallels::open(medium.clone()).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "bochs" => {
                let image = bochs::open(medium.clone()).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "cloop" => {
                let image = cloop::open(medium.clone()).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "dmg" => {
                let image = dmg::open(medium.clone()).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            "luks" => {
                if self.options.secret.is_none() && !self.options.for_check {
                    return Err(BlockError::invalid_argument(format!(
                        "'{}': Parameter 'key-secret' is required for cipher",
                        medium.name()
                    )));
                }
                let secret = self.options.secret.as_ref();
                let image = Luks::open(medium.clone(), secret).await?;
                Ok(Image::of(Rc::new(image), medium))
            }
            _ => Err(BlockError::invalid_argument(format!(
                "Unknown driver '{format}'"
            ))),
        }
    }

    fn below(&self, format: Option<String>, write: bool) -> Result<Self> {
        if self.depth >= MAX_CHAIN {
            let message = "the chain of backing files is too long, or a circle";
            return Err(BlockError::invalid_image(message));
        }
        let options = ImageOptions {
            format,
            write,
            for_check: false,
            // Each image has a password of its own.
            secret: None,
            ..self.options.clone()
        };
        Ok(Self {
            options,
            depth: self.depth + 1,
            above: self.above.clone(),
            files: self.files.clone(),
        })
    }

    /// As [`Self::below`], for the backing file `name` of `base`. A file below itself is found at once.
    fn below_file(&self, format: Option<String>, base: &str, name: &str) -> Result<Self> {
        let mut below = self.below(format, false)?;
        below.above.extend(identity(base));
        if identity(name).is_some_and(|file| below.above.contains(&file)) {
            let message = "the chain of backing files is a circle";
            return Err(BlockError::invalid_image(message));
        }
        Ok(below)
    }
}

/// Device and inode of a local file.
pub(crate) fn identity(name: &str) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(local_path(name).ok()?).ok()?;
    Some((file.dev(), file.ino()))
}

impl OpenGate for Opener {
    fn open_backend<'a>(
        &'a self,
        base: &'a str,
        name: &'a str,
        why: ImplicitFile,
    ) -> BlockFuture<'a, Rc<dyn BlockBackend>> {
        Box::pin(async move {
            let name = self.options.external.admit(base, name, &why)?;
            let format = match &why {
                ImplicitFile::Backing { format } => format.clone(),
                _ => None,
            };
            let opened = self.below_file(format, base, &name)?.open(&name).await;
            let image = opened.map_err(|e| e.context(format!("{} of '{base}'", why.describe())))?;
            Ok(image.backend)
        })
    }

    fn open_medium<'a>(
        &'a self,
        base: &'a str,
        name: &'a str,
        why: ImplicitFile,
        writable: bool,
    ) -> BlockFuture<'a, Rc<dyn Medium>> {
        Box::pin(async move {
            if let Some(files) = &self.files {
                return files.file(base, name, &why);
            }
            let name = self.options.external.admit(base, name, &why)?;
            let options = self.below(None, writable)?.file_options();
            let medium: Rc<dyn Medium> = Rc::new(HostFile::open(&local_path(&name)?, &options)?);
            Ok(medium)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_the_image_that_has_them() {
        assert_eq!(resolve_name("/a/b.qcow2", "c.img"), "/a/c.img");
        assert_eq!(resolve_name("b.qcow2", "c.img"), "c.img");
        assert_eq!(resolve_name("x/b.qcow2", "../c.img"), "x/../c.img");
        assert_eq!(resolve_name("/a/b", "/c"), "/c");
        assert_eq!(resolve_name("/a/b", "nbd:x"), "nbd:x");
        assert_eq!(local_path("file:///x/y").unwrap(), Path::new("/x/y"));
        assert_eq!(
            local_path("a:b").unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        assert_eq!(local_path("./a:b").unwrap(), Path::new("./a:b"));
    }
}
