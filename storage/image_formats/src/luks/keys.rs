//! From a password to a volume's key and back (LUKS On-Disk Format Specification, sections 2.4 and 4).

use super::Secret;
use super::cipher::{Hash, SectorCipher};
use super::header::{Header, Slot, material_size};

/// Spreads every bit over as many bytes as a hash has.
fn diffuse(hash: Hash, block: &mut [u8]) {
    let size = hash.digest(&[]).len();
    for (n, part) in block.chunks_mut(size).enumerate() {
        let digest = hash.digest(&[&(n as u32).to_be_bytes(), part]);
        let length = part.len();
        part.copy_from_slice(&digest[..length]);
    }
}

/// What all stripes but the last come to.
fn fold(hash: Hash, stripes: &[u8], length: usize) -> Vec<u8> {
    let mut block = vec![0; length];
    for stripe in stripes.chunks_exact(length) {
        block.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
        diffuse(hash, &mut block);
    }
    block
}

/// Takes a key out of its stripes.
fn merge(hash: Hash, material: &[u8], length: usize, stripes: u32) -> Vec<u8> {
    let last = length * (stripes as usize - 1);
    let mut key = fold(hash, &material[..last], length);
    let end = &material[last..last + length];
    key.iter_mut().zip(end).for_each(|(a, b)| *a ^= b);
    key
}

/// The key that `secret` gives with this slot and its (encrypted) material; `None` if it is another slot's
/// password.
pub(crate) fn unlock(
    header: &Header,
    slot: &Slot,
    mut material: Vec<u8>,
    secret: &Secret,
) -> Option<Vec<u8>> {
    let length = header.cipher.key_bytes;
    let mut derived = vec![0; length];
    let hash = header.hash;
    hash.derive(secret.bytes(), &slot.salt, slot.iterations, &mut derived);
    SectorCipher::new(header.cipher, &derived)?.decrypt(0, &mut material);
    let key = merge(hash, &material, length, slot.stripes);
    (digest(header, &key) == header.digest).then_some(key)
}

/// The digest by which a key is known to be right.
pub(crate) fn digest(header: &Header, key: &[u8]) -> [u8; 20] {
    let mut out = [0; 20];
    let (salt, iterations) = (&header.digest_salt, header.digest_iterations);
    header.hash.derive(key, salt, iterations, &mut out);
    out
}

/// The material that stores `key` under `secret` in this slot. `random` becomes the stripes: as many bytes
/// as the material has.
pub(crate) fn lock(
    header: &Header,
    slot: &Slot,
    key: &[u8],
    secret: &Secret,
    random: Vec<u8>,
) -> Option<Vec<u8>> {
    let length = key.len();
    let mut material = random;
    material.resize(material_size(length, slot.stripes) as usize, 0);
    let last = length * (slot.stripes as usize - 1);
    let mut end = fold(header.hash, &material[..last], length);
    end.iter_mut().zip(key).for_each(|(a, b)| *a ^= b);
    material[last..last + length].copy_from_slice(&end);
    material[last + length..].fill(0);
    let mut derived = vec![0; length];
    let (salt, iterations) = (&slot.salt, slot.iterations);
    header
        .hash
        .derive(secret.bytes(), salt, iterations, &mut derived);
    SectorCipher::new(header.cipher, &derived)?.encrypt(0, &mut material);
    Some(material)
}
