//! Dense products through cuBLASLt, which is opened at run time and may be missing.
//!
//! Our tensors are row-major and cuBLASLt's are column-major, so it is asked for the transposed
//! product: `outᵀ [columns, rows] = weight · xᵀ`, where both operands lie as they are.
//!
//! Which of its algorithms is fastest is a question of microseconds, so it is asked once per shape
//! and per power of two of rows, and the answer is kept: there are few of them however many rows
//! steps have, and neighbouring numbers of rows are summed alike. NVIDIA promises the same bits for
//! the same shape, not for a row whatever stands beside it: that is why the skinny kernels, which
//! decode few sequences, are ours.
//!
//! Of FP8 it multiplies codes by codes, both row-major, with a factor of 1: `fp8` brings
//! activations there and scales the sums. These are f32 sums, not the faster ones that keep fewer
//! bits (`FAST_ACCUM`). Whether this version does it on this GPU is asked once, when it is opened.
//! Of bytes it multiplies codes by codes too, with sums of 32 bits: what our own products of INT8 are
//! measured against.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::matmul::DenseProducts;
use crate::tensor::{DType, Tensor, View, ViewMut};

/// `CUBLAS_OP_T` of cuBLAS's `cublasOperation_t`, which the bindings leave out.
const TRANSPOSED: i32 = 1;
/// Alignment of operands that algorithms may count on: rows of sixteen bytes or a multiple.
const MIN_ALIGNMENT: u32 = 16;
/// A product of FP8 that stands for all others when the library is asked whether it has any.
const PROBE: Shape = Shape {
    rows: 1024,
    columns: 1024,
    k: 1024,
    operands: DType::Fp8,
    out: DType::BF16,
    bias: None,
};
/// Memory for an algorithm's own sums, as NVIDIA recommends for its largest GPUs.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// Everything that an algorithm is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    columns: usize,
    k: usize,
    operands: DType,
    out: DType,
    bias: Option<DType>,
}

impl Shape {
    fn of(out: &ViewMut<'_>, x: View<'_>, weight: View<'_>, bias: Option<View<'_>>) -> Shape {
        assert_eq!(x.dtype(), weight.dtype(), "operands of one dtype");
        Shape {
            rows: x.size(0),
            columns: weight.size(0),
            k: x.size(1),
            operands: x.dtype(),
            out: out.dtype(),
            bias: bias.map(|bias| bias.dtype()),
        }
    }

    /// The shape that stands for this one where algorithms are chosen.
    fn bucket(self) -> Shape {
        Shape { rows: self.rows.next_power_of_two(), ..self }
    }

    /// Whether sums are integers.
    fn has_integers(self) -> bool {
        self.operands == DType::I8
    }

    /// The bits of a factor of 1, in the type of the sums.
    fn one(self) -> u32 {
        if self.has_integers() { 1 } else { 1f32.to_bits() }
    }
}

/// Algorithms that were asked for; `None` where there is none, or it was refused.
struct Choices<A>(HashMap<Shape, Option<A>>);

impl<A: Copy> Choices<A> {
    /// The algorithm of the shape's bucket and the shape that it was asked for; where there is none,
    /// that of the shape itself.
    fn of(&mut self, shape: Shape, ask: impl Fn(Shape) -> Option<A>) -> Option<(Shape, A)> {
        [shape.bucket(), shape].into_iter().find_map(|key| {
            let found = *self.0.entry(key).or_insert_with(|| ask(key));
            found.map(|algorithm| (key, algorithm))
        })
    }

    /// The algorithm that was found for this shape is not asked for again.
    fn refuse(&mut self, shape: Shape) {
        self.0.insert(shape, None);
    }
}

/// cuBLASLt on one stream.
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    stream: sys::cudaStream_t,
    workspace: Mutex<Tensor>,
    /// A factor of 1 on the GPU, for codes.
    one: Tensor,
    multiplies_codes: bool,
    algorithms: Mutex<Choices<sys::cublasLtMatmulAlgo_t>>,
}

