//! Products of FP8 by FP8: what lets a step of many rows use the tensor cores of that type.
//!
//! Where the device has such tensor cores and the library products for them, FP8 weights with a
//! scale per row are brought into row-major order when a model is opened; there is no other copy.
//! Up to sixteen rows of activations keep their precision and go to our skinny kernels, whose
//! time is that of the weights' bytes. More rows become codes with a scale per token; the library
//! multiplies codes by codes, without any scale, and one kernel of ours finishes its sums.
//!
//! cuBLASLt could take vectors of scales itself, but only some versions on some devices do. The
//! plain product is as old as FP8 tensor cores are, and all around it runs in tests; that costs one
//! pass over the results, for a gated product the one which activates them anyway.
//!
//! Weights with a scale per group (128 × 128 in checkpoints), or of sizes of no multiple of
//! sixteen, stay in blocks. Experts, whose numbers of rows no library knows, run on our kernels.

use super::CudaOps;
use super::launcher::{DeviceFacts, KernelArg, Launch, Launcher};
use super::matmul::{DenseProducts, MAX_WEIGHTS, Scratch, activation_kind, element_type, pointer};
use super::product::Kind;
use crate::formats::{PackedMatrix, fp8};
use crate::ops::args::{GatedMatmulArgs, Projection};
use crate::ops::gated_in_steps;
use crate::tensor::{DType, View, ViewMut};

/// The first devices with FP8 tensor cores.
const LEAST_CAPABILITY: (u32, u32) = (8, 9);
/// Threads of a block that finishes sums (`SCALE_THREADS` in `scale_sums.cu`), columns of each
/// (`CHUNK`), and rows (`SCALE_ROWS`).
const SCALE_THREADS: usize = 128;
const CHUNK: usize = 8;
const SCALE_ROWS: usize = 4;

/// Whether FP8 is multiplied by FP8 on this device with this library.
pub(super) fn is_multiplied(facts: &DeviceFacts, library: Option<&dyn DenseProducts>) -> bool {
    facts.compute_capability >= LEAST_CAPABILITY
        && library.is_some_and(DenseProducts::multiplies_codes)
}

/// Activations as codes, in scratch memory.
struct Codes<'a> {
    /// `[rows, k]`.
    codes: View<'a>,
    /// A scale per row.
    scales: KernelArg<'a>,
}

impl<L: Launcher> CudaOps<L> {
    /// The matrix in the order in which this device multiplies FP8.
    pub(super) fn with_codes_arranged(&self, matrix: PackedMatrix) -> PackedMatrix {
        if is_multiplied(self.facts(), self.dense_products()) {
            fp8::into_rows(matrix)
        } else {
            matrix
        }
    }

