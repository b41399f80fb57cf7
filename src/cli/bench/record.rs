//! The JSON that a run leaves: what was measured, on what, and what the machine could do then.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::limits::{self, Limit, MEMORY_COPY, MEMORY_READ};
use crate::ops::cuda::driver::Survey;

/// Flags about the record that a run leaves.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Record")]
pub struct RecordArgs {
    /// Write the run as JSON
    #[arg(long, value_name = "FILE")]
    pub output_json: Option<PathBuf>,

    /// Note this in the record; repeat for several (`bench report` groups by `engine` and `case`, and
    /// `device` is what a server computes on, in the words of `doctor`)
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub metadata: Vec<(String, String)>,

    /// Put the limits of this file into the record too: the output of `cargo bench --bench
    /// limits`, or an earlier record
    #[arg(long, value_name = "FILE")]
    pub limits_json: Option<PathBuf>,

    /// Do not read memory bandwidth and peak arithmetic before and after the run
    #[arg(long)]
    pub no_limits: bool,
}

impl RecordArgs {
    /// Whether `--metadata device=…` says that a server computes on a GPU.
    pub(super) fn names_gpu(&self) -> bool {
        self.metadata.iter().any(|(key, value)| key == "device" && value.starts_with("cuda"))
    }
}

/// Which command made a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `bench latency`.
    Latency,
    /// `bench throughput`.
    Throughput,
    /// `bench serve`.
    Serve,
    /// `bench steps`.
    Steps,
    /// `bench kernels`.
    Kernels,
    /// `doctor --verify`.
    Verify,
    /// `scripts/golden.py`, kept by `bench record`.
    Golden,
    /// PyTorch's times of what `bench kernels` measures, kept by `bench record`.
    Torch,
    /// How long a server takes to start, kept by `bench record`.
    Start,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Which command made it.
    pub benchmark: Kind,
    /// When it ended, in local time with its offset.
    pub date: String,
    /// Version of tokenmill.
    pub tokenmill: String,
    /// Where it ran.
    pub machine: Machine,
    /// `--metadata`.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// What was measured; for `serve` no more than its name is known.
    pub model: Value,
    /// The flags that shape the load.
    pub options: Value,
    /// What the machine could do.
    pub limits: Vec<Limit>,
    /// What came out.
    pub results: Value,
}

impl Record {
    /// What computed, in its own words: `cuda (0 NVIDIA H200)`.
    fn backend(&self) -> &str {
        let noted = self.metadata.get("device").map(String::as_str);
        self.model["backend"].as_str().or(noted).unwrap_or_default()
    }

    /// Whether a GPU computed.
    pub(super) fn is_of_gpu(&self) -> bool {
        self.backend().starts_with("cuda")
    }

    /// The name of the GPU that computed, else of the processor.
    pub(super) fn hardware(&self) -> &str {
        let gpu = self.backend().strip_prefix("cuda (").and_then(|rest| rest.strip_suffix(')'));
        gpu.map_or(&self.machine.cpu, |gpu| gpu.split_once(' ').map_or(gpu, |(_, name)| name))
    }

    /// The weights' format: a value of `--quantization`, or `bf16`.
    pub(super) fn format(&self) -> &str {
        self.model["quantization"].as_str().unwrap_or("bf16")
    }
}

/// The machine, as far as it tells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// CPUs that this process may use.
    pub num_cpus: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Names of the GPUs that a driver tells of, used or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
}

impl Machine {
    /// This machine.
    pub(in crate::cli) fn here() -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        let gpus = Survey::take().map(|survey| survey.gpus).unwrap_or_default();
        Machine {
            cpu: field(&read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            num_cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_bytes: kib.map_or(0, |kib| kib * 1024),
            gpus: gpus.into_iter().map(|gpu| gpu.name).collect(),
        }
    }
}

/// The first `name: value` of a file in `/proc`.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// What a run measures, and so whose limits bound it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Measured {
    /// This machine's processor.
    Host {
        /// Threads that compute.
        threads: usize,
    },
    /// A GPU, whose limits `bench kernels` reads.
    Gpu,
    /// Another machine, or none.
    Elsewhere,
}

/// A record in the making.
pub(in crate::cli) struct Recorder {
    args: RecordArgs,
    measured: Measured,
    limits: Vec<Limit>,
}

impl Recorder {
    /// Refuses what could not be written later, then reads the limits a first time.
    pub fn begin(args: RecordArgs, measured: Measured) -> anyhow::Result<Recorder> {
        if let Some(path) = &args.output_json {
            check_folder(path)?;
        }
        let limits = args.limits_json.as_deref().map(limits::read_file).transpose()?;
        let mut recorder = Recorder { args, measured, limits: limits.unwrap_or_default() };
        recorder.read_limits("before");
        Ok(recorder)
    }

    /// Reads the limits a second time.
    pub fn end(&mut self) {
        self.read_limits("after");
    }

    fn read_limits(&mut self, when: &str) {
        if let (Measured::Host { threads }, false) = (self.measured, self.args.no_limits) {
            let read = std::iter::once(limits::memory_read(threads));
            let now = |limit| Limit { when: Some(when.to_owned()), ..limit };
            self.limits.extend(read.chain(limits::arithmetic(threads)).map(now));
        }
    }

