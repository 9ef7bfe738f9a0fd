//! The fuzz targets of kernels and CPU models on their corpora and on seeded random changes of them.

#[path = "../../../fuzz/src/cpu_models.rs"]
#[allow(unreachable_pub)]
mod cpu_models;
#[path = "../../../fuzz/src/kernel_images.rs"]
#[allow(unreachable_pub)]
mod kernel_images;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod smoke;

use std::time::Duration;

#[test]
fn the_loader_bears_any_kernel() {
    let samples = smoke::corpus("kernel");
    let (size, at_most) = ((3000, 8000), Duration::from_secs(4));
    smoke::smoke("kernel", kernel_images::kernel, &samples, size, at_most);
}

#[test]
fn cpu_models_bear_any_text() {
    let samples = smoke::corpus("cpu");
    let (size, at_most) = ((3000, 400), Duration::from_secs(3));
    smoke::smoke("cpu", cpu_models::model, &samples, size, at_most);
}
