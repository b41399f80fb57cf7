//! Tables of `latency`, `throughput` and `serve` records: one row each.

use anyhow::Context;
use serde_json::Value;

use super::super::figures::{LoadFigures, Spread};
use super::super::record::{Kind, Record};
use super::{Named, markdown_table, percent, roofline, short_or_blank};

/// One row per `latency` record; `None` without any.
pub(super) fn latency(records: &[Named]) -> anyhow::Result<Option<String>> {
    let row = |named: &Named| {
        let Named { name, record } = named;
        let figure = |key: &str| short_or_blank(record.results[key].as_f64());
        let times = |key: &str| spread(&record.results[key]).map(|spread| times(&spread));
        let fraction = record.results["weights_read_fraction"].as_f64();
        let arithmetic = record.results["most_prefill_tflops"].as_f64();
        vec![
            name.clone(),
            model(record),
            option(record, "batch_size"),
            lengths(record),
            times("ttft_ms").unwrap_or_default(),
            figure("prefill_tokens_per_s"),
            arithmetic.map(super::short).unwrap_or_default(),
            arithmetic
                .and_then(|tflops| Some(percent(tflops * 1e12 / roofline::peak(record)?)))
                .unwrap_or_default(),
            times("itl_ms").unwrap_or_default(),
            figure("decode_tokens_per_s"),
            fraction.map(percent).unwrap_or_default(),
        ]
    };
    let header = [
        "latency",
        "model",
        "batch",
        "in/out",
        "TTFT p50/p99 ms",
        "prefill tok/s",
        "prefill TFLOP/s",
        "of the peak",
        "ITL p50/p99 ms",
        "decode tok/s",
        "weights read, of bandwidth",
    ];
    let rows: Vec<_> = of_kinds(records, &[Kind::Latency]).map(row).collect();
    Ok((!rows.is_empty()).then(|| markdown_table(&header, &rows)))
}

/// One row per `throughput` or `serve` record; `None` without any.
pub(super) fn load(records: &[Named]) -> anyhow::Result<Option<String>> {
    let row = |named: &Named| {
        let Named { name, record } = named;
        let figures = load_figures(named)?;
        let cell = |spread: Option<Spread>| spread.map(|s| times(&s)).unwrap_or_default();
        anyhow::Ok(vec![
            name.clone(),
            model(record),
            format!("{} ({} failed)", figures.completed, figures.failed),
            option(record, "max_concurrency"),
            lengths(record),
            short_or_blank(Some(figures.output_tokens_per_s)),
            short_or_blank(Some(figures.total_tokens_per_s)),
            cell(figures.ttft_ms),
            cell(figures.itl_ms),
            cell(figures.e2e_ms),
        ])
    };
    let header = [
        "load",
        "model",
        "requests",
        "at once",
        "in/out",
        "output tok/s",
        "total tok/s",
        "TTFT p50/p99 ms",
        "ITL p50/p99 ms",
        "end to end p50/p99 ms",
    ];
    let kinds = [Kind::Throughput, Kind::Serve];
    let rows: Vec<_> = of_kinds(records, &kinds).map(row).collect::<anyhow::Result<_>>()?;
    Ok((!rows.is_empty()).then(|| markdown_table(&header, &rows)))
}

/// The results of a `throughput` or `serve` record.
pub(super) fn load_figures(named: &Named) -> anyhow::Result<LoadFigures> {
    serde_json::from_value(named.record.results.clone())
        .with_context(|| format!("the results of {} are incomplete", named.name))
}

fn of_kinds<'a>(records: &'a [Named], kinds: &'a [Kind]) -> impl Iterator<Item = &'a Named> {
    records.iter().filter(|named| kinds.contains(&named.record.benchmark))
}

fn spread(value: &Value) -> Option<Spread> {
    serde_json::from_value(value.clone()).ok()
}

fn times(spread: &Spread) -> String {
    format!("{} / {}", super::short(spread.p50), super::short(spread.p99))
}

/// The engine, if the record names one, and the model: the last part of its path, and what it was
/// quantized to.
pub(super) fn model(record: &Record) -> String {
    let path = record.model["name"].as_str().unwrap_or("?");
    let name = path.rsplit('/').find(|part| !part.is_empty()).unwrap_or(path);
    let format = record.model["quantization"].as_str().map(|format| format!(" in {format}"));
    let engine = record.metadata.get("engine").map(|engine| format!("{engine}: "));
    [engine.unwrap_or_default(), name.to_owned(), format.unwrap_or_default()].concat()
}

fn option(record: &Record, key: &str) -> String {
    match &record.options[key] {
        Value::Null => String::new(),
        value => value.to_string(),
    }
}

/// `prefix + input / output`.
fn lengths(record: &Record) -> String {
    let own = format!("{}/{}", option(record, "input_len"), option(record, "output_len"));
    match record.options["prefix_len"].as_u64() {
        None | Some(0) => own,
        Some(prefix) => format!("{prefix}+{own}"),
    }
}
