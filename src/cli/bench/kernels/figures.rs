//! What was measured of operations, and what limits would have allowed.

use serde::{Deserialize, Serialize};

use super::super::limits::{self, ARITHMETIC_UNIT, Limit, MEMORY_COPY, MEMORY_READ};

/// [`KernelRow::operation`] of what reads a memory's speed.
pub(in crate::cli::bench) const COPY: &str = "copy";
/// [`KernelRow::operation`] of products with weights.
pub(in crate::cli::bench) const MATMUL: &str = "matmul";
/// [`KernelRow::operation`] of a library's products of codes by codes, which no scale is applied to.
pub(in crate::cli::bench) const CODES: &str = "codes";

/// One operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct KernelRow {
    /// Which.
    pub operation: String,
    /// Of what.
    pub case: String,
    /// Format of the weights, of a product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Rows of activations, of a product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Microseconds of one.
    pub microseconds: f64,
    /// Bytes of memory that it must read and write.
    pub bytes: f64,
    /// Multiplications and additions.
    pub flops: f64,
    /// The time that the limits would allow, over the time that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
}

/// What [`KernelRow`]s are kept in.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::cli::bench) struct KernelFigures {
    /// In the order of measuring.
    pub rows: Vec<KernelRow>,
}

impl KernelRow {
    /// Bytes per second.
    pub fn gb_per_s(&self) -> f64 {
        self.bytes / self.microseconds / 1e3
    }

    /// Operations per second.
    pub fn tflops(&self) -> f64 {
        self.flops / self.microseconds / 1e6
    }

    /// For people.
    pub(super) fn print(&self) {
        let fraction = self.fraction.map_or(String::new(), |f| format!("  {:.0} %", 100.0 * f));
        println!(
            "{:<12} {:<28} {:>10.1} µs {:>8.0} GB/s {:>8.2} TFLOP/s{fraction}",
            self.operation,
            self.case,
            self.microseconds,
            self.gb_per_s(),
            self.tflops()
        );
    }
}

/// The limits of a GPU that its rows tell: how fast it copies, and what its library's products of
/// bf16 and of codes reach.
pub(super) fn limits_of_gpu(rows: &[KernelRow]) -> Vec<Limit> {
    let limit = |limit: String, unit: &str, value: f64| Limit {
        threads: None,
        limit,
        unit: unit.to_owned(),
        value,
        when: Some("within".to_owned()),
    };
    let copies = rows.iter().filter(|row| row.operation == COPY);
    let copy = copies.map(|row| limit(MEMORY_COPY.to_owned(), "GB/s", row.gb_per_s()));
    let products = ["bf16", "fp8", "int8"].into_iter().filter_map(|format| {
        let is_of = |row: &&KernelRow| {
            let operation = if format == "bf16" { MATMUL } else { CODES };
            row.operation == operation && row.format.as_deref() == Some(format)
        };
        let best = rows.iter().filter(is_of).map(KernelRow::tflops).max_by(f64::total_cmp)?;
        Some(limit(format!("{format} matmul"), ARITHMETIC_UNIT, best * 1e3))
    });
    copy.chain(products).collect()
}

/// Holds every row but copies to limits; without any, rows stay without a fraction.
pub(super) fn set_fractions(rows: &mut [KernelRow], limits: &[Limit], on_gpu: bool) {
    let memory = if on_gpu { MEMORY_COPY } else { MEMORY_READ };
    let bandwidth = limits::best(limits.iter().filter(|limit| limit.limit == memory));
    for row in rows.iter_mut().filter(|row| row.operation != COPY) {
        let peak = limits::peak(limits, row.format.as_deref().unwrap_or("bf16"), on_gpu);
        let allowed = bandwidth
            .zip(peak)
            .map(|(bandwidth, peak)| (row.bytes / bandwidth).max(row.flops / peak) * 1e6);
        row.fraction = allowed.map(|microseconds| microseconds / row.microseconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(operation: &str, format: &str, microseconds: f64, bytes: f64, flops: f64) -> KernelRow {
        KernelRow {
            operation: operation.to_owned(),
            case: String::new(),
            format: Some(format.to_owned()).filter(|format| !format.is_empty()),
            rows: None,
            microseconds,
            bytes,
            flops,
            fraction: None,
        }
    }

    #[test]
    fn codes_are_held_to_the_speed_of_their_products_where_a_library_has_them() {
        let mut rows = vec![
            row(COPY, "", 1.0, 4e6, 0.0),
            row(MATMUL, "bf16", 1.0, 1.0, 1e6),
            row(MATMUL, "int8", 0.8, 1.0, 1e6),
            row(MATMUL, "fp8", 0.8, 1.0, 1e6),
            row(MATMUL, "int4", 2.0, 4e6, 1.0),
        ];
        let fractions = |rows: &mut Vec<KernelRow>| -> Vec<f64> {
            let limits = limits_of_gpu(rows);
            set_fractions(rows, &limits, true);
            let fraction = |row: &KernelRow| row.fraction.unwrap_or_default();
            rows[1..].iter().map(|row| (fraction(row) * 1e6).round() / 1e6).collect()
        };
        assert_eq!(fractions(&mut rows), [1.0, 1.25, 1.25, 0.5]);
        rows.push(row(CODES, "fp8", 0.5, 1.0, 1e6));
        rows.push(row(CODES, "int8", 0.4, 1.0, 1e6));
        assert_eq!(fractions(&mut rows), [1.0, 0.5, 0.625, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn a_host_without_limits_leaves_fractions_out() {
        let mut rows = vec![row(MATMUL, "bf16", 1.0, 1.0, 1e6)];
        set_fractions(&mut rows, &[], false);
        assert_eq!(rows[0].fraction, None);
    }
}
