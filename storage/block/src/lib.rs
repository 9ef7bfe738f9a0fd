//! The block layer: the seam between disks and their storage, I/O engines, executors.
