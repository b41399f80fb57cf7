//! One step's input as flat arrays.
//!
//! All arrays lie in one buffer, each at an offset that depends on the largest step alone: one
//! copy brings a step to a device, and launches that were recorded find the next step's arrays
//! where they found this one's. Allocated once; `runner` fills it, the decoder reads views of
//! what is in use. Knows nothing of sequences.

use std::ops::Range;

use crate::ops::staged::Staged;
use crate::ops::{Ops, OpsError};
use crate::tensor::View;

/// The largest step that a [`ForwardBatch`] can describe.
#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Tokens per step.
    pub max_num_tokens: usize,
    /// Sequences per step.
    pub max_num_seqs: usize,
    /// Blocks per sequence.
    pub max_blocks_per_seq: usize,
}

/// Integers to which the arrays of a buffer are aligned: a cache line.
const ALIGN: usize = 16;

/// Where each array begins in the buffer, in integers.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    positions: usize,
    slot_mapping: usize,
    cu_seqlens_q: usize,
    context_lens: usize,
    logit_rows: usize,
    /// The last, because a step seldom uses much of it.
    block_tables: usize,
    end: usize,
}

impl Offsets {
    fn new(limits: BatchLimits) -> Offsets {
        let tokens = limits.max_num_tokens.next_multiple_of(ALIGN);
        let seqs = (limits.max_num_seqs + 1).next_multiple_of(ALIGN);
        let cu_seqlens_q = 3 * tokens;
        let logit_rows = cu_seqlens_q + 2 * seqs;
        let block_tables = logit_rows + tokens;
        Offsets {
            positions: tokens,
            slot_mapping: 2 * tokens,
            cu_seqlens_q,
            context_lens: cu_seqlens_q + seqs,
            logit_rows,
            block_tables,
            end: block_tables + limits.max_num_seqs * limits.max_blocks_per_seq,
        }
    }
}

/// Flat input of one forward pass.
pub struct ForwardBatch {
    limits: BatchLimits,
    offsets: Offsets,
    buffer: Staged,
    num_tokens: usize,
    num_seqs: usize,
    num_logit_rows: usize,
    table_width: usize,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct BatchEntry<'a> {
    /// Tokens to compute.
    pub token_ids: &'a [u32],
    /// Position of the first of them.
    pub start_position: u32,
    /// Blocks covering positions `0..start_position + token_ids.len()`.
    pub block_ids: &'a [u32],
}

/// Rows that fill a step up to a shape, each a sequence of its own that nobody reads.
#[derive(Clone, Copy, Debug)]
pub struct Padding {
    /// Sequences when the step is filled up.
    pub num_seqs: usize,
    /// Columns of the block tables.
    pub table_width: usize,
    /// The first of the blocks that only these rows write; every row has a slot of its own.
    pub first_block: usize,
}

impl ForwardBatch {
    /// Allocates for the largest step.
    pub fn new(ops: &dyn Ops, limits: BatchLimits) -> Result<ForwardBatch, OpsError> {
        let offsets = Offsets::new(limits);
        Ok(ForwardBatch {
            limits,
            offsets,
            buffer: Staged::new(ops, offsets.end)?,
            num_tokens: 0,
            num_seqs: 0,
            num_logit_rows: 0,
            table_width: 1,
        })
    }

    /// Bytes that [`ForwardBatch::new`] allocates for these limits where operations read them.
    pub fn size_bytes(limits: BatchLimits) -> usize {
        4 * Offsets::new(limits).end
    }

