//! Tensors as the engine uses them: a dtype, a shape of up to four sizes, and bytes.
//!
//! Activations, packed weights and KV blocks live here. A tensor owns its memory or
//! keeps the owner (a mapped file) alive; views borrow it. Knows nothing of
//! operations, models or files.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of owned tensors in bytes: one cache line, one AVX-512 register.
pub const ALIGNMENT: usize = 64;

/// Element types that a tensor can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// The upper half of an `f32`.
    BF16,
    /// IEEE 754 half precision.
    F16,
    /// Token ids, positions, block ids and slots.
    U32,
    /// Quantized weights.
    I8,
    /// Quantized weights, packed codes.
    U8,
    /// FP8 E4M3, as the KV cache may hold it.
    Fp8,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::I8 | DType::U8 | DType::Fp8 => 1,
        }
    }

    /// Whether elements are floating-point numbers that every operation takes.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::Fp8 => "fp8",
        })
    }
}

/// The bits of an FP8 E4M3 number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Fp8(pub u8);

/// A Rust type that can be read in place from a tensor of its [`DType`].
///
/// # Safety
/// Every bit pattern of `size_of::<Self>()` bytes must be a valid value.
pub unsafe trait Element: Copy + 'static {
    /// The dtype whose elements have this type.
    const DTYPE: DType;
}

// SAFETY: any 4 bytes are a valid f32.
unsafe impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
// SAFETY: any 4 bytes are a valid u32.
unsafe impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
// SAFETY: bf16 is a transparent u16.
unsafe impl Element for half::bf16 {
    const DTYPE: DType = DType::BF16;
}
// SAFETY: f16 is a transparent u16.
unsafe impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}

// SAFETY: any byte is a valid i8.
unsafe impl Element for i8 {
    const DTYPE: DType = DType::I8;
}
// SAFETY: any byte is a valid u8.
unsafe impl Element for u8 {
    const DTYPE: DType = DType::U8;
}
// SAFETY: a transparent u8.
unsafe impl Element for Fp8 {
    const DTYPE: DType = DType::Fp8;
}

/// Up to four sizes, outermost first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    sizes: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The sizes, outermost first.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes[..self.rank]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.sizes().iter().product()
    }

    /// True when some size is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same shape with another outermost size.
    pub fn with_rows(&self, rows: usize) -> Shape {
        let mut shape = *self;
        shape.sizes[0] = rows;
        shape
    }
}

impl From<&[usize]> for Shape {
    fn from(sizes: &[usize]) -> Self {
        assert!((1..=4).contains(&sizes.len()), "a tensor has one to four sizes, got {sizes:?}");
        let mut shape = Shape { sizes: [1; 4], rank: sizes.len() };
        shape.sizes[..sizes.len()].copy_from_slice(sizes);
        shape
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(sizes: [usize; N]) -> Self {
        Shape::from(&sizes[..])
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.sizes())
    }
}

/// Owned, aligned, zero-initialised host memory.
struct HostAllocation {
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
    fn zeroed(len_bytes: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(len_bytes + ALIGNMENT, 16)
            .expect("a tensor is smaller than the address space");
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(base) = NonNull::new(raw) else { std::alloc::handle_alloc_error(layout) };
        HostAllocation { base, layout }
    }

    /// As [`HostAllocation::zeroed`], on large pages where there are any.
    fn on_large_pages(len_bytes: usize) -> Self {
        let allocation = HostAllocation::zeroed(len_bytes);
        let start = allocation.start().as_ptr().cast::<MaybeUninit<u8>>();
        // SAFETY: the allocation has as many bytes from its start on, and nobody else uses it yet.
        prefer_large_pages(unsafe { std::slice::from_raw_parts_mut(start, len_bytes) });
        allocation
    }

