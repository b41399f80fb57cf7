//! Which cores this process may use, and where its compute threads stay.
//!
//! The calling thread is never pinned: it belongs to whoever calls, and what it starts would
//! inherit its place. That makes a strict pin of workers wrong, because the caller may be woken
//! on a worker's core (the server's own threads run beside it), and the worker would wait there
//! while another core is idle. So one core is nobody's: a worker may run on its own core and on
//! that one. On two cores this is everything there is, and nothing is pinned.
//!
//! Fewer threads than cores mean that others use the rest, and nobody knows which: two servers
//! of eight threads on sixteen cores must not both sit on the first eight. Workers then stay in
//! their memory node only, and on a machine of one node they go where the system puts them.

use std::io;
use std::path::Path;

/// Where Linux describes the machine.
const SYSTEM: &str = "/sys/devices/system";

/// Logical CPUs on which a thread may run.
pub type Place = Vec<usize>;

/// Physical cores of this process's affinity mask, hyper-threads counted once, and no more
/// than its CPU quota allows.
pub fn physical_cores() -> usize {
    let cores = read_cores(Path::new(SYSTEM), &allowed_cpus());
    if cores.is_empty() { available() } else { cores.len().min(available()) }
}

/// Where each worker of `threads` threads, the calling one not counted, stays; empty where the
/// system decides.
pub fn worker_places(threads: usize) -> Vec<Place> {
    let cores = read_cores(Path::new(SYSTEM), &allowed_cpus());
    places(cores, available(), threads, current_cpu())
}

/// Bytes of results that the caches keep until the next operation reads them: a sixteenth of the
/// third-level cache, because other cores, and perhaps other machines on the same host, use it too.
pub fn kept_bytes() -> usize {
    let cpu = allowed_cpus().first().copied().unwrap_or(0);
    kept_of(third_level_bytes(Path::new(SYSTEM), cpu))
}

/// Of a third-level cache of so many bytes; without one, half of a usual second-level cache.
fn kept_of(third_level: Option<usize>) -> usize {
    const LEAST: usize = 1 << 20;
    third_level.map_or(LEAST, |bytes| (bytes / 16).max(LEAST))
}

/// Bytes of the third-level cache beside a CPU, as Linux says it: `491520K`.
fn third_level_bytes(system: &Path, cpu: usize) -> Option<usize> {
    let size = std::fs::read_to_string(system.join(format!("cpu/cpu{cpu}/cache/index3/size")));
    let size = size.ok()?;
    let size = size.trim();
    let kibibytes = size.strip_suffix('K').map(|number| (number, 1 << 10));
    let (number, unit) = kibibytes.or_else(|| Some((size.strip_suffix('M')?, 1 << 20)))?;
    Some(number.parse::<usize>().ok()? * unit)
}