    /// Adds limits that the run itself read.
    pub fn add_limits(&mut self, limits: impl IntoIterator<Item = Limit>) {
        self.limits.extend(limits);
    }

    /// All limits so far, of this run and of `--limits-json`.
    pub fn limits(&self) -> &[Limit] {
        &self.limits
    }

    /// The memory bandwidth in bytes per second: of the host the better of before and after, of a GPU
    /// what is known, since it has no neighbours.
    pub fn bandwidth(&self) -> Option<f64> {
        match self.measured {
            Measured::Gpu => limits::best(self.limits.iter().filter(|l| l.limit == MEMORY_COPY)),
            _ => self.best_of(MEMORY_READ).map(|gigabytes| gigabytes * 1e9),
        }
    }

    /// What was read of a limit in this run, the better of before and after.
    fn best_of(&self, name: &str) -> Option<f64> {
        let read_now = |limit: &&Limit| limit.limit == name && limit.when.is_some();
        self.limits.iter().filter(read_now).map(|limit| limit.value).max_by(f64::total_cmp)
    }

    /// Prints the better reading of each kind of arithmetic.
    fn print_arithmetic(&self) {
        let kinds = self.limits.iter().filter(|limit| limit.when.as_deref() == Some("after"));
        let line = |limit: &Limit| {
            let best = self.best_of(&limit.limit)?;
            Some(format!("{} {:.2} TFLOP/s", limit.limit, best / 1e3))
        };
        let lines: Vec<String> =
            kinds.filter(|limit| limit.limit != MEMORY_READ).filter_map(line).collect();
        if !lines.is_empty() {
            println!("arithmetic in the same run: {}", lines.join("; "));
        }
    }

    /// Writes the record, if one was asked for.
    pub fn write(
        self,
        benchmark: Kind,
        model: Value,
        options: Value,
        results: &impl Serialize,
    ) -> anyhow::Result<()> {
        if let Some(bandwidth) = self.best_of(MEMORY_READ) {
            println!("memory read in the same run: {bandwidth:.1} GB/s");
        }
        self.print_arithmetic();
        let record = Record {
            benchmark,
            date: chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false),
            tokenmill: env!("CARGO_PKG_VERSION").to_owned(),
            machine: Machine::here(),
            metadata: self.args.metadata.into_iter().collect(),
            model,
            options,
            limits: self.limits,
            results: serde_json::to_value(results).context("the results become JSON")?,
        };
        let Some(path) = self.args.output_json else { return Ok(()) };
        let text = serde_json::to_string_pretty(&record).context("the record becomes JSON")?;
        std::fs::write(&path, text + "\n")
            .with_context(|| format!("--output-json {} cannot be written", path.display()))
    }
}

/// A long run must not end with a folder that is not there.
fn check_folder(path: &Path) -> anyhow::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let exists = parent.is_none_or(Path::is_dir) && !path.is_dir();
    anyhow::ensure!(
        exists,
        "--output-json {} cannot be written; name a file in a folder that exists",
        path.display()
    );
    Ok(())
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("KEY=VALUE is needed, for example case=a".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_a_key_and_a_value() {
        assert_eq!(parse_pair("engine=a=b"), Ok(("engine".to_owned(), "a=b".to_owned())));
        assert!(parse_pair("engine").is_err());
        assert!(parse_pair("=x").is_err());
    }

    #[test]
    fn a_record_that_could_not_be_written_is_refused_before_the_run() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_folder(&folder.path().join("run.json")).is_ok());
        assert!(check_folder(Path::new("run.json")).is_ok());
        assert!(check_folder(folder.path()).is_err());
        let error = check_folder(&folder.path().join("absent/run.json")).unwrap_err();
        assert!(error.to_string().contains("--output-json"), "{error}");
    }

    #[test]
    fn a_record_names_the_gpu_that_computed() {
        let record = |model: &str, metadata: &str| -> Record {
            let text = format!(
                r#"{{"benchmark": "serve", "date": "", "tokenmill": "", "model": {model},
                     "machine": {{"cpu": "EPYC", "num_cpus": 2, "memory_bytes": 1}},
                     "metadata": {metadata}, "options": {{}}, "limits": [], "results": {{}}}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let gpu = record(r#"{"backend": "cuda (0 NVIDIA H200)", "quantization": "fp8"}"#, "{}");
        assert_eq!((gpu.is_of_gpu(), gpu.hardware(), gpu.format()), (true, "NVIDIA H200", "fp8"));
        let served = record("{}", r#"{"device": "cuda (1 NVIDIA L4)"}"#);
        assert_eq!((served.is_of_gpu(), served.hardware()), (true, "NVIDIA L4"));
        let cpu = record(r#"{"backend": "cpu (avx2, 2 threads)", "quantization": null}"#, "{}");
        assert_eq!((cpu.is_of_gpu(), cpu.hardware(), cpu.format()), (false, "EPYC", "bf16"));
    }

    #[test]
    fn the_machine_is_described_by_its_files() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: other\n";
        assert_eq!(field(text, "model name").as_deref(), Some("Some CPU @ 2 GHz"));
        assert_eq!(field("", "MemTotal"), None);
    }
}
