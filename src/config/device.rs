//! Which device computes, and with what: flags as typed, and as resolved.

use clap::{Args, ValueEnum};

use super::ConfigError;

/// Which device computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU that can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
}

/// Vector instructions that the CPU kernels use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CpuIsa {
    /// The best that this machine supports.
    Auto,
    /// Portable code.
    Scalar,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512.
    Avx512,
    /// AVX-512 with products of bf16.
    Avx512Bf16,
    /// AMX tiles beside AVX-512.
    Amx,
}

/// Flags about the device.
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda or cuda:N; auto takes the first NVIDIA GPU that can be
    /// used, and says why when it takes the CPU
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,

    /// On a GPU: replay no recorded steps (CUDA graphs), launch every kernel
    #[arg(long)]
    pub enforce_eager: bool,

    /// Compute threads; default: physical cores. On a GPU they only quantize while loading
    #[arg(long)]
    pub threads: Option<usize>,

    /// On the CPU: vector instructions to use
    #[arg(long, value_enum, default_value = "auto")]
    pub cpu_isa: CpuIsa,
}

/// What the composition root needs.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Which device.
    pub choice: DeviceChoice,
    /// Replay no recorded steps.
    pub enforce_eager: bool,
    /// Threads of the host; `None` means physical cores.
    pub threads: Option<usize>,
    /// Vector instructions of the CPU.
    pub cpu_isa: CpuIsa,
    /// A flag that was typed and only the CPU understands, so that `auto` means the CPU.
    pub cpu_only_flag: Option<&'static str>,
}

impl DeviceConfig {
    /// Any device, with nothing typed.
    pub fn auto() -> DeviceConfig {
        DeviceConfig {
            choice: DeviceChoice::Auto,
            enforce_eager: false,
            threads: None,
            cpu_isa: CpuIsa::Auto,
            cpu_only_flag: None,
        }
    }

    /// Why the flags alone mean the CPU.
    pub fn why_cpu(&self) -> Option<String> {
        match (self.choice, self.cpu_only_flag) {
            (DeviceChoice::Cpu, _) => Some("--device cpu".to_owned()),
            (_, Some(flag)) => Some(format!("--{flag} has a meaning on the CPU only")),
            _ => None,
        }
    }

    /// The CPU, with as many threads, or one per core.
    pub fn cpu(threads: Option<usize>) -> DeviceConfig {
        DeviceConfig { choice: DeviceChoice::Cpu, threads, ..DeviceConfig::auto() }
    }
}

impl DeviceArgs {
    /// Every choice made. `cpu_only_flags` are typed flags of others that a GPU cannot heed.
    pub fn resolve(
        self,
        cpu_only_flags: impl IntoIterator<Item = &'static str>,
    ) -> Result<DeviceConfig, ConfigError> {
        let isa_flag = (self.cpu_isa != CpuIsa::Auto).then_some("cpu-isa");
        let cpu_only_flag = isa_flag.into_iter().chain(cpu_only_flags).next();
        if let (DeviceChoice::Cuda(_), Some(flag)) = (self.device, cpu_only_flag) {
            return Err(ConfigError::OnlyOnCpu { flag });
        }
        super::check(
            "threads",
            format!("{:?}", self.threads),
            self.threads != Some(0),
            "at least 1 is needed",
        )?;
        Ok(DeviceConfig {
            choice: self.device,
            enforce_eager: self.enforce_eager,
            threads: self.threads,
            cpu_isa: self.cpu_isa,
            cpu_only_flag,
        })
    }
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    let number = |text: &str| text.strip_prefix("cuda:")?.parse().ok();
    match text {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        _ => number(text)
            .map(DeviceChoice::Cuda)
            .ok_or_else(|| format!("`{text}` is not auto, cpu, cuda or cuda:N like cuda:1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(device: DeviceChoice, cpu_isa: CpuIsa) -> DeviceArgs {
        DeviceArgs { device, cpu_isa, enforce_eager: false, threads: None }
    }

    #[test]
    fn devices_have_numbers() {
        assert_eq!(parse_device("cuda"), Ok(DeviceChoice::Cuda(0)));
        assert_eq!(parse_device("cuda:3"), Ok(DeviceChoice::Cuda(3)));
        assert!(parse_device("cuda:").is_err());
        assert!(parse_device("gpu").is_err());
    }

    #[test]
    fn flags_of_the_cpu_are_refused_on_a_gpu_and_decide_what_auto_means() {
        let refused = args(DeviceChoice::Cuda(0), CpuIsa::Avx2).resolve([]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "--cpu-isa has a meaning on the CPU only; leave it out or use --device cpu"
        );
        let auto = args(DeviceChoice::Auto, CpuIsa::Auto).resolve(["kv-cache-fraction"]);
        assert_eq!(auto.unwrap().cpu_only_flag, Some("kv-cache-fraction"));
        let cuda = args(DeviceChoice::Cuda(0), CpuIsa::Auto).resolve([]);
        assert_eq!(cuda.unwrap().cpu_only_flag, None);
    }
}
