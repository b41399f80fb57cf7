//! Random workloads: who arrives when, wants what, and hangs up.

use std::sync::Arc;

use proptest::prelude::*;

use tokenmill::config::SchedulingPolicy;
use tokenmill::request::{RequestId, SamplingParams, StopConditions, TokenizedRequest};
use tokenmill::scheduler::SchedulerParams;

use crate::oracle::{EOS, STOP};

/// One client.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Before which step it comes.
    pub step: usize,
    /// What it wants.
    pub request: TokenizedRequest,
    /// After how many further steps it hangs up, and on which continuation.
    pub abort: Option<(usize, Option<u32>)>,
}

/// A scheduler's limits and its clients.
#[derive(Clone, Debug)]
pub struct Workload {
    pub params: SchedulerParams,
    pub arrivals: Vec<Arrival>,
}

/// Small pools and budgets, so that everything is short all the time.
pub fn workloads() -> impl Strategy<Value = Workload> {
    let limits = (
        prop_oneof![Just(1usize), Just(2), Just(4), Just(8)],
        1..40usize,
        1..8usize,
        1..40usize,
        any::<bool>(),
        prop_oneof![Just(SchedulingPolicy::Fcfs), Just(SchedulingPolicy::Priority)],
    );
    (limits, prop::collection::vec(arrivals(), 1..20)).prop_map(|(limits, arrivals)| {
        let (block_size, num_blocks, max_num_seqs, budget, enable_prefix_caching, policy) = limits;
        let params = SchedulerParams {
            max_num_seqs,
            max_num_batched_tokens: budget,
            max_model_len: 60,
            policy,
            block_size,
            num_blocks,
            enable_prefix_caching,
            eos_token_ids: vec![EOS],
        };
        let name = |(i, arrival): (usize, Arrival)| {
            let id = RequestId(format!("request-{i}").into());
            Arrival { request: TokenizedRequest { id, ..arrival.request }, ..arrival }
        };
        Workload { params, arrivals: arrivals.into_iter().enumerate().map(name).collect() }
    })
}

fn arrivals() -> impl Strategy<Value = Arrival> {
    let aborts = prop::option::weighted(0.25, (0..30usize, prop::option::of(0..3u32)));
    (0..25usize, requests(), aborts).prop_map(|(step, request, abort)| Arrival {
        step,
        request,
        abort,
    })
}

fn requests() -> impl Strategy<Value = TokenizedRequest> {
    let salt = prop::option::weighted(0.2, Just("salt".to_owned()));
    (prompts(), sampling(), stops(), 1..4u32, -2..3i32, salt).prop_map(
        |(prompt_token_ids, sampling, stop, n, priority, cache_salt)| TokenizedRequest {
            id: RequestId("unnamed".into()),
            prompt_token_ids,
            sampling: Arc::new(sampling),
            stop,
            n,
            priority,
            cache_salt,
        },
    )
}

/// Few families with long common prefixes, which may fork anywhere.
fn prompts() -> impl Strategy<Value = Vec<u32>> {
    (0..2u32, 1..40usize, 0..40usize, 0..3u32).prop_map(|(family, len, fork, branch)| {
        let token = |i: usize| 10 + (i as u32 * 7 + family * 3) % 30;
        (0..len).map(|i| if i < fork { token(i) } else { token(i + branch as usize) }).collect()
    })
}

fn sampling() -> impl Strategy<Value = SamplingParams> {
    let scores = prop::option::weighted(0.15, Just(0u32));
    (0..3u64, scores, any::<bool>()).prop_map(|(seed, prompt_logprobs, penalised)| SamplingParams {
        seed,
        prompt_logprobs,
        presence_penalty: if penalised { 0.5 } else { 0.0 },
        ..SamplingParams::default()
    })
}

fn stops() -> impl Strategy<Value = StopConditions> {
    (prop::option::of(0..40u32), 0..6u32, any::<bool>(), any::<bool>()).prop_map(
        |(max_tokens, min_tokens, stops, ignore_eos)| StopConditions {
            max_tokens,
            min_tokens,
            stop_token_ids: if stops { vec![STOP] } else { Vec::new() },
            ignore_eos,
            stop: Vec::new(),
        },
    )
}
