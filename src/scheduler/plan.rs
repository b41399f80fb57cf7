//! Plans one step: who computes how many tokens, in which blocks, within one token budget.
//!
//! Running sequences come first, in order of precedence; each decode has its token of the
//! budget reserved, so that a long prompt never delays a running decode. What is left goes to
//! waiting sequences, strictly in order: nobody overtakes one that waits for blocks.

use std::sync::Arc;

use super::Scheduler;
use super::batch::{ScheduledBatch, ScheduledSequence, SequenceId};
use super::sequence::{Sequence, State};
use crate::kv::BlockId;
use crate::telemetry::StepReport;

/// Lengths of a batch's arrays.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BatchSizes {
    sequences: usize,
    tokens: usize,
    blocks: usize,
}

/// A step in the making.
struct Draft {
    batch: ScheduledBatch,
    /// Tokens that the step may still compute.
    budget: usize,
    /// Blocks that running sequences will still need for the tokens they already have.
    reserved_blocks: usize,
}

/// What a starting sequence finds already computed.
#[derive(Default)]
struct SharedPrefix {
    num_tokens: usize,
    /// Full blocks, to be referenced.
    blocks: Vec<BlockId>,
    /// Holds the rest of the tokens, beside other things; to be copied before use.
    partial: Option<BlockId>,
    /// Whether these contents may be published.
    publishes: bool,
}

impl Scheduler {
    /// Plans the next step. Each plan is executed and then handed to [`Scheduler::commit`]
    /// before the next one is made.
    ///
    /// Empty when there is nothing to compute. The best-placed sequence always advances, so
    /// everything that was admitted finishes.
    pub fn plan(&mut self) -> ScheduledBatch {
        self.started.clear();
        self.preempted.clear();
        self.step = StepReport::default();
        let batch = self.take_ahead().unwrap_or_else(|| self.plan_now());
        self.num_steps += u64::from(!batch.is_empty());
        self.last_sizes = BatchSizes::of(&batch);
        self.step.num_tokens = batch.num_tokens();
        batch
    }

    fn plan_now(&mut self) -> ScheduledBatch {
        let mut draft = Draft {
            batch: self.last_sizes.allocate(self.num_steps),
            budget: self.params.max_num_batched_tokens,
            reserved_blocks: 0,
        };
        self.plan_running(&mut draft);
        // Blocks are short when something was preempted; it would only come back to be
        // preempted again.
        if self.preempted.is_empty() {
            self.plan_waiting(&mut draft);
        }
        draft.batch
    }

    fn plan_running(&mut self, draft: &mut Draft) {
        let is_decode = |sequence: &Sequence| sequence.num_computed + 1 == sequence.len();
        let decodes = self.running.iter().filter(|&&(_, id)| is_decode(&self.sequences[id]));
        let mut decodes_left = decodes.count();
        let mut place = 0;
        while let Some(&(_, id)) = self.running.get(place) {
            let sequence = &self.sequences[id];
            decodes_left -= usize::from(is_decode(sequence));
            let budget = draft.budget.saturating_sub(decodes_left);
            let num_tokens = budget.min(sequence.len() - sequence.num_computed);
            let end = sequence.num_computed + num_tokens;
            while num_tokens > 0 && !self.grow(id, end) {
                // The last one in order: never one that this step already counts on.
                let Some((_, victim)) = self.running.pop() else { break };
                if victim != id {
                    decodes_left -= usize::from(is_decode(&self.sequences[victim]));
                }
                self.preempt(victim);
                if victim == id {
                    return;
                }
            }
            self.schedule(id, num_tokens, draft);
            place += 1;
        }
    }

    pub(super) fn grow(&mut self, id: SequenceId, num_tokens: usize) -> bool {
        self.kv.grow(&mut self.sequences[id].table, num_tokens)
    }

    /// Takes all blocks from a sequence that is no longer listed as running, and lets it wait.
    /// It computes its tokens again later, as far as the prefix cache has lost them.
    fn preempt(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        self.kv.release(&mut sequence.table);
        sequence.num_computed = 0;
        sequence.num_published = 0;
        self.preempted.push(sequence.request_id.clone());
        self.totals.num_preempted += 1;
        self.step.num_preempted += 1;
        self.wait(id);
    }

