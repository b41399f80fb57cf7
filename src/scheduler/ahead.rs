//! Plans the next step while a device computes the last one.
//!
//! Most steps are followed by one in which the same sequences compute one token each, the one that
//! the step is about to choose. All but those tokens is known before, so [`Scheduler::plan_ahead`]
//! makes that plan and [`Scheduler::plan`] has only to enter them. Whatever else happens in between
//! (somebody ends, arrives, hangs up) drops it, and the step is planned as ever. What a dropped
//! plan leaves are blocks that its sequences need in their next step anyhow.

use std::sync::Arc;

use super::Scheduler;
use super::batch::{ScheduledBatch, ScheduledSequence, SequenceId};
use super::sequence::Sequence;

/// Stands for a token that is not known yet.
const TO_COME: u32 = u32::MAX;

impl Scheduler {
    /// Plans the step after `batch`, the latest plan, before its results are known. Returns
    /// whether that could be done.
    pub fn plan_ahead(&mut self, batch: &ScheduledBatch) -> bool {
        self.ahead = self.can_plan_ahead(batch).then(|| self.decode_all());
        self.ahead.is_some()
    }

    /// Whether all running sequences will have one more token, and no other sequence will run.
    fn can_plan_ahead(&self, batch: &ScheduledBatch) -> bool {
        let num_running = self.running.len();
        let samples =
            |scheduled: &ScheduledSequence| scheduled.samples && scheduled.scores.is_empty();
        let missing =
            |sequence: &Sequence| self.kv.num_missing(&sequence.table, sequence.len() + 1);
        let running = || self.running.iter().map(|&(_, id)| &self.sequences[id]);
        num_running > 0
            && self.waiting.is_empty()
            && batch.sequences.len() == num_running
            && num_running <= self.params.max_num_batched_tokens
            && batch.sequences.iter().all(samples)
            && running().all(goes_on_plainly)
            && running().map(missing).sum::<usize>() <= self.kv.num_available()
    }

    /// The step in which every running sequence computes the token after its last.
    fn decode_all(&mut self) -> ScheduledBatch {
        let mut batch = self.last_sizes.allocate(self.num_steps);
        for place in 0..self.running.len() {
            let (_, id) = self.running[place];
            let end = self.sequences[id].len() + 1;
            let grown = self.grow(id, end);
            debug_assert!(grown, "blocks were counted");
            batch.push_decode(id, &self.sequences[id]);
        }
        batch
    }

    /// The plan that was made ahead, with its tokens, unless something came in between.
    pub(super) fn take_ahead(&mut self) -> Option<ScheduledBatch> {
        let mut batch = self.ahead.take()?;
        for (scheduled, token_id) in batch.sequences.iter().zip(&mut batch.token_ids) {
            let sequence = self.sequences.get(scheduled.id)?;
            let is_next = sequence.num_computed == scheduled.start_position as usize
                && sequence.num_computed + 1 == sequence.len();
            *token_id = *sequence.output.last().filter(|_| is_next)?;
        }
        batch.step = self.num_steps;
        Some(batch)
    }
}

/// Whether a sequence does not end with its next token for want of room, and whether the step
/// after that needs to know nothing else of it.
fn goes_on_plainly(sequence: &Sequence) -> bool {
    let (limits, num_output) = (&sequence.limits, sequence.output.len() + 1);
    !limits.needs_history
        && num_output >= limits.min_output_len
        && num_output < limits.max_output_len
}

impl ScheduledBatch {
    /// Adds a sequence that computes the token after its last.
    fn push_decode(&mut self, id: SequenceId, sequence: &Sequence) {
        let (first_token, first_block) = (self.token_ids.len(), self.block_ids.len());
        self.token_ids.push(TO_COME);
        self.block_ids.extend_from_slice(&sequence.table);
        self.sequences.push(ScheduledSequence {
            id,
            tokens: first_token..first_token + 1,
            blocks: first_block..self.block_ids.len(),
            start_position: sequence.len() as u32,
            samples: true,
            scores: 0..0,
            params: Arc::clone(&sequence.sampling),
            seed: sequence.seed,
            seen: 0..0,
            banned: 0..0,
        });
    }
}
