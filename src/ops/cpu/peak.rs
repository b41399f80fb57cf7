//! Peak arithmetic, which measured speeds are compared with.

/// Name, operations per call (a multiplication and an addition are two), and the call.
pub type Arithmetic = (&'static str, f64, fn());

/// What this machine's instructions can do, a loop for each kind; of processors other than x86-64
/// nothing is known.
pub fn peak_arithmetic() -> Vec<Arithmetic> {
    #[cfg(target_arch = "x86_64")]
    return super::peak_x86::arithmetic();
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}
