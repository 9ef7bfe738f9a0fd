//! Making new volumes.

use std::rc::Rc;
use std::time::{Duration, Instant};

use block::executor::offload;
use block::{BlockError, IoBuf, Medium, Result};
use rustix::rand::{GetRandomFlags, getrandom};

use super::cipher::{CipherSpec, Hash, IvGenerator, Mode};
use super::header::{
    Header, KEY_ALIGNMENT, MAX_ITERATIONS, SECTOR, SLOTS, STRIPES, Slot, material_size,
};
use super::{Secret, keys};
use crate::identity::random_uuid;

/// Fewer iterations than this are not done, however little time there is.
const MIN_ITERATIONS: u32 = 1000;

/// What a new volume is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The disk's size in bytes.
    pub size: u64,
    /// Bits of the AES key: 128, 192 or 256.
    pub key_bits: u32,
    /// How blocks are chained.
    pub mode: Mode,
    /// How vectors are made.
    pub iv: IvGenerator,
    /// The hash of keys.
    pub hash: Hash,
    /// How long unlocking takes on this machine, in milliseconds.
    pub iteration_time: u64,
    /// The id of the secret that is the password, as people name it.
    pub key_secret: Option<String>,
    /// The password.
    pub secret: Option<Secret>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            key_bits: 256,
            mode: Mode::Xts,
            iv: IvGenerator::Plain64,
            hash: Hash::Sha256,
            iteration_time: 2000,
            key_secret: None,
            secret: None,
        }
    }
}

fn spec(options: &CreateOptions) -> Result<CipherSpec> {
    let keys = if options.mode == Mode::Xts { 2 } else { 1 };
    let bytes = options.key_bits as usize / 8 * keys;
    CipherSpec::new(bytes, options.mode, options.iv)
        .map_err(|e| BlockError::invalid_argument(e.message()))
}

/// Sectors of key material of each slot.
fn slot_sectors(spec: &CipherSpec) -> u64 {
    (material_size(spec.key_bytes, STRIPES) / SECTOR).next_multiple_of(KEY_ALIGNMENT)
}

/// Where the data begins, in sectors.
fn payload(spec: &CipherSpec) -> u64 {
    KEY_ALIGNMENT + SLOTS as u64 * slot_sectors(spec)
}

/// Bytes of the header with its places for passwords.
///
/// # Errors
///
/// `InvalidArgument` if the options do not go together.
pub(crate) fn header_length(options: &CreateOptions) -> Result<u64> {
    Ok(payload(&spec(options)?) * SECTOR)
}

/// The bytes of the file, which has one size whatever is stored.
///
/// # Errors
///
/// `InvalidArgument` if the options do not go together.
pub fn measure(options: &CreateOptions) -> Result<(u64, u64)> {
    let size = header_length(options)?.checked_add(options.size);
    let size = size.filter(|s| i64::try_from(*s).is_ok());
    let size =
        size.ok_or_else(|| BlockError::invalid_argument("the size is larger than any file"))?;
    Ok((size, size))
}

/// Random bytes that nobody can guess.
pub(super) fn random(length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(BlockError::io("no random numbers for a key", e.into())),
        }
    }
    Ok(bytes)
}

pub(super) fn random_salt() -> Result<[u8; 32]> {
    let bytes = random(32)?;
    let mut salt = [0; 32];
    salt.copy_from_slice(&bytes);
    Ok(salt)
}

/// How many iterations take so many milliseconds.
pub(super) fn iterations(hash: Hash, key_bytes: usize, milliseconds: u64) -> u32 {
    let mut out = vec![0; key_bytes];
    let mut count: u32 = 1 << 10;
    loop {
        let begin = Instant::now();
        hash.derive(b"password", b"salt", count, &mut out);
        let taken = begin.elapsed();
        if taken >= Duration::from_millis(50) || count >= MAX_ITERATIONS {
            let wanted = u128::from(count) * u128::from(milliseconds) * 1_000_000;
            let found = wanted / taken.as_nanos().max(1);
            let limit = u128::from(MAX_ITERATIONS);
            return found.clamp(u128::from(MIN_ITERATIONS), limit) as u32;
        }
        count *= 2;
    }
}

