//! Buses: which function sits where, and what it is wired to.

use std::fmt;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use device_model::{IoBus, IrqLine, IrqPin, MsiSink, ResetKind};
use parking_lot::Mutex;

use crate::PciError;
use crate::address::Devfn;
use crate::function::{Attachment, PciDevice};
use crate::spec::{HEADER_TYPE, INTERRUPT_PIN};

/// What all functions of a machine share.
#[derive(Clone)]
pub struct Fabric {
    /// Port space.
    pub ports: IoBus,
    /// Memory space.
    pub memory: IoBus,
    /// Where interrupt messages go.
    pub msi: Arc<dyn MsiSink>,
}

/// Which pin the INTx output of a slot ends in: slot number 0 to 31, pin number 0 for INTA# to 3.
pub type IntxRouting = Arc<dyn Fn(u8, u8) -> IrqPin + Send + Sync>;

/// Hears of cards that come and go: a hot-plug port.
pub trait SlotSink: Send + Sync {
    /// Whether there is a card on the bus now.
    fn presence_changed(&self, present: bool);
}

#[derive(Clone)]
struct Connection {
    fabric: Arc<Fabric>,
    intx: IntxRouting,
    upstream: Option<Weak<dyn PciDevice>>,
}

/// What is above a bus.
pub(crate) enum Upstream {
    /// The machine itself.
    Root,
    /// A bridge.
    Bridge(Arc<dyn PciDevice>),
    /// The bus hangs on a bridge that is not plugged in.
    Nothing,
}

type Slots = Vec<(Devfn, Arc<dyn PciDevice>)>;

/// A bus: the root bus, or the one behind a bridge.
pub struct PciBus {
    connection: Mutex<Option<Connection>>,
    /// By rising slot and function.
    slots: ArcSwap<Slots>,
    change: Mutex<()>,
    listener: Mutex<Option<Weak<dyn SlotSink>>>,
}

/// A function on a bus. Dropping it unplugs the function.
#[must_use = "the function is unplugged when this is dropped"]
pub struct PciHandle {
    bus: Arc<PciBus>,
    devfn: Devfn,
    device: Arc<dyn PciDevice>,
}

impl PciBus {
    /// A root bus.
    pub fn root(fabric: Fabric, intx: IntxRouting) -> Arc<Self> {
        let bus = Self::behind_bridge();
        *bus.connection.lock() = Some(Connection {
            fabric: Arc::new(fabric),
            intx,
            upstream: None,
        });
        Arc::new(bus)
    }

    pub(crate) fn behind_bridge() -> Self {
        Self {
            connection: Mutex::new(None),
            slots: ArcSwap::default(),
            change: Mutex::new(()),
            listener: Mutex::new(None),
        }
    }

    /// Plugs a function in.
    ///
    /// # Errors
    /// [`PciError::SlotTaken`], or [`PciError::NotConnected`] for a bus whose bridge is not plugged in itself.
    pub fn add(
        self: &Arc<Self>,
        devfn: Devfn,
        device: Arc<dyn PciDevice>,
    ) -> Result<PciHandle, PciError> {
        let name = device.function().name().to_owned();
        let connection = self
            .connection
            .lock()
            .clone()
            .ok_or(PciError::NotConnected(name.clone()))?;
        let change = self.change.lock();
        let mut slots = Slots::clone(&self.slots.load());
        let at = slots.partition_point(|(there, _)| *there < devfn);
        if let Some((_, other)) = slots.get(at).filter(|(there, _)| *there == devfn) {
            return Err(PciError::SlotTaken {
                function: name,
                devfn,
                other: other.function().name().to_owned(),
            });
        }
        slots.insert(at, (devfn, device.clone()));
        self.store(slots);
        drop(change);
        self.attach(&connection, devfn, &device);
        self.tell_presence();
        Ok(PciHandle {
            bus: self.clone(),
            devfn,
            device,
        })
    }

    /// Plugs a function into function 0 of the lowest free slot from `first` on.
    ///
    /// # Errors
    /// [`PciError::Full`], or as [`Self::add`].
    pub fn add_anywhere(
        self: &Arc<Self>,
        first: u8,
        device: Arc<dyn PciDevice>,
    ) -> Result<PciHandle, PciError> {
        let slots = self.slots.load();
        let free = (first..32).find(|s| !slots.iter().any(|(there, _)| there.slot() == *s));
        let Some(slot) = free else {
            return Err(PciError::Full(device.function().name().to_owned()));
        };
        self.add(Devfn::new(slot, 0), device)
    }

    fn store(&self, slots: Slots) {
        for (devfn, device) in slots.iter().filter(|(d, _)| d.function() == 0) {
            let others = slots
                .iter()
                .any(|(d, _)| d.slot() == devfn.slot() && d.function() != 0);
            device.function().set_multifunction(others);
        }
        self.slots.store(Arc::new(slots));
    }

