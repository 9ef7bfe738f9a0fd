//! Disk-image formats: raw, qcow2.
