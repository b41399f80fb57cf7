//! How a matmul is cut into tasks: activations are prepared once, then tasks take columns of
//! one projection each.

use std::ops::Range;
use std::sync::PoisonError;

#[cfg(target_arch = "x86_64")]
use super::amx::{Amx, Bf16, Int8};
use super::int8_matmul::{Int8Columns, QuantizedRows, quantize_padded};
use super::isa::Isa;
use super::matmul::{Operands, PANEL, multiply_columns};
use super::rows::Convert;
use super::share::{Parts, Scratch};
#[cfg(target_arch = "x86_64")]
use super::tile_matmul::{
    AddBias, Epilogue, FEW_ROWS, Half, PAIR, ScaleCols, ScaleSums, TileTask, panel_cols,
};
#[cfg(target_arch = "x86_64")]
use super::tile_pack::{PackedRows, TileActivations, num_words, words_per_tile};
#[cfg(target_arch = "x86_64")]
use super::tile_weights::{DenseRows, Int8Rows, TileCode, TileWeights, Unscaled};
use super::weight_rows::{Bytes, Code, Coded, Dense, E4m3, Nibbles, WeightRows, with_rows};
use super::{CpuOps, with_float};
use crate::formats::{Format, PackedMatrix, ROW_ALIGN};
use crate::ops::args::{Activation, GatedMatmulArgs, MatmulArgs, Projection};
use crate::ops::gated_in_steps;
use crate::tensor::{DType, View};

/// Weight bytes per task: long enough to stream, short enough to balance.
const TASK_WEIGHT_BYTES: usize = 512 << 10;
/// Multiplications below which a matmul is one task.
const MATMUL_INLINE: usize = 1 << 18;
/// Tasks per thread that let a fast thread take over from a slow one.
pub const TASKS_PER_THREAD: usize = 4;

/// Room for activations in the form that kernels want.
#[derive(Default)]
pub struct Prepared {
    floats: Scratch,
    bytes: Scratch,
    scales: Vec<f32>,
}

impl Prepared {
    /// Floats and bytes, as f32 words, that rows of this number and width need at most.
    fn words(max_rows: usize, max_width: usize) -> [usize; 2] {
        let elements = (max_rows + 16).next_multiple_of(16) * max_width.next_multiple_of(ROW_ALIGN);
        [elements / 2 + 16, elements / 4 + 16]
    }

    /// Makes room without touching it.
    pub fn reserve(&mut self, max_rows: usize, max_width: usize) {
        let [floats, bytes] = Prepared::words(max_rows, max_width);
        self.floats.reserve(floats);
        self.bytes.reserve(bytes);
        self.scales.reserve(max_rows);
    }
}

/// Bytes that the backend takes for operations on up to `max_rows` rows of `max_width`: prepared
/// activations, and for each thread a panel of weights or the tile of an attention.
pub fn scratch_bytes(max_rows: usize, max_width: usize, threads: usize) -> usize {
    const BYTES_PER_THREAD: usize = 2 << 20;
    let [floats, bytes] = Prepared::words(max_rows, max_width);
    4 * (floats + bytes + max_rows) + threads * BYTES_PER_THREAD
}

/// Activations of one operation.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    x: &'a [f32],
    k: usize,
    num_rows: usize,
    bytes: Option<QuantizedRows<'a>>,
    #[cfg(target_arch = "x86_64")]
    tiles: Option<Tiled<'a>>,
}

/// Activations for tiles, in the precisions that some projection needs.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Tiled<'a> {
    amx: Amx,
    bf16: Option<PackedRows<'a>>,
    int8: Option<PackedRows<'a>>,
}

/// One projection, ready to be computed by ranges of columns.
struct Planned<'a> {
    kernel: Box<dyn ColumnKernel + 'a>,
    num_cols: usize,
    cols_per_task: usize,
}

impl Planned<'_> {
    fn num_tasks(&self) -> usize {
        self.num_cols.div_ceil(self.cols_per_task)
    }
}

