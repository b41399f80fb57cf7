//! A linear layer: a packed matrix, an optional bias, and how it is split over ranks.

use super::{LoadError, Loader};
use crate::formats::PackedMatrix;
use crate::ops::Ops;
use crate::ops::args::{MatmulArgs, NormedRows, Projection, WeightAndBias};
use crate::parallel::Communicator;
use crate::tensor::{Tensor, View, ViewMut};

/// How the ranks of a replica share a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partition {
    /// Each rank computes a part of the output.
    Column,
    /// Each rank sums over a part of the input; the sums are added up over all ranks.
    Row,
    /// Each rank computes everything.
    Replicated,
}

/// `out = x · weightᵀ (+ bias)`.
#[derive(Debug)]
pub struct Linear {
    /// `[out_features, in_features]` of this rank.
    pub weight: PackedMatrix,
    /// `[out_features]`.
    pub bias: Option<Tensor>,
    /// How the ranks share it.
    pub partition: Partition,
}

impl Linear {
    /// Reads the layer `name` (without `.weight`) of `[out_features, in_features]`, with a
    /// bias when `bias` is set.
    pub fn load(
        loader: &Loader<'_>,
        name: &str,
        shape: [usize; 2],
        bias: bool,
        partition: Partition,
    ) -> Result<Linear, LoadError> {
        let weight = loader.matrix(name, shape)?;
        let bias = bias.then(|| loader.floats(&format!("{name}.bias"), &shape[..1])).transpose()?;
        Ok(Linear { weight, bias, partition })
    }

    /// Reads a table, such as tied embeddings, as the matrix of a layer without a bias.
    pub fn of_table(
        loader: &Loader<'_>,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Linear, LoadError> {
        let weight = loader.table(name, shape)?;
        Ok(Linear { weight, bias: None, partition: Partition::Replicated })
    }

    /// Reads the matrix that chooses experts, which is never quantized: a choice is all or nothing.
    pub fn router(loader: &Loader<'_>, name: &str, shape: [usize; 2]) -> Result<Linear, LoadError> {
        let weight = loader.precise(name, shape)?;
        Ok(Linear { weight, bias: None, partition: Partition::Replicated })
    }

