//! Tables of what is right or wrong rather than fast: operations against the referee, golden
//! answers; and of how long a server takes to start.

use std::collections::BTreeMap;

use anyhow::Context;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::super::record::Kind;
use super::{Named, markdown_table, percent, short};

/// Cases of `doctor --verify`.
#[derive(Deserialize)]
struct Verified {
    cases: Vec<Case>,
}

/// One of them.
#[derive(Deserialize)]
struct Case {
    operation: String,
    case: String,
    error: f64,
    limit: f64,
    passed: bool,
}

/// What a format answered, as `scripts/golden.py` counts it.
#[derive(Deserialize)]
pub(in crate::cli::bench) struct Golden {
    passed: usize,
    prompts: usize,
    accuracy: f64,
    /// The least accuracy that was asked for; none without thresholds.
    least: Option<f64>,
    #[serde(default)]
    tasks: BTreeMap<String, f64>,
}

/// One start of a server.
#[derive(Deserialize)]
pub(in crate::cli::bench) struct Started {
    ready_ms: f64,
    token_ms: f64,
}

/// Scores by format.
pub(in crate::cli::bench) type GoldenScores = BTreeMap<String, Golden>;
/// Starts by name.
pub(in crate::cli::bench) type Starts = BTreeMap<String, Started>;

/// Every table that the records fill.
pub(super) fn tables(records: &[Named]) -> anyhow::Result<Vec<String>> {
    let mut tables = Vec::new();
    for named in records {
        let Named { name, record } = named;
        let table = match record.benchmark {
            Kind::Verify => verified(&results(named)?),
            Kind::Golden => golden(&results(named)?),
            Kind::Start => starts(&results(named)?),
            _ => continue,
        };
        tables.push(format!("{name} ({})\n\n{table}", record.hardware()));
    }
    Ok(tables)
}

fn results<T: DeserializeOwned>(named: &Named) -> anyhow::Result<T> {
    serde_json::from_value(named.record.results.clone())
        .with_context(|| format!("the results of {} are incomplete", named.name))
}

/// A row per operation, with the case that is nearest to its limit; then whatever is wrong.
fn verified(verified: &Verified) -> String {
    let mut operations: Vec<&str> = Vec::new();
    for case in &verified.cases {
        if !operations.contains(&case.operation.as_str()) {
            operations.push(&case.operation);
        }
    }
    let row = |operation: &str| {
        let cases: Vec<&Case> =
            verified.cases.iter().filter(|case| case.operation == operation).collect();
        let passed = cases.iter().filter(|case| case.passed).count();
        let nearness = |case: &&&Case| case.error / case.limit;
        let worst = cases.iter().max_by(|a, b| nearness(a).total_cmp(&nearness(b)));
        let (error, case) = worst.map_or((String::new(), String::new()), |case| {
            (format!("{:.5} of {}", case.error, case.limit), case.case.clone())
        });
        vec![operation.to_owned(), format!("{passed} of {}", cases.len()), error, case]
    };
    let rows: Vec<Vec<String>> = operations.into_iter().map(row).collect();
    let header = ["operation", "cases that agree", "largest error", "of"];
    let wrong = verified.cases.iter().filter(|case| !case.passed);
    let wrong: String = wrong
        .map(|case| {
            format!(
                "- WRONG: {} {}, {:.5} of {}\n",
                case.operation, case.case, case.error, case.limit
            )
        })
        .collect();
    let table = markdown_table(&header, &rows);
    if wrong.is_empty() { table } else { format!("{table}\n{wrong}") }
}

/// A row per format.
fn golden(scores: &GoldenScores) -> String {
    let row = |(format, score): (&String, &Golden)| {
        let least = score.least.map(|least| {
            let word = if score.accuracy >= least { "" } else { " MISSED" };
            format!("{:.1} %{word}", 100.0 * least)
        });
        let tasks: Vec<String> =
            score.tasks.iter().map(|(task, share)| format!("{task} {}", percent(*share))).collect();
        vec![
            format.clone(),
            format!("{} of {}", score.passed, score.prompts),
            format!("{:.1} %", 100.0 * score.accuracy),
            least.unwrap_or_default(),
            tasks.join(", "),
        ]
    };
    let rows: Vec<Vec<String>> = scores.iter().map(row).collect();
    markdown_table(&["weights", "golden prompts", "accuracy", "at least", "by task"], &rows)
}

/// A row per start.
fn starts(starts: &Starts) -> String {
    let row = |(name, start): (&String, &Started)| {
        vec![name.clone(), short(start.ready_ms), short(start.token_ms)]
    };
    let rows: Vec<Vec<String>> = starts.iter().map(row).collect();
    markdown_table(&["start", "ready, ms", "first token, ms"], &rows)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_operation_is_judged_by_its_worst_case_and_wrong_ones_are_named() {
        let case = |operation: &str, case: &str, error: f64| json!({"operation": operation, "case": case, "error": error, "limit": 0.03, "passed": error <= 0.03});
        let cases = json!({"cases": [
            case("matmul", "int8", 0.01), case("matmul", "bf16", 0.002), case("rope", "halves", 0.5)
        ]});
        let table = verified(&serde_json::from_value(cases).unwrap());
        assert!(table.contains("| matmul | 2 of 2 | 0.01000 of 0.03 | int8 |"), "{table}");
        assert!(table.contains("| rope | 0 of 1 |"), "{table}");
        assert!(table.ends_with("- WRONG: rope halves, 0.50000 of 0.03\n"), "{table}");
    }

    #[test]
    fn a_format_that_misses_its_least_accuracy_says_so() {
        let scores = json!({
            "bf16": {"passed": 319, "prompts": 370, "accuracy": 0.862, "tasks": {"facts": 1.0}},
            "int4": {"passed": 296, "prompts": 370, "accuracy": 0.8, "least": 0.832, "tasks": {}}
        });
        let table = golden(&serde_json::from_value(scores).unwrap());
        assert!(table.contains("| bf16 | 319 of 370 | 86.2 % |  | facts 100 % |"), "{table}");
        assert!(table.contains("| int4 | 296 of 370 | 80.0 % | 83.2 % MISSED |  |"), "{table}");
    }
}
