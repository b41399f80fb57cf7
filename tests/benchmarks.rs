//! `tokenmill bench` as it is run: counts in its records are exact. Times are never looked at.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// Flags that keep a run small; the limits would read half a gigabyte.
const SMALL: &[&str] = &["--kv-cache-memory", "64M", "--threads", "1", "--no-limits"];

fn tokenmill(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokenmill"));
    command.args(args).env_remove("TOKENMILL_API_KEY").env("RUST_LOG", "warn");
    command
}

fn run(args: &[&str]) -> Output {
    tokenmill(args).output().unwrap()
}

/// Runs a benchmark of the bundled model that must succeed; its record.
fn record(args: &[&str], folder: &TempDir, name: &str) -> (Value, PathBuf) {
    let path = folder.path().join(name);
    let output = run(&[args, &["--output-json", path.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap(), path)
}

fn refusal(args: &[&str]) -> String {
    let output = run(args);
    assert!(!output.status.success(), "{args:?} is refused");
    String::from_utf8(output.stderr).unwrap()
}

/// A server with the bundled model, stopped at the end.
struct Server {
    process: Child,
    url: String,
}

impl Server {
    fn start() -> Server {
        let args = ["serve", "--port", "0", "--kv-cache-memory", "64M", "--threads", "1"];
        let process = tokenmill(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut process = process.unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
        let url = url.trim_end_matches("/v1").to_owned();
        // The pipe stays open until the server ends, or its next line would end it.
        std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        Server { process, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_step_of_a_mixture_reads_the_experts_that_its_tokens_choose() {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 300, "hidden_size": 64,
        "moe_intermediate_size": 128, "intermediate_size": 96, "num_experts": 16,
        "num_experts_per_tok": 2, "norm_topk_prob": true, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let path = folder.path().to_str().unwrap();
    let args = ["bench", "steps", path, "--load-format", "dummy", "--batch-sizes", "1,8"];
    let rest = ["--batch-context-len", "16", "--context-lens", "16", "--num-iters", "1"];
    let (record, _) = record(&[&args, SMALL, &rest].concat(), &folder, "s.json");
    let rows = record["results"]["rows"].as_array().unwrap();
    let read = |row: usize| rows[row]["read_bytes"].as_f64().unwrap();
    let expert_bytes = (2 * 3 * 64 * 128) as f64; // bf16
    // Two of sixteen experts for one token; (1 - 7/8 to the eighth) of them for eight.
    let kv_bytes = 7.0 * 16.0 * record["model"]["kv_token_bytes"].as_f64().unwrap();
    let more = (read(1) - read(0) - kv_bytes) / (2.0 * expert_bytes);
    let expected = 16.0 * (1.0 - 0.875_f64.powi(8)) - 2.0;
    assert!((more - expected).abs() < 0.01, "{more} experts more, expected {expected}");
    let flops = |row: usize| rows[row]["flops"].as_u64().unwrap();
    assert_eq!(flops(1), 8 * flops(0));
}

#[test]
fn latency_counts_every_token_and_no_prompt_is_cached() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["bench", "latency", "--input-len", "40", "--output-len", "6", "--batch-size", "3"];
    let (record, _) = record(&[&args, SMALL, &["--num-iters", "2"]].concat(), &folder, "l.json");
    assert_eq!(record["benchmark"], "latency");
    assert_eq!(record["model"]["name"], "tiny");
    let results = &record["results"];
    assert_eq!(results["total_input_tokens"], 2 * 3 * 40);
    assert_eq!(results["total_output_tokens"], 2 * 3 * 6);
    assert_eq!(results["total_cached_tokens"], 0, "prompts of one run share nothing");
    assert_eq!(results["iterations"].as_array().unwrap().len(), 2);
    assert!(results["decode_steps_per_s"].is_f64() && results["ttft_ms"]["p99"].is_f64());
    assert!(results["weights_read_fraction"].is_null(), "there is no limit to compare with");
}

#[test]
fn throughput_shares_the_prefix_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let load = ["--num-prompts", "5", "--input-len", "8", "--output-len", "3"];
    let rest = ["--prefix-len", "64", "--max-concurrency", "1", "--metadata", "case=d"];
    let args = [&["bench", "throughput"], &load[..], &rest, SMALL].concat();
    let (record, _) = record(&args, &folder, "t.json");
    let results = &record["results"];
    assert_eq!((&results["completed"], &results["failed"]), (&Value::from(5), &Value::from(0)));
    assert_eq!(results["total_input_tokens"], 5 * 72);
    assert_eq!(results["total_output_tokens"], 5 * 3);
    assert_eq!(results["total_cached_tokens"], 4 * 64, "one after another, all but the first");
    assert_eq!(record["metadata"]["case"], "d");
    assert_eq!(record["options"]["prefix_len"], 64);
}

#[test]
fn the_load_generator_counts_as_the_server_does_and_its_record_becomes_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start();
    let load = ["--num-prompts", "4", "--input-len", "16", "--output-len", "5", "--no-limits"];
    let target = ["bench", "serve", "--base-url", &server.url, "--max-concurrency", "2"];
    let group = ["--metadata", "engine=ours", "--metadata", "case=a"];
    let figure = ["--metadata", "figure=output tok/s", "--prefix-len", "32"];
    let args = [&target[..], &load, &group, &figure].concat();
    let (record, path) = record(&args, &folder, "s.json");
    let results = &record["results"];
    assert_eq!(results["completed"], 4);
    assert_eq!(results["total_input_tokens"], 4 * 48);
    assert_eq!(results["total_output_tokens"], 4 * 5);
    let (again, _) = self::record(&[&args[..], &["--seed", "9"]].concat(), &folder, "2.json");
    assert!(again["results"]["total_cached_tokens"].as_u64().unwrap() > 0);

    let text = [&target[..], &load, &["--text-prompts"]].concat();
    let (text, _) = self::record(&text, &folder, "x.json");
    assert_eq!(text["results"]["total_output_tokens"], 4 * 5);
    assert!(text["results"]["total_input_tokens"].as_u64().unwrap() > 0);

    let output = run(&["bench", "report", path.to_str().unwrap()]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("| engine | model | a output tok/s |"), "{table}");
    assert!(table.contains("| ours | tiny |"), "{table}");
}

#[test]
fn a_server_that_refuses_is_quoted() {
    let server = Server::start();
    let target = ["bench", "serve", "--base-url", &server.url, "--model", "other"];
    let error = refusal(&[&target[..], &["--no-limits"]].concat());
    assert!(error.contains("404") && error.contains("other"), "{error}");
}

#[test]
fn steps_are_measured_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let sweeps = ["--batch-sizes", "1,4", "--batch-context-len", "32", "--context-lens", "16,48"];
    let args = [&["bench", "steps", "--num-iters", "1"], &sweeps[..], SMALL].concat();
    let (record, path) = record(&args, &folder, "steps.json");
    let rows = record["results"]["rows"].as_array().unwrap();
    let cells: Vec<_> = rows.iter().map(|r| (&r["batch_size"], &r["context_len"])).collect();
    let expected = [(1, 32), (4, 32), (1, 16), (1, 48)].map(|(b, c)| (Value::from(b), c.into()));
    assert_eq!(cells, expected.iter().map(|(b, c)| (b, c)).collect::<Vec<_>>());
    let kv_token_bytes = record["model"]["kv_token_bytes"].as_u64().unwrap();
    let read = |row: usize| rows[row]["read_bytes"].as_u64().unwrap();
    assert_eq!(read(1) - read(0), 3 * 32 * kv_token_bytes);
    assert_eq!(read(3) - read(2), 32 * kv_token_bytes);

    let out = folder.path().join("report");
    let output = run(&["bench", "report", path.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in ["report.md", "steps-batch.svg", "steps-context.svg"] {
        assert!(Path::new(&out).join(file).is_file(), "{file} is written");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_with_its_flag() {
    let small = |args: &[&str]| refusal(&[&["bench"], args, SMALL].concat());
    let error = small(&["latency", "--input-len", "5000"]);
    assert!(error.contains("--input-len") && error.contains("--max-model-len"), "{error}");
    let error = small(&["latency", "--batch-size", "2", "--max-num-seqs", "1"]);
    assert!(error.contains("--batch-size is 2"), "{error}");
    let error = small(&["throughput", "--num-prompts", "0"]);
    assert!(error.contains("--num-prompts") && error.contains("at least 1"), "{error}");
    let error = small(&["latency", "--output-json", "/nowhere/at/all.json"]);
    assert!(error.contains("--output-json /nowhere/at/all.json"), "{error}");
    let error = small(&["steps", "--context-lens", "100000"]);
    assert!(error.contains("100000") && error.contains("--max-model-len"), "{error}");
    let error = refusal(&["bench", "serve", "--base-url", "https://box"]);
    assert!(error.contains("--base-url") && error.contains("only http://"), "{error}");
}
