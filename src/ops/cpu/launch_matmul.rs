//! How a matmul is cut into tasks: of activations in the forms that the weights want
//! (`launch_inputs`), tasks take columns of one projection each.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::PoisonError;

#[cfg(target_arch = "x86_64")]
use super::amx::{Bf16, Int8, TileElement};
#[cfg(target_arch = "x86_64")]
use super::avx512_bf16::Avx512Bf16;
use super::byte_matmul::{ByteBlocks, ByteTask, ByteWeights};
use super::isa::Isa;
use super::launch_inputs::{Activations, Form, Input, Inputs};
use super::lines::Lines;
use super::matmul::{DenseRows, Operands, PANEL, multiply_columns};
use super::partition::{PAIR_COLS, Sizes};
use super::rows::Convert;
use super::share::{Parts, Scratch, settle_stores};
#[cfg(target_arch = "x86_64")]
use super::short_matmul;
use super::simd::Float;
#[cfg(target_arch = "x86_64")]
use super::tile_blocks::{self, BlockTask};
#[cfg(target_arch = "x86_64")]
use super::tile_codes::CodedTask;
#[cfg(target_arch = "x86_64")]
use super::tile_groups;
#[cfg(target_arch = "x86_64")]
use super::tile_write::{self, Finish, ScaleCols, ScaleSums};
use super::weight_blocks::{BlockOutput, Place, Rows};
#[cfg(target_arch = "x86_64")]
use super::weight_blocks::{Blocks, RowScales, SliceScales};
use super::wide_matmul::{WideBlocks, WideRows, WideTask, WideWeights};
#[cfg(target_arch = "x86_64")]
use super::wide_simd::Words;
use super::wide_simd::{Bytes, E4m3, FloatWords, Pairs};
use super::{CpuOps, with_float};
use crate::formats::blocks::BLOCK_ROWS;
use crate::formats::{Format, PackedMatrix};
use crate::ops::args::{Activation, MatmulArgs, Projection};
use crate::tensor::{DType, View};

// Tasks are cut between what kernels compute at a time.
const _: () = assert!(PANEL == PAIR_COLS);

/// A matrix and its widened bias.
#[derive(Clone, Copy)]
pub(super) struct Weighted<'a> {
    pub(super) weight: &'a PackedMatrix,
    pub(super) bias: Option<&'a [f32]>,
}

/// What a kernel computes: a matrix, or a gate and what it multiplies.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) main: Weighted<'a>,
    pub(super) up: Option<(Weighted<'a>, Activation)>,
}

impl<'a> Product<'a> {
    /// Output columns: rows of the weights.
    pub(super) fn width(&self) -> usize {
        self.main.weight.num_rows
    }

    /// Where blocks write it.
    fn output(&self, place: Place<'a>) -> BlockOutput<'a> {
        BlockOutput {
            place,
            num_cols: self.width(),
            bias: self.main.bias,
            up_bias: self.up.and_then(|(up, _)| up.bias),
            activation: self.up.map_or(Activation::Silu, |(_, activation)| activation),
        }
    }
}

/// One projection, ready to be computed by ranges of columns of one group of rows after the other.
pub(super) struct Planned<'a> {
    kernel: Box<dyn ColumnKernel + 'a>,
    num_cols: usize,
    cols_per_task: usize,
}

impl Planned<'_> {
    fn tasks_per_group(&self) -> usize {
        self.num_cols.div_ceil(self.cols_per_task)
    }

    fn num_tasks(&self) -> usize {
        self.kernel.num_row_groups() * self.tasks_per_group()
    }

    fn run(&self, task: usize, scratch: &mut [Scratch; 2]) {
        let (group, task) = (task / self.tasks_per_group(), task % self.tasks_per_group());
        let first = task * self.cols_per_task;
        self.kernel.run(group, first..self.num_cols.min(first + self.cols_per_task), scratch);
    }
}

/// Computes output columns of a group of rows; calls with other columns or another group may run
/// at once.
pub(super) trait ColumnKernel: Sync {
    fn run(&self, group: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]);

    /// Groups of rows; most kernels take all at once.
    fn num_row_groups(&self) -> usize {
        1
    }
}

