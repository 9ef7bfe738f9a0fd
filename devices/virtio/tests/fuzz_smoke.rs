//! The fuzz targets of the devices on seeded random input.

#[path = "../../../fuzz/src/input.rs"]
#[allow(unreachable_pub, dead_code)]
mod input;
#[path = "../../../fuzz/src/registers.rs"]
#[allow(unreachable_pub, dead_code)]
mod registers;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod smoke;
#[path = "../../../fuzz/src/virtio_devices.rs"]
#[allow(unreachable_pub)]
mod virtio_devices;

use std::time::Duration;

use virtio_devices::{Kind, device};

fn torment(name: &'static str, kind: Kind) {
    let (size, at_most) = ((100, 3000), Duration::from_secs(4));
    smoke::smoke(name, |data| device(kind, data), &[], size, at_most);
}

#[test]
fn disk() {
    torment("virtio-blk", Kind::Blk);
}

#[test]
fn network_card() {
    torment("virtio-net", Kind::Net);
}

#[test]
fn console() {
    torment("virtio-console", Kind::Console);
}

#[test]
fn entropy() {
    torment("virtio-rng", Kind::Rng);
}

#[test]
fn balloon() {
    torment("virtio-balloon", Kind::Balloon);
}

#[test]
fn sockets() {
    torment("vsock", Kind::Vsock);
}
