//! Measured steps beside the least time that the machine's limits allow (Williams, Waterman,
//! Patterson 2009): bytes over bandwidth, or operations over peak, whichever is longer.

use anyhow::Context;

use super::super::limits::{self, Limit, MEMORY_COPY, MEMORY_READ};
use super::super::record::Record;
use super::super::steps::{StepFigures, StepRow, Sweep};
use super::chart::{Chart, Series};
use super::{Named, markdown_table, short, short_or_blank, table};

/// What bounds a step, as far as the record knows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Roof {
    /// Bytes per second.
    bandwidth: Option<f64>,
    /// Operations per second.
    peak: Option<f64>,
}

impl Roof {
    /// The limits of as many threads as the model ran on, or of the GPU; of arithmetic, what
    /// multiplies weights of the model's format.
    fn of(record: &Record) -> Roof {
        let on_gpu = record.is_of_gpu();
        let threads = record.model["threads"].as_u64().filter(|_| !on_gpu);
        let is_of_device = |limit: &&Limit| limit.threads.map(|threads| threads as u64) == threads;
        let limits: Vec<Limit> = record.limits.iter().filter(is_of_device).cloned().collect();
        let memory = if on_gpu { MEMORY_COPY } else { MEMORY_READ };
        Roof {
            bandwidth: limits::best(limits.iter().filter(|limit| limit.limit == memory)),
            peak: limits::peak(&limits, record.format(), on_gpu),
        }
    }

    /// The least time of a step in milliseconds; `None` when no limit is known.
    fn bound_ms(self, row: &StepRow) -> Option<f64> {
        let reading = self.bandwidth.map(|bandwidth| row.read_bytes as f64 / bandwidth * 1e3);
        let computing = self.peak.map(|peak| row.flops as f64 / peak * 1e3);
        reading.into_iter().chain(computing).max_by(f64::total_cmp)
    }
}

/// Operations per second that bound weights of the record's format.
pub(super) fn peak(record: &Record) -> Option<f64> {
    Roof::of(record).peak
}

/// A row per step: decode steps, then prompts.
pub(super) fn table(named: &Named) -> anyhow::Result<String> {
    let roof = Roof::of(&named.record);
    let rows = figures(named)?.rows;
    let row = |row: &StepRow, size: Vec<String>| {
        let bound = roof.bound_ms(row);
        let figures = [
            short(row.step_ms.p50),
            short(row.tokens_per_s),
            short(row.flops as f64 / row.step_ms.p50 / 1e9),
            short_or_blank(bound),
            bound.map(|ms| format!("{:.0} %", ms / row.step_ms.p50 * 100.0)).unwrap_or_default(),
        ];
        size.into_iter().chain(figures).collect::<Vec<_>>()
    };
    let (prompts, steps): (Vec<_>, Vec<_>) =
        rows.iter().partition(|row| row.sweep == Sweep::Prompt);
    let steps: Vec<_> = steps
        .into_iter()
        .map(|step| row(step, vec![step.batch_size.to_string(), step.context_len.to_string()]))
        .collect();
    let prompts: Vec<_> =
        prompts.into_iter().map(|step| row(step, vec![step.context_len.to_string()])).collect();
    let columns = ["step p50 ms", "tok/s", "TFLOP/s", "roofline ms", "of the roofline"];
    let part = |what: &str, size: &[&str], rows: &[Vec<String>]| {
        let header: Vec<&str> = size.iter().chain(&columns).copied().collect();
        let model = table::model(&named.record);
        format!("{} ({model}), {what}\n\n{}", named.name, markdown_table(&header, rows))
    };
    let parts = [
        (!steps.is_empty()).then(|| part("decode steps", &["batch", "context"], &steps)),
        (!prompts.is_empty()).then(|| part("prompts", &["tokens"], &prompts)),
    ];
    Ok(parts.into_iter().flatten().collect::<Vec<_>>().join("\n"))
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
            Sweep::Prompt => ("prompt", "tokens", String::new()),
        };
        let x = |row: &StepRow| match sweep {
            Sweep::Batch => row.batch_size as f64,
            Sweep::Context | Sweep::Prompt => row.context_len as f64,
        };
        let measured = rows.iter().map(|row| (x(row), row.step_ms.p50)).collect();
        let bound: Vec<_> =
            rows.iter().filter_map(|row| Some((x(row), roof.bound_ms(row)?))).collect();
        let what = match sweep {
            Sweep::Batch | Sweep::Context => format!("decode step at {fixed}"),
            Sweep::Prompt => "prompts".to_owned(),
        };
        let chart = Chart {
            title: format!("{}: {what}", table::model(&named.record)),
            subtitle: format!("{}, {}", named.record.hardware(), named.record.date),
            x_label: x_label.to_owned(),
            y_label: "milliseconds".to_owned(),
            series: vec![
                Series { name: "measured, p50".to_owned(), points: measured, dashed: false },
                Series { name: roof.name(), points: bound, dashed: true },
            ],
        };
        Some((format!("{}-{suffix}.svg", named.name), chart.svg()))
    };
    Ok([Sweep::Batch, Sweep::Context, Sweep::Prompt].into_iter().filter_map(plot).collect())
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
            "model": {"name": "m", "threads": 2, "backend": "cpu (amx)"}, "options": {},
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
        assert!(text.contains("| 64 | 256 | 128 | 1.00 | 0.50 | 64.0 | 50 % |"), "{text}");
    }

    #[test]
    fn the_peak_is_that_of_the_weights_format() {
        let mut named = named();
        let limit = |threads: Option<usize>, name: &str, unit: &str, value: f64| Limit {
            threads,
            limit: name.to_owned(),
            unit: unit.to_owned(),
            value,
            when: None,
        };
        named.record.limits.push(limit(Some(2), "int8 AMX", "GFLOP/s", 2000.0));
        assert_eq!(Roof::of(&named.record).peak, Some(1e12), "bf16 has no use for bytes");
        named.record.model["quantization"] = json!("int8");
        assert_eq!(Roof::of(&named.record).peak, Some(2e12));
        // A GPU has limits of its own, whatever its host can do.
        named.record.model["backend"] = json!("cuda (0 NVIDIA H200)");
        assert_eq!(Roof::of(&named.record), Roof { bandwidth: None, peak: None });
        named.record.limits.push(limit(None, MEMORY_COPY, "GB/s", 4000.0));
        named.record.limits.push(limit(None, "bf16 matmul", "GFLOP/s", 800_000.0));
        named.record.limits.push(limit(None, "int8 matmul", "GFLOP/s", 1_500_000.0));
        let roof = Roof { bandwidth: Some(4e12), peak: Some(1.5e15) };
        assert_eq!(Roof::of(&named.record), roof);
        assert!(plots(&named).unwrap()[0].1.contains("NVIDIA H200"));
    }

    #[test]
    fn each_sweep_has_a_plot() {
        let plots = plots(&named()).unwrap();
        let names: Vec<_> = plots.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["run-batch.svg", "run-context.svg"]);
        assert!(plots[0].1.contains("x &lt; y"), "text is escaped");
    }
}
