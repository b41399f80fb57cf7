//! Memory of the host: aligned, zeroed, on large pages where that pays.

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::ALIGNMENT;

/// Owned, aligned, zero-initialised host memory.
pub(super) struct HostAllocation {
    base: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: the allocation is plain bytes; sharing is governed by the borrows of Tensor.
unsafe impl Send for HostAllocation {}
// SAFETY: as above.
unsafe impl Sync for HostAllocation {}

impl HostAllocation {
    /// Room for `len_bytes` at [`ALIGNMENT`]. Asked for at the allocator's natural alignment
    /// plus room to move up, because only then do large zeroed blocks come as untouched pages:
    /// a KV pool costs memory when it is written, not when it is made.
    pub(super) fn zeroed(len_bytes: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(len_bytes + ALIGNMENT, 16)
            .expect("a tensor is smaller than the address space");
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(base) = NonNull::new(raw) else { std::alloc::handle_alloc_error(layout) };
        HostAllocation { base, layout }
    }

    /// As [`HostAllocation::zeroed`], on large pages where there are any.
    pub(super) fn on_large_pages(len_bytes: usize) -> Self {
        let allocation = HostAllocation::zeroed(len_bytes);
        let start = allocation.start().as_ptr().cast::<MaybeUninit<u8>>();
        // SAFETY: the allocation has as many bytes from its start on, and nobody else uses it yet.
        prefer_large_pages(unsafe { std::slice::from_raw_parts_mut(start, len_bytes) });
        allocation
    }

    /// The first aligned byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        // SAFETY: the offset is below ALIGNMENT, which was allocated on top.
        unsafe { self.base.add(self.base.align_offset(ALIGNMENT)) }
    }
}

impl Drop for HostAllocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout and freed once.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Asks the system for large pages (2 MiB) under memory that is not touched yet, as far as whole
/// ones fit: a core that streams weights looks up five hundred times fewer addresses. Where the
/// system has none to give, nothing changes.
pub fn prefer_large_pages<T>(memory: &mut [MaybeUninit<T>]) {
    const PAGE: usize = 2 << 20;
    #[cfg(target_os = "linux")]
    {
        let start = memory.as_mut_ptr().cast::<u8>();
        let skipped = start.align_offset(PAGE);
        if let Some(rest) = size_of_val(memory).checked_sub(skipped)
            && rest >= PAGE
        {
            let (first, whole) = (start.wrapping_add(skipped).cast(), rest - rest % PAGE);
            // SAFETY: the range lies inside the caller's memory, and the advice changes no byte.
            unsafe { libc::madvise(first, whole, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (memory, PAGE);
}
