//! Numbers that make things unique.

/// Random bytes from the system.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut done = 0;
    while done < N {
        match rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            // Every kernel that runs this has the call; a clock is better than nothing.
            Err(_) => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let now = now.map_or(0, |d| d.as_nanos()).to_le_bytes();
                for (n, byte) in bytes[done..].iter_mut().enumerate() {
                    *byte = now[n % now.len()];
                }
                break;
            }
        }
    }
    bytes
}

/// A random UUID of version 4, with its fields in the byte order of Microsoft's GUIDs if `guid`.
pub(crate) fn random_uuid(guid: bool) -> [u8; 16] {
    let mut bytes = random_bytes::<16>();
    let version = if guid { 7 } else { 6 };
    bytes[version] = bytes[version] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}
