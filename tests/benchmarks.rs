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
fn a_prompt_can_be_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = ["--batch-sizes", "1", "--batch-context-len", "16", "--context-lens", "16"];
    let prompts = ["--prompt-lens", "24,48", "--num-iters", "1"];
    let args = [&["bench", "steps"], &sizes[..], &prompts, SMALL].concat();
    let (record, path) = record(&args, &folder, "steps.json");
    let rows = record["results"]["rows"].as_array().unwrap();
    assert_eq!((&rows[3]["sweep"], &rows[3]["context_len"]), (&"prompt".into(), &48.into()));
    let flops = |row: usize| rows[row]["flops"].as_f64().unwrap();
    assert!(flops(3) > 1.9 * flops(2) && flops(2) > 12.0 * flops(0), "one token needs logits");
    let report = run(&["bench", "report", path.to_str().unwrap()]);
    let report = String::from_utf8(report.stdout).unwrap();
    assert!(report.contains("prompts\n\n| tokens | step p50 ms |"), "{report}");
}

#[test]
fn products_and_attention_are_measured_beside_this_machines_limits() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = "bench kernels --device cpu --threads 1 --hidden-size 64 --intermediate-size 96 \
         --num-heads 2 --num-kv-heads 1 --head-dim 32 --context-len 40 --batch-size 2 \
         --copy-size 1M --weights-size 1M --milliseconds 0 --no-limits";
    let args: Vec<&str> = sizes.split_whitespace().collect();
    let limits = folder.path().join("limits.json");
    let limit = |limit: &str, unit: &str| serde_json::json!({"threads": 1, "limit": limit, "unit": unit, "value": 1e6});
    let all = [limit("memory read", "GB/s"), limit("f32 FMA, AVX2", "GFLOP/s")];
    std::fs::write(&limits, serde_json::json!({"limits": all}).to_string()).unwrap();
    let args = [&args[..], &["--limits-json", limits.to_str().unwrap()]].concat();
    let (record, _) = record(&args, &folder, "k.json");
    assert_eq!(record["benchmark"], "kernels");
    let rows = record["results"]["rows"].as_array().unwrap();
    let row = |case: &str| rows.iter().find(|row| row["case"] == case).unwrap();
    let int4 = row("int4, 2048 rows");
    let allowed = int4["flops"].as_f64().unwrap() / 1e15 * 1e6;
    let fraction = allowed / int4["microseconds"].as_f64().unwrap();
    assert!((int4["fraction"].as_f64().unwrap() / fraction - 1.0).abs() < 1e-6, "{int4}");
    assert!(rows[0]["fraction"].is_null(), "a copy is a limit itself");
}

