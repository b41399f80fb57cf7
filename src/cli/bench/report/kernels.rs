//! `kernels` records: every operation beside its ceiling and, where a `torch` record is among the
//! records, beside PyTorch's time of the same.

use std::collections::BTreeMap;

use anyhow::Context;
use serde::Deserialize;

use super::super::kernels::{KernelFigures, KernelRow, MATMUL};
use super::super::limits::{self, ARITHMETIC_UNIT, Limit};
use super::super::record::Kind;
use super::chart::{Chart, Series};
use super::{Named, markdown_table, percent, short};

/// What PyTorch took, in the words of [`KernelRow`].
#[derive(Deserialize)]
pub(in crate::cli::bench) struct TorchFigures {
    rows: Vec<TorchRow>,
}

/// One operation.
#[derive(Deserialize)]
struct TorchRow {
    operation: String,
    case: String,
    microseconds: f64,
}

/// A table per `kernels` record, and one of what PyTorch alone measured.
pub(super) fn tables(records: &[Named]) -> anyhow::Result<Vec<String>> {
    let torch = torch_times(records)?;
    let of_kernels = || records.iter().filter(|named| named.record.benchmark == Kind::Kernels);
    let mut tables: Vec<String> =
        of_kernels().map(|named| table(named, &torch)).collect::<anyhow::Result<_>>()?;
    if of_kernels().next().is_none() && !torch.is_empty() {
        let row = |((operation, case), time): (&(String, String), &f64)| {
            vec![operation.clone(), case.clone(), short(*time)]
        };
        let rows: Vec<_> = torch.iter().map(row).collect();
        tables.push(markdown_table(&["operation", "of", "PyTorch µs"], &rows));
    }
    Ok(tables)
}

/// Microseconds by operation and case.
fn torch_times(records: &[Named]) -> anyhow::Result<BTreeMap<(String, String), f64>> {
    let mut times = BTreeMap::new();
    for named in records.iter().filter(|named| named.record.benchmark == Kind::Torch) {
        let figures: TorchFigures = serde_json::from_value(named.record.results.clone())
            .with_context(|| format!("the results of {} are incomplete", named.name))?;
        let time = |row: TorchRow| ((row.operation, row.case), row.microseconds);
        times.extend(figures.rows.into_iter().map(time));
    }
    Ok(times)
}

fn table(named: &Named, torch: &BTreeMap<(String, String), f64>) -> anyhow::Result<String> {
    let row = |row: &KernelRow| {
        let key = (row.operation.clone(), row.case.clone());
        vec![
            row.operation.clone(),
            row.case.clone(),
            short(row.microseconds),
            short(row.gb_per_s()),
            short(row.tflops()),
            row.fraction.map(percent).unwrap_or_default(),
            torch.get(&key).copied().map(short).unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = figures(named)?.rows.iter().map(row).collect();
    let header = ["operation", "of", "µs", "GB/s", "TFLOP/s", "of the ceiling", "PyTorch µs"];
    let heading = format!("{} ({})\n\n", named.name, named.record.hardware());
    Ok(heading + &markdown_table(&header, &rows))
}

/// Arithmetic of products over rows of activations, a curve per format, under the peaks.
pub(super) fn plot(named: &Named) -> anyhow::Result<(String, String)> {
    let rows = figures(named)?.rows;
    let products: Vec<&KernelRow> =
        rows.iter().filter(|row| row.operation == MATMUL && row.rows.is_some()).collect();
    let mut series: Vec<Series> = Vec::new();
    for row in &products {
        let (Some(format), Some(rows)) = (&row.format, row.rows) else { continue };
        let point = (rows as f64, row.tflops());
        match series.iter_mut().find(|series| series.name == *format) {
            Some(series) => series.points.push(point),
            None => {
                series.push(Series { name: format.clone(), points: vec![point], dashed: false });
            }
        }
    }
    let ends = products.iter().filter_map(|row| row.rows).fold(None, |ends, rows| {
        let (low, high) = ends.unwrap_or((rows, rows));
        Some((low.min(rows), high.max(rows)))
    });
    if let Some((low, high)) = ends {
        series.extend(peaks(&named.record.limits, [low as f64, high as f64]));
    }
    let chart = Chart {
        title: "products of weights, by rows of activations".to_owned(),
        subtitle: format!("{}, {}", named.record.hardware(), named.record.date),
        x_label: "rows".to_owned(),
        y_label: "TFLOP/s".to_owned(),
        series,
    };
    Ok((format!("{}-matmul.svg", named.name), chart.svg()))
}

/// A level line for every kind of arithmetic.
fn peaks(all: &[Limit], ends: [f64; 2]) -> Vec<Series> {
    let mut names: Vec<&str> = Vec::new();
    for limit in all.iter().filter(|limit| limit.unit == ARITHMETIC_UNIT) {
        if !names.contains(&limit.limit.as_str()) {
            names.push(&limit.limit);
        }
    }
    let line = |name: &str| {
        let peak = limits::best(all.iter().filter(|limit| limit.limit == name))?;
        let points = ends.map(|rows| (rows, peak / 1e12)).to_vec();
        Some(Series { name: format!("limit: {name}"), points, dashed: true })
    };
    names.into_iter().filter_map(line).collect()
}

fn figures(named: &Named) -> anyhow::Result<KernelFigures> {
    serde_json::from_value(named.record.results.clone())
        .with_context(|| format!("the results of {} are incomplete", named.name))
}
