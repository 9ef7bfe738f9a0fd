//! Network cards from the specification.

use std::net::SocketAddr;
use std::sync::Arc;

use network_cards::tap::{Tap, TapConfig};
use network_cards::user::{HostForward, Transport, UserNet, UserNetConfig};
use network_cards::{NetBackend, NetError};
use virtio::net::{Net, NetHandle, NetOptions};
use vm_spec::{Forward, MacAddress, NetLink, NetSpec, Protocol, UserLink};

/// The Ethernet address that the first card gets by itself, as QEMU's users know it; the others count on.
const FIRST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

fn forward(forward: &Forward) -> HostForward {
    HostForward {
        transport: match forward.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
        },
        host: SocketAddr::new(forward.host_address, forward.host_port),
        guest_addr: forward.guest_address,
        guest_port: forward.guest_port,
    }
}

fn user(link: &UserLink) -> Result<UserNet, NetError> {
    UserNet::new(UserNetConfig {
        restrict: link.restrict,
        hostname: link.hostname.clone(),
        hostfwd: link.forwards.iter().map(forward).collect(),
        ..UserNetConfig::default()
    })
}

fn mac(spec: &NetSpec, number: usize) -> [u8; 6] {
    let MacAddress(mut mac) = spec.mac.unwrap_or(MacAddress(FIRST_MAC));
    if spec.mac.is_none() {
        mac[5] = mac[5].wrapping_add(number as u8);
    }
    mac
}

/// Makes the virtio card number `number` on its link.
pub(crate) fn virtio_card(
    spec: &NetSpec,
    number: usize,
) -> Result<(Box<Net>, NetHandle), NetError> {
    let (backend, most): (Arc<dyn NetBackend>, u16) = match &spec.link {
        NetLink::User(link) => (Arc::new(user(link)?), 1),
        NetLink::Tap(link) => {
            let config = TapConfig {
                ifname: link.ifname.clone(),
                queues: spec.queues,
            };
            (Arc::new(Tap::open(&config)?), spec.queues)
        }
    };
    let mut options = NetOptions::new(mac(spec, number));
    options.queue_pairs = spec.queues.min(most);
    let (device, handle) = Net::new(backend, options)?;
    Ok((Box::new(device), handle))
}
