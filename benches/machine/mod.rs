//! What the benches of this folder compute on, and what it could do in the same minute.
//!
//! `TOKENMILL_BENCH_THREADS` sets the number of threads, and `TOKENMILL_BENCH_ISA` the vector
//! instructions, a value of `--cpu-isa`; without them all cores and the best instructions are used.

use clap::ValueEnum;
use tokenmill::cli::bench::limits::{Limit, arithmetic, memory_read, peak};
use tokenmill::config::{CpuIsa, DeviceConfig};
use tokenmill::ops::cpu::physical_cores;

/// The device that the environment asks for.
pub fn device() -> DeviceConfig {
    let variable = |name| std::env::var(name).ok();
    let threads = variable("TOKENMILL_BENCH_THREADS");
    let threads = threads.map(|text| text.parse().expect("TOKENMILL_BENCH_THREADS is a number"));
    let isa = variable("TOKENMILL_BENCH_ISA").map_or(CpuIsa::Auto, |text| {
        CpuIsa::from_str(&text, true).expect("TOKENMILL_BENCH_ISA is a value of --cpu-isa")
    });
    DeviceConfig { cpu_isa: isa, ..DeviceConfig::cpu(threads) }
}

/// What bounds an operation, read when a bench starts. Of arithmetic, the best instructions of the
/// machine, also where the bench is made to use others.
pub struct Limits {
    memory_gb_s: f64,
    arithmetic: Vec<Limit>,
}

impl Limits {
    /// Reads and prints them.
    pub fn read(device: &DeviceConfig) -> Limits {
        let threads = device.threads.unwrap_or_else(physical_cores);
        let limits =
            Limits { memory_gb_s: memory_read(threads).value, arithmetic: arithmetic(threads) };
        println!("{threads} threads read {:.1} GB/s", limits.memory_gb_s);
        for Limit { limit, value, unit, .. } in &limits.arithmetic {
            println!("{limit}: {value:.0} {unit}");
        }
        limits
    }

    /// Seconds that memory and arithmetic need at least, with weights of a format.
    pub fn seconds(&self, format: &str, bytes: usize, flops: usize) -> f64 {
        let computing =
            peak(&self.arithmetic, format, false).map_or(0.0, |peak| flops as f64 / peak);
        computing.max(bytes as f64 / self.memory_gb_s / 1e9)
    }
}