    /// The first aligned byte.
    fn start(&self) -> NonNull<u8> {
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

/// A dense, row-major tensor in host memory.
pub struct Tensor {
    ptr: NonNull<u8>,
    dtype: DType,
    shape: Shape,
    writable: bool,
    // Keeps the memory alive; never read.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a tensor is plain bytes; writes need `&mut Tensor` and an unshared owner.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// A new tensor filled with zero bytes.
    pub fn zeros(dtype: DType, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        Tensor::allocated(HostAllocation::zeroed(shape.len() * dtype.size_bytes()), dtype, shape)
    }

    /// As [`Tensor::zeros`], for weights and activations: all of it will be touched, and large
    /// pages make that cheap.
    pub fn zeros_on_large_pages(dtype: DType, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let len_bytes = shape.len() * dtype.size_bytes();
        Tensor::allocated(HostAllocation::on_large_pages(len_bytes), dtype, shape)
    }

    fn allocated(allocation: HostAllocation, dtype: DType, shape: Shape) -> Tensor {
        Tensor {
            ptr: allocation.start(),
            dtype,
            shape,
            writable: true,
            _owner: Arc::new(allocation),
        }
    }

    /// A new tensor holding a copy of `values`; panics when the count does not fit the shape.
    pub fn from_slice<T: Element>(values: &[T], shape: impl Into<Shape>) -> Tensor {
        let mut tensor = Tensor::zeros(T::DTYPE, shape);
        tensor.as_mut_slice::<T>().copy_from_slice(values);
        tensor
    }

    /// A read-only tensor over bytes kept alive by `owner` (a mapped file, a static array).
    /// Returns `None` when the bytes are misaligned for the dtype or their count is wrong.
    pub fn from_shared(
        bytes: &[u8],
        dtype: DType,
        shape: impl Into<Shape>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Option<Tensor> {
        let shape = shape.into();
        let aligned = bytes.as_ptr().align_offset(dtype.size_bytes()) == 0;
        if !aligned || bytes.len() != shape.len() * dtype.size_bytes() {
            return None;
        }
        let ptr = NonNull::from(bytes).cast();
        Some(Tensor { ptr, dtype, shape, writable: false, _owner: owner })
    }

    /// The same elements in memory of their own.
    pub fn to_owned_memory(&self) -> Tensor {
        let copy = Tensor::zeros(self.dtype, self.shape);
        // SAFETY: both have `size_bytes` bytes, and the copy's memory is its own.
        unsafe { copy.ptr.copy_from_nonoverlapping(self.ptr, self.size_bytes()) };
        copy
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Size of the data in bytes.
    pub fn size_bytes(&self) -> usize {
        self.shape.len() * self.dtype.size_bytes()
    }

    /// The whole tensor, borrowed.
    pub fn view(&self) -> View<'_> {
        View { ptr: self.ptr, dtype: self.dtype, shape: self.shape, _borrow: PhantomData }
    }

    /// The bytes of all elements.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the owner keeps `size_bytes` bytes alive, and any byte is a valid u8.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.size_bytes()) }
    }

    /// The whole tensor, mutably borrowed; panics on read-only memory.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        assert!(self.writable, "this tensor lies in read-only memory");
        ViewMut { ptr: self.ptr, dtype: self.dtype, shape: self.shape, _borrow: PhantomData }
    }

    /// The first `rows` rows, mutably borrowed.
    pub fn rows_mut(&mut self, rows: usize) -> ViewMut<'_> {
        self.view_mut().into_rows(0..rows)
    }

    /// The first `rows` rows, borrowed.
    pub fn rows(&self, rows: usize) -> View<'_> {
        self.view().rows(0..rows)
    }

    /// All elements; panics when `T` is not the tensor's dtype.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        self.view().as_slice()
    }

    /// All elements, mutable; panics when `T` is not the tensor's dtype.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        self.view_mut().into_mut_slice()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype, self.shape)
    }
}

/// A borrowed, dense, row-major tensor.
#[derive(Clone, Copy)]
pub struct View<'a> {
    ptr: NonNull<u8>,
    dtype: DType,
    shape: Shape,
    _borrow: PhantomData<&'a [u8]>,
}

// SAFETY: a view is a shared borrow of plain bytes.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl<'a> View<'a> {
    /// A view over a slice.
    pub fn of<T: Element>(values: &'a [T], shape: impl Into<Shape>) -> View<'a> {
        let shape = shape.into();
        assert_eq!(values.len(), shape.len(), "{} values do not fill {shape:?}", values.len());
        View { ptr: NonNull::from(values).cast(), dtype: T::DTYPE, shape, _borrow: PhantomData }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The size at `axis`.
    pub fn size(&self, axis: usize) -> usize {
        self.shape.sizes()[axis]
    }

    /// The same data under another shape of equal length.
    pub fn reshape(self, shape: impl Into<Shape>) -> View<'a> {
        let shape = shape.into();
        assert_eq!(shape.len(), self.shape.len(), "cannot view {:?} as {shape:?}", self.shape);
        View { shape, ..self }
    }

    /// A range of the outermost axis.
    pub fn rows(self, range: Range<usize>) -> View<'a> {
        let (ptr, shape) = narrow(self.ptr, self.dtype, self.shape, &range);
        View { ptr, shape, ..self }
    }

    /// All elements; panics when `T` is not the view's dtype.
    pub fn as_slice<T: Element>(self) -> &'a [T] {
        assert_eq!(T::DTYPE, self.dtype, "read as {} a tensor of {}", T::DTYPE, self.dtype);
        // SAFETY: the borrow covers `shape.len()` aligned elements, and T: Element accepts
        // every bit pattern.
        unsafe { std::slice::from_raw_parts(self.ptr.cast::<T>().as_ptr(), self.shape.len()) }
    }
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "View({} {:?})", self.dtype, self.shape)
    }
}

