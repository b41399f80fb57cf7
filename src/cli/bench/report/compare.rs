//! Engines side by side: `serve` records whose metadata names engine, case and figure.
//!
//! `scripts/compare-peers.sh` makes them, several per engine and case, interleaved.

use std::collections::BTreeMap;

use super::super::figures::{LoadFigures, median};
use super::table::load_figures;
use super::{Named, markdown_table, short};

/// What stands in a cell, chosen by the metadata `figure`.
const FIGURES: &[(&str, Figure)] = &[
    ("decode tok/s", |f| Some(1e3 / f.tpot_ms?.p50)),
    ("prefill tok/s", |f| {
        Some(f.total_input_tokens as f64 / f.completed as f64 / f.ttft_ms?.p50 * 1e3)
    }),
    ("output tok/s", |f| Some(f.output_tokens_per_s)),
    ("seconds", |f| Some(f.duration_s)),
];

type Figure = fn(&LoadFigures) -> Option<f64>;

/// Metadata that is a figure itself, and its column.
const MEASURED: &[(&str, &str)] =
    &[("first_token_s", "e start → first token, s"), ("resident_gb", "resident GB")];

/// One row per engine and model, one column per case; `None` without such records.
pub(super) fn table(records: &[Named]) -> anyhow::Result<Option<String>> {
    let mut columns: Vec<String> = Vec::new();
    let mut readings: BTreeMap<(String, String), BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    for named in records {
        for (engine, column, value) in cells(named)? {
            if !columns.contains(&column) {
                columns.push(column.clone());
            }
            let model = named.record.model["name"].as_str().unwrap_or("?").to_owned();
            readings.entry((model, engine)).or_default().entry(column).or_default().push(value);
        }
    }
    if readings.is_empty() {
        return Ok(None);
    }
    columns.sort();
    let row = |((model, engine), cells): ((String, String), BTreeMap<String, Vec<f64>>)| {
        let figures = columns.iter().map(|column| {
            cells.get(column).map(|readings| cell(readings.clone())).unwrap_or_default()
        });
        [engine, model].into_iter().chain(figures).collect()
    };
    let rows: Vec<Vec<String>> = readings.into_iter().map(row).collect();
    let header: Vec<&str> =
        ["engine", "model"].into_iter().chain(columns.iter().map(String::as_str)).collect();
    Ok(Some(markdown_table(&header, &rows)))
}

/// Engine, column and value of everything that a record compares.
fn cells(named: &Named) -> anyhow::Result<Vec<(String, String, f64)>> {
    let metadata = &named.record.metadata;
    let Some(engine) = metadata.get("engine") else { return Ok(Vec::new()) };
    let mut cells = Vec::new();
    if let Some((case, wanted)) = metadata.get("case").zip(metadata.get("figure")) {
        let known = FIGURES.iter().find(|(name, _)| name == wanted);
        let (name, figure) = known.ok_or_else(|| {
            let names: Vec<_> = FIGURES.iter().map(|(name, _)| *name).collect();
            anyhow::anyhow!(
                "{}: metadata figure is {wanted:?}, but one of {names:?} is needed",
                named.name
            )
        })?;
        let value = figure(&load_figures(named)?);
        cells.extend(value.map(|value| (engine.clone(), format!("{case} {name}"), value)));
    }
    for (key, column) in MEASURED {
        let value = metadata.get(*key).and_then(|value| value.parse().ok());
        cells.extend(value.map(|value| (engine.clone(), (*column).to_owned(), value)));
    }
    Ok(cells)
}

/// The median, with the range when there are several readings.
fn cell(readings: Vec<f64>) -> String {
    let num_readings = readings.len();
    let low = readings.iter().copied().fold(f64::INFINITY, f64::min);
    let high = readings.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match median(readings) {
        Some(middle) if num_readings > 1 => {
            format!("{} ({}–{})", short(middle), short(low), short(high))
        }
        Some(middle) => short(middle),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn named(engine: &str, case: &str, figure: &str, duration_s: f64) -> Named {
        let spread = json!({"mean": 20.0, "p50": 20.0, "p90": 20.0, "p99": 20.0, "max": 20.0});
        let record = json!({
            "benchmark": "serve", "date": "2026-01-01T00:00:00+00:00", "tokenmill": "0.1.0",
            "machine": {"cpu": "x", "num_cpus": 2, "memory_bytes": 1},
            "metadata": {"engine": engine, "case": case, "figure": figure, "first_token_s": "0.5"},
            "model": {"name": "m"}, "options": {}, "limits": [],
            "results": {
                "completed": 1, "failed": 0, "duration_s": duration_s, "total_input_tokens": 100,
                "total_cached_tokens": 0, "total_output_tokens": 10, "requests_per_s": 1.0,
                "output_tokens_per_s": 7.0, "total_tokens_per_s": 8.0, "ttft_ms": spread,
                "tpot_ms": spread, "itl_ms": null, "e2e_ms": spread
            }
        });
        Named { name: "r".to_owned(), record: serde_json::from_value(record).unwrap() }
    }

    #[test]
    fn readings_of_one_engine_and_case_share_a_cell() {
        let records = [
            named("b", "d cold", "seconds", 3.0),
            named("a", "d cold", "seconds", 1.0),
            named("a", "d cold", "seconds", 2.0),
            named("a", "a", "decode tok/s", 9.0),
        ];
        let table = table(&records).unwrap().unwrap();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[0],
            "| engine | model | a decode tok/s | d cold seconds | e start → first token, s |"
        );
        assert_eq!(lines[2], "| a | m | 50.0 | 1.50 (1.00–2.00) | 0.50 (0.50–0.50) |");
        assert_eq!(lines[3], "| b | m |  | 3.00 | 0.50 |");
    }

    #[test]
    fn an_unknown_figure_is_named() {
        let error = table(&[named("a", "a", "joy", 1.0)]).unwrap_err().to_string();
        assert!(error.contains("joy") && error.contains("output tok/s"), "{error}");
    }

    #[test]
    fn prompts_per_second_come_from_the_first_token() {
        let table = table(&[named("a", "b", "prefill tok/s", 1.0)]).unwrap().unwrap();
        assert!(table.contains("| 5000 |"), "{table}");
    }
}
