//! Decode steps that are recorded once and replayed (CUDA graphs).
//!
//! Launching the kernels of a step takes the host longer than a GPU needs to compute a small
//! one. A step in which every sequence computes one token is therefore recorded and replayed
//! for every later step of the same shape. To keep shapes few, steps are filled up to a bucket
//! with rows that nobody reads, and block tables are widened. The rows write to blocks that the
//! scheduler does not know of, so that they disturb nobody. Shapes that every server meets are
//! recorded before it serves, others when they first come up; of too many, those that were not
//! used for longest go. Which steps, which shapes, which rows: that is decided here, of integers
//! alone.

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
/// Most shapes that are kept.
const MOST_SHAPES: usize = 256;
/// Most shapes that are recorded before anything is served: some hundredths of a second each.
const MOST_AT_START: usize = 64;

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
    steps: HashMap<StepShape, Kept>,
    /// How often a step was asked for.
    num_uses: u64,
    max_num_seqs: usize,
    max_table_width: usize,
}

/// A recorded step.
struct Kept {
    recording: Recording,
    /// Which use the last of it was.
    last_use: u64,
}

impl RecordedSteps {
    /// For steps of up to `max_num_seqs` sequences of up to `max_table_width` blocks.
    pub fn new(max_num_seqs: usize, max_table_width: usize) -> RecordedSteps {
        RecordedSteps { steps: HashMap::new(), num_uses: 0, max_num_seqs, max_table_width }
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
        Some(StepShape {
            num_seqs: bucket(batch.sequences.len()).min(self.max_num_seqs),
            table_width: table_width(widest).min(self.max_table_width),
        })
    }

    /// Shapes to record before anything is served: any number of sequences, with short contexts
    /// first.
    pub fn common_shapes(&self) -> Vec<StepShape> {
        let mut shapes = Vec::new();
        let mut table_width = LEAST_TABLE_WIDTH.min(self.max_table_width);
        loop {
            for num_seqs in buckets(self.max_num_seqs) {
                shapes.push(StepShape { num_seqs, table_width });
            }
            if table_width == self.max_table_width || shapes.len() >= MOST_AT_START {
                break;
            }
            table_width = (2 * table_width).min(self.max_table_width);
        }
        shapes.truncate(MOST_AT_START);
        shapes
    }

    /// The recording of a shape, to be used.
    pub fn get(&mut self, shape: StepShape) -> Option<&Recording> {
        let kept = self.steps.get_mut(&shape)?;
        self.num_uses += 1;
        kept.last_use = self.num_uses;
        Some(&kept.recording)
    }

    /// Keeps a recording for the next step of this shape.
    pub fn insert(&mut self, shape: StepShape, recording: Recording) {
        debug!(?shape, "recorded a step");
        if self.steps.len() >= MOST_SHAPES {
            let oldest = self.steps.iter().min_by_key(|(_, kept)| kept.last_use);
            if let Some(oldest) = oldest.map(|(&shape, _)| shape) {
                self.steps.remove(&oldest);
            }
        }
        self.num_uses += 1;
        self.steps.insert(shape, Kept { recording, last_use: self.num_uses });
    }
}

/// The number of rows to which a step is filled up.
fn bucket(num_seqs: usize) -> usize {
    match num_seqs {
        0..BUCKET_STEP => num_seqs.next_power_of_two(),
        _ => num_seqs.next_multiple_of(BUCKET_STEP),
    }
}

/// All buckets of steps of up to `max_num_seqs` rows.
fn buckets(max_num_seqs: usize) -> Vec<usize> {
    let mut buckets: Vec<usize> =
        (1..=max_num_seqs).map(|num_seqs| bucket(num_seqs).min(max_num_seqs)).collect();
    buckets.dedup();
    buckets
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
    fn of_too_many_shapes_those_go_that_were_not_used_for_longest() {
        let mut steps = RecordedSteps::new(8, 8);
        let shape = |num_seqs| StepShape { num_seqs, table_width: 8 };
        for num_seqs in 0..MOST_SHAPES {
            steps.insert(shape(num_seqs), Recording::new(num_seqs));
        }
        assert_eq!(steps.get(shape(0)).map(|recording| *recording.get::<usize>()), Some(0));
        steps.insert(shape(MOST_SHAPES), Recording::new(()));
        assert!(steps.get(shape(0)).is_some(), "it was just used");
        assert!(steps.get(shape(1)).is_none(), "it was used before all others");
        assert!(steps.get(shape(2)).is_some() && steps.get(shape(MOST_SHAPES)).is_some());
        assert_eq!(steps.steps.len(), MOST_SHAPES);
    }

    #[test]
    fn any_number_of_sequences_with_short_contexts_is_recorded_at_start() {
        let common = |max_num_seqs, max_table_width| -> Vec<(usize, usize)> {
            let shapes = RecordedSteps::new(max_num_seqs, max_table_width).common_shapes();
            shapes.into_iter().map(|shape| (shape.num_seqs, shape.table_width)).collect()
        };
        assert_eq!(common(3, 6), [(1, 6), (2, 6), (3, 6)]);
        assert_eq!(common(2, 100), [(1, 32), (2, 32), (1, 64), (2, 64), (1, 100), (2, 100)]);
        let many = common(256, 2048);
        assert_eq!((many.len(), many[20]), (MOST_AT_START, (1, 64)), "twenty buckets a width");
        let steps = RecordedSteps::new(256, 2048);
        let served = steps.shape_for(&batch(&[(1, 3); 200])).expect("a decode step");
        assert!(many.contains(&(served.num_seqs, served.table_width)));
    }
}