    fn attach(
        self: &Arc<Self>,
        connection: &Connection,
        devfn: Devfn,
        device: &Arc<dyn PciDevice>,
    ) {
        let function = device.function();
        let pin = function.config(|c| c.u8(INTERRUPT_PIN));
        let intx = match pin {
            1..=4 => (connection.intx)(devfn.slot(), pin - 1).line(),
            _ => IrqLine::unconnected(),
        };
        if let Some(secondary) = function.secondary() {
            let above = connection.intx.clone();
            let slot = devfn.slot();
            *secondary.connection.lock() = Some(Connection {
                fabric: connection.fabric.clone(),
                // A bridge passes its slots' pins on rotated by the slot (PCI-to-PCI Bridge 1.2, section 9.1).
                intx: Arc::new(move |below, pin| above(slot, (below + pin) % 4)),
                upstream: Some(Arc::downgrade(device)),
            });
        }
        function.attach(
            device,
            Attachment {
                bus: Arc::downgrade(self),
                devfn,
                fabric: connection.fabric.clone(),
                intx,
            },
        );
    }

    fn detach(&self, devfn: Devfn) {
        let change = self.change.lock();
        let mut slots = Slots::clone(&self.slots.load());
        let Some(at) = slots.iter().position(|(there, _)| *there == devfn) else {
            return;
        };
        let (_, device) = slots.remove(at);
        self.store(slots);
        drop(change);
        device.function().detach();
        if let Some(secondary) = device.function().secondary() {
            *secondary.connection.lock() = None;
            secondary.remap();
        }
        self.tell_presence();
    }

    /// Has a hot-plug port hear of cards on this bus, from now on.
    pub fn listen(&self, listener: Weak<dyn SlotSink>) {
        *self.listener.lock() = Some(listener);
        self.tell_presence();
    }

    fn tell_presence(&self) {
        let listener = self.listener.lock().as_ref().and_then(Weak::upgrade);
        if let Some(listener) = listener {
            listener.presence_changed(!self.slots.load().is_empty());
        }
    }

    pub(crate) fn upstream(&self) -> Upstream {
        match &*self.connection.lock() {
            Some(Connection { upstream: None, .. }) => Upstream::Root,
            Some(Connection {
                upstream: Some(bridge),
                ..
            }) => bridge.upgrade().map_or(Upstream::Nothing, Upstream::Bridge),
            None => Upstream::Nothing,
        }
    }

    /// Maps the registers of everything on this bus and below again, after a bridge's windows have changed.
    pub(crate) fn remap(&self) {
        for (_, device) in self.slots.load().iter() {
            device.function().remap();
            if let Some(secondary) = device.function().secondary() {
                secondary.remap();
            }
        }
    }

    /// Resets everything on this bus, as a bridge's secondary bus reset does. Devices reset what is behind them.
    pub fn reset(&self, kind: ResetKind) {
        for (_, device) in self.slots.load().iter() {
            device.reset(kind);
        }
    }

    /// The functions, by rising slot and function.
    pub fn functions(&self) -> Vec<(Devfn, Arc<dyn PciDevice>)> {
        Slots::clone(&self.slots.load())
    }

    /// The function at a place on this bus.
    pub fn function(&self, devfn: Devfn) -> Option<Arc<dyn PciDevice>> {
        let slots = self.slots.load();
        let at = slots.binary_search_by_key(&devfn, |(d, _)| *d).ok()?;
        Some(slots[at].1.clone())
    }

    /// The function at a place on bus number `wanted`, which is this bus (whose number is `own`) or one below it.
    pub fn route(&self, own: u8, wanted: u8, devfn: Devfn) -> Option<Arc<dyn PciDevice>> {
        if own == wanted {
            return self.function(devfn);
        }
        for (_, device) in self.slots.load().iter() {
            let Some(below) = device.function().secondary() else {
                continue;
            };
            let (secondary, subordinate) = device.function().bus_numbers();
            // Numbers must rise downwards, or a guest could send us in circles.
            if secondary > own && (secondary..=subordinate).contains(&wanted) {
                return below.route(secondary, wanted, devfn);
            }
        }
        None
    }
}

/// A guest's read of a function's configuration space.
pub fn config_read(device: &dyn PciDevice, offset: u16, data: &mut [u8]) {
    device.config_read(offset, data);
}

/// A guest's write of a function's configuration space. One that starts a function level reset (PCI Express Base 4.0, section
/// 6.6.2) resets the device.
pub fn config_write(device: &dyn PciDevice, offset: u16, data: &[u8]) {
    device.function().config_write(offset, data);
    device.config_written(offset, data.len());
    if device.function().starts_reset(offset, data) {
        device.reset(ResetKind::Warm);
    }
}

/// Whether a function has a bridge's header.
pub fn is_bridge(device: &dyn PciDevice) -> bool {
    device.function().config(|c| c.u8(HEADER_TYPE)) & 0x7f == 1
}

impl PciHandle {
    /// Where it is plugged in.
    pub fn devfn(&self) -> Devfn {
        self.devfn
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn PciDevice> {
        &self.device
    }

    /// Unplugs the function.
    pub fn remove(self) -> Arc<dyn PciDevice> {
        self.device.clone()
    }
}

impl Drop for PciHandle {
    fn drop(&mut self) {
        self.bus.detach(self.devfn);
    }
}

impl fmt::Debug for PciHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PciHandle({} {})", self.devfn, self.device.name())
    }
}
