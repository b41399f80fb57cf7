//! Properties of the scheduler over random workloads.

use std::hash::Hasher;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use tokenmill::request::{RequestId, SamplingParams, StopConditions, TokenizedRequest};

use crate::simulation::Simulation;
use crate::workload::{Workload, workloads};

fn requests(workload: &Workload) -> impl Iterator<Item = TokenizedRequest> {
    workload.arrivals.iter().map(|arrival| arrival.request.clone())
}

/// A prompt that needs every block of the pool.
fn request_for_whole_pool(simulation: &Simulation) -> TokenizedRequest {
    let params = &simulation.params;
    let len = (params.num_blocks * params.block_size).min(params.max_model_len - 1);
    TokenizedRequest {
        id: RequestId("last".into()),
        prompt_token_ids: (100..100 + len as u32).collect(),
        sampling: Arc::new(SamplingParams::greedy()),
        stop: StopConditions { max_tokens: Some(1), ..StopConditions::default() },
        n: 1,
        priority: 0,
        cache_salt: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_once_with_the_tokens_it_would_have_alone(workload in workloads()) {
        let simulation = Simulation::run(&workload);
        simulation.check_outcomes(requests(&workload));
    }

    #[test]
    fn no_block_is_lost(workload in workloads()) {
        let mut simulation = Simulation::run(&workload);
        prop_assert_eq!(simulation.scheduler.stats().kv.num_in_use, 0);
        prop_assert_eq!(simulation.scheduler.num_running(), 0);
        prop_assert_eq!(simulation.scheduler.num_waiting(), 0);
        if !workload.params.enable_prefix_caching {
            prop_assert_eq!(simulation.scheduler.stats().kv.num_cached, 0);
        }
        let last = request_for_whole_pool(&simulation);
        simulation.admit(&last);
        while simulation.scheduler.has_work() {
            simulation.step();
        }
        simulation.check_outcomes([last].into_iter());
    }

    #[test]
    fn the_same_calls_give_the_same_plans(workload in workloads()) {
        let digest = || Simulation::run(&workload).digest.finish();
        prop_assert_eq!(digest(), digest());
    }
}

#[test]
fn the_workloads_reach_every_corner() {
    let mut runner = TestRunner::deterministic();
    let (mut preempted, mut hits, mut copies, mut refused, mut aborted) = (0, 0, 0, 0, 0);
    let mut ahead = 0;
    for _ in 0..300 {
        let workload = workloads().new_tree(&mut runner).unwrap().current();
        let simulation = Simulation::run(&workload);
        let stats = simulation.scheduler.stats();
        preempted += stats.num_preempted;
        hits += stats.prefix_cache_hits;
        copies += simulation.num_copies;
        ahead += simulation.num_planned_ahead;
        refused += simulation.refused.len();
        aborted += simulation.outcomes.values().filter(|o| o.tokens.is_empty()).count();
    }
    let counts = [preempted as usize, hits as usize, copies, refused, aborted, ahead];
    assert!(counts.iter().all(|&count| count > 100), "{counts:?}");
}
