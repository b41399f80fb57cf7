//! How greedy tokens are chosen while logits are computed: a matmul whose tasks keep the best
//! column of every row.

use std::sync::PoisonError;

use super::CpuOps;
use super::best_columns::BestColumns;
use super::launch_inputs::Activations;
use super::launch_matmul::{Product, Weighted};
use super::weight_blocks::Place;
use crate::ops::args::GreedyArgs;

impl CpuOps {
    /// See [`crate::ops::Ops::greedy`]. Kernels of row-major weights store what they compute.
    pub(super) fn choose_greedily(&self, args: &GreedyArgs<'_>) -> Option<Vec<u32>> {
        let &GreedyArgs { x, weight, bias } = args;
        if !weight.format.is_in_blocks() {
            return None;
        }
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let inputs = self.prepare(&mut prepared.x, Activations::Rows(x), &[weight]);
        let bias = bias.map(|bias| self.widened(bias));
        let best = BestColumns::new(x.size(0));
        let main = Weighted { weight, bias: bias.as_deref() };
        let product = Product { main, up: None };
        let planned = self.plan(&inputs, product, Place::Best(&best), weight.num_rows);
        self.run_planned(&[planned]);
        Some(best.into_columns())
    }
}
