//! Backends, reproducible data, guarded outputs, comparison.

use half::{bf16, f16};
use tokenmill::formats::blocks::{BLOCK_ROWS, interleave};
use tokenmill::formats::{
    Format, PackedMatrix, Quantized, ROW_ALIGN, RowQuantizer, ScaleGrid, dense, fp8, int4, int8,
    mxfp4, q8, quantize,
};
use tokenmill::ops::Ops;
use tokenmill::ops::cpu::{CpuOps, Isa};
use tokenmill::ops::kv_tensor::KvTensor;
use tokenmill::tensor::{DType, Fp8, Shape, Tensor, ViewMut};

pub const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
/// What a KV cache may hold.
pub const CACHES: [DType; 5] = [DType::F32, DType::BF16, DType::F16, DType::I8, DType::Fp8];

/// Every instruction set of this machine, on one thread, where caches keep what the machine says,
/// and on two, where they keep no large result.
pub fn backends() -> Vec<CpuOps> {
    let new = |isa: Isa, threads| CpuOps::new(Some(threads), isa.choice()).unwrap();
    let on = |isa| [new(isa, 1), new(isa, 2).keeping(1 << 20)];
    Isa::supported().into_iter().flat_map(on).collect()
}

pub fn for_each_backend(check: impl Fn(&dyn Ops)) {
    backends().iter().for_each(|ops| check(ops));
}

/// Whether tables of kernels shall be as short as reaches every kernel: for sanitizers, under which
/// a case takes several times as long.
pub fn wants_few_cases() -> bool {
    std::env::var_os("TOKENMILL_FEW_CASES").is_some()
}

/// Whether a backend multiplies bf16 as such: it rounds activations to it then.
pub fn multiplies_bf16(ops: &dyn Ops) -> bool {
    ["amx", "bf16"].iter().any(|name| ops.name().contains(name))
}

/// A small generator (xorshift64*), so that data is the same everywhere.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Uniform in [-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    pub fn tensor(&mut self, dtype: DType, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        cast(&self.floats(shape.len()), dtype, shape)
    }

    /// f32 numbers that have no more digits than the backend's activations.
    pub fn activations(&mut self, ops: &dyn Ops, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let values = self.floats(shape.len());
        Tensor::from_slice(&as_activations(ops, &values), shape)
    }

    pub fn matrix(&mut self, dtype: DType, rows: usize, cols: usize) -> PackedMatrix {
        dense::pack(self.tensor(dtype, [rows, cols]))
    }

    /// `0..len` in random order.
    pub fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Numbers rounded to the dtype of the backend's activations.
pub fn as_activations(ops: &dyn Ops, values: &[f32]) -> Vec<f32> {
    match ops.activation_dtype() {
        DType::F32 => values.to_vec(),
        dtype => widened(&cast(values, dtype, [values.len()])),
    }
}

/// Panics unless outputs are within the tolerance of f32 activations and, where the backend's
/// are shorter, a rounding of the result: 2^-8 of it (bf16) is a whole step, so that a result
/// which f32 sums put on the other side of a tie is still right.
pub fn assert_outputs(
    ops: &dyn Ops,
    what: &str,
    got: &[f32],
    want: &[f32],
    (absolute, relative): (f32, f32),
) {
    let rounding = match ops.activation_dtype() {
        DType::BF16 => 2f32.powi(-8),
        // Below 2^-14 steps are 2^-24.
        DType::F16 => 2f32.powi(-11),
        _ => 0.0,
    };
    let least = if ops.activation_dtype() == DType::F16 { 2f32.powi(-25) } else { 0.0 };
    assert_close(what, got, want, (absolute + least, relative + rounding));
}

/// What the backend's KV cache may hold.
pub fn caches(ops: &dyn Ops) -> &'static [DType] {
    if ops.activation_dtype() == DType::F32 { &CACHES } else { &CACHES[1..] }
}

