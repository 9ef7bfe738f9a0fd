//! Fuzz targets and what they share.

pub mod images;
pub mod nbd_peers;
