//! The real launcher: NVIDIA's driver, opened at run time, so that one binary starts with or
//! without a GPU.
//!
//! | file | what |
//! |---|---|
//! | `context` | GPUs found, described and opened; their memory |
//! | `arena` | how that memory is cut into tensors |
//! | `kernels` | kernels by their names, and launches of them |
//! | `pinned` | where bytes wait on the host for a copy |
//! | `pending` | what runs and may fail yet |
//! | `products` | a library's products, counted |
//! | `unavailable` | why a GPU cannot be used |
//!
//! Everything runs on one stream, in order. A kernel is looked up by its name once; then the
//! driver says what parameters it takes, and a launch with others is an error, not a read of
//! wild memory. What the host sends or reads goes through pinned memory, so that an upload does
//! not wait. The first error is kept with the kernel, the launch and the driver's words; what
//! is asked for after it does nothing. A fault of a running kernel is noticed later, by whatever
//! is asked for next: that error names all kernels that may have been at fault. With
//! `CUDA_LAUNCH_BLOCKING=1` in the environment the driver waits after every launch, and the error
//! names one.

mod arena;
mod context;
mod kernels;
mod pending;
mod pinned;
mod products;
mod unavailable;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::cublas::{CublasLt, WORKSPACE_BYTES};
use super::launcher::{CudaError, DeviceFacts, KernelArg, Launch, Launcher};
use super::{CudaOps, Image};
use crate::ops::{DeviceMemoryInfo, Recording};
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};
use arena::Arena;
use context::{Context, refused, words};
pub use context::{Gpu, Survey};
use kernels::Kernel;
use pending::{Pending, is_of_earlier_work};
use pinned::{NUM_SEGMENTS, Ring, SEGMENT_BYTES};
use products::Counted;
pub use unavailable::Unavailable;

/// A GPU that is ready to launch our kernels.
pub struct Driver {
    gpu: Gpu,
    context: Arc<Context>,
    /// One per file of kernels.
    modules: Vec<sys::CUmodule>,
    stream: sys::CUstream,
    pinned: Pinned,
    /// Whether every launch waits until its kernel has run.
    is_blocking: bool,
    /// Products that a library was asked for, on our stream.
    num_products: Arc<AtomicU64>,
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
    arena: Arena,
    failure: Option<CudaError>,
    /// What nobody has waited for.
    pending: Pending,
    /// Products of the library that are among `pending`, or ran before.
    counted_products: u64,
    /// What was launched since a recording began.
    recording: Option<Pending>,
}

/// The pinned buffer and the events that say when a segment's copies have ended.
struct Pinned {
    start: *mut c_void,
    events: [sys::CUevent; NUM_SEGMENTS],
}

/// A recorded step, ready to run again.
struct Graph {
    exec: sys::CUgraphExec,
    launched: Pending,
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
        // NVIDIA's driver reads it too, when it is started.
        let is_blocking = std::env::var("CUDA_LAUNCH_BLOCKING").is_ok_and(|value| value == "1");
        Ok(Driver {
            gpu,
            context,
            modules,
            stream,
            pinned,
            is_blocking,
            num_products: Arc::default(),
            state: Mutex::default(),
        })
    }

    /// cuBLASLt on this GPU, where it is installed and there is room for it.
    fn dense_products(&self) -> Option<Counted> {
        self.context.enter().ok()?;
        let workspace = self.allocate(DType::U8, Shape::from([WORKSPACE_BYTES])).ok()?;
        let mut one = self.allocate(DType::F32, Shape::from([1])).ok()?;
        self.upload(one.view_mut(), &1f32.to_le_bytes());
        // SAFETY: the stream's context is current, what was allocated lies on its GPU, and `CudaOps`
        // drops the library before the driver.
        let library = unsafe { CublasLt::open(self.stream.cast(), workspace, one) }?;
        Some(Counted { library, num_products: Arc::clone(&self.num_products) })
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
            let failure = outcome.err().map(|error| self.error(&mut state, what, error));
            state.failure = failure;
        }
    }

    /// Everything that was asked for has run.
    fn has_run(&self, state: &mut State) {
        state.pending.clear();
        state.counted_products = self.num_products.load(Ordering::Relaxed);
    }

    fn allocation_error(&self, state: &mut State, bytes: usize, error: DriverError) -> CudaError {
        match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                CudaError::OutOfMemory { bytes, reason: words(error) }
            }
            _ => self.error(state, "allocating memory", error),
        }
    }

    /// Puts the library's latest products among what is pending, or recorded.
    fn count_products(&self, state: &mut State) {
        let products = self.num_products.load(Ordering::Relaxed);
        let new = products - std::mem::replace(&mut state.counted_products, products);
        state.launched().count("a product of cuBLASLt", new);
    }

    /// What failed, and whose fault it may be.
    fn error(&self, state: &mut State, what: &str, error: DriverError) -> CudaError {
        self.count_products(state);
        state.error(what, error)
    }

    /// Copies cannot be recorded: they would read the pinned buffer as it is when they run.
    fn refuse_recording(state: &mut State, what: &str) -> bool {
        if state.recording.is_some() && state.failure.is_none() {
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

    fn end_capture(&self, launched: Pending) -> Result<Graph, DriverError> {
        self.context.enter()?;
        // SAFETY: the stream is being captured; the graph is destroyed once, when a runnable
        // copy of it was made.
        let exec = unsafe {
            let graph = result::stream::end_capture(self.stream)?;
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph)?;
            exec?
        };
        Ok(Graph { exec, launched, context: Arc::clone(&self.context) })
    }
}