struct VectorKernel<'a, E> {
    isa: Isa,
    x: &'a [f32],
    k: usize,
    weights: DenseRows<'a, E>,
    num_cols: usize,
    bias: Option<&'a [f32]>,
    out: Parts<'a, f32>,
}

impl<E: Float> ColumnKernel for VectorKernel<'_, E> {
    fn run(&self, _: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]) {
        let operands = Operands {
            x: self.x,
            weight: self.weights,
            k: self.k,
            num_cols: self.num_cols,
            out: &self.out,
        };
        multiply_columns(self.isa, operands, cols, self.bias, &mut scratch[0]);
    }
}

/// bf16 or codes that are widened to f32.
struct FloatsKernel<'a, W> {
    isa: Isa,
    task: WideTask<'a>,
    words: PhantomData<W>,
}

impl<W: FloatWords> ColumnKernel for FloatsKernel<'_, W> {
    fn run(&self, _: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]) {
        let (blocks, words) = (blocks_of(cols), PhantomData::<W>);
        self.isa.run(WideBlocks { task: &self.task, blocks, scratch: &mut scratch[0], words });
    }
}

/// bf16, or codes that are widened to it, on vectors.
#[cfg(target_arch = "x86_64")]
struct PairsKernel<'a, W> {
    pairs: Avx512Bf16,
    task: WideTask<'a>,
    words: PhantomData<W>,
}

#[cfg(target_arch = "x86_64")]
impl<W: Words<Avx512Bf16>> ColumnKernel for PairsKernel<'_, W> {
    fn run(&self, _: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]) {
        let (blocks, words) = (blocks_of(cols), PhantomData::<W>);
        self.pairs.run(WideBlocks { task: &self.task, blocks, scratch: &mut scratch[0], words });
    }
}

/// The blocks of a range of columns.
fn blocks_of(cols: Range<usize>) -> Range<usize> {
    cols.start / BLOCK_ROWS..cols.end.div_ceil(BLOCK_ROWS)
}

struct CodesKernel<'a> {
    isa: Isa,
    task: ByteTask<'a>,
}

impl ColumnKernel for CodesKernel<'_> {
    fn run(&self, _: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]) {
        let blocks = blocks_of(cols);
        #[cfg(target_arch = "x86_64")]
        if let Isa::Amx(amx) = self.isa
            && self.task.x.lines.num_rows > tile_groups::FEW_ROWS
        {
            return tile_groups::multiply_groups(amx, &self.task, blocks, &mut scratch[0]);
        }
        #[cfg(target_arch = "x86_64")]
        if let Isa::Avx2(avx2) = self.isa
            && avx2.vnni().is_none()
            && self.task.x.lines.num_rows > short_matmul::FEW_ROWS
        {
            return short_matmul::multiply(avx2, &self.task, blocks, &mut scratch[0]);
        }
        let _ = scratch;
        self.isa.run_bytes(ByteBlocks { task: &self.task, blocks });
    }
}

#[cfg(target_arch = "x86_64")]
impl<E: TileElement, F: Finish> ColumnKernel for BlockTask<'_, E, F> {
    fn run(&self, group: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]) {
        self.run_group(group, blocks_of(cols), &mut scratch[0]);
    }

    fn num_row_groups(&self) -> usize {
        self.num_row_groups()
    }
}

#[cfg(target_arch = "x86_64")]
impl<W: Words<Avx512Bf16>> ColumnKernel for CodedTask<'_, W> {
    fn run(&self, _: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]) {
        self.run_blocks(blocks_of(cols), scratch);
    }
}

