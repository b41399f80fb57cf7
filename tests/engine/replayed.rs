//! Decode steps that are recorded once and replayed, on the SIMT machine: filled up to buckets,
//! with inputs that change from step to step, they yield what launching every kernel yields.
//!
//! Table widths differ between both, and with them how attention is cut into parts, so sums may
//! be added in another order: tokens are equal, log-probabilities close.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokenmill::config::{CpuIsa, KvCacheDtype};
use tokenmill::device::RankContext;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::request::{RequestId, SamplingParams, TokenizedRequest};
use tokenmill::runner::StepRunner;

use crate::decoded::{ROOMY, Setting, Trace, request, run_on, runner_on, scheduler};
use crate::shim::Shim;

/// bf16 has eight bits, and every product and sum of a few layers is rounded to them.
const CLOSE: f32 = 0.05;

fn traces(
    ops: CudaOps<Shim>,
    requests: &[TokenizedRequest],
    setting: &Setting,
) -> BTreeMap<(RequestId, u32), Trace> {
    let runner = runner_on(&RankContext::solo(Arc::new(ops)), setting);
    run_on(runner, requests.to_vec(), setting).0
}

/// Five requests that arrive one after the other, so that batches of one to five sequences are
/// decoded; one of them brings three continuations that share blocks and copy them.
fn requests() -> Vec<TokenizedRequest> {
    let greedy = |i| request(i, SamplingParams::greedy(), 6, 1);
    let sampling = SamplingParams { temperature: 1.0, seed: 3, ..SamplingParams::default() };
    let mut requests: Vec<_> = (0..4).map(greedy).collect();
    requests.push(request(4, sampling, 6, 3));
    requests
}

fn assert_alike(
    found: &BTreeMap<(RequestId, u32), Trace>,
    expected: &BTreeMap<(RequestId, u32), Trace>,
) {
    assert!(found.keys().eq(expected.keys()));
    for ((key, found), expected) in found.iter().zip(expected.values()) {
        let ids = |trace: &Trace| trace.iter().map(|token| token.0).collect::<Vec<_>>();
        assert_eq!(ids(found), ids(expected), "{key:?}");
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            let (a, b) = (f32::from_bits(a.1), f32::from_bits(b.1));
            assert!((a - b).abs() <= CLOSE, "{key:?}, token {i}: {a} instead of {b}");
        }
    }
}

#[test]
fn replayed_steps_yield_what_launched_ones_yield() {
    for kv_dtype in [KvCacheDtype::Auto, KvCacheDtype::Int8] {
        let setting = Setting { kv_dtype, num_blocks: 64, ..ROOMY };
        let requests = requests();
        let launched = traces(CudaOps::new(Shim::new()).eager(), &requests, &setting);
        let replayed = traces(CudaOps::new(Shim::new()), &requests, &setting);
        assert_alike(&replayed, &launched);
    }
}

/// In how many steps of a request the host had time while they were computed, and in how many it
/// planned the next in that time.
fn planned_ahead(rank: &RankContext) -> [usize; 2] {
    let (mut runner, mut scheduler) = (runner_on(rank, &ROOMY), scheduler(&ROOMY));
    scheduler.admit(request(0, SamplingParams::greedy(), 5, 1)).expect("the request fits");
    let mut counts = [0, 0];
    while scheduler.has_work() {
        let batch = scheduler.plan();
        let results = runner.execute_beside(&batch, &mut || {
            counts[0] += 1;
            counts[1] += usize::from(scheduler.plan_ahead(&batch));
        });
        scheduler.commit(&batch, results.expect("the step succeeds"));
    }
    counts
}

#[test]
fn steps_are_planned_while_a_device_computes() {
    let device = RankContext::solo(Arc::new(CudaOps::new(Shim::new())));
    assert_eq!(planned_ahead(&device), [5, 4], "nothing follows the fifth and last token");
    let cpu = CpuOps::new(Some(1), CpuIsa::Auto).expect("this machine has a CPU");
    assert_eq!(planned_ahead(&RankContext::solo(Arc::new(cpu))), [0, 0], "it has no time");
}
