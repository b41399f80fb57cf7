//! `tokenmill bench report`: records to a Markdown table and SVG plots.

mod chart;
pub(super) mod checks;
mod compare;
pub(super) mod kernels;
mod roofline;
mod table;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::record::{Kind, Record};

/// Flags of `bench report`.
#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    /// Records that the other commands wrote with --output-json
    #[arg(value_name = "RECORD", required = true)]
    pub records: Vec<PathBuf>,
    /// Folder for report.md and the plots; without it the table is only printed
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// A record and the name of its file.
struct Named {
    name: String,
    record: Record,
}

/// Writes the report.
pub fn run(args: &ReportArgs) -> anyhow::Result<()> {
    let records: Vec<Named> = args.records.iter().map(read).collect::<anyhow::Result<_>>()?;
    let report = markdown(&records)?;
    println!("{report}");
    let Some(folder) = &args.out else { return Ok(()) };
    let write = |name: String, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
    };
    std::fs::create_dir_all(folder)
        .with_context(|| format!("--out {} cannot be made", folder.display()))?;
    write("report.md".to_owned(), &report)?;
    for named in records.iter().filter(|named| named.record.benchmark == Kind::Steps) {
        for (name, svg) in roofline::plots(named)? {
            write(name, &svg)?;
        }
    }
    for named in records.iter().filter(|named| named.record.benchmark == Kind::Kernels) {
        let (name, svg) = kernels::plot(named)?;
        write(name, &svg)?;
    }
    Ok(())
}

fn read(path: &PathBuf) -> anyhow::Result<Named> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    let record = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a record of `tokenmill bench`", path.display()))?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Named { name, record })
}

/// Every table that the records fill.
fn markdown(records: &[Named]) -> anyhow::Result<String> {
    let mut parts = vec![provenance(records)];
    parts.extend(compare::table(records)?);
    parts.extend(table::latency(records)?);
    parts.extend(table::load(records)?);
    for named in records.iter().filter(|named| named.record.benchmark == Kind::Steps) {
        parts.push(roofline::table(named)?);
    }
    parts.extend(kernels::tables(records)?);
    parts.extend(checks::tables(records)?);
    Ok(parts.join("\n"))
}

/// Which hardware the records are of, and when they were taken.
fn provenance(records: &[Named]) -> String {
    let mut names: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for Named { name, record } in records {
        let day = record.date.split_once('T').map_or(record.date.as_str(), |(day, _)| day);
        let on = format!("{}, {day}, tokenmill {}", record.hardware(), record.tokenmill);
        names.entry(on).or_default().push(name);
    }
    names.into_iter().map(|(on, names)| format!("- {on}: {}\n", names.join(", "))).collect()
}

/// A Markdown table.
fn markdown_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let rule = format!("|{}\n", "---|".repeat(header.len()));
    let rows: String = rows.iter().map(|row| line(row)).collect();
    line(&header) + &rule + &rows
}

/// A number for people: three digits that mean something.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A share.
fn percent(fraction: f64) -> String {
    format!("{:.0} %", fraction * 100.0)
}

/// The same, or nothing.
fn short_or_blank(value: Option<f64>) -> String {
    value.map(short).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!([1234.5, 56.78, 4.567].map(short), ["1234", "56.8", "4.57"]);
    }

    #[test]
    fn a_table_has_a_rule_under_its_header() {
        let table = markdown_table(&["a", "b"], &[vec!["1".to_owned(), "2".to_owned()]]);
        assert_eq!(table, "| a | b |\n|---|---|\n| 1 | 2 |\n");
    }

    #[test]
    fn a_file_that_is_no_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        std::fs::write(&path, "{}").unwrap();
        let error = read(&path).err().unwrap().to_string();
        assert!(error.contains("x.json is not a record"), "{error}");
    }
}
