//! The SIMT machine as a device: `kernels/*.cu` compiled by a C++ compiler, launched by the real
//! launch code.
//!
//! Every kernel file becomes a shared library under the target folder, named after the hash of
//! what it is made of. Device memory is the host's, between guard bytes, poisoned with NaNs; a
//! launch fails when it passes the wrong kinds of arguments, or a pointer to anything else.
//! Fibers run in random order: `TOKENMILL_SIMT_SEED` repeats one, and the name of the device,
//! which is part of what failures print, says which it was.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

pub mod build;
pub mod library;
mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use libloading::Library;
use tokenmill::ops::cuda::launcher::{
    ArgKind, CudaError, DeviceFacts, KernelArg, Launch, Launcher,
};
use tokenmill::ops::{DeviceMemoryInfo, Recording};
use tokenmill::tensor::{DType, Shape, Tensor, View, ViewMut};

use memory::Memory;

/// Chooses the order of fibers when set to a number.
const SEED_VARIABLE: &str = "TOKENMILL_SIMT_SEED";

/// Device memory: as much as a test may take.
const TOTAL_BYTES: u64 = 4 << 30;

/// How a kernel was launched by any shim of this process.
#[derive(Clone, Copy, Debug)]
pub struct Launched {
    /// Most threads of a block.
    pub threads: u32,
    /// Least and most dynamic shared memory of a block.
    pub shared_bytes: [u32; 2],
}

static LAUNCHED: Mutex<BTreeMap<&'static str, Launched>> = Mutex::new(BTreeMap::new());

static KERNELS: LazyLock<BTreeMap<String, Kernel>> = LazyLock::new(|| {
    let libraries = build::kernel_libraries();
    libraries.into_iter().flat_map(Kernel::all_of).collect()
});

/// Kernels of the tests of the machine itself.
static TEST_KERNELS: LazyLock<BTreeMap<String, Kernel>> =
    LazyLock::new(|| build::test_libraries().into_iter().flat_map(Kernel::all_of).collect());

/// The kernels that ranks run at the same time, for each rank.
static RANK_KERNELS: LazyLock<Vec<BTreeMap<String, Kernel>>> = LazyLock::new(|| {
    let libraries = build::copies_of("all_reduce.cu", MAX_RANKS);
    libraries.into_iter().map(|library| Kernel::all_of(library).into_iter().collect()).collect()
});

/// Most ranks of a replica.
const MAX_RANKS: usize = 8;

/// Whether the address sanitizer watches this process.
pub fn has_sanitizer() -> bool {
    memory::has_sanitizer()
}

/// Names of all kernels under `kernels/`.
pub fn exported_kernels() -> BTreeSet<String> {
    KERNELS.keys().cloned().collect()
}

/// The kernels that were launched so far.
pub fn launched_kernels() -> BTreeMap<&'static str, Launched> {
    LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Keeps the books of a launch.
fn note_launch(kernel: &'static str, launch: Launch) {
    let (threads, bytes) = (launch.block.iter().product(), launch.shared_bytes);
    let mut launched = LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner);
    let entry = launched.entry(kernel).or_insert(Launched { threads, shared_bytes: [bytes; 2] });
    let [least, most] = entry.shared_bytes;
    let shared_bytes = [least.min(bytes), most.max(bytes)];
    *entry = Launched { threads: entry.threads.max(threads), shared_bytes };
}

type LaunchFunction = unsafe extern "C" fn(
    index: u32,
    sizes: *const u32,
    shared_bytes: usize,
    arguments: *const *mut c_void,
    seed: u64,
) -> *const c_char;

/// A kernel in a library, of which only one runs at a time.
struct Kernel {
    index: u32,
    signature: String,
    launch: LaunchFunction,
    busy: &'static Mutex<()>,
}

impl Kernel {
    fn all_of(library: Library) -> Vec<(String, Kernel)> {
        // Never unloaded: its code may be running whenever the process ends.
        let library: &'static Library = Box::leak(Box::new(library));
        let busy: &'static Mutex<()> = Box::leak(Box::default());
        type Describe = unsafe extern "C" fn(u32, *mut *const c_char) -> *const c_char;
        // SAFETY: the functions have these types in simt_machine.h, and kernels' names and
        // signatures stay where they are as long as the library.
        unsafe {
            let describe: Describe = *library.get(b"simt_kernel\0").expect("simt_kernel");
            let launch: LaunchFunction = *library.get(b"simt_launch\0").expect("simt_launch");
            let text = |text: *const c_char| CStr::from_ptr(text).to_str().unwrap().to_owned();
            let kernel = |index| {
                let mut signature = std::ptr::null();
                let name = describe(index, &mut signature);
                let found = !name.is_null();
                found.then(|| {
                    (text(name), Kernel { index, signature: text(signature), launch, busy })
                })
            };
            (0..).map_while(kernel).collect()
        }
    }

