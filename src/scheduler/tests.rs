//! Examples of what plans look like; the properties that hold for all are in `tests/engine`.

use super::batch::{ScheduledBatch, StepTokens};
use super::*;
use crate::output::{SampledToken, TokenLogprobs};
use crate::request::{SamplingParams, SeenToken, StopConditions};

const BLOCK_SIZE: usize = 4;
const EOS: u32 = 2;

fn params() -> SchedulerParams {
    SchedulerParams {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 256,
        policy: SchedulingPolicy::Fcfs,
        block_size: BLOCK_SIZE,
        num_blocks: 32,
        enable_prefix_caching: true,
        eos_token_ids: vec![EOS],
    }
}

fn id(name: &str) -> RequestId {
    RequestId(name.into())
}

fn request(name: &str, prompt: impl IntoIterator<Item = u32>) -> TokenizedRequest {
    TokenizedRequest {
        id: id(name),
        prompt_token_ids: prompt.into_iter().collect(),
        sampling: Arc::new(SamplingParams::greedy()),
        stop: StopConditions { max_tokens: Some(100), ..StopConditions::default() },
        n: 1,
        priority: 0,
        cache_salt: None,
    }
}

/// Answers every sampling sequence with `token`, every score with the target's number.
fn answer(batch: &ScheduledBatch, token: u32) -> Vec<StepTokens> {
    let score = |&target: &u32| TokenLogprobs { logprob: -(target as f32), ..Default::default() };
    let sampled = SampledToken { token_id: token, logprobs: None };
    batch
        .sequences
        .iter()
        .map(|seq| StepTokens {
            sampled: if seq.samples { vec![sampled.clone()] } else { Vec::new() },
            scores: batch.score_targets[seq.scores.clone()].iter().map(score).collect(),
        })
        .collect()
}

fn step(scheduler: &mut Scheduler, token: u32) -> (ScheduledBatch, Vec<TokenEvent>) {
    let batch = scheduler.plan();
    let events = scheduler.commit(&batch, answer(&batch, token));
    (batch, events)
}

fn lens(batch: &ScheduledBatch) -> Vec<usize> {
    batch.sequences.iter().map(|seq| seq.tokens.len()).collect()
}

fn finishes(events: &[TokenEvent]) -> Vec<(u32, FinishReason)> {
    events.iter().filter_map(|e| Some((e.index, e.finish.clone()?))).collect()
}

#[test]
fn a_long_prompt_is_computed_in_chunks_beside_a_decode() {
    let mut scheduler = Scheduler::new(SchedulerParams { max_num_batched_tokens: 8, ..params() });
    scheduler.admit(request("short", 10..13)).unwrap();
    scheduler.admit(request("long", 20..40)).unwrap();
    let (first, _) = step(&mut scheduler, 50);
    assert_eq!(lens(&first), [3, 5]);
    assert!(!first.sequences[1].samples, "its prompt is not complete");
    let (second, _) = step(&mut scheduler, 51);
    assert_eq!(lens(&second), [1, 7], "the decode keeps its token of the budget");
    assert_eq!(second.sequences[1].start_position, 5);
    assert_eq!(second.token_ids, [50, 25, 26, 27, 28, 29, 30, 31]);
    let (third, _) = step(&mut scheduler, 52);
    assert_eq!(lens(&third), [1, 7]);
    let (fourth, events) = step(&mut scheduler, 53);
    assert_eq!(lens(&fourth), [1, 1]);
    assert!(fourth.sequences[1].samples);
    assert_eq!(events.len(), 2);
}

