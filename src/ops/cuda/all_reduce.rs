//! Sums over the ranks of a replica by one kernel on each: GPUs that reach each other's memory.
//!
//! Made for the sums of a decode step, where a ring of messages would be all latency: every rank
//! reads what all ranks have, so that it moves `world - 1` times what it adds. Ranks get the same
//! bits, and a launch can be recorded: nothing about a round comes from the host.
//!
//! Whoever starts the ranks makes an [`Exchange`] for each and a [`Group`] per rank of all of
//! them, and has enabled access to peers before. Each rank then asks for the same sums in the
//! same order. An exchange lives as long as any rank's group, so no rank reads what was freed;
//! a rank whose peers never come waits.

use std::sync::Arc;

use super::launcher::{CudaError, Launch, Launcher, args, count};
use crate::tensor::{DType, Shape, Tensor, ViewMut};

/// Threads of a block (`THREADS` in `all_reduce.cu`).
const THREADS: usize = 512;
/// Most blocks of a launch (`MAX_BLOCKS`).
const MAX_BLOCKS: usize = 32;
/// Flags and counters before an exchange's data (`HEADER_BYTES`).
const HEADER_BYTES: usize = 4096;
/// What a thread loads at once.
const PACK_BYTES: usize = 16;

/// Memory of one rank that all ranks read from and set flags in.
pub struct Exchange {
    memory: Tensor,
    capacity_bytes: usize,
}

impl Exchange {
    /// Room for sums of `capacity_bytes` at a time; longer ones are added in several rounds. No
    /// rank may use it before this has returned.
    pub fn new<L: Launcher>(
        launcher: &L,
        capacity_bytes: usize,
    ) -> Result<Arc<Exchange>, CudaError> {
        let capacity_bytes = capacity_bytes.max(1).next_multiple_of(PACK_BYTES);
        let words = (HEADER_BYTES + 2 * capacity_bytes) / DType::U32.size_bytes();
        let mut memory = launcher.allocate(DType::U32, Shape::from([words]))?;
        launcher.clear(memory.view_mut());
        launcher.synchronize()?;
        Ok(Arc::new(Exchange { memory, capacity_bytes }))
    }

    fn address(&self) -> u64 {
        self.memory.view().address().addr() as u64
    }
}

/// One rank among the ranks of its replica.
pub struct Group {
    rank: usize,
    exchanges: Vec<Arc<Exchange>>,
    /// Addresses of the exchanges, in this rank's memory.
    addresses: Tensor,
}

impl Group {
    /// Rank `rank` of as many as there are exchanges: 2, 4 or 8, of the same capacity.
    pub fn new<L: Launcher>(
        launcher: &L,
        rank: usize,
        exchanges: Vec<Arc<Exchange>>,
    ) -> Result<Group, CudaError> {
        let what = || format!("rank {rank} of {}", exchanges.len());
        let refused = |reason: &str| CudaError::Device { what: what(), reason: reason.to_owned() };
        if !matches!(exchanges.len(), 2 | 4 | 8) {
            return Err(refused("all-reduce has kernels for 2, 4 and 8 ranks"));
        }
        let Some(own) = exchanges.get(rank) else {
            return Err(refused("ranks are numbers below that of exchanges"));
        };
        if exchanges.iter().any(|exchange| exchange.capacity_bytes != own.capacity_bytes) {
            return Err(refused("exchanges have to have the same capacity"));
        }
        let bytes: Vec<u8> =
            exchanges.iter().flat_map(|exchange| exchange.address().to_le_bytes()).collect();
        let shape = Shape::from([bytes.len() / DType::U32.size_bytes()]);
        let mut addresses = launcher.allocate(DType::U32, shape)?;
        launcher.upload(addresses.view_mut(), &bytes);
        Ok(Group { rank, exchanges, addresses })
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.exchanges.len()
    }

    /// Replaces `data` (bf16, f16 or f32) on every rank by the sum over all ranks, added in f32 in
    /// the order of ranks and rounded once. Every rank has to ask for it with as many elements.
    pub fn all_reduce<L: Launcher>(&self, launcher: &L, mut data: ViewMut<'_>) {
        let kernel = self.kernel(data.dtype());
        let (size, num_elements) = (data.dtype().size_bytes(), data.shape().len());
        let capacity_bytes = self.exchanges[self.rank].capacity_bytes;
        let per_round = capacity_bytes / size;
        for first in (0..num_elements).step_by(per_round) {
            let len = per_round.min(num_elements - first);
            let blocks = (len * size).div_ceil(PACK_BYTES * THREADS).min(MAX_BLOCKS);
            let args = args![
                &mut data,
                &self.addresses,
                count(self.rank),
                first as u64,
                count(len),
                count(capacity_bytes),
            ];
            launcher.launch(kernel, Launch::new(blocks, THREADS), &args);
        }
    }

    fn kernel(&self, dtype: DType) -> &'static str {
        match (dtype, self.world()) {
            (DType::BF16, 2) => "all_reduce_bf16_w2",
            (DType::BF16, 4) => "all_reduce_bf16_w4",
            (DType::BF16, _) => "all_reduce_bf16_w8",
            (DType::F16, 2) => "all_reduce_f16_w2",
            (DType::F16, 4) => "all_reduce_f16_w4",
            (DType::F16, _) => "all_reduce_f16_w8",
            (DType::F32, 2) => "all_reduce_f32_w2",
            (DType::F32, 4) => "all_reduce_f32_w4",
            (DType::F32, _) => "all_reduce_f32_w8",
            (other, _) => panic!("sums of {other}"),
        }
    }
}
