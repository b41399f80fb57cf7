//! `tokenmill bench throughput`: many requests through the engine in this process.

use clap::Args;
use serde_json::json;

use super::EngineArgs;
use super::figures::LoadFigures;
use super::in_process::{InProcess, measured};
use super::load::{Outcome, Pace};
use super::record::{Kind, RecordArgs, Recorder};
use super::workload::WorkloadArgs;

/// Flags of `bench throughput`.
#[derive(Clone, Debug, Args)]
pub struct ThroughputArgs {
    /// Engine flags.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Load flags.
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// Record flags.
    #[command(flatten)]
    pub record: RecordArgs,
}

/// Measures.
pub fn run(args: ThroughputArgs) -> anyhow::Result<()> {
    let ThroughputArgs { engine, workload, record } = args;
    let seed = engine.model.seed.unwrap_or(0);
    let mut config = engine.resolve()?;
    // All requests may wait: a refusal would say nothing about throughput.
    config.scheduler.max_num_queued_requests =
        workload.num_prompts.max(workload.num_warmups).max(1);
    let mut recorder = Recorder::begin(record, measured(&config))?;
    let engine = InProcess::open(&config, workload.request_len())?;
    let vocab_size = engine.vocab_size();
    let warmup = workload.warmup_prompts(vocab_size, seed);
    engine.generate(warmup, workload.output_len, Pace::default()).all()?;
    let prompts = workload.prompts(vocab_size, seed);
    let outcome = engine.generate(prompts, workload.output_len, Pace::of(&workload, seed));
    recorder.end();
    let figures = LoadFigures::of(&outcome);
    figures.print();
    recorder.write(Kind::Throughput, engine.close(), options(&workload, seed), &figures)?;
    refuse_failures(outcome)
}

/// The load as a record notes it.
pub(super) fn options(workload: &WorkloadArgs, seed: u64) -> serde_json::Value {
    json!({
        "num_prompts": workload.num_prompts,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "prefix_len": workload.prefix_len,
        "prefix_seed": workload.prefix_seed.unwrap_or(seed),
        "max_concurrency": workload.max_concurrency,
        "request_rate": workload.request_rate,
        "num_warmups": workload.num_warmups,
        "seed": seed,
    })
}

/// Figures of a load that partly failed describe another load, so the command fails too.
pub(super) fn refuse_failures(outcome: Outcome) -> anyhow::Result<()> {
    let (failed, completed) = (outcome.failures.len(), outcome.traces.len());
    match outcome.failures.into_iter().next() {
        None => Ok(()),
        Some(error) => {
            let all = failed + completed;
            Err(error.context(format!("{failed} of {all} requests failed; the first one")))
        }
    }
}
