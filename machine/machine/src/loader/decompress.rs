//! The compressions of a kernel's payload.

use std::io::Read;

/// Most bytes that xz and lzma may take for what they look back on. Kernels are built with up to 128 MiB.
const DICTIONARY_MAX: u64 = 1 << 28;

/// Decompresses by the format that the first bytes name. The build of the kernel puts the size behind the
/// compressed data, which every reader here passes over. What is not compressed comes back as it is.
pub(super) fn decompress(packed: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    match packed {
        [0x1f, 0x8b, ..] => read("gzip", flate2::read::GzDecoder::new(packed), limit),
        [b'B', b'Z', b'h', ..] => read("bzip2", bzip2::read::BzDecoder::new(packed), limit),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = liblzma::stream::Stream::new_stream_decoder(DICTIONARY_MAX, 0)
                .map_err(|e| format!("xz: {e}"))?;
            read(
                "xz",
                liblzma::read::XzDecoder::new_stream(packed, stream),
                limit,
            )
        }
        [0x5d, 0, 0, ..] => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(DICTIONARY_MAX)
                .map_err(|e| format!("lzma: {e}"))?;
            read(
                "lzma",
                liblzma::read::XzDecoder::new_stream(packed, stream),
                limit,
            )
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(packed)
                .map_err(|e| format!("zstd: {e}"))?;
            read("zstd", decoder.single_frame(), limit)
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4(blocks, limit),
        [0x89, b'L', b'Z', b'O', ..] => {
            Err("compressed with lzo, expected gzip, bzip2, lzma, xz, lz4 or zstd".into())
        }
        _ => Ok(packed.to_vec()),
    }
}

fn read(format: &str, reader: impl Read, limit: usize) -> Result<Vec<u8>, String> {
    let mut data = Vec::new();
    reader
        .take(limit as u64 + 1)
        .read_to_end(&mut data)
        .map_err(|e| format!("the {format} payload is broken: {e}"))?;
    if data.len() > limit {
        Err(too_large(limit))
    } else {
        Ok(data)
    }
}

fn too_large(limit: usize) -> String {
    format!(
        "the kernel is larger than {} MiB when decompressed",
        limit >> 20
    )
}

/// A block's number, its bytes, and where they are unpacked to.
type Lz4Block<'a> = (usize, (&'a &'a [u8], &'a mut [u8]));

