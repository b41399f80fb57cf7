//! The two matrices of every head of latent attention, which a checkpoint stores as one.
//!
//! `kv_b_proj` `[num_heads * (nope_dim + value_dim), rank]` makes a head's keys and values of a
//! latent. Instead, queries are brought into the latent's space by the transpose of the former rows
//! (they are *absorbed*), and means of latents become values by the latter. Both keep a float dtype
//! under `--quantization`: they are multiplied head by head, by `Ops::head_matmul`.

use half::{bf16, f16};

use super::{LoadError, Loader, plain};
use crate::tensor::{DType, Element, Tensor};

/// Sizes of a head of latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Heads.
    pub num_heads: usize,
    /// Elements of a query that do not rotate.
    pub nope_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Elements of a latent.
    pub rank: usize,
}

impl HeadShape {
    /// Shape of the stored matrix.
    pub fn stored(&self) -> [usize; 2] {
        [self.num_heads * (self.nope_dim + self.value_dim), self.rank]
    }
}

/// The matrices of one layer.
pub struct HeadMatrices {
    /// `[num_heads, rank, nope_dim]`: queries become absorbed ones.
    pub absorb: Tensor,
    /// `[num_heads, value_dim, rank]`: means of latents become values.
    pub release: Tensor,
}

impl HeadMatrices {
    /// Reads the layer `name` (without `.weight`).
    pub fn load(
        loader: &Loader<'_>,
        name: &str,
        shape: HeadShape,
    ) -> Result<HeadMatrices, LoadError> {
        let stored =
            plain::load_float(loader.source(), &plain::weight_name(name), &shape.stored())?;
        let [absorb, release] = match stored.dtype() {
            DType::F32 => split::<f32>(&stored, shape),
            DType::BF16 => split::<bf16>(&stored, shape),
            DType::F16 => split::<f16>(&stored, shape),
            other => unreachable!("a float tensor of {other}"),
        };
        Ok(HeadMatrices {
            absorb: loader.place_heads(absorb)?,
            release: loader.place_heads(release)?,
        })
    }
}

fn split<T: Element>(stored: &Tensor, shape: HeadShape) -> [Tensor; 2] {
    let HeadShape { num_heads, nope_dim, value_dim, rank } = shape;
    let mut absorb = Tensor::zeros_on_large_pages(T::DTYPE, [num_heads, rank, nope_dim]);
    let mut release = Tensor::zeros_on_large_pages(T::DTYPE, [num_heads, value_dim, rank]);
    let heads = stored.as_slice::<T>().chunks_exact((nope_dim + value_dim) * rank);
    let absorbs = absorb.as_mut_slice::<T>().chunks_exact_mut(rank * nope_dim);
    let releases = release.as_mut_slice::<T>().chunks_exact_mut(value_dim * rank);
    for (head, (absorb, release)) in heads.zip(absorbs.zip(releases)) {
        let (keys, values) = head.split_at(nope_dim * rank);
        for (r, to) in absorb.chunks_exact_mut(nope_dim).enumerate() {
            to.iter_mut().zip(keys[r..].iter().step_by(rank)).for_each(|(to, key)| *to = *key);
        }
        release.copy_from_slice(values);
    }
    [absorb, release]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heads_keys_are_transposed_and_its_values_are_not() {
        let shape = HeadShape { num_heads: 2, nope_dim: 2, value_dim: 1, rank: 3 };
        let values: Vec<f32> = (0..18).map(|i| i as f32).collect();
        let [absorb, release] = split::<f32>(&Tensor::from_slice(&values, shape.stored()), shape);
        let expected = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 9.0, 12.0, 10.0, 13.0, 11.0, 14.0];
        assert_eq!(absorb.as_slice::<f32>(), expected);
        assert_eq!(release.as_slice::<f32>(), [6.0, 7.0, 8.0, 15.0, 16.0, 17.0]);
        assert_eq!(absorb.shape().sizes(), [2, 3, 2]);
    }
}
