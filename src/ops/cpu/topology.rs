//! How many physical cores this process may use.

use std::collections::BTreeSet;

/// Physical cores of this process's affinity mask, hyper-threads counted once, and no more
/// than its CPU quota allows.
pub fn physical_cores() -> usize {
    let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cores: BTreeSet<String> = allowed_cpus().into_iter().map(siblings).collect();
    if cores.is_empty() { available } else { cores.len().min(available) }
}

/// The logical CPUs that share a core with `cpu`, as the kernel writes them; `cpu` alone where
/// the kernel does not say.
fn siblings(cpu: usize) -> String {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    std::fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string())
}

/// The affinity mask as `/proc` tells it; empty where there is none.
fn allowed_cpus() -> Vec<usize> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    parse_cpu_list(list.unwrap_or_default())
}

/// Parses `0-3,8`; what is no number is left out.
fn parse_cpu_list(list: &str) -> Vec<usize> {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
    });
    ranges.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_ranges_and_single_numbers() {
        assert_eq!(parse_cpu_list("\t0-2,5,7-7\n"), [0, 1, 2, 5, 7]);
        assert!(parse_cpu_list("").is_empty());
    }

    #[test]
    fn there_is_a_core_and_never_more_than_available() {
        let available = std::thread::available_parallelism().unwrap().get();
        assert!((1..=available).contains(&physical_cores()));
    }
}
