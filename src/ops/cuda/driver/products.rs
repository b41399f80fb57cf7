//! A library's products on our stream. They may be at fault like any kernel, so they are counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::DenseProducts;
use super::super::cublas::CublasLt;
use crate::tensor::{View, ViewMut};

/// cuBLASLt, which says how often it was asked.
pub(super) struct Counted {
    pub library: CublasLt,
    /// The driver looks at it when something has failed.
    pub num_products: Arc<AtomicU64>,
}

impl DenseProducts for Counted {
    fn multiplies_codes(&self) -> bool {
        self.library.multiplies_codes()
    }

    fn multiply(
        &self,
        out: ViewMut<'_>,
        x: View<'_>,
        weight: View<'_>,
        bias: Option<View<'_>>,
    ) -> bool {
        self.num_products.fetch_add(1, Ordering::Relaxed);
        self.library.multiply(out, x, weight, bias)
    }
}