/// Computes output columns for all rows; calls with different columns may run at once.
trait ColumnKernel: Sync {
    fn run(&self, cols: Range<usize>, scratch: &mut Scratch);
}

struct VectorKernel<'a, W> {
    isa: Isa,
    x: &'a [f32],
    k: usize,
    weights: W,
    num_cols: usize,
    bias: Option<&'a [f32]>,
    out: Parts<'a, f32>,
}

impl<W: WeightRows> ColumnKernel for VectorKernel<'_, W> {
    fn run(&self, cols: Range<usize>, scratch: &mut Scratch) {
        let operands = Operands {
            x: self.x,
            weight: self.weights,
            k: self.k,
            num_cols: self.num_cols,
            out: &self.out,
        };
        multiply_columns(self.isa, operands, cols, self.bias, scratch);
    }
}

struct Int8Kernel<'a> {
    isa: Isa,
    x: QuantizedRows<'a>,
    weights: Coded<'a, Bytes>,
    num_cols: usize,
    bias: Option<&'a [f32]>,
    out: Parts<'a, f32>,
}

impl ColumnKernel for Int8Kernel<'_> {
    fn run(&self, cols: Range<usize>, _: &mut Scratch) {
        let Int8Kernel { x, weights, num_cols, bias, ref out, .. } = *self;
        self.isa.run(Int8Columns { x, weights, bias, num_cols, cols, out });
    }
}

#[cfg(target_arch = "x86_64")]
impl<W: TileWeights, E: Epilogue> ColumnKernel for TileTask<'_, W, E> {
    fn run(&self, cols: Range<usize>, scratch: &mut Scratch) {
        self.run_columns(cols, scratch);
    }
}

impl CpuOps {
    pub(super) fn multiply(&self, args: MatmulArgs<'_>) {
        let MatmulArgs { x, projections } = args;
        assert!(x.size(1) > 0, "matmul: nothing to sum over");
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let weights: Vec<&PackedMatrix> = projections.iter().map(|p| p.weight).collect();
        let inputs = self.prepare(&mut prepared, x, &weights);
        let bias = |p: &Projection<'_>| p.bias.map(|bias| self.widened(bias));
        let biases: Vec<Option<Vec<f32>>> = projections.iter().map(bias).collect();
        let all_cols = projections.iter().map(|p| p.weight.num_rows).sum();
        let planned: Vec<Planned<'_>> = projections
            .into_iter()
            .zip(&biases)
            .map(|(projection, bias)| self.plan(inputs, projection, bias.as_deref(), all_cols))
            .collect();
        self.run_planned(&planned);
    }

    /// A gated product in one pass where tiles hold both halves, else in steps.
    pub(super) fn multiply_gated(&self, args: GatedMatmulArgs<'_>) {
        #[cfg(target_arch = "x86_64")]
        if self.fuses(args.gate.0, args.up.0) {
            return self.multiply_fused(args);
        }
        gated_in_steps(self, args);
    }

    #[cfg(target_arch = "x86_64")]
    fn fuses(&self, gate: &PackedMatrix, up: &PackedMatrix) -> bool {
        let grid = |weight: &PackedMatrix| weight.quantized.as_ref().map(|q| q.grid);
        let is_alike = gate.format == up.format
            && gate.data.dtype() == up.data.dtype()
            && grid(gate) == grid(up);
        matches!(self.isa, Isa::Amx(_)) && is_alike && runs_on_tiles(gate)
    }

