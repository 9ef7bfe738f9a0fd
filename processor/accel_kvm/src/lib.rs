//! The KVM processor.
