//! Memory on large pages (2 MiB), where the system has any: a core that streams weights looks up
//! five hundred times fewer addresses.
//!
//! A large page has to lie wholly in one mapping, so tensors share mappings: each begins where the
//! last one ended. If each began at a page of its own, their first bytes would all meet in the
//! same sets of a cache, and the end of every last page would be lost.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapMut, MmapOptions};

use super::ALIGNMENT;

/// Bytes of a large page.
const PAGE_BYTES: usize = 2 << 20;
/// Bytes of a mapping that tensors share; a larger one gets its own.
const SHARED_BYTES: usize = 64 << 20;
/// What is smaller lies with everything else that is small.
pub(super) const SMALLEST_BYTES: usize = 256 << 10;

/// The mapping that tensors are taken from at present.
static CURRENT: Mutex<Option<Shared>> = Mutex::new(None);

/// A mapping, and how much of it is taken. Nothing is taken twice, so whatever is taken is zero.
struct Shared {
    mapping: Arc<Mapping>,
    taken: usize,
}

impl Shared {
    fn new() -> Option<Shared> {
        Some(Shared { mapping: Arc::new(Mapping::new(SHARED_BYTES)?), taken: 0 })
    }

    /// The next `len` bytes, if there are so many.
    fn take(&mut self, len: usize) -> Option<LargePages> {
        let start = self.taken.next_multiple_of(ALIGNMENT);
        let end = start + len;
        (end <= SHARED_BYTES).then(|| {
            self.taken = end;
            LargePages { mapping: self.mapping.clone(), start, len }
        })
    }
}

/// Zeroed memory of one tensor in a mapping.
pub(super) struct LargePages {
    mapping: Arc<Mapping>,
    start: usize,
    len: usize,
}

impl LargePages {
    /// `len` bytes at [`ALIGNMENT`]; `None` where the system maps none.
    pub(super) fn zeroed(len: usize) -> Option<LargePages> {
        if len > SHARED_BYTES {
            return Some(LargePages { mapping: Arc::new(Mapping::new(len)?), start: 0, len });
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = current.as_mut().and_then(|shared| shared.take(len)) {
            return Some(memory);
        }
        current.insert(Shared::new()?).take(len)
    }

    /// The first byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        // SAFETY: `start` is at most the mapping's length.
        unsafe { self.mapping.first.add(self.start) }
    }
}

impl Drop for LargePages {
    fn drop(&mut self) {
        // The others stay; whole pages of this one go back to the system at once.
        if Arc::strong_count(&self.mapping) > 1 {
            self.mapping.give_back(self.start, self.len);
        }
    }
}

/// Zeroed memory of the system, from the first large page in it on.
struct Mapping {
    memory: MmapMut,
    first: NonNull<u8>,
    /// Bytes before the first large page.
    skipped: usize,
}

// SAFETY: plain bytes; who may read and write them is governed by the borrows of tensors.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// At least `len` bytes.
    fn new(len: usize) -> Option<Mapping> {
        let mut memory = MmapOptions::new().len(len + PAGE_BYTES).map_anon().ok()?;
        let base = memory.as_mut_ptr();
        let skipped = base.align_offset(PAGE_BYTES);
        #[cfg(target_os = "linux")]
        {
            // Where the system has no large pages to give, nothing changes.
            let whole = len.next_multiple_of(PAGE_BYTES).min(len + PAGE_BYTES - skipped);
            let _ = memory.advise_range(memmap2::Advice::HugePage, skipped, whole);
        }
        let first = NonNull::new(base.wrapping_add(skipped))?;
        Some(Mapping { memory, first, skipped })
    }

    /// Returns the pages that lie wholly in these bytes, which nobody reads any more.
    fn give_back(&self, start: usize, len: usize) {
        #[cfg(target_os = "linux")]
        {
            const SMALL_PAGE: usize = 4096;
            let first = start.next_multiple_of(SMALL_PAGE);
            let end = (start + len) / SMALL_PAGE * SMALL_PAGE;
            if first < end {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                let (first, len) = (self.skipped + first, end - first);
                // SAFETY: the bytes belonged to a tensor that is gone.
                let _ = unsafe { self.memory.unchecked_advise_range(advice, first, len) };
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(memory: &mut LargePages) -> &mut [u8] {
        // SAFETY: the memory is zeroed, and borrowed as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(memory.start().as_ptr(), memory.len) }
    }

    #[test]
    fn memory_is_aligned_zeroed_and_nobody_elses() {
        let sizes = [SMALLEST_BYTES + 1, 3 << 20, SHARED_BYTES, SHARED_BYTES + 1, 40 << 20];
        let mut all: Vec<_> = sizes.map(|len| LargePages::zeroed(len).unwrap()).into();
        for (i, memory) in all.iter_mut().enumerate() {
            let bytes = bytes(memory);
            assert!(bytes.as_ptr().align_offset(ALIGNMENT) == 0);
            assert!(bytes.iter().all(|&byte| byte == 0), "size {i}");
            bytes.fill(i as u8 + 1);
        }
        for (i, memory) in all.iter_mut().enumerate() {
            assert!(bytes(memory).iter().all(|&byte| byte == i as u8 + 1), "size {i}");
        }
    }

    #[test]
    fn what_one_gives_back_leaves_its_neighbours_as_they_are() {
        let mut all: Vec<_> = (0..6).map(|_| LargePages::zeroed(5_000_001).unwrap()).collect();
        for memory in &mut all {
            bytes(memory).fill(7);
        }
        all.remove(4);
        all.remove(1);
        for memory in &mut all {
            assert!(bytes(memory).iter().all(|&byte| byte == 7));
        }
        let mut later = LargePages::zeroed(5_000_001).unwrap();
        assert!(bytes(&mut later).iter().all(|&byte| byte == 0));
    }
}