impl State {
    /// Where launches are noted.
    fn launched(&mut self) -> &mut Pending {
        self.recording.as_mut().unwrap_or(&mut self.pending)
    }

    /// What failed. Who waits learns of kernels that failed before, and one that may not have
    /// been at fault is not named alone.
    fn error(&self, what: &str, error: DriverError) -> CudaError {
        let (what, reason) = (what.to_owned(), words(error));
        if !is_of_earlier_work(error) || self.pending.is_empty() {
            return CudaError::Device { what, reason };
        }
        match self.pending.only() {
            Some((kernel, launch)) => {
                CudaError::Kernel { kernel: kernel.to_owned(), launch, reason }
            }
            None => CudaError::Launched { what, reason, launched: self.pending.to_string() },
        }
    }
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
        let mut state = self.lock();
        state.arena.give_back();
        let memory = self.context.memory();
        memory.map_err(|error| self.error(&mut state, "asking for free memory", error))
    }

    fn allocate(&self, dtype: DType, shape: Shape) -> Result<Tensor, CudaError> {
        let bytes = shape.len() * dtype.size_bytes();
        let mut state = self.lock();
        let cut = state.arena.allocate(&self.context, bytes);
        let (address, memory) =
            cut.map_err(|error| self.allocation_error(&mut state, bytes, error))?;
        // SAFETY: the memory has as many bytes at this address, aligned to 256, for nobody else.
        Ok(unsafe { Tensor::on_device(address, dtype, shape, memory) })
    }

    fn set_aside(&self, bytes: usize) -> Result<(), CudaError> {
        let mut state = self.lock();
        let taken = state.arena.set_aside(&self.context, bytes);
        taken.map_err(|error| self.allocation_error(&mut state, bytes, error))
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
                driver.has_run(state);
            }
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
            Ok(()) => state.launched().add(kernel, launch),
            Err(error) => {
                let failure = self.launch_error(&mut state, (kernel, launch), error);
                state.failure = Some(failure);
            }
        }
    }

    fn begin_recording(&self) {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.attempt("recording a step", |driver, state| {
            // SAFETY: the stream lives as long as the driver.
            unsafe { result::stream::begin_capture(driver.stream, mode) }?;
            driver.count_products(state);
            state.recording = Some(Pending::default());
            Ok(())
        });
    }

    fn end_recording(&self) -> Option<Recording> {
        let mut state = self.lock();
        self.count_products(&mut state);
        let launched = state.recording.take()?;
        // Ended even after an error, because the stream would stay in capture.
        let graph = self.end_capture(launched);
        match graph {
            Ok(graph) if state.failure.is_none() => Some(Recording::new(graph)),
            Ok(_) => None,
            Err(error) => {
                let failure = self.error(&mut state, "recording a step", error);
                state.failure.get_or_insert(failure);
                None
            }
        }
    }

    fn replay(&self, recording: &Recording) {
        let graph: &Graph = recording.get();
        self.attempt("replaying a step", |driver, state| {
            // SAFETY: graph and stream belong to this driver, and what the graph's kernels read
            // and write outlives it by the contract of recordings.
            unsafe { result::graph::launch(graph.exec, driver.stream) }?;
            state.pending.add_all(&graph.launched);
            Ok(())
        });
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.attempt("waiting for the GPU", |driver, state| {
            // SAFETY: the stream lives as long as the driver.
            unsafe { result::stream::synchronize(driver.stream) }?;
            driver.has_run(state);
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
