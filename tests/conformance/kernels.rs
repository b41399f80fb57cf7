//! The CUDA kernels on the SIMT machine: the tables of cases, and that they leave no kernel out.
//!
//! Names of tests that run kernels contain "kernel": `tests/sanitize-kernels.sh` runs those again
//! under sanitizers.

use std::sync::Once;

use tokenmill::tensor::DType;

use crate::on_device::OnDevice;
use crate::shim::{self, Shim};
use crate::{rows, sample};

/// A device with activations of bf16 or f16.
fn simt(activations: DType) -> OnDevice<Shim> {
    OnDevice::new(Shim::new(), activations)
}

/// Cases that run once per process, whoever asks for them first.
struct Table {
    check: fn(),
    once: Once,
}

impl Table {
    const fn new(check: fn()) -> Table {
        Table { check, once: Once::new() }
    }

    /// Returns when the cases have passed; panics when they failed, here or elsewhere.
    fn pass(&self) {
        self.once.call_once(self.check);
    }
}

static ROWS: Table = Table::new(|| {
    rows::check(&simt(DType::BF16));
    rows::check(&simt(DType::F16));
});
static SAMPLE: Table = Table::new(|| sample::check(&simt(DType::BF16)));

/// All of them.
static TABLES: [&Table; 2] = [&ROWS, &SAMPLE];

#[test]
fn row_kernels_agree_with_the_referee() {
    ROWS.pass();
}

#[test]
fn the_sampling_kernel_agrees_with_the_referee() {
    SAMPLE.pass();
}

#[test]
fn every_kernel_has_a_case() {
    for table in TABLES {
        table.pass();
    }
    let launched = shim::launched_kernels();
    let exported = shim::exported_kernels();
    assert!(!exported.is_empty());
    let missing: Vec<_> =
        exported.iter().filter(|name| !launched.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "no case launches {missing:?}");
}

/// What is not exported would not be missed above.
#[test]
fn every_kernel_is_exported() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "cu") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let kernels = text.matches("extern \"C\" __global__").count();
        let exports = text.matches("SIMT_EXPORT(").count();
        assert_eq!(kernels, exports, "{}: a SIMT_EXPORT for every kernel", path.display());
    }
}
