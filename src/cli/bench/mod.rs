//! `tokenmill bench`: whole-engine figures, each beside the limits read in the same run.
//!
//! | file | what |
//! |---|---|
//! | `latency`, `throughput` | the engine in this process, without HTTP |
//! | `serve` | the load generator, against any server that speaks the OpenAI API |
//! | `steps` | single forward passes over a range of batches and contexts |
//! | `kernels` | single operations of a device beside its ceilings |
//! | `report` | records to a table and plots |
//! | `keep` | what a script measured, as a record |
//! | `workload`, `load`, `figures` | prompts, how they are sent, what is computed from the answers |
//! | `limits`, `record` | what the machine can do; the JSON that a run leaves |
//! | `client` | HTTP/1.1 and SSE for `serve` |
//!
//! Prompts are random token ids, different in every run of a seed's sequence, so that no cache
//! helps unless a shared prefix is asked for.

mod client;
mod figures;
mod in_process;
pub mod keep;
pub mod kernels;
pub mod latency;
pub mod limits;
mod load;
pub mod record;
pub mod report;
pub mod serve;
pub mod steps;
pub mod throughput;
pub mod workload;

use clap::{Args, Subcommand};

use crate::config::{
    CacheArgs, ConfigError, EngineConfig, ModelArgs, SchedulerArgs, ServeArgs, ServerArgs,
};

/// Flags of `bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub benchmark: Benchmark,
}

/// The benchmarks.
#[derive(Clone, Debug, Subcommand)]
pub enum Benchmark {
    /// One batch of requests after another: time to first token, time between tokens
    Latency(Box<latency::LatencyArgs>),
    /// Many requests at once: tokens per second
    Throughput(Box<throughput::ThroughputArgs>),
    /// Many requests over HTTP, to this or any other OpenAI-compatible server
    Serve(Box<serve::ServeBenchArgs>),
    /// Single decode steps over a range of batch sizes and context lengths
    Steps(Box<steps::StepsArgs>),
    /// Single operations of a device, beside how fast it copies and multiplies
    Kernels(Box<kernels::KernelsArgs>),
    /// Keep what a script measured as a record of this machine
    Record(keep::KeepArgs),
    /// A Markdown table and SVG plots from the records of the other commands
    Report(report::ReportArgs),
}

/// Runs one benchmark.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    crate::telemetry::init_logging(false);
    match args.benchmark {
        Benchmark::Latency(args) => latency::run(*args),
        Benchmark::Throughput(args) => throughput::run(*args),
        Benchmark::Serve(args) => serve::run(&args),
        Benchmark::Steps(args) => steps::run(*args),
        Benchmark::Kernels(args) => kernels::run(&args),
        Benchmark::Record(args) => keep::run(args),
        Benchmark::Report(args) => report::run(&args),
    }
}

/// The flags of `serve` that concern the engine.
#[derive(Clone, Debug, Args)]
pub struct EngineArgs {
    /// Model flags.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Cache and device flags.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Scheduler flags.
    #[command(flatten)]
    pub scheduler: SchedulerArgs,
}

impl EngineArgs {
    /// The configuration that `serve` would make of these flags.
    fn resolve(self) -> Result<EngineConfig, ConfigError> {
        let EngineArgs { model, cache, scheduler } = self;
        let server: ServerArgs = super::default_args();
        EngineConfig::resolve(ServeArgs { model, cache, scheduler, server })
    }
}

/// Parses a count that must not be zero.
fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count >= 1 => Ok(count),
        _ => Err("a whole number of at least 1 is needed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_start_at_one() {
        assert_eq!(parse_count("16"), Ok(16));
        assert!(parse_count("0").is_err());
        assert!(parse_count("-3").is_err());
    }
}
