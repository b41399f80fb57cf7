//! `tokenmill bench kernels`: single operations of a device, each beside the ceiling that was read
//! in the same run: how fast it copies memory, and how fast it multiplies dense matrices, or codes of
//! FP8 where it multiplies those.
//!
//! An operation is asked for again and again and waited for once, so that launching overlaps
//! with computing as it does in a step.

use std::time::Instant;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::parse_count;
use super::record::{Kind, RecordArgs, Recorder};
use crate::config::{DeviceArgs, Quantization};
use crate::device::RankContext;
use crate::formats::{PackedMatrix, dense, fp8};
use crate::ops::args::{AttentionArgs, CopyBlocksArgs, MatmulArgs, Projection};
use crate::ops::cpu::physical_cores;
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{Ops, OpsError, StepLimits};
use crate::tensor::{DType, Fp8, Tensor};
use crate::weights;

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
    /// Milliseconds for which an operation is repeated
    #[arg(long, default_value_t = 200)]
    pub milliseconds: u64,
    /// Record flags.
    #[command(flatten)]
    pub record: RecordArgs,
}

/// Rows of activations that weights are multiplied by; the last reads the arithmetic ceiling.
const ROWS: [usize; 4] = [1, 8, 64, 2048];
/// Formats of weights.
const FORMATS: [(&str, Option<Quantization>); 6] = [
    ("bf16", None),
    ("int8", Some(Quantization::Int8)),
    ("w8a16", Some(Quantization::W8A16)),
    ("int4", Some(Quantization::Int4)),
    ("mxfp4", Some(Quantization::Mxfp4)),
    ("fp8", Some(Quantization::Fp8)),
];
/// Products of FP8 codes alone, which no scale is applied to.
const CODES: &str = "codes";
/// Dtypes of a cache.
const CACHES: [DType; 3] = [DType::BF16, DType::Fp8, DType::I8];
/// Tokens of a KV block.
const BLOCK_SIZE: usize = 16;

/// One operation.
#[derive(Clone, Debug, Serialize)]
pub(super) struct KernelRow {
    /// Which.
    operation: &'static str,
    /// Of what.
    case: String,
    /// Microseconds of one.
    microseconds: f64,
    /// Bytes of memory that it must read and write.
    bytes: f64,
    /// Multiplications and additions.
    flops: f64,
    /// The time that the ceilings would allow, over the time that it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    fraction: Option<f64>,
}

impl KernelRow {
    fn gb_per_s(&self) -> f64 {
        self.bytes / self.microseconds / 1e3
    }

    fn tflops(&self) -> f64 {
        self.flops / self.microseconds / 1e6
    }

    fn print(&self) {
        let fraction = self.fraction.map_or(String::new(), |f| format!("  {:.0} %", 100.0 * f));
        println!(
            "{:<12} {:<28} {:>10.1} µs {:>8.0} GB/s {:>8.2} TFLOP/s{fraction}",
            self.operation,
            self.case,
            self.microseconds,
            self.gb_per_s(),
            self.tflops()
        );
    }
}

/// Measures.
pub fn run(args: &KernelsArgs) -> anyhow::Result<()> {
    let config = args.device.clone().resolve([])?;
    let rank = RankContext::open(&config)?;
    let on_host = rank.ops.device_memory()?.is_none();
    let threads = on_host.then(|| config.threads.unwrap_or_else(physical_cores));
    let mut recorder = Recorder::begin(args.record.clone(), threads)?;
    println!("{}", rank.ops.name());
    let rows = measure(&*rank.ops, args)?;
    rows.iter().for_each(KernelRow::print);
    recorder.end();
    let options = json!({
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_heads": args.num_heads,
        "num_kv_heads": args.num_kv_heads,
        "head_dim": args.head_dim,
        "context_len": args.context_len,
        "batch_size": args.batch_size,
    });
    let model = json!({"backend": rank.ops.name()});
    recorder.write(Kind::Kernels, model, options, &json!({"rows": rows}))
}

