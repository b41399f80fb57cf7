//! The command line: one file per command.
//!
//! Flags are parsed into `config` types, resolved once, and handed down. Composition of the
//! layers into a running engine is in [`open`].

pub mod bench;
pub mod chat;
pub mod doctor;
pub mod open;
pub mod serve;

use clap::{Parser, Subcommand};

use crate::config::ServeArgs;

const AFTER_HELP: &str = "\
Examples:
  tokenmill                              serve the bundled model on http://127.0.0.1:8000
  tokenmill serve ./my-model --port 9000 serve a folder with config.json and safetensors
  tokenmill serve owner/name             download from the hub, then serve
  tokenmill chat                         talk to the bundled model in this terminal
  tokenmill doctor --verify              what this machine has, and whether it computes right
  tokenmill bench latency ./my-model     measure it, here and now

Environment:
  HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE   where and how models are downloaded
  TOKENMILL_API_KEY                                keys, separated by commas
  RUST_LOG                                         log filter, for example tokenmill=debug";

/// Serves large language models, fast, to anyone who speaks the OpenAI API.
#[derive(Debug, Parser)]
#[command(
    name = "tokenmill",
    version,
    after_help = AFTER_HELP,
    args_conflicts_with_subcommands = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do; `serve` when left out.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Flags of `serve`, which may be given without naming the command.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over the OpenAI API (the default)
    Serve(Box<ServeArgs>),
    /// Talk to a model in this terminal
    Chat(Box<chat::ChatArgs>),
    /// Report devices, drivers and limits of this machine, and whether it computes right
    Doctor(doctor::DoctorArgs),
    /// Measure latency and throughput, of this engine or of any server
    Bench(bench::BenchArgs),
}

/// Runs what was asked for.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        None => serve::run(cli.serve),
        Some(Command::Serve(args)) => serve::run(*args),
        Some(Command::Chat(args)) => chat::run(*args),
        Some(Command::Doctor(args)) => doctor::run(args),
        Some(Command::Bench(args)) => bench::run(args),
    }
}

/// Flags that nobody typed, for commands that need a part of `serve`.
fn default_args<A: clap::Args>() -> A {
    let command = A::augment_args(clap::Command::new("tokenmill"));
    A::from_arg_matches(&command.get_matches_from(["tokenmill"])).expect("every flag has a default")
}
