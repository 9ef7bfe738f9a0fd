//! Kernels that have been decompressed once, kept in a folder of the user's.
//!
//! A kernel is filed under the BLAKE3 digest of its compressed payload, as `DIGEST.kernel`, beside a small `DIGEST.stamp`. The
//! stamp holds the digest of the decompressed bytes, and which file they were found right in: device, inode, size and
//! time of its last change. While these are the same nobody has written to the file since, and it is used as it is, mapped
//! and read only where the guest touches it. When they differ the bytes are digested again, and a file that
//! is not right is thrown away. Files appear whole or not at all, belong to the user and are nobody else's to read or write.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};

/// Most kernels that are kept.
const MAX_KERNELS: usize = 8;
/// Most bytes of kernels that are kept.
const MAX_BYTES: u64 = 1 << 30;
/// First word of a stamp; the number is that of its layout.
const STAMP: &str = "corten-kernel-1";
/// Longest stamp in bytes.
const MAX_STAMP: u64 = 512;

/// The folder.
#[derive(Debug, Clone)]
pub struct KernelCache {
    folder: PathBuf,
}

/// A digest of bytes.
pub(super) type Digest = blake3::Hash;

/// Which file it is and that nobody has changed it since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Identity {
    fn of(file: &File) -> std::io::Result<Self> {
        let data = file.metadata()?;
        Ok(Self {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            changed: (data.ctime(), data.ctime_nsec()),
        })
    }
}

fn write_stamp(identity: &Identity, content: &Digest) -> String {
    let Identity {
        device,
        inode,
        size,
        changed: (seconds, nanoseconds),
    } = identity;
    format!("{STAMP} {device} {inode} {size} {seconds} {nanoseconds} {content}\n")
}

fn read_stamp(text: &str) -> Option<(Identity, Digest)> {
    let mut words = text.strip_suffix('\n')?.split(' ');
    if words.next()? != STAMP {
        return None;
    }
    let mut number = || words.next()?.parse::<i128>().ok();
    let identity = Identity {
        device: number()?.try_into().ok()?,
        inode: number()?.try_into().ok()?,
        size: number()?.try_into().ok()?,
        changed: (number()?.try_into().ok()?, number()?.try_into().ok()?),
    };
    let content = Digest::from_hex(words.next()?).ok()?;
    words.next().is_none().then_some((identity, content))
}

/// Digests `length` bytes of a file from `offset`, without keeping them.
pub(super) fn digest(file: &File, mut offset: u64, length: u64) -> std::io::Result<Digest> {
    // Small enough for the nearest caches.
    let mut piece = vec![0; 256 << 10];
    let mut hasher = blake3::Hasher::new();
    let end = offset.saturating_add(length);
    while offset < end {
        let piece = &mut piece[..(end - offset).min(256 << 10) as usize];
        file.read_exact_at(piece, offset)?;
        hasher.update(piece);
        offset += piece.len() as u64;
    }
    Ok(hasher.finalize())
}

/// Opens a file of ours that nobody else can write to.
fn open_ours(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let data = file.metadata()?;
    let ours = data.uid() == rustix::process::geteuid().as_raw();
    if data.is_file() && ours && data.mode() & 0o077 == 0 {
        Ok(file)
    } else {
        Err(std::io::ErrorKind::PermissionDenied.into())
    }
}