#[test]
fn a_decode_keeps_its_budget_when_an_earlier_prompt_is_still_being_computed() {
    let policy = SchedulingPolicy::Priority;
    let limits = SchedulerParams { policy, max_num_batched_tokens: 8, ..params() };
    let mut scheduler = Scheduler::new(limits);
    scheduler.admit(request("decoding", 10..13)).unwrap();
    step(&mut scheduler, 50);
    scheduler.admit(TokenizedRequest { priority: -1, ..request("urgent", 20..40) }).unwrap();
    step(&mut scheduler, 51);
    let (batch, _) = step(&mut scheduler, 52);
    assert_eq!(lens(&batch), [7, 1], "the urgent prompt comes first, but leaves one token");
}

#[test]
fn a_repeated_prompt_is_found_in_the_cache_except_for_its_last_token() {
    let mut scheduler = Scheduler::new(params());
    scheduler.admit(request("a", 10..18)).unwrap();
    let (_, events) = step(&mut scheduler, EOS);
    assert_eq!(events[0].prompt.as_ref().map(|p| p.num_cached_tokens), Some(0));
    scheduler.admit(request("b", 10..18)).unwrap();
    let (batch, events) = step(&mut scheduler, EOS);
    assert_eq!(batch.sequences[0].start_position, 4, "the last block is computed for its logits");
    assert_eq!(events[0].prompt.as_ref().map(|p| p.num_cached_tokens), Some(4));
    let stats = scheduler.stats();
    assert_eq!((stats.prefix_cache_queries, stats.prefix_cache_hits), (16, 4));
    assert_eq!(scheduler.step_report().prefix_cache_hits, 4);
}

#[test]
fn another_salt_shares_nothing() {
    let mut scheduler = Scheduler::new(params());
    scheduler.admit(request("a", 10..19)).unwrap();
    step(&mut scheduler, EOS);
    let salted = TokenizedRequest { cache_salt: Some("s".into()), ..request("b", 10..19) };
    scheduler.admit(salted).unwrap();
    let (batch, _) = step(&mut scheduler, EOS);
    assert_eq!(batch.sequences[0].start_position, 0);
}

#[test]
fn a_reset_forgets_prefixes_of_finished_and_running_sequences() {
    let mut scheduler = Scheduler::new(params());
    scheduler.admit(request("a", 10..19)).unwrap();
    step(&mut scheduler, 5);
    scheduler.reset_prefix_cache();
    for _ in 0..8 {
        step(&mut scheduler, 5);
    }
    scheduler.abort(&id("a"), None);
    assert_eq!(scheduler.stats().kv.num_cached, 0, "blocks from before the reset are stale");
    scheduler.admit(request("b", 10..19)).unwrap();
    let (batch, _) = step(&mut scheduler, EOS);
    assert_eq!(batch.sequences[0].start_position, 0);
}

#[test]
fn continuations_share_the_prompt_and_copy_its_partial_block() {
    for (prompt_len, num_shared, num_copies) in [(10, 2, 2), (9, 2, 0), (8, 1, 2), (1, 0, 0)] {
        let mut scheduler =
            Scheduler::new(SchedulerParams { enable_prefix_caching: false, ..params() });
        let prompt = 10..10 + prompt_len;
        scheduler.admit(TokenizedRequest { n: 3, ..request("a", prompt) }).unwrap();
        let (first, _) = step(&mut scheduler, 5);
        assert_eq!(first.sequences.len(), 1);
        let (second, events) = step(&mut scheduler, 6);
        assert_eq!(lens(&second), [1, 1, 1]);
        assert_eq!(second.copies.len(), num_copies, "prompt of {prompt_len}");
        assert_eq!(events.iter().map(|e| e.index).collect::<Vec<_>>(), [0, 1, 2]);
        let table = |i: usize| &second.block_ids[second.sequences[i].blocks.clone()];
        for other in [1, 2] {
            assert_eq!(second.sequences[other].start_position, prompt_len - 1);
            assert_eq!(table(other)[..num_shared], table(0)[..num_shared]);
            assert!(table(other)[num_shared..].iter().all(|block| !table(0).contains(block)));
        }
        assert_ne!(second.sequences[1].seed, second.sequences[2].seed);
    }
}

