//! Drives a scheduler and a scripted runner through a workload, checking every step.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash};

use tokenmill::output::{FinishReason, PromptReport, TokenEvent};
use tokenmill::request::{RequestId, TokenizedRequest};
use tokenmill::runner::{ScriptedRunner, StepRunner};
use tokenmill::scheduler::batch::{ScheduledBatch, SequenceId};
use tokenmill::scheduler::{AdmitError, Scheduler, SchedulerParams};

use crate::oracle;
use crate::workload::Workload;

/// What one continuation yielded.
#[derive(Debug, Default)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub finish: Option<FinishReason>,
    pub num_events: usize,
    pub prompt: Option<PromptReport>,
}

fn digest(batch: &ScheduledBatch, hasher: &mut DefaultHasher) {
    for seq in &batch.sequences {
        (seq.id, seq.start_position, &seq.tokens, &seq.blocks, seq.samples).hash(hasher);
    }
    (batch.step, &batch.token_ids, &batch.block_ids, &batch.copies).hash(hasher);
    (&batch.score_targets, &batch.seen, &batch.banned).hash(hasher);
}

/// A workload's course.
pub struct Simulation {
    pub params: SchedulerParams,
    pub scheduler: Scheduler,
    runner: ScriptedRunner,
    pub outcomes: HashMap<(RequestId, u32), Outcome>,
    pub refused: Vec<(RequestId, AdmitError)>,
    /// Over all plans, to compare two runs.
    pub digest: DefaultHasher,
    pub num_copies: usize,
    pub num_planned_ahead: usize,
    num_started: HashMap<RequestId, usize>,
    /// Tokens that a sequence had when it first sampled: its prompt.
    prompt_lens: HashMap<SequenceId, usize>,
}

impl Simulation {
    pub fn new(params: SchedulerParams) -> Simulation {
        Simulation {
            scheduler: Scheduler::new(params.clone()),
            runner: ScriptedRunner::reading_cache(params.block_size, oracle::next_token),
            params,
            outcomes: HashMap::new(),
            refused: Vec::new(),
            digest: DefaultHasher::new(),
            num_copies: 0,
            num_planned_ahead: 0,
            num_started: HashMap::new(),
            prompt_lens: HashMap::new(),
        }
    }

    /// Runs the workload to its end; panics when that takes implausibly long.
    pub fn run(workload: &Workload) -> Simulation {
        let mut simulation = Simulation::new(workload.params.clone());
        let last_step =
            |a: &crate::workload::Arrival| a.step + a.abort.map_or(0, |(after, _)| after);
        let last_step = workload.arrivals.iter().map(last_step).max().unwrap_or(0);
        // The best-placed sequence advances in every step; the factor allows for what it loses
        // when a better-placed one arrives.
        let work =
            workload.arrivals.iter().map(|a| a.request.n as usize * workload.params.max_model_len);
        let bound = last_step + 4 * work.sum::<usize>();
        for step in 0.. {
            assert!(step < bound, "no end after {step} steps");
            simulation.arrive(workload, step);
            simulation.hang_up(workload, step);
            if step > last_step && !simulation.scheduler.has_work() {
                break;
            }
            simulation.step();
        }
        simulation
    }

    fn arrive(&mut self, workload: &Workload, step: usize) {
        for arrival in workload.arrivals.iter().filter(|arrival| arrival.step == step) {
            self.admit(&arrival.request);
        }
    }

    pub fn admit(&mut self, request: &TokenizedRequest) {
        match self.scheduler.admit(request.clone()) {
            Ok(()) => {
                for index in 0..request.n {
                    self.outcomes.insert((request.id.clone(), index), Outcome::default());
                }
            }
            Err(error) => self.refused.push((request.id.clone(), error)),
        }
    }

    fn hang_up(&mut self, workload: &Workload, step: usize) {
        for arrival in &workload.arrivals {
            if let Some((after, index)) = arrival.abort
                && arrival.step + after == step
            {
                let events = self.scheduler.abort(&arrival.request.id, index);
                assert!(events.iter().all(|event| event.finish == Some(FinishReason::Abort)));
                self.record(events);
            }
        }
    }

    pub fn step(&mut self) {
        let batch = self.scheduler.plan();
        self.check(&batch);
        digest(&batch, &mut self.digest);
        self.num_copies += batch.copies.len();
        for id in self.scheduler.newly_started() {
            *self.num_started.entry(id.clone()).or_default() += 1;
        }
        // As beside a device, in most steps.
        if !batch.step.is_multiple_of(3) {
            self.num_planned_ahead += usize::from(self.scheduler.plan_ahead(&batch));
        }
        let results = self.runner.execute(&batch).expect("the plan is sound");
        let events = self.scheduler.commit(&batch, results);
        let generated: usize = events.iter().map(|event| event.tokens.len()).sum();
        assert_eq!(self.scheduler.step_report().num_generated_tokens, generated);
        self.record(events);
        let kv = self.scheduler.stats().kv;
        assert!(kv.num_in_use + kv.num_cached <= kv.num_blocks);
    }

