//! Memory of the host: aligned, zeroed, on large pages where that pays.

use std::ptr::NonNull;

use super::ALIGNMENT;
use super::large_pages::{LargePages, SMALLEST_BYTES};

/// Owned, aligned, zero-initialised host memory.
pub(super) enum HostAllocation {
    /// The allocator's.
    Heap(Heap),
    /// Part of a mapping.
    Pages(LargePages),
}

impl HostAllocation {
    /// Room for `len_bytes` at [`ALIGNMENT`].
    pub(super) fn zeroed(len_bytes: usize) -> Self {
        HostAllocation::Heap(Heap::zeroed(len_bytes))
    }

    /// As [`HostAllocation::zeroed`], on large pages where there are any and they would help.
    pub(super) fn on_large_pages(len_bytes: usize) -> Self {
        let pages = if len_bytes < SMALLEST_BYTES { None } else { LargePages::zeroed(len_bytes) };
        pages.map_or_else(|| HostAllocation::zeroed(len_bytes), HostAllocation::Pages)
    }

    /// The first aligned byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        match self {
            HostAllocation::Heap(heap) => heap.start(),
            HostAllocation::Pages(pages) => pages.start(),
        }
    }
}

/// Memory of the allocator.
pub(super) struct Heap {
    base: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: the allocation is plain bytes; sharing is governed by the borrows of Tensor.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

impl Heap {
    /// Asked for at the allocator's natural alignment plus room to move up, because only then do
    /// large zeroed blocks come as untouched pages, which cost memory when they are written.
    fn zeroed(len_bytes: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(len_bytes + ALIGNMENT, 16)
            .expect("a tensor is smaller than the address space");
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(base) = NonNull::new(raw) else { std::alloc::handle_alloc_error(layout) };
        Heap { base, layout }
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: the offset is below ALIGNMENT, which was allocated on top.
        unsafe { self.base.add(self.base.align_offset(ALIGNMENT)) }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout and freed once.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Returns to the system what the allocator keeps of memory that was freed. Worth a call once a
/// model is loaded: what its files and matrices passed through would stay for good.
pub fn give_back_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: changes nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
