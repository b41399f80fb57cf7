//! `tokenmill bench record`: what a script measured becomes a record, with this machine and the date,
//! so that `bench report` reads one kind of file.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::record::{Kind, Measured, RecordArgs, Recorder};
use super::report::checks::{GoldenScores, Starts};
use super::report::kernels::TorchFigures;

/// What a script may have measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scripted {
    /// `scripts/golden.py --json`: scores by weight format
    Golden,
    /// PyTorch's times of operations of `bench kernels`, under their names
    Torch,
    /// Milliseconds until a server was ready, and until it had sent a token
    Start,
}

/// Flags of `bench record`.
#[derive(Clone, Debug, Args)]
pub struct KeepArgs {
    /// What was measured
    #[arg(value_enum)]
    pub kind: Scripted,
    /// The script's JSON
    pub results: PathBuf,
    /// Record flags.
    #[command(flatten)]
    pub record: RecordArgs,
}

/// Refuses what a report could not read, then writes the record.
pub fn run(args: KeepArgs) -> anyhow::Result<()> {
    let KeepArgs { kind, results: path, record } = args;
    let recorder = Recorder::begin(record, Measured::Elsewhere)?;
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    let (kind, checked) = match kind {
        Scripted::Golden => (Kind::Golden, serde_json::from_str::<GoldenScores>(&text).map(drop)),
        Scripted::Torch => (Kind::Torch, serde_json::from_str::<TorchFigures>(&text).map(drop)),
        Scripted::Start => (Kind::Start, serde_json::from_str::<Starts>(&text).map(drop)),
    };
    let results = checked.and_then(|()| serde_json::from_str::<Value>(&text));
    let results = results.with_context(|| format!("{} holds no such results", path.display()))?;
    recorder.write(kind, json!({}), json!({}), &results)
}
