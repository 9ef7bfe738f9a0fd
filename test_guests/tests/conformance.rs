//! Runs the conformance suite on every processor: each test is listed with the processor's name in front.

use std::path::Path;
use std::sync::Arc;

use accel::Accel;
use accel_soft::{SoftAccel, SoftEmulator, SoftOptions};
use libtest_mimic::{Arguments, Trial};
use test_guests::suite;

/// A processor, or why its tests are skipped.
type Processor = Result<Arc<dyn Accel>, String>;

fn kvm() -> Processor {
    match accel_kvm::KvmAccel::open() {
        Ok(kvm) => Ok(Arc::new(kvm.with_emulator(Arc::new(SoftEmulator::new())))),
        Err(e) if Path::new("/dev/kvm").exists() => panic!("{e}"),
        Err(e) => Err(e.to_string()),
    }
}

/// The software CPU, which translates all code or none.
fn soft(translate: bool) -> Processor {
    Ok(Arc::new(SoftAccel::new(SoftOptions {
        translate,
        hot_after: 0,
        ..SoftOptions::default()
    })))
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let processors = [
        ("kvm", kvm()),
        ("soft", soft(true)),
        ("interpreter", soft(false)),
    ];
    for (name, processor) in processors {
        if let Err(why) = &processor
            && !arguments.list
        {
            eprintln!("the tests of {name} are skipped: {why}");
        }
        // Asked once: where the host interprets ring 0, some tests meet what it can't do, and are marked in the listing.
        let interprets = processor
            .as_ref()
            .is_ok_and(|processor| suite::interprets_ring_0(processor.as_ref()));
        for test in suite::all() {
            let ignored = processor.is_err();
            let limit = test.limit.filter(|_| interprets);
            let processor = processor.clone();
            let run = move || {
                let processor = processor.map_err(|why| format!("skipped: {why}"))?;
                match ((test.run)(processor.as_ref()), limit) {
                    (Err(why), Some(limit)) => {
                        eprintln!("note: {}: the host's KVM: {limit} ({why})", test.name);
                        Ok(())
                    }
                    (result, _) => result.map_err(Into::into),
                }
            };
            let trial = Trial::test(format!("{name}::{}", test.name), run);
            let kind = if limit.is_some() { "limited" } else { "" };
            trials.push(trial.with_kind(kind).with_ignored_flag(ignored));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
