//! Which processor runs the guest.

use std::sync::Arc;

use accel::{Accel, AccelError};
use accel_kvm::KvmAccel;
use accel_soft::{SoftAccel, SoftEmulator, SoftOptions};
use vm_spec::{AccelChoice, VmSpec};

/// Opens the processor that was asked for. `auto` says in one line what it took and why.
pub(crate) fn choose(spec: &VmSpec) -> Result<Box<dyn Accel>, AccelError> {
    let soft = || {
        SoftAccel::new(SoftOptions {
            translate: spec.soft.translate,
            cache_size: spec.soft.cache_size as usize,
            ..SoftOptions::default()
        })
    };
    match spec.accel {
        AccelChoice::Kvm => Ok(Box::new(with_emulator(KvmAccel::open()?))),
        AccelChoice::Soft => Ok(Box::new(soft())),
        AccelChoice::Auto => {
            let choice = accel_kvm::choose();
            eprintln!("corten: {}", choice.line());
            Ok(match choice {
                accel_kvm::Choice::Kvm(kvm, _) => Box::new(with_emulator(kvm)),
                accel_kvm::Choice::Soft(_) => Box::new(soft()),
            })
        }
    }
}

/// What KVM can't emulate, the software CPU does.
fn with_emulator(kvm: KvmAccel) -> KvmAccel {
    kvm.with_emulator(Arc::new(SoftEmulator::default()))
}
