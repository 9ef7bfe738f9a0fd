//! A virtio device as a PCI function (section 4.1).

use std::io;
use std::sync::Arc;

use device_model::{Device, Doorbell, Doorbells, IoHandler, ResetKind, Widths};
use guest_memory::GuestMemory;
use parking_lot::Mutex;
use pci::{
    Bar, BarKind, ExpressType, FunctionBuilder, Identity, Msix, PciDevice, PciError, PciFunction,
};

use super::bar::{ModernBar, layout};
use super::frontend::DeviceStatus;
use super::signals::FunctionInterrupts;
use super::spec::{DEVICE_BASE, SUBSYSTEM, VENDOR, capability};
use crate::device::VirtioDevice;
use crate::spec::DeviceType;

/// The base address register of the MSI-X table.
const MSIX_BAR: usize = 1;
/// The base address register of the four structures; 64 bits wide.
const MODERN_BAR: usize = 4;
/// The vendor capability's ID (PCI Local Bus 3.0, appendix H).
const CAP_VENDOR: u8 = 0x09;
/// Revision 1: not a transitional device (section 4.1.2.1).
const REVISION: u8 = 1;

/// What a virtio function is connected to.
pub struct PciWiring {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The short cut for doorbells, if the processor has one.
    pub doorbells: Option<Arc<dyn Doorbells>>,
    /// What it is in PCI Express; `None` for conventional PCI.
    pub express: Option<ExpressType>,
    /// Feature bits that are not offered though the device has them.
    pub withheld: u64,
}

/// Why a virtio function can't be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// Its registers or vectors don't fit.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The host refuses event descriptors.
    #[error("no event descriptors for {name}")]
    Events {
        /// The function's name.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// The function's interrupts as the device's signals use them.
struct Interrupts {
    function: Arc<PciFunction>,
    msix: Arc<Msix>,
}

impl FunctionInterrupts for Interrupts {
    fn msix_enabled(&self) -> bool {
        self.msix.is_enabled()
    }
    fn message(&self, vector: u16) {
        self.msix.notify(vector);
    }
    fn set_level(&self, high: bool) {
        self.function.set_intx(high);
    }
}

/// A virtio device on a PCI bus.
pub struct VirtioPci {
    // Configuration.
    name: String,
    doorbells: Option<Arc<dyn Doorbells>>,
    /// Offset of the capability that gives access to the structures through configuration space.
    access_capability: u16,
    // Runtime.
    function: Arc<PciFunction>,
    bar: ModernBar,
    /// Where the doorbells are registered.
    rung_at: Mutex<Option<u64>>,
}

fn identity(kind: DeviceType) -> Identity {
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + kind as u16,
        class: match kind {
            DeviceType::Net => 0x02_0000,
            DeviceType::Block => 0x01_0000,
            DeviceType::Console | DeviceType::Vsock => 0x07_8000,
            DeviceType::Entropy | DeviceType::Balloon => 0x00_ff00,
        },
        revision: REVISION,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

/// `struct virtio_pci_cap` behind its ID and link, for a structure in the modern register (section 4.1.4).
fn structure(kind: u8, offset: u64, length: u64, tail: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + tail.len() as u8, kind, MODERN_BAR as u8, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(length as u32).to_le_bytes());
    body.extend_from_slice(tail);
    body
}

/// Where in the access capability its fields lie, from the capability's start.
mod access {
    pub(super) const BAR: u16 = 4;
    pub(super) const OFFSET: u16 = 8;
    pub(super) const LENGTH: u16 = 12;
    pub(super) const DATA: u16 = 16;
}

fn function(
    name: &str,
    kind: DeviceType,
    vectors: u16,
    express: Option<ExpressType>,
) -> Result<(PciFunction, u16), PciError> {
    let multiplier = (layout::NOTIFY_MULTIPLIER as u32).to_le_bytes();
    let modern = Bar {
        kind: BarKind::Memory64 { prefetchable: true },
        size: layout::SIZE,
        widths: Widths::ANY,
    };
    let mut builder = FunctionBuilder::new(name, identity(kind))
        .bar(MODERN_BAR, modern)?
        .msix(vectors, MSIX_BAR)?
        .interrupt_pin(1);
    for (kind, offset, tail) in [
        (capability::COMMON, layout::COMMON, &[][..]),
        (capability::ISR, layout::ISR, &[]),
        (capability::DEVICE, layout::DEVICE, &[]),
        (capability::NOTIFY, layout::NOTIFY, &multiplier),
    ] {
        let body = structure(kind, offset, layout::PART, tail);
        (builder, _) = builder.capability(CAP_VENDOR, &body, &[]);
    }
    let body = structure(capability::PCI, 0, 0, &[0; 4]);
    let mut writable = vec![0; body.len()];
    writable[usize::from(access::BAR) - 2] = 0xff;
    writable[usize::from(access::OFFSET) - 2..].fill(0xff);
    let at;
    (builder, at) = builder.capability(CAP_VENDOR, &body, &writable);
    builder = builder.power_management();
    if let Some(express) = express {
        builder = builder.express(express);
    }
    Ok((builder.build(), at))
}

impl VirtioPci {
    /// Makes a function of a device. `name` is for messages and monitors: `disk0`.
    ///
    /// # Errors
    /// [`VirtioPciError`] when the host gives no event descriptors, or the device has more queues than vectors can be.
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        wiring: PciWiring,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let name = name.into();
        // One for each queue and one for configuration changes.
        let vectors = u16::try_from(device.queue_sizes().len() + 1).unwrap_or(u16::MAX);
        let kind = device.device_type();
        let (function, access_capability) = function(&name, kind, vectors, wiring.express)?;
        let function = Arc::new(function);
        let msix = function.msix().cloned().ok_or(PciError::BadMsix {
            function: name.clone(),
            vectors,
        })?;
        let interrupts = Arc::new(Interrupts {
            function: function.clone(),
            msix,
        });
        let bar = ModernBar::new(&wiring.memory, device, interrupts, vectors, wiring.withheld)
            .map_err(|source| VirtioPciError::Events {
                name: name.clone(),
                source,
            })?;
        Ok(Arc::new(Self {
            name,
            doorbells: wiring.doorbells,
            access_capability,
            function,
            bar,
            rung_at: Mutex::new(None),
        }))
    }

    /// How the device is doing.
    pub fn status(&self) -> DeviceStatus {
        self.bar.status()
    }

    /// The access that the capability in configuration space asks for: offset in the modern register, and bytes.
    fn access(&self) -> Option<(u64, usize)> {
        let at = self.access_capability;
        let (bar, offset, length) = self.function.config(|c| {
            (
                c.u8(at + access::BAR),
                c.u32(at + access::OFFSET),
                c.u32(at + access::LENGTH),
            )
        });
        let good = usize::from(bar) == MODERN_BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && u64::from(offset) < layout::SIZE;
        good.then_some((u64::from(offset), length as usize))
    }

    /// True if an access to configuration space touches the capability's data.
    fn touches_data(&self, offset: u16, len: usize) -> bool {
        let data = usize::from(self.access_capability + access::DATA);
        let offset = usize::from(offset);
        offset < data + 4 && data < offset + len
    }
}

