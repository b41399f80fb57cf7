//! What this machine can do: memory read bandwidth and peak arithmetic, per number of threads.
//!
//! Run it next to the other benches, in the same minutes: neighbours move these limits by a
//! factor of two, so a speed is stated as a fraction of a limit read at the same time.
//! Prints a table for people and one line of JSON for scripts.

use serde_json::json;
use tokenmill::cli::bench::limits::{Limit, arithmetic, memory_read};
use tokenmill::ops::cpu::physical_cores;

fn main() {
    let limits: Vec<Limit> = (1..=physical_cores()).flat_map(limits).collect();
    println!("{:>7}  {:<16} {:>9}", "threads", "limit", "best");
    for Limit { threads, limit, value, unit, .. } in &limits {
        let threads = threads.unwrap_or_default();
        println!("{threads:>7}  {limit:<16} {value:>9.1} {unit}");
    }
    println!("{}", json!({ "limits": limits }));
}

/// Every limit of this many threads.
fn limits(threads: usize) -> Vec<Limit> {
    std::iter::once(memory_read(threads)).chain(arithmetic(threads)).collect()
}
