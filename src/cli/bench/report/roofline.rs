//! Measured steps beside the least time that the machine's limits allow (Williams, Waterman,
//! Patterson 2009): bytes over bandwidth, or operations over peak, whichever is longer.

use anyhow::Context;

use super::super::limits::{Limit, MEMORY_READ};
use super::super::record::Record;
use super::super::steps::{StepFigures, StepRow, Sweep};
use super::chart::{Chart, Series};
use super::{Named, markdown_table, short, table};

/// What bounds a step, as far as the record knows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Roof {
    /// Bytes per second.
    bandwidth: Option<f64>,
    /// Operations per second.
    peak: Option<f64>,
}

impl Roof {
    /// The limits of as many threads as the model ran on; of arithmetic, the fastest of the record.
    fn of(record: &Record) -> Roof {
        let threads = record.model["threads"].as_u64();
        let same_threads = |limit: &&Limit| Some(limit.threads as u64) == threads;
        let best = |unit: &str, wanted: &dyn Fn(&Limit) -> bool| {
            let limits = record.limits.iter().filter(same_threads);
            let values = limits.filter(|limit| limit.unit == unit && wanted(limit));
            values.map(|limit| limit.value * 1e9).max_by(f64::total_cmp)
        };
        let in_this_run = best("GB/s", &|limit| limit.limit == MEMORY_READ && limit.when.is_some());
        Roof {
            bandwidth: in_this_run.or_else(|| best("GB/s", &|limit| limit.limit == MEMORY_READ)),
            peak: best("GFLOP/s", &|_| true),
        }
    }

    /// The least time of a step in milliseconds; `None` when no limit is known.
    fn bound_ms(self, row: &StepRow) -> Option<f64> {
        let reading = self.bandwidth.map(|bandwidth| row.read_bytes as f64 / bandwidth * 1e3);
        let computing = self.peak.map(|peak| row.flops as f64 / peak * 1e3);
        reading.into_iter().chain(computing).max_by(f64::total_cmp)
    }
}

/// A row per step.
pub(super) fn table(named: &Named) -> anyhow::Result<String> {
    let roof = Roof::of(&named.record);
    let row = |row: &StepRow| {
        let bound = roof.bound_ms(row);
        vec![
            row.batch_size.to_string(),
            row.context_len.to_string(),
            short(row.step_ms.p50),
            short(row.tokens_per_s),
            bound.map(short).unwrap_or_default(),
            bound.map(|ms| format!("{:.0} %", ms / row.step_ms.p50 * 100.0)).unwrap_or_default(),
        ]
    };
    let heading = format!("{} ({}), decode steps\n\n", named.name, table::model(&named.record));
    let header = ["batch", "context", "step p50 ms", "tok/s", "roofline ms", "of the roofline"];
    let rows: Vec<_> = figures(named)?.rows.iter().map(row).collect();
    Ok(heading + &markdown_table(&header, &rows))
}

/// File names and pictures: one plot per sweep that has steps.
pub(super) fn plots(named: &Named) -> anyhow::Result<Vec<(String, String)>> {
    let roof = Roof::of(&named.record);
    let rows = figures(named)?.rows;
    let plot = |sweep: Sweep| {
        let rows: Vec<&StepRow> = rows.iter().filter(|row| row.sweep == sweep).collect();
        let first = *rows.first()?;
        let (suffix, x_label, fixed) = match sweep {
            Sweep::Batch => ("batch", "batch size", format!("context {}", first.context_len)),
            Sweep::Context => ("context", "context length", format!("batch {}", first.batch_size)),
        };
        let x = |row: &StepRow| match sweep {
            Sweep::Batch => row.batch_size as f64,
            Sweep::Context => row.context_len as f64,
        };
        let measured = rows.iter().map(|row| (x(row), row.step_ms.p50)).collect();
        let bound: Vec<_> =
            rows.iter().filter_map(|row| Some((x(row), roof.bound_ms(row)?))).collect();
        let chart = Chart {
            title: format!("{}: decode step at {fixed}", table::model(&named.record)),
            subtitle: format!("{}, {}", named.record.machine.cpu, named.record.date),
            x_label: x_label.to_owned(),
            y_label: "milliseconds".to_owned(),
            series: vec![
                Series { name: "measured, p50".to_owned(), points: measured, dashed: false },
                Series { name: roof.name(), points: bound, dashed: true },
            ],
        };
        Some((format!("{}-{suffix}.svg", named.name), chart.svg()))
    };
    Ok([Sweep::Batch, Sweep::Context].into_iter().filter_map(plot).collect())
}

impl Roof {
    fn name(self) -> String {
        let gigas = |value: f64, unit: &str| format!("{} {unit}", short(value / 1e9));
        let bandwidth = self.bandwidth.map(|value| gigas(value, "GB/s"));
        let peak = self.peak.map(|value| gigas(value, "GFLOP/s"));
        let limits: Vec<String> = bandwidth.into_iter().chain(peak).collect();
        format!("roofline: {}", limits.join(", "))
    }
}

fn figures(named: &Named) -> anyhow::Result<StepFigures> {
    serde_json::from_value(named.record.results.clone())
        .with_context(|| format!("the results of {} are incomplete", named.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn named() -> Named {
        let row = |sweep: &str, batch: usize, context: usize, ms: f64| {
            let spread = json!({"mean": ms, "p50": ms, "p90": ms, "p99": ms, "max": ms});
            json!({"sweep": sweep, "batch_size": batch, "context_len": context, "step_ms": spread,
                   "tokens_per_s": 1.0, "read_bytes": 100_000_000, "flops": batch * 1_000_000_000})
        };
        let limit = |threads: usize, name: &str, unit: &str, value: f64, when: Option<&str>| json!({"threads": threads, "limit": name, "unit": unit, "value": value, "when": when});
        let record = json!({
            "benchmark": "steps", "date": "2026-01-01T00:00:00+00:00", "tokenmill": "0.1.0",
            "machine": {"cpu": "x < y", "num_cpus": 2, "memory_bytes": 1},
            "model": {"name": "m", "threads": 2}, "options": {},
            "limits": [
                limit(2, "memory read", "GB/s", 40.0, None),
                limit(2, "memory read", "GB/s", 10.0, Some("before")),
                limit(2, "bf16 AMX", "GFLOP/s", 1000.0, None),
                limit(1, "bf16 AMX", "GFLOP/s", 9000.0, None),
            ],
            "results": {"rows": [
                row("batch", 1, 256, 20.0), row("batch", 64, 256, 128.0), row("context", 1, 512, 25.0)
            ]}
        });
        Named { name: "run".to_owned(), record: serde_json::from_value(record).unwrap() }
    }

    #[test]
    fn the_bound_is_the_slower_of_reading_and_computing_with_limits_of_the_same_run() {
        let named = named();
        let roof = Roof::of(&named.record);
        assert_eq!(roof, Roof { bandwidth: Some(10e9), peak: Some(1e12) });
        let rows = figures(&named).unwrap().rows;
        assert_eq!(roof.bound_ms(&rows[0]), Some(10.0));
        assert_eq!(roof.bound_ms(&rows[1]), Some(64.0));
        let text = table(&named).unwrap();
        assert!(text.contains("| 64 | 256 | 128 | 1.00 | 64.0 | 50 % |"), "{text}");
    }

    #[test]
    fn each_sweep_has_a_plot() {
        let plots = plots(&named()).unwrap();
        let names: Vec<_> = plots.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["run-batch.svg", "run-context.svg"]);
        assert!(plots[0].1.contains("x &lt; y"), "text is escaped");
    }
}
