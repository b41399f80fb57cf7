//! Cached keys or values of one layer: vectors of a head, in paged blocks, in the cache's dtype.
//!
//! | dtype | a vector of `head_dim` elements |
//! |---|---|
//! | f32, bf16, f16 | its elements, rounded |
//! | i8 | codes from -127 to 127, and an f32 scale of its own: the largest magnitude ÷ 127 |
//! | fp8 | E4M3 without a scale: magnitudes beyond 448 become 448 |
//!
//! A scale is chosen when its vector is written and belongs to one token and head, so that what
//! is read back never depends on other tokens. It is an f32: four bytes beside the 64 or more of
//! a vector, and neither huge nor tiny vectors leave its range.

use super::{Ops, OpsError};
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};

/// From this size on a cache lies on large pages: blocks of a sequence lie apart, so that every
/// one of them is an address to look up. A smaller one would waste more than it gains.
const LARGE_BYTES: usize = 16 << 20;

/// The memory of cached vectors.
#[derive(Debug)]
pub struct KvTensor {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub data: Tensor,
    /// `[num_blocks, num_kv_heads, block_size]`, f32: scales of signed bytes.
    pub scales: Option<Tensor>,
}

impl KvTensor {
    /// Room for `[num_blocks, num_kv_heads, block_size, head_dim]` elements on the host.
    pub fn zeros(dtype: DType, shape: [usize; 4]) -> KvTensor {
        let scales = || Tensor::zeros(DType::F32, &shape[..3]);
        let data = host_zeros(dtype, shape.into());
        KvTensor { data, scales: has_scales(dtype).then(scales) }
    }

    /// As [`KvTensor::zeros`], where these operations read and write it.
    pub fn zeros_on(ops: &dyn Ops, dtype: DType, shape: [usize; 4]) -> Result<KvTensor, OpsError> {
        let scales = || ops.zeros_kv(DType::F32, Shape::from(&shape[..3]));
        let data = ops.zeros_kv(dtype, shape.into())?;
        Ok(KvTensor { data, scales: has_scales(dtype).then(scales).transpose()? })
    }

    /// Bytes of one vector of `head_dim` elements, with its scale.
    pub fn vector_bytes(dtype: DType, head_dim: usize) -> usize {
        let scale_bytes = if has_scales(dtype) { DType::F32.size_bytes() } else { 0 };
        head_dim * dtype.size_bytes() + scale_bytes
    }

    /// All of it, borrowed.
    pub fn view(&self) -> KvView<'_> {
        KvView { data: self.data.view(), scales: self.scales.as_ref().map(Tensor::view) }
    }

    /// All of it, mutably borrowed.
    pub fn view_mut(&mut self) -> KvViewMut<'_> {
        KvViewMut { data: self.data.view_mut(), scales: self.scales.as_mut().map(Tensor::view_mut) }
    }
}

/// Host memory for cached vectors, or for their scales.
pub(super) fn host_zeros(dtype: DType, shape: Shape) -> Tensor {
    if shape.len() * dtype.size_bytes() < LARGE_BYTES {
        Tensor::zeros(dtype, shape)
    } else {
        Tensor::zeros_on_large_pages(dtype, shape)
    }
}

fn has_scales(dtype: DType) -> bool {
    dtype == DType::I8
}

/// A borrowed [`KvTensor`].
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub data: View<'a>,
    /// `[num_blocks, num_kv_heads, block_size]`, f32, for signed bytes.
    pub scales: Option<View<'a>>,
}

impl KvView<'_> {
    /// The size of the data at `axis`.
    pub fn size(&self, axis: usize) -> usize {
        self.data.size(axis)
    }

    /// Panics unless scales are there exactly when the dtype has them, one per vector.
    pub fn check(&self, what: &str) {
        let scales = self.scales.map(|scales| (scales.dtype(), scales.shape()));
        check(what, self.data.dtype(), self.data.shape(), scales);
    }
}

/// A mutably borrowed [`KvTensor`].
pub struct KvViewMut<'a> {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub data: ViewMut<'a>,
    /// `[num_blocks, num_kv_heads, block_size]`, f32, for signed bytes.
    pub scales: Option<ViewMut<'a>>,
}

impl KvViewMut<'_> {
    /// The size of the data at `axis`.
    pub fn size(&self, axis: usize) -> usize {
        self.data.size(axis)
    }

    /// As [`KvView::check`].
    pub fn check(&self, what: &str) {
        let scales = self.scales.as_ref().map(|scales| (scales.dtype(), scales.shape()));
        check(what, self.data.dtype(), self.data.shape(), scales);
    }

    /// Copies a block, scales and all, over another one.
    pub fn copy_block(&mut self, source: u32, destination: u32) {
        let (source, destination) = (source as usize, destination as usize);
        self.data.copy_row(source, destination);
        if let Some(scales) = &mut self.scales {
            scales.copy_row(source, destination);
        }
    }
}

fn check(what: &str, dtype: DType, shape: Shape, scales: Option<(DType, Shape)>) {
    assert_eq!(shape.sizes().len(), 4, "{what}: axes");
    assert_eq!(has_scales(dtype), scales.is_some(), "{what}: scales of {dtype}");
    if let Some((dtype, found)) = scales {
        assert_eq!(dtype, DType::F32, "{what}: dtype of scales");
        assert_eq!(found.sizes(), &shape.sizes()[..3], "{what}: shape of scales");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copied_block_brings_its_scales() {
        let mut cache = KvTensor::zeros(DType::I8, [3, 2, 8, 4]);
        cache.data.as_mut_slice::<i8>()[..64].fill(7);
        cache.scales.as_mut().expect("bytes have scales").as_mut_slice::<f32>()[..16].fill(0.5);
        cache.view_mut().copy_block(0, 2);
        let scales = cache.scales.as_ref().expect("bytes have scales").as_slice::<f32>();
        assert_eq!(cache.data.as_slice::<i8>()[128..], [7; 64]);
        assert_eq!(cache.data.as_slice::<i8>()[64..128], [0; 64]);
        assert_eq!((&scales[16..32], &scales[32..]), (&[0.0; 16][..], &[0.5; 16][..]));
    }

    #[test]
    fn the_bytes_of_a_vector_count_its_scale() {
        assert_eq!(KvTensor::vector_bytes(DType::BF16, 64), 128);
        assert_eq!(KvTensor::vector_bytes(DType::I8, 64), 68);
        assert_eq!(KvTensor::vector_bytes(DType::Fp8, 64), 64);
    }

    #[test]
    #[should_panic(expected = "keys: scales of i8")]
    fn bytes_without_scales_are_refused() {
        let cache = KvTensor { data: Tensor::zeros(DType::I8, [1, 1, 8, 4]), scales: None };
        cache.view().check("keys");
    }
}