    fn plan_waiting(&mut self, draft: &mut Draft) {
        while draft.budget > 0 && self.running.len() < self.params.max_num_seqs {
            let Some((_, &id)) = self.waiting.first_key_value() else { return };
            if !self.start(id, draft) {
                return;
            }
        }
    }

    /// Moves the first waiting sequence to the running ones, unless it must wait for blocks.
    fn start(&mut self, id: SequenceId, draft: &mut Draft) -> bool {
        let sequence = &self.sequences[id];
        let forked = self.prefix_of_sibling(sequence);
        let is_fork = forked.is_some();
        let prefix = forked.unwrap_or_else(|| self.cached_prefix(sequence));
        if !self.has_room_for(sequence, &prefix, draft) {
            return false;
        }
        if !is_fork {
            self.count_lookup(id, prefix.num_tokens);
        }
        self.adopt(id, prefix, draft);
        self.waiting.pop_first();
        let entry = (self.sequences[id].precedence, id);
        let place = self.running.partition_point(|other| *other < entry);
        self.running.insert(place, entry);
        self.mark_started(id);

        let sequence = &self.sequences[id];
        let num_tokens = draft.budget.min(sequence.len() - sequence.num_computed);
        let grown = self.grow(id, self.sequences[id].num_computed + num_tokens);
        debug_assert!(grown, "room was checked");
        self.schedule(id, num_tokens, draft);
        true
    }

    /// What another continuation of the same request has computed of their common prompt.
    fn prefix_of_sibling(&self, sequence: &Sequence) -> Option<SharedPrefix> {
        if !sequence.output.is_empty() || sequence.is_scoring() {
            return None;
        }
        let group = self.groups.get(&sequence.request_id)?;
        let mut siblings = group.members.iter().map(|&id| &self.sequences[id]);
        let sibling = siblings.find(|sibling| sibling.has_computed_prompt())?;
        // The last prompt token is computed again: its logits choose the first token.
        let num_tokens = sequence.limits.prompt_len - 1;
        let num_full = num_tokens / self.kv.block_size();
        let is_partial = !num_tokens.is_multiple_of(self.kv.block_size());
        Some(SharedPrefix {
            num_tokens,
            blocks: sibling.table[..num_full].to_vec(),
            partial: is_partial.then(|| sibling.table[num_full]),
            publishes: sibling.publishes,
        })
    }

    fn cached_prefix(&self, sequence: &Sequence) -> SharedPrefix {
        let block_size = self.kv.block_size();
        let most = sequence.num_reusable_tokens() / block_size;
        let blocks = match self.params.enable_prefix_caching && most > 0 {
            true => self.kv.lookup(sequence.known_hashes(block_size).take(most)),
            false => Vec::new(),
        };
        let num_tokens = blocks.len() * block_size;
        SharedPrefix { num_tokens, blocks, partial: None, publishes: true }
    }

    /// Whether all tokens that the sequence has so far would fit beside those of the running
    /// sequences. Asking for all of them, not just the first chunk's, keeps a long prompt from
    /// being preempted half-way.
    fn has_room_for(&self, sequence: &Sequence, prefix: &SharedPrefix, draft: &Draft) -> bool {
        let needed = self.kv.blocks_for(sequence.len()) - prefix.blocks.len();
        let available = self.kv.num_available() - self.kv.num_unreferenced(&prefix.blocks);
        let spare = match self.running.is_empty() {
            true => 0,
            false => draft.reserved_blocks + self.watermark,
        };
        needed + spare <= available
    }

    fn count_lookup(&mut self, id: SequenceId, num_found: usize) {
        let sequence = &self.sequences[id];
        let looks_up = self.params.enable_prefix_caching && !sequence.is_scoring();
        if looks_up && !sequence.started {
            let num_queried = sequence.limits.prompt_len;
            self.step.prefix_cache_queries += num_queried;
            self.step.prefix_cache_hits += num_found;
            self.totals.prefix_cache_queries += num_queried as u64;
            self.totals.prefix_cache_hits += num_found as u64;
        }
    }

