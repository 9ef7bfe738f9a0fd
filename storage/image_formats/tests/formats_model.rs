//! Images of other products' formats: random operations against a plain model, the result read by
//! qemu-img, and images that qemu-img makes, read and changed here.

mod support;

use std::path::Path;
use std::rc::Rc;

use block::{CacheMode, Medium, executor};
use image_formats::qcow2::Repair;
use image_formats::vmdk::{Adapter, Subformat};
use image_formats::{NewImage, create_file, vdi, vhdx, vmdk, vpc};
use proptest::prelude::*;
use support::plain::{self, Step, steps};
use support::{qemu_img, qemu_img_ok, text};

const MIB: u64 = 1 << 20;
/// The size of test disks: not a multiple of any block size.
const SIZE: u64 = 9 * MIB + 5 * 4096;

/// A format with its options, here and for qemu-img.
#[derive(Debug, Clone)]
struct Kind {
    new: NewImage,
    qemu: String,
    /// The disk can be made larger and smaller.
    resizes: bool,
}

fn vhdx_kind(fixed: bool, block_size: u64, zero: bool, log: u64) -> Kind {
    let new = NewImage::Vhdx(vhdx::CreateOptions {
        size: SIZE,
        fixed,
        block_size,
        block_state_zero: zero,
        log_size: log,
        ..vhdx::CreateOptions::default()
    });
    let subformat = if fixed { "fixed" } else { "dynamic" };
    let zero = if zero { "on" } else { "off" };
    Kind {
        new,
        qemu: format!(
            "subformat={subformat},block_size={block_size},block_state_zero={zero},log_size={log}"
        ),
        resizes: true,
    }
}

fn any_vhdx() -> impl Strategy<Value = Kind> {
    let block = prop_oneof![Just(MIB), Just(2 * MIB), Just(8 * MIB), Just(32 * MIB)];
    (any::<bool>(), block, any::<bool>(), 1..4u64)
        .prop_map(|(fixed, block, zero, log)| vhdx_kind(fixed, block, zero, log * MIB))
}

fn any_vpc() -> impl Strategy<Value = Kind> {
    any::<bool>().prop_map(|fixed| Kind {
        new: NewImage::Vpc(vpc::CreateOptions {
            size: SIZE,
            fixed,
            force_size: true,
            ..vpc::CreateOptions::default()
        }),
        qemu: format!(
            "subformat={},force_size=on",
            if fixed { "fixed" } else { "dynamic" }
        ),
        resizes: true,
    })
}

fn any_vdi() -> impl Strategy<Value = Kind> {
    any::<bool>().prop_map(|fixed| Kind {
        qemu: format!("static={}", if fixed { "on" } else { "off" }),
        new: NewImage::Vdi(vdi::CreateOptions {
            size: SIZE,
            fixed,
            ..vdi::CreateOptions::default()
        }),
        resizes: false,
    })
}

fn any_vmdk() -> impl Strategy<Value = Kind> {
    // Not the one that is written by converting alone.
    let subformat = prop::sample::select(&Subformat::ALL[..4]);
    let adapter = prop::sample::select(&Adapter::ALL[..]);
    (subformat, adapter, any::<bool>(), any::<bool>()).prop_map(
        |(subformat, adapter, compat6, zeroed)| {
            let flat = subformat.name().ends_with("Flat");
            let options = vmdk::CreateOptions {
                size: SIZE,
                subformat,
                adapter,
                compat6,
                zeroed_grain: zeroed && !flat,
                ..vmdk::CreateOptions::default()
            };
            let on = |value: bool| if value { "on" } else { "off" };
            Kind {
                qemu: format!(
                    "subformat={},adapter_type={},compat6={},zeroed_grain={}",
                    subformat.name(),
                    adapter.name(),
                    on(compat6),
                    on(options.zeroed_grain)
                ),
                new: NewImage::Vmdk(options),
                resizes: false,
            }
        },
    )
}

fn all_steps(kind: &Kind) -> BoxedStrategy<Vec<Step>> {
    let common = steps(SIZE / 2, 512, 3000);
    let resize = (SIZE / 2..3 * SIZE).prop_map(|n| Step::Resize(n / 4096 * 4096));
    let any = if kind.resizes {
        prop_oneof![20 => common, 1 => resize].boxed()
    } else {
        common.boxed()
    };
    prop::collection::vec(any, 1..20).boxed()
}

fn with_steps(
    kind: impl Strategy<Value = Kind> + 'static,
) -> impl Strategy<Value = (Kind, Vec<Step>)> {
    kind.prop_flat_map(|kind| {
        let steps = all_steps(&kind);
        (Just(kind), steps)
    })
}

/// Runs the steps on an image that is there, and compares after each reopening and at the end.
async fn run_all(path: &Path, format: &str, model: &mut Vec<u8>, ops: &[Step]) {
    let medium = open_file(path);
    let mut image = plain::open(&medium, format).await;
    for op in ops {
        image = plain::run(&medium, image, model, op, 512).await;
        if matches!(op, Step::Reopen) {
            assert!(plain::content(&image).await == *model, "after {op:?}");
        }
    }
    assert!(plain::content(&image).await == *model);
    image.backend.flush().await.unwrap();
    check_clean(&image).await;
    image.backend.close().await.unwrap();
    drop(image);
    let image = plain::open(&medium, format).await;
    assert!(plain::content(&image).await == *model, "opened anew");
    check_clean(&image).await;
}

