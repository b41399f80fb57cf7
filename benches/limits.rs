//! What this machine can do: memory read bandwidth and peak arithmetic, per number of threads.
//!
//! Run it next to the other benches, in the same minutes: neighbours move these limits by a
//! factor of two, so a speed is stated as a fraction of a limit read at the same time.
//! Prints a table for people and one line of JSON for scripts.

#[cfg(target_arch = "x86_64")]
#[path = "limits/x86.rs"]
mod x86;

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use serde_json::json;
use tokenmill::ops::cpu::physical_cores;

/// Bytes that one thread reads per pass: more than any cache holds.
const READ_BYTES: usize = 256 << 20;
/// A limit is the best of this many passes.
const PASSES: usize = 7;

fn main() {
    let mut rows = Vec::new();
    for threads in 1..=physical_cores() {
        // Not zero: untouched zero pages would all be one page, in the cache.
        let buffers: Vec<Vec<u64>> =
            (1..=threads).map(|i| vec![i as u64; READ_BYTES / 8]).collect();
        let seconds = best_time(threads, |thread| {
            black_box(sum(&buffers[thread]));
        });
        rows.push((threads, "memory read", "GB/s", (threads * READ_BYTES) as f64 / seconds / 1e9));
        for (name, flops, work) in arithmetic() {
            let seconds = best_time(threads, |_| work());
            rows.push((threads, name, "GFLOP/s", threads as f64 * flops / seconds / 1e9));
        }
    }
    println!("{:>7}  {:<16} {:>9}", "threads", "limit", "best");
    for (threads, name, unit, value) in &rows {
        println!("{threads:>7}  {name:<16} {value:>9.1} {unit}");
    }
    let limits: Vec<_> = rows
        .iter()
        .map(|(threads, name, unit, value)| {
            json!({ "threads": threads, "limit": name, "unit": unit, "value": value })
        })
        .collect();
    println!("{}", json!({ "limits": limits }));
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

/// The best wall time of `work` running on all threads at once.
fn best_time(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let slowest_per_pass = |thread: usize| -> Vec<f64> {
        let pass = || {
            barrier.wait();
            let start = Instant::now();
            work(thread);
            start.elapsed().as_secs_f64()
        };
        (0..PASSES).map(|_| pass()).collect()
    };
    let times: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let handles: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || slowest_per_pass(thread))).collect();
        handles.into_iter().map(|handle| handle.join().expect("a pass does not panic")).collect()
    });
    let slowest = |pass: usize| times.iter().map(|times| times[pass]).fold(0.0, f64::max);
    (0..PASSES).map(slowest).fold(f64::INFINITY, f64::min)
}

/// Eight chains of additions: far faster than memory.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for words in words.chunks_exact(32) {
        for (sum, &word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(word);
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}