    /// The machine's words when the launch fails.
    fn run(&self, launch: Launch, args: &[KernelArg<'_>], seed: u64) -> Result<(), String> {
        let letters: String = args.iter().map(letter).collect();
        if letters != self.signature {
            return Err(format!("takes arguments {}, got {letters}", self.signature));
        }
        let mut values: Vec<u64> = args.iter().map(KernelArg::bits).collect();
        let pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let [gx, gy, gz] = launch.grid;
        let [bx, by, bz] = launch.block;
        let sizes = [gx, gy, gz, bx, by, bz];
        let shared_bytes = launch.shared_bytes as usize;
        let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the arguments have the kinds that the kernel takes, and pointers lead into
        // live device memory, as was checked; the error lives until the next launch.
        unsafe {
            let error =
                (self.launch)(self.index, sizes.as_ptr(), shared_bytes, pointers.as_ptr(), seed);
            if error.is_null() {
                return Ok(());
            }
            Err(CStr::from_ptr(error).to_string_lossy().into_owned())
        }
    }
}

fn letter(arg: &KernelArg<'_>) -> char {
    match arg.kind() {
        ArgKind::Pointer => 'p',
        ArgKind::Int32 => 'i',
        ArgKind::Int64 => 'l',
        ArgKind::Float32 => 'f',
    }
}

/// Launches kernels on the SIMT machine.
pub struct Shim {
    seed: u64,
    launches: AtomicU64,
    memory: Memory,
    error: Mutex<Option<CudaError>>,
    /// What was asked for since recording began.
    recorded: Mutex<Option<Vec<Recorded>>>,
    facts: DeviceFacts,
    kernels: &'static BTreeMap<String, Kernel>,
}

/// One thing of a recording, with addresses of device memory.
#[derive(Clone)]
enum Recorded {
    Launch(&'static str, Launch, Vec<KernelArg<'static>>),
    Copy { to: usize, from: usize, bytes: usize },
    Clear { to: usize, bytes: usize },
}

impl Shim {
    /// A device with the limits of an H100 but few multiprocessors, so that work is split over
    /// them as on a large device without taking as long.
    pub fn new() -> Shim {
        Shim::with_kernels(&KERNELS)
    }

    /// A device with the kernels of the tests of the machine itself.
    pub fn with_test_kernels() -> Shim {
        Shim::with_kernels(&TEST_KERNELS)
    }

    /// A device whose kernels run beside those of other ranks. Blocks run one after the other, so
    /// ranks whose blocks wait for each other need the same seed, which gives them one order.
    pub fn of_rank(rank: usize, seed: u64) -> Shim {
        Shim { seed, ..Shim::with_kernels(&RANK_KERNELS[rank]) }
    }

    /// A device with other limits.
    pub fn with_facts(facts: DeviceFacts) -> Shim {
        Shim { facts, ..Shim::new() }
    }

    fn with_kernels(kernels: &'static BTreeMap<String, Kernel>) -> Shim {
        Shim {
            seed: seed(),
            launches: AtomicU64::new(0),
            memory: Memory::default(),
            error: Mutex::new(None),
            recorded: Mutex::new(None),
            facts: DeviceFacts {
                compute_capability: (9, 0),
                multiprocessors: 6,
                shared_bytes_per_block: 227 << 10,
            },
            kernels,
        }
    }

    fn keep(&self, error: CudaError) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    /// Keeps it when a recording is going on; false when it must run now.
    fn records(&self, what: impl FnOnce() -> Recorded) -> bool {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        recorded.as_mut().map(|recorded| recorded.push(what())).is_some()
    }

    /// What the host reads or writes cannot be recorded.
    fn refuses(&self, what: &str) -> bool {
        let recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        if recorded.is_some() {
            let reason = "a copy between host and device cannot be recorded".to_owned();
            self.keep(CudaError::Device { what: what.to_owned(), reason });
        }
        recorded.is_some()
    }

