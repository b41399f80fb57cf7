//! What this machine can do, read next to what was measured on it.
//!
//! Neighbours move these limits by a factor of two, so a speed is stated as a fraction of a
//! limit read in the same run. `cargo bench --bench limits` reads them for every number of threads.

use std::hint::black_box;
use std::path::Path;
use std::sync::Barrier;
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ops::cpu::{Arithmetic, peak_arithmetic};
use crate::tensor::{DType, Tensor};

/// Most bytes that one thread reads per pass: more than any cache holds.
const READ_BYTES: usize = 256 << 20;
/// Most bytes that all threads read per pass.
const TOTAL_BYTES: usize = 4 << 30;
/// Fewest bytes per thread: still more than a thread's share of any cache.
const LEAST_BYTES: usize = 32 << 20;
/// A limit is the best of this many passes.
const PASSES: usize = 7;

/// [`Limit::limit`] of [`memory_read`].
pub const MEMORY_READ: &str = "memory read";
/// [`Limit::limit`] of how fast a GPU copies within its memory: bytes read and bytes written.
pub const MEMORY_COPY: &str = "memory copy";
/// [`Limit::unit`] of arithmetic.
pub const ARITHMETIC_UNIT: &str = "GFLOP/s";

/// One limit of this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// Threads that worked at once; none where a whole GPU did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// What they did.
    pub limit: String,
    /// Unit of `value`.
    pub unit: String,
    /// The best of several passes.
    pub value: f64,
    /// `before` or `after` the measurement; absent when read in another run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
}

/// Reads memory on all threads at once, each its own stretch.
pub fn memory_read(threads: usize) -> Limit {
    let bytes = (TOTAL_BYTES / threads).clamp(LEAST_BYTES, READ_BYTES);
    // Filled by their readers, so that every node of the machine holds its own; and not with
    // zero, because untouched zero pages would all be one page, in the cache. On large pages, as
    // weights are: where addresses are translated twice, in a virtual machine, small pages halve
    // what is read.
    let buffers: Vec<Tensor> = std::thread::scope(|scope| {
        let fill = |i: usize| scope.spawn(move || filled(bytes / size_of::<u32>(), i as u32 + 1));
        let handles: Vec<_> = (0..threads).map(fill).collect();
        handles.into_iter().map(|handle| handle.join().expect("filling does not panic")).collect()
    });
    let seconds = best_time(threads, |thread| {
        black_box(sum(buffers[thread].as_slice()));
    });
    Limit {
        threads: Some(threads),
        limit: MEMORY_READ.to_owned(),
        unit: "GB/s".to_owned(),
        value: (threads * bytes) as f64 / seconds / 1e9,
        when: None,
    }
}

/// Arithmetic on all threads at once, each in its registers; one limit per kind of instruction.
pub fn arithmetic(threads: usize) -> Vec<Limit> {
    let limit = |(name, operations, work): Arithmetic| Limit {
        threads: Some(threads),
        limit: name.to_owned(),
        unit: ARITHMETIC_UNIT.to_owned(),
        value: threads as f64 * operations / best_time(threads, |_| work()) / 1e9,
        when: None,
    };
    peak_arithmetic().into_iter().map(limit).collect()
}

/// What an instruction multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operands {
    Floats,
    Fp8,
    Bytes,
    FourBits,
}

impl Operands {
    /// Those of a limit of arithmetic, whose name begins with them.
    fn of_limit(limit: &str) -> Operands {
        let named = |name: &str| limit.starts_with(name);
        match () {
            () if named("int4") => Operands::FourBits,
            () if named("int8") => Operands::Bytes,
            () if named("fp8") => Operands::Fp8,
            () => Operands::Floats,
        }
    }

    /// What weights of a format are multiplied as: a GPU multiplies codes of four bits, and others
    /// whose activations keep their precision, as floats.
    fn of_format(format: &str, on_gpu: bool) -> &'static [Operands] {
        match (format, on_gpu) {
            ("int8", _) | ("q8_0", false) => &[Operands::Bytes],
            ("int4" | "int4-g64" | "int4-g128" | "q4_0" | "mxfp4", false) => {
                &[Operands::FourBits, Operands::Bytes]
            }
            ("fp8", true) => &[Operands::Fp8, Operands::Floats],
            _ => &[Operands::Floats],
        }
    }
}

/// The fastest arithmetic for weights of a format, a value of `--quantization` or `bf16`, in
/// operations per second; where a machine has none of its kind, that of floats. Of limits read in the
/// run that the record is of, if there are any.
pub fn peak(limits: &[Limit], format: &str, on_gpu: bool) -> Option<f64> {
    let fastest = |operands: &[Operands]| {
        let fits = |limit: &&Limit| {
            limit.unit == ARITHMETIC_UNIT && operands.contains(&Operands::of_limit(&limit.limit))
        };
        best(limits.iter().filter(fits))
    };
    fastest(Operands::of_format(format, on_gpu)).or_else(|| fastest(&[Operands::Floats]))
}

