//! What CUDA kernels are launched through: a GPU's driver, or the SIMT machine of the tests.
//!
//! Launch code above this seam is the same for both. It names a kernel, says how many threads
//! run it and passes what it takes; tensors are views of device memory, which the host never
//! looks into. Everything runs in the order in which it was asked for; only `download` and
//! `synchronize` wait. The first error is kept: what is asked for after it does nothing, and
//! `synchronize` reports it.

use std::fmt;
use std::marker::PhantomData;

use crate::ops::{DeviceMemoryInfo, OpsError, Recording};
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};

/// How many threads run a kernel, and the shared memory that a block gets beside its static one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Launch {
    /// Blocks and threads along x only.
    pub fn new(blocks: usize, threads: usize) -> Launch {
        Launch { grid: [count(blocks), 1, 1], block: [count(threads), 1, 1], shared_bytes: 0 }
    }

    /// The same with several blocks along y.
    pub fn by(self, blocks: usize) -> Launch {
        Launch { grid: [self.grid[0], count(blocks), self.grid[2]], ..self }
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, bytes: usize) -> Launch {
        Launch { shared_bytes: count(bytes), ..self }
    }

    /// Whether no thread would run.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { grid, block, shared_bytes } = self;
        write!(f, "grid {grid:?}, block {block:?}, {shared_bytes} bytes of shared memory")
    }
}

/// A size as kernels take it.
pub fn count(size: usize) -> u32 {
    u32::try_from(size).expect("sizes of a step fit into 32 bits")
}

/// What kind of parameter a [`KernelArg`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgKind {
    /// An address in device memory, or null.
    Pointer,
    /// `int` or `unsigned`.
    Int32,
    /// `int64_t` or `uint64_t`.
    Int64,
    /// `float`.
    Float32,
}

/// One argument of a kernel by value. Borrows the tensor that it points into.
#[derive(Clone, Copy, Debug)]
pub struct KernelArg<'a> {
    kind: ArgKind,
    bits: u64,
    _borrow: PhantomData<&'a [u8]>,
}

impl KernelArg<'_> {
    fn new(kind: ArgKind, bits: u64) -> Self {
        KernelArg { kind, bits, _borrow: PhantomData }
    }

    /// A pointer that the kernel does not follow.
    pub fn null() -> Self {
        KernelArg::new(ArgKind::Pointer, 0)
    }

    /// Which parameters take it.
    pub fn kind(&self) -> ArgKind {
        self.kind
    }

    /// The same bits without the borrow, for recordings: whoever replays them keeps what they
    /// point to alive.
    pub fn detached(self) -> KernelArg<'static> {
        KernelArg::new(self.kind, self.bits)
    }

    /// Its bits; those of a shorter parameter are the low ones.
    pub fn bits(&self) -> u64 {
        self.bits
    }
}

impl<'a> From<View<'a>> for KernelArg<'a> {
    fn from(view: View<'a>) -> Self {
        KernelArg::new(ArgKind::Pointer, view.address().addr() as u64)
    }
}

impl<'a> From<Option<View<'a>>> for KernelArg<'a> {
    fn from(view: Option<View<'a>>) -> Self {
        view.map_or(KernelArg::null(), KernelArg::from)
    }
}

impl<'a> From<&'a mut ViewMut<'_>> for KernelArg<'a> {
    fn from(view: &'a mut ViewMut<'_>) -> Self {
        KernelArg::new(ArgKind::Pointer, view.address().addr() as u64)
    }
}

impl<'a> From<Option<&'a mut ViewMut<'_>>> for KernelArg<'a> {
    fn from(view: Option<&'a mut ViewMut<'_>>) -> Self {
        view.map_or(KernelArg::null(), KernelArg::from)
    }
}

impl<'a> From<&'a Tensor> for KernelArg<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        KernelArg::from(tensor.view())
    }
}

impl<'a> From<&'a mut Tensor> for KernelArg<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        KernelArg::new(ArgKind::Pointer, tensor.view_mut().address().addr() as u64)
    }
}

impl From<u32> for KernelArg<'_> {
    fn from(value: u32) -> Self {
        KernelArg::new(ArgKind::Int32, u64::from(value))
    }
}

impl From<i32> for KernelArg<'_> {
    fn from(value: i32) -> Self {
        KernelArg::new(ArgKind::Int32, u64::from(value.cast_unsigned()))
    }
}

impl From<u64> for KernelArg<'_> {
    fn from(value: u64) -> Self {
        KernelArg::new(ArgKind::Int64, value)
    }
}

/// A size; panics when it does not fit into 32 bits.
impl From<usize> for KernelArg<'_> {
    fn from(value: usize) -> Self {
        KernelArg::from(count(value))
    }
}

impl From<f32> for KernelArg<'_> {
    fn from(value: f32) -> Self {
        KernelArg::new(ArgKind::Float32, u64::from(value.to_bits()))
    }
}

