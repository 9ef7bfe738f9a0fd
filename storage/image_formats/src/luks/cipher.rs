//! What a volume is encrypted with: AES in XTS or CBC mode, with the ways to make a sector's first vector.

use aes::cipher::generic_array::GenericArray;
use aes::cipher::{BlockDecrypt, BlockEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256, Block};
use block::{BlockError, Result};
use sha2::Digest;

use super::header::SECTOR;

/// A hash function of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hash {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    #[default]
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// A hash by its name.
    ///
    /// # Errors
    ///
    /// `Unsupported`, naming it.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "sha1" => Self::Sha1,
            "sha256" => Self::Sha256,
            "sha512" => Self::Sha512,
            _ => {
                return Err(BlockError::unsupported(format!(
                    "the hash '{name}' is not supported: expected sha1, sha256 or sha512"
                )));
            }
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// The digest of the parts, one after the other.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        fn run<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut hash = D::new();
            for part in parts {
                hash.update(part);
            }
            hash.finalize().to_vec()
        }
        match self {
            Self::Sha1 => run::<sha1::Sha1>(parts),
            Self::Sha256 => run::<sha2::Sha256>(parts),
            Self::Sha512 => run::<sha2::Sha512>(parts),
        }
    }

    /// PBKDF2 with HMAC of this hash (RFC 8018, section 5.2).
    pub(crate) fn derive(self, secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2::pbkdf2_hmac::<sha1::Sha1>(secret, salt, iterations, out),
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(secret, salt, iterations, out),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<sha2::Sha512>(secret, salt, iterations, out),
        }
    }
}

/// How blocks of a sector are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// XTS, with two keys.
    #[default]
    Xts,
    /// Cipher block chaining.
    Cbc,
}

/// How a sector's first vector follows from its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IvGenerator {
    /// The number in 32 bits.
    Plain,
    /// The number in 64 bits.
    #[default]
    Plain64,
    /// The number, encrypted with the hash of the key.
    Essiv(Hash),
}

/// A cipher with its mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CipherSpec {
    /// Bytes of the whole key; for XTS of both.
    pub(crate) key_bytes: usize,
    pub(crate) mode: Mode,
    pub(crate) iv: IvGenerator,
}

impl CipherSpec {
    /// A cipher as headers name it.
    ///
    /// # Errors
    ///
    /// `Unsupported`, naming what is not known.
    pub(crate) fn parse(name: &str, mode: &str, key_bytes: u32) -> Result<Self> {
        let unsupported =
            |what: String| BlockError::unsupported(format!("{what} is not supported"));
        if name != "aes" {
            return Err(unsupported(format!("the cipher '{name}'")));
        }
        let parts = mode.split_once('-');
        let (chaining, iv) = match parts {
            Some(("xts", iv)) => (Mode::Xts, iv),
            Some(("cbc", iv)) => (Mode::Cbc, iv),
            _ => return Err(unsupported(format!("the cipher mode '{mode}'"))),
        };
        let iv = match (iv, iv.strip_prefix("essiv:")) {
            ("plain", _) => IvGenerator::Plain,
            ("plain64", _) => IvGenerator::Plain64,
            (_, Some(hash)) => IvGenerator::Essiv(Hash::parse(hash)?),
            _ => return Err(unsupported(format!("the cipher mode '{mode}'"))),
        };
        Self::new(key_bytes as usize, chaining, iv)
    }

    /// A cipher whose whole key has `key_bytes` bytes.
    ///
    /// # Errors
    ///
    /// `Unsupported` if there is no such key, or no AES key has the size of the hash of ESSIV.
    pub(crate) fn new(key_bytes: usize, mode: Mode, iv: IvGenerator) -> Result<Self> {
        let known: &[usize] = match mode {
            Mode::Xts => &[32, 64],
            Mode::Cbc => &[16, 24, 32],
        };
        if !known.contains(&key_bytes) {
            return Err(BlockError::unsupported(format!(
                "keys of {key_bytes} bytes are not supported: expected one of {known:?}"
            )));
        }
        if let IvGenerator::Essiv(hash) = iv
            && hash != Hash::Sha256
        {
            return Err(BlockError::unsupported(format!(
                "essiv:{} is not supported: expected essiv:sha256",
                hash.name()
            )));
        }
        Ok(Self {
            key_bytes,
            mode,
            iv,
        })
    }

    /// Mode and vectors as headers name them.
    pub(crate) fn mode_text(&self) -> String {
        format!("{}-{}", self.mode_name(), self.iv_text())
    }

    fn iv_text(&self) -> String {
        match self.iv {
            IvGenerator::Essiv(hash) => format!("essiv:{}", hash.name()),
            _ => self.iv_name().to_owned(),
        }
    }

    /// The mode's name.
    pub(crate) fn mode_name(&self) -> &'static str {
        match self.mode {
            Mode::Xts => "xts",
            Mode::Cbc => "cbc",
        }
    }

    /// The name of the way to make vectors.
    pub(crate) fn iv_name(&self) -> &'static str {
        match self.iv {
            IvGenerator::Plain => "plain",
            IvGenerator::Plain64 => "plain64",
            IvGenerator::Essiv(_) => "essiv",
        }
    }

    /// The cipher's name with the bits of one key.
    pub(crate) fn cipher_name(&self) -> &'static str {
        match (self.mode, self.key_bytes) {
            (Mode::Xts, 32) | (Mode::Cbc, 16) => "aes-128",
            (Mode::Cbc, 24) => "aes-192",
            _ => "aes-256",
        }
    }
}

