//! `tokenmill bench kernels`: single operations of a device, each beside the limits that were read
//! in the same run: of a GPU how fast it copies memory, and how fast its library multiplies dense
//! matrices and, where it does, codes of FP8 and of bytes; of a processor those of `limits`.
//!
//! | file | what |
//! |---|---|
//! | `operands` | random numbers, and weights that take turns |
//! | `attention` | attention over a cache |
//! | `figures` | rows, and the fraction of what limits allow |
//!
//! An operation is asked for again and again and waited for once, so that launching overlaps with
//! computing; where steps are recorded it is recorded many times and replayed, as in a step.

mod attention;
mod figures;
mod operands;

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::parse_count;
use super::record::{Kind, Measured, RecordArgs, Recorder};
use crate::config::{DeviceArgs, Quantization};
use crate::device::RankContext;
use crate::formats::fp8;
use crate::ops::args::{CopyBlocksArgs, MatmulArgs, Projection};
use crate::ops::cpu::physical_cores;
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{Ops, OpsError, StepLimits};
use crate::tensor::DType;
use figures::{CODES, COPY, limits_of_gpu, set_fractions};
pub(super) use figures::{KernelFigures, KernelRow, MATMUL};
use operands::Normals;

/// Flags of `bench kernels`. The sizes are those of an 8 B Llama.
#[derive(Clone, Debug, Args)]
pub struct KernelsArgs {
    /// Device flags.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Columns of the multiplied weights
    #[arg(long, default_value_t = 4096, value_parser = parse_count)]
    pub hidden_size: usize,
    /// Rows of the multiplied weights
    #[arg(long, default_value_t = 14_336, value_parser = parse_count)]
    pub intermediate_size: usize,
    /// Query heads
    #[arg(long, default_value_t = 32, value_parser = parse_count)]
    pub num_heads: usize,
    /// Key and value heads
    #[arg(long, default_value_t = 8, value_parser = parse_count)]
    pub num_kv_heads: usize,
    /// Elements of a head
    #[arg(long, default_value_t = 128, value_parser = parse_count)]
    pub head_dim: usize,
    /// Tokens that a decoded sequence sees, and tokens of a prompt
    #[arg(long, default_value_t = 1024, value_parser = parse_count)]
    pub context_len: usize,
    /// Sequences that are decoded at once
    #[arg(long, default_value_t = 64, value_parser = parse_count)]
    pub batch_size: usize,
    /// Bytes that are copied to read the memory's speed (accepts 512M)
    #[arg(long, default_value = "1G", value_parser = crate::config::parse_bytes)]
    pub copy_size: u64,
    /// Bytes of copies of a weight that products take turns with: more than any cache holds
    #[arg(long, default_value = "512M", value_parser = crate::config::parse_bytes)]
    pub weights_size: u64,
    /// Milliseconds for which an operation is repeated
    #[arg(long, default_value_t = 200)]
    pub milliseconds: u64,
    /// Record flags.
    #[command(flatten)]
    pub record: RecordArgs,
}

/// Rows of activations that weights are multiplied by.
const ROWS: [usize; 4] = [1, 8, 64, 2048];
/// Rows of the products that read a GPU's peaks: enough to fill it for a millisecond.
const PEAK_ROWS: usize = 8192;
/// Formats of weights.
const FORMATS: [(&str, Option<Quantization>); 7] = [
    ("bf16", None),
    ("int8", Some(Quantization::Int8)),
    ("w8a16", Some(Quantization::W8A16)),
    ("q8_0", Some(Quantization::Q8_0)),
    ("int4", Some(Quantization::Int4)),
    ("mxfp4", Some(Quantization::Mxfp4)),
    ("fp8", Some(Quantization::Fp8)),
];
/// Dtypes of a cache.
const CACHES: [DType; 3] = [DType::BF16, DType::Fp8, DType::I8];
/// Tokens of a KV block.
const BLOCK_SIZE: usize = 16;
/// Fewest operations that are recorded at once.
const RECORDED: usize = 16;

/// Measures.
pub fn run(args: &KernelsArgs) -> anyhow::Result<()> {
    let config = args.device.clone().resolve([])?;
    let rank = RankContext::open(&config)?;
    let on_gpu = rank.ops.device_memory()?.is_some();
    let threads = config.threads.unwrap_or_else(physical_cores);
    let measured = if on_gpu { Measured::Gpu } else { Measured::Host { threads } };
    let mut recorder = Recorder::begin(args.record.clone(), measured)?;
    println!("{}", rank.ops.name());
    let mut rows = measure(&*rank.ops, args, on_gpu)?;
    recorder.end();
    if on_gpu {
        recorder.add_limits(limits_of_gpu(&rows));
    }
    set_fractions(&mut rows, recorder.limits(), on_gpu);
    rows.iter().for_each(KernelRow::print);
    let options = json!({
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_heads": args.num_heads,
        "num_kv_heads": args.num_kv_heads,
        "head_dim": args.head_dim,
        "context_len": args.context_len,
        "batch_size": args.batch_size,
        "recorded": rank.ops.can_record(),
    });
    let model = json!({"backend": rank.ops.name()});
    recorder.write(Kind::Kernels, model, options, &KernelFigures { rows })
}

