//! The CUDA kernels on the SIMT machine: the tables of cases, and that they leave no kernel out.
//!
//! Names of tests that run kernels contain "kernel": `tests/sanitize-kernels.sh` runs those again
//! under sanitizers.

use std::path::{Path, PathBuf};
use std::sync::Once;

use tokenmill::tensor::DType;

use crate::on_device::OnDevice;
use crate::shim::{self, Shim};
use crate::{all_reduce, attention_kernels, cuda_fp8, cuda_matmul, experts, latent, rows, sample};

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
static ATTENTION: Table = Table::new(|| {
    attention_kernels::check(&simt(DType::BF16));
    attention_kernels::check_empty_contexts(&simt(DType::BF16));
});
static MATMUL: Table = Table::new(|| {
    cuda_matmul::check();
    cuda_matmul::check_gated();
});
static DENSE_MATMUL: Table = Table::new(cuda_matmul::check_dense);
static FP8: Table = Table::new(|| {
    cuda_fp8::check_codes();
    cuda_fp8::check_products();
    cuda_fp8::check_refused();
    cuda_fp8::check_gated();
    cuda_fp8::check_tables();
    experts::check_fp8_rows(&cuda_fp8::simt_with_library());
});

static ALL_REDUCE: Table = Table::new(all_reduce::check);
static EXPERTS: Table = Table::new(|| {
    experts::check_routing(&simt(DType::BF16));
    experts::check_on_device(&simt(DType::BF16));
});

static LATENT: Table = Table::new(|| {
    latent::check_products(&simt(DType::BF16));
    latent::check_writes(&simt(DType::BF16));
    latent::check_add(&simt(DType::BF16));
    latent::check_kernels(&simt(DType::BF16), &simt(DType::BF16));
});

/// All of them.
static TABLES: [&Table; 9] =
    [&ROWS, &SAMPLE, &ATTENTION, &MATMUL, &DENSE_MATMUL, &FP8, &ALL_REDUCE, &EXPERTS, &LATENT];

#[test]
fn row_kernels_agree_with_the_referee() {
    ROWS.pass();
}

#[test]
fn the_sampling_kernel_agrees_with_the_referee() {
    SAMPLE.pass();
}

#[test]
fn attention_kernels_agree_with_the_referee() {
    ATTENTION.pass();
}

#[test]
fn ranks_of_all_reduce_kernels_get_the_sums_that_the_host_adds() {
    ALL_REDUCE.pass();
}

#[test]
fn no_bit_of_attention_kernels_depends_on_how_work_is_cut() {
    attention_kernels::check_invariance(&simt(DType::BF16), &simt(DType::BF16));
}

#[test]
fn matmul_kernels_agree_with_the_referee_and_fused_ones_with_their_steps() {
    MATMUL.pass();
}

#[test]
fn dense_matmul_kernels_agree_with_the_referee() {
    DENSE_MATMUL.pass();
}

#[test]
fn fp8_kernels_agree_with_the_referee_whose_activations_are_rounded_per_token() {
    FP8.pass();
}

#[test]
fn fp8_lies_in_rows_where_a_device_and_its_library_multiply_it() {
    cuda_fp8::check_choice();
}

#[test]
fn dense_products_of_many_rows_are_a_librarys_where_there_is_one() {
    cuda_fp8::check_dense();
}

#[test]
fn bits_of_a_row_of_a_matmul_kernel_depend_on_the_kernel_alone() {
    cuda_matmul::check_invariance();
}

#[test]
fn projections_of_one_launch_of_a_matmul_kernel_equal_projections_alone() {
    cuda_matmul::check_projections();
}

#[test]
fn matmul_kernels_take_no_memory_after_reserve() {
    cuda_matmul::check_scratch();
}

#[test]
fn expert_kernels_agree_with_the_referee() {
    EXPERTS.pass();
}

#[test]
fn bits_of_a_token_of_expert_kernels_do_not_depend_on_its_company() {
    experts::check_device_invariance(&simt(DType::BF16));
    experts::check_passes(&simt(DType::BF16));
}

#[test]
fn expert_kernels_take_no_memory_after_reserve() {
    experts::check_scratch();
}

#[test]
fn latent_kernels_agree_with_the_referee_however_work_is_cut() {
    LATENT.pass();
}

#[test]
fn experts_that_no_kernel_multiplies_together_are_refused() {
    experts::check_refusals();
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
        exported.iter().filter(|name| !launched.contains_key(name.as_str())).collect();
    assert!(missing.is_empty(), "no case launches {missing:?}");
}

/// What a kernel file says of launches, for `scripts/kernels-report.py`: pattern, key, value.
fn notes() -> Vec<(String, String, u32)> {
    let mut notes = Vec::new();
    for path in kernel_files() {
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text.lines().filter_map(|line| line.strip_prefix("// Report: ")) {
            let mut words = line.split(':').next().unwrap().split_whitespace();
            let pattern = words.next().unwrap();
            let pairs = words.filter_map(|word| word.split_once('='));
            for (key, value) in pairs.filter(|(key, _)| matches!(*key, "threads" | "dynamic")) {
                notes.push((pattern.to_owned(), key.to_owned(), value.parse().unwrap()));
            }
        }
    }
    notes
}

/// Whether a name has the form of a pattern, in which `*` is any letters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|tail| {
            (0..=tail.len()).any(|i| tail.get(i..).is_some_and(|tail| matches(rest, tail)))
        }),
    }
}

/// The report's occupancy is that of real launches.
#[test]
fn kernels_are_launched_as_their_notes_say() {
    for table in TABLES {
        table.pass();
    }
    let notes = notes();
    let note = |name: &str, key: &str| {
        let of_name =
            |(pattern, noted, _): &&(String, String, u32)| noted == key && matches(pattern, name);
        notes.iter().rfind(of_name).map(|(_, _, value)| *value)
    };
    let mut wrong = Vec::new();
    for (name, launched) in shim::launched_kernels() {
        let threads = note(name, "threads").unwrap_or(u32::MAX);
        let (dynamic, [least, most]) = (note(name, "dynamic").unwrap_or(0), launched.shared_bytes);
        // Where shared memory depends on a step's rows, the note is one of many.
        let is_right = if least == most { dynamic == most } else { dynamic <= most };
        if launched.threads > threads || !is_right {
            wrong.push(format!("{name}: {launched:?}, not {threads} threads, {dynamic} bytes"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn kernel_files() -> impl Iterator<Item = PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
}

/// What is not exported would not be missed above.
#[test]
fn every_kernel_is_exported() {
    for path in kernel_files() {
        let text = std::fs::read_to_string(&path).unwrap();
        let kernels = text.matches("extern \"C\" __global__").count();
        let exports = text.matches("SIMT_EXPORT(").count();
        assert_eq!(kernels, exports, "{}: a SIMT_EXPORT for every kernel", path.display());
    }
}