/// Keeps the calling thread on these CPUs.
#[cfg(target_os = "linux")]
pub fn keep_to(place: &[usize]) -> io::Result<()> {
    const BITS: usize = u64::BITS as usize;
    let words = place.iter().max().map_or(0, |last| last / BITS + 1);
    let mut mask = vec![0_u64; words];
    for cpu in place {
        mask[cpu / BITS] |= 1 << (cpu % BITS);
    }
    // SAFETY: the system reads as many bytes as the mask has.
    let status =
        unsafe { libc::sched_setaffinity(0, size_of_val(mask.as_slice()), mask.as_ptr().cast()) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Elsewhere threads are not kept anywhere.
#[cfg(not(target_os = "linux"))]
pub fn keep_to(_: &[usize]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// A physical core, as far as the affinity mask includes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Core {
    /// Its hyper-threads.
    cpus: Vec<usize>,
    /// The memory node it is near.
    node: usize,
}

/// [`worker_places`] on given cores, of which a quota leaves `available`; `here` is the CPU of
/// the calling thread.
fn places(
    mut cores: Vec<Core>,
    available: usize,
    threads: usize,
    here: Option<usize>,
) -> Vec<Place> {
    let num_cores = cores.len();
    if threads > num_cores || available < num_cores {
        return Vec::new();
    }
    // Memory that the calling thread has touched lies in its node: that one is filled first.
    let is_here = |core: &Core| here.is_some_and(|cpu| core.cpus.contains(&cpu));
    let home = cores.iter().find(|core| is_here(core)).map(|core| core.node);
    cores.sort_by_key(|core| (Some(core.node) != home, core.node));
    let place = |core: &Core| -> Place {
        let nobodys = &cores[0];
        let may_use = |other: &&Core| {
            if threads == num_cores {
                *other == core || *other == nobodys
            } else {
                other.node == core.node
            }
        };
        cores.iter().filter(may_use).flat_map(|core| core.cpus.iter().copied()).collect()
    };
    let places: Vec<Place> = cores.iter().take(threads).skip(1).map(place).collect();
    let num_cpus: usize = cores.iter().map(|core| core.cpus.len()).sum();
    if places.iter().all(|place| place.len() == num_cpus) { Vec::new() } else { places }
}

/// The cores that `allowed` CPUs belong to, as files below `system` describe them; a CPU that
/// they do not describe is a core of its own, near node 0.
fn read_cores(system: &Path, allowed: &[usize]) -> Vec<Core> {
    let nodes = read_nodes(system);
    let mut cores: Vec<(Vec<usize>, Core)> = Vec::new();
    for &cpu in allowed {
        let path = system.join(format!("cpu/cpu{cpu}/topology/thread_siblings_list"));
        let siblings = read_cpu_list(&path).unwrap_or_else(|| vec![cpu]);
        if let Some((_, core)) = cores.iter_mut().find(|(known, _)| *known == siblings) {
            core.cpus.push(cpu);
        } else {
            let node = nodes.iter().find(|(_, cpus)| cpus.contains(&cpu));
            let node = node.map_or(0, |(node, _)| *node);
            cores.push((siblings, Core { cpus: vec![cpu], node }));
        }
    }
    cores.into_iter().map(|(_, core)| core).collect()
}

/// Memory nodes and the CPUs near them.
fn read_nodes(system: &Path) -> Vec<(usize, Vec<usize>)> {
    let nodes = read_cpu_list(&system.join("node/online")).unwrap_or_default();
    let cpus = |node| read_cpu_list(&system.join(format!("node/node{node}/cpulist")));
    nodes.into_iter().filter_map(|node| Some((node, cpus(node)?))).collect()
}

/// Logical CPUs that this process may keep busy: its affinity mask or its quota.
fn available() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Where the calling thread runs at the moment.
#[cfg(target_os = "linux")]
fn current_cpu() -> Option<usize> {
    // SAFETY: it takes nothing and returns a number, negative on failure.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

#[cfg(not(target_os = "linux"))]
fn current_cpu() -> Option<usize> {
    None
}

/// The affinity mask as `/proc` tells it; empty where there is none.
fn allowed_cpus() -> Vec<usize> {
    allowed_in(Path::new("/proc/self/status"))
}

fn allowed_in(status: &Path) -> Vec<usize> {
    let status = std::fs::read_to_string(status).unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    parse_cpu_list(list.unwrap_or_default())
}

fn read_cpu_list(path: &Path) -> Option<Vec<usize>> {
    std::fs::read_to_string(path).ok().map(|list| parse_cpu_list(&list))
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
pub mod tests {
    use super::*;

    /// The affinity mask of the calling thread.
    #[cfg(target_os = "linux")]
    pub fn own_place() -> Place {
        allowed_in(Path::new("/proc/thread-self/status"))
    }

    /// Files of a machine whose nodes have these CPUs, CPU `i` and `i + num_cores` sharing a
    /// core when there are twice as many CPUs as cores.
    fn machine(nodes: &[&str], num_cores: usize) -> tempfile::TempDir {
        let system = tempfile::tempdir().unwrap();
        let write = |path: String, text: String| {
            let path = system.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text + "\n").unwrap();
        };
        write("node/online".into(), format!("0-{}", nodes.len() - 1));
        let mut all: Vec<usize> = Vec::new();
        for (node, cpus) in nodes.iter().enumerate() {
            write(format!("node/node{node}/cpulist"), (*cpus).to_owned());
            all.extend(parse_cpu_list(cpus));
        }
        for cpu in &all {
            let core = cpu % num_cores;
            let shared = all.len() > num_cores;
            let siblings =
                if shared { format!("{core},{}", core + num_cores) } else { core.to_string() };
            write(format!("cpu/cpu{cpu}/topology/thread_siblings_list"), siblings);
        }
        system
    }

    fn cores(nodes: &[&str], num_cores: usize, allowed: &str) -> Vec<Core> {
        read_cores(machine(nodes, num_cores).path(), &parse_cpu_list(allowed))
    }

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

    #[test]
    fn hyper_threads_are_one_core_and_cores_outside_the_mask_are_none() {
        let found = cores(&["0-1,4-5", "2-3,6-7"], 4, "1-3,5,6");
        let core = |cpus: &[usize], node| Core { cpus: cpus.to_vec(), node };
        assert_eq!(found, [core(&[1, 5], 0), core(&[2, 6], 1), core(&[3], 1)]);
    }

    #[test]
    fn a_machine_that_does_not_describe_itself_has_single_cores_in_one_node() {
        let nothing = tempfile::tempdir().unwrap();
        let found = read_cores(nothing.path(), &[3, 5]);
        assert_eq!(found, [3, 5].map(|cpu| Core { cpus: vec![cpu], node: 0 }));
    }

    #[test]
    fn threads_that_fill_the_mask_have_a_core_each_and_one_is_nobodys() {
        let places = places(cores(&["0-7"], 4, "0-7"), 8, 4, Some(2));
        assert_eq!(places, [[0, 4, 1, 5], [0, 4, 2, 6], [0, 4, 3, 7]]);
    }

    #[test]
    fn on_two_cores_the_system_decides() {
        assert!(places(cores(&["0-1"], 2, "0-1"), 2, 2, Some(0)).is_empty());
        assert!(places(cores(&["0-3"], 2, "0-3"), 4, 2, Some(0)).is_empty());
    }

    #[test]
    fn fewer_threads_than_cores_may_use_any_core_of_their_node() {
        let one_node = cores(&["0-15"], 16, "0-15");
        assert!(places(one_node, 16, 8, Some(0)).is_empty());
        let two_nodes = cores(&["0-3", "4-7"], 8, "0-7");
        let node = |cpus: std::ops::Range<usize>| cpus.collect::<Place>();
        let filled = places(two_nodes.clone(), 8, 4, Some(1));
        assert_eq!(filled, [node(0..4), node(0..4), node(0..4)]);
        let from_second = places(two_nodes, 8, 6, Some(5));
        let expected = [node(4..8), node(4..8), node(4..8), node(0..4), node(0..4)];
        assert_eq!(from_second, expected);
    }

    #[test]
    fn nodes_whose_cpus_alternate_are_filled_one_after_the_other() {
        let places = places(cores(&["0,2,4,6", "1,3,5,7"], 8, "0-7"), 8, 8, None);
        let own: Vec<usize> = places.iter().map(|place| place[1]).collect();
        assert_eq!(own, [2, 4, 6, 1, 3, 5, 7]);
    }

    #[test]
    fn more_threads_than_cores_or_a_quota_leave_it_to_the_system() {
        let four = || cores(&["0-3"], 4, "0-3");
        assert_eq!(places(four(), 4, 4, Some(0)).len(), 3);
        assert!(places(four(), 4, 5, Some(0)).is_empty());
        assert!(places(four(), 3, 3, Some(0)).is_empty());
        assert!(places(four(), 4, 1, Some(0)).is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn caches_keep_a_share_of_what_the_third_level_holds() {
        let system = tempfile::tempdir().unwrap();
        let folder = system.path().join("cpu/cpu1/cache/index3");
        std::fs::create_dir_all(&folder).unwrap();
        let read = |text: &str| {
            std::fs::write(folder.join("size"), text).unwrap();
            third_level_bytes(system.path(), 1)
        };
        assert_eq!(read("107520K\n"), Some(105 << 20));
        assert_eq!(read("32M\n"), Some(32 << 20));
        assert_eq!(read("many\n"), None);
        assert_eq!(third_level_bytes(system.path(), 0), None);
        assert_eq!(
            [None, Some(8 << 20), Some(480 << 20)].map(kept_of),
            [1 << 20, 1 << 20, 30 << 20]
        );
    }

    #[test]
    fn a_thread_stays_where_it_is_kept() {
        let cpu = allowed_cpus()[0];
        let kept = std::thread::spawn(move || keep_to(&[cpu]).map(|()| own_place()));
        assert_eq!(kept.join().unwrap().unwrap(), [cpu]);
        assert!(keep_to(&[]).is_err());
    }
}