    /// Describes a step; panics when it exceeds the limits, which the scheduler keeps.
    pub fn fill<'a>(
        &mut self,
        block_size: usize,
        entries: impl ExactSizeIterator<Item = BatchEntry<'a>> + Clone,
    ) {
        let widest = entries.clone().map(|entry| entry.block_ids.len()).max();
        self.begin(widest.unwrap_or(0).max(1));
        entries.for_each(|entry| self.push(block_size, entry));
    }

    /// As [`ForwardBatch::fill`], then filled up with rows of one token each.
    pub fn fill_padded<'a>(
        &mut self,
        block_size: usize,
        entries: impl ExactSizeIterator<Item = BatchEntry<'a>>,
        padding: Padding,
    ) {
        self.begin(padding.table_width);
        entries.for_each(|entry| self.push(block_size, entry));
        for row in 0..padding.num_seqs - self.num_seqs {
            let block_ids = &[(padding.first_block + row / block_size) as u32];
            let start_position = (row % block_size) as u32;
            self.push(block_size, BatchEntry { token_ids: &[0], start_position, block_ids });
        }
    }

    fn begin(&mut self, table_width: usize) {
        assert!(table_width <= self.limits.max_blocks_per_seq, "a block table is too long");
        self.table_width = table_width;
        (self.num_tokens, self.num_seqs, self.num_logit_rows) = (0, 0, 0);
        self.offsets.split(self.buffer.host_mut()).cu_seqlens_q[0] = 0;
    }

    fn push(&mut self, block_size: usize, entry: BatchEntry<'_>) {
        assert!(self.num_seqs < self.limits.max_num_seqs, "the step has too many sequences");
        let to = self.offsets.split(self.buffer.host_mut());
        let (s, mut next) = (self.num_seqs, self.num_tokens);
        for (position, &token_id) in (entry.start_position as usize..).zip(entry.token_ids) {
            let block = entry.block_ids[position / block_size] as usize;
            to.token_ids[next] = token_id;
            to.positions[next] = position as u32;
            to.slot_mapping[next] = (block * block_size + position % block_size) as u32;
            next += 1;
        }
        let row = &mut to.block_tables[s * self.table_width..][..self.table_width];
        row[..entry.block_ids.len()].copy_from_slice(entry.block_ids);
        row[entry.block_ids.len()..].fill(0);
        to.cu_seqlens_q[s + 1] = next as u32;
        to.context_lens[s] = entry.start_position + entry.token_ids.len() as u32;
        (self.num_seqs, self.num_tokens) = (s + 1, next);
    }

    /// Says of which of the step's tokens logits are wanted.
    pub fn select(&mut self, rows: impl ExactSizeIterator<Item = u32>) {
        self.num_logit_rows = rows.len();
        let to = self.offsets.split(self.buffer.host_mut()).logit_rows;
        to.iter_mut().zip(rows).for_each(|(to, row)| *to = row);
    }

    /// Shows the step to operations. To be called once, after it is described.
    pub fn upload(&mut self, ops: &dyn Ops) {
        let tables = self.num_seqs * self.table_width;
        self.buffer.upload(ops, self.offsets.block_tables + tables);
    }

    /// Tokens in this step.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Rows whose logits are wanted.
    pub fn num_logit_rows(&self) -> usize {
        self.num_logit_rows
    }

    /// `[num_tokens]`.
    pub fn token_ids(&self) -> View<'_> {
        self.array(0, self.num_tokens)
    }

    /// `[num_tokens]`.
    pub fn positions(&self) -> View<'_> {
        self.array(self.offsets.positions, self.num_tokens)
    }

    /// `[num_tokens]`.
    pub fn slot_mapping(&self) -> View<'_> {
        self.array(self.offsets.slot_mapping, self.num_tokens)
    }

    /// `[num_seqs, longest table]`.
    pub fn block_tables(&self) -> View<'_> {
        let shape = [self.num_seqs, self.table_width];
        self.array(self.offsets.block_tables, self.num_seqs * self.table_width).reshape(shape)
    }

    /// `[num_seqs + 1]`.
    pub fn cu_seqlens_q(&self) -> View<'_> {
        self.array(self.offsets.cu_seqlens_q, self.num_seqs + 1)
    }

    /// `[num_seqs]`.
    pub fn context_lens(&self) -> View<'_> {
        self.array(self.offsets.context_lens, self.num_seqs)
    }

    /// A part of the selected tokens.
    pub fn logit_rows(&self, selected: Range<usize>) -> View<'_> {
        assert!(selected.end <= self.num_logit_rows, "rows {selected:?} were not selected");
        self.array(self.offsets.logit_rows + selected.start, selected.len())
    }

    fn array(&self, start: usize, len: usize) -> View<'_> {
        self.buffer.view(start..start + len)
    }
}

