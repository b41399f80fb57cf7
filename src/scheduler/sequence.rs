//! One continuation of a request: its tokens, its blocks and how far it is computed.
//!
//! The continuations of a request share a [`Request`]; everything else is their own. Knows
//! nothing of other requests, queues or budgets.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::policy::Precedence;
use super::seen::SeenTokens;
use crate::kv::{BlockHash, BlockId};
use crate::output::{FinishReason, PromptReport, TokenLogprobs};
use crate::request::{RequestId, SamplingParams, SeenToken, continuation_seed};

/// What all continuations of a request have in common.
#[derive(Debug)]
pub(super) struct Request {
    /// Names the request everywhere.
    pub(super) id: RequestId,
    /// The prompt.
    pub(super) prompt: Vec<u32>,
    /// How to choose tokens.
    pub(super) sampling: Arc<SamplingParams>,
    /// Tokens that end the output, beside the model's own.
    pub(super) stop_token_ids: Vec<u32>,
    /// What every step asks.
    pub(super) limits: Limits,
    /// Parent of the first block's hash.
    pub(super) hash_root: BlockHash,
    /// Hashes of the prompt's full blocks, computed when first needed.
    pub(super) prompt_hashes: OnceLock<Vec<BlockHash>>,
}

/// What every step asks about a request. Each sequence has a copy, so that a decode reads
/// nothing but its own sequence: at a thousand sequences the time of a step is cache misses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Number of prompt tokens.
    pub(super) prompt_len: usize,
    /// Most tokens to generate: `max_tokens`, the context length and the pool allow no more.
    pub(super) max_output_len: usize,
    /// No end token before this many.
    pub(super) min_output_len: usize,
    /// `sampling.needs_history()`, asked once.
    pub(super) needs_history: bool,
    /// The model's own end tokens are tokens like others.
    pub(super) ignores_eos: bool,
    /// There are `stop_token_ids`.
    pub(super) has_stop_tokens: bool,
    /// Log-probabilities of the prompt are wanted.
    pub(super) scores_prompt: bool,
}

/// Where a sequence is in its life; a finished one is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waits for another continuation of its request to compute the prompt; in no queue.
    Held,
    /// In the waiting queue; holds no blocks.
    Waiting,
    /// Takes part in steps.
    Running,
}

/// What continuation 0 learns about its prompt, until its first event carries it away.
#[derive(Debug, Default)]
pub(super) struct PromptProgress {
    /// Prompt tokens found in the cache when it first started.
    pub(super) num_cached_tokens: u32,
    /// Entry `i` belongs to prompt token `i + 1`.
    pub(super) scores: Vec<TokenLogprobs>,
}

/// One continuation of a request.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Its request.
    pub(super) request: Arc<Request>,
    /// The request's id.
    pub(super) request_id: RequestId,
    /// How to choose tokens.
    pub(super) sampling: Arc<SamplingParams>,
    /// The request's limits.
    pub(super) limits: Limits,
    /// Which continuation.
    pub(super) index: u32,
    /// Seed of its random stream.
    pub(super) seed: u64,
    /// Its place among all sequences.
    pub(super) precedence: Precedence,
    /// Where it is in its life.
    pub(super) state: State,
    /// True once it was scheduled.
    pub(super) started: bool,
    /// True while other continuations are held until it has computed the prompt.
    pub(super) leads: bool,
    /// Tokens generated so far.
    pub(super) output: Vec<u32>,
    /// Present once it samples, where a penalty needs them.
    pub(super) seen: Option<Box<SeenTokens>>,
    /// Its blocks; empty unless running.
    pub(super) table: Vec<BlockId>,
    /// Number of leading tokens whose keys and values are in its blocks.
    pub(super) num_computed: usize,
    /// Number of leading blocks that need no publishing any more.
    pub(super) num_published: usize,
    /// False after the prefix cache was reset, until it starts afresh: its blocks are stale.
    pub(super) publishes: bool,
    /// Hashes of the full blocks after the prompt's.
    pub(super) output_hashes: Vec<BlockHash>,
    /// Present in continuation 0 until its first event.
    pub(super) prompt_progress: Option<Box<PromptProgress>>,
}

impl Sequence {
    /// Continuation `index`, held.
    pub(super) fn new(request: Arc<Request>, index: u32, precedence: Precedence) -> Sequence {
        let seed = continuation_seed(request.sampling.seed, index);
        Sequence {
            request_id: request.id.clone(),
            sampling: request.sampling.clone(),
            limits: request.limits,
            request,
            index,
            seed,
            precedence,
            state: State::Held,
            started: false,
            leads: false,
            output: Vec::new(),
            seen: None,
            table: Vec::new(),
            num_computed: 0,
            num_published: 0,
            publishes: true,
            output_hashes: Vec::new(),
            prompt_progress: (index == 0).then(Box::default),
        }
    }

