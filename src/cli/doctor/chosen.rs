//! The device that the flags mean here, and what computes there.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::config::DeviceConfig;
use crate::device::RankContext;
use crate::ops::{DeviceMemoryInfo, OpsError};
use crate::runner::memory_plan::Bytes;

/// Beginnings of the names of the libraries that a GPU is used through.
const LIBRARIES: [&str; 2] = ["libcuda.so", "libcublasLt"];

/// What the device flags mean here.
#[derive(Debug, Serialize)]
pub(super) struct Chosen {
    /// The device's name, when there is one.
    pub device: Option<String>,
    /// Why it is not the one that was asked for, or not a GPU.
    reason: Option<String>,
    /// Bytes of its memory that are free, where it has memory of its own.
    free_bytes: Option<u64>,
    /// What computes what, and up to which sizes.
    paths: Vec<Choice>,
    /// Files of NVIDIA's libraries that were opened.
    libraries: Vec<String>,
}

/// One choice.
#[derive(Debug, Serialize)]
struct Choice {
    what: &'static str,
    by: String,
}

impl Chosen {
    /// Asks an opened device, or tells why there is none.
    pub fn new<E: fmt::Display>(
        config: &DeviceConfig,
        why_no_gpu: Option<String>,
        rank: &Result<RankContext, E>,
    ) -> Result<Chosen, OpsError> {
        let rank = match rank {
            Ok(rank) => rank,
            Err(error) => {
                let (paths, libraries) = (Vec::new(), Vec::new());
                let reason = Some(error.to_string());
                return Ok(Chosen { device: None, reason, free_bytes: None, paths, libraries });
            }
        };
        let choices = rank.ops.choices().into_iter();
        let memory = rank.ops.device_memory()?;
        let libraries = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        Ok(Chosen {
            device: Some(rank.ops.name()),
            reason: config.why_cpu().or(why_no_gpu),
            free_bytes: memory.map(|DeviceMemoryInfo { free, .. }| free),
            paths: choices.map(|(what, by)| Choice { what, by }).collect(),
            libraries: opened_libraries(&libraries),
        })
    }
}

/// Paths of libraries in a table of mapped files.
fn opened_libraries(maps: &str) -> Vec<String> {
    let path = |line: &str| {
        let path = &line[line.find('/')?..];
        let name = Path::new(path).file_name()?.to_str()?;
        LIBRARIES.iter().any(|library| name.starts_with(library)).then(|| path.to_owned())
    };
    maps.lines().filter_map(path).collect::<BTreeSet<_>>().into_iter().collect()
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Chosen { device, reason, free_bytes, paths, libraries } = self;
        let reason = reason.as_ref().map_or(String::new(), |why| format!(" ({why})"));
        writeln!(f, "chosen     {}{reason}", device.as_deref().unwrap_or("none"))?;
        if let Some(bytes) = free_bytes {
            writeln!(f, "           {} of its memory free", Bytes(*bytes as usize))?;
        }
        for Choice { what, by } in paths {
            writeln!(f, "           {what}: {by}")?;
        }
        libraries.iter().try_for_each(|path| writeln!(f, "library    {path}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_among_mapped_files() {
        let maps = "7f00-7f01 r--p 00000000 fe:00 12  /usr/lib/libc.so.6\n\
                    7f02-7f03 r--p 00000000 fe:00 13  /opt/nvidia/lib/libcublasLt.so.13\n\
                    7f03-7f04 r-xp 00001000 fe:00 13  /opt/nvidia/lib/libcublasLt.so.13\n\
                    7f05-7f06 rw-p 00000000 00:00 0  [heap]\n\
                    7f07-7f08 r--p 00000000 fe:00 14  /usr/lib/libcuda.so.1\n";
        let expected = ["/opt/nvidia/lib/libcublasLt.so.13", "/usr/lib/libcuda.so.1"];
        assert_eq!(opened_libraries(maps), expected);
    }
}