    /// Projections of `x` by the library; what it refuses is done by our own kernels.
    pub(super) fn multiply_codes(
        &self,
        library: &dyn DenseProducts,
        x: View<'_>,
        run: &mut [Projection<'_>],
    ) {
        let mut is_done = [false; MAX_WEIGHTS];
        {
            let mut scratch = self.product_room(x);
            let Codes { codes, scales } = self.quantized_rows(x, &mut scratch);
            for (is_done, p) in is_done.iter_mut().zip(run.iter_mut()) {
                *is_done = library.multiply(p.out.reborrow(), codes, p.weight.data.view(), None);
                if *is_done {
                    self.scale_sums(&mut p.out, scales, p.weight, p.bias);
                }
            }
        }
        for (_, p) in is_done.into_iter().zip(run).filter(|(is_done, _)| !is_done) {
            self.launch_run(Kind::Fp8Rows, x, std::slice::from_mut(p));
        }
    }

    /// A gated product: both sums by the library, then scales, biases and the activation at once,
    /// all in bf16.
    pub(super) fn multiply_codes_gated(
        &self,
        library: &dyn DenseProducts,
        mut args: GatedMatmulArgs<'_>,
    ) {
        if args.scratch.iter().chain([&args.out]).any(|room| room.dtype() != DType::BF16) {
            return gated_in_steps(self, args);
        }
        let is_done = {
            let mut scratch = self.product_room(args.x);
            let Codes { codes, scales } = self.quantized_rows(args.x, &mut scratch);
            let weights = [args.gate.0, args.up.0];
            let is_done = args.scratch.iter_mut().zip(weights).all(|(sums, weight)| {
                library.multiply(sums.reborrow(), codes, weight.data.view(), None)
            });
            if is_done {
                self.scale_gated(&mut args, scales);
            }
            is_done
        };
        if !is_done {
            gated_in_steps(self, args);
        }
    }

    /// `x` `[rows, k]` as codes with a scale per row: `largest / 448`.
    fn quantized_rows<'a>(&self, x: View<'_>, scratch: &'a mut Scratch) -> Codes<'a> {
        assert_eq!(x.dtype(), DType::BF16, "activations that become FP8");
        let (rows, k) = (x.size(0), x.size(1));
        let Scratch { x: codes, x_scales, .. } = scratch;
        let scales = pointer(x_scales);
        self.quantize_rows("quantize_rows_fp8", [pointer(codes), scales], x, k);
        let codes = codes.as_ref().expect("room was made for activations").view();
        Codes { codes: codes.rows(0..rows * k).reshape([rows, k]), scales }
    }

    /// Finishes the library's sums where they lie.
    fn scale_sums(
        &self,
        out: &mut ViewMut<'_>,
        x_scales: KernelArg<'_>,
        weight: &PackedMatrix,
        bias: Option<View<'_>>,
    ) {
        let kernel = match out.dtype() {
            DType::BF16 => "scale_sums_bf16",
            DType::F32 => "scale_sums_f32",
            other => panic!("sums of {other} from FP8"),
        };
        let (rows, columns, scales) = (out.size(0), out.size(1), scales(weight));
        let arguments = [
            KernelArg::from(out),
            x_scales,
            scales.into(),
            bias.into(),
            rows.into(),
            columns.into(),
            element_type(scales.dtype()).into(),
            type_of(bias).into(),
        ];
        self.launch(kernel, scale_launch(rows, columns), &arguments);
    }

    /// `out = activation(gate) · up` of sums in the scratch memory of `args`.
    fn scale_gated(&self, args: &mut GatedMatmulArgs<'_>, x_scales: KernelArg<'_>) {
        let GatedMatmulArgs { out, gate, up, activation, scratch: [gate_sums, up_sums], .. } = args;
        let (rows, columns) = (out.size(0), out.size(1));
        let (gate_scales, up_scales) = (scales(gate.0), scales(up.0));
        let arguments = [
            KernelArg::from(out),
            gate_sums.as_view().into(),
            up_sums.as_view().into(),
            x_scales,
            gate_scales.into(),
            gate.1.into(),
            up_scales.into(),
            up.1.into(),
            rows.into(),
            columns.into(),
            element_type(gate_scales.dtype()).into(),
            type_of(gate.1).into(),
            type_of(up.1).into(),
            activation_kind(*activation).into(),
        ];
        self.launch("scale_gated", scale_launch(rows, columns), &arguments);
    }
}

/// A scale per row of a matrix.
fn scales(weight: &PackedMatrix) -> View<'_> {
    weight.quantized.as_ref().expect("codes have scales").scales.view()
}

/// `ElementType` of a bias; nobody asks where there is none.
fn type_of(bias: Option<View<'_>>) -> usize {
    bias.map_or(0, |bias| element_type(bias.dtype()))
}

fn scale_launch(rows: usize, columns: usize) -> Launch {
    assert!(columns.is_multiple_of(CHUNK), "{columns} columns of FP8");
    let launch = Launch::new(columns.div_ceil(SCALE_THREADS * CHUNK), SCALE_THREADS);
    launch.by(rows.div_ceil(SCALE_ROWS))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library that multiplies nothing, and says of FP8 what it is told to say.
    struct Library(bool);

    impl DenseProducts for Library {
        fn multiplies_codes(&self) -> bool {
            self.0
        }

        fn multiply(&self, _: ViewMut<'_>, _: View<'_>, _: View<'_>, _: Option<View<'_>>) -> bool {
            false
        }
    }

    #[test]
    fn fp8_is_multiplied_where_device_and_library_do() {
        let on = |compute_capability, library: Option<bool>| {
            let facts = DeviceFacts {
                compute_capability,
                multiprocessors: 132,
                shared_bytes_per_block: 227 << 10,
            };
            let library = library.map(Library);
            is_multiplied(&facts, library.as_ref().map(|library| library as &dyn DenseProducts))
        };
        for capability in [(8, 9), (9, 0), (10, 0), (12, 0)] {
            assert!(on(capability, Some(true)), "{capability:?}");
            assert!(!on(capability, Some(false)), "{capability:?}: the library has none");
            assert!(!on(capability, None), "{capability:?}: there is no library");
        }
        for capability in [(8, 0), (8, 6), (8, 7)] {
            assert!(!on(capability, Some(true)), "{capability:?}");
        }
    }

    #[test]
    fn every_column_and_row_of_sums_has_a_thread() {
        for (rows, columns, grid) in
            [(17, 16, [1, 5, 1]), (2048, 14_336, [14, 512, 1]), (300, 1040, [2, 75, 1])]
        {
            assert_eq!(scale_launch(rows, columns).grid, grid, "{rows} x {columns}");
        }
    }
}
