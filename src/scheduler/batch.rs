//! The plan of one step: who computes how many tokens, in which blocks, and what is sampled.
//!
//! Made by `Scheduler::plan`, executed by a `runner::StepRunner`, handed back with its
//! results to `Scheduler::commit`. Flat arrays with ranges, so that a step of a thousand
//! sequences costs a handful of allocations. Knows no tensor.

use std::ops::Range;
use std::sync::Arc;

use crate::kv::BlockId;
use crate::output::{SampledToken, TokenLogprobs};
use crate::request::{SamplingParams, SeenToken};

/// Names one sequence (one of a request's continuations) inside the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// One sequence's part of a step: it computes `tokens.len()` tokens from `start_position`.
///
/// Prefill, chunked prefill and decode are this one case.
#[derive(Clone, Debug)]
pub struct ScheduledSequence {
    /// Who.
    pub id: SequenceId,
    /// Its tokens, in [`ScheduledBatch::token_ids`].
    pub tokens: Range<usize>,
    /// Its block table, in [`ScheduledBatch::block_ids`]; covers all positions up to the end
    /// of this step.
    pub blocks: Range<usize>,
    /// Position of the first of its tokens.
    pub start_position: u32,
    /// True when the last of its tokens yields a new token.
    pub samples: bool,
    /// Tokens whose log-probability is wanted, in [`ScheduledBatch::score_targets`]: entry `i`
    /// is scored by the logits of token `i` of this step.
    pub scores: Range<usize>,
    /// How to choose.
    pub params: Arc<SamplingParams>,
    /// Seed of this continuation.
    pub seed: u64,
    /// Its tokens so far, in [`ScheduledBatch::seen`]; empty unless a penalty needs them.
    pub seen: Range<usize>,
    /// Tokens that must not be chosen in this step, in [`ScheduledBatch::banned`].
    pub banned: Range<usize>,
}

/// The plan of one step.
#[derive(Clone, Debug, Default)]
pub struct ScheduledBatch {
    /// Counts steps from 0.
    pub step: u64,
    /// Sequences, each at most once.
    pub sequences: Vec<ScheduledSequence>,
    /// Tokens to compute, sequence after sequence.
    pub token_ids: Vec<u32>,
    /// Block tables, sequence after sequence.
    pub block_ids: Vec<BlockId>,
    /// Tokens to score, see [`ScheduledSequence::scores`].
    pub score_targets: Vec<u32>,
    /// Past tokens for penalties, each once per sequence.
    pub seen: Vec<SeenToken>,
    /// Banned tokens.
    pub banned: Vec<u32>,
    /// Blocks to copy before anything is computed, as (source, destination).
    pub copies: Vec<(BlockId, BlockId)>,
}

impl ScheduledBatch {
    /// Number of tokens that this step computes.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// True when there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }
}

/// What a step yielded for one [`ScheduledSequence`], in the batch's order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepTokens {
    /// New tokens; empty unless the sequence samples.
    pub sampled: Vec<SampledToken>,
    /// One per entry of [`ScheduledSequence::scores`].
    pub scores: Vec<TokenLogprobs>,
}