/// Writes a record that looks like one of a GPU's.
fn gpu_record(folder: &TempDir, name: &str, kind: &str, model: &Value, results: &Value) -> String {
    let limit = |limit: &str, unit: &str, value: f64| serde_json::json!({"limit": limit, "unit": unit, "value": value});
    let record = serde_json::json!({
        "benchmark": kind, "date": "2026-12-01T10:00:00+00:00", "tokenmill": "0.1.0",
        "machine": {"cpu": "Xeon", "num_cpus": 16, "memory_bytes": 1, "gpus": ["NVIDIA H200"]},
        "metadata": {"device": "cuda (0 NVIDIA H200)"}, "model": model, "options": {},
        "limits": [
            limit("memory copy", "GB/s", 4000.0), limit("bf16 matmul", "GFLOP/s", 800_000.0),
            limit("fp8 matmul", "GFLOP/s", 1_600_000.0)
        ],
        "results": results
    });
    let path = folder.path().join(format!("{name}.json"));
    std::fs::write(&path, record.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// What `bench report --out` makes of records: the report, and the names of all files.
fn report_of(folder: &TempDir, records: &[String]) -> (String, Vec<String>) {
    let out = folder.path().join("report");
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let args = [&["bench", "report", "--out", out.to_str().unwrap()], &records[..]].concat();
    let output = run(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = std::fs::read_dir(&out).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    (std::fs::read_to_string(out.join("report.md")).unwrap(), names.collect())
}

#[test]
fn steps_of_a_gpu_stand_beside_the_limits_of_the_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let model = serde_json::json!({
        "name": "out/llama", "backend": "cuda (0 NVIDIA H200)", "threads": 16, "quantization": "fp8"
    });
    let spread =
        |ms: f64| serde_json::json!({"mean": ms, "p50": ms, "p90": ms, "p99": ms, "max": ms});
    let row = |sweep: &str, ms: f64, bytes: u64, flops: u64| {
        serde_json::json!({
            "sweep": sweep, "batch_size": 1, "context_len": 1024, "step_ms": spread(ms),
            "tokens_per_s": 1e3 / ms, "read_bytes": bytes, "flops": flops
        })
    };
    // 8 GB at 4,000 GB/s are 2 ms; 16 TFLOP at 1,600 are 10.
    let rows = [row("batch", 2.5, 8_000_000_000, 1), row("prompt", 20.0, 1, 16_000_000_000_000)];
    let steps =
        gpu_record(&folder, "steps-fp8", "steps", &model, &serde_json::json!({"rows": rows}));
    let (report, files) = report_of(&folder, &[steps]);
    assert!(report.contains("- NVIDIA H200, 2026-12-01, tokenmill 0.1.0: steps-fp8"), "{report}");
    assert!(report.contains("steps-fp8 (llama in fp8), decode steps"), "{report}");
    assert!(report.contains("| 1 | 1024 | 2.50 | 400 | 0.00 | 2.00 | 80 % |"), "{report}");
    assert!(report.contains("| 1024 | 20.0 | 50.0 | 800 | 10.0 | 50 % |"), "{report}");
    assert!(files.contains(&"steps-fp8-batch.svg".to_owned()), "{files:?}");
    assert!(files.contains(&"steps-fp8-prompt.svg".to_owned()), "{files:?}");
}

#[test]
fn kernels_stand_beside_pytorch_and_checks_are_tables() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = |rows: usize, fraction: f64| {
        serde_json::json!({
            "operation": "matmul", "case": format!("bf16, {rows} rows"), "format": "bf16", "rows": rows,
            "microseconds": 30.0, "bytes": 1.2e8, "flops": 1e8, "fraction": fraction
        })
    };
    let results = serde_json::json!({"rows": [kernel(1, 0.9), kernel(2048, 0.7)]});
    let backend = serde_json::json!({"backend": "cuda (0 NVIDIA H200)"});
    let case = |error: f64| {
        serde_json::json!({
            "operation": "rope", "case": "halves", "error": error, "limit": 0.03, "passed": error < 0.03
        })
    };
    let cases = serde_json::json!({"cases": [case(0.001), case(0.1)]});
    let records = [
        gpu_record(&folder, "kernels", "kernels", &backend, &results),
        gpu_record(&folder, "verify", "verify", &backend, &cases),
    ];
    // What scripts measure is kept by the program itself.
    let keep = |kind: &str, results: &Value| {
        let results_path = folder.path().join(format!("{kind}-results.json"));
        std::fs::write(&results_path, results.to_string()).unwrap();
        let path = folder.path().join(format!("{kind}.json")).to_str().unwrap().to_owned();
        let args = ["bench", "record", kind, results_path.to_str().unwrap()];
        let device = ["--metadata", "device=cuda (0 NVIDIA H200)", "--output-json", &path];
        let output = run(&[&args[..], &device].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        path
    };
    let torch =
        serde_json::json!({"operation": "matmul", "case": "bf16, 1 rows", "microseconds": 28.5});
    let golden = serde_json::json!({"passed": 319, "prompts": 370, "accuracy": 0.862, "least": 0.85, "tasks": {"facts": 1.0}});
    let start = serde_json::json!({"ready_ms": 1234.0, "token_ms": 1300.0});
    let kept = [
        keep("torch", &serde_json::json!({"torch": "2.9", "rows": [torch]})),
        keep("golden", &serde_json::json!({"int8": golden})),
        keep("start", &serde_json::json!({"first": start})),
    ];
    let (report, files) = report_of(&folder, &[&records[..], &kept].concat());
    for row in [
        "| matmul | bf16, 1 rows | 30.0 | 4000 | 3.33 | 90 % | 28.5 |",
        "| matmul | bf16, 2048 rows | 30.0 | 4000 | 3.33 | 70 % |  |",
        "| rope | 1 of 2 | 0.10000 of 0.03 | halves |",
        "| int8 | 319 of 370 | 86.2 % | 85.0 % | facts 100 % |",
        "| first | 1234 | 1300 |",
    ] {
        assert!(report.contains(row), "{row} in\n{report}");
    }
    assert!(report.contains("golden (NVIDIA H200)"), "{report}");
    assert!(files.contains(&"kernels-matmul.svg".to_owned()), "{files:?}");

    let wrong = folder.path().join("wrong.json");
    std::fs::write(&wrong, "{\"rows\": 3}").unwrap();
    let error = refusal(&["bench", "record", "torch", wrong.to_str().unwrap()]);
    assert!(error.contains("wrong.json holds no such results"), "{error}");
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