async fn check_clean(image: &image_formats::Image) {
    let tools = image.format.clone().unwrap();
    if let Some(report) = tools.check(Repair::None).await.unwrap() {
        let found = (report.corruptions, report.leaks);
        assert_eq!(found, (0, 0), "{:?}", report.messages);
    }
}

fn open_file(path: &Path) -> Rc<dyn Medium> {
    let options = block::FileOptions {
        write: true,
        lock: block::LockMode::None,
        ..block::FileOptions::default()
    };
    Rc::new(block::HostFile::open(path, &options).unwrap())
}

/// qemu-img reads what the model has.
fn theirs_agrees(path: &Path, format: &str, model: &[u8]) {
    let raw = path.with_extension("model");
    std::fs::write(&raw, model).unwrap();
    let compare = ["compare", "-f", format, "-F", "raw", text(path), text(&raw)];
    qemu_img_ok(&compare);
    // 63: there is no check for this format.
    if let Some(output) = qemu_img(&["check", "-f", format, text(path)]) {
        let code = output.status.code();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(code, Some(0 | 63)), "qemu-img check: {said}");
    }
}

/// Ours makes and writes, theirs reads.
fn ours_to_theirs(kind: &Kind, ops: &[Step]) {
    let directory = tempfile::tempdir().unwrap();
    let format = kind.new.format();
    let path = directory.path().join("ours.img");
    let mut model = vec![0; SIZE as usize];
    executor::block_on(async {
        let medium = create_file(text(&path), CacheMode::Unsafe).unwrap();
        plain::create(&medium, &kind.new).await;
        drop(medium);
        run_all(&path, format, &mut model, ops).await;
    })
    .unwrap();
    theirs_agrees(&path, format, &model);
}

/// Theirs makes and writes, ours reads and writes, theirs reads again.
fn theirs_to_ours(kind: &Kind, ops: &[Step], seed: u64) {
    let directory = tempfile::tempdir().unwrap();
    let format = kind.new.format();
    let (path, raw) = (
        directory.path().join("theirs.img"),
        directory.path().join("source.raw"),
    );
    let mut model = vec![0; SIZE as usize];
    let mut at = seed as usize % 300_000;
    while at < model.len() {
        let end = (at + 77_824).min(model.len());
        model[at..end].fill((at >> 9) as u8 | 1);
        at += 700_000;
    }
    std::fs::write(&raw, &model).unwrap();
    let (from, to) = (text(&raw), text(&path));
    let convert = [
        "convert", "-f", "raw", "-O", format, "-o", &kind.qemu, from, to,
    ];
    if qemu_img_ok(&convert).is_none() {
        return;
    }
    executor::block_on(async {
        let medium = open_file(&path);
        let image = plain::open(&medium, format).await;
        assert!(plain::content(&image).await == model, "as they left it");
        check_clean(&image).await;
        drop((image, medium));
        run_all(&path, format, &mut model, ops).await;
    })
    .unwrap();
    theirs_agrees(&path, format, &model);
}

/// The block that the disk's old end lay in was the file's last one.
#[test]
fn a_vpc_disk_that_shrinks_ends_with_its_footer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vhd");
    executor::block_on(async {
        let options = vpc::CreateOptions {
            size: SIZE,
            force_size: true,
            ..vpc::CreateOptions::default()
        };
        let medium = create_file(text(&path), CacheMode::Unsafe).unwrap();
        plain::create(&medium, &NewImage::Vpc(options)).await;
        drop(medium);
        let mut model = vec![0; SIZE as usize];
        let ends = [
            Step::Write {
                at: SIZE - 4096,
                length: 4096,
                value: 7,
            },
            Step::Resize(SIZE / 2),
        ];
        run_all(&path, "vpc", &mut model, &ends).await;
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[bytes.len() - 512..], bytes[..512]);
    })
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 30, ..ProptestConfig::default() })]

    #[test]
    fn vhdx_agrees_with_qemu_both_ways((kind, ops) in with_steps(any_vhdx()), seed: u64) {
        ours_to_theirs(&kind, &ops);
        theirs_to_ours(&kind, &ops, seed);
    }

    #[test]
    fn vpc_agrees_with_qemu_both_ways((kind, ops) in with_steps(any_vpc()), seed: u64) {
        ours_to_theirs(&kind, &ops);
        theirs_to_ours(&kind, &ops, seed);
    }

    #[test]
    fn vdi_agrees_with_qemu_both_ways((kind, ops) in with_steps(any_vdi()), seed: u64) {
        ours_to_theirs(&kind, &ops);
        theirs_to_ours(&kind, &ops, seed);
    }

    #[test]
    fn vmdk_agrees_with_qemu_both_ways((kind, ops) in with_steps(any_vmdk()), seed: u64) {
        ours_to_theirs(&kind, &ops);
        theirs_to_ours(&kind, &ops, seed);
    }
}
