//! The program: flags in, work done, errors said once with their causes.

use std::process::ExitCode;

use clap::Parser;
use tokenmill::cli::{self, Cli};

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