    /// The matrix, and the bias of a layer that is not summed over ranks.
    pub fn weight_and_bias(&self) -> WeightAndBias<'_> {
        assert_ne!(self.partition, Partition::Row, "the ranks' sums would repeat the bias");
        (&self.weight, self.bias.as_ref().map(Tensor::view))
    }

    /// Multiplies `x` `[num_rows, in_features]` into `out` `[num_rows, out_features]`.
    pub fn forward(&self, ops: &dyn Ops, comm: &dyn Communicator, x: View<'_>, out: ViewMut<'_>) {
        Linear::forward_all(ops, comm, x, [(self, out)]);
    }

    /// Multiplies `x` by several layers in one operation.
    pub fn forward_all<const N: usize>(
        ops: &dyn Ops,
        comm: &dyn Communicator,
        x: View<'_>,
        layers: [(&Linear, ViewMut<'_>); N],
    ) {
        Linear::project(comm, layers, |projections| ops.matmul(MatmulArgs { x, projections }));
    }

    /// As [`Linear::forward_all`], of rows that are normed first.
    pub fn forward_normed<const N: usize>(
        ops: &dyn Ops,
        comm: &dyn Communicator,
        x: NormedRows<'_>,
        layers: [(&Linear, ViewMut<'_>); N],
    ) {
        Linear::project(comm, layers, |projections| ops.norm_matmul(MatmulArgs { x, projections }));
    }

    fn project<const N: usize>(
        comm: &dyn Communicator,
        mut layers: [(&Linear, ViewMut<'_>); N],
        multiply: impl FnOnce(Vec<Projection<'_>>),
    ) {
        let projections =
            layers.iter_mut().map(|(layer, out)| layer.projection(comm, out.reborrow()));
        multiply(projections.collect());
        for (layer, out) in layers {
            layer.reduce(comm, out);
        }
    }

    /// This layer as a part of an operation; its output then needs [`Linear::reduce`].
    pub fn projection<'a>(&'a self, comm: &dyn Communicator, out: ViewMut<'a>) -> Projection<'a> {
        // Rank 0 alone adds the bias of a row partition, because the sum would repeat it.
        let adds_bias = self.partition != Partition::Row || comm.rank() == 0;
        let bias = self.bias.as_ref().filter(|_| adds_bias).map(Tensor::view);
        Projection { out, weight: &self.weight, bias }
    }

    /// Adds up what the ranks have computed, where each has a part of the sum.
    pub fn reduce(&self, comm: &dyn Communicator, out: ViewMut<'_>) {
        if self.partition == Partition::Row {
            comm.all_reduce(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::checkpoint::dummy::DummySource;
    use crate::checkpoint::{
        CheckpointError, ExpectedTensor, TensorInfo, TensorRole, TensorSource,
    };
    use crate::formats::dense;
    use crate::ops::reference::ReferenceOps;
    use crate::tensor::DType;

    /// A rank that counts how often it is asked for a sum.
    struct CountingRank {
        rank: usize,
        num_sums: AtomicUsize,
    }

    impl Communicator for CountingRank {
        fn rank(&self) -> usize {
            self.rank
        }

        fn world(&self) -> usize {
            2
        }

        fn all_reduce(&self, _data: ViewMut<'_>) {
            self.num_sums.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Output for zero input, hence the bias if it was added, and the number of sums.
    fn output_of_zeros(partition: Partition, rank: usize) -> (Vec<f32>, usize) {
        let linear = Linear {
            weight: dense::pack(Tensor::from_slice(&[1.0f32; 6], [2, 3])),
            bias: Some(Tensor::from_slice(&[5.0f32, 7.0], [2])),
            partition,
        };
        let comm = CountingRank { rank, num_sums: AtomicUsize::new(0) };
        let mut out = Tensor::zeros(DType::F32, [1, 2]);
        let x = Tensor::zeros(DType::F32, [1, 3]);
        linear.forward(&ReferenceOps, &comm, x.view(), out.view_mut());
        (out.as_slice::<f32>().to_vec(), comm.num_sums.into_inner())
    }

    #[test]
    fn only_a_row_partition_is_summed_over_ranks() {
        assert_eq!(output_of_zeros(Partition::Column, 1), (vec![5.0, 7.0], 0));
        assert_eq!(output_of_zeros(Partition::Replicated, 1), (vec![5.0, 7.0], 0));
        assert_eq!(output_of_zeros(Partition::Row, 0).1, 1);
    }

    #[test]
    fn the_bias_of_a_row_partition_is_added_by_one_rank() {
        assert_eq!(output_of_zeros(Partition::Row, 0).0, [5.0, 7.0]);
        assert_eq!(output_of_zeros(Partition::Row, 1).0, [0.0, 0.0]);
    }

    /// A source whose only tensor holds integers.
    struct Integers;

    impl TensorSource for Integers {
        fn names(&self) -> Vec<String> {
            vec!["a.weight".to_owned()]
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            let dtype = crate::checkpoint::StoredDType::U32;
            let info = TensorInfo { dtype, shape: vec![2, 3], file: "x.safetensors".to_owned() };
            (name == "a.weight").then_some(info)
        }

        fn tensor(&self, _name: &str) -> Result<Tensor, CheckpointError> {
            Ok(Tensor::zeros(DType::U32, [2, 3]))
        }
    }

    #[test]
    fn a_layer_says_which_of_its_tensors_is_wrong() {
        let expected = ["a.weight", "a.bias"].map(|name| ExpectedTensor {
            name: name.to_owned(),
            shape: if name == "a.bias" { vec![4] } else { vec![4, 3] },
            role: TensorRole::Matrix,
        });
        let source = DummySource::new(expected.to_vec(), DType::BF16);
        let loader = Loader::new(&source);
        let load = |name: &str, shape| Linear::load(&loader, name, shape, true, Partition::Column);
        assert!(load("a", [4, 3]).is_ok());
        assert_eq!(
            load("a", [3, 4]).unwrap_err().to_string(),
            "a.weight in random weights has shape [4, 3], but the model needs [3, 4]"
        );
        assert_eq!(
            load("b", [4, 3]).unwrap_err().to_string(),
            "the checkpoint has no tensor b.weight"
        );
        let integers = Linear::load(&Loader::new(&Integers), "a", [2, 3], false, Partition::Column);
        assert!(integers.unwrap_err().to_string().contains("has dtype u32"));
    }
}
