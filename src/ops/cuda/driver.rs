//! The real launcher: NVIDIA's driver, opened at run time, so that one binary starts with or
//! without a GPU.
//!
//! | file | what |
//! |---|---|
//! | `context` | GPUs found, described and opened; their memory |
//! | `pinned` | where bytes wait on the host for a copy |
//! | `unavailable` | why a GPU cannot be used |
//!
//! Everything runs on one stream, in order. A kernel is looked up by its name once; then the
//! driver says what parameters it takes, and a launch with others is an error, not a read of
//! wild memory. What the host sends or reads goes through pinned memory, so that an upload does
//! not wait. The first error is kept with the kernel, the launch and the driver's words; what
//! is asked for after it does nothing. A fault of a running kernel is noticed later, by whoever
//! waits next: that error names the last kernel that was launched, and with
//! `CUDA_LAUNCH_BLOCKING=1` in the environment that is the kernel at fault.

mod context;
mod pinned;
mod unavailable;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::cublas::{CublasLt, WORKSPACE_BYTES};
use super::launcher::{ArgKind, CudaError, DeviceFacts, KernelArg, Launch, Launcher};
use super::{CudaOps, Image};
use crate::ops::{DeviceMemoryInfo, Recording};
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};
use context::{Context, refused, words};
pub use context::{Gpu, Survey};
use pinned::{NUM_SEGMENTS, Ring, SEGMENT_BYTES};
pub use unavailable::Unavailable;

/// A GPU that is ready to launch our kernels.
pub struct Driver {
    gpu: Gpu,
    context: Arc<Context>,
    /// One per file of kernels.
    modules: Vec<sys::CUmodule>,
    stream: sys::CUstream,
    pinned: Pinned,
    // One thread computes; the lock is there for the one that drops or asks in between.
    state: Mutex<State>,
}

