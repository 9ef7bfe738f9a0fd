//! Fuzz targets and what they share.

pub mod images;
