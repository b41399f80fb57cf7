//! Decode steps that are recorded once and replayed (CUDA graphs).
//!
//! Launching the kernels of a step takes the host longer than a GPU needs to compute a small
//! one. A step in which every sequence computes one token is therefore recorded and replayed
//! for every later step of the same shape. To keep shapes few, steps are filled up to a bucket
//! with rows that nobody reads, and block tables are widened. The rows write to blocks that the
//! scheduler does not know of, so that they disturb nobody. Which steps, which shapes, which
//! rows: that is decided here, of integers alone.

use std::collections::HashMap;

use tracing::debug;

use crate::model::batch::Padding;
use crate::ops::Recording;
use crate::scheduler::batch::ScheduledBatch;

/// From this size on buckets are multiples of it; below they are powers of two.
const BUCKET_STEP: usize = 16;
/// Most rows with which a step is filled up.
pub const MOST_PADDING: usize = BUCKET_STEP - 1;
/// Blocks of the narrowest table; wider ones are powers of two. How attention is cut into tasks
/// follows from the width, so that a short context is not launched like a long one.
const LEAST_TABLE_WIDTH: usize = 32;
/// Most shapes that are kept; steps of others are launched kernel by kernel.
const MOST_SHAPES: usize = 256;

/// The shape of a recorded step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Rows, each of a sequence of its own.
    pub num_seqs: usize,
    /// Columns of the block tables.
    pub table_width: usize,
}

/// Recorded steps by shape.
pub struct RecordedSteps {
    steps: HashMap<StepShape, Recording>,
    max_num_seqs: usize,
    max_table_width: usize,
}

impl RecordedSteps {
    /// For steps of up to `max_num_seqs` sequences of up to `max_table_width` blocks.
    pub fn new(max_num_seqs: usize, max_table_width: usize) -> RecordedSteps {
        RecordedSteps { steps: HashMap::new(), max_num_seqs, max_table_width }
    }

    /// The shape in which to compute a step; `None` when it must be launched as it is.
    pub fn shape_for(&self, batch: &ScheduledBatch) -> Option<StepShape> {
        let decodes = batch
            .sequences
            .iter()
            .all(|seq| seq.tokens.len() == 1 && seq.samples && seq.scores.is_empty());
        if !decodes || batch.is_empty() {
            return None;
        }
        let widest = batch.sequences.iter().map(|seq| seq.blocks.len()).max()?;
        let shape = StepShape {
            num_seqs: bucket(batch.sequences.len()).min(self.max_num_seqs),
            table_width: table_width(widest).min(self.max_table_width),
        };
        let is_known = self.steps.contains_key(&shape);
        (is_known || self.steps.len() < MOST_SHAPES).then_some(shape)
    }

    /// The recording of a shape.
    pub fn get(&self, shape: StepShape) -> Option<&Recording> {
        self.steps.get(&shape)
    }

    /// Keeps a recording for the next step of this shape.
    pub fn insert(&mut self, shape: StepShape, recording: Recording) {
        debug!(?shape, "recorded a step");
        self.steps.insert(shape, recording);
    }
}

/// The number of rows to which a step is filled up.
fn bucket(num_seqs: usize) -> usize {
    match num_seqs {
        0..BUCKET_STEP => num_seqs.next_power_of_two(),
        _ => num_seqs.next_multiple_of(BUCKET_STEP),
    }
}

fn table_width(num_blocks: usize) -> usize {
    num_blocks.max(LEAST_TABLE_WIDTH).next_power_of_two()
}

impl StepShape {
    /// How a batch is filled up to this shape, with blocks from `first_block` on.
    pub fn padding(self, first_block: usize) -> Padding {
        Padding { num_seqs: self.num_seqs, table_width: self.table_width, first_block }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::request::SamplingParams;
    use crate::scheduler::batch::{ScheduledSequence, SequenceId};

    /// Sequences of as many tokens and blocks each.
    fn batch(parts: &[(usize, usize)]) -> ScheduledBatch {
        let (mut batch, mut tokens, mut blocks) = (ScheduledBatch::default(), 0, 0);
        for (i, &(num_tokens, num_blocks)) in parts.iter().enumerate() {
            batch.sequences.push(ScheduledSequence {
                id: SequenceId(i as u64),
                tokens: tokens..tokens + num_tokens,
                blocks: blocks..blocks + num_blocks,
                start_position: 0,
                samples: true,
                scores: 0..0,
                params: Arc::new(SamplingParams::greedy()),
                seed: 0,
                seen: 0..0,
                banned: 0..0,
            });
            (tokens, blocks) = (tokens + num_tokens, blocks + num_blocks);
        }
        batch
    }

    fn shape(parts: &[(usize, usize)]) -> Option<(usize, usize)> {
        let shape = RecordedSteps::new(100, 600).shape_for(&batch(parts))?;
        Some((shape.num_seqs, shape.table_width))
    }

    #[test]
    fn decode_steps_are_filled_up_to_buckets_and_others_are_not_recorded() {
        assert_eq!(shape(&[(1, 3)]), Some((1, 32)));
        assert_eq!(shape(&[(1, 3); 3]), Some((4, 32)));
        assert_eq!(shape(&[(1, 33); 17]), Some((32, 64)));
        assert_eq!(shape(&[(1, 3), (2, 3)]), None, "a chunk of a prompt");
        assert_eq!(shape(&[]), None);
    }

    #[test]
    fn a_shape_never_exceeds_the_largest_step() {
        assert_eq!(shape(&[(1, 1); 99]), Some((100, 32)));
        assert_eq!(shape(&[(1, 1); 100]), Some((100, 32)));
        assert_eq!(shape(&[(1, 590)]), Some((1, 600)));
    }

    #[test]
    fn buckets_hold_every_batch_and_waste_no_more_than_planned() {
        for num_seqs in 1..=512 {
            let rows = bucket(num_seqs);
            assert!(rows >= num_seqs && rows - num_seqs <= MOST_PADDING, "{num_seqs} in {rows}");
            assert_eq!(bucket(rows), rows, "a bucket is its own");
        }
        assert_eq!([1, 2, 3, 5, 9, 16, 17].map(bucket), [1, 2, 4, 8, 16, 16, 32]);
    }

    #[test]
    fn a_full_collection_takes_no_more_shapes() {
        let mut steps = RecordedSteps::new(8, 8);
        let known = steps.shape_for(&batch(&[(1, 1)])).expect("a decode step");
        for num_seqs in 1..MOST_SHAPES {
            let other = StepShape { num_seqs: 1000 + num_seqs, table_width: 8 };
            steps.insert(other, Recording::new(()));
        }
        assert!(steps.get(known).is_none());
        steps.insert(known, Recording::new(7u8));
        assert_eq!(steps.shape_for(&batch(&[(1, 1)])), Some(known));
        assert_eq!(steps.get(known).map(|recording| *recording.get::<u8>()), Some(7));
        assert_eq!(steps.shape_for(&batch(&[(1, 1); 2])), None);
    }
}
