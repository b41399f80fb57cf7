//! The kernels as nvcc made them.

/// A fatbin for every GPU that is supported; empty in a binary that was built without nvcc.
pub static KERNELS: &[u8] = &[];
