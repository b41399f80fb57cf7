//! `tokenmill bench latency`: one batch of requests after another, nothing beside it.

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::figures::{BatchFigures, Spread, median, ms, print_spreads};
use super::in_process::{InProcess, measured};
use super::load::{Pace, RequestTrace};
use super::record::{Kind, RecordArgs, Recorder};
use super::workload::token_ids;
use super::{EngineArgs, parse_count};

/// Flags of `bench latency`.
#[derive(Clone, Debug, Args)]
pub struct LatencyArgs {
    /// Engine flags.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = parse_count)]
    pub input_len: usize,
    /// Tokens that each request generates; end tokens are ignored
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = parse_count)]
    pub output_len: usize,
    /// Requests that are sent together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_count)]
    pub batch_size: usize,
    /// Batches that count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = parse_count)]
    pub num_iters: usize,
    /// Batches before them that do not
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_iters_warmup: usize,
    /// Record flags.
    #[command(flatten)]
    pub record: RecordArgs,
}

/// What the batches came to.
#[derive(Debug, Serialize)]
struct LatencyFigures {
    total_input_tokens: usize,
    total_cached_tokens: usize,
    total_output_tokens: usize,
    /// From the first request of a batch to its last token.
    latency_ms: Option<Spread>,
    ttft_ms: Option<Spread>,
    itl_ms: Option<Spread>,
    /// Medians over the batches.
    prefill_tokens_per_s: Option<f64>,
    /// Multiplications and additions of prompts per second, in the fastest batch.
    most_prefill_tflops: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    decode_steps_per_s: Option<f64>,
    /// Weights read per second by decode steps, of the memory bandwidth: read in the same run, of a
    /// GPU what it copies.
    weights_read_fraction: Option<f64>,
    iterations: Vec<BatchFigures>,
}

/// Measures.
pub fn run(args: LatencyArgs) -> anyhow::Result<()> {
    let LatencyArgs { engine, input_len, output_len, batch_size, .. } = args;
    let seed = engine.model.seed.unwrap_or(0);
    let mut config = engine.resolve()?;
    let limit = config.scheduler.max_num_seqs;
    anyhow::ensure!(
        batch_size <= limit,
        "--batch-size is {batch_size}, but --max-num-seqs lets {limit} run at once; raise it"
    );
    config.scheduler.max_num_queued_requests = batch_size;
    let mut recorder = Recorder::begin(args.record, measured(&config))?;
    let engine = InProcess::open(&config, input_len + output_len)?;
    let mut batches = Vec::with_capacity(args.num_iters);
    for batch in 0..args.num_iters_warmup + args.num_iters {
        let first = (batch * batch_size) as u64;
        let prompt = |i: u64| token_ids(first + i, seed, input_len, engine.vocab_size());
        let prompts = (0..batch_size as u64).map(prompt).collect();
        let traces = engine.generate(prompts, output_len, Pace::default()).all()?;
        if batch >= args.num_iters_warmup {
            batches.push(traces);
        }
    }
    recorder.end();
    let weights_bytes = engine.step_weights_bytes(batch_size) as f64;
    let flops = engine.prompt_flops(input_len) as f64 / input_len as f64;
    let figures = figures(&batches, (weights_bytes, flops), recorder.bandwidth());
    figures.print();
    let options = json!({
        "input_len": input_len, "output_len": output_len, "batch_size": batch_size,
        "num_iters": args.num_iters, "num_iters_warmup": args.num_iters_warmup, "seed": seed,
    });
    recorder.write(Kind::Latency, engine.close(), options, &figures)
}

fn figures(
    batches: &[Vec<RequestTrace>],
    (weights_bytes, token_flops): (f64, f64),
    bandwidth: Option<f64>,
) -> LatencyFigures {
    let traces = || batches.iter().flatten();
    let iterations: Vec<BatchFigures> =
        batches.iter().filter_map(|traces| BatchFigures::of(traces)).collect();
    let medians = |figure: fn(&BatchFigures) -> Option<f64>| {
        median(iterations.iter().filter_map(figure).collect())
    };
    let decode_steps_per_s = medians(|batch| batch.decode_steps_per_s);
    let most_prefill = iterations.iter().map(|batch| batch.prefill_tokens_per_s);
    let most_prefill = most_prefill.max_by(f64::total_cmp);
    LatencyFigures {
        total_input_tokens: traces().map(|trace| trace.num_input_tokens).sum(),
        total_cached_tokens: traces().map(|trace| trace.num_cached_tokens).sum(),
        total_output_tokens: traces().map(|trace| trace.num_output_tokens).sum(),
        latency_ms: Spread::of(iterations.iter().map(|batch| batch.latency_s * 1e3).collect()),
        ttft_ms: Spread::of(
            traces().filter_map(RequestTrace::time_to_first_token).map(ms).collect(),
        ),
        itl_ms: Spread::of(traces().flat_map(RequestTrace::gaps).map(ms).collect()),
        prefill_tokens_per_s: medians(|batch| Some(batch.prefill_tokens_per_s)),
        most_prefill_tflops: most_prefill.map(|tokens| tokens * token_flops / 1e12),
        decode_tokens_per_s: medians(|batch| batch.decode_tokens_per_s),
        decode_steps_per_s,
        weights_read_fraction: decode_steps_per_s
            .zip(bandwidth)
            .map(|(steps, bandwidth)| weights_bytes * steps / bandwidth),
        iterations,
    }
}

impl LatencyFigures {
    fn print(&self) {
        print_spreads(&[
            ("batch", self.latency_ms),
            ("time to first token", self.ttft_ms),
            ("inter-token latency", self.itl_ms),
        ]);
        if let Some(prefill) = self.prefill_tokens_per_s {
            println!("prefill: {prefill:.1} tokens/s");
        }
        if let Some(tflops) = self.most_prefill_tflops {
            println!("arithmetic of the fastest prefill: {tflops:.2} TFLOP/s");
        }
        if let Some((tokens, steps)) = self.decode_tokens_per_s.zip(self.decode_steps_per_s) {
            println!("decode:  {tokens:.1} tokens/s in {steps:.1} steps/s");
        }
        if let Some(fraction) = self.weights_read_fraction {
            println!("weights read by decode steps: {:.0} % of memory bandwidth", fraction * 100.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_fraction_is_weights_times_steps_over_bandwidth() {
        let base = Instant::now();
        let arrivals: Vec<Instant> =
            (1..=5).map(|i| base + Duration::from_millis(100 * i)).collect();
        let trace = RequestTrace {
            sent: base,
            ended: arrivals[4],
            arrivals,
            num_input_tokens: 10,
            num_cached_tokens: 0,
            num_output_tokens: 5,
        };
        let figures = figures(&[vec![trace.clone()], vec![trace]], (1e9, 3e9), Some(20e9));
        assert!((figures.decode_steps_per_s.unwrap() - 10.0).abs() < 1e-6);
        assert!((figures.weights_read_fraction.unwrap() - 0.5).abs() < 1e-6);
        assert!((figures.prefill_tokens_per_s.unwrap() - 100.0).abs() < 1e-6);
        assert!((figures.most_prefill_tflops.unwrap() - 0.3).abs() < 1e-9);
        assert_eq!((figures.total_input_tokens, figures.total_output_tokens), (20, 10));
    }
}
