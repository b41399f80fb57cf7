//! Processor, memory, driver and GPUs of this machine, as facts.

use std::fmt;

use serde::Serialize;

use crate::cli::bench::record;
use crate::ops::cpu::{Isa, physical_cores};
use crate::ops::cuda::KERNELS;
use crate::ops::cuda::driver::Survey;
use crate::runner::memory_plan::{Bytes, free_memory_bytes};

/// What there is to compute with.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    cpu: Cpu,
    memory: Memory,
    cuda: Cuda,
}

#[derive(Debug, Serialize)]
struct Cpu {
    name: String,
    /// Logical CPUs that this process may use.
    num_cpus: usize,
    /// Compute threads by default.
    threads: usize,
    /// Values of `--cpu-isa` that work here, the default first.
    isas: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct Memory {
    total_bytes: u64,
    /// What this process may still take.
    free_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Cuda {
    /// The newest CUDA that the driver supports.
    driver: Option<String>,
    /// Bytes of the kernels in this binary; 0 when it was built without nvcc.
    kernels_bytes: usize,
    gpus: Vec<GpuReport>,
    /// Why no GPU can be used at all.
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct GpuReport {
    ordinal: usize,
    name: String,
    compute_capability: String,
    multiprocessors: u32,
    memory_bytes: u64,
    shared_bytes_per_block: u32,
    /// Why it cannot be used.
    problem: Option<String>,
}

impl Machine {
    /// Looks.
    pub fn here() -> Machine {
        let record::Machine { cpu, num_cpus, memory_bytes, .. } = record::Machine::here();
        Machine {
            cpu: Cpu {
                name: cpu,
                num_cpus,
                threads: physical_cores(),
                isas: Isa::supported().into_iter().map(Isa::name).collect(),
            },
            memory: Memory { total_bytes: memory_bytes, free_bytes: free_memory_bytes() },
            cuda: Cuda::here(),
        }
    }

    /// Why `auto` does not take a GPU here.
    pub fn why_no_gpu(&self) -> Option<String> {
        let first = self.cuda.gpus.first().and_then(|gpu| gpu.problem.clone());
        self.cuda.problem.clone().or(first)
    }
}

impl Cuda {
    fn here() -> Cuda {
        let kernels_bytes = KERNELS.iter().map(|image| image.fatbin.len()).sum();
        let survey = match Survey::take() {
            Ok(survey) => survey,
            Err(error) => {
                let problem = Some(error.to_string());
                return Cuda { driver: None, kernels_bytes, gpus: Vec::new(), problem };
            }
        };
        let gpus = survey.gpus.iter().map(|gpu| {
            let (major, minor) = gpu.facts.compute_capability;
            GpuReport {
                ordinal: gpu.ordinal,
                name: gpu.name.clone(),
                compute_capability: format!("{major}.{minor}"),
                multiprocessors: gpu.facts.multiprocessors,
                memory_bytes: gpu.memory_bytes,
                shared_bytes_per_block: gpu.facts.shared_bytes_per_block,
                problem: survey.usable(gpu.ordinal).err().map(|error| error.to_string()),
            }
        });
        let problem = match survey.gpus.is_empty() {
            true => survey.usable(0).err().map(|error| error.to_string()),
            false if kernels_bytes == 0 => {
                Some(crate::ops::cuda::driver::Unavailable::NoKernels.to_string())
            }
            false => None,
        };
        Cuda { driver: Some(survey.version()), kernels_bytes, gpus: gpus.collect(), problem }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, memory, cuda } = self;
        let Cpu { name, num_cpus, threads, isas } = cpu;
        writeln!(f, "processor  {name}, {num_cpus} CPUs, {threads} compute threads")?;
        writeln!(f, "vectors    {}", isas.join(", "))?;
        let [total, free] = [memory.total_bytes, memory.free_bytes].map(|b| Bytes(b as usize));
        writeln!(f, "memory     {total}, {free} free")?;
        let driver = cuda.driver.as_ref().map_or("none".to_owned(), |v| format!("CUDA {v}"));
        writeln!(f, "driver     {driver}")?;
        match cuda.kernels_bytes {
            0 => writeln!(f, "kernels    none: built without nvcc")?,
            bytes => writeln!(f, "kernels    {} in this binary", Bytes(bytes))?,
        }
        if cuda.gpus.is_empty() {
            return writeln!(f, "GPUs       none");
        }
        cuda.gpus.iter().try_for_each(|gpu| writeln!(f, "{gpu}"))
    }
}

impl fmt::Display for GpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GpuReport { ordinal, name, compute_capability, multiprocessors, .. } = self;
        let memory = Bytes(self.memory_bytes as usize);
        let shared = Bytes(self.shared_bytes_per_block as usize);
        write!(
            f,
            "GPU {ordinal}      {name}, {memory}, compute capability {compute_capability}, \
             {multiprocessors} multiprocessors, {shared} of shared memory per block"
        )?;
        self.problem.as_ref().map_or(Ok(()), |problem| write!(f, "; not usable: {problem}"))
    }
}
