//! `tokenmill bench steps`: the time of one decode step over batch sizes and context lengths, and of
//! steps that compute a whole prompt.
//!
//! Steps go straight to the runner, past scheduler and sampler's noise: the same step again
//! and again, at the same positions, beside the bytes that it must read and the operations that
//! it must do. `bench report` draws it under its roofline.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::figures::Spread;
use super::in_process::{headline, measured, model_facts, step_weights_bytes};
use super::record::{Kind, RecordArgs, Recorder};
use super::{EngineArgs, parse_count};
use crate::cli::open::{self, Loaded};
use crate::config::EngineConfig;
use crate::model::spec::{FeedForwardSpec, LinearSpec, MlpSpec, ModelSpec};
use crate::ops::kv_tensor::KvTensor;
use crate::request::SamplingParams;
use crate::runner::{MemoryPlan, ModelRunner, StepRunner};
use crate::scheduler::batch::{ScheduledBatch, ScheduledSequence, SequenceId};
use crate::tensor::DType;

/// Flags of `bench steps`.
#[derive(Clone, Debug, Args)]
pub struct StepsArgs {
    /// Engine flags.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Batch sizes, separated by commas; default: powers of two up to 128, as far as they fit
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = parse_count)]
    pub batch_sizes: Option<Vec<usize>>,
    /// Context length of these
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = parse_count)]
    pub batch_context_len: usize,
    /// Context lengths; default: powers of two from 128 to 16384, as far as they fit
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = parse_count)]
    pub context_lens: Option<Vec<usize>>,
    /// Batch size of these
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_count)]
    pub context_batch_size: usize,
    /// Lengths of prompts that are computed in one step each; none by default
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = parse_count)]
    pub prompt_lens: Vec<usize>,
    /// Readings of each step, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = parse_count)]
    pub num_iters: usize,
    /// Record flags.
    #[command(flatten)]
    pub record: RecordArgs,
}

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Sweep {
    /// The batch size.
    Batch,
    /// The context length.
    Context,
    /// The length of a prompt that is one step.
    Prompt,
}

/// One measured step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct StepRow {
    /// What is varied.
    pub sweep: Sweep,
    /// Sequences that each compute one token, or a prompt.
    pub batch_size: usize,
    /// Tokens that each of them sees, its own included.
    pub context_len: usize,
    /// The time of the step.
    pub step_ms: Spread,
    /// Computed tokens per second at the median.
    pub tokens_per_s: f64,
    /// Bytes of weights and of keys and values that the step must read.
    pub read_bytes: usize,
    /// Multiplications and additions of matrices and attention.
    pub flops: usize,
}

/// What [`StepRow`]s are kept in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StepFigures {
    /// In the order of measuring.
    pub rows: Vec<StepRow>,
}

/// Measures.
pub fn run(mut args: StepsArgs) -> anyhow::Result<()> {
    let mut config = args.engine.clone().resolve()?;
    make_room(&mut config, &args);
    let mut recorder = Recorder::begin(args.record.clone(), measured(&config))?;
    let Loaded { runner, spec, plan, backend } = open::open_runner(&config)?;
    let facts = model_facts(&config, &spec, &plan, &backend);
    println!("{}", headline(&facts));
    let cells = cells(&mut args, &plan)?;
    let mut bench = StepBench { runner, spec, plan };
    bench.fill_cache(&cells)?;
    println!(
        "{:>7} {:>8} {:>10} {:>10} {:>10}",
        "batch", "context", "p50 ms", "max ms", "tokens/s"
    );
    let mut rows = Vec::with_capacity(cells.len());
    for cell in cells {
        let row = bench.measure(cell, args.num_iters)?;
        let (Cell { batch_size, context_len, .. }, Spread { p50, max, .. }) = (cell, row.step_ms);
        println!(
            "{batch_size:>7} {context_len:>8} {p50:>10.2} {max:>10.2} {:>10.1}",
            row.tokens_per_s
        );
        rows.push(row);
    }
    recorder.end();
    let options = json!({
        "batch_context_len": args.batch_context_len,
        "context_batch_size": args.context_batch_size,
        "num_iters": args.num_iters,
    });
    recorder.write(Kind::Steps, facts, options, &StepFigures { rows })
}

/// A step may be as large as was asked for.
fn make_room(config: &mut EngineConfig, args: &StepsArgs) {
    let typed = args.batch_sizes.iter().flatten().copied().max().unwrap_or(1);
    let longest = args.prompt_lens.iter().copied().max().unwrap_or(1);
    let scheduler = &mut config.scheduler;
    scheduler.max_num_seqs = scheduler.max_num_seqs.max(typed).max(args.context_batch_size);
    let least = scheduler.max_num_seqs.max(config.cache.block_size).max(longest);
    scheduler.max_num_batched_tokens = scheduler.max_num_batched_tokens.max(least);
}

/// One step to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cell {
    sweep: Sweep,
    batch_size: usize,
    context_len: usize,
}

impl Cell {
    /// Tokens that each sequence computes.
    fn num_tokens(&self) -> usize {
        if self.sweep == Sweep::Prompt { self.context_len } else { 1 }
    }