/// The arrays of a buffer.
struct Arrays<'a> {
    token_ids: &'a mut [u32],
    positions: &'a mut [u32],
    slot_mapping: &'a mut [u32],
    cu_seqlens_q: &'a mut [u32],
    context_lens: &'a mut [u32],
    logit_rows: &'a mut [u32],
    block_tables: &'a mut [u32],
}

impl Offsets {
    fn split(self, buffer: &mut [u32]) -> Arrays<'_> {
        let (token_ids, rest) = buffer.split_at_mut(self.positions);
        let (positions, rest) = rest.split_at_mut(self.slot_mapping - self.positions);
        let (slot_mapping, rest) = rest.split_at_mut(self.cu_seqlens_q - self.slot_mapping);
        let (cu_seqlens_q, rest) = rest.split_at_mut(self.context_lens - self.cu_seqlens_q);
        let (context_lens, rest) = rest.split_at_mut(self.logit_rows - self.context_lens);
        let (logit_rows, block_tables) = rest.split_at_mut(self.block_tables - self.logit_rows);
        Arrays {
            token_ids,
            positions,
            slot_mapping,
            cu_seqlens_q,
            context_lens,
            logit_rows,
            block_tables,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::ReferenceOps;

    #[test]
    fn slots_follow_the_block_table() {
        let limits = BatchLimits { max_num_tokens: 8, max_num_seqs: 2, max_blocks_per_seq: 3 };
        let mut batch = ForwardBatch::new(&ReferenceOps, limits).expect("it is small");
        let entries = [
            BatchEntry { token_ids: &[7, 8, 9], start_position: 3, block_ids: &[5, 2] },
            BatchEntry { token_ids: &[1], start_position: 0, block_ids: &[4] },
        ];
        batch.fill(4, entries.iter().copied());
        batch.select([2, 3].into_iter());
        batch.upload(&ReferenceOps);
        assert_eq!(batch.token_ids().as_slice::<u32>(), [7, 8, 9, 1]);
        assert_eq!(batch.positions().as_slice::<u32>(), [3, 4, 5, 0]);
        assert_eq!(batch.slot_mapping().as_slice::<u32>(), [23, 8, 9, 16]);
        assert_eq!(batch.block_tables().as_slice::<u32>(), [5, 2, 4, 0]);
        assert_eq!(batch.cu_seqlens_q().as_slice::<u32>(), [0, 3, 4]);
        assert_eq!(batch.context_lens().as_slice::<u32>(), [6, 1]);
        assert_eq!(batch.logit_rows(0..2).as_slice::<u32>(), [2, 3]);
        assert_eq!(batch.logit_rows(1..2).as_slice::<u32>(), [3]);
    }

    #[test]
    fn rows_that_fill_a_step_up_write_slots_of_their_own() {
        let limits = BatchLimits { max_num_tokens: 8, max_num_seqs: 8, max_blocks_per_seq: 3 };
        let mut batch = ForwardBatch::new(&ReferenceOps, limits).expect("it is small");
        let entry = BatchEntry { token_ids: &[7], start_position: 4, block_ids: &[5, 2, 2] };
        let padding = Padding { num_seqs: 4, table_width: 3, first_block: 9 };
        batch.fill_padded(2, [entry].into_iter(), padding);
        assert_eq!(batch.token_ids().as_slice::<u32>(), [7, 0, 0, 0]);
        assert_eq!(batch.positions().as_slice::<u32>(), [4, 0, 1, 0]);
        assert_eq!(batch.slot_mapping().as_slice::<u32>(), [4, 18, 19, 20]);
        let tables = [5, 2, 2, 9, 0, 0, 9, 0, 0, 10, 0, 0];
        assert_eq!(batch.block_tables().as_slice::<u32>(), tables);
        assert_eq!(batch.cu_seqlens_q().as_slice::<u32>(), [0, 1, 2, 3, 4]);
        assert_eq!(batch.context_lens().as_slice::<u32>(), [5, 1, 2, 1]);
    }
}
