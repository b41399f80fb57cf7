//! Takes the results of a step: tokens are appended, full blocks published, ends recognised.
//!
//! A sequence that ends gives its blocks back at once; full ones stay findable in the prefix
//! cache.

use super::Scheduler;
use super::batch::{ScheduledBatch, ScheduledSequence, SequenceId, StepTokens};
use super::sequence::{Sequence, State};
use crate::kv::BlockPool;
use crate::output::{FinishReason, SampledToken, TokenEvent, TokenLogprobs};

impl Scheduler {
    /// Takes the results of the latest plan, one entry per scheduled sequence, and tells what
    /// happened to whom. Sequences aborted since the plan are skipped.
    pub fn commit(&mut self, batch: &ScheduledBatch, results: Vec<StepTokens>) -> Vec<TokenEvent> {
        assert_eq!(batch.sequences.len(), results.len(), "one result per scheduled sequence");
        let mut events = Vec::with_capacity(results.len());
        let mut num_finished = 0;
        for (scheduled, result) in batch.sequences.iter().zip(results) {
            let Some(sequence) = self.sequences.get_mut(scheduled.id) else { continue };
            sequence.advance(scheduled, result.scores);
            if self.params.enable_prefix_caching {
                sequence.publish_full_blocks(&mut self.kv);
            }
            let event = sequence.accept(scheduled, result.sampled, &self.params.eos_token_ids);
            let computed_prompt = sequence.leads && sequence.has_computed_prompt();
            if computed_prompt {
                sequence.leads = false;
            }
            let finished = event.as_ref().is_some_and(|event| event.finish.is_some());
            if let Some(event) = event {
                self.step.num_generated_tokens += event.tokens.len();
                events.push(event);
            }
            if computed_prompt {
                self.release_held(scheduled.id, &mut events);
            }
            if finished {
                self.remove(scheduled.id);
                num_finished += 1;
            }
        }
        if num_finished > 0 {
            let sequences = &self.sequences;
            self.running.retain(|&(_, id)| sequences.get(id).is_some());
        }
        events
    }

    /// The prompt is computed: its other continuations may start, or, when nothing is to be
    /// generated, are done.
    fn release_held(&mut self, leader: SequenceId, events: &mut Vec<TokenEvent>) {
        let leader = &self.sequences[leader];
        let is_empty = leader.limits.max_output_len == 0;
        let Some(group) = self.groups.get(&leader.request_id) else { return };
        for id in group.members.clone() {
            if self.sequences[id].state != State::Held {
                continue;
            }
            if is_empty {
                events.push(self.sequences[id].event(Vec::new(), Some(FinishReason::Length)));
                self.remove(id);
            } else {
                self.wait(id);
            }
        }
    }
}

impl Sequence {
    fn advance(&mut self, scheduled: &ScheduledSequence, scores: Vec<TokenLogprobs>) {
        let start = scheduled.start_position as usize;
        self.num_computed = start + scheduled.tokens.len();
        if let Some(progress) = &mut self.prompt_progress
            && !scores.is_empty()
        {
            // After a preemption the first ones are known already.
            let known = progress.scores.len() - start;
            progress.scores.extend(scores.into_iter().skip(known));
        }
    }

    fn publish_full_blocks(&mut self, kv: &mut BlockPool) {
        let block_size = kv.block_size();
        while self.publishes && (self.num_published + 1) * block_size <= self.num_computed {
            let block = self.num_published;
            let hash = self.block_hash(block, block_size);
            kv.publish(self.table[block], hash);
            self.num_published += 1;
        }
    }

    /// Appends what was sampled, up to the end of the sequence.
    fn accept(
        &mut self,
        scheduled: &ScheduledSequence,
        mut tokens: Vec<SampledToken>,
        eos_token_ids: &[u32],
    ) -> Option<TokenEvent> {
        if !scheduled.samples {
            let done = self.num_computed == self.len() && self.limits.max_output_len == 0;
            return done.then(|| self.event(Vec::new(), Some(FinishReason::Length)));
        }
        assert!(!tokens.is_empty(), "a runner returns a token where one is sampled");
        let mut finish = None;
        let mut num_accepted = 0;
        for token in &tokens {
            self.push_output(token.token_id);
            num_accepted += 1;
            finish = self.finish_reason(eos_token_ids);
            if finish.is_some() {
                break;
            }
        }
        tokens.truncate(num_accepted);
        Some(self.event(tokens, finish))
    }

    fn event(&mut self, tokens: Vec<SampledToken>, finish: Option<FinishReason>) -> TokenEvent {
        TokenEvent {
            request_id: self.request_id.clone(),
            index: self.index,
            tokens,
            finish,
            prompt: self.take_prompt_report(),
        }
    }
}
