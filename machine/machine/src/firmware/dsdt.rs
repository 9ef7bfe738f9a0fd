//! The DSDT: devices that an operating system can't find by itself, in ACPI machine language.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package,
    PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use chipset::ged::spec as ged;

use super::acpi::{AcpiConfig, PM_BASE, Platform, SCI, Transport};
use crate::memory_map::{ECAM, GENERIC_EVENTS, HPET, PCI_MEMORY};

/// First global interrupt of the eight that PCI pins lead to.
const PCI_GSI: u32 = 16;
/// Devices on the root bus.
const SLOTS: u32 = 32;
/// Identity of `_OSC` for PCI host bridges (PCI firmware specification 3.3, section 4.5).
const PCI_OSC: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What the operating system may control itself: native hot-plug, PME, AER, the capability structure.
const OSC_GRANTED: u32 = 0x1d;
const COM_PORTS: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

/// The global interrupt of a PCI interrupt pin (0 for INTA#) of a device on the root bus.
fn pci_gsi(slot: u8, pin: u8) -> u32 {
    PCI_GSI + pci::lpc::pirq_of(slot, pin) as u32
}

/// The body of the DSDT.
pub(super) fn build(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    match &config.platform {
        Platform::Q35 { pci_memory_64 } => {
            soft_off(chipset::pm::SLEEP_TYPE_S5, &mut bytes);
            system_devices(&mut bytes);
            pci_host(pci_memory_64, &mut bytes);
            let mut isa = Vec::new();
            isa_devices(config.serial_ports, &mut isa);
            keyboard(&mut isa);
            Scope::new(
                "_SB_.PCI0".into(),
                vec![&Device::new(
                    "ISA_".into(),
                    vec![&Name::new("_ADR".into(), &0x1f_0000u32), &Raw(isa)],
                )],
            )
            .to_aml_bytes(&mut bytes);
        }
        Platform::Microvm { transports } => {
            soft_off(ged::SLEEP_TYPE_S5, &mut bytes);
            let mut devices = Vec::new();
            isa_devices(config.serial_ports, &mut devices);
            power_button(&mut devices);
            for (number, transport) in transports.iter().enumerate() {
                virtio_device(number, *transport, &mut devices);
            }
            Scope::new("_SB_".into(), vec![&Raw(devices)]).to_aml_bytes(&mut bytes);
        }
    }
    bytes
}

/// The sleep type that is soft-off (ACPI 6.5, section 7.4.2.6).
fn soft_off(kind: u8, bytes: &mut Vec<u8>) {
    let values = Package::new(vec![&kind, &kind, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &values).to_aml_bytes(bytes);
}

/// A button whose presses the generic event device's interrupt tells (ACPI 6.5, sections 4.8.3.2.2 and 5.6.9).
fn power_button(bytes: &mut Vec<u8>) {
    let (region, base, size): (Path, _, _) =
        ("EREG".into(), GENERIC_EVENTS as u32, ged::SIZE as u8);
    Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    )
    .to_aml_bytes(bytes);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    false,
                    false,
                    false,
                    u32::from(SCI),
                )]),
            ),
            &OpRegion::new(region, OpRegionSpace::SystemMemory, &base, &size),
            &Field::new(
                "EREG".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"ESEL", 32)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("ESEL")),
                    &And::new(&Local(0), &Local(0), &ged::EVENT_POWER_BUTTON),
                    &If::new(
                        &Equal::new(&Local(0), &ged::EVENT_POWER_BUTTON),
                        vec![&Notify::new(&Path::new("PWRB"), &0x80u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(bytes);
}

/// A virtio device in memory space, by the identity that its drivers look for.
fn virtio_device(number: usize, transport: Transport, bytes: &mut Vec<u8>) {
    let size = virtio::transport::spec::mmio::SIZE as u32;
    let registers = Memory32Fixed::new(true, transport.address as u32, size);
    let interrupt = Interrupt::new(true, false, false, true, transport.gsi);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let name = format!("VR{number:02}");
    Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(number as u8)),
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(bytes);
}

/// Resources that belong to no other device: they keep the operating system from giving them away.
fn system_devices(bytes: &mut Vec<u8>) {
    let ecam_size = (ECAM.end - ECAM.start) as u32;
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "MBRD".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &Memory32Fixed::new(true, ECAM.start as u32, ecam_size),
                            &IO::new(PM_BASE, PM_BASE, 0, 0x80),
                            &IO::new(0xb2, 0xb2, 0, 2),
                            &IO::new(0x92, 0x92, 0, 1),
                        ]),
                    ),
                ],
            ),
            &Device::new(
                "HPET".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0103")),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(false, HPET as u32, 1024)]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(bytes);
}