    #[cfg(target_arch = "x86_64")]
    fn multiply_fused(&self, args: GatedMatmulArgs<'_>) {
        let GatedMatmulArgs { out, x, gate, up, activation, .. } = args;
        assert!(x.size(1) > 0, "matmul: nothing to sum over");
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let inputs = self.prepare(&mut prepared, x, &[gate.0]);
        let biases = [gate.1, up.1].map(|bias| bias.map(|bias| self.widened(bias)));
        let gate = Weighted { weight: gate.0, bias: biases[0].as_deref() };
        let up = Weighted { weight: up.0, bias: biases[1].as_deref() };
        let tiled = inputs.tiles.expect("the machine has tiles");
        let (num_cols, out) = (gate.weight.num_rows, Parts::new(out.into_mut_slice::<f32>()));
        let kernel = tile_kernel(tiled, gate, Some((up, activation)), out);
        let cols_per_task = self.cols_per_task(inputs, gate.weight, num_cols);
        self.run_planned(&[Planned { kernel, num_cols, cols_per_task }]);
    }

    fn run_planned(&self, planned: &[Planned<'_>]) {
        let num_tasks = planned.iter().map(Planned::num_tasks).sum();
        self.pool.run(num_tasks, |thread, mut task| {
            let found = planned.iter().find(|planned| {
                let here = task < planned.num_tasks();
                if !here {
                    task -= planned.num_tasks();
                }
                here
            });
            let Planned { kernel, num_cols, cols_per_task } = found.expect("tasks were counted");
            let cols = task * cols_per_task..*num_cols.min(&((task + 1) * cols_per_task));
            kernel.run(cols, &mut self.scratch.lock(thread));
        });
    }

    fn plan<'a>(
        &self,
        inputs: Inputs<'a>,
        projection: Projection<'a>,
        bias: Option<&'a [f32]>,
        all_cols: usize,
    ) -> Planned<'a> {
        let Projection { out, weight, .. } = projection;
        let num_cols = weight.num_rows;
        let out = Parts::new(out.into_mut_slice::<f32>());
        let kernel = self.kernel(inputs, weight, bias, out);
        Planned { kernel, num_cols, cols_per_task: self.cols_per_task(inputs, weight, all_cols) }
    }

    fn kernel<'a>(
        &self,
        inputs: Inputs<'a>,
        weight: &'a PackedMatrix,
        bias: Option<&'a [f32]>,
        out: Parts<'a, f32>,
    ) -> Box<dyn ColumnKernel + 'a> {
        #[cfg(target_arch = "x86_64")]
        if let Some(tiled) = inputs.tiles.filter(|_| runs_on_tiles(weight)) {
            return tile_kernel(tiled, Weighted { weight, bias }, None, out);
        }
        let (isa, num_cols) = (self.isa, weight.num_rows);
        if let (Format::Int8, Some(x)) = (weight.format, inputs.bytes) {
            let weights = Coded::<Bytes>::of(weight);
            return Box::new(Int8Kernel { isa, x, weights, num_cols, bias, out });
        }
        let Inputs { x, k, .. } = inputs;
        with_rows!(weight, weights => {
            Box::new(VectorKernel { isa, x, k, weights, num_cols, bias, out })
        })
    }

    /// Brings activations into the forms that the projections need.
    fn prepare<'a>(
        &self,
        prepared: &'a mut Prepared,
        x: View<'a>,
        weights: &[&PackedMatrix],
    ) -> Inputs<'a> {
        let (num_rows, k) = (x.size(0), x.size(1));
        let x = x.as_slice::<f32>();
        let Prepared { floats, bytes, scales } = prepared;
        let has_int8 = weights.iter().any(|weight| weight.format == Format::Int8);
        if has_int8 && scales.len() < num_rows {
            scales.resize(num_rows, 0.0);
        }
        let mut inputs = Inputs {
            x,
            k,
            num_rows,
            bytes: None,
            #[cfg(target_arch = "x86_64")]
            tiles: None,
        };
        #[cfg(target_arch = "x86_64")]
        if let Isa::Amx(amx) = self.isa {
            let bf16 = weights.iter().any(|w| runs_on_tiles(w) && w.format != Format::Int8);
            let bf16 = bf16.then(|| self.pack::<Bf16>(amx, floats, &mut [], (x, k)));
            let int8 = has_int8.then(|| self.pack::<Int8>(amx, bytes, scales, (x, k)));
            inputs.tiles = Some(Tiled { amx, bf16, int8 });
            return inputs;
        }
        let _ = floats;
        inputs.bytes = has_int8.then(|| self.quantize_rows(bytes, scales, (x, k)));
        inputs
    }

    #[cfg(target_arch = "x86_64")]
    fn pack<'a, E: TileActivations>(
        &self,
        amx: Amx,
        words: &'a mut Scratch,
        scales: &'a mut [f32],
        (x, k): (&[f32], usize),
    ) -> PackedRows<'a> {
        const ROWS: usize = super::amx::TILE_ROWS;
        let num_rows = x.len() / k;
        let words = words.take_words(num_words::<E>(num_rows, k));
        let has_scales = !scales.is_empty();
        {
            let (words, scales) = (Parts::new(words), Parts::new(scales));
            self.pool.run(num_rows.div_ceil(ROWS), |_, tile| {
                let rows = tile * ROWS..num_rows.min((tile + 1) * ROWS);
                let part = tile * words_per_tile::<E>(k)..(tile + 1) * words_per_tile::<E>(k);
                let some = if has_scales { rows.clone() } else { 0..0 };
                // SAFETY: tasks have different tiles and rows.
                let (words, scales) = unsafe { (words.part(part), scales.part(some)) };
                E::pack(amx, &x[rows.start * k..rows.end * k], k, words, scales);
            });
        }
        PackedRows::new::<E>(words, scales, num_rows, k)
    }

    fn quantize_rows<'a>(
        &self,
        bytes: &'a mut Scratch,
        scales: &'a mut [f32],
        (x, k): (&[f32], usize),
    ) -> QuantizedRows<'a> {
        let (num_rows, width) = (x.len() / k, k.next_multiple_of(ROW_ALIGN));
        let codes = bytes.take_bytes(num_rows * width);
        {
            let (codes, scales) = (Parts::new(codes), Parts::new(scales));
            self.pool.run(num_rows, |_, row| {
                // SAFETY: tasks have different rows.
                let (codes, scale) = unsafe {
                    (codes.part(row * width..(row + 1) * width), scales.part(row..row + 1))
                };
                scale[0] = quantize_padded(&x[row * k..(row + 1) * k], codes);
            });
        }
        QuantizedRows { codes, scales: &scales[..num_rows] }
    }

    /// Columns of a task, when all projections together have `all_cols`.
    fn cols_per_task(&self, inputs: Inputs<'_>, weight: &PackedMatrix, all_cols: usize) -> usize {
        let num_cols = weight.num_rows;
        if inputs.num_rows * inputs.k * num_cols < MATMUL_INLINE {
            return num_cols.max(1);
        }
        let balanced = all_cols.div_ceil(self.threads() * TASKS_PER_THREAD);
        let streamed = TASK_WEIGHT_BYTES / weight.row_bytes().max(1);
        #[cfg(target_arch = "x86_64")]
        if inputs.tiles.is_some() && runs_on_tiles(weight) {
            let kept = panel_cols(inputs.k.div_ceil(64) * 2);
            let most = if inputs.num_rows <= FEW_ROWS { streamed } else { kept };
            return balanced.min(most).max(1).next_multiple_of(PAIR);
        }
        balanced.min(streamed).max(1).next_multiple_of(PANEL)
    }

    fn widened(&self, from: View<'_>) -> Vec<f32> {
        let mut out = vec![0.0; from.shape().len()];
        with_float!(from.dtype(), E =>
            self.isa.run(Convert { out: &mut out, from: from.as_slice::<E>() }));
        out
    }
}