#[test]
fn continuations_go_on_without_the_one_that_computed_the_prompt() {
    let mut scheduler = Scheduler::new(params());
    scheduler.admit(TokenizedRequest { n: 2, ..request("a", 10..20) }).unwrap();
    assert_eq!(finishes(&scheduler.abort(&id("a"), Some(0))), [(0, FinishReason::Abort)]);
    let (batch, events) = step(&mut scheduler, EOS);
    assert_eq!(lens(&batch), [10]);
    assert_eq!(finishes(&events), [(1, FinishReason::EndOfText)]);
    assert!(!scheduler.has_work());
}

#[test]
fn a_preempted_sequence_keeps_its_cached_prefix() {
    let mut scheduler = Scheduler::new(SchedulerParams { num_blocks: 7, ..params() });
    scheduler.admit(request("a", 10..22)).unwrap();
    step(&mut scheduler, 50);
    scheduler.admit(request("b", 30..38)).unwrap();
    let mut preempted_after = 1;
    while scheduler.newly_preempted().is_empty() {
        step(&mut scheduler, 51);
        preempted_after += 1;
        assert!(preempted_after < 20, "the pool is too small for both");
    }
    assert_eq!(scheduler.newly_preempted(), [id("b")]);
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 1));
    scheduler.abort(&id("a"), None);
    let (batch, events) = step(&mut scheduler, EOS);
    assert!(batch.sequences[0].start_position >= 4, "at least a block survived");
    assert_eq!(finishes(&events), [(0, FinishReason::EndOfText)]);
    assert!(scheduler.newly_started().is_empty(), "it had started before");
}

#[test]
fn nobody_overtakes_a_request_that_waits_for_blocks() {
    let mut scheduler = Scheduler::new(SchedulerParams { num_blocks: 8, ..params() });
    scheduler.admit(request("running", 10..26)).unwrap();
    step(&mut scheduler, 5);
    scheduler.admit(request("large", 30..50)).unwrap();
    scheduler.admit(request("small", 60..62)).unwrap();
    let (batch, _) = step(&mut scheduler, 5);
    assert_eq!(batch.sequences.len(), 1, "the small one would fit, but came later");
}

#[test]
fn a_sequence_that_fills_the_pool_ends_with_length() {
    let mut scheduler = Scheduler::new(SchedulerParams { num_blocks: 2, ..params() });
    scheduler.admit(request("a", 10..16)).unwrap();
    let mut tokens = 0;
    let finish = loop {
        let (_, events) = step(&mut scheduler, 5);
        tokens += events[0].tokens.len();
        if let Some(finish) = &events[0].finish {
            break finish.clone();
        }
    };
    assert_eq!(finish, FinishReason::Length);
    assert_eq!(tokens, 3, "eight slots, and one token that needs none");
    assert_eq!(scheduler.stats().kv.num_in_use, 0);
}

#[test]
fn requests_that_can_never_run_are_refused() {
    let mut scheduler = Scheduler::new(SchedulerParams { num_blocks: 4, ..params() });
    let refusal = |s: &mut Scheduler, r| s.admit(r).unwrap_err();
    assert_eq!(refusal(&mut scheduler, request("a", [])), AdmitError::EmptyPrompt);
    let none = TokenizedRequest { n: 0, ..request("a", 0..3) };
    assert_eq!(refusal(&mut scheduler, none), AdmitError::NoContinuations);
    let too_long = refusal(&mut scheduler, request("a", 0..256));
    assert_eq!(too_long, AdmitError::PromptTooLong { prompt_len: 256, max_model_len: 256 });
    let exceeds = refusal(&mut scheduler, request("a", 0..17));
    assert_eq!(exceeds, AdmitError::ExceedsKvCache { prompt_len: 17, needed: 5, num_blocks: 4 });
    assert!(!scheduler.has_work());
    scheduler.admit(request("a", 0..16)).unwrap();
    let twice = refusal(&mut scheduler, request("a", 0..3));
    assert_eq!(twice, AdmitError::DuplicateId { id: id("a") });
}