impl KernelCache {
    /// A cache in `folder`, which is made when the first kernel is kept.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    fn path(&self, payload: &Digest, kind: &str) -> PathBuf {
        self.folder.join(format!("{}.{kind}", payload.to_hex()))
    }

    /// The decompressed kernel whose payload has this digest; `None` when it is not there or not right.
    pub(super) fn find(&self, payload: &Digest) -> Option<File> {
        let (kernel, stamp) = (self.path(payload, "kernel"), self.path(payload, "stamp"));
        let file = open_ours(&kernel).ok()?;
        let found = self.checked(&file, &stamp, payload);
        if found.is_none() {
            let _ = std::fs::remove_file(stamp);
            let _ = std::fs::remove_file(kernel);
        }
        found.map(|()| file)
    }

    fn checked(&self, file: &File, stamp: &Path, payload: &Digest) -> Option<()> {
        let stamp = open_ours(stamp).ok()?;
        let mut text = String::new();
        (&stamp).take(MAX_STAMP).read_to_string(&mut text).ok()?;
        let (seen, content) = read_stamp(&text)?;
        let identity = Identity::of(file).ok()?;
        if identity == seen {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW,
            };
            let used = Timestamps {
                last_access: now,
                last_modification: now,
            };
            // Only the order in which kernels are given up depends on it.
            let _ = rustix::fs::futimens(&stamp, &used);
            return Some(());
        }
        // Copied from elsewhere, or changed: only its bytes can tell.
        if identity.size != seen.size || digest(file, 0, identity.size).ok()? != content {
            return None;
        }
        let text = write_stamp(&identity, &content);
        self.put(&self.path(payload, "stamp"), text.as_bytes())
            .ok()?;
        Some(())
    }

    /// Keeps a decompressed kernel.
    ///
    /// # Errors
    /// When the folder can't be written to, or is not ours alone to write to. Nothing is left behind then.
    pub(super) fn keep(&self, payload: &Digest, kernel: &[u8]) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)?;
        let folder = std::fs::metadata(&self.folder)?;
        let ours = folder.uid() == rustix::process::geteuid().as_raw();
        if !ours || folder.mode() & 0o022 != 0 {
            return Err(std::io::ErrorKind::PermissionDenied.into());
        }
        let file = self.put(&self.path(payload, "kernel"), kernel)?;
        let stamp = write_stamp(&Identity::of(&file)?, &blake3::hash(kernel));
        self.put(&self.path(payload, "stamp"), stamp.as_bytes())?;
        self.prune()
    }

    /// Puts a file in place of what may be there; it appears with all of its bytes on the disk.
    fn put(&self, path: &Path, bytes: &[u8]) -> std::io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(rustix::fs::open(&self.folder, flags, mode)?);
        file.write_all(bytes)?;
        file.sync_all()?;
        let _ = std::fs::remove_file(path);
        let unnamed = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let cwd = rustix::fs::CWD;
        rustix::fs::linkat(cwd, unnamed, cwd, path, AtFlags::SYMLINK_FOLLOW)?;
        Ok(file)
    }

    /// Gives up the kernels that have been used least recently, beyond what is kept.
    fn prune(&self) -> std::io::Result<()> {
        let mut kernels = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "kernel") {
                let used =
                    std::fs::metadata(path.with_extension("stamp")).and_then(|m| m.modified());
                kernels.push((used.ok(), std::fs::metadata(&path)?.len(), path));
            }
        }
        kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.0));
        let mut bytes = 0;
        for (n, (_, size, path)) in kernels.iter().enumerate() {
            bytes += size;
            if n >= MAX_KERNELS || (bytes > MAX_BYTES && n > 0) {
                let _ = std::fs::remove_file(path.with_extension("stamp"));
                let _ = std::fs::remove_file(path);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn content(file: Option<File>) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        file?.read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }

    #[test]
    fn only_what_is_right_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(dir.path().join("a/b"));
        let (key, other) = (blake3::hash(b"packed"), blake3::hash(b"other"));
        let kernel = vec![7; 10_000];
        assert!(cache.find(&key).is_none());
        cache.keep(&key, &kernel).unwrap();
        assert_eq!(content(cache.find(&key)), Some(kernel.clone()));
        assert!(cache.find(&other).is_none());
        let path = cache.path(&key, "kernel");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);

        // A copy with other times and another inode is digested, and found right.
        let copy = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, copy).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert_eq!(content(cache.find(&key)), Some(kernel.clone()));

        // A byte changed in place, with the time of the last write set back.
        let written = std::fs::metadata(&path).unwrap().modified().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[8], 5_000).unwrap();
        file.set_modified(written).unwrap();
        assert!(cache.find(&key).is_none());
        assert!(!path.exists(), "what is broken is thrown away");

        cache.keep(&key, &kernel).unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(9_999)
            .unwrap();
        assert!(cache.find(&key).is_none());

        cache.keep(&key, &kernel).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o604)).unwrap();
        assert!(cache.find(&key).is_none(), "others could read it");

        cache.keep(&key, &kernel).unwrap();
        std::fs::write(cache.path(&key, "stamp"), "corten-kernel-1 1 2\n").unwrap();
        assert!(cache.find(&key).is_none());
        std::fs::set_permissions(&cache.folder, PermissionsExt::from_mode(0o777)).unwrap();
        assert!(
            cache.keep(&key, &kernel).is_err(),
            "others could write to the folder"
        );
    }

    #[test]
    fn the_folder_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(dir.path().to_owned());
        let keys: Vec<Digest> = (0..12u8).map(|n| blake3::hash(&[n])).collect();
        cache.keep(&keys[0], b"the first").unwrap();
        for key in &keys[1..] {
            std::thread::sleep(std::time::Duration::from_millis(2));
            cache
                .find(&keys[0])
                .expect("the first is used again and again");
            std::thread::sleep(std::time::Duration::from_millis(2));
            cache.keep(key, b"another").unwrap();
        }
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2 * MAX_KERNELS);
        assert!(cache.find(&keys[0]).is_some() && cache.find(&keys[11]).is_some());
        assert!(cache.find(&keys[1]).is_none());
    }
}