impl CpuOps {
    pub(super) fn multiply<'a>(&self, args: MatmulArgs<'a, Activations<'a>>) {
        let MatmulArgs { x, projections } = args;
        assert!(x.width() > 0, "matmul: nothing to sum over");
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let weights: Vec<&PackedMatrix> = projections.iter().map(|p| p.weight).collect();
        let inputs = self.prepare(&mut prepared.x, x, &weights);
        self.project(&inputs, projections);
    }

    /// Multiplies prepared activations.
    pub(super) fn project(&self, inputs: &Inputs<'_>, projections: Vec<Projection<'_>>) {
        let bias = |p: &Projection<'_>| p.bias.map(|bias| self.widened(bias));
        let biases: Vec<Option<Vec<f32>>> = projections.iter().map(bias).collect();
        let all_cols: usize = projections.iter().map(|p| p.weight.num_rows).sum();
        let is_cached = self.keeps(inputs.num_rows * all_cols);
        let planned = projections.into_iter().zip(&biases).map(|(projection, bias)| {
            let Projection { out, weight, .. } = projection;
            let main = Weighted { weight, bias: bias.as_deref() };
            let out = out.into_mut_slice::<f32>();
            let place = Place::Rows(Rows::of_operation(out, weight.num_rows, is_cached));
            self.plan(inputs, Product { main, up: None }, place, all_cols)
        });
        self.run_planned(&planned.collect::<Vec<Planned<'_>>>());
    }

    pub(super) fn run_planned(&self, planned: &[Planned<'_>]) {
        let num_tasks = planned.iter().map(Planned::num_tasks).sum();
        self.pool.run(num_tasks, |thread, mut task| {
            let found = planned.iter().find(|planned| {
                let here = task < planned.num_tasks();
                if !here {
                    task -= planned.num_tasks();
                }
                here
            });
            let planned = found.expect("tasks were counted");
            planned.run(task, &mut self.scratch.lock(thread));
            settle_stores();
        });
    }

    /// Plans a product of an operation whose matrices have `all_cols` columns in all.
    pub(super) fn plan<'a>(
        &self,
        inputs: &Inputs<'a>,
        product: Product<'a>,
        place: Place<'a>,
        all_cols: usize,
    ) -> Planned<'a> {
        let kernel = self.kernel(inputs, product, place);
        let (groups, weight) = (kernel.num_row_groups(), product.main.weight);
        let cols_per_task = self.cols_per_task(inputs, groups, weight, all_cols);
        Planned { kernel, num_cols: product.width(), cols_per_task }
    }

    fn kernel<'a>(
        &self,
        inputs: &Inputs<'a>,
        product: Product<'a>,
        place: Place<'a>,
    ) -> Box<dyn ColumnKernel + 'a> {
        let (isa, Weighted { weight, bias }) = (self.isa, product.main);
        match inputs.in_form(Form::of(isa, weight)) {
            #[cfg(target_arch = "x86_64")]
            Input::Codes(x) if weight.format == Format::Int8 && matches!(isa, Isa::Amx(_)) => {
                let finish = |weight| ScaleSums { rows: x, cols: RowScales::of(weight) };
                Box::new(block_task::<Int8, _>(isa, x.lines, product, place, finish))
            }
            Input::Codes(x) => {
                let up = product.up.map(|(up, _)| ByteWeights::of(up.weight));
                let (main, out) = (ByteWeights::of(weight), product.output(place));
                Box::new(CodesKernel { isa, task: ByteTask { x, main, up, out } })
            }
            #[cfg(target_arch = "x86_64")]
            Input::Bf16(x) => bf16_kernel(isa, x, product, place),
            #[cfg(not(target_arch = "x86_64"))]
            Input::Bf16(_) => panic!("{} has no products of bf16", isa.name()),
            Input::Floats if weight.format == Format::Dense => {
                let (x, k, num_cols) = (inputs.x, inputs.k, weight.num_rows);
                let out = row_major(place);
                with_float!(weight.data.dtype(), E => {
                    let weights = DenseRows::<E>::of(weight);
                    Box::new(VectorKernel { isa, x, k, weights, num_cols, bias, out })
                })
            }
            Input::Floats => {
                let task = wide_task(WideRows::Floats { x: inputs.x, k: inputs.k }, product, place);
                match weight.format {
                    Format::DenseBlocks => {
                        Box::new(FloatsKernel { isa, task, words: PhantomData::<Pairs> })
                    }
                    Format::W8A16 => {
                        Box::new(FloatsKernel { isa, task, words: PhantomData::<Bytes> })
                    }
                    _ => Box::new(FloatsKernel { isa, task, words: PhantomData::<E4m3> }),
                }
            }
        }
    }

    /// Columns of a task, when all matrices together have `all_cols`.
    fn cols_per_task(
        &self,
        inputs: &Inputs<'_>,
        row_groups: usize,
        weight: &PackedMatrix,
        all_cols: usize,
    ) -> usize {
        let &Inputs { num_rows, k, .. } = inputs;
        let (num_cols, row_bytes) = (weight.num_rows, weight.row_bytes());
        let threads = self.threads();
        Sizes { num_rows, row_groups, k, num_cols, all_cols, row_bytes, threads }.cols_per_task()
    }

    /// In single precision, padded to whole blocks.
    pub(super) fn widened(&self, from: View<'_>) -> Vec<f32> {
        let len = from.shape().len();
        let mut out = vec![0.0; len.next_multiple_of(BLOCK_ROWS)];
        with_float!(from.dtype(), E =>
            self.isa.run(Convert { out: &mut out[..len], from: from.as_slice::<E>() }));
        out
    }
}

