//! Every backend against the referee, and the referee against candle.
//!
//! Each module holds one table of cases and a function `check(&dyn Ops)`; the tests below run
//! all tables on every backend that this machine can offer. Outputs start as NaN, and rows
//! around them are checked to be untouched.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod all_reduce;
mod attention;
mod attention_kernels;
mod candle;
mod cuda_fp8;
mod cuda_matmul;
mod experts;
mod greedy;
mod invariance;
mod kernels;
mod latent;
mod matmul;
mod normed;
mod on_device;
mod recording;
mod rows;
mod sample;
#[path = "../support/shim/mod.rs"]
mod shim;
mod simt;
mod support;

use support::{backends, for_each_backend};
use tokenmill::config::CpuIsa;
use tokenmill::ops::Ops;
use tokenmill::ops::cpu::{CpuError, CpuOps, Isa};

#[test]
fn row_operations_agree_with_the_referee() {
    for_each_backend(rows::check);
}

#[test]
fn matmul_agrees_with_the_referee() {
    for_each_backend(matmul::check);
    for_each_backend(matmul::check_quantized);
    for_each_backend(matmul::check_large_results);
}

#[test]
fn rows_normed_on_their_way_to_a_product_have_the_bits_of_rows_normed_before() {
    for_each_backend(normed::check);
}

#[test]
fn experts_agree_with_the_referee() {
    for_each_backend(experts::check_routing);
    experts::check_products(&backends());
}

#[test]
fn attention_agrees_with_the_referee() {
    attention::check(&backends());
}

#[test]
fn latent_attention_agrees_with_the_referee() {
    for_each_backend(latent::check_products);
    for_each_backend(latent::check_writes);
    for_each_backend(latent::check_add);
    let backends = backends();
    latent::check_attention(&backends.iter().map(|ops| ops as &dyn Ops).collect::<Vec<_>>());
}

#[test]
fn the_sampler_agrees_with_the_referee() {
    for_each_backend(sample::check);
}

#[test]
fn greedy_tokens_are_the_samplers_with_and_without_logits() {
    for_each_backend(greedy::check);
}

#[test]
fn no_result_depends_on_the_batch() {
    for_each_backend(invariance::check);
    for_each_backend(experts::check_invariance);
    for_each_backend(latent::check_invariance);
    for_each_backend(latent::check_product_rows);
}

#[test]
fn no_result_depends_on_the_number_of_threads() {
    for isa in Isa::supported() {
        let one = CpuOps::new(Some(1), isa.choice()).unwrap();
        let two = CpuOps::new(Some(2), isa.choice()).unwrap();
        let three = CpuOps::new(Some(3), isa.choice()).unwrap();
        invariance::check_equal(&one, &two);
        invariance::check_equal(&one, &three);
        experts::check_equal(&one, &two);
        latent::check_equal(&one, &two);
    }
}

#[test]
fn a_missing_instruction_set_is_refused_by_name() {
    let supported: Vec<CpuIsa> = Isa::supported().into_iter().map(Isa::choice).collect();
    for isa in [CpuIsa::Scalar, CpuIsa::Avx2, CpuIsa::Avx512] {
        match CpuOps::new(Some(1), isa) {
            Ok(ops) => assert!(supported.contains(&isa) && ops.isa().choice() == isa),
            Err(CpuError::UnsupportedIsa { wanted, supported: names }) => {
                assert!(!supported.contains(&isa));
                assert_eq!(wanted, format!("{isa:?}").to_lowercase());
                assert!(names.ends_with("scalar"), "{names}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(matches!(CpuOps::new(Some(0), CpuIsa::Auto), Err(CpuError::NoThreads)));
}

#[test]
fn a_backend_names_its_instructions_and_threads() {
    assert_eq!(CpuOps::new(Some(2), CpuIsa::Scalar).unwrap().name(), "cpu (scalar, 2 threads)");
    assert_eq!(CpuOps::new(Some(1), CpuIsa::Scalar).unwrap().name(), "cpu (scalar, 1 thread)");
}