fn measure(ops: &dyn Ops, args: &KernelsArgs) -> Result<Vec<KernelRow>, OpsError> {
    ops.reserve(&StepLimits {
        max_num_tokens: ROWS[3].max(args.context_len).max(args.batch_size),
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
    let bench = Bench { ops, milliseconds: args.milliseconds };
    let mut rows = vec![bench.copy(args.copy_size as usize)?];
    for (name, format) in FORMATS {
        rows.extend(bench.matmuls(name, format, [args.intermediate_size, args.hidden_size])?);
    }
    rows.extend(bench.codes([args.intermediate_size, args.hidden_size])?);
    for dtype in CACHES {
        rows.push(bench.attention("decode", args, dtype, args.batch_size, 1)?);
        rows.push(bench.attention("prefill", args, dtype, 1, args.context_len)?);
    }
    set_fractions(&mut rows);
    Ok(rows)
}

/// Holds every row to the ceilings among them: the first row's bandwidth, and the best arithmetic of
/// dense products, for FP8 that of codes where there is any.
fn set_fractions(rows: &mut [KernelRow]) {
    let bandwidth = rows[0].gb_per_s();
    let best = |is_of: &dyn Fn(&KernelRow) -> bool| {
        let tflops = rows.iter().filter(|row| is_of(row)).map(KernelRow::tflops);
        tflops.fold(0.0, f64::max)
    };
    let dense = best(&|row| row.operation == "matmul" && row.case.starts_with("bf16"));
    let codes = best(&|row| row.operation == CODES).max(dense);
    for row in &mut rows[1..] {
        let is_fp8 = row.operation == "matmul" && row.case.starts_with("fp8");
        let peak = if is_fp8 || row.operation == CODES { codes } else { dense };
        let allowed = (row.bytes / bandwidth / 1e3).max(row.flops / peak / 1e6);
        row.fraction = Some(allowed / row.microseconds);
    }
}

/// What measures.
struct Bench<'a> {
    ops: &'a dyn Ops,
    milliseconds: u64,
}

impl Bench<'_> {
    /// Microseconds of one operation, after one that does not count.
    fn time(&self, mut operation: impl FnMut()) -> Result<f64, OpsError> {
        operation();
        self.ops.synchronize()?;
        let (mut count, mut batch, started) = (0_u32, 1, Instant::now());
        loop {
            (0..batch).for_each(|_| operation());
            self.ops.synchronize()?;
            count += batch;
            let elapsed = started.elapsed();
            if elapsed.as_millis() >= u128::from(self.milliseconds) {
                return Ok(elapsed.as_secs_f64() * 1e6 / f64::from(count));
            }
            // As many as were done so far: waiting becomes rare.
            batch = count;
        }
    }

    /// Half of some blocks over the other half.
    fn copy(&self, bytes: usize) -> Result<KernelRow, OpsError> {
        let num_blocks = (bytes / 2 / (64 << 10)).max(2).next_multiple_of(2);
        let shape = [num_blocks, 8, BLOCK_SIZE, 128];
        let zeros = || KvTensor::zeros_on(self.ops, DType::BF16, shape);
        let (mut k, mut v) = (zeros()?, zeros()?);
        let half = num_blocks as u32 / 2;
        let pairs: Vec<(u32, u32)> = (0..half).map(|block| (block, half + block)).collect();
        let microseconds = self.time(|| {
            let (k_cache, v_cache) = (k.view_mut(), Some(v.view_mut()));
            self.ops.copy_blocks(CopyBlocksArgs { k_cache, v_cache, pairs: &pairs });
        })?;
        let bytes = 2.0 * k.data.size_bytes() as f64;
        let case = format!("{:.2} GB read and written", bytes / 2e9);
        let (flops, fraction) = (0.0, None);
        Ok(KernelRow { operation: "copy", case, microseconds, bytes, flops, fraction })
    }

    fn matmuls(
        &self,
        name: &str,
        format: Option<Quantization>,
        [out_features, in_features]: [usize; 2],
    ) -> Result<Vec<KernelRow>, OpsError> {
        let weight = self.weight(format, [out_features, in_features])?;
        let weight_bytes = weight.size_bytes();
        let row = |rows: usize| {
            let dtype = self.ops.activation_dtype();
            let x = self.ops.zeros(dtype, [rows, in_features].into())?;
            let mut out = self.ops.zeros(dtype, [rows, out_features].into())?;
            let microseconds = self.time(|| {
                let projection = Projection { out: out.view_mut(), weight: &weight, bias: None };
                self.ops.matmul(MatmulArgs { x: x.view(), projections: vec![projection] });
            })?;
            Ok(KernelRow {
                operation: "matmul",
                case: format!("{name}, {rows} rows"),
                microseconds,
                bytes: (weight_bytes + x.size_bytes() + out.size_bytes()) as f64,
                flops: 2.0 * (rows * in_features * out_features) as f64,
                fraction: None,
            })
        };
        ROWS.into_iter().map(row).collect()
    }

    /// FP8 codes times FP8 codes, with many rows; nothing where the device has no such products.
    fn codes(&self, [out_features, in_features]: [usize; 2]) -> Result<Vec<KernelRow>, OpsError> {
        let mut measured = Vec::new();
        if [out_features, in_features].iter().any(|size| !size.is_multiple_of(fp8::ROWS_UNIT)) {
            return Ok(measured);
        }
        let codes = |shape: [usize; 2]| {
            let code = |i| Fp8(fp8::encode(number(i)));
            let codes: Vec<Fp8> = (0..shape[0] * shape[1]).map(code).collect();
            self.ops.place(Tensor::from_slice(&codes, shape))
        };
        let weight = codes([out_features, in_features])?;
        for rows in [ROWS[2], ROWS[3]] {
            let x = codes([rows, in_features])?;
            let mut out = self.ops.zeros(DType::BF16, [rows, out_features].into())?;
            let mut multiply = || self.ops.multiply_fp8(out.view_mut(), x.view(), weight.view());
            if !multiply() {
                return Ok(measured);
            }
            let microseconds = self.time(|| {
                multiply();
            })?;
            measured.push(KernelRow {
                operation: CODES,
                case: format!("fp8, {rows} rows"),
                microseconds,
                bytes: (weight.size_bytes() + x.size_bytes() + out.size_bytes()) as f64,
                flops: 2.0 * (rows * in_features * out_features) as f64,
                fraction: None,
            });
        }
        Ok(measured)
    }

    /// Weights that are not all alike: some machines multiply zeros faster.
    fn weight(
        &self,
        format: Option<Quantization>,
        shape: [usize; 2],
    ) -> Result<PackedMatrix, OpsError> {
        let value = |i| half::bf16::from_f32(number(i));
        let values: Vec<half::bf16> = (0..shape[0] * shape[1]).map(value).collect();
        let plain = dense::pack(Tensor::from_slice(&values, shape));
        self.ops.arrange(weights::quantized(plain, format, physical_cores()))
    }

    /// Attention of `num_queries` new tokens of each of `num_seqs` sequences.
    fn attention(
        &self,
        operation: &'static str,
        args: &KernelsArgs,
        dtype: DType,
        num_seqs: usize,
        num_queries: usize,
    ) -> Result<KernelRow, OpsError> {
        let &KernelsArgs { num_heads, num_kv_heads, head_dim, context_len, .. } = args;
        let width = context_len.div_ceil(BLOCK_SIZE);
        let cache_shape = [num_seqs * width, num_kv_heads, BLOCK_SIZE, head_dim];
        let k_cache = KvTensor::zeros_on(self.ops, dtype, cache_shape)?;
        let v_cache = KvTensor::zeros_on(self.ops, dtype, cache_shape)?;
        let integers =
            |values: Vec<u32>, shape: &[usize]| self.ops.place(Tensor::from_slice(&values, shape));
        let tables = integers((0..(num_seqs * width) as u32).collect(), &[num_seqs, width])?;
        let cu_seqlens = (0..=num_seqs).map(|seq| (seq * num_queries) as u32).collect();
        let cu_seqlens = integers(cu_seqlens, &[num_seqs + 1])?;
        let context_lens = integers(vec![context_len as u32; num_seqs], &[num_seqs])?;
        let shape = [num_seqs * num_queries, num_heads, head_dim];
        let activations = || self.ops.zeros(self.ops.activation_dtype(), shape.into());
        let (q, mut out) = (activations()?, activations()?);
        let microseconds = self.time(|| {
            self.ops.attention(AttentionArgs {
                out: out.view_mut(),
                q: q.view(),
                k_cache: k_cache.view(),
                v_cache: v_cache.view(),
                block_tables: tables.view(),
                cu_seqlens_q: cu_seqlens.view(),
                context_lens: context_lens.view(),
                scale: 1.0 / (head_dim as f32).sqrt(),
                sliding_window: None,
                softcap: None,
                sinks: None,
            });
        })?;
        let vectors = 2 * num_seqs * context_len * num_kv_heads;
        // A query of a prompt sees half of it on average.
        let seen = if num_queries == 1 { context_len } else { context_len.div_ceil(2) };
        Ok(KernelRow {
            operation,
            case: format!("{dtype} cache, {num_seqs} × {context_len}"),
            microseconds,
            bytes: (vectors * KvTensor::vector_bytes(dtype, head_dim) + 2 * q.size_bytes()) as f64,
            flops: 4.0 * (num_seqs * num_queries * seen * num_heads * head_dim) as f64,
            fraction: None,
        })
    }
}

