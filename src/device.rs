//! Composition root: what one rank of a replica computes with.
//!
//! Everything that differs between devices or between ranks is chosen here once and handed
//! down; nothing below asks which device it runs on.

use std::sync::Arc;

use tracing::info;

use crate::config::{DeviceChoice, DeviceConfig};
use crate::ops::Ops;
use crate::ops::cpu::{CpuError, CpuOps};
use crate::ops::cuda::driver::Unavailable;
use crate::ops::cuda::{CudaOps, Image, KERNELS};
use crate::parallel::{Communicator, Solo};

/// One rank's operations and its line to the other ranks.
#[derive(Clone)]
pub struct RankContext {
    /// The device's operations.
    pub ops: Arc<dyn Ops>,
    /// The other ranks.
    pub comm: Arc<dyn Communicator>,
}

/// The device that was asked for cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The CPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A GPU.
    #[error("--device cuda:{ordinal} cannot be used: {reason}")]
    Cuda {
        /// Which one.
        ordinal: usize,
        /// Why not.
        reason: Unavailable,
    },
}

impl RankContext {
    /// The only rank of a replica, on the device that was asked for. Says what `auto` chose and
    /// why.
    pub fn open(config: &DeviceConfig) -> Result<RankContext, DeviceError> {
        RankContext::open_with(config, KERNELS)
    }

    /// The same with other kernels for GPUs than those of this binary.
    pub fn open_with(
        config: &DeviceConfig,
        kernels: &'static [Image],
    ) -> Result<RankContext, DeviceError> {
        match (config.choice, config.cpu_only_flag) {
            (DeviceChoice::Cpu, _) => Ok(RankContext::cpu(config)?),
            (DeviceChoice::Cuda(ordinal), _) => RankContext::cuda(ordinal, config, kernels)
                .map_err(|reason| DeviceError::Cuda { ordinal, reason }),
            (DeviceChoice::Auto, Some(flag)) => {
                info!("computing on the CPU, because --{flag} has a meaning there only");
                Ok(RankContext::cpu(config)?)
            }
            (DeviceChoice::Auto, None) => match RankContext::cuda(0, config, kernels) {
                Ok(rank) => {
                    info!(device = %rank.ops.name(), "computing on the GPU");
                    Ok(rank)
                }
                Err(reason) => {
                    info!(%reason, "computing on the CPU");
                    Ok(RankContext::cpu(config)?)
                }
            },
        }
    }

    /// The only rank of a replica on this machine's CPU.
    pub fn cpu(config: &DeviceConfig) -> Result<RankContext, CpuError> {
        let ops = CpuOps::new(config.threads, config.cpu_isa)?;
        Ok(RankContext::solo(Arc::new(ops)))
    }

    /// The only rank of a replica on the GPU of this number, with these kernels.
    pub fn cuda(
        ordinal: usize,
        config: &DeviceConfig,
        kernels: &'static [Image],
    ) -> Result<RankContext, Unavailable> {
        let ops = CudaOps::on_gpu(ordinal, kernels)?;
        let ops = if config.enforce_eager { ops.eager() } else { ops };
        Ok(RankContext::solo(Arc::new(ops)))
    }

    /// A rank with the given operations and no others beside it.
    pub fn solo(ops: Arc<dyn Ops>) -> RankContext {
        RankContext { ops, comm: Arc::new(Solo) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number that no machine's GPU has.
    const ABSENT: usize = 1000;

    #[test]
    fn a_gpu_that_is_not_there_is_one_clear_error() {
        let config = DeviceConfig { choice: DeviceChoice::Cuda(ABSENT), ..DeviceConfig::auto() };
        let error = RankContext::open(&config).err().expect("there is no such GPU").to_string();
        assert!(error.starts_with("--device cuda:1000 cannot be used: "), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }

    #[test]
    fn flags_that_only_the_cpu_understands_mean_the_cpu() {
        let flag = Some("cpu-isa");
        let config = DeviceConfig { cpu_only_flag: flag, threads: Some(1), ..DeviceConfig::auto() };
        let rank = RankContext::open(&config).expect("there is a CPU");
        assert!(rank.ops.name().starts_with("cpu ("), "{}", rank.ops.name());
    }
}