/// LZ4's legacy frame: blocks that hold 8 MiB each, the last one less, each behind its packed size in four bytes.
/// The blocks don't depend on one another, so several threads share the work.
fn lz4(mut frame: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    const BLOCK: usize = 8 << 20;
    const MOST_THREADS: usize = 4;
    let broken = || "the lz4 payload is broken".to_owned();
    let mut blocks = Vec::new();
    // The last four bytes are not a block but the size of the whole.
    while frame.len() > 4 {
        let (size, rest) = frame.split_first_chunk::<4>().ok_or_else(broken)?;
        let size = u32::from_le_bytes(*size) as usize;
        blocks.push(rest.get(..size).ok_or_else(broken)?);
        frame = &rest[size..];
        if (blocks.len() - 1) * BLOCK > limit {
            return Err(too_large(limit));
        }
    }
    let mut data = vec![0; blocks.len() * BLOCK];
    let last = blocks.len().saturating_sub(1);
    let work: Vec<_> = blocks
        .iter()
        .zip(data.chunks_mut(BLOCK))
        .enumerate()
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = work.len().div_ceil(threads.min(MOST_THREADS)).max(1);
    let mut shares = Vec::new();
    let mut work = work.into_iter();
    while work.len() != 0 {
        shares.push(work.by_ref().take(share).collect::<Vec<_>>());
    }
    // Returns the bytes in the last block, when that is in the share.
    let unpack = |share: Vec<Lz4Block<'_>>| {
        let mut in_last = 0;
        for (n, (packed, out)) in share {
            let size = lz4_flex::block::decompress_into(packed, out).map_err(|_| broken())?;
            if n == last {
                in_last = size;
            } else if size != BLOCK {
                return Err(broken());
            }
        }
        Ok(in_last)
    };
    let results: Vec<Result<usize, String>> = std::thread::scope(|scope| {
        let first = if shares.is_empty() {
            Vec::new()
        } else {
            shares.remove(0)
        };
        let others: Vec<_> = shares
            .into_iter()
            .map(|share| scope.spawn(|| unpack(share)))
            .collect();
        let mine = unpack(first);
        let theirs = others
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(broken())));
        std::iter::once(mine).chain(theirs).collect()
    });
    let mut in_last = 0;
    for result in results {
        in_last += result?;
    }
    data.truncate(last * BLOCK + in_last);
    if data.len() > limit {
        return Err(too_large(limit));
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn kernel_like() -> Vec<u8> {
        let mut x = 1u32;
        (0..200_000u32)
            .map(|i| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if i % 3 == 0 {
                    (x >> 24) as u8
                } else {
                    (i / 64) as u8
                }
            })
            .collect()
    }

    fn pack(command: &[&str], data: &[u8]) -> Option<Vec<u8>> {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut stdin = child.stdin.take()?;
        let data = data.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&data));
        let out = child.wait_with_output().ok()?;
        writer.join().ok()?.ok()?;
        out.status.success().then_some(out.stdout)
    }

    #[test]
    fn several_lz4_blocks_come_back_in_order() {
        let data: Vec<u8> = (0..20u32 << 20).map(|n| (n >> 9 ^ n >> 18) as u8).collect();
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for block in data.chunks(8 << 20) {
            let bytes = lz4_flex::block::compress(block);
            packed.extend((bytes.len() as u32).to_le_bytes());
            packed.extend(bytes);
        }
        packed.extend((data.len() as u32).to_le_bytes());
        assert!(decompress(&packed, 64 << 20).unwrap() == data);
        assert!(decompress(&packed, 20 << 20).unwrap() == data);
        assert!(decompress(&packed, (20 << 20) - 1).is_err());
        // The first block holds less than the format says.
        let first = u32::from_le_bytes(packed[4..8].try_into().unwrap()) as usize;
        let short = lz4_flex::block::compress(&data[..100]);
        let mut wrong = packed[..4].to_vec();
        wrong.extend((short.len() as u32).to_le_bytes());
        wrong.extend(short);
        wrong.extend(&packed[8 + first..]);
        assert!(decompress(&wrong, 64 << 20).is_err());
        assert!(decompress(&packed[..4], 64 << 20).unwrap().is_empty());
    }

    /// A few bytes must not make the host reserve gigabytes.
    #[test]
    fn an_xz_payload_that_asks_for_too_much_memory_is_refused() {
        let mut packer = liblzma::write::XzEncoder::new(Vec::new(), 6);
        packer.write_all(b"some bytes").unwrap();
        let mut packed = packer.finish().unwrap();
        assert_eq!(decompress(&packed, 1000).unwrap(), b"some bytes");
        // The block's header: its length, flags, and the one filter, LZMA2, with the size of its dictionary (The .xz File
        // Format 1.2, sections 3.1 and 5.3.1).
        let end = 12 + (usize::from(packed[12]) + 1) * 4;
        assert_eq!(packed[14..16], [0x21, 1]);
        packed[16] = 40; // 4 GiB
        let mut sum = flate2::Crc::new();
        sum.update(&packed[12..end - 4]);
        packed[end - 4..end].copy_from_slice(&sum.sum().to_le_bytes());
        let why = decompress(&packed, 1000).unwrap_err();
        assert!(why.contains("xz"), "{why}");
    }

    #[test]
    fn reads_what_the_kernels_build_writes() {
        let data = kernel_like();
        let mut tried = 0;
        for command in [
            &["gzip", "-9"][..],
            &["bzip2", "-9"],
            &["xz", "--check=crc32", "--x86", "--lzma2=,dict=1MiB"],
            &["xz", "--format=lzma", "-9"],
            &["lz4", "-l", "-9", "-", "-"],
            &["zstd", "-19"],
        ] {
            let Some(mut packed) = pack(command, &data) else {
                eprintln!("skipped: no {} here", command[0]);
                continue;
            };
            if command[0] != "gzip" {
                packed.extend((data.len() as u32).to_le_bytes());
            }
            assert!(decompress(&packed, 1 << 24).unwrap() == data, "{command:?}");
            assert!(
                decompress(&packed, 1000).is_err(),
                "{command:?} past the limit"
            );
            let cut = packed.len() / 2;
            assert!(
                decompress(&packed[..cut], 1 << 24) != Ok(data.clone()),
                "{command:?} cut"
            );
            tried += 1;
        }
        assert!(tried >= 1, "gzip at least is on every machine");
    }
}
