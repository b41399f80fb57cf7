//! Continuous batching at token granularity: pure, synchronous, no clock, no device.
//!
//! A step is "sequence *s* computes *n* tokens from position *p*" for many *s*: prefill,
//! chunked prefill and decode are one case. [`Scheduler::plan`] says who computes what in
//! which blocks, [`Scheduler::commit`] takes the tokens that came out. The same calls in the
//! same order always give the same plans.
//!
//! What holds between calls: only running sequences hold blocks; a running sequence never
//! writes to a block that another one references or that the prefix cache can find; every
//! admitted sequence yields exactly one event with a finish reason.

mod ahead;
pub mod batch;
mod commit;
mod plan;
mod policy;
mod seen;
mod sequence;
mod slab;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use crate::config::SchedulingPolicy;
use crate::kv::{BlockHash, BlockPool, KvUsage};
use crate::output::{FinishReason, TokenEvent};
use crate::request::{RequestId, TokenizedRequest};
use crate::telemetry::StepReport;

use batch::SequenceId;
use policy::Precedence;
use sequence::{Limits, Request, Sequence, State};
use slab::SequenceSlab;

/// Limits and rules of a scheduler.
#[derive(Clone, Debug)]
pub struct SchedulerParams {
    /// Most sequences running at once.
    pub max_num_seqs: usize,
    /// Most tokens computed in one step.
    pub max_num_batched_tokens: usize,
    /// Longest prompt plus output.
    pub max_model_len: usize,
    /// Order of sequences.
    pub policy: SchedulingPolicy,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Number of KV blocks.
    pub num_blocks: usize,
    /// Reuse cached prefixes.
    pub enable_prefix_caching: bool,
    /// The model's own end tokens.
    pub eos_token_ids: Vec<u32>,
}

/// A request that can never be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Zero continuations were asked for.
    #[error("n is 0, but at least one continuation is needed")]
    NoContinuations,
    /// The id is taken.
    #[error("request {id} is already being served")]
    DuplicateId {
        /// The id.
        id: RequestId,
    },
    /// The prompt leaves no room for output.
    #[error("the prompt has {prompt_len} tokens, but the context length is {max_model_len}")]
    PromptTooLong {
        /// Prompt tokens.
        prompt_len: usize,
        /// Longest prompt plus output.
        max_model_len: usize,
    },
    /// The prompt needs more blocks than there are.
    #[error(
        "the prompt has {prompt_len} tokens and needs {needed} KV blocks, \
         but the KV cache has {num_blocks}"
    )]
    ExceedsKvCache {
        /// Prompt tokens.
        prompt_len: usize,
        /// Blocks that they need.
        needed: usize,
        /// Blocks of the whole cache.
        num_blocks: usize,
    },
}

/// Counts since start-up, and where the KV blocks are now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// KV blocks.
    pub kv: KvUsage,
    /// Sequences preempted.
    pub num_preempted: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hits: u64,
}

/// The continuations of one request that have not finished.
#[derive(Debug)]
struct Group {
    members: Vec<SequenceId>,
    started: bool,
}

/// Decides what each step computes.
#[derive(Debug)]
pub struct Scheduler {
    params: SchedulerParams,
    kv: BlockPool,
    /// Blocks that stay available when a sequence starts beside others.
    watermark: usize,
    sequences: SequenceSlab,
    groups: HashMap<RequestId, Group>,
    waiting: BTreeMap<Precedence, SequenceId>,
    /// In order of precedence.
    running: Vec<(Precedence, SequenceId)>,
    num_arrivals: u64,
    num_steps: u64,
    totals: SchedulerStats,
    step: StepReport,
    started: Vec<RequestId>,
    preempted: Vec<RequestId>,
    /// Sizes of the last batch's arrays, to allocate the next one's at once.
    last_sizes: plan::BatchSizes,
    /// The next step, if it was planned ahead and nothing has happened since.
    ahead: Option<batch::ScheduledBatch>,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    pub fn new(params: SchedulerParams) -> Scheduler {
        assert!(params.max_num_seqs > 0, "at least one sequence must be able to run");
        assert!(params.max_num_batched_tokens > 0, "a step must be able to compute a token");
        Scheduler {
            kv: BlockPool::new(params.num_blocks, params.block_size),
            watermark: params.num_blocks.div_ceil(100),
            sequences: SequenceSlab::default(),
            groups: HashMap::new(),
            waiting: BTreeMap::new(),
            running: Vec::with_capacity(params.max_num_seqs),
            num_arrivals: 0,
            num_steps: 0,
            totals: SchedulerStats::default(),
            step: StepReport::default(),
            started: Vec::new(),
            preempted: Vec::new(),
            last_sizes: plan::BatchSizes::default(),
            ahead: None,
            params,
        }
    }

    /// Queues a request, or says why it can never be served.
    ///
    /// Its first continuation computes the prompt; the others wait for that and share it.
    pub fn admit(&mut self, request: TokenizedRequest) -> Result<(), AdmitError> {
        self.check(&request)?;
        let arrival = self.num_arrivals;
        self.num_arrivals += 1;
        let (n, priority) = (request.n, request.priority);
        let request = Arc::new(self.resolve(request));
        let policy = self.params.policy;
        let members = (0..n)
            .map(|index| {
                let precedence = Precedence::new(policy, priority, arrival, index);
                self.sequences.insert(Sequence::new(request.clone(), index, precedence))
            })
            .collect();
        let group = Group { members, started: false };
        self.promote_leader(&group.members);
        self.groups.insert(request.id.clone(), group);
        Ok(())
    }