/// `args![a, b, c]` is `[KernelArg::from(a), KernelArg::from(b), KernelArg::from(c)]`.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$($crate::ops::cuda::launcher::KernelArg::from($arg)),*] };
}
pub(crate) use args;

/// What launch code must know of a device to choose grids and kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Major and minor, for example `(9, 0)`.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most dynamic shared memory of a block (the limit that a kernel may opt into).
    pub shared_bytes_per_block: u32,
}

/// Something failed on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// There is no room.
    #[error("no room for {bytes} more bytes: {reason}")]
    OutOfMemory {
        /// How much was wanted.
        bytes: usize,
        /// The driver's words.
        reason: String,
    },
    /// A kernel could not be launched, or failed.
    #[error("kernel {kernel} ({launch}): {reason}")]
    Kernel {
        /// Its name.
        kernel: String,
        /// How it was launched.
        launch: Launch,
        /// The driver's words.
        reason: String,
    },
    /// One of several launches failed, and it is not known which.
    #[error(
        "{what}: {reason}; at fault is one of what was launched since the GPU was last waited \
         for: {launched} (CUDA_LAUNCH_BLOCKING=1 in the environment and --enforce-eager tell which)"
    )]
    Launched {
        /// What was tried when it was noticed.
        what: String,
        /// The driver's words.
        reason: String,
        /// Names and how often each was launched.
        launched: String,
    },
    /// Anything else.
    #[error("{what}: {reason}")]
    Device {
        /// What was tried.
        what: String,
        /// The driver's words.
        reason: String,
    },
}

impl CudaError {
    /// The same for those who do not know what kind of device it is.
    pub fn of_device(self, device: String) -> OpsError {
        match self {
            CudaError::OutOfMemory { bytes, reason } => {
                OpsError::OutOfMemory { device, bytes, reason }
            }
            other => OpsError::Failed { device, reason: other.to_string() },
        }
    }
}

/// A device that kernels can be launched on. Views are of its memory unless said otherwise.
pub trait Launcher: Send + Sync {
    /// Name for logs, for example `NVIDIA H100`.
    fn name(&self) -> String;

    /// What launch code must know.
    fn facts(&self) -> DeviceFacts;

    /// What memory there is.
    fn memory(&self) -> Result<DeviceMemoryInfo, CudaError>;

    /// A new tensor in device memory, aligned to 256 bytes; its elements are not set.
    fn allocate(&self, dtype: DType, shape: Shape) -> Result<Tensor, CudaError>;

    /// Takes memory in one piece for tensors that will be made, where that is better than taking it
    /// for each.
    fn set_aside(&self, bytes: usize) -> Result<(), CudaError> {
        let _ = bytes;
        Ok(())
    }

    /// Fills a tensor with zero bytes.
    fn clear(&self, to: ViewMut<'_>);

    /// Copies the host's bytes to a tensor of as many; they may change as soon as this returns.
    fn upload(&self, to: ViewMut<'_>, from: &[u8]);

    /// Copies a tensor to the host, once everything before has run. After an error the bytes
    /// are worthless.
    fn download(&self, to: &mut [u8], from: View<'_>);

    /// Copies a tensor to another one of as many bytes.
    fn copy(&self, to: ViewMut<'_>, from: View<'_>);

    /// Runs a kernel; `args` are its parameters in order.
    fn launch(&self, kernel: &'static str, launch: Launch, args: &[KernelArg<'_>]);

    /// Records launches, copies and clears from now on instead of running them.
    fn begin_recording(&self);

    /// Ends a recording; `None` after an error.
    fn end_recording(&self) -> Option<Recording>;

    /// Runs what was recorded, on what lies in its tensors now.
    fn replay(&self, recording: &Recording);

    /// Waits for everything that was asked for.
    fn synchronize(&self) -> Result<(), CudaError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_keep_their_bits_and_kind() {
        let values = [1.5f32, 2.0];
        let view = View::of(&values, [2]);
        let expected = [
            (ArgKind::Pointer, values.as_ptr().addr() as u64),
            (ArgKind::Pointer, 0),
            (ArgKind::Int32, 0xffff_fffe),
            (ArgKind::Int32, 7),
            (ArgKind::Int64, 1 << 40),
            (ArgKind::Float32, 0x3fc0_0000),
        ];
        let args = args![view, None::<View<'_>>, -2i32, 7usize, 1u64 << 40, 1.5f32];
        assert_eq!(args.map(|arg| (arg.kind(), arg.bits())), expected);
    }

    #[test]
    fn an_error_names_kernel_and_launch() {
        let launch = Launch::new(3, 128).by(2).with_shared(1024);
        let error = CudaError::Kernel { kernel: "k".into(), launch, reason: "too many".into() };
        assert_eq!(
            error.to_string(),
            "kernel k (grid [3, 2, 1], block [128, 1, 1], 1024 bytes of shared memory): too many"
        );
    }
}