    /// Number of known tokens, prompt and output.
    pub(super) fn len(&self) -> usize {
        self.limits.prompt_len + self.output.len()
    }

    /// True when the prompt's keys and values are in its blocks.
    pub(super) fn has_computed_prompt(&self) -> bool {
        self.state == State::Running && self.num_computed >= self.limits.prompt_len
    }

    /// The prompt's part and the output's part of the tokens at these positions.
    pub(super) fn tokens(&self, positions: Range<usize>) -> (&[u32], &[u32]) {
        let prompt_len = self.limits.prompt_len;
        let Range { start, end } = positions;
        if start >= prompt_len {
            return (&[], &self.output[start - prompt_len..end - prompt_len]);
        }
        (
            &self.request.prompt[start..end.min(prompt_len)],
            &self.output[..end.saturating_sub(prompt_len)],
        )
    }

    /// Takes one more token.
    pub(super) fn push_output(&mut self, token_id: u32) {
        self.output.push(token_id);
        if let Some(seen) = &mut self.seen {
            seen.add_generated(token_id);
        }
    }

    /// Every token that it has had, once.
    pub(super) fn seen_tokens(&mut self) -> &[SeenToken] {
        let (request, output) = (&self.request, &self.output);
        let seen = || Box::new(SeenTokens::of(&request.prompt, output));
        self.seen.get_or_insert_with(seen).as_slice()
    }

    /// True when the log-probabilities of its prompt tokens are wanted and not complete.
    pub(super) fn is_scoring(&self) -> bool {
        self.limits.scores_prompt
            && self
                .prompt_progress
                .as_ref()
                .is_some_and(|progress| progress.scores.len() + 1 < self.limits.prompt_len)
    }

    /// Number of leading tokens that may come from the prefix cache. The last token is always
    /// computed, for its logits; so is every prompt token whose logits score the next.
    pub(super) fn num_reusable_tokens(&self) -> usize {
        match &self.prompt_progress {
            Some(progress) if self.is_scoring() => progress.scores.len(),
            _ => self.len() - 1,
        }
    }

    /// Hashes of the full blocks that are known so far, without those being generated.
    pub(super) fn known_hashes(&self, block_size: usize) -> impl Iterator<Item = &BlockHash> {
        self.prompt_hashes(block_size).iter().chain(&self.output_hashes)
    }

    fn prompt_hashes(&self, block_size: usize) -> &[BlockHash] {
        let request = &self.request;
        request.prompt_hashes.get_or_init(|| {
            let mut parent = request.hash_root;
            let blocks = request.prompt.chunks_exact(block_size);
            blocks
                .map(|block| {
                    parent = parent.child(block.iter().copied());
                    parent
                })
                .collect()
        })
    }

    /// The hash of a block; all blocks before it were asked for before.
    pub(super) fn block_hash(&mut self, block: usize, block_size: usize) -> BlockHash {
        let prompt_hashes = self.prompt_hashes(block_size);
        if let Some(&hash) = prompt_hashes.get(block) {
            return hash;
        }
        let past_prompt = block - prompt_hashes.len();
        if let Some(&hash) = self.output_hashes.get(past_prompt) {
            return hash;
        }
        debug_assert_eq!(past_prompt, self.output_hashes.len(), "block hashes form a chain");
        let parent = self.output_hashes.last().or(prompt_hashes.last());
        let parent = parent.copied().unwrap_or(self.request.hash_root);
        let (prompt, output) = self.tokens(block * block_size..(block + 1) * block_size);
        let hash = parent.child(prompt.iter().chain(output).copied());
        self.output_hashes.push(hash);
        hash
    }

    /// Takes the prompt's report, once.
    pub(super) fn take_prompt_report(&mut self) -> Option<PromptReport> {
        let progress = self.prompt_progress.take()?;
        let logprobs = match self.limits.scores_prompt {
            true => std::iter::once(None).chain(progress.scores.into_iter().map(Some)).collect(),
            false => Vec::new(),
        };
        Some(PromptReport { num_cached_tokens: progress.num_cached_tokens, logprobs })
    }

    /// Why the sequence ends with its last token, if it does.
    pub(super) fn finish_reason(&self, eos_token_ids: &[u32]) -> Option<FinishReason> {
        let limits = &self.limits;
        if let Some(&last) = self.output.last() {
            if !limits.ignores_eos && eos_token_ids.contains(&last) {
                return Some(FinishReason::EndOfText);
            }
            if limits.has_stop_tokens && self.request.stop_token_ids.contains(&last) {
                return Some(FinishReason::StopToken(last));
            }
        }
        (self.output.len() >= limits.max_output_len).then_some(FinishReason::Length)
    }
}