/// The largest of limits in their units times 10⁹, of those read in the run itself if there are any.
pub(super) fn best<'a>(limits: impl Iterator<Item = &'a Limit> + Clone) -> Option<f64> {
    let all = limits.clone();
    let value = |limit: &Limit| limit.value * 1e9;
    let read_now = limits.filter(|limit| limit.when.is_some()).map(value);
    read_now.max_by(f64::total_cmp).or_else(|| all.map(value).max_by(f64::total_cmp))
}

/// The best wall time of `work` running on all threads at once.
pub fn best_time(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let times_per_pass = |thread: usize| -> Vec<f64> {
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
            (0..threads).map(|thread| scope.spawn(move || times_per_pass(thread))).collect();
        handles.into_iter().map(|handle| handle.join().expect("a pass does not panic")).collect()
    });
    let slowest = |pass: usize| times.iter().map(|times| times[pass]).fold(0.0, f64::max);
    (0..PASSES).map(slowest).fold(f64::INFINITY, f64::min)
}

/// `len` words, all the same.
fn filled(len: usize, word: u32) -> Tensor {
    let mut buffer = Tensor::zeros_on_large_pages(DType::U32, [len]);
    buffer.as_mut_slice().fill(word);
    buffer
}

/// Many chains of additions: far faster than memory.
fn sum(words: &[u32]) -> u32 {
    let mut sums = [0u32; 64];
    for words in words.chunks_exact(64) {
        for (sum, &word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(word);
        }
    }
    sums.into_iter().fold(0, u32::wrapping_add)
}

/// The limits in a file: a record, or what `cargo bench --bench limits` printed.
pub(super) fn read_file(path: &Path) -> anyhow::Result<Vec<Limit>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("--limits-json {} cannot be read", path.display()))?;
    parse(&text).with_context(|| {
        format!(
            "--limits-json {} holds no `limits`; give it the output of \
             `cargo bench --bench limits` or a record of `tokenmill bench`",
            path.display()
        )
    })
}

fn parse(text: &str) -> Option<Vec<Limit>> {
    let limits = |text: &str| {
        let mut value: Value = serde_json::from_str(text).ok()?;
        let mut limits: Vec<Limit> =
            serde_json::from_value(value.get_mut("limits")?.take()).ok()?;
        limits.iter_mut().for_each(|limit| limit.when = None);
        Some(limits)
    };
    limits(text).or_else(|| text.lines().rev().find_map(limits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_found_in_a_record_and_after_a_table() {
        let row = r#"{"threads": 2, "limit": "bf16 AMX", "unit": "GFLOP/s", "value": 3.5}"#;
        let record = format!("{{\n\"benchmark\": \"steps\",\n\"limits\": [{row}]}}");
        let printed = format!("threads  limit\n      2  bf16 AMX\n{{\"limits\": [{row}]}}\n");
        for text in [record, printed] {
            let limits = parse(&text).unwrap();
            assert_eq!((limits.len(), limits[0].threads, limits[0].value), (1, Some(2), 3.5));
        }
        assert_eq!(parse("threads  limit\n"), None);
    }

    #[test]
    fn weights_are_held_to_what_multiplies_their_format() {
        let limits = |names: &[(&str, f64)]| -> Vec<Limit> {
            let limit = |&(name, value): &(&str, f64)| Limit {
                threads: None,
                limit: name.to_owned(),
                unit: ARITHMETIC_UNIT.to_owned(),
                value,
                when: None,
            };
            names.iter().map(limit).collect()
        };
        let avx2 = limits(&[("f32 FMA, AVX2", 1.0), ("int8, AVX2", 2.0), ("int4, AVX2", 4.0)]);
        let giga = |limits: &[Limit], format, on_gpu| peak(limits, format, on_gpu).map(|x| x / 1e9);
        for (format, expected) in [
            ("bf16", 1.0),
            ("w8a16", 1.0),
            ("fp8", 1.0),
            ("int8", 2.0),
            ("q8_0", 2.0),
            ("mxfp4", 4.0),
        ] {
            assert_eq!(giga(&avx2, format, false), Some(expected), "{format}");
        }
        let amx = limits(&[("bf16 AMX", 8.0), ("int8 AMX", 16.0), ("int4, AVX2", 4.0)]);
        assert_eq!(giga(&amx, "int4", false), Some(16.0), "four bits are multiplied as bytes");
        let gpu = limits(&[("bf16 matmul", 8.0), ("fp8 matmul", 16.0), ("int8 matmul", 15.0)]);
        for (format, expected) in [("bf16", 8.0), ("int4", 8.0), ("fp8", 16.0), ("int8", 15.0)] {
            assert_eq!(giga(&gpu, format, true), Some(expected), "{format}");
        }
        assert_eq!(giga(&gpu[..1], "int8", true), Some(8.0), "floats, where there is nothing else");
        assert_eq!(peak(&[], "bf16", false), None);
    }

    #[test]
    fn every_thread_takes_part_in_every_pass() {
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let seconds = best_time(3, |_| {
            calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 3 * PASSES);
        assert!(seconds.is_finite());
    }
}