// SAFETY: the driver's handles may be used from any thread, and what changes is behind a lock.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// What changes while steps are computed.
#[derive(Default)]
struct State {
    kernels: HashMap<&'static str, Kernel>,
    ring: Ring,
    failure: Option<CudaError>,
    /// The last launch that nobody has waited for, and how many there are.
    pending: Option<(&'static str, Launch, u64)>,
    is_recording: bool,
}

/// A kernel on the GPU.
#[derive(Clone)]
struct Kernel {
    function: sys::CUfunction,
    /// Bytes of each parameter.
    parameters: Arc<[usize]>,
}

/// The pinned buffer and the events that say when a segment's copies have ended.
struct Pinned {
    start: *mut c_void,
    events: [sys::CUevent; NUM_SEGMENTS],
}

/// A recorded step, ready to run again.
struct Graph {
    exec: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: the handle may be used from any thread, one at a time: it is only read here.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // An error here would come too late for anyone to act on it.
            // SAFETY: instantiated once, destroyed once.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}

impl Driver {
    /// Opens a GPU and loads the kernels, as nvcc made them, onto it.
    pub fn open(ordinal: usize, images: &'static [Image]) -> Result<Driver, Unavailable> {
        let gpu = Survey::take()?.usable(ordinal)?.clone();
        if images.is_empty() {
            return Err(Unavailable::NoKernels);
        }
        let context = Arc::new(Context::open(ordinal).map_err(refused("opening the GPU"))?);
        context.enter().map_err(refused("entering the GPU's context"))?;
        // SAFETY: an image is a whole fatbin of nvcc's, which says itself where it ends.
        let load =
            |image: &Image| unsafe { result::module::load_data(image.fatbin.as_ptr().cast()) };
        let modules: Result<Vec<_>, _> = images.iter().map(load).collect();
        let modules = modules.map_err(refused("loading the kernels"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(refused("making a stream"))?;
        let pinned = Pinned::new().map_err(refused("pinning memory of the host"))?;
        Ok(Driver { gpu, context, modules, stream, pinned, state: Mutex::default() })
    }

    /// cuBLASLt on this GPU, where it is installed and there is room for it.
    fn dense_products(&self) -> Option<CublasLt> {
        self.context.enter().ok()?;
        let workspace = self.allocate(DType::U8, Shape::from([WORKSPACE_BYTES])).ok()?;
        let mut one = self.allocate(DType::F32, Shape::from([1])).ok()?;
        self.upload(one.view_mut(), &1f32.to_le_bytes());
        // SAFETY: the stream's context is current, what was allocated lies on its GPU, and `CudaOps`
        // drops the library before the driver.
        unsafe { CublasLt::open(self.stream.cast(), workspace, one) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something unless an earlier thing has failed, and keeps the error.
    fn attempt(
        &self,
        what: &str,
        act: impl FnOnce(&Driver, &mut State) -> Result<(), DriverError>,
    ) {
        let mut state = self.lock();
        if state.failure.is_none() {
            let outcome = self.context.enter().and_then(|()| act(self, &mut state));
            state.failure = outcome.err().map(|error| state.error(what, words(error)));
        }
    }

    /// Copies cannot be recorded: they would read the pinned buffer as it is when they run.
    fn refuse_recording(state: &mut State, what: &str) -> bool {
        if state.is_recording && state.failure.is_none() {
            let reason = "a copy between host and GPU cannot be recorded".to_owned();
            state.failure = Some(CudaError::Device { what: what.to_owned(), reason });
        }
        state.failure.is_some()
    }

    /// A place for `len` bytes in the pinned buffer, whose earlier copies have ended.
    fn pinned_place(&self, state: &mut State, len: usize) -> Result<*mut u8, DriverError> {
        let place = state.ring.take(len);
        if let Some(left) = place.left {
            // SAFETY: stream and events live as long as `self`.
            unsafe {
                result::event::record(self.pinned.events[left], self.stream)?;
                result::event::synchronize(self.pinned.events[place.segment()])?;
            }
        }
        // SAFETY: the ring stays within the buffer.
        Ok(unsafe { self.pinned.start.cast::<u8>().add(place.offset) })
    }

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

    fn try_launch(
        &self,
        state: &mut State,
        (name, launch): (&'static str, Launch),
        args: &[KernelArg<'_>],
    ) -> Result<(), String> {
        self.context.enter().map_err(words)?;
        let kernel = self.kernel(state, name).map_err(words)?;
        check_parameters(&kernel.parameters, args)?;
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
            )
        }
        .map_err(words)
    }

    fn end_capture(&self) -> Result<Graph, DriverError> {
        self.context.enter()?;
        // SAFETY: the stream is being captured; the graph is destroyed once, when a runnable
        // copy of it was made.
        let exec = unsafe {
            let graph = result::stream::end_capture(self.stream)?;
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph)?;
            exec?
        };
        Ok(Graph { exec, context: Arc::clone(&self.context) })
    }
}

impl State {
    /// What failed. Whoever waits learns of kernels that failed before, so the last one is named.
    fn error(&self, what: &str, reason: String) -> CudaError {
        match self.pending {
            Some((kernel, launch, count)) if count > 1 => CudaError::Device {
                what: format!("one of {count} kernels, the last of them {kernel} ({launch})"),
                reason,
            },
            Some((kernel, launch, _)) => {
                CudaError::Kernel { kernel: kernel.to_owned(), launch, reason }
            }
            None => CudaError::Device { what: what.to_owned(), reason },
        }
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

impl Pinned {
    fn new() -> Result<Pinned, DriverError> {
        // SAFETY: the memory is freed once, in `drop` of the driver.
        let start = unsafe { result::malloc_host(NUM_SEGMENTS * SEGMENT_BYTES, 0) }?;
        let mut events = [std::ptr::null_mut(); NUM_SEGMENTS];
        for event in &mut events {
            *event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        }
        Ok(Pinned { start, events })
    }
}

impl Launcher for Driver {
    fn name(&self) -> String {
        format!("{} {}", self.gpu.ordinal, self.gpu.name)
    }

    fn facts(&self) -> DeviceFacts {
        self.gpu.facts
    }

    fn memory(&self) -> Result<DeviceMemoryInfo, CudaError> {
        self.context
            .memory()
            .map_err(|error| self.lock().error("asking for free memory", words(error)))
    }

    fn allocate(&self, dtype: DType, shape: Shape) -> Result<Tensor, CudaError> {
        let bytes = shape.len() * dtype.size_bytes();
        let memory = self.context.allocate(bytes).map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                CudaError::OutOfMemory { bytes, reason: words(error) }
            }
            _ => self.lock().error("allocating memory", words(error)),
        })?;
        let address = memory.address();
        // SAFETY: the owner has as many bytes at this address, aligned to 256, for nobody else.
        Ok(unsafe { Tensor::on_device(address, dtype, shape, Arc::new(memory)) })
    }

    fn clear(&self, mut to: ViewMut<'_>) {
        let bytes = to.as_view().size_bytes();
        self.attempt("clearing memory", |driver, _| {
            // SAFETY: the view is borrowed exclusively and lies on this GPU.
            unsafe {
                result::memset_d8_async(device_address(to.address()), 0, bytes, driver.stream)
            }
        });
    }

    fn upload(&self, mut to: ViewMut<'_>, from: &[u8]) {
        assert_eq!(to.as_view().size_bytes(), from.len(), "upload: bytes");
        if Driver::refuse_recording(&mut self.lock(), "copying to the GPU") {
            return;
        }
        let address = to.address();
        self.attempt("copying to the GPU", |driver, state| {
            for (i, part) in from.chunks(SEGMENT_BYTES).enumerate() {
                let place = driver.pinned_place(state, part.len())?;
                // SAFETY: the place is `part.len()` bytes of pinned memory that no copy reads any
                // more, and the tensor has room for all parts.
                unsafe {
                    place.copy_from_nonoverlapping(part.as_ptr(), part.len());
                    let place = std::slice::from_raw_parts(place, part.len());
                    let to = device_address(address.wrapping_add(i * SEGMENT_BYTES));
                    result::memcpy_htod_async(to, place, driver.stream)?;
                }
            }
            Ok(())
        });
    }

    fn download(&self, to: &mut [u8], from: View<'_>) {
        assert_eq!(from.size_bytes(), to.len(), "download: bytes");
        if Driver::refuse_recording(&mut self.lock(), "copying from the GPU") {
            return;
        }
        self.attempt("copying from the GPU", |driver, state| {
            for (i, part) in to.chunks_mut(SEGMENT_BYTES).enumerate() {
                let place = driver.pinned_place(state, part.len())?;
                // SAFETY: as in `upload`; after waiting the bytes are there.
                unsafe {
                    let place = std::slice::from_raw_parts_mut(place, part.len());
                    let from = device_address(from.address().wrapping_add(i * SEGMENT_BYTES));
                    result::memcpy_dtoh_async(place, from, driver.stream)?;
                    result::stream::synchronize(driver.stream)?;
                    part.copy_from_slice(place);
                }
            }
            state.pending = None;
            Ok(())
        });
    }

    fn copy(&self, mut to: ViewMut<'_>, from: View<'_>) {
        let bytes = from.size_bytes();
        assert_eq!(to.as_view().size_bytes(), bytes, "copy: bytes");
        self.attempt("copying on the GPU", |driver, _| {
            let (to, from) = (device_address(to.address()), device_address(from.address()));
            // SAFETY: both views lie on this GPU, one of them borrowed exclusively.
            unsafe { result::memcpy_dtod_async(to, from, bytes, driver.stream) }
        });
    }

    fn launch(&self, kernel: &'static str, launch: Launch, args: &[KernelArg<'_>]) {
        let mut state = self.lock();
        if state.failure.is_some() {
            return;
        }
        match self.try_launch(&mut state, (kernel, launch), args) {
            Ok(()) => {
                let count = state.pending.map_or(0, |(_, _, count)| count) + 1;
                state.pending = Some((kernel, launch, count));
            }
            Err(reason) => {
                let kernel = kernel.to_owned();
                state.failure = Some(CudaError::Kernel { kernel, launch, reason });
            }
        }
    }

    fn begin_recording(&self) {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.attempt("recording a step", |driver, state| {
            // SAFETY: the stream lives as long as the driver.
            unsafe { result::stream::begin_capture(driver.stream, mode) }?;
            state.is_recording = true;
            Ok(())
        });
    }

    fn end_recording(&self) -> Option<Recording> {
        let mut state = self.lock();
        if !std::mem::take(&mut state.is_recording) {
            return None;
        }
        // Ended even after an error, because the stream would stay in capture.
        let graph = self.end_capture();
        match graph {
            Ok(graph) if state.failure.is_none() => Some(Recording::new(graph)),
            Ok(_) => None,
            Err(error) => {
                let failure = state.error("recording a step", words(error));
                state.failure.get_or_insert(failure);
                None
            }
        }
    }

    fn replay(&self, recording: &Recording) {
        let graph: &Graph = recording.get();
        self.attempt("replaying a step", |driver, _| {
            // SAFETY: graph and stream belong to this driver, and what the graph's kernels read
            // and write outlives it by the contract of recordings.
            unsafe { result::graph::launch(graph.exec, driver.stream) }
        });
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.attempt("waiting for the GPU", |driver, state| {
            // SAFETY: the stream lives as long as the driver.
            unsafe { result::stream::synchronize(driver.stream) }?;
            state.pending = None;
            Ok(())
        });
        self.lock().failure.clone().map_or(Ok(()), Err)
    }
}

impl CudaOps<Driver> {
    /// Operations on the GPU of this number, with these kernels.
    pub fn on_gpu(
        ordinal: usize,
        kernels: &'static [Image],
    ) -> Result<CudaOps<Driver>, Unavailable> {
        let driver = Driver::open(ordinal, kernels)?;
        let library = driver.dense_products();
        let ops = CudaOps::new(driver);
        Ok(match library {
            Some(library) => ops.with_dense_products(Box::new(library)),
            None => ops,
        })
    }
}

fn device_address(address: *const u8) -> sys::CUdeviceptr {
    address.addr() as sys::CUdeviceptr
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        // Errors here would come too late for anyone to act on them.
        // SAFETY: everything was made once in `open`, and nothing of it is used after this.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for event in self.pinned.events {
                let _ = result::event::destroy(event);
            }
            let _ = result::free_host(self.pinned.start);
            let _ = result::stream::destroy(self.stream);
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::launcher::args;
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

    #[test]
    fn an_error_that_comes_late_names_the_last_kernel() {
        let error = |count| {
            let pending = Some(("rms_norm_bf16", Launch::new(2, 64), count));
            let state = State { pending, ..State::default() };
            state.error("waiting for the GPU", "illegal address".to_owned()).to_string()
        };
        assert_eq!(
            error(12),
            "one of 12 kernels, the last of them rms_norm_bf16 (grid [2, 1, 1], block [64, 1, 1], \
             0 bytes of shared memory): illegal address"
        );
        assert!(error(1).starts_with("kernel rms_norm_bf16 (grid [2, 1, 1]"));
    }
}