    fn num_blocks(&self, block_size: usize) -> usize {
        self.batch_size * self.context_len.div_ceil(block_size)
    }

    fn fits(&self, plan: &MemoryPlan) -> bool {
        self.batch_size <= plan.limits.max_num_seqs
            && self.context_len <= plan.max_model_len
            && self.num_blocks(plan.block_size) <= plan.num_blocks
    }
}

/// All steps; typed ones must fit, the defaults are those that do.
fn cells(args: &mut StepsArgs, plan: &MemoryPlan) -> anyhow::Result<Vec<Cell>> {
    let (context_len, batch_size) = (args.batch_context_len, args.context_batch_size);
    let by_batch = |batch_size| Cell { sweep: Sweep::Batch, batch_size, context_len };
    let by_context = |context_len| Cell { sweep: Sweep::Context, batch_size, context_len };
    let powers = |range: std::ops::RangeInclusive<u32>| range.map(|power| 1usize << power);
    let mut cells = Vec::new();
    match args.batch_sizes.take() {
        Some(sizes) => cells.extend(sizes.into_iter().map(by_batch)),
        None => cells.extend(powers(0..=7).map(by_batch).filter(|cell| cell.fits(plan))),
    }
    match args.context_lens.take() {
        Some(lens) => cells.extend(lens.into_iter().map(by_context)),
        None => cells.extend(powers(7..=14).map(by_context).filter(|cell| cell.fits(plan))),
    }
    let by_prompt = |context_len| Cell { sweep: Sweep::Prompt, batch_size: 1, context_len };
    cells.extend(args.prompt_lens.iter().copied().map(by_prompt));
    for cell in &cells {
        anyhow::ensure!(
            cell.fits(plan),
            "a batch of {} at context {} needs {} KV blocks and a context of {}, but there are {} \
             blocks and the context holds {}; lower it, or raise --kv-cache-memory or \
             --max-model-len",
            cell.batch_size,
            cell.context_len,
            cell.num_blocks(plan.block_size),
            cell.context_len,
            plan.num_blocks,
            plan.max_model_len
        );
    }
    Ok(cells)
}

/// A runner, and what its steps must read and compute.
struct StepBench {
    runner: ModelRunner,
    spec: ModelSpec,
    plan: MemoryPlan,
}

impl StepBench {
    /// Computes one block and copies it into all others that will be read: pages that nobody
    /// wrote would all be one page of zeros, in the cache.
    fn fill_cache(&mut self, cells: &[Cell]) -> anyhow::Result<()> {
        let block_size = self.plan.block_size;
        let num_blocks = cells.iter().map(|cell| cell.num_blocks(block_size)).max().unwrap_or(1);
        let first_len = block_size.min(self.plan.max_model_len);
        self.execute(&self.batch(1, first_len, first_len))?;
        let mut batch = self.batch(1, 1, first_len);
        batch.copies = (1..num_blocks as u32).map(|block| (0, block)).collect();
        self.execute(&batch).map(drop)
    }

    fn measure(&mut self, cell: Cell, num_iters: usize) -> anyhow::Result<StepRow> {
        let Cell { sweep, batch_size, context_len } = cell;
        let num_tokens = cell.num_tokens();
        let batch = self.batch(batch_size, num_tokens, context_len);
        self.execute(&batch)?;
        let readings: anyhow::Result<Vec<f64>> =
            (0..num_iters).map(|_| self.execute(&batch)).collect();
        let step_ms = Spread::of(readings?).context("a step has readings")?;
        let cost = StepCost::of(&self.spec, self.plan.kv_dtype, context_len);
        let weights_bytes = step_weights_bytes(&self.spec, &self.plan, batch_size * num_tokens);
        let flops = match sweep {
            Sweep::Prompt => prompt_flops(&self.spec, self.plan.kv_dtype, context_len),
            Sweep::Batch | Sweep::Context => cost.flops,
        };
        Ok(StepRow {
            sweep,
            batch_size,
            context_len,
            step_ms,
            tokens_per_s: (batch_size * num_tokens) as f64 / step_ms.p50 * 1e3,
            read_bytes: weights_bytes + batch_size * cost.kv_bytes,
            flops: batch_size * flops,
        })
    }

    /// Computes a step; how long it took, in milliseconds.
    fn execute(&mut self, batch: &ScheduledBatch) -> anyhow::Result<f64> {
        let started = Instant::now();
        self.runner.execute(batch)?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    }

    fn batch(&self, num_seqs: usize, num_tokens: usize, context_len: usize) -> ScheduledBatch {
        let sizes = (self.plan.block_size, self.spec.vocab_size);
        uniform_batch(num_seqs, num_tokens, context_len, sizes)
    }
}