    fn has_failed(&self) -> bool {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn try_launch(&self, name: &str, launch: Launch, args: &[KernelArg<'_>]) -> Result<(), String> {
        let (kernel_name, kernel) =
            self.kernels.get_key_value(name).ok_or("there is no such kernel")?;
        if launch.shared_bytes > self.facts.shared_bytes_per_block {
            return Err("more shared memory than a block may have".into());
        }
        let is_pointer = |arg: &&KernelArg<'_>| arg.kind() == ArgKind::Pointer && arg.bits() != 0;
        for (i, arg) in args.iter().enumerate().filter(|(_, arg)| is_pointer(arg)) {
            let inside = self.memory.contains(arg.bits() as usize);
            inside.then_some(()).ok_or_else(|| format!("argument {i} is not in device memory"))?;
        }
        note_launch(kernel_name, launch);
        let number = self.launches.fetch_add(1, Ordering::Relaxed);
        kernel.run(launch, args, self.seed.wrapping_add(number))?;
        self.memory.check_guards()
    }
}

/// What decides the order of fibers: as the environment says, or at random.
pub fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let given = std::env::var(SEED_VARIABLE).ok();
    let random = || RandomState::new().build_hasher().finish() % 1_000_000;
    given.map_or_else(random, |seed| seed.parse().expect(SEED_VARIABLE))
}

impl Launcher for Shim {
    fn name(&self) -> String {
        format!("SIMT machine, {SEED_VARIABLE}={}", self.seed)
    }

    fn facts(&self) -> DeviceFacts {
        self.facts
    }

    fn memory(&self) -> Result<DeviceMemoryInfo, CudaError> {
        let used = self.memory.used_bytes() as u64;
        Ok(DeviceMemoryInfo { free: TOTAL_BYTES.saturating_sub(used), total: TOTAL_BYTES })
    }

    fn allocate(&self, dtype: DType, shape: Shape) -> Result<Tensor, CudaError> {
        let bytes = shape.len() * dtype.size_bytes();
        let used = self.memory.used_bytes();
        if (used + bytes) as u64 > TOTAL_BYTES {
            let reason = format!("{used} of {TOTAL_BYTES} bytes are in use");
            return Err(CudaError::OutOfMemory { bytes, reason });
        }
        Ok(self.memory.allocate(dtype, shape))
    }

    fn clear(&self, mut to: ViewMut<'_>) {
        let bytes = to.as_view().size_bytes();
        if !self.records(|| Recorded::Clear { to: to.address().addr(), bytes }) {
            memory::bytes_mut(&mut to).fill(0);
        }
    }

    fn upload(&self, mut to: ViewMut<'_>, from: &[u8]) {
        if !self.refuses("an upload") {
            memory::bytes_mut(&mut to).copy_from_slice(from);
        }
    }

    fn download(&self, to: &mut [u8], from: View<'_>) {
        if !self.refuses("a download") {
            to.copy_from_slice(memory::bytes(&from));
        }
    }

    fn copy(&self, mut to: ViewMut<'_>, from: View<'_>) {
        let bytes = from.size_bytes();
        let addresses = (to.address().addr(), from.address().addr());
        if !self.records(|| Recorded::Copy { to: addresses.0, from: addresses.1, bytes }) {
            memory::bytes_mut(&mut to).copy_from_slice(memory::bytes(&from));
        }
    }

    fn launch(&self, kernel: &'static str, launch: Launch, args: &[KernelArg<'_>]) {
        let detached = || args.iter().map(|arg| arg.detached()).collect();
        if self.has_failed() || self.records(|| Recorded::Launch(kernel, launch, detached())) {
            return;
        }
        if let Err(reason) = self.try_launch(kernel, launch, args) {
            self.keep(CudaError::Kernel { kernel: kernel.into(), launch, reason });
        }
    }

    fn begin_recording(&self) {
        *self.recorded.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    fn end_recording(&self) -> Option<Recording> {
        let recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (!self.has_failed()).then(|| Recording::new(recorded))
    }

    fn replay(&self, recording: &Recording) {
        for recorded in recording.get::<Vec<Recorded>>() {
            match recorded {
                Recorded::Launch(kernel, launch, args) => self.launch(kernel, *launch, args),
                &Recorded::Copy { to, from, bytes } => self.memory.copy(to, from, bytes),
                &Recorded::Clear { to, bytes } => self.memory.clear(to, bytes),
            }
        }
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        error.clone().map_or(Ok(()), Err)
    }
}
