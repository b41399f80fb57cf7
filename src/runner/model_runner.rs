//! The real runner: a planned batch becomes a forward pass and sampled tokens.

use std::sync::Arc;
use std::time::Instant;

use tracing::info;

use super::memory_plan::MemoryPlan;
use super::recorded::{RecordedSteps, StepShape};
use super::{RunnerError, StepRunner};
use crate::device::RankContext;
use crate::model::batch::{BatchEntry, ForwardBatch};
use crate::model::decoder::Decoder;
use crate::model::kv_cache::KvCache;
use crate::model::spec::ModelSpec;
use crate::model::workspace::Workspace;
use crate::ops::OpsError;
use crate::ops::args::{RowTask, SampleArgs, SampleRow};
use crate::output::SampledToken;
use crate::scheduler::batch::{ScheduledBatch, ScheduledSequence, StepTokens};

/// Computes steps with a decoder on one rank. Everything it writes to was allocated at start.
pub struct ModelRunner {
    decoder: Decoder,
    rank: RankContext,
    cache: KvCache,
    workspace: Workspace,
    input: ForwardBatch,
    /// `None` where steps cannot be recorded, or must not.
    recorded: Option<RecordedSteps>,
    /// Blocks that the scheduler knows of; the rows that fill recorded steps up write to others.
    num_blocks: usize,
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
        let all_blocks = num_blocks + plan.spare_blocks;
        let recorded = || RecordedSteps::new(limits.max_num_seqs, limits.max_blocks_per_seq);
        ops.set_aside(plan.room_beside_weights(spec))?;
        ops.reserve(&plan.step_limits(spec))?;
        Ok(ModelRunner {
            recorded: ops.can_record().then(recorded),
            num_blocks,
            cache: KvCache::new(ops, spec, all_blocks, block_size, kv_dtype)?,
            workspace: Workspace::new(ops, spec, limits.max_num_tokens, max_logit_rows)?,
            input: ForwardBatch::new(ops, limits)?,
            max_logit_rows,
            decoder,
            rank,
        })
    }

    /// Records the steps that will come up most, where steps are recorded, so that none of them waits
    /// for it later. To be called before the first step, while no block is anybody's.
    pub fn record_common_steps(&mut self) -> Result<(), OpsError> {
        let Some(recorded) = &self.recorded else { return Ok(()) };
        let (started, ops) = (Instant::now(), Arc::clone(&self.rank.ops));
        let slots = self.num_blocks * self.cache.block_size;
        let mut shapes = recorded.common_shapes();
        shapes.retain(|shape| shape.num_seqs <= slots.min(self.max_logit_rows));
        for &shape in &shapes {
            // All rows are padding, in blocks that will be overwritten before they are read.
            self.describe([].into_iter(), shape, 0);
            self.record(shape);
            ops.synchronize()?;
        }
        info!(steps = shapes.len(), seconds = started.elapsed().as_secs_f64(), "recorded steps");
        Ok(())
    }

    /// Computes the step, and the logits of as many wanted rows as have room at once; or the tokens
    /// of all wanted rows, where no logits are needed for them.
    fn forward(&mut self, batch: &ScheduledBatch, wanted: &[WantedRow]) -> Option<Vec<u32>> {
        if !batch.copies.is_empty() {
            self.cache.copy_blocks(&*self.rank.ops, &batch.copies);
        }
        match self.recorded.as_ref().and_then(|recorded| recorded.shape_for(batch)) {
            Some(shape) if shape.num_seqs <= self.max_logit_rows => {
                self.replay(batch, shape);
                None
            }
            _ => {
                self.input.fill(self.cache.block_size, entries(batch));
                self.input.select(wanted.iter().map(|w| w.token_row));
                self.input.upload(&*self.rank.ops);
                self.compute_hidden();
                if self.is_greedy(batch, wanted) {
                    return self.compute_greedy(wanted.len());
                }
                self.compute_logits();
                None
            }
        }
    }

    /// Computes a step of one token per sequence in a shape that is recorded.
    fn replay(&mut self, batch: &ScheduledBatch, shape: StepShape) {
        self.describe(entries(batch), shape, self.num_blocks);
        match self.recorded.as_mut().and_then(|recorded| recorded.get(shape)) {
            Some(step) => self.rank.ops.replay(step),
            None => self.record(shape),
        }
    }

    /// Uploads a step that is filled up to a shape with rows in blocks from `first_block` on.
    fn describe<'a>(
        &mut self,
        entries: impl ExactSizeIterator<Item = BatchEntry<'a>>,
        shape: StepShape,
        first_block: usize,
    ) {
        self.input.fill_padded(self.cache.block_size, entries, shape.padding(first_block));
        self.input.select(0..shape.num_seqs as u32);
        self.input.upload(&*self.rank.ops);
    }

    /// Computes the step that was uploaded, and records it for the next of this shape.
    fn record(&mut self, shape: StepShape) {
        let ops = Arc::clone(&self.rank.ops);
        // Computed before it is recorded, because a device may load kernels at their first use,
        // and that cannot be recorded.
        self.compute();
        let recording = ops.record(&mut || self.compute());
        if let (Some(recorded), Some(recording)) = (&mut self.recorded, recording) {
            recorded.insert(shape, recording);
        }
    }

    /// Whether the token with the largest logit is all that is wanted of every row, and all rows
    /// have room at once.
    fn is_greedy(&self, batch: &ScheduledBatch, wanted: &[WantedRow]) -> bool {
        (1..=self.max_logit_rows).contains(&wanted.len())
            && wanted.iter().all(|w| sample_row(batch, w).is_plain_greedy())
    }

    /// The forward pass, and the first logits.
    fn compute(&mut self) {
        self.compute_hidden();
        self.compute_logits();
    }

    fn compute_hidden(&mut self) {
        let ModelRunner { decoder, rank, input, cache, workspace, .. } = self;
        decoder.forward(rank, input, cache, workspace);
    }

    /// The tokens of all rows, or the logits where the device needs them.
    fn compute_greedy(&mut self, num_rows: usize) -> Option<Vec<u32>> {
        let ModelRunner { decoder, rank, input, workspace, .. } = self;
        decoder.greedy(rank, input, 0..num_rows, workspace)
    }

    fn compute_logits(&mut self) {
        let ModelRunner { decoder, rank, input, workspace, .. } = self;
        let num_rows = input.num_logit_rows().min(self.max_logit_rows);
        if num_rows > 0 {
            decoder.logits(rank, input, 0..num_rows, workspace);
        }
    }

    /// Samples all rows; the logits of those that have no room at once are yet to be computed.
    fn sample_all(
        &mut self,
        batch: &ScheduledBatch,
        wanted: &[WantedRow],
        results: &mut [StepTokens],
    ) {
        for (i, rows) in wanted.chunks(self.max_logit_rows).enumerate() {
            if i > 0 {
                let first = i * self.max_logit_rows;
                let ModelRunner { decoder, rank, input, workspace, .. } = self;
                decoder.logits(rank, input, first..first + rows.len(), workspace);
            }
            self.sample(batch, rows, results);
        }
    }

    /// Samples from the logits of the wanted rows, which lie in the workspace.
    fn sample(&mut self, batch: &ScheduledBatch, wanted: &[WantedRow], results: &mut [StepTokens]) {
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

/// The sequences of a step as the model takes them.
fn entries(batch: &ScheduledBatch) -> impl ExactSizeIterator<Item = BatchEntry<'_>> + Clone {
    batch.sequences.iter().map(|seq| BatchEntry {
        token_ids: &batch.token_ids[seq.tokens.clone()],
        start_position: seq.start_position,
        block_ids: &batch.block_ids[seq.blocks.clone()],
    })
}

impl StepRunner for ModelRunner {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        self.execute_beside(batch, &mut || {})
    }

    fn has_device(&self) -> bool {
        self.rank.ops.runs_beside_host()
    }

    fn execute_beside(
        &mut self,
        batch: &ScheduledBatch,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<StepTokens>, RunnerError> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let wanted = wanted_rows(batch);
        let greedy = self.forward(batch, &wanted);
        if self.has_device() {
            // The first thing that waits for the device is sampling.
            meanwhile();
        }
        let mut results = vec![StepTokens::default(); batch.sequences.len()];
        match greedy {
            Some(token_ids) => {
                for (wanted, token_id) in wanted.iter().zip(token_ids) {
                    let token = SampledToken { token_id, logprobs: None };
                    results[wanted.sequence].sampled.push(token);
                }
            }
            None => self.sample_all(batch, &wanted, &mut results),
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
        seen: &batch.seen[seq.seen.clone()],
        banned_token_ids: &batch.banned[seq.banned.clone()],
        bitmask: None,
    }
}