fn new_header(spec: CipherSpec, options: &CreateOptions) -> Result<Header> {
    let sectors = slot_sectors(&spec);
    let slot = |n: usize| Slot {
        active: false,
        iterations: 0,
        salt: [0; 32],
        key_offset: (KEY_ALIGNMENT + n as u64 * sectors) as u32,
        stripes: STRIPES,
    };
    Ok(Header {
        cipher: spec,
        hash: options.hash,
        payload: payload(&spec) as u32,
        digest: [0; 20],
        digest_salt: random_salt()?,
        digest_iterations: MIN_ITERATIONS,
        uuid: uuid_text(random_uuid(false)),
        slots: (0..SLOTS).map(slot).collect(),
    })
}

fn uuid_text(bytes: [u8; 16]) -> String {
    let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let part = |range: std::ops::Range<usize>| hex[range].concat();
    let parts = [
        part(0..4),
        part(4..6),
        part(6..8),
        part(8..10),
        part(10..16),
    ];
    parts.join("-")
}

/// A header whose first slot has the password, and that slot's key material.
fn first_slot(
    mut header: Header,
    time: u64,
    password: &[u8],
    key: &[u8],
    stripes: Vec<u8>,
) -> Option<(Header, Vec<u8>)> {
    let count = iterations(header.hash, key.len(), time);
    header.digest_iterations = (count / 8).max(MIN_ITERATIONS);
    header.digest = keys::digest(&header, key);
    header.slots[0].active = true;
    header.slots[0].iterations = count;
    let secret = Secret::new(password);
    let material = keys::lock(&header, &header.slots[0], key, &secret, stripes)?;
    Some((header, material))
}

/// A header that has yet to be written.
pub(crate) struct NewKeys {
    header: Vec<u8>,
    /// The first slot's place behind the header's begin.
    place: u64,
    material: Vec<u8>,
}

impl NewKeys {
    /// Writes it at `base`; the header comes last.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub(crate) async fn write(&self, medium: &dyn Medium, base: u64) -> Result<()> {
        let material = IoBuf::from_slice(&self.material);
        medium.write(base + self.place, material).await?;
        medium.flush().await?;
        medium.write(base, IoBuf::from_slice(&self.header)).await?;
        medium.flush().await
    }
}

/// Makes a key, and a header whose first slot has the password.
///
/// # Errors
///
/// `InvalidArgument` for options that do not go together or without a password.
pub(crate) async fn new_keys(options: &CreateOptions) -> Result<NewKeys> {
    let Some(secret) = &options.secret else {
        let message = "Parameter 'key-secret' is required for cipher";
        return Err(BlockError::invalid_argument(message));
    };
    let spec = spec(options)?;
    let mut header = new_header(spec, options)?;
    header.slots[0].salt = random_salt()?;
    let key = random(spec.key_bytes)?;
    let stripes = random(spec.key_bytes * STRIPES as usize)?;
    let (password, time) = (secret.bytes().to_vec(), options.iteration_time);
    let made = offload(move || first_slot(header, time, &password, &key, stripes));
    let made = made.await;
    let (header, material) =
        made.ok_or_else(|| BlockError::invalid_argument("the key has an impossible size"))?;
    Ok(NewKeys {
        place: u64::from(header.slots[0].key_offset) * SECTOR,
        header: header.encode(),
        material,
    })
}

/// Makes a volume in `medium`, which is emptied. What its disk reads as afterwards is not defined.
///
/// # Errors
///
/// `InvalidArgument` for options that do not go together or without a password, or what the host reports.
pub async fn create(medium: &Rc<dyn Medium>, options: &CreateOptions) -> Result<()> {
    let (length, _) = measure(options)?;
    let keys = new_keys(options).await?;
    medium.set_len(0).await?;
    medium.set_len(length).await?;
    keys.write(&**medium, 0).await
}