fn measure(ops: &dyn Ops, args: &KernelsArgs, on_gpu: bool) -> Result<Vec<KernelRow>, OpsError> {
    let most_rows = if on_gpu { PEAK_ROWS } else { ROWS[3] };
    ops.reserve(&StepLimits {
        max_num_tokens: most_rows.max(args.context_len).max(args.batch_size),
        max_num_seqs: args.batch_size,
        max_context_len: args.context_len,
        max_width: args.hidden_size,
        num_heads: args.num_heads,
        head_dim: args.head_dim,
        max_logit_rows: 1,
        vocab_size: 1,
        hidden_size: 0,
        num_experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    })?;
    let normals = Normals::new();
    let time = Duration::from_millis(args.milliseconds);
    let bench = Bench { ops, args, normals, time };
    let mut rows = vec![bench.copy()?];
    for (name, format) in FORMATS {
        let peak_rows = (on_gpu && format.is_none()).then_some(PEAK_ROWS);
        rows.extend(bench.matmuls(name, format, ROWS.into_iter().chain(peak_rows))?);
    }
    for (name, dtype, sums) in [("fp8", DType::Fp8, DType::BF16), ("int8", DType::I8, DType::U32)] {
        rows.extend(bench.codes(name, dtype, sums)?);
    }
    for dtype in CACHES {
        rows.push(bench.attention("decode", dtype, args.batch_size, 1)?);
        rows.push(bench.attention("prefill", dtype, 1, args.context_len)?);
    }
    Ok(rows)
}

/// What measures.
struct Bench<'a> {
    ops: &'a dyn Ops,
    args: &'a KernelsArgs,
    normals: Normals,
    /// For how long an operation is repeated.
    time: Duration,
}