/// Whether tiles multiply by this matrix; f32 and f16 keep their precision on vectors.
#[cfg(target_arch = "x86_64")]
fn runs_on_tiles(weight: &PackedMatrix) -> bool {
    weight.format != Format::Dense || weight.data.dtype() == DType::BF16
}

/// A matrix and its widened bias.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Weighted<'a> {
    weight: &'a PackedMatrix,
    bias: Option<&'a [f32]>,
}

#[cfg(target_arch = "x86_64")]
fn tile_kernel<'a>(
    tiled: Tiled<'a>,
    main: Weighted<'a>,
    up: Option<(Weighted<'a>, Activation)>,
    out: Parts<'a, f32>,
) -> Box<dyn ColumnKernel + 'a> {
    const PACKED: &str = "activations were packed for every format";
    if main.weight.format == Format::Int8 {
        let x = tiled.int8.expect(PACKED);
        return boxed(tiled.amx, x, (main, up), out, |Weighted { weight, bias }| {
            let weights = Coded::<Bytes>::of(weight);
            let (row_scales, col_scales) = (x.scales(), weights.scales());
            let epilogue = ScaleSums { row_scales, col_scales, bias: AddBias { bias } };
            Half { weights: Int8Rows(weights), epilogue }
        });
    }
    let (amx, x) = (tiled.amx, tiled.bf16.expect(PACKED));
    match main.weight.format {
        Format::Dense => boxed(amx, x, (main, up), out, |Weighted { weight, bias }| Half {
            weights: DenseRows::of(weight),
            epilogue: AddBias { bias },
        }),
        Format::Int4 => boxed(amx, x, (main, up), out, coded::<Nibbles>),
        Format::Int8 | Format::Q8 => coded_kernel::<Bytes>(amx, x, (main, up), out),
        Format::Fp8 => coded_kernel::<E4m3>(amx, x, (main, up), out),
    }
}

