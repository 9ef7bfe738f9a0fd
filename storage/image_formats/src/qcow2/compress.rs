//! Compressing and decompressing clusters.

use super::header::CompressionType;
use crate::deflate::Deflater;

/// Decompresses a cluster of `size` bytes; trailing bytes in `data` do not count. `None` if the data is
/// broken or too short.
pub(crate) fn decompress(kind: CompressionType, data: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; size];
    match kind {
        CompressionType::Zlib => {
            let mut inflater = flate2::Decompress::new(false);
            // A stream that goes on past the cluster is accepted, as by other readers.
            inflater
                .decompress(data, &mut out, flate2::FlushDecompress::Finish)
                .ok()?;
            (inflater.total_out() == size as u64).then_some(out)
        }
        CompressionType::Zstd => {
            // The frame's end is not stored, so the data has padding behind it.
            let mut decoder = zstd::stream::raw::Decoder::new().ok()?;
            let mut input = zstd::stream::raw::InBuffer::around(data);
            let mut output = zstd::stream::raw::OutBuffer::around(&mut out[..]);
            while output.pos() < size {
                let before = (input.pos(), output.pos());
                zstd::stream::raw::Operation::run(&mut decoder, &mut input, &mut output).ok()?;
                if before == (input.pos(), output.pos()) {
                    return None;
                }
            }
            Some(out)
        }
    }
}

/// Compresses whole clusters, keeping its tables from one to the next. One for each thread.
pub struct ClusterCompressor {
    kind: CompressionType,
    deflater: Deflater,
}

impl ClusterCompressor {
    /// A compressor of this kind.
    pub fn new(kind: CompressionType) -> Self {
        Self {
            kind,
            deflater: Deflater::default(),
        }
    }

    /// The compressed cluster, or `None` if that would not be shorter.
    pub fn compress(&mut self, cluster: &[u8]) -> Option<Vec<u8>> {
        match self.kind {
            CompressionType::Zlib => self.deflater.compress(cluster, cluster.len()),
            CompressionType::Zstd => {
                let bytes = zstd::bulk::compress(cluster, 3).ok()?;
                (bytes.len() < cluster.len()).then_some(bytes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_round_trip_with_padding_behind() {
        let cluster: Vec<u8> = (0..65536u32).map(|n| (n / 100 * 7) as u8).collect();
        for kind in [CompressionType::Zlib, CompressionType::Zstd] {
            let mut bytes = ClusterCompressor::new(kind).compress(&cluster).unwrap();
            bytes.resize(bytes.len().next_multiple_of(512), 0xa5);
            assert!(decompress(kind, &bytes, 65536).unwrap() == cluster);
            assert!(decompress(kind, &bytes[..100], 65536).is_none());
            assert!(decompress(kind, &[0xff; 512], 65536).is_none());
        }
    }
}
