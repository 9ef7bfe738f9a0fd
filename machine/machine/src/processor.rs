//! Which processor runs the guest.

use accel::{Accel, AccelError};
use accel_kvm::KvmAccel;
use accel_soft::SoftAccel;
use vm_spec::AccelChoice;

/// Opens the processor that was asked for. `auto` says in one line what it took and why.
pub(crate) fn choose(choice: AccelChoice) -> Result<Box<dyn Accel>, AccelError> {
    match choice {
        AccelChoice::Kvm => Ok(Box::new(KvmAccel::open()?)),
        AccelChoice::Soft => Ok(Box::new(SoftAccel::new())),
        AccelChoice::Auto => {
            let choice = accel_kvm::choose();
            eprintln!("corten: {}", choice.line());
            Ok(match choice {
                accel_kvm::Choice::Kvm(kvm, _) => Box::new(kvm),
                accel_kvm::Choice::Soft(_) => Box::new(SoftAccel::new()),
            })
        }
    }
}
