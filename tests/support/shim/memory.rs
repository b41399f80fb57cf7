//! Device memory of the SIMT machine: the host's, between guards, and watched.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use tokenmill::tensor::{DType, Shape, Tensor, View, ViewMut};

/// Before and behind every allocation; as far as any kernel's load reaches.
const GUARD_BYTES: usize = 256;
const GUARD: u8 = 0xa5;
/// What nobody wrote: NaN in every float dtype, and an index beyond everything.
const POISON: u8 = 0xff;
/// As CUDA's allocator gives.
const ALIGNMENT: usize = 256;

/// All live allocations, by the address of their first byte.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<BTreeMap<usize, usize>>>);

impl Memory {
    /// A poisoned tensor.
    pub fn allocate(&self, dtype: DType, shape: Shape) -> Tensor {
        let allocation = Allocation::new(shape.len() * dtype.size_bytes(), self.clone());
        let start = allocation.start();
        self.lock().insert(start.addr().get(), allocation.len_bytes);
        // SAFETY: the allocation has the bytes for it, aligned, and is its own.
        unsafe { Tensor::on_device(start, dtype, shape, Arc::new(allocation)) }
    }

    /// Whether an address lies in an allocation, or just behind it (an empty part of it).
    pub fn contains(&self, address: usize) -> bool {
        let memory = self.lock();
        let before = memory.range(..=address).next_back();
        before.is_some_and(|(start, len_bytes)| address <= start + len_bytes)
    }

    /// Bytes of all live allocations.
    pub fn used_bytes(&self) -> usize {
        self.lock().values().sum()
    }

    /// Copies bytes from one allocation to another, both checked to be there.
    pub fn copy(&self, to: usize, from: usize, bytes: usize) {
        let [to, from] = [to, from].map(|address| self.pointer(address, bytes));
        // SAFETY: both ranges lie in live allocations; `copy` allows them to overlap.
        unsafe { to.copy_from(from, bytes) }
    }

    /// Fills bytes of an allocation with zeros.
    pub fn clear(&self, to: usize, bytes: usize) {
        // SAFETY: the range lies in a live allocation.
        unsafe { self.pointer(to, bytes).write_bytes(0, bytes) }
    }

    fn pointer(&self, address: usize, bytes: usize) -> *mut u8 {
        assert!(self.contains(address) && self.contains(address + bytes), "not device memory");
        std::ptr::with_exposed_provenance_mut(address)
    }

    /// Names an allocation that was written beyond its ends.
    pub fn check_guards(&self) -> Result<(), String> {
        for (&start, &len_bytes) in &*self.lock() {
            if !guards_are_whole(start, len_bytes) {
                return Err(format!("wrote beyond the ends of {len_bytes} bytes of device memory"));
            }
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn guards_are_whole(start: usize, len_bytes: usize) -> bool {
    if SANITIZER.is_some() {
        return true; // It stops at the first byte that is touched.
    }
    let guard = |address: usize| {
        let guard = std::ptr::with_exposed_provenance::<[u8; GUARD_BYTES]>(address);
        // SAFETY: there is a guard at both ends of every live allocation.
        unsafe { *guard == [GUARD; GUARD_BYTES] }
    };
    guard(start - GUARD_BYTES) && guard(start + len_bytes)
}

/// The host's memory under a tensor.
struct Allocation {
    base: NonNull<u8>,
    len_bytes: usize,
    memory: Memory,
}

// SAFETY: plain bytes, which the borrows of the tensor govern.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(len_bytes: usize, memory: Memory) -> Allocation {
        // SAFETY: the layout has a size, and all of it is filled at once.
        let base = unsafe {
            let base = NonNull::new(std::alloc::alloc(layout(len_bytes))).expect("there is memory");
            base.write_bytes(GUARD, layout(len_bytes).size());
            base.add(GUARD_BYTES).write_bytes(POISON, len_bytes);
            base
        };
        base.as_ptr().expose_provenance();
        let allocation = Allocation { base, len_bytes, memory };
        if let Some(sanitizer) = &*SANITIZER {
            // SAFETY: both guards are this allocation's.
            unsafe {
                (sanitizer.poison)(base.as_ptr().cast(), GUARD_BYTES);
                (sanitizer.poison)(allocation.start().add(len_bytes).as_ptr().cast(), GUARD_BYTES);
            }
        }
        allocation
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: the guard before it was allocated.
        unsafe { self.base.add(GUARD_BYTES) }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.memory.lock().remove(&self.start().addr().get());
        let size = layout(self.len_bytes).size();
        if let Some(sanitizer) = &*SANITIZER {
            // SAFETY: the whole allocation is this one's.
            unsafe { (sanitizer.unpoison)(self.base.as_ptr().cast(), size) }
        }
        // SAFETY: allocated with this layout and freed once.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), layout(self.len_bytes)) }
    }
}

fn layout(len_bytes: usize) -> Layout {
    Layout::from_size_align(len_bytes + 2 * GUARD_BYTES, ALIGNMENT).expect("tests are small")
}

/// The address sanitizer of a process that was started with it.
struct Sanitizer {
    poison: unsafe extern "C" fn(*const c_void, usize),
    unpoison: unsafe extern "C" fn(*const c_void, usize),
}

static SANITIZER: LazyLock<Option<Sanitizer>> = LazyLock::new(|| {
    let process = libloading::os::unix::Library::this();
    // SAFETY: the functions have these types in sanitizer/asan_interface.h.
    unsafe {
        Some(Sanitizer {
            poison: *process.get(b"__asan_poison_memory_region\0").ok()?,
            unpoison: *process.get(b"__asan_unpoison_memory_region\0").ok()?,
        })
    }
});

/// Whether a sanitizer watches this process.
pub fn has_sanitizer() -> bool {
    SANITIZER.is_some()
}

/// The bytes of a tensor of this device.
pub fn bytes<'a>(view: &View<'a>) -> &'a [u8] {
    let len_bytes = view.shape().len() * view.dtype().size_bytes();
    // SAFETY: this device's memory is the host's, and the view borrows it.
    unsafe { std::slice::from_raw_parts(view.address(), len_bytes) }
}

/// As [`bytes`], to write.
pub fn bytes_mut<'a>(view: &'a mut ViewMut<'_>) -> &'a mut [u8] {
    let len_bytes = view.shape().len() * view.dtype().size_bytes();
    // SAFETY: this device's memory is the host's, and the view borrows it exclusively.
    unsafe { std::slice::from_raw_parts_mut(view.address(), len_bytes) }
}