/// `num_seqs` sequences that each compute the last `num_tokens` of `context_len` tokens, in
/// blocks of their own.
pub fn uniform_batch(
    num_seqs: usize,
    num_tokens: usize,
    context_len: usize,
    (block_size, vocab_size): (usize, usize),
) -> ScheduledBatch {
    let params = Arc::new(SamplingParams::greedy());
    let blocks_per_seq = context_len.div_ceil(block_size);
    let sequence = |i: usize| ScheduledSequence {
        id: SequenceId(i as u64),
        tokens: i * num_tokens..(i + 1) * num_tokens,
        blocks: i * blocks_per_seq..(i + 1) * blocks_per_seq,
        start_position: (context_len - num_tokens) as u32,
        samples: true,
        scores: 0..0,
        params: Arc::clone(&params),
        seed: 0,
        seen: 0..0,
        banned: 0..0,
    };
    ScheduledBatch {
        sequences: (0..num_seqs).map(sequence).collect(),
        token_ids: (0..num_seqs * num_tokens).map(|i| (i * 7 % vocab_size) as u32).collect(),
        block_ids: (0..(num_seqs * blocks_per_seq) as u32).collect(),
        ..ScheduledBatch::default()
    }
}

/// What one token costs beside the reading of weights, which all tokens of a step share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCost {
    /// Bytes of keys and values that it reads.
    pub kv_bytes: usize,
    /// Multiplications and additions.
    pub flops: usize,
}

impl StepCost {
    /// Of a token that sees `context_len` tokens and needs logits.
    pub fn of(spec: &ModelSpec, kv_dtype: DType, context_len: usize) -> StepCost {
        let output = spec.lm_head.num_weights();
        let mut cost = StepCost { kv_bytes: 0, flops: 2 * output };
        for layer in &spec.layers {
            let attention = &layer.attention;
            let linears = attention.linears().into_iter();
            let weights = linears.map(LinearSpec::num_weights).sum::<usize>()
                + match &layer.feed_forward {
                    FeedForwardSpec::Mlp(mlp) => mlp.num_weights(),
                    FeedForwardSpec::Moe(moe) => {
                        let chosen = &moe.experts[..moe.experts_per_token];
                        let experts: usize = chosen.iter().map(MlpSpec::num_weights).sum();
                        let shared = moe.shared.as_ref().map_or(0, MlpSpec::num_weights);
                        moe.router.num_weights() + experts + shared
                    }
                };
            let seen = attention.sliding_window.map_or(context_len, |w| w.min(context_len));
            let products = attention.num_heads * (attention.head_dim + attention.value_dim());
            cost.flops += 2 * weights + 2 * seen * products;
            let vector_bytes = KvTensor::vector_bytes(kv_dtype, attention.head_dim);
            cost.kv_bytes += seen * attention.cached_vectors() * vector_bytes;
        }
        cost
    }
}

/// Multiplications and additions of a prompt of which the last token alone needs logits. Tokens see
/// half of the prompt on average.
pub fn prompt_flops(spec: &ModelSpec, kv_dtype: DType, len: usize) -> usize {
    let output = 2 * spec.lm_head.num_weights();
    len * (StepCost::of(spec, kv_dtype, len.div_ceil(2)).flops - output) + output
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 20,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
        "tie_word_embeddings": true, "hidden_act": "silu"
    }"#;

    #[test]
    fn a_token_costs_two_operations_per_weight_and_reads_its_context() {
        let spec = ModelSpec::from_config(CONFIG).unwrap();
        let cost = StepCost::of(&spec, DType::BF16, 100);
        // q and o are 8×8, k and v 4×8, three matrices of the MLP 10×8; the output is 20×8.
        let weights = 3 * (2 * 64 + 2 * 32 + 3 * 80) + 160;
        assert_eq!(cost.flops, 2 * weights + 3 * 4 * 100 * 8);
        assert_eq!(cost.kv_bytes, 3 * 2 * 100 * 4 * 2);
        let cost = StepCost::of(&spec, DType::I8, 100);
        assert_eq!(cost.kv_bytes, 3 * 2 * 100 * (4 + 4));
        // A prompt of 200 tokens, one of which needs logits.
        let prompt = 200 * (2 * (weights - 160) + 3 * 4 * 100 * 8) + 2 * 160;
        assert_eq!(prompt_flops(&spec, DType::BF16, 200), prompt);
    }

    #[test]
    fn a_token_costs_the_experts_that_compute_it() {
        let mut config: serde_json::Value = serde_json::from_str(CONFIG).unwrap();
        config["architectures"] = json!(["Qwen3MoeForCausalLM"]);
        config["num_experts"] = json!(5);
        config["num_experts_per_tok"] = json!(2);
        config["moe_intermediate_size"] = json!(6);
        config["mlp_only_layers"] = json!([1]);
        let spec = ModelSpec::from_config(&config.to_string()).unwrap();
        let cost = StepCost::of(&spec, DType::BF16, 100);
        // Two layers with a router of 5×8 and two experts of three matrices of 6×8.
        let weights = 3 * (2 * 64 + 2 * 32) + 3 * 80 + 2 * (40 + 2 * 3 * 48) + 160;
        assert_eq!(cost.flops, 2 * weights + 3 * 4 * 100 * 8);
    }

    #[test]
    fn a_cell_takes_whole_blocks() {
        let cell = Cell { sweep: Sweep::Batch, batch_size: 3, context_len: 17 };
        assert_eq!(cell.num_blocks(16), 6);
    }
}
