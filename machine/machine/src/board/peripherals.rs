//! Devices that the specification adds to a board.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio::balloon::{Balloon, BalloonHandle, BalloonOptions};
use virtio::console::{Console, ConsoleOptions};
use virtio::net::NetHandle;
use virtio::rng::Rng;
use virtio::spec::feature;
use virtio::vsock::Vsock;
use vm_spec::{BalloonSpec, VmSpec};

use super::{Base, Board};
use crate::disks::Disks;
use crate::lifecycle::{Lifecycle, Request};
use crate::{MachineError, chars, nets};

/// What a device that is not to have packed rings does not offer.
fn withheld(packed: bool) -> u64 {
    if packed { 0 } else { feature::RING_PACKED }
}

/// Adds what the specification asks for.
pub(crate) struct Peripherals<'a> {
    pub(crate) base: &'a Base,
    pub(crate) board: &'a mut dyn Board,
    pub(crate) lifecycle: &'a Arc<Lifecycle>,
    pub(crate) controls: &'a mut Controls,
}

/// What a monitor reaches of the devices.
#[derive(Clone, Default)]
pub(crate) struct Controls {
    pub(crate) balloon: Option<BalloonHandle>,
    /// A change of the balloon waits to be told.
    pub(crate) balloon_pending: Arc<AtomicBool>,
    pub(crate) disks: Disks,
    /// A disk's failure has stopped the guest.
    pub(crate) io_error: Arc<AtomicBool>,
    /// Cards by name.
    pub(crate) nets: Vec<(String, NetHandle)>,
}

impl Peripherals<'_> {
    /// Adds everything, in the order in which a guest numbers it.
    pub(crate) fn add(&mut self, spec: &VmSpec) -> Result<(), MachineError> {
        for serial in &spec.serials {
            let backend = chars::open("--serial", serial, self.lifecycle)?;
            self.board.add_serial(backend)?;
        }
        if let Some(console) = &spec.debug_console {
            let backend = chars::open("--debugcon", console, self.lifecycle)?;
            self.board.add_debug_console(backend)?;
        }
        self.controls.disks = Disks::new(&spec.secrets);
        for (number, disk) in spec.disks.iter().enumerate() {
            let disks = &mut self.controls.disks;
            let (name, device) = disks.add(disk, number, spec.cpus, self.lifecycle)?;
            self.board.plug(name, device, withheld(disk.packed))?;
        }
        for (number, net) in spec.nets.iter().enumerate() {
            let (device, handle) = nets::virtio_card(net, number)?;
            self.controls.nets.push((format!("net{number}"), handle));
            self.board
                .plug(format!("net{number}"), device, withheld(net.packed))?;
        }
        for (number, console) in spec.consoles.iter().enumerate() {
            let backend = chars::open("--console", console, self.lifecycle)?;
            let options = ConsoleOptions {
                console: Some(backend),
                ports: Vec::new(),
            };
            let (device, _handle) =
                Console::new(options).map_err(|e| MachineError::Spec(format!("--console: {e}")))?;
            self.board
                .plug(format!("console{number}"), Box::new(device), 0)?;
        }
        if let Some(balloon) = &spec.balloon {
            self.add_balloon(balloon)?;
        }
        if spec.rng {
            let device = Rng::new(None).map_err(|e| MachineError::host("--rng", e))?;
            self.board.plug("rng".into(), Box::new(device), 0)?;
        }
        if let Some(vsock) = &spec.vsock {
            let device = Vsock::new(vsock.cid, &vsock.path).map_err(|error| {
                let cause = error.source().map(|cause| format!(": {cause}"));
                MachineError::Spec(format!("--vsock: {error}{}", cause.unwrap_or_default()))
            })?;
            self.board.plug("vsock".into(), Box::new(device), 0)?;
        }
        Ok(())
    }

    fn add_balloon(&mut self, spec: &BalloonSpec) -> Result<(), MachineError> {
        let options = BalloonOptions {
            deflate_on_oom: spec.deflate_on_oom,
            free_page_reporting: spec.free_page_reporting,
        };
        let (device, handle) = Balloon::new(options, &self.base.clock)
            .map_err(|e| MachineError::host("--balloon", e))?;
        let (lifecycle, pending) = (
            self.lifecycle.clone(),
            self.controls.balloon_pending.clone(),
        );
        handle.on_change(move |_| {
            // One request at a time stands for all changes until it is taken.
            if !pending.swap(true, Ordering::SeqCst) {
                lifecycle.post(Request::BalloonChanged);
            }
        });
        self.controls.balloon = Some(handle);
        self.board.plug("balloon".into(), Box::new(device), 0)
    }
}
