//! Tensors as the engine uses them: a dtype, a shape of up to four sizes, and bytes.
//!
//! Activations, packed weights and KV blocks live here. A tensor owns its memory or
//! keeps the owner (a mapped file, a device's allocation) alive; views borrow it. What lies in
//! a device's memory has an address like any other, but only that device's operations may use
//! it: whoever asks for its elements here is stopped. Knows nothing of operations, models or
//! files.

mod dtype;
mod large_pages;
mod memory;

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

pub use dtype::{DType, Element, Fp8};
use memory::HostAllocation;
pub use memory::give_back_freed;

/// Alignment of owned tensors in bytes: one cache line, one AVX-512 register.
pub const ALIGNMENT: usize = 64;

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

/// Whose memory holds the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The host's, which everyone reads.
    Host,
    /// A device's, which its operations alone read.
    Device,
}

impl Place {
    /// Panics unless the host can read and write here.
    #[track_caller]
    fn check_host(self, dtype: DType, shape: Shape) {
        let here = self == Place::Host;
        assert!(here, "the host reaches for a tensor {dtype} {shape:?} in device memory");
    }
}

/// A dense, row-major tensor.
pub struct Tensor {
    ptr: NonNull<u8>,
    dtype: DType,
    shape: Shape,
    writable: bool,
    place: Place,
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
            place: Place::Host,
            _owner: Arc::new(allocation),
        }
    }

    /// A tensor in a device's memory, for operations of that device alone.
    ///
    /// # Safety
    /// From `address` on, `owner` keeps alive as many bytes of device memory as the dtype and
    /// the shape need, for nobody else, aligned for the dtype.
    pub unsafe fn on_device(
        address: NonNull<u8>,
        dtype: DType,
        shape: impl Into<Shape>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Tensor {
        let (shape, place) = (shape.into(), Place::Device);
        Tensor { ptr: address, dtype, shape, writable: true, place, _owner: owner }
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
        Some(Tensor { ptr, dtype, shape, writable: false, place: Place::Host, _owner: owner })
    }

    /// The same elements in memory of their own, the host's.
    pub fn to_owned_memory(&self) -> Tensor {
        self.place.check_host(self.dtype, self.shape);
        let copy = Tensor::zeros(self.dtype, self.shape);
        // SAFETY: both have `size_bytes` bytes, and the copy's memory is its own.
        unsafe { copy.ptr.copy_from_nonoverlapping(self.ptr, self.size_bytes()) };
        copy
    }

    /// The same elements under another shape; panics when their number differs.
    pub fn reshaped(self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        assert_eq!(shape.len(), self.shape.len(), "{:?} as {shape:?}", self.shape);
        Tensor { shape, ..self }
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

    /// Whether only a device's operations can read it.
    pub fn is_on_device(&self) -> bool {
        self.place == Place::Device
    }

    /// The whole tensor, borrowed.
    pub fn view(&self) -> View<'_> {
        let &Tensor { ptr, dtype, shape, place, .. } = self;
        View { ptr, dtype, shape, place, _borrow: PhantomData }
    }

    /// The bytes of all elements; panics when they lie in device memory.
    pub fn bytes(&self) -> &[u8] {
        self.place.check_host(self.dtype, self.shape);
        // SAFETY: the owner keeps `size_bytes` bytes alive, and any byte is a valid u8.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.size_bytes()) }
    }

    /// The whole tensor, mutably borrowed; panics on read-only memory.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        assert!(self.writable, "this tensor lies in read-only memory");
        let &mut Tensor { ptr, dtype, shape, place, .. } = self;
        ViewMut { ptr, dtype, shape, place, _borrow: PhantomData }
    }

    /// The first `rows` rows, mutably borrowed.
    pub fn rows_mut(&mut self, rows: usize) -> ViewMut<'_> {
        self.view_mut().into_rows(0..rows)
    }

    /// The first elements as a tensor of this shape, mutably borrowed.
    pub fn front_mut(&mut self, shape: impl Into<Shape>) -> ViewMut<'_> {
        let (shape, len) = (shape.into(), self.shape.len());
        self.view_mut().reshape([len]).into_rows(0..shape.len()).reshape(shape)
    }

    /// The first `rows` rows, borrowed.
    pub fn rows(&self, rows: usize) -> View<'_> {
        self.view().rows(0..rows)
    }

    /// All elements; panics when `T` is not the tensor's dtype, or when they lie in device memory.
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
    place: Place,
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
        let (ptr, place) = (NonNull::from(values).cast(), Place::Host);
        View { ptr, dtype: T::DTYPE, shape, place, _borrow: PhantomData }
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

    /// Where the elements lie, on the host or on a device.
    pub fn address(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    /// Whether only a device's operations can read it.
    pub fn is_on_device(&self) -> bool {
        self.place == Place::Device
    }

    /// Size of the data in bytes.
    pub fn size_bytes(&self) -> usize {
        self.shape.len() * self.dtype.size_bytes()
    }

    /// The bytes of all elements; panics when they lie in device memory.
    pub fn bytes(self) -> &'a [u8] {
        self.place.check_host(self.dtype, self.shape);
        // SAFETY: the borrow covers as many bytes, and any byte is a valid u8.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.size_bytes()) }
    }

    /// All elements; panics when `T` is not the view's dtype, or when they lie in device memory.
    pub fn as_slice<T: Element>(self) -> &'a [T] {
        self.place.check_host(self.dtype, self.shape);
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
    place: Place,
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
        let (ptr, place) = (NonNull::from(values).cast(), Place::Host);
        ViewMut { ptr, dtype: T::DTYPE, shape, place, _borrow: PhantomData }
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
        let &ViewMut { ptr, dtype, shape, place, .. } = self;
        View { ptr, dtype, shape, place, _borrow: PhantomData }
    }

    /// A shared view of the same data, which nobody writes to any more.
    pub fn into_view(self) -> View<'a> {
        let ViewMut { ptr, dtype, shape, place, .. } = self;
        View { ptr, dtype, shape, place, _borrow: PhantomData }
    }

    /// A shorter mutable borrow of the same data.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        let &mut ViewMut { ptr, dtype, shape, place, .. } = self;
        ViewMut { ptr, dtype, shape, place, _borrow: PhantomData }
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

    /// Where the elements lie, on the host or on a device.
    pub fn address(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Whether only a device's operations can read and write it.
    pub fn is_on_device(&self) -> bool {
        self.place == Place::Device
    }

    /// Copies the elements of a view of the same dtype and shape; panics when either tensor lies
    /// in device memory.
    pub fn copy_from(&mut self, from: View<'_>) {
        assert_eq!((from.dtype, from.shape), (self.dtype, self.shape), "copy: dtype and shape");
        self.place.check_host(self.dtype, self.shape);
        let bytes = from.bytes();
        // SAFETY: both have this many bytes, and ours are borrowed exclusively.
        unsafe { self.ptr.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) }
    }

    /// Copies a row of the outermost axis over another one; panics when either is not there.
    pub fn copy_row(&mut self, source: usize, destination: usize) {
        self.place.check_host(self.dtype, self.shape);
        let (from, row) = narrow(self.ptr, self.dtype, self.shape, &(source..source + 1));
        let (to, _) = narrow(self.ptr, self.dtype, self.shape, &(destination..destination + 1));
        // SAFETY: both rows were just checked to lie inside the exclusively borrowed tensor.
        unsafe { from.copy_to(to, row.len() * self.dtype.size_bytes()) }
    }

    /// Two rows of the outermost axis, one to read and one to write; panics when either is not
    /// there or both are the same.
    pub fn two_rows(&mut self, read: usize, write: usize) -> (View<'_>, ViewMut<'_>) {
        assert_ne!(read, write, "two rows of {:?}", self.shape);
        let &mut ViewMut { dtype, place, .. } = self;
        let (from, shape) = narrow(self.ptr, dtype, self.shape, &(read..read + 1));
        let (to, _) = narrow(self.ptr, dtype, self.shape, &(write..write + 1));
        let from = View { ptr: from, dtype, shape, place, _borrow: PhantomData };
        (from, ViewMut { ptr: to, dtype, shape, place, _borrow: PhantomData })
    }

    /// All elements, mutable; panics when `T` is not the view's dtype, or when they lie in device
    /// memory.
    pub fn into_mut_slice<T: Element>(self) -> &'a mut [T] {
        self.place.check_host(self.dtype, self.shape);
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

    /// A tensor that claims to lie in device memory; its bytes are the host's all the same.
    fn device_tensor() -> Tensor {
        let memory = Arc::new(Tensor::zeros(DType::F32, [4, 3]));
        // SAFETY: the owner has as many bytes, and nobody else uses them.
        unsafe { Tensor::on_device(memory.ptr, DType::F32, [4, 3], memory) }
    }

    #[test]
    fn device_memory_is_addressed_in_rows_but_not_read() {
        let mut tensor = device_tensor();
        let base = tensor.view().address();
        assert_eq!(tensor.view().rows(1..3).address().addr(), base.addr() + 12);
        assert!(tensor.rows_mut(2).into_rows(1..2).as_view().reshape([3]).is_on_device());
        let reads: [fn(&mut Tensor); 5] = [
            |t| assert!(t.bytes().is_empty()),
            |t| assert!(t.rows(4).as_slice::<f32>().is_empty()),
            |t| t.as_mut_slice::<f32>().fill(1.0),
            |t| t.view_mut().copy_row(0, 1),
            |t| drop(t.to_owned_memory()),
        ];
        for read in reads {
            let attempt = std::panic::AssertUnwindSafe(|| read(&mut tensor));
            let panic = std::panic::catch_unwind(attempt).expect_err("it is not the host's");
            let message = panic.downcast_ref::<String>().expect("a message");
            assert_eq!(message, "the host reaches for a tensor f32 [4, 3] in device memory");
        }
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