/// A mutably borrowed, dense, row-major tensor.
pub struct ViewMut<'a> {
    ptr: NonNull<u8>,
    dtype: DType,
    shape: Shape,
    _borrow: PhantomData<&'a mut [u8]>,
}

// SAFETY: a mutable view is an exclusive borrow of plain bytes.
unsafe impl Send for ViewMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for ViewMut<'_> {}

impl<'a> ViewMut<'a> {
    /// A mutable view over a slice.
    pub fn of<T: Element>(values: &'a mut [T], shape: impl Into<Shape>) -> ViewMut<'a> {
        let shape = shape.into();
        assert_eq!(values.len(), shape.len(), "{} values do not fill {shape:?}", values.len());
        ViewMut { ptr: NonNull::from(values).cast(), dtype: T::DTYPE, shape, _borrow: PhantomData }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The size at `axis`.
    pub fn size(&self, axis: usize) -> usize {
        self.shape.sizes()[axis]
    }

    /// A shared view of the same data, for the length of this borrow.
    pub fn as_view(&self) -> View<'_> {
        View { ptr: self.ptr, dtype: self.dtype, shape: self.shape, _borrow: PhantomData }
    }

    /// A shorter mutable borrow of the same data.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { ptr: self.ptr, dtype: self.dtype, shape: self.shape, _borrow: PhantomData }
    }

    /// The same data under another shape of equal length.
    pub fn reshape(self, shape: impl Into<Shape>) -> ViewMut<'a> {
        let shape = shape.into();
        assert_eq!(shape.len(), self.shape.len(), "cannot view {:?} as {shape:?}", self.shape);
        ViewMut { shape, ..self }
    }

    /// A range of the outermost axis.
    pub fn into_rows(self, range: Range<usize>) -> ViewMut<'a> {
        let (ptr, shape) = narrow(self.ptr, self.dtype, self.shape, &range);
        ViewMut { ptr, shape, ..self }
    }

    /// Copies a row of the outermost axis over another one; panics when either is not there.
    pub fn copy_row(&mut self, source: usize, destination: usize) {
        let (from, row) = narrow(self.ptr, self.dtype, self.shape, &(source..source + 1));
        let (to, _) = narrow(self.ptr, self.dtype, self.shape, &(destination..destination + 1));
        // SAFETY: both rows were just checked to lie inside the exclusively borrowed tensor.
        unsafe { from.copy_to(to, row.len() * self.dtype.size_bytes()) }
    }

    /// All elements, mutable; panics when `T` is not the view's dtype.
    pub fn into_mut_slice<T: Element>(self) -> &'a mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "wrote as {} a tensor of {}", T::DTYPE, self.dtype);
        // SAFETY: the exclusive borrow covers `shape.len()` aligned elements, and T: Element
        // accepts every bit pattern.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast::<T>().as_ptr(), self.shape.len()) }
    }
}

fn narrow(
    ptr: NonNull<u8>,
    dtype: DType,
    shape: Shape,
    range: &Range<usize>,
) -> (NonNull<u8>, Shape) {
    let rows = shape.sizes()[0];
    assert!(range.start <= range.end && range.end <= rows, "rows {range:?} of {shape:?}");
    let row_bytes = shape.sizes()[1..].iter().product::<usize>() * dtype.size_bytes();
    // SAFETY: the range was just checked to lie inside the tensor.
    let ptr = unsafe { ptr.add(range.start * row_bytes) };
    (ptr, shape.with_rows(range.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_tensor_share_its_memory() {
        let mut tensor = Tensor::zeros(DType::F32, [4, 3]);
        tensor.view_mut().into_rows(1..2).into_mut_slice::<f32>().fill(7.0);
        let expected = [0., 0., 0., 7., 7., 7., 0., 0., 0., 0., 0., 0.];
        assert_eq!(tensor.as_slice::<f32>(), expected);
        assert_eq!(tensor.view().rows(1..3).as_slice::<f32>(), &expected[3..9]);
    }

    #[test]
    #[should_panic(expected = "read as u32 a tensor of f32")]
    fn reading_with_the_wrong_type_panics() {
        Tensor::zeros(DType::F32, [1]).as_slice::<u32>();
    }

    #[test]
    fn misaligned_shared_bytes_are_refused() {
        let bytes: Arc<Vec<u8>> = Arc::new(vec![0; 9]);
        let offset = usize::from(bytes.as_ptr().align_offset(4) == 0);
        let slice = &bytes[offset..offset + 4];
        let misaligned = slice.as_ptr().align_offset(4) != 0;
        let owner: Arc<dyn Any + Send + Sync> = bytes.clone();
        assert_eq!(Tensor::from_shared(slice, DType::F32, [1], owner).is_none(), misaligned);
    }
}