#[test]
fn prompt_logprobs_are_complete_over_chunks_and_skip_the_cache() {
    let mut scheduler = Scheduler::new(SchedulerParams { max_num_batched_tokens: 5, ..params() });
    let mut scored = request("a", 10..22);
    scored.sampling =
        Arc::new(SamplingParams { prompt_logprobs: Some(1), ..SamplingParams::greedy() });
    for name in ["a", "b"] {
        scored.id = id(name);
        scheduler.admit(scored.clone()).unwrap();
        let mut reports = Vec::new();
        while scheduler.has_work() {
            let (_, events) = step(&mut scheduler, EOS);
            reports.extend(events.into_iter().filter_map(|event| event.prompt));
        }
        assert_eq!(reports.len(), 1);
        let logprobs: Vec<_> =
            reports[0].logprobs.iter().map(|l| l.as_ref().map(|l| l.logprob)).collect();
        let expected: Vec<_> =
            std::iter::once(None).chain((11..22).map(|t| Some(-(t as f32)))).collect();
        assert_eq!(logprobs, expected);
        assert_eq!(reports[0].num_cached_tokens, 0);
    }
}

#[test]
fn scoring_alone_samples_nothing() {
    let mut scheduler = Scheduler::new(params());
    let mut scored = TokenizedRequest { n: 2, ..request("a", 10..22) };
    scored.stop.max_tokens = Some(0);
    scheduler.admit(scored).unwrap();
    let (batch, events) = step(&mut scheduler, 5);
    assert!(!batch.sequences[0].samples);
    assert_eq!(finishes(&events), [(0, FinishReason::Length), (1, FinishReason::Length)]);
    assert!(!scheduler.has_work());
}

#[test]
fn ends_are_told_apart_and_the_end_token_is_part_of_the_event() {
    let cases = [
        (EOS, false, FinishReason::EndOfText),
        (7, false, FinishReason::StopToken(7)),
        (EOS, true, FinishReason::Length),
    ];
    for (token, ignore_eos, expected) in cases {
        let mut scheduler = Scheduler::new(params());
        let mut stopping = request("a", 10..12);
        stopping.stop = StopConditions {
            max_tokens: Some(1),
            stop_token_ids: vec![7],
            ignore_eos,
            ..StopConditions::default()
        };
        scheduler.admit(stopping).unwrap();
        let (_, events) = step(&mut scheduler, token);
        assert_eq!(finishes(&events), [(0, expected)]);
        assert_eq!(events[0].tokens[0].token_id, token);
    }
}

#[test]
fn end_tokens_are_banned_before_min_tokens_and_penalties_see_the_past() {
    let mut scheduler = Scheduler::new(params());
    let mut penalised = request("a", 10..12);
    penalised.stop.min_tokens = 1;
    penalised.stop.stop_token_ids = vec![7];
    penalised.sampling =
        Arc::new(SamplingParams { presence_penalty: 1.0, ..SamplingParams::greedy() });
    scheduler.admit(penalised).unwrap();
    let (first, _) = step(&mut scheduler, 5);
    assert_eq!(first.banned[first.sequences[0].banned.clone()], [EOS, 7]);
    let seen = |token_id, times_generated| SeenToken { token_id, times_generated };
    assert_eq!(first.seen[first.sequences[0].seen.clone()], [seen(10, 0), seen(11, 0)]);
    let (second, _) = step(&mut scheduler, 6);
    assert!(second.banned.is_empty());
    assert_eq!(
        second.seen[second.sequences[0].seen.clone()],
        [seen(10, 0), seen(11, 0), seen(5, 1)]
    );
}

