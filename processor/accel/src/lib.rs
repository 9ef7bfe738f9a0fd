//! The seam to a processor: traits for accelerators, VMs and vCPUs.
