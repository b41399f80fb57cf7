//! The real driver code, executed: `ops::cuda::driver` on a libcuda of our own.
//!
//! `libcuda.cc` is built like the kernels of the SIMT machine and found by the system's loader
//! through `LD_LIBRARY_PATH`. So every server here is a process of its own: this test binary, run
//! again for [`serves_what_the_environment_says`] alone. It needs no nvcc, because the stub takes
//! any image for kernels and finds the machine's by their names.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[allow(dead_code, reason = "this binary sends plain requests only")]
#[path = "../wire/support/client.rs"]
mod client;
mod faults;
mod memory;
mod served;
#[path = "../support/shim/mod.rs"]
mod shim;
mod stub;

use std::process::exit;
use std::time::Duration;

use clap::Parser;
use tokenmill::cli::{Cli, serve};

/// Nothing here should take longer, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the other tests run in processes of their own.
#[test]
#[ignore = "needs the environment that the other tests give it"]
fn serves_what_the_environment_says() {
    let Ok(flags) = std::env::var(stub::FLAGS_VARIABLE) else { return };
    let flags = ["tokenmill"].into_iter().chain(flags.split_whitespace());
    // As `main` does, with images for the stub in place of the binary's own.
    if let Err(error) = serve::run_with(Cli::parse_from(flags).serve, stub::images()) {
        eprintln!("error: {error:#}");
        exit(1);
    }
}