/// Where each interrupt pin of each device leads (ACPI 6.5, section 6.2.13).
fn interrupt_routing() -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 0..SLOTS {
        for pin in 0..4u8 {
            let address = slot << 16 | 0xffff;
            let gsi = pci_gsi(slot as u8, pin);
            routes.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
        }
    }
    routes
}

/// The operating system asks what it may control (ACPI 6.5, section 6.2.11).
fn osc(bytes: &mut Vec<u8>) {
    let (uuid, revision, capabilities) = (Arg(0), Arg(1), Arg(3));
    let (status, control): (Path, Path) = ("CDW1".into(), "CDW3".into());
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const MASKED: u8 = 1 << 4;
    const UNKNOWN_UUID: u8 = 1 << 2;
    Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&status, &capabilities, &ZERO),
            &If::new(
                &Equal::new(&uuid, &Uuid::new(PCI_OSC)),
                vec![
                    &CreateDWordField::new(&control, &capabilities, &8u8),
                    &And::new(&Local(0), &control, &OSC_GRANTED),
                    &If::new(
                        &NotEqual::new(&revision, &ONE),
                        vec![&Or::new(&status, &status, &UNKNOWN_REVISION)],
                    ),
                    &If::new(
                        &NotEqual::new(&control, &Local(0)),
                        vec![&Or::new(&status, &status, &MASKED)],
                    ),
                    &Store::new(&control, &Local(0)),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &UNKNOWN_UUID)]),
            &Return::new(&capabilities),
        ],
    )
    .to_aml_bytes(bytes);
}

/// Bytes of machine language that stand for themselves.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// What the host bridge passes on to PCI.
fn pci_windows(high: &Range<u64>) -> Raw {
    let memory = AddressSpaceCacheable::NotCacheable;
    let (low_first, low_last) = (PCI_MEMORY.start as u32, (PCI_MEMORY.end - 1) as u32);
    let mut bytes = Vec::new();
    ResourceTemplate::new(vec![
        &AddressSpace::<u16>::new_bus_number(0, 0xff),
        &IO::new(0xcf8, 0xcf8, 1, 8),
        &AddressSpace::<u16>::new_io(0, 0xcf7, None),
        &AddressSpace::<u16>::new_io(0xd00, 0xffff, None),
        &AddressSpace::<u32>::new_memory(memory, true, 0xa_0000, 0xb_ffff, None),
        &AddressSpace::<u32>::new_memory(memory, true, low_first, low_last, None),
        &AddressSpace::<u64>::new_memory(memory, true, high.start, high.end - 1, None),
    ])
    .to_aml_bytes(&mut bytes);
    Raw(bytes)
}

fn pci_host(memory_64: &Range<u64>, bytes: &mut Vec<u8>) {
    let mut method = Vec::new();
    osc(&mut method);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_CRS".into(), &pci_windows(memory_64)),
                &Name::new("_PRT".into(), &interrupt_routing()),
                &Raw(method),
            ],
        )],
    )
    .to_aml_bytes(bytes);
}

/// An edge-triggered, active-high ISA interrupt.
fn isa_interrupt(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

fn isa_device(name: &str, hid: &str, uid: u8, resources: Vec<&dyn Aml>, bytes: &mut Vec<u8>) {
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &uid),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(bytes);
}

/// A stretch of ports that can't be moved.
fn io(port: u16, len: u8) -> IO {
    IO::new(port, port, 0, len)
}

/// The keyboard controller's two devices.
fn keyboard(bytes: &mut Vec<u8>) {
    isa_device(
        "KBD_",
        "PNP0303",
        0,
        vec![&io(0x60, 1), &io(0x64, 1), &isa_interrupt(1)],
        bytes,
    );
    // Without it Linux takes the controller's second port for disabled, and warns.
    isa_device("MOU_", "PNP0F13", 0, vec![&isa_interrupt(12)], bytes);
}

/// The clock, the serial ports and the panic device.
fn isa_devices(serial_ports: &[u8], bytes: &mut Vec<u8>) {
    isa_device(
        "RTC_",
        "PNP0B00",
        0,
        vec![&io(0x70, 8), &isa_interrupt(8)],
        bytes,
    );
    for &number in serial_ports {
        let Some((port, irq)) = COM_PORTS.get(usize::from(number).wrapping_sub(1)) else {
            continue;
        };
        let name = format!("COM{number}");
        isa_device(
            &name,
            "PNP0501",
            number,
            vec![&io(*port, 8), &isa_interrupt(*irq)],
            bytes,
        );
    }
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io(0x505, 1)])),
        ],
    )
    .to_aml_bytes(bytes);
}