// SAFETY: a handle may be used from any thread; what changes is behind locks.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: the handle was made in `open` and is destroyed once. An error would come too late.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl CublasLt {
    /// Opens the library; none when it is not there or refuses.
    ///
    /// # Safety
    /// `stream` is one of the driver's that outlives this, its context is current on the calling
    /// thread, and `workspace` ([`WORKSPACE_BYTES`]) and `one` (an f32 of 1) lie in memory of the
    /// same GPU.
    pub unsafe fn open(stream: *mut c_void, workspace: Tensor, one: Tensor) -> Option<CublasLt> {
        // SAFETY: opening NVIDIA's library runs nothing but its own initialisation.
        if !unsafe { sys::is_culib_present() } {
            tracing::info!("cuBLASLt is not installed: dense products run on our own kernels");
            return None;
        }
        let handle = result::create_handle();
        let handle = handle.inspect_err(|error| tracing::warn!(%error, "cuBLASLt cannot start"));
        let mut library = CublasLt {
            handle: handle.ok()?,
            stream: stream.cast(),
            workspace: Mutex::new(workspace),
            one,
            multiplies_codes: false,
            algorithms: Mutex::new(Choices(HashMap::new())),
        };
        let probe = library.call(PROBE, None).and_then(|call| call.fastest(library.handle));
        library.multiplies_codes = probe.is_ok();
        let fp8 = probe.map_or_else(|error| format!("none: {error}"), |_| "yes".to_owned());
        tracing::info!(fp8, "dense products of many rows are cuBLASLt's");
        Some(library)
    }

    fn call(&self, shape: Shape, bias: Option<*const c_void>) -> Result<Call, CublasError> {
        Call::new(shape, bias, self.one.view().address().cast())
    }

    fn choices(&self) -> MutexGuard<'_, Choices<sys::cublasLtMatmulAlgo_t>> {
        self.algorithms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fastest algorithm for these shapes; the bias is only looked at by a product, so that any
    /// address will do here.
    fn fastest(
        &self,
        shape: Shape,
        bias: Option<*const c_void>,
    ) -> Option<sys::cublasLtMatmulAlgo_t> {
        let found = self.call(shape, bias).and_then(|call| call.fastest(self.handle));
        let found = found.inspect_err(|error| {
            tracing::warn!(?shape, %error, "cuBLASLt has no algorithm for products of this shape");
        });
        found.ok()
    }

    /// Runs a product with an algorithm.
    fn run(
        &self,
        (shape, algorithm): (Shape, &sys::cublasLtMatmulAlgo_t),
        mut out: ViewMut<'_>,
        x: View<'_>,
        weight: View<'_>,
        bias: Option<*const c_void>,
    ) -> Result<(), CublasError> {
        let call = self.call(shape, bias)?;
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = workspace.size_bytes();
        let (one, zero, to) = (shape.one(), 0_u32, out.address().cast::<c_void>());
        // SAFETY: the layouts are those of the views, which lie in memory of the stream's GPU, out
        // and the workspace borrowed exclusively; factors have the bits of the call's scale type.
        unsafe {
            result::matmul(
                self.handle,
                call.product.0,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&zero).cast(),
                weight.address().cast(),
                call.weight.0,
                x.address().cast(),
                call.x.0,
                to,
                call.out.0,
                to,
                call.out.0,
                std::ptr::from_ref(algorithm),
                workspace.view_mut().address().cast(),
                bytes,
                self.stream,
            )
        }
    }
}

impl DenseProducts for CublasLt {
    fn name(&self) -> String {
        // SAFETY: takes nothing and returns a number; the library is open.
        let version = unsafe { sys::cublasLtGetVersion() };
        format!("cuBLASLt {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    fn multiplies_codes(&self) -> bool {
        self.multiplies_codes
    }

    fn multiply(
        &self,
        mut out: ViewMut<'_>,
        x: View<'_>,
        weight: View<'_>,
        bias: Option<View<'_>>,
    ) -> bool {
        let shape = Shape::of(&out, x, weight, bias);
        let bias = bias.map(|bias| bias.address().cast());
        // What an algorithm of a bucket refuses of a smaller shape, the shape's own may do.
        loop {
            let chosen = self.choices().of(shape, |shape| self.fastest(shape, bias));
            let Some((key, algorithm)) = chosen else { return false };
            match self.run((shape, &algorithm), out.reborrow(), x, weight, bias) {
                Ok(()) => return true,
                // Faults of the device show again in whatever runs next; the rest our kernels can do.
                Err(error) => {
                    tracing::warn!(?shape, ?key, %error, "cuBLASLt refused a product");
                    self.choices().refuse(key);
                }
            }
        }
    }
}

/// A matrix of column-major elements.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DType, rows: usize, columns: usize) -> Result<Layout, CublasError> {
        result::create_matrix_layout(cuda_type(dtype), rows as u64, columns as u64, rows as i64)
            .map(Layout)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What is computed: sums of transposed weights times activations, and perhaps a bias.
struct Product(sys::cublasLtMatmulDesc_t);

impl Product {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        let value = std::ptr::from_ref(value);
        // SAFETY: the value has the size that is given with it.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, value.cast(), size_of::<T>())
        }
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// How algorithms are chosen.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        let value = std::ptr::from_ref(value);
        // SAFETY: the value has the size that is given with it.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, value.cast(), size_of::<T>())
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// A product and the layouts of what it reads and writes.
struct Call {
    product: Product,
    weight: Layout,
    x: Layout,
    out: Layout,
}

impl Call {
    /// `one` is the factor of either operand's codes.
    fn new(
        shape: Shape,
        bias: Option<*const c_void>,
        one: *const c_void,
    ) -> Result<Call, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Shape { rows, columns, k, operands, out, .. } = shape;
        let (sums, factors) = if shape.has_integers() {
            (sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, DType::U32)
        } else {
            (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, DType::F32)
        };
        let product = Product(result::create_matmul_desc(sums, cuda_type(factors))?);
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if operands == DType::Fp8 {
            product.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &one)?;
            product.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &one)?;
        }
        if let (Some(address), Some(dtype)) = (bias, shape.bias) {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            product.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            product.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address)?;
            product.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &cuda_type(dtype))?;
        }
        Ok(Call {
            product,
            weight: Layout::new(operands, k, columns)?,
            x: Layout::new(operands, k, rows)?,
            out: Layout::new(out, columns, rows)?,
        })
    }

    fn fastest(
        &self,
        handle: sys::cublasLtHandle_t,
    ) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Preference(result::create_matmul_pref()?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        for operand in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(operand, &MIN_ALIGNMENT)?;
        }
        let Call { product, weight, x, out } = self;
        // SAFETY: all descriptions are alive.
        let found = unsafe {
            let (weight, x, out, by) = (weight.0, x.0, out.0, preference.0);
            result::get_matmul_algo_heuristic(handle, product.0, weight, x, out, out, by)
        };
        found.map(|found| found.algo)
    }
}

