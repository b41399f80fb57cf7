//! What was asked of the GPU since somebody last waited for it.
//!
//! Kernels run after their launch has returned. A fault of one of them is an error of whatever is
//! asked for next, and of everything after that: the kernel at fault is among those that nobody
//! has waited for, and it is known only where there is one of them.

use std::fmt;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;

use super::super::launcher::Launch;

/// Kernels by name, in the order in which each was first launched, and how often.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    counts: Vec<(&'static str, u64)>,
    last: Option<(&'static str, Launch)>,
}

impl Pending {
    /// A kernel was launched.
    pub fn add(&mut self, kernel: &'static str, launch: Launch) {
        self.count(kernel, 1);
        self.last = Some((kernel, launch));
    }

    /// Something of this name was asked for so many times.
    pub fn count(&mut self, name: &'static str, times: u64) {
        match self.counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += times,
            None if times > 0 => self.counts.push((name, times)),
            None => {}
        }
    }

    /// A recorded step was replayed.
    pub fn add_all(&mut self, recorded: &Pending) {
        for &(name, times) in &recorded.counts {
            self.count(name, times);
        }
    }

    /// Everything has run.
    pub fn clear(&mut self) {
        self.counts.clear();
        self.last = None;
    }

    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The kernel that must be at fault, because there is no other.
    pub fn only(&self) -> Option<(&'static str, Launch)> {
        match self.counts[..] {
            [(name, 1)] => self.last.filter(|(last, _)| *last == name),
            _ => None,
        }
    }
}

impl fmt::Display for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, times)) in self.counts.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            match times {
                1 => write!(f, "{comma}{name}")?,
                _ => write!(f, "{comma}{name} ({times} times)")?,
            }
        }
        Ok(())
    }
}

/// Whether an error may come from something that was launched earlier: the GPU failed, and every
/// call says so from then on. Other errors are about the call that returns them.
pub(super) fn is_of_earlier_work(error: DriverError) -> bool {
    matches!(
        error.0,
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_kernel_is_certain_and_several_are_not() {
        let launch = Launch::new(2, 64);
        let mut pending = Pending::default();
        assert_eq!((pending.only(), pending.is_empty()), (None, true));
        pending.add("rms_norm", launch);
        assert_eq!(pending.only(), Some(("rms_norm", launch)));
        pending.add("rms_norm", launch);
        assert_eq!(pending.only(), None, "it is not known which launch");
        pending.clear();
        pending.add("matmul", launch);
        assert_eq!(pending.only(), Some(("matmul", launch)));
    }

    #[test]
    fn what_a_call_was_refused_for_is_no_earlier_kernels_fault() {
        let of_earlier_work = |code| is_of_earlier_work(DriverError(code));
        assert!(of_earlier_work(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        assert!(!of_earlier_work(CUresult::CUDA_ERROR_INVALID_VALUE));
        assert!(!of_earlier_work(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
    }

    #[test]
    fn a_replayed_step_is_all_of_its_kernels() {
        let launch = Launch::new(1, 32);
        let mut recorded = Pending::default();
        recorded.add("matmul", launch);
        recorded.add("rms_norm", launch);
        recorded.count("products of cuBLASLt", 0);
        let mut pending = Pending::default();
        pending.add_all(&recorded);
        pending.add("sample", launch);
        pending.add_all(&recorded);
        assert_eq!(pending.only(), None);
        assert_eq!(pending.to_string(), "matmul (2 times), rms_norm (2 times), sample");
        let mut one = Pending::default();
        one.count("products of cuBLASLt", 1);
        assert_eq!(one.only(), None, "it is no kernel of ours");
    }
}