impl Bench<'_> {
    /// Microseconds of one operation, which takes turns with so many operands and is told whose turn
    /// it is.
    fn time(&self, num_turns: usize, mut operation: impl FnMut(usize)) -> Result<f64, OpsError> {
        // Kernels may be loaded at their first use, which cannot be recorded.
        operation(0);
        self.ops.synchronize()?;
        let num_recorded = RECORDED.next_multiple_of(num_turns);
        let mut record =
            || self.ops.record(&mut || (0..num_recorded).for_each(|i| operation(i % num_turns)));
        let recording = if self.ops.can_record() { record() } else { None };
        let mut turn = 0;
        let mut pass = || match &recording {
            Some(recording) => self.ops.replay(recording),
            None => {
                operation(turn % num_turns);
                turn += 1;
            }
        };
        if self.ops.runs_beside_host() {
            // Clocks rise with work.
            self.repeat(self.time / 4, &mut pass)?;
        }
        let microseconds = self.repeat(self.time, &mut pass)?;
        Ok(microseconds / recording.as_ref().map_or(1.0, |_| num_recorded as f64))
    }

    /// Microseconds of a pass, of as many as take so long.
    fn repeat(&self, time: Duration, pass: &mut dyn FnMut()) -> Result<f64, OpsError> {
        let (mut count, mut batch, started) = (0_u32, 1, Instant::now());
        loop {
            (0..batch).for_each(|_| pass());
            self.ops.synchronize()?;
            count += batch;
            let elapsed = started.elapsed();
            if elapsed >= time {
                return Ok(elapsed.as_secs_f64() * 1e6 / f64::from(count));
            }
            // As many as were done so far: waiting becomes rare.
            batch = count;
        }
    }

    /// Half of a cache over the other half, in one piece.
    fn copy(&self) -> Result<KernelRow, OpsError> {
        let row_bytes = 2 * 8 * 128 * DType::BF16.size_bytes();
        let num_rows = (self.args.copy_size as usize / row_bytes).max(1);
        let mut cache = KvTensor::zeros_on(self.ops, DType::BF16, [2, 8, num_rows, 128])?;
        // Pages that nobody wrote would all be one page of zeros, in a processor's cache.
        let half = self.normals.bf16([1, 8, num_rows, 128]);
        self.ops.upload(cache.data.view_mut().into_rows(0..1), half.view());
        let microseconds = self.time(1, |_| {
            let (k_cache, v_cache) = (cache.view_mut(), None);
            self.ops.copy_blocks(CopyBlocksArgs { k_cache, v_cache, pairs: &[(0, 1)] });
        })?;
        let bytes = cache.data.size_bytes() as f64;
        Ok(KernelRow {
            operation: COPY.to_owned(),
            case: format!("{:.2} GB read and written", bytes / 2e9),
            format: None,
            rows: None,
            microseconds,
            bytes,
            flops: 0.0,
            fraction: None,
        })
    }

    /// Activations of several numbers of rows times weights of one format.
    fn matmuls(
        &self,
        name: &str,
        format: Option<Quantization>,
        rows: impl Iterator<Item = usize>,
    ) -> Result<Vec<KernelRow>, OpsError> {
        let &KernelsArgs { hidden_size, intermediate_size, weights_size, .. } = self.args;
        let shape = [intermediate_size, hidden_size];
        let weights = self.normals.weights(self.ops, format, shape, weights_size as usize)?;
        let row = |rows: usize| {
            let x = self.normals.activations(self.ops, [rows, hidden_size])?;
            let dtype = self.ops.activation_dtype();
            let mut out = self.ops.zeros(dtype, [rows, intermediate_size].into())?;
            let microseconds = self.time(weights.len(), |turn| {
                let weight = &weights[turn];
                let projection = Projection { out: out.view_mut(), weight, bias: None };
                self.ops.matmul(MatmulArgs { x: x.view(), projections: vec![projection] });
            })?;
            let bytes = weights[0].size_bytes() + x.size_bytes() + out.size_bytes();
            Ok(self.product(MATMUL, name, rows, microseconds, bytes))
        };
        rows.map(row).collect()
    }

    /// Codes times codes, with many rows; nothing where the device has no such products.
    fn codes(&self, name: &str, dtype: DType, sums: DType) -> Result<Vec<KernelRow>, OpsError> {
        let &KernelsArgs { hidden_size, intermediate_size, .. } = self.args;
        let mut measured = Vec::new();
        let is_whole = |size: &usize| size.is_multiple_of(fp8::ROWS_UNIT);
        if ![intermediate_size, hidden_size].iter().all(is_whole) {
            return Ok(measured);
        }
        let weight = self.normals.codes(self.ops, dtype, [intermediate_size, hidden_size])?;
        for rows in [ROWS[2], ROWS[3], PEAK_ROWS] {
            let x = self.normals.codes(self.ops, dtype, [rows, hidden_size])?;
            let mut out = self.ops.zeros(sums, [rows, intermediate_size].into())?;
            let mut multiply = || self.ops.multiply_codes(out.view_mut(), x.view(), weight.view());
            if !multiply() {
                return Ok(measured);
            }
            let microseconds = self.time(1, |_| {
                multiply();
            })?;
            let bytes = weight.size_bytes() + x.size_bytes() + out.size_bytes();
            measured.push(self.product(CODES, name, rows, microseconds, bytes));
        }
        Ok(measured)
    }

    fn product(
        &self,
        operation: &str,
        format: &str,
        rows: usize,
        microseconds: f64,
        bytes: usize,
    ) -> KernelRow {
        let num_weights = self.args.hidden_size * self.args.intermediate_size;
        KernelRow {
            operation: operation.to_owned(),
            case: format!("{format}, {rows} rows"),
            format: Some(format.to_owned()),
            rows: Some(rows),
            microseconds,
            bytes: bytes as f64,
            flops: 2.0 * (rows * num_weights) as f64,
            fraction: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;
    use crate::config::CpuIsa;
    use crate::ops::cpu::CpuOps;

    #[test]
    fn every_operation_is_timed() {
        let command = KernelsArgs::augment_args(clap::Command::new("kernels"));
        let sizes = "kernels --hidden-size 64 --intermediate-size 96 --num-heads 2 \
             --num-kv-heads 1 --head-dim 32 --context-len 40 --batch-size 2 --copy-size 1M \
             --weights-size 64K --milliseconds 0";
        let matches = command.get_matches_from(sizes.split_whitespace());
        let args = KernelsArgs::from_arg_matches(&matches).expect("the flags are known");
        let ops = CpuOps::new(Some(1), CpuIsa::Auto).expect("there is a CPU");
        let rows = measure(&ops, &args, false).expect("a CPU does not fail");
        assert_eq!(rows.len(), 1 + FORMATS.len() * ROWS.len() + 2 * CACHES.len());
        assert!(rows.iter().all(|row| row.microseconds > 0.0 && row.bytes > 0.0));
        assert_eq!(
            (rows[0].bytes, rows[0].case.as_str()),
            (f64::from(1 << 20), "0.00 GB read and written")
        );
        assert_eq!(rows[1].flops, 2.0 * 64.0 * 96.0);
    }
}