/// With one scale per row, codes are multiplied exactly and sums are scaled.
#[cfg(target_arch = "x86_64")]
fn coded_kernel<'a, C: TileCode + 'a>(
    amx: Amx,
    x: PackedRows<'a>,
    (main, up): (Weighted<'a>, Option<(Weighted<'a>, Activation)>),
    out: Parts<'a, f32>,
) -> Box<dyn ColumnKernel + 'a> {
    if !Coded::<C>::of(main.weight).is_scaled_per_row() {
        return boxed(amx, x, (main, up), out, coded::<C>);
    }
    boxed(amx, x, (main, up), out, |Weighted { weight, bias }| {
        let weights = Coded::<C>::of(weight);
        let epilogue = ScaleCols { col_scales: weights.scales(), bias: AddBias { bias } };
        Half { weights: Unscaled(weights), epilogue }
    })
}

#[cfg(target_arch = "x86_64")]
fn coded<C: Code>(Weighted { weight, bias }: Weighted<'_>) -> Half<Coded<'_, C>, AddBias<'_>> {
    Half { weights: Coded::<C>::of(weight), epilogue: AddBias { bias } }
}

#[cfg(target_arch = "x86_64")]
fn boxed<'a, W: TileWeights + 'a, E: Epilogue + 'a>(
    amx: Amx,
    x: PackedRows<'a>,
    (main, up): (Weighted<'a>, Option<(Weighted<'a>, Activation)>),
    out: Parts<'a, f32>,
    half: impl Fn(Weighted<'a>) -> Half<W, E>,
) -> Box<dyn ColumnKernel + 'a> {
    let num_cols = main.weight.num_rows;
    let up = up.map(|(up, activation)| (half(up), activation));
    Box::new(TileTask { amx, x, main: half(main), up, num_cols, out })
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn room_is_reserved_for_every_smaller_operation() {
        for (max_rows, max_width) in [(1, 1), (16, 64), (33, 896), (2048, 4865)] {
            let [floats, bytes] = Prepared::words(max_rows, max_width);
            for rows in [1, max_rows.div_ceil(2), max_rows] {
                assert!(num_words::<Bf16>(rows, max_width) <= floats, "{rows} × {max_width} bf16");
                assert!(num_words::<Int8>(rows, max_width) <= bytes, "{rows} × {max_width} int8");
            }
        }
    }
}
