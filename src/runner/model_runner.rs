//! The real runner: a planned batch becomes a forward pass and sampled tokens.

use super::memory_plan::MemoryPlan;
use super::{RunnerError, StepRunner};
use crate::device::RankContext;
use crate::model::batch::{BatchEntry, ForwardBatch};
use crate::model::decoder::Decoder;
use crate::model::kv_cache::KvCache;
use crate::model::spec::ModelSpec;
use crate::model::workspace::Workspace;
use crate::ops::args::{RowTask, SampleArgs, SampleRow};
use crate::scheduler::batch::{ScheduledBatch, ScheduledSequence, StepTokens};

/// Computes steps with a decoder on one rank. Everything it writes to was allocated at start.
pub struct ModelRunner {
    decoder: Decoder,
    rank: RankContext,
    cache: KvCache,
    workspace: Workspace,
    input: ForwardBatch,
    max_logit_rows: usize,
}

/// One row of logits that a step needs.
struct WantedRow {
    /// Index into the batch's sequences.
    sequence: usize,
    /// Row of the step's flat tokens.
    token_row: u32,
    /// The token to score; `None` samples.
    target: Option<u32>,
}

impl ModelRunner {
    /// Allocates what `plan` says.
    pub fn new(
        decoder: Decoder,
        spec: &ModelSpec,
        rank: RankContext,
        plan: &MemoryPlan,
    ) -> ModelRunner {
        let dtype = rank.ops.activation_dtype();
        rank.ops.reserve(plan.limits.max_num_tokens, spec.widest_input());
        ModelRunner {
            cache: KvCache::new(spec, plan.num_blocks, plan.block_size, plan.kv_dtype),
            workspace: Workspace::new(spec, dtype, plan.limits.max_num_tokens, plan.max_logit_rows),
            input: ForwardBatch::new(plan.limits),
            max_logit_rows: plan.max_logit_rows,
            decoder,
            rank,
        }
    }

    fn forward(&mut self, batch: &ScheduledBatch) {
        if !batch.copies.is_empty() {
            self.cache.copy_blocks(&*self.rank.ops, &batch.copies);
        }
        let entries = batch.sequences.iter().map(|seq| BatchEntry {
            token_ids: &batch.token_ids[seq.tokens.clone()],
            start_position: seq.start_position,
            block_ids: &batch.block_ids[seq.blocks.clone()],
        });
        self.input.fill(self.cache.block_size, entries);
        self.decoder.forward(&self.rank, &self.input, &mut self.cache, &mut self.workspace);
    }

    /// Logits and sampling for at most `max_logit_rows` rows.
    fn sample(&mut self, batch: &ScheduledBatch, wanted: &[WantedRow], results: &mut [StepTokens]) {
        let token_rows: Vec<u32> = wanted.iter().map(|w| w.token_row).collect();
        self.decoder.logits(&self.rank, &token_rows, &mut self.workspace);
        let rows: Vec<SampleRow<'_>> = wanted.iter().map(|w| sample_row(batch, w)).collect();
        let logits = self.workspace.logits.rows_mut(rows.len());
        let sampled = self.rank.ops.sample(SampleArgs { logits, rows: &rows });
        for (wanted, token) in wanted.iter().zip(sampled) {
            let result = &mut results[wanted.sequence];
            match wanted.target {
                None => result.sampled.push(token),
                Some(_) => result.scores.extend(token.logprobs),
            }
        }
    }
}

impl StepRunner for ModelRunner {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.forward(batch);
        let mut results = vec![StepTokens::default(); batch.sequences.len()];
        for wanted in wanted_rows(batch).chunks(self.max_logit_rows) {
            self.sample(batch, wanted, &mut results);
        }
        Ok(results)
    }
}

fn wanted_rows(batch: &ScheduledBatch) -> Vec<WantedRow> {
    let mut wanted = Vec::with_capacity(batch.sequences.len());
    for (sequence, seq) in batch.sequences.iter().enumerate() {
        let first = seq.tokens.start as u32;
        let targets = batch.score_targets[seq.scores.clone()].iter();
        wanted.extend(targets.zip(first..).map(|(&target, token_row)| WantedRow {
            sequence,
            token_row,
            target: Some(target),
        }));
        if seq.samples {
            let token_row = seq.tokens.end as u32 - 1;
            wanted.push(WantedRow { sequence, token_row, target: None });
        }
    }
    wanted
}

fn sample_row<'a>(batch: &'a ScheduledBatch, wanted: &WantedRow) -> SampleRow<'a> {
    let seq: &ScheduledSequence = &batch.sequences[wanted.sequence];
    let task = match wanted.target {
        None => RowTask::Sample,
        Some(token_id) => RowTask::Score { token_id },
    };
    SampleRow {
        task,
        params: &seq.params,
        seed: seq.seed,
        position: seq.start_position + seq.tokens.len() as u32,
        prompt_token_ids: &batch.history[seq.prompt_history.clone()],
        output_token_ids: &batch.history[seq.output_history.clone()],
        banned_token_ids: &batch.banned[seq.banned.clone()],
    }
}