    fn adopt(&mut self, id: SequenceId, prefix: SharedPrefix, draft: &mut Draft) {
        self.kv.retain(&prefix.blocks);
        let sequence = &mut self.sequences[id];
        sequence.num_computed = prefix.num_tokens;
        sequence.num_published = prefix.blocks.len();
        sequence.publishes = prefix.publishes;
        sequence.table = prefix.blocks;
        sequence.state = State::Running;
        if let Some(source) = prefix.partial {
            let place = sequence.table.len();
            let grown = self.kv.grow(&mut sequence.table, prefix.num_tokens);
            debug_assert!(grown, "room was checked");
            draft.batch.copies.push((source, sequence.table[place]));
        }
    }

    fn mark_started(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        if std::mem::replace(&mut sequence.started, true) {
            return;
        }
        if let Some(progress) = &mut sequence.prompt_progress {
            progress.num_cached_tokens = sequence.num_computed as u32;
        }
        let id = &sequence.request_id;
        if let Some(group) = self.groups.get_mut(id)
            && !std::mem::replace(&mut group.started, true)
        {
            self.started.push(id.clone());
        }
    }

    /// Adds a sequence whose blocks are there to the batch.
    fn schedule(&mut self, id: SequenceId, num_tokens: usize, draft: &mut Draft) {
        let sequence = &mut self.sequences[id];
        draft.reserved_blocks += self.kv.num_missing(&sequence.table, sequence.len());
        if num_tokens == 0 {
            return;
        }
        debug_assert!(
            self.kv.is_private(sequence.table[sequence.num_computed / self.kv.block_size()]),
            "a sequence writes to blocks of its own"
        );
        let (start, prompt_len) = (sequence.num_computed, sequence.limits.prompt_len);
        self.step.num_prompt_tokens += prompt_len.min(start + num_tokens).saturating_sub(start);
        draft.budget -= num_tokens;
        draft.push(id, sequence, num_tokens, &self.params.eos_token_ids);
    }
}

impl Draft {
    fn push(&mut self, id: SequenceId, sequence: &mut Sequence, num_tokens: usize, eos: &[u32]) {
        let batch = &mut self.batch;
        let start = sequence.num_computed;
        let end = start + num_tokens;
        let samples = end == sequence.len() && sequence.limits.max_output_len > 0;
        let first_seen = batch.seen.len();
        if samples && sequence.limits.needs_history {
            batch.seen.extend_from_slice(sequence.seen_tokens());
        }
        let limits = &sequence.limits;
        let (from_prompt, from_output) = sequence.tokens(start..end);
        let scores = match sequence.is_scoring() {
            true => sequence.tokens(start + 1..limits.prompt_len.min(end + 1)).0,
            false => &[],
        };
        let (eos, stop) = match samples && sequence.output.len() < limits.min_output_len {
            true => (eos, &sequence.request.stop_token_ids[..]),
            false => (&[][..], &[][..]),
        };
        batch.sequences.push(ScheduledSequence {
            id,
            tokens: append(&mut batch.token_ids, from_prompt, from_output),
            blocks: append(&mut batch.block_ids, &sequence.table, &[]),
            start_position: start as u32,
            samples,
            scores: append(&mut batch.score_targets, scores, &[]),
            params: Arc::clone(&sequence.sampling),
            seed: sequence.seed,
            seen: first_seen..batch.seen.len(),
            banned: append(&mut batch.banned, eos, stop),
        });
    }
}

/// Appends both parts and says where they are.
fn append(all: &mut Vec<u32>, first: &[u32], second: &[u32]) -> std::ops::Range<usize> {
    let start = all.len();
    all.extend_from_slice(first);
    all.extend_from_slice(second);
    start..all.len()
}

impl BatchSizes {
    fn of(batch: &ScheduledBatch) -> BatchSizes {
        BatchSizes {
            sequences: batch.sequences.len(),
            tokens: batch.token_ids.len(),
            blocks: batch.block_ids.len(),
        }
    }

    /// An empty batch with room for a little more than the last one: steps resemble each other.
    pub(super) fn allocate(self, step: u64) -> ScheduledBatch {
        let room = |len: usize| len + len / 8;
        ScheduledBatch {
            step,
            sequences: Vec::with_capacity(room(self.sequences)),
            token_ids: Vec::with_capacity(room(self.tokens)),
            block_ids: Vec::with_capacity(room(self.blocks)),
            ..ScheduledBatch::default()
        }
    }
}
