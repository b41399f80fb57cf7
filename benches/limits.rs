//! What this machine can do: memory read bandwidth and peak arithmetic, per number of threads.
//!
//! Run it next to the other benches, in the same minutes: neighbours move these limits by a
//! factor of two, so a speed is stated as a fraction of a limit read at the same time.
//! Prints a table for people and one line of JSON for scripts.

#[cfg(target_arch = "x86_64")]
#[path = "limits/x86.rs"]
mod x86;

use serde_json::json;
use tokenmill::cli::bench::limits::{Limit, best_time, memory_read};
use tokenmill::ops::cpu::physical_cores;

fn main() {
    let limits: Vec<Limit> = (1..=physical_cores()).flat_map(limits).collect();
    println!("{:>7}  {:<16} {:>9}", "threads", "limit", "best");
    for Limit { threads, limit, value, unit, .. } in &limits {
        println!("{threads:>7}  {limit:<16} {value:>9.1} {unit}");
    }
    println!("{}", json!({ "limits": limits }));
}

/// Every limit of this many threads.
fn limits(threads: usize) -> Vec<Limit> {
    let arithmetic = arithmetic().into_iter().map(|(name, flops, work)| {
        let seconds = best_time(threads, |_| work());
        Limit {
            threads,
            limit: name.to_owned(),
            unit: "GFLOP/s".to_owned(),
            value: threads as f64 * flops / seconds / 1e9,
            when: None,
        }
    });
    std::iter::once(memory_read(threads)).chain(arithmetic).collect()
}

/// Name, operations per call, and the call.
type Arithmetic = (&'static str, f64, fn());

#[cfg(target_arch = "x86_64")]
fn arithmetic() -> Vec<Arithmetic> {
    x86::arithmetic()
}

#[cfg(not(target_arch = "x86_64"))]
fn arithmetic() -> Vec<Arithmetic> {
    Vec::new()
}