/// The element of this index of an operand, between -1 and 1.
fn number(i: usize) -> f32 {
    ((i * 37 % 251) as f32 - 125.0) / 125.0
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;
    use crate::config::CpuIsa;
    use crate::ops::cpu::CpuOps;

    #[test]
    fn every_operation_is_timed_beside_the_ceilings() {
        let command = KernelsArgs::augment_args(clap::Command::new("kernels"));
        let sizes = "kernels --hidden-size 64 --intermediate-size 96 --num-heads 2 \
             --num-kv-heads 1 --head-dim 32 --context-len 40 --batch-size 2 --copy-size 1M \
             --milliseconds 0";
        let matches = command.get_matches_from(sizes.split_whitespace());
        let args = KernelsArgs::from_arg_matches(&matches).expect("the flags are known");
        let ops = CpuOps::new(Some(1), CpuIsa::Auto).expect("there is a CPU");
        let rows = measure(&ops, &args).expect("a CPU does not fail");
        assert_eq!(rows.len(), 1 + FORMATS.len() * ROWS.len() + 2 * CACHES.len());
        assert!(rows.iter().all(|row| row.microseconds > 0.0 && row.bytes > 0.0));
        assert!(rows[1..].iter().all(|row| row.fraction.is_some_and(|f| f > 0.0)));
        assert_eq!(rows[1].flops, 2.0 * 64.0 * 96.0);
    }

    #[test]
    fn fp8_is_held_to_the_speed_of_its_codes_where_they_are_multiplied() {
        let row = |operation: &'static str, case: &str, microseconds: f64, flops: f64| {
            let (case, bytes) = (case.to_owned(), 1.0);
            KernelRow { operation, case, microseconds, bytes, flops, fraction: None }
        };
        let mut rows = vec![
            row("copy", "", 1e-6, 0.0),
            row("matmul", "bf16, 2048 rows", 1.0, 1e6),
            row("matmul", "int8, 2048 rows", 0.5, 1e6),
            row("matmul", "fp8, 2048 rows", 0.8, 1e6),
        ];
        let fractions = |rows: &mut Vec<KernelRow>| -> Vec<f64> {
            set_fractions(rows);
            rows[1..].iter().map(|row| row.fraction.unwrap_or_default()).collect()
        };
        assert_eq!(fractions(&mut rows), [1.0, 2.0, 1.25]);
        rows.push(row(CODES, "fp8, 2048 rows", 0.5, 1e6));
        assert_eq!(fractions(&mut rows), [1.0, 2.0, 0.625, 1.0]);
    }
}
