//! A server's resident memory: weights lie there once, packed, however they were stored.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;
use tempfile::TempDir;
use tokenmill::model::spec::ModelSpec;

const HIDDEN: usize = 512;
const INTERMEDIATE: usize = 2048;

/// Weights of a layer's matrices.
const LAYER_LEN: usize = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE;

/// A checkpoint in bf16 with the bundled tokenizer.
fn checkpoint(num_layers: usize) -> TempDir {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 4096,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": 8,
        "num_key_value_heads": 8, "num_hidden_layers": num_layers, "tie_word_embeddings": true,
        "max_position_embeddings": 512, "eos_token_id": 2,
    })
    .to_string();
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("config.json"), &config).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny").join(name);
        fs::copy(bundled, folder.path().join(name)).unwrap();
    }
    let expected = ModelSpec::from_config(&config).unwrap().expected_tensors();
    let largest = expected.iter().map(|tensor| tensor.shape.iter().product()).max();
    // Any numbers will do: about ±1/128.
    let numbers: Vec<u8> = (0..largest.unwrap())
        .flat_map(|i: usize| [(i * 37) as u8, 0x3c - (i as u8 & 0x80)])
        .collect();
    let views = expected.iter().map(|tensor| {
        let len: usize = tensor.shape.iter().product();
        let view = TensorView::new(Dtype::BF16, tensor.shape.clone(), &numbers[..2 * len]);
        (tensor.name.clone(), view.unwrap())
    });
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

/// A server that is stopped at the end.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only when it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Resident bytes of a server that is ready, with or without quantizing.
fn resident_bytes(folder: &TempDir, quantization: Option<&str>) -> usize {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokenmill"));
    command.args(["serve", "--port", "0", "--device", "cpu", "--kv-cache-memory", "64M"]);
    command.arg("--model").arg(folder.path());
    command.args(quantization.iter().flat_map(|wanted| ["--quantization", wanted]));
    command.env("RUST_LOG", "warn").stdout(Stdio::piped());
    let mut server = Server(command.spawn().unwrap());
    // It says where it listens once everything is loaded.
    let mut stdout = BufReader::new(server.0.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("http://"), "{line}");
    std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
    let status = fs::read_to_string(format!("/proc/{}/status", server.0.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: usize = line.split_whitespace().next().unwrap().parse().unwrap();
    kib << 10
}

#[test]
fn what_is_resident_is_little_more_than_packed_weights() {
    // All that does not depend on the number of layers cancels out.
    let (small, large) = (checkpoint(1), checkpoint(17));
    let num_weights = (16 * LAYER_LEN) as f64;
    // Bytes of a weight, with its part of the scales (and zero points).
    let in_groups = |bytes: f64, of_group: f64, group: f64| bytes + of_group / group;
    for (quantization, bytes) in [
        (None, 2.0),
        (Some("int8"), in_groups(1.0, 4.0, HIDDEN as f64)),
        (Some("int4"), in_groups(0.5, 3.0, 32.0)),
    ] {
        let [small, large] = [&small, &large].map(|folder| resident_bytes(folder, quantization));
        let ratio = (large as f64 - small as f64) / (num_weights * bytes);
        assert!((0.9..1.1).contains(&ratio), "{quantization:?}: {ratio:.3} of the packed weights");
    }
}
