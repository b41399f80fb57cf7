//! What the threads of one operation share: disjoint parts of outputs, and scratch memory.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::tensor::{DType, Tensor};

/// A mutable slice whose parts go to different tasks.
#[derive(Clone, Copy)]
pub struct Parts<'a, T> {
    ptr: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a part is handed out by an unsafe function whose callers keep parts disjoint, as if
// the slice had been split among the threads.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    /// Borrows `values` for as long as parts are needed.
    pub fn new(values: &'a mut [T]) -> Parts<'a, T> {
        Parts { ptr: values.as_mut_ptr(), len: values.len(), _borrow: PhantomData }
    }

    /// Where a part begins, which must exist.
    #[inline(always)]
    pub fn start_of(&self, range: Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        self.ptr.wrapping_add(range.start)
    }

    /// One part.
    ///
    /// # Safety
    /// Parts that are alive at the same time must not overlap.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        let len = range.len();
        // SAFETY: inside the borrowed slice; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start_of(range), len) }
    }
}

/// Makes what this thread wrote past the caches visible before it says that it is done.
pub fn settle_stores() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every such processor has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Scratch memory that grows to the largest size ever asked for and stays there.
#[derive(Default)]
pub struct Scratch {
    /// f32.
    memory: Option<Tensor>,
}

impl Scratch {
    /// `len` floats with any content, aligned to a cache line.
    pub fn take(&mut self, len: usize) -> &mut [f32] {
        self.reserve(len);
        self.memory.as_mut().map_or(&mut [], |memory| &mut memory.as_mut_slice()[..len])
    }

    /// Makes room for `len` floats without touching it.
    pub fn reserve(&mut self, len: usize) {
        if self.memory.as_ref().is_none_or(|memory| memory.shape().len() < len) {
            self.memory = Some(Tensor::zeros_on_large_pages(DType::F32, [len]));
        }
    }

    /// `len` words with any content, aligned to a cache line.
    pub fn take_words(&mut self, len: usize) -> &mut [u32] {
        let floats = self.take(len);
        // SAFETY: any f32 is a valid u32 of the same size and alignment.
        unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast::<u32>(), len) }
    }

    /// `len` integers with any content, aligned to a cache line.
    pub fn take_ints(&mut self, len: usize) -> &mut [i32] {
        let floats = self.take(len);
        // SAFETY: any f32 is a valid i32 of the same size and alignment.
        unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast::<i32>(), len) }
    }

    /// `len` bytes with any content, aligned to a cache line.
    pub fn take_bytes(&mut self, len: usize) -> &mut [i8] {
        let floats = self.take(len.div_ceil(4));
        // SAFETY: the words of any f32 are four valid i8.
        unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast::<i8>(), len) }
    }
}

/// One `T` per thread of a pool.
pub struct PerThread<T> {
    slots: Vec<Mutex<T>>,
}

impl<T: Default> PerThread<T> {
    /// Empty ones for `threads` threads.
    pub fn new(threads: usize) -> PerThread<T> {
        PerThread { slots: (0..threads).map(|_| Mutex::default()).collect() }
    }

    /// That of a thread; contended only when two callers share the operations.
    pub fn lock(&self, thread: usize) -> MutexGuard<'_, T> {
        self.slots[thread].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