enum Aes {
    A128(Box<Aes128>),
    A192(Box<Aes192>),
    A256(Box<Aes256>),
}

impl Aes {
    /// `None` if no AES key has so many bytes.
    fn new(key: &[u8]) -> Option<Self> {
        Some(match key.len() {
            16 => Self::A128(Box::new(Aes128::new(GenericArray::from_slice(key)))),
            24 => Self::A192(Box::new(Aes192::new(GenericArray::from_slice(key)))),
            32 => Self::A256(Box::new(Aes256::new(GenericArray::from_slice(key)))),
            _ => return None,
        })
    }

    fn encrypt(&self, blocks: &mut [Block]) {
        match self {
            Self::A128(aes) => aes.encrypt_blocks(blocks),
            Self::A192(aes) => aes.encrypt_blocks(blocks),
            Self::A256(aes) => aes.encrypt_blocks(blocks),
        }
    }

    fn decrypt(&self, blocks: &mut [Block]) {
        match self {
            Self::A128(aes) => aes.decrypt_blocks(blocks),
            Self::A192(aes) => aes.decrypt_blocks(blocks),
            Self::A256(aes) => aes.decrypt_blocks(blocks),
        }
    }
}

/// Encrypts and decrypts sectors with a key.
pub(crate) struct SectorCipher {
    spec: CipherSpec,
    data: Aes,
    /// For XTS' tweak or ESSIV's vector.
    vector: Option<Aes>,
}

const BLOCKS: usize = SECTOR as usize / 16;

impl SectorCipher {
    /// `None` if the key is not as long as `spec` says.
    pub(crate) fn new(spec: CipherSpec, key: &[u8]) -> Option<Self> {
        if key.len() != spec.key_bytes {
            return None;
        }
        let (data, vector) = match (spec.mode, spec.iv) {
            (Mode::Xts, _) => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (data, Some(Aes::new(tweak)?))
            }
            (Mode::Cbc, IvGenerator::Essiv(hash)) => (key, Some(Aes::new(&hash.digest(&[key]))?)),
            (Mode::Cbc, _) => (key, None),
        };
        Some(Self {
            spec,
            data: Aes::new(data)?,
            vector,
        })
    }

    /// The first vector of a sector.
    fn first_vector(&self, sector: u64) -> Block {
        let number = match self.spec.iv {
            IvGenerator::Plain => sector & 0xffff_ffff,
            _ => sector,
        };
        let mut block = [Block::default()];
        block[0][..8].copy_from_slice(&number.to_le_bytes());
        if let Some(vector) = &self.vector {
            vector.encrypt(&mut block);
        }
        block[0]
    }

    /// Encrypts whole sectors, the first of which has the number `first`.
    pub(crate) fn encrypt(&self, first: u64, bytes: &mut [u8]) {
        self.each(first, bytes, |blocks, mut vector| match self.spec.mode {
            Mode::Xts => self.xts(blocks, vector, |blocks| self.data.encrypt(blocks)),
            Mode::Cbc => {
                for block in blocks {
                    xor(block, &vector);
                    self.data.encrypt(std::slice::from_mut(block));
                    vector = *block;
                }
            }
        });
    }

    /// Decrypts whole sectors, the first of which has the number `first`.
    pub(crate) fn decrypt(&self, first: u64, bytes: &mut [u8]) {
        self.each(first, bytes, |blocks, mut vector| match self.spec.mode {
            Mode::Xts => self.xts(blocks, vector, |blocks| self.data.decrypt(blocks)),
            Mode::Cbc => {
                let before = *blocks;
                self.data.decrypt(blocks);
                for (block, old) in blocks.iter_mut().zip(before) {
                    xor(block, &vector);
                    vector = old;
                }
            }
        });
    }

    fn each(
        &self,
        first: u64,
        bytes: &mut [u8],
        mut work: impl FnMut(&mut [Block; BLOCKS], Block),
    ) {
        let mut blocks = [Block::default(); BLOCKS];
        for (n, sector) in bytes.chunks_exact_mut(SECTOR as usize).enumerate() {
            for (block, bytes) in blocks.iter_mut().zip(sector.chunks_exact(16)) {
                block.copy_from_slice(bytes);
            }
            work(&mut blocks, self.first_vector(first + n as u64));
            for (block, bytes) in blocks.iter().zip(sector.chunks_exact_mut(16)) {
                bytes.copy_from_slice(block);
            }
        }
    }

    /// XTS (IEEE 1619, section 5.3) over a sector, which never ends within a block.
    fn xts(&self, blocks: &mut [Block; BLOCKS], first: Block, work: impl Fn(&mut [Block])) {
        let mut tweaks = [Block::default(); BLOCKS];
        let mut tweak = u128::from_le_bytes(first.into());
        for (block, stored) in blocks.iter_mut().zip(&mut tweaks) {
            *stored = tweak.to_le_bytes().into();
            xor(block, stored);
            // Times x in the field of 2^128 elements.
            let carry = if tweak >> 127 == 1 { 0x87 } else { 0 };
            tweak = tweak << 1 ^ carry;
        }
        work(blocks);
        for (block, tweak) in blocks.iter_mut().zip(&tweaks) {
            xor(block, tweak);
        }
    }
}

fn xor(block: &mut Block, with: &Block) {
    for (a, b) in block.iter_mut().zip(with) {
        *a ^= b;
    }
}