fn cuda_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::Fp8 => sys::cudaDataType::CUDA_R_8F_E4M3,
        DType::I8 => sys::cudaDataType::CUDA_R_8I,
        // Sums of bytes have a sign; no tensor of ours has elements of that type.
        DType::U32 => sys::cudaDataType::CUDA_R_32I,
        other => panic!("a dense product of {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_algorithm_is_kept_for_what_it_was_chosen_for() {
        let (bf16, codes) = (
            |shape| Tensor::zeros(DType::BF16, shape),
            |shape: [usize; 2]| Tensor::zeros(DType::Fp8, shape),
        );
        let bias = Tensor::zeros(DType::F32, [32]);
        let shape = |x: &Tensor, weight: &Tensor, out: DType, bias: Option<&Tensor>| {
            let mut out = Tensor::zeros(out, [x.shape().sizes()[0], weight.shape().sizes()[0]]);
            Shape::of(&out.view_mut(), x.view(), weight.view(), bias.map(Tensor::view)).bucket()
        };
        let dense = shape(&bf16([40, 64]), &bf16([32, 64]), DType::BF16, None);
        let of_codes = shape(&codes([40, 64]), &codes([32, 64]), DType::BF16, None);
        let (rows, columns, k) = (64, 32, 64);
        let expected =
            Shape { rows, columns, k, operands: DType::Fp8, out: DType::BF16, bias: None };
        assert_eq!(of_codes, expected);
        assert_eq!(dense, Shape { operands: DType::BF16, ..expected });
        let logits = shape(&codes([40, 64]), &codes([32, 64]), DType::F32, None);
        assert_eq!(logits, Shape { out: DType::F32, ..expected });
        let with_bias = shape(&bf16([40, 64]), &bf16([32, 64]), DType::BF16, Some(&bias));
        assert_eq!(with_bias, Shape { bias: Some(DType::F32), ..dense });
    }

    #[test]
    fn a_refused_bucket_leaves_shapes_their_own_algorithms() {
        let shape = |rows| Shape {
            rows,
            columns: 64,
            k: 64,
            operands: DType::I8,
            out: DType::U32,
            bias: None,
        };
        let asked = std::cell::RefCell::new(Vec::new());
        let ask = |shape: Shape| {
            asked.borrow_mut().push(shape.rows);
            (shape.rows != 37).then_some(shape.rows)
        };
        let mut choices = Choices(HashMap::new());
        assert_eq!(choices.of(shape(40), ask), Some((shape(64), 64)));
        assert_eq!(choices.of(shape(50), ask), Some((shape(64), 64)));
        choices.refuse(shape(64));
        assert_eq!(choices.of(shape(40), ask), Some((shape(40), 40)));
        assert_eq!(choices.of(shape(37), ask), None, "there is none");
        choices.refuse(shape(40));
        assert_eq!(choices.of(shape(40), ask), None, "neither of both");
        assert_eq!(choices.of(shape(64), ask), None);
        assert_eq!(*asked.borrow(), [64, 40, 37], "everything is asked for once");
        assert_eq!(
            (shape(1).one(), Shape { operands: DType::Fp8, ..shape(1) }.one()),
            (1, 0x3f80_0000)
        );
    }

    #[test]
    fn algorithms_are_chosen_for_few_numbers_of_rows() {
        let shape = |rows| Shape {
            rows,
            columns: 64,
            k: 64,
            operands: DType::BF16,
            out: DType::BF16,
            bias: None,
        };
        assert_eq!(shape(17).bucket(), shape(32).bucket());
        assert_eq!(shape(257).bucket(), shape(512));
        let buckets: std::collections::HashSet<_> =
            (17..=8192).map(|rows| shape(rows).bucket()).collect();
        assert_eq!(buckets.len(), 9);
    }
}
