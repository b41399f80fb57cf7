//! Kernels by their names: found in the modules once, and launched with what they take.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::super::launcher::{ArgKind, CudaError, KernelArg, Launch};
use super::context::words;
use super::pending::is_of_earlier_work;
use super::{Driver, State};

/// A kernel on the GPU.
#[derive(Clone)]
pub(super) struct Kernel {
    function: sys::CUfunction,
    /// Bytes of each parameter.
    parameters: Arc<[usize]>,
}

/// Why a kernel was not launched.
pub(super) enum LaunchError {
    /// It takes other parameters.
    Parameters(String),
    /// The driver's answer.
    Driver(DriverError),
}

impl From<DriverError> for LaunchError {
    fn from(error: DriverError) -> LaunchError {
        LaunchError::Driver(error)
    }
}

impl Driver {
    /// The kernel of this name.
    fn kernel(&self, state: &mut State, name: &'static str) -> Result<Kernel, DriverError> {
        if let Some(kernel) = state.kernels.get(name) {
            return Ok(kernel.clone());
        }
        let function = self.function(name)?;
        self.allow_shared_memory(function)?;
        let kernel = Kernel { function, parameters: parameters(function).into() };
        state.kernels.insert(name, kernel.clone());
        Ok(kernel)
    }

    /// Looks for a kernel in all modules.
    fn function(&self, name: &str) -> Result<sys::CUfunction, DriverError> {
        let symbol = CString::new(name).expect("kernels are named by identifiers");
        let mut outcome = Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND));
        for &module in &self.modules {
            // SAFETY: modules live as long as `self`.
            outcome = unsafe { result::module::get_function(module, symbol.clone()) };
            if outcome.as_ref().err() != Some(&DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) {
                break;
            }
        }
        outcome
    }

    /// Lets a kernel use all the dynamic shared memory that the GPU has beside its static one.
    fn allow_shared_memory(&self, function: sys::CUfunction) -> Result<(), DriverError> {
        use sys::CUfunction_attribute_enum as Attribute;
        let most = self.gpu.facts.shared_bytes_per_block.cast_signed();
        // SAFETY: the function was just found in the module.
        unsafe {
            let fixed = result::function::get_function_attribute(
                function,
                Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            )?;
            result::function::set_function_attribute(
                function,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                most - fixed,
            )
        }
    }

    /// Launches a kernel and does not wait for it.
    pub(super) fn try_launch(
        &self,
        state: &mut State,
        (name, launch): (&'static str, Launch),
        args: &[KernelArg<'_>],
    ) -> Result<(), LaunchError> {
        self.context.enter()?;
        let kernel = self.kernel(state, name)?;
        check_parameters(&kernel.parameters, args).map_err(LaunchError::Parameters)?;
        let bits: Vec<u64> = args.iter().map(KernelArg::bits).collect();
        let mut addresses: Vec<*mut c_void> =
            bits.iter().map(|bits| std::ptr::from_ref(bits).cast_mut().cast()).collect();
        let [gx, gy, gz] = launch.grid;
        let [bx, by, bz] = launch.block;
        // SAFETY: there is one address per parameter, of as many bytes, which the driver copies;
        // what the kernel does with them is its launch code's contract.
        unsafe {
            result::launch_kernel(
                kernel.function,
                (gx, gy, gz),
                (bx, by, bz),
                launch.shared_bytes,
                self.stream,
                &mut addresses,
            )?;
        }
        Ok(())
    }

    /// What a launch failed with. The kernel itself is to blame where it was refused, and where
    /// every launch waits; else what the GPU reports is the fault of something that ran before.
    pub(super) fn launch_error(
        &self,
        state: &mut State,
        (name, launch): (&'static str, Launch),
        error: LaunchError,
    ) -> CudaError {
        let reason = match error {
            LaunchError::Driver(error) if is_of_earlier_work(error) && !self.is_blocking => {
                return self.error(state, &format!("launching {name}"), error);
            }
            LaunchError::Driver(error) => words(error),
            LaunchError::Parameters(reason) => reason,
        };
        CudaError::Kernel { kernel: name.to_owned(), launch, reason }
    }
}

/// Bytes of each parameter of a kernel.
fn parameters(function: sys::CUfunction) -> Vec<usize> {
    let size = |index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is a kernel of a loaded module; an index that it does not have is
        // an error.
        let found =
            unsafe { sys::cuFuncGetParamInfo(function, index, &raw mut offset, &raw mut size) };
        found.result().ok().map(|()| size)
    };
    (0..).map_while(size).collect()
}

/// Whether the arguments have the sizes of the parameters.
fn check_parameters(parameters: &[usize], args: &[KernelArg<'_>]) -> Result<(), String> {
    let given = args.iter().map(|arg| match arg.kind() {
        ArgKind::Pointer | ArgKind::Int64 => 8,
        ArgKind::Int32 | ArgKind::Float32 => 4,
    });
    if given.clone().eq(parameters.iter().copied()) {
        return Ok(());
    }
    let given: Vec<usize> = given.collect();
    Err(format!("the kernel takes parameters of {parameters:?} bytes, but got {given:?}"))
}

#[cfg(test)]
mod tests {
    use super::super::super::launcher::args;
    use super::*;

    #[test]
    fn arguments_of_other_sizes_are_refused_before_the_kernel_reads_them() {
        let args = args![1u32, 2.0f32, 3u64];
        assert_eq!(check_parameters(&[4, 4, 8], &args), Ok(()));
        assert_eq!(
            check_parameters(&[4, 4], &args),
            Err("the kernel takes parameters of [4, 4] bytes, but got [4, 4, 8]".to_owned())
        );
        assert!(check_parameters(&[4, 8, 8], &args).is_err());
    }
}