#[test]
fn results_for_sequences_aborted_since_the_plan_are_dropped() {
    let mut scheduler = Scheduler::new(params());
    scheduler.admit(request("a", 10..12)).unwrap();
    let batch = scheduler.plan();
    assert_eq!(scheduler.newly_started(), [id("a")]);
    scheduler.abort(&id("a"), None);
    assert!(scheduler.commit(&batch, answer(&batch, 5)).is_empty());
    assert!(!scheduler.has_work());
    assert!(scheduler.plan().is_empty());
}

/// Six plans with reports, each followed up or not; `between` happens while step 1 is computed,
/// which yields `token`.
fn plans(ahead: bool, between: impl Fn(&mut Scheduler), token: u32) -> Vec<String> {
    let mut scheduler = Scheduler::new(params());
    scheduler.admit(request("a", 10..14)).unwrap();
    scheduler.admit(request("b", 20..23)).unwrap();
    let mut plans = Vec::new();
    for step in 0..6 {
        let batch = scheduler.plan();
        plans.push(format!("{batch:?} {:?}", scheduler.step_report()));
        if ahead {
            assert!(scheduler.plan_ahead(&batch) || step > 1, "step {step}");
        }
        if step == 1 {
            between(&mut scheduler);
        }
        let results = answer(&batch, if step == 1 { token } else { 50 + step });
        scheduler.commit(&batch, results);
    }
    plans
}

/// Sequences of plans: their blocks are taken in another order before an end than after it.
fn num_sequences(plans: &[String]) -> Vec<usize> {
    plans.iter().map(|plan| plan.matches("SequenceId").count()).collect()
}

#[test]
fn a_step_that_was_planned_ahead_is_the_one_that_would_be_planned() {
    assert_eq!(plans(true, |_| (), 9), plans(false, |_| (), 9));
}

#[test]
fn what_was_planned_ahead_is_dropped_when_something_comes_in_between() {
    let arrives = |scheduler: &mut Scheduler| scheduler.admit(request("c", 30..35)).unwrap();
    assert_eq!(plans(true, arrives, 9), plans(false, arrives, 9));
    let hangs_up = |scheduler: &mut Scheduler| drop(scheduler.abort(&id("a"), None));
    assert_eq!(num_sequences(&plans(true, hangs_up, 9)), [2, 2, 1, 1, 1, 1]);
    assert_eq!(num_sequences(&plans(true, |_| (), EOS)), [2, 2, 0, 0, 0, 0]);
}

#[test]
fn nothing_is_planned_ahead_where_the_next_step_depends_on_more_than_tokens() {
    let is_planned = |change: &dyn Fn(&mut TokenizedRequest)| {
        let mut scheduler = Scheduler::new(params());
        let mut request = request("a", 10..14);
        change(&mut request);
        scheduler.admit(request).unwrap();
        let batch = scheduler.plan();
        scheduler.plan_ahead(&batch);
        scheduler.commit(&batch, answer(&batch, 9));
        scheduler.ahead.is_some()
    };
    let penalty = SamplingParams { presence_penalty: 1.0, ..SamplingParams::greedy() };
    assert!(is_planned(&|_| ()));
    assert!(!is_planned(&|request| request.stop.max_tokens = Some(1)), "it ends");
    assert!(!is_planned(&|request| request.stop.min_tokens = 5), "end tokens are banned");
    assert!(!is_planned(&|request| request.sampling = Arc::new(penalty.clone())), "history");
    assert!(!is_planned(&|request| request.n = 2), "the second continuation starts");
}

#[test]
fn nothing_is_planned_ahead_that_would_preempt_somebody() {
    let mut scheduler = Scheduler::new(SchedulerParams { num_blocks: 3, ..params() });
    scheduler.admit(request("a", 10..13)).unwrap();
    scheduler.admit(request("b", 20..23)).unwrap();
    step(&mut scheduler, 50);
    let batch = scheduler.plan();
    assert_eq!(lens(&batch), [1, 1]);
    assert!(!scheduler.plan_ahead(&batch), "two blocks are missing and one is there");
}