    fn check(&mut self, batch: &ScheduledBatch) {
        assert!(batch.num_tokens() <= self.params.max_num_batched_tokens, "budget");
        assert!(batch.sequences.len() <= self.params.max_num_seqs, "sequences in a step");
        assert!(self.scheduler.num_running() <= self.params.max_num_seqs, "running sequences");
        assert_eq!(batch.is_empty(), !self.scheduler.has_work(), "work and plan agree");
        for seq in &batch.sequences {
            let end = seq.start_position as usize + seq.tokens.len();
            assert_eq!(seq.blocks.len(), end.div_ceil(self.params.block_size), "blocks");
            let seen = &batch.seen[seq.seen.clone()];
            if seq.samples && seq.params.needs_history() {
                let prompt_len = *self.prompt_lens.entry(seq.id).or_insert(end);
                let num_generated: u32 = seen.iter().map(|token| token.times_generated).sum();
                assert_eq!(num_generated as usize, end - prompt_len, "a penalty sees every token");
                let different: HashSet<u32> = seen.iter().map(|token| token.token_id).collect();
                assert_eq!(different.len(), seen.len(), "each once");
                let computed = &batch.token_ids[seq.tokens.clone()];
                assert!(
                    computed.iter().all(|id| different.contains(id)),
                    "those of this step, too"
                );
            } else {
                assert!(seen.is_empty(), "others pay nothing");
            }
        }
    }

    fn record(&mut self, events: Vec<TokenEvent>) {
        for event in events {
            let key = (event.request_id, event.index);
            let outcome = self.outcomes.get_mut(&key).expect("only admitted requests have events");
            assert!(outcome.finish.is_none(), "{key:?} goes on after its end");
            let is_first_of_all = key.1 == 0 && outcome.num_events == 0;
            let aborted = event.finish == Some(FinishReason::Abort);
            assert_eq!(event.prompt.is_some(), is_first_of_all && !aborted, "prompt report");
            outcome.num_events += 1;
            outcome.prompt = event.prompt.or(outcome.prompt.take());
            outcome.tokens.extend(event.tokens.iter().map(|token| token.token_id));
            outcome.finish = event.finish;
        }
    }

    /// Every request yielded what the oracle says; aborted ones a part of it.
    pub fn check_outcomes(&self, requests: impl Iterator<Item = TokenizedRequest>) {
        for request in requests {
            let refused = self.refused.iter().any(|(id, _)| *id == request.id);
            assert_eq!(refused, self.is_impossible(&request), "{:?}", self.refused);
            if refused {
                continue;
            }
            for index in 0..request.n {
                self.check_outcome(&request, index);
            }
            assert!(self.num_started.get(&request.id).is_none_or(|&times| times == 1));
        }
    }

    fn is_impossible(&self, request: &TokenizedRequest) -> bool {
        let room = usize::from(request.stop.max_tokens != Some(0));
        let prompt_len = request.prompt_token_ids.len();
        prompt_len + room > self.params.max_model_len
            || prompt_len.div_ceil(self.params.block_size) > self.params.num_blocks
    }

    fn check_outcome(&self, request: &TokenizedRequest, index: u32) {
        let outcome = &self.outcomes[&(request.id.clone(), index)];
        let (tokens, finish) = oracle::expected_output(&self.params, request, index);
        let name = format!("{} [{index}]", request.id);
        if outcome.finish == Some(FinishReason::Abort) {
            assert!(tokens.starts_with(&outcome.tokens), "{name} before its abort");
        } else {
            assert_eq!(outcome.tokens, tokens, "{name}");
            assert_eq!(outcome.finish, Some(finish), "{name}");
        }
        if let Some(report) = &outcome.prompt {
            self.check_report(request, report);
        }
    }

    fn check_report(&self, request: &TokenizedRequest, report: &PromptReport) {
        let scored = request.sampling.prompt_logprobs.is_some();
        let caches = self.params.enable_prefix_caching && !scored;
        let most = if caches { request.prompt_token_ids.len() - 1 } else { 0 };
        let num_cached = report.num_cached_tokens as usize;
        assert!(num_cached <= most || scored && request.prompt_token_ids.len() == 1, "{report:?}");
        let logprobs: Vec<_> =
            report.logprobs.iter().map(|entry| entry.as_ref().map(|e| e.logprob)).collect();
        let expected = if scored { oracle::expected_prompt_logprobs(request) } else { Vec::new() };
        assert_eq!(logprobs, expected, "prompt log-probabilities of {}", request.id);
    }
}