/// Where kernels of row-major weights write; nobody passes on what they compute.
fn row_major(place: Place<'_>) -> Parts<'_, f32> {
    match place {
        Place::Rows(rows) => rows.out,
        _ => panic!("only blocks pass on what they compute"),
    }
}

/// Whether a kernel takes both halves of a gated product.
pub(super) fn fuses(gate: &PackedMatrix, up: &PackedMatrix) -> bool {
    let grid = |weight: &PackedMatrix| weight.quantized.as_ref().map(|q| q.grid);
    gate.format.is_in_blocks() && gate.format == up.format && grid(gate) == grid(up)
}

/// A product whose words are widened on vectors.
fn wide_task<'a>(x: WideRows<'a>, product: Product<'a>, place: Place<'a>) -> WideTask<'a> {
    let up = product.up.map(|(up, _)| WideWeights::of(up.weight));
    let (main, out) = (WideWeights::of(product.main.weight), product.output(place));
    WideTask { x, main, up, out }
}

/// A product with blocks of `E`, as they are, on tiles.
#[cfg(target_arch = "x86_64")]
fn block_task<'a, E: TileElement, F: Finish>(
    isa: Isa,
    x: Lines<'a>,
    product: Product<'a>,
    place: Place<'a>,
    finish: impl Fn(&'a PackedMatrix) -> F,
) -> BlockTask<'a, E, F> {
    let Isa::Amx(amx) = isa else { panic!("{} has no tiles", isa.name()) };
    let half = |weighted: Weighted<'a>| tile_blocks::Half {
        blocks: Blocks::of(weighted.weight),
        finish: finish(weighted.weight),
    };
    let up = product.up.map(|(up, _)| half(up));
    let (main, out) = (half(product.main), product.output(place));
    BlockTask { amx, x, main, up, out, element: PhantomData }
}

/// Blocks of bf16, or of codes that are widened to it.
#[cfg(target_arch = "x86_64")]
fn bf16_kernel<'a>(
    isa: Isa,
    x: Lines<'a>,
    product: Product<'a>,
    place: Place<'a>,
) -> Box<dyn ColumnKernel + 'a> {
    match product.main.weight.format {
        Format::W8A16 => coded_kernel::<Bytes>(isa, x, product, place),
        Format::Fp8 => coded_kernel::<E4m3>(isa, x, product, place),
        _ => match isa {
            Isa::Amx(_) => {
                Box::new(block_task::<Bf16, _>(isa, x, product, place, |_| tile_write::Floats))
            }
            _ => pairs_kernel::<Pairs>(isa, x, product, place),
        },
    }
}

#[cfg(target_arch = "x86_64")]
fn coded_kernel<'a, W: Words<Avx512Bf16>>(
    isa: Isa,
    x: Lines<'a>,
    product: Product<'a>,
    place: Place<'a>,
) -> Box<dyn ColumnKernel + 'a> {
    match isa {
        Isa::Amx(_) => {
            let finish = |weight| ScaleCols(SliceScales::of(weight));
            let coded = block_task::<Bf16, _>(isa, x, product, place, finish);
            Box::new(CodedTask { coded, words: PhantomData::<W> })
        }
        _ => pairs_kernel::<W>(isa, x, product, place),
    }
}

#[cfg(target_arch = "x86_64")]
fn pairs_kernel<'a, W: Words<Avx512Bf16>>(
    isa: Isa,
    x: Lines<'a>,
    product: Product<'a>,
    place: Place<'a>,
) -> Box<dyn ColumnKernel + 'a> {
    let pairs = isa.pairs().expect("activations were prepared for products of bf16");
    let task = wide_task(WideRows::Pairs(x), product, place);
    Box::new(PairsKernel { pairs, task, words: PhantomData::<W> })
}
