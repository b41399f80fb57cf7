//! The real runner: a planned batch becomes a forward pass and sampled tokens.

use super::memory_plan::MemoryPlan;
use super::{RunnerError, StepRunner};
use crate::device::RankContext;
use crate::model::batch::{BatchEntry, ForwardBatch};
use crate::model::decoder::Decoder;
use crate::model::kv_cache::KvCache;
use crate::model::spec::ModelSpec;
use crate::model::workspace::Workspace;
use crate::ops::OpsError;
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
    ) -> Result<ModelRunner, OpsError> {
        let ops = &*rank.ops;
        let MemoryPlan { limits, max_logit_rows, num_blocks, block_size, kv_dtype, .. } = *plan;
        ops.reserve(&plan.step_limits(spec))?;
        Ok(ModelRunner {
            cache: KvCache::new(ops, spec, num_blocks, block_size, kv_dtype)?,
            workspace: Workspace::new(ops, spec, limits.max_num_tokens, max_logit_rows)?,
            input: ForwardBatch::new(ops, limits)?,
            max_logit_rows,
            decoder,
            rank,
        })
    }

    fn forward(&mut self, batch: &ScheduledBatch, wanted: &[WantedRow]) {
        if !batch.copies.is_empty() {
            self.cache.copy_blocks(&*self.rank.ops, &batch.copies);
        }
        let entries = batch.sequences.iter().map(|seq| BatchEntry {
            token_ids: &batch.token_ids[seq.tokens.clone()],
            start_position: seq.start_position,
            block_ids: &batch.block_ids[seq.blocks.clone()],
        });
        self.input.fill(self.cache.block_size, entries);
        self.input.select(wanted.iter().map(|w| w.token_row));
        self.input.upload(&*self.rank.ops);
        self.decoder.forward(&self.rank, &self.input, &mut self.cache, &mut self.workspace);
    }

    /// Logits and sampling for at most `max_logit_rows` of the wanted rows, of which `first` is
    /// the number of the first.
    fn sample(
        &mut self,
        batch: &ScheduledBatch,
        first: usize,
        wanted: &[WantedRow],
        results: &mut [StepTokens],
    ) {
        let selected = first..first + wanted.len();
        self.decoder.logits(&self.rank, &self.input, selected, &mut self.workspace);
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
        let wanted = wanted_rows(batch);
        self.forward(batch, &wanted);
        let mut results = vec![StepTokens::default(); batch.sequences.len()];
        for (i, rows) in wanted.chunks(self.max_logit_rows).enumerate() {
            self.sample(batch, i * self.max_logit_rows, rows, &mut results);
        }
        self.rank.ops.synchronize().map_err(|error| RunnerError::StepFailed {
            step: batch.step,
            reason: error.to_string(),
        })?;
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