    fn check(&self, request: &TokenizedRequest) -> Result<(), AdmitError> {
        let prompt_len = request.prompt_token_ids.len();
        let max_model_len = self.params.max_model_len;
        let needed = self.kv.blocks_for(prompt_len);
        let num_blocks = self.kv.num_blocks();
        let room = usize::from(request.stop.max_tokens != Some(0));
        if prompt_len == 0 {
            Err(AdmitError::EmptyPrompt)
        } else if request.n == 0 {
            Err(AdmitError::NoContinuations)
        } else if self.groups.contains_key(&request.id) {
            Err(AdmitError::DuplicateId { id: request.id.clone() })
        } else if prompt_len + room > max_model_len {
            Err(AdmitError::PromptTooLong { prompt_len, max_model_len })
        } else if needed > num_blocks {
            Err(AdmitError::ExceedsKvCache { prompt_len, needed, num_blocks })
        } else {
            Ok(())
        }
    }

    fn resolve(&self, request: TokenizedRequest) -> Request {
        // The last token is never computed, so it needs no slot.
        let capacity = self.kv.num_blocks() * self.kv.block_size() + 1;
        let room = self.params.max_model_len.min(capacity) - request.prompt_token_ids.len();
        let max_tokens = request.stop.max_tokens.map_or(usize::MAX, |max| max as usize);
        let limits = Limits {
            prompt_len: request.prompt_token_ids.len(),
            max_output_len: room.min(max_tokens),
            min_output_len: request.stop.min_tokens as usize,
            needs_history: request.sampling.needs_history(),
            ignores_eos: request.stop.ignore_eos,
            has_stop_tokens: !request.stop.stop_token_ids.is_empty(),
            scores_prompt: request.sampling.prompt_logprobs.is_some(),
        };
        Request {
            id: request.id,
            prompt: request.prompt_token_ids,
            sampling: request.sampling,
            stop_token_ids: request.stop.stop_token_ids,
            limits,
            hash_root: BlockHash::root(request.cache_salt.as_deref()),
            prompt_hashes: OnceLock::new(),
        }
    }

    /// Ends a request's unfinished continuations, or only continuation `index`, and frees their
    /// blocks. Unknown and finished ones are ignored.
    ///
    /// May be called between `plan` and `commit`; the step's results for them are then dropped.
    pub fn abort(&mut self, id: &RequestId, index: Option<u32>) -> Vec<TokenEvent> {
        let Some(group) = self.groups.get(id) else { return Vec::new() };
        let wanted =
            |&member: &SequenceId| index.is_none_or(|index| self.sequences[member].index == index);
        let members: Vec<_> = group.members.iter().copied().filter(wanted).collect();
        members.into_iter().filter_map(|member| self.abort_sequence(member)).collect()
    }

    fn abort_sequence(&mut self, id: SequenceId) -> Option<TokenEvent> {
        let sequence = self.sequences.get(id)?;
        let precedence = sequence.precedence;
        match sequence.state {
            State::Held => {}
            State::Waiting => {
                self.waiting.remove(&precedence);
            }
            State::Running => {
                let place = self.running.binary_search(&(precedence, id));
                self.running.remove(place.expect("a running sequence is listed"));
            }
        }
        let sequence = self.remove(id)?;
        Some(TokenEvent {
            request_id: sequence.request_id.clone(),
            index: sequence.index,
            tokens: Vec::new(),
            finish: Some(FinishReason::Abort),
            prompt: None,
        })
    }

    /// Takes a sequence that is in no queue any more out of its request and frees its blocks.
    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        self.ahead = None;
        let mut sequence = self.sequences.remove(id)?;
        self.kv.release(&mut sequence.table);
        if let Some(group) = self.groups.get_mut(&sequence.request_id) {
            group.members.retain(|&member| member != id);
            if group.members.is_empty() {
                self.groups.remove(&sequence.request_id);
            } else if sequence.leads {
                let members = group.members.clone();
                self.promote_leader(&members);
            }
        }
        Some(sequence)
    }

    /// Lets the first of these held continuations compute the prompt for all of them.
    fn promote_leader(&mut self, held: &[SequenceId]) {
        let Some(&leader) = held.first() else { return };
        self.sequences[leader].leads = held.len() > 1;
        self.wait(leader);
    }

    fn wait(&mut self, id: SequenceId) {
        self.ahead = None;
        let sequence = &mut self.sequences[id];
        sequence.state = State::Waiting;
        self.waiting.insert(sequence.precedence, id);
    }

    /// Forgets all cached prefixes, for example because the weights changed.
    pub fn reset_prefix_cache(&mut self) {
        self.kv.reset_prefix_cache();
        for &(_, id) in &self.running {
            self.sequences[id].publishes = false;
        }
    }

    /// True when a step has something to compute.
    pub fn has_work(&self) -> bool {
        self.sequences.len() > 0
    }

    /// Sequences that could start now. Continuations that wait for their own prompt to be
    /// computed are not counted.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that take part in steps.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Counts since start-up, and where the KV blocks are now.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats { kv: self.kv.usage(), ..self.totals }
    }

    /// What the latest `plan` and its `commit` did.
    pub fn step_report(&self) -> StepReport {
        StepReport {
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            kv_cache_usage: self.kv.usage().fraction_in_use(),
            ..self.step.clone()
        }
    }

    /// Requests that the latest `plan` scheduled for the first time.
    pub fn newly_started(&self) -> &[RequestId] {
        &self.started
    }

    /// Requests whose sequences the latest `plan` preempted, one entry per preemption.
    pub fn newly_preempted(&self) -> &[RequestId] {
        &self.preempted
    }
}
