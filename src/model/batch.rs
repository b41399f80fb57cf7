//! One step's input as flat device arrays.
//!
//! Allocated once for the largest step; `runner` fills it, the decoder reads views of what is
//! in use. Knows nothing of sequences.

use crate::tensor::{DType, Tensor, View};

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

/// Flat input of one forward pass.
pub struct ForwardBatch {
    limits: BatchLimits,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    num_tokens: usize,
    num_seqs: usize,
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

impl ForwardBatch {
    /// Allocates for the largest step.
    pub fn new(limits: BatchLimits) -> ForwardBatch {
        let u32s = |len: usize| Tensor::zeros(DType::U32, [len]);
        ForwardBatch {
            limits,
            token_ids: u32s(limits.max_num_tokens),
            positions: u32s(limits.max_num_tokens),
            slot_mapping: u32s(limits.max_num_tokens),
            block_tables: u32s(limits.max_num_seqs * limits.max_blocks_per_seq),
            cu_seqlens_q: u32s(limits.max_num_seqs + 1),
            context_lens: u32s(limits.max_num_seqs),
            num_tokens: 0,
            num_seqs: 0,
            table_width: 1,
        }
    }

    /// Bytes that [`ForwardBatch::new`] allocates for these limits.
    pub fn size_bytes(limits: BatchLimits) -> usize {
        let u32s =
            3 * limits.max_num_tokens + limits.max_num_seqs * (limits.max_blocks_per_seq + 2) + 1;
        4 * u32s
    }

    /// Describes a step; panics when it exceeds the limits, which the scheduler keeps.
    pub fn fill<'a>(
        &mut self,
        block_size: usize,
        entries: impl ExactSizeIterator<Item = BatchEntry<'a>> + Clone,
    ) {
        self.num_seqs = entries.len();
        self.table_width = entries.clone().map(|e| e.block_ids.len()).max().unwrap_or(0).max(1);
        assert!(self.num_seqs <= self.limits.max_num_seqs, "the step has too many sequences");
        assert!(self.table_width <= self.limits.max_blocks_per_seq, "a block table is too long");
        let token_ids = self.token_ids.as_mut_slice::<u32>();
        let positions = self.positions.as_mut_slice::<u32>();
        let slots = self.slot_mapping.as_mut_slice::<u32>();
        let tables = self.block_tables.as_mut_slice::<u32>();
        let cu_seqlens = self.cu_seqlens_q.as_mut_slice::<u32>();
        let context_lens = self.context_lens.as_mut_slice::<u32>();
        let mut next = 0;
        cu_seqlens[0] = 0;
        for (s, entry) in entries.enumerate() {
            for (i, &token_id) in entry.token_ids.iter().enumerate() {
                let position = entry.start_position as usize + i;
                let block = entry.block_ids[position / block_size] as usize;
                token_ids[next] = token_id;
                positions[next] = position as u32;
                slots[next] = (block * block_size + position % block_size) as u32;
                next += 1;
            }
            let row = &mut tables[s * self.table_width..][..self.table_width];
            row[..entry.block_ids.len()].copy_from_slice(entry.block_ids);
            row[entry.block_ids.len()..].fill(0);
            cu_seqlens[s + 1] = next as u32;
            context_lens[s] = entry.start_position + entry.token_ids.len() as u32;
        }
        self.num_tokens = next;
    }

    /// Tokens in this step.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// `[num_tokens]`.
    pub fn token_ids(&self) -> View<'_> {
        self.token_ids.rows(self.num_tokens)
    }

    /// `[num_tokens]`.
    pub fn positions(&self) -> View<'_> {
        self.positions.rows(self.num_tokens)
    }

    /// `[num_tokens]`.
    pub fn slot_mapping(&self) -> View<'_> {
        self.slot_mapping.rows(self.num_tokens)
    }

    /// `[num_seqs, longest table]`.
    pub fn block_tables(&self) -> View<'_> {
        let shape = [self.num_seqs, self.table_width];
        self.block_tables.rows(self.num_seqs * self.table_width).reshape(shape)
    }

    /// `[num_seqs + 1]`.
    pub fn cu_seqlens_q(&self) -> View<'_> {
        self.cu_seqlens_q.rows(self.num_seqs + 1)
    }

    /// `[num_seqs]`.
    pub fn context_lens(&self) -> View<'_> {
        self.context_lens.rows(self.num_seqs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_follow_the_block_table() {
        let limits = BatchLimits { max_num_tokens: 8, max_num_seqs: 2, max_blocks_per_seq: 3 };
        let mut batch = ForwardBatch::new(limits);
        let entries = [
            BatchEntry { token_ids: &[7, 8, 9], start_position: 3, block_ids: &[5, 2] },
            BatchEntry { token_ids: &[1], start_position: 0, block_ids: &[4] },
        ];
        batch.fill(4, entries.iter().copied());
        assert_eq!(batch.token_ids().as_slice::<u32>(), [7, 8, 9, 1]);
        assert_eq!(batch.positions().as_slice::<u32>(), [3, 4, 5, 0]);
        assert_eq!(batch.slot_mapping().as_slice::<u32>(), [23, 8, 9, 16]);
        assert_eq!(batch.block_tables().as_slice::<u32>(), [5, 2, 4, 0]);
        assert_eq!(batch.cu_seqlens_q().as_slice::<u32>(), [0, 3, 4]);
        assert_eq!(batch.context_lens().as_slice::<u32>(), [6, 1]);
    }
}