impl Device for VirtioPci {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn reset(&self, _kind: ResetKind) {
        self.bar.reset();
        self.function.reset();
    }
}

impl PciDevice for VirtioPci {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar == MODERN_BAR {
            self.bar.read(offset, data);
        } else {
            data.fill(0);
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar == MODERN_BAR {
            self.bar.write(offset, data);
        }
    }

    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        let Some(doorbells) = self.doorbells.as_ref().filter(|_| bar == MODERN_BAR) else {
            return;
        };
        let doorbell = |base: u64, offset: u64| Doorbell {
            address: base + offset,
            len: 0,
            value: None,
        };
        let mut rung_at = self.rung_at.lock();
        if let Some(base) = std::mem::replace(&mut *rung_at, address) {
            for (offset, event) in self.bar.doorbells() {
                doorbells.remove(doorbell(base, offset), event);
            }
        }
        if let Some(base) = address {
            for (offset, event) in self.bar.doorbells() {
                // Without the short cut the write comes to `bar_write`.
                doorbells.add(doorbell(base, offset), event);
            }
        }
    }

    fn config_written(&self, offset: u16, len: usize) {
        if !self.touches_data(offset, len) {
            return;
        }
        if let Some((at, size)) = self.access() {
            let data = self.access_capability + access::DATA;
            let value = self.function.config(|c| c.u32(data)).to_le_bytes();
            self.bar.write(at, &value[..size]);
        }
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.touches_data(offset, data.len())
            && let Some((at, size)) = self.access()
        {
            let mut value = [0; 4];
            self.bar.read(at, &mut value[..size]);
            let to = self.access_capability + access::DATA;
            self.function
                .change_config(|config| config.set(to, &value[..size]));
        }
        self.function.config_read(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::driver::DriverQueue;
    use crate::rng::Rng;
    use crate::spec::feature;
    use crate::testing::{DATA, PATIENCE, RAM};
    use crate::transport::spec::common;
    use device_model::{IoBus, IrqPin, IrqSink, MsiSink};
    use guest_memory::BackingOptions;
    use pci::{Devfn, Fabric, PciBus, config_read, config_write};
    use std::sync::mpsc;
    use vmm_sys_util::eventfd::EventFd;

    struct Messages(Mutex<mpsc::Sender<(u64, u32)>>);
    impl MsiSink for Messages {
        fn send(&self, address: u64, data: u32) {
            let _ = self.0.lock().send((address, data));
        }
    }

    struct Nowhere;
    impl IrqSink for Nowhere {
        fn set_level(&self, _: u32, _: bool) {}
    }

    #[derive(Default)]
    struct Bells(Mutex<Vec<u64>>);
    impl Doorbells for Bells {
        fn add(&self, doorbell: Doorbell, _: &EventFd) -> bool {
            self.0.lock().push(doorbell.address);
            true
        }
        fn remove(&self, doorbell: Doorbell, _: &EventFd) {
            self.0.lock().retain(|a| *a != doorbell.address);
        }
    }

    struct Machine {
        memory: GuestMemory,
        space: IoBus,
        messages: mpsc::Receiver<(u64, u32)>,
        bells: Arc<Bells>,
        device: Arc<VirtioPci>,
        handle: pci::PciHandle,
    }

    fn machine() -> Machine {
        let memory = GuestMemory::new();
        memory.add_ram(0, RAM, BackingOptions::default()).unwrap();
        let (send, messages) = mpsc::channel();
        let space = IoBus::memory();
        let fabric = Fabric {
            ports: IoBus::ports(),
            memory: space.clone(),
            msi: Arc::new(Messages(Mutex::new(send))),
        };
        let pin = IrqPin::new(Arc::new(Nowhere), 0);
        let bus = PciBus::root(fabric, Arc::new(move |_, _| pin.clone()));
        let bells = Arc::new(Bells::default());
        let wiring = PciWiring {
            memory: memory.clone(),
            doorbells: Some(bells.clone()),
            express: Some(ExpressType::RootIntegratedEndpoint),
            withheld: feature::RING_PACKED,
        };
        let device = VirtioPci::new("rng0", Box::new(Rng::new(None).unwrap()), wiring).unwrap();
        let handle = bus.add(Devfn::new(4, 0), device.clone()).unwrap();
        Machine {
            memory,
            space,
            messages,
            bells,
            device,
            handle,
        }
    }

    impl Machine {
        fn config<const N: usize>(&self, offset: u16) -> [u8; N] {
            let mut data = [0; N];
            config_read(self.device.as_ref(), offset, &mut data);
            data
        }
        fn config_u32(&self, offset: u16) -> u32 {
            u32::from_le_bytes(self.config(offset))
        }
        fn set(&self, offset: u16, value: u32) {
            config_write(self.device.as_ref(), offset, &value.to_le_bytes());
        }
        fn write(&self, at: u64, len: usize, value: u64) {
            self.space.write(at, &value.to_le_bytes()[..len]);
        }
        fn read(&self, at: u64, len: usize) -> u64 {
            let mut data = [0; 8];
            self.space.read(at, &mut data[..len]);
            u64::from_le_bytes(data)
        }
        /// The vendor capabilities: type, offset of the capability, offset in the register, length.
        fn structures(&self) -> Vec<(u8, u16, u32, u32)> {
            let mut found = Vec::new();
            let mut at = u16::from(self.config::<1>(0x34)[0]);
            while at != 0 {
                let [id, next, _, kind, bar] = self.config::<5>(at);
                if id == CAP_VENDOR {
                    assert!(bar == 4);
                    found.push((kind, at, self.config_u32(at + 8), self.config_u32(at + 12)));
                }
                at = u16::from(next);
            }
            found
        }
    }

    const BASE: u64 = 0x80_0000_0000;
    const TABLE: u64 = 0xe000_0000;

    #[test]
    fn a_driver_finds_its_way_by_capabilities() {
        let m = machine();
        assert_eq!(m.config_u32(0), 0x1044_1af4);
        assert_eq!(m.config_u32(8), 0x00ff_0001);
        let found = m.structures();
        let kinds: Vec<u8> = found.iter().map(|f| f.0).collect();
        assert_eq!(kinds, [1, 3, 4, 2, 5]);
        let offset = |kind| u64::from(found.iter().find(|f| f.0 == kind).unwrap().2);
        assert_eq!(m.config_u32(found[3].1 + 16), 4);
        m.set(0x20, BASE as u32);
        m.set(0x24, (BASE >> 32) as u32);
        m.set(0x14, TABLE as u32);
        m.set(4, 6);
        assert_eq!(*m.bells.0.lock(), [BASE + offset(2)]);
        let msix = (0x40..0x100)
            .step_by(4)
            .find(|at| m.config::<1>(*at)[0] == 0x11)
            .unwrap();
        m.set(msix, 0x8000_0000);
        for vector in 0..2 {
            m.write(TABLE + vector * 16, 8, 0xfee0_0000);
            m.write(TABLE + vector * 16 + 8, 8, 0x30 + vector);
        }
        let regs = BASE + offset(1);
        let status = regs + common::STATUS as u64;
        m.write(status, 1, 3);
        m.write(regs, 4, 1);
        assert_eq!(m.read(regs + 4, 4) & (feature::RING_PACKED >> 32), 0);
        m.write(regs + 8, 4, 1);
        m.write(regs + 12, 4, 1);
        m.write(status, 1, 11);
        let mut driver = DriverQueue::new(&m.memory, 0x1000, 8, feature::VERSION_1);
        let config = driver.config(0);
        for (at, len, value) in [
            (common::QUEUE_SIZE, 2, 8),
            (common::QUEUE_VECTOR, 2, 1),
            (common::QUEUE_DESC, 8, config.descriptors),
            (common::QUEUE_DRIVER, 8, config.driver),
            (common::QUEUE_DEVICE, 8, config.device),
            (common::QUEUE_ENABLE, 2, 1),
        ] {
            m.write(regs + at as u64, len, value);
        }
        m.write(status, 1, 15);
        driver.add(&[(DATA, 16, true)]).unwrap();
        m.write(BASE + offset(2), 2, 0);
        assert_eq!(m.messages.recv_timeout(PATIENCE), Ok((0xfee0_0000, 0x31)));
        assert_eq!(driver.used(), Some((0, 16)));
        m.device.reset(ResetKind::Cold);
        assert!(m.bells.0.lock().is_empty());
        assert_eq!(m.device.status().status.bits(), 0);
        drop(m.handle);
    }

    #[test]
    fn a_function_level_reset_resets_the_device() {
        let m = machine();
        let cap = m.structures()[4].1;
        m.set(cap + 4, 4);
        m.set(cap + 8, common::STATUS as u32);
        m.set(cap + 12, 1);
        config_write(m.device.as_ref(), cap + 16, &[3]);
        let express = m.device.function().express_capability().unwrap();
        m.set(express + 8, 0x0000_1000);
        assert_eq!(m.device.status().status.bits(), 3);
        m.set(express + 8, 0x0000_8000);
        assert_eq!(m.device.status().status.bits(), 0);
        assert_eq!(m.config_u32(express + 8) & 0x8000, 0);
        assert_eq!(m.config_u32(cap + 12), 0);
        drop(m.handle);
    }

    #[test]
    fn structures_can_be_reached_through_configuration_space() {
        let m = machine();
        let cap = m.structures()[4].1;
        m.set(cap + 4, 4);
        m.set(cap + 8, common::STATUS as u32);
        m.set(cap + 12, 1);
        config_write(m.device.as_ref(), cap + 16, &[3]);
        assert_eq!(m.device.status().status.bits(), 3);
        assert_eq!(m.config::<1>(cap + 16), [3]);
        m.set(cap + 8, common::NUM_QUEUES as u32);
        m.set(cap + 12, 2);
        assert_eq!(m.config::<2>(cap + 16), [1, 0]);
        for (bar, offset, length) in [(4, 18, 4), (4, 0x4000, 4), (0, 0, 4), (4, 0, 3)] {
            m.set(cap + 4, bar);
            m.set(cap + 8, offset);
            m.set(cap + 12, length);
            m.set(cap + 16, 0x55);
            assert_eq!(m.config_u32(cap + 16), 0x55);
        }
        drop(m.handle);
    }
}
