//! Why a GPU cannot be used, as facts.

/// The oldest CUDA whose drivers load our kernels, as `1000 · major + 10 · minor`.
pub(super) const OLDEST_CUDA: u32 = 13_000;
/// The oldest compute capability that the kernels are compiled for.
pub(super) const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// A GPU cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// No driver is installed.
    #[error("this machine has no NVIDIA driver (libcuda.so.1 cannot be opened)")]
    NoDriver,
    /// The driver does not know what the kernels were made with.
    #[error(
        "the NVIDIA driver supports CUDA {found}, but the kernels need {needed}; update the driver",
        found = Version(*found), needed = Version(OLDEST_CUDA)
    )]
    OldDriver {
        /// `1000 · major + 10 · minor`.
        found: u32,
    },
    /// There is a driver, but nothing for it to drive.
    #[error("the NVIDIA driver finds no GPU")]
    NoDevice,
    /// There are fewer GPUs.
    #[error("there is no GPU {ordinal}; the NVIDIA driver finds {count}, counted from 0")]
    NoSuchDevice {
        /// Which was wanted.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU is older than the kernels.
    #[error(
        "{name} has compute capability {}.{}, but the kernels need {}.{} or later",
        found.0, found.1, OLDEST_CAPABILITY.0, OLDEST_CAPABILITY.1
    )]
    OldDevice {
        /// The GPU.
        name: String,
        /// Major and minor.
        found: (u32, u32),
    },
    /// The binary was built without nvcc.
    #[error("this binary has no CUDA kernels, because nvcc was not found when it was built")]
    NoKernels,
    /// The driver refused.
    #[error("{what}: {reason}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The driver's words.
        reason: String,
    },
}

/// A version of CUDA as people write it.
pub(super) struct Version(pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_name_what_was_found_and_what_is_needed() {
        assert_eq!(
            Unavailable::OldDriver { found: 12_040 }.to_string(),
            "the NVIDIA driver supports CUDA 12.4, but the kernels need 13.0; update the driver"
        );
        let old = Unavailable::OldDevice { name: "Tesla V100".to_owned(), found: (7, 0) };
        assert_eq!(
            old.to_string(),
            "Tesla V100 has compute capability 7.0, but the kernels need 8.0 or later"
        );
    }
}