/// A matrix in every quantized format, with its name.
pub fn quantized(rng: &mut Rng, rows: usize, cols: usize) -> Vec<(&'static str, PackedMatrix)> {
    let values = rng.floats(rows * cols);
    let read = |row: usize, to: &mut [f32]| to.copy_from_slice(&values[row * cols..][..cols]);
    fn packed<Q: RowQuantizer>(
        quantizer: &Q,
        shape: [usize; 2],
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> PackedMatrix {
        quantize(quantizer, shape, 1, read)
    }
    let shape = [rows, cols];
    vec![
        ("int8", packed(&int8::PerRow, shape, read)),
        ("w8a16", packed(&q8::W8A16, shape, read)),
        ("q8_0", packed(&q8::Q8_0, shape, read)),
        ("int4 32", packed(&int4::Symmetric(32), shape, read)),
        ("int4 64", packed(&int4::Symmetric(64), shape, read)),
        ("int4 128", packed(&int4::Symmetric(128), shape, read)),
        ("int4 with zero points", with_zero_points(rng, packed(&int4::Grouped(64), shape, read))),
        (
            "int4 32 with zero points",
            with_zero_points(rng, packed(&int4::Grouped(32), shape, read)),
        ),
        ("mxfp4", mxfp4(rng, rows, cols)),
        ("fp8", packed(&fp8::PerRow, shape, read)),
        ("fp8 in blocks", fp8_blocks(rng, rows, cols)),
    ]
}

fn with_zero_points(rng: &mut Rng, mut matrix: PackedMatrix) -> PackedMatrix {
    let quantized = matrix.quantized.as_mut().unwrap();
    let shape = quantized.scales.shape();
    let zeros: Vec<u8> = (0..shape.len()).map(|_| rng.below(16) as u8).collect();
    quantized.zero_points = Some(Tensor::from_slice(&zeros, shape));
    matrix
}

/// Random codes under scales from 2^-6 to 2^-3, as published MXFP4 checkpoints have them.
fn mxfp4(rng: &mut Rng, rows: usize, cols: usize) -> PackedMatrix {
    let (row_bytes, groups) = (cols.div_ceil(2), cols.div_ceil(mxfp4::GROUP));
    let codes: Vec<u8> = (0..rows * row_bytes).map(|_| rng.below(256) as u8).collect();
    let scales: Vec<u8> = (0..rows * groups).map(|_| 121 + rng.below(4) as u8).collect();
    mxfp4::pack([rows, cols], 1, |row| (&codes[row * row_bytes..], &scales[row * groups..]))
}

/// Random codes under a scale per 128 × 128 block, as published FP8 checkpoints have them: rows
/// of a block repeat its scale.
fn fp8_blocks(rng: &mut Rng, rows: usize, cols: usize) -> PackedMatrix {
    let (width, num_blocks) = (cols.next_multiple_of(ROW_ALIGN), rows.div_ceil(BLOCK_ROWS));
    let codes: Vec<u8> =
        (0..num_blocks * BLOCK_ROWS * width).map(|_| fp8::encode(rng.float() * 448.0)).collect();
    let mut data = Tensor::zeros(DType::U8, [num_blocks, BLOCK_ROWS * width]);
    let blocks = data.as_mut_slice::<u8>().chunks_exact_mut(BLOCK_ROWS * width);
    for (rows, block) in codes.chunks_exact(BLOCK_ROWS * width).zip(blocks) {
        interleave(rows, block);
    }
    let grid = ScaleGrid::groups(128);
    let shape = grid.blocks_shape(rows, cols);
    let tiles: Vec<f32> =
        (0..rows.div_ceil(128) * shape[1]).map(|_| (1.0 + rng.float()) / 448.0).collect();
    let scale = |i: usize| {
        let (block, group) = (i / BLOCK_ROWS / shape[1], i / BLOCK_ROWS % shape[1]);
        tiles[block * BLOCK_ROWS / 128 * shape[1] + group]
    };
    let scales: Vec<f32> = (0..shape.iter().product()).map(scale).collect();
    PackedMatrix {
        format: Format::Fp8,
        num_rows: rows,
        num_cols: cols,
        data,
        quantized: Some(Quantized {
            grid,
            scales: Tensor::from_slice(&scales, shape),
            zero_points: None,
        }),
    }
}

pub fn cast(values: &[f32], dtype: DType, shape: impl Into<Shape>) -> Tensor {
    match dtype {
        DType::F32 => Tensor::from_slice(values, shape),
        DType::BF16 => {
            let values: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            Tensor::from_slice(&values, shape)
        }
        DType::F16 => {
            let values: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            Tensor::from_slice(&values, shape)
        }
        _ => panic!("floats only"),
    }
}

/// Cached vectors, quantized where the dtype says so. A vector of NaN, which stands for one that
/// nobody wrote, gets the most harmful bits that its dtype has.
pub fn cast_cache(values: &[f32], dtype: DType, shape: [usize; 4]) -> KvTensor {
    let mut cache = KvTensor::zeros(dtype, shape);
    match (dtype, &mut cache.scales) {
        (DType::I8, Some(scales)) => {
            let codes = cache.data.as_mut_slice::<i8>().chunks_exact_mut(shape[3]);
            let rows = codes.zip(scales.as_mut_slice::<f32>()).zip(values.chunks_exact(shape[3]));
            for ((codes, scale), values) in rows {
                *scale = int8::quantize_row(values, codes);
                if values[0].is_nan() {
                    *scale = f32::NAN;
                    codes.fill(i8::MIN);
                }
            }
        }
        (DType::Fp8, _) => {
            for (code, &x) in cache.data.as_mut_slice::<Fp8>().iter_mut().zip(values) {
                *code = Fp8(if x.is_nan() { 0x7f } else { fp8::encode(x) });
            }
        }
        _ => cache.data = cast(values, dtype, shape),
    }
    cache
}

/// The elements of a float tensor.
pub fn widened(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype() {
        DType::F32 => tensor.as_slice::<f32>().to_vec(),
        DType::BF16 => tensor.as_slice::<bf16>().iter().map(|x| x.to_f32()).collect(),
        DType::F16 => tensor.as_slice::<f16>().iter().map(|x| x.to_f32()).collect(),
        _ => panic!("floats only"),
    }
}

pub fn ids(values: &[u32]) -> Tensor {
    Tensor::from_slice(values, [values.len()])
}

const GUARD: f32 = 12_345.0;

/// An output between two guard rows. It starts as NaN, so that an element that nobody writes
/// is noticed.
pub struct Guarded {
    tensor: Tensor,
    rows: usize,
}

impl Guarded {
    pub fn poisoned(shape: impl Into<Shape>) -> Guarded {
        let shape = shape.into();
        Guarded::filled(&vec![f32::NAN; shape.len()], shape)
    }

    pub fn filled(values: &[f32], shape: impl Into<Shape>) -> Guarded {
        let shape = shape.into();
        let rows = shape.sizes()[0];
        let mut tensor = Tensor::zeros(DType::F32, shape.with_rows(rows + 2));
        tensor.as_mut_slice::<f32>().fill(GUARD);
        tensor.view_mut().into_rows(1..rows + 1).into_mut_slice().copy_from_slice(values);
        Guarded { tensor, rows }
    }

    pub fn view(&mut self) -> ViewMut<'_> {
        self.tensor.view_mut().into_rows(1..self.rows + 1)
    }

    /// The output; panics when a guard was overwritten or an element is NaN.
    pub fn finish(self, what: &str) -> Vec<f32> {
        let all = self.tensor.view();
        for guard in [all.rows(0..1), all.rows(self.rows + 1..self.rows + 2)] {
            assert!(
                guard.as_slice::<f32>().iter().all(|&x| x == GUARD),
                "{what}: guard overwritten"
            );
        }
        let out = all.rows(1..self.rows + 1).as_slice::<f32>().to_vec();
        assert!(out.iter().all(|x| !x.is_nan()), "{what}: an element was not written, or is NaN");
        out
    }
}

/// Panics unless `|got - want| <= absolute + relative · |want|` everywhere.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], (absolute, relative): (f32, f32)) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let allowed = absolute + relative * want.abs();
        assert!((got - want).abs() <= allowed, "{what}: element {i} is {got}, expected {want}");
    }
}

/// Panics unless all bits are equal.
pub fn assert_same(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{what}: element {i} is {got}, not {want}");
    }
}
