//! candle-transformers as a second referee, computed at test time.
//!
//! It reads the older spelling of config.json, knows no biases in Llama and no linear or
//! YaRN scaling, and its window lets a query see one token more than transformers does, so
//! the configuration handed to it says one less.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, stable_lm};
use serde_json::{Map, Value, json};

use crate::recorded::Case;

/// The cases that candle can compute.
pub const SUPPORTED: [&str; 10] = [
    "llama",
    "llama_tied_f32",
    "llama_llama3",
    "mistral_window",
    "mixtral",
    "qwen2_tied",
    "qwen3",
    "qwen3_moe",
    "qwen3_tied",
    "stablelm",
];

/// Logits after the first `prompt_len` tokens of a case, computed in f32.
pub fn logits(case: &Case, prompt_len: usize) -> Vec<f32> {
    let weights = std::fs::read(case.folder.join("model.safetensors")).unwrap();
    let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu).unwrap();
    let prompt = &case.token_ids[..prompt_len];
    let prompt = Tensor::new(prompt, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let config = config_for_candle(case);
    let logits = match config["model_type"].as_str().unwrap() {
        "llama" => {
            let config: llama::LlamaConfig = serde_json::from_value(config).unwrap();
            let config = config.into_config(false);
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            let model = llama::Llama::load(weights, &config).unwrap();
            model.forward(&prompt, 0, &mut cache)
        }
        "mistral" => {
            let config = serde_json::from_value(config).unwrap();
            mistral::Model::new(&config, weights).unwrap().forward(&prompt, 0)
        }
        "mixtral" => {
            let config = serde_json::from_value(config).unwrap();
            mixtral::Model::new(&config, weights).unwrap().forward(&prompt, 0)
        }
        "qwen2" => {
            let config = serde_json::from_value(config).unwrap();
            qwen2::ModelForCausalLM::new(&config, weights).unwrap().forward(&prompt, 0)
        }
        "qwen3" => {
            let config = serde_json::from_value(config).unwrap();
            qwen3::ModelForCausalLM::new(&config, weights).unwrap().forward(&prompt, 0)
        }
        "qwen3_moe" => {
            let config = serde_json::from_value(config).unwrap();
            qwen3_moe::ModelForCausalLM::new(&config, weights).unwrap().forward(&prompt, 0)
        }
        "stablelm" => {
            let config = serde_json::from_value(config).unwrap();
            stable_lm::Model::new(&config, weights).unwrap().forward(&prompt, 0)
        }
        other => panic!("candle has no {other} here"),
    };
    logits.unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// config.json with the fields that candle requires, in its spelling.
fn config_for_candle(case: &Case) -> Value {
    let mut config: Map<String, Value> = serde_json::from_str(&case.config_json).unwrap();
    if let Some(Value::Object(rope)) = config.remove("rope_parameters") {
        assert_eq!(rope["rope_type"], "default", "{}", case.name);
        config.insert("rope_theta".to_owned(), rope["rope_theta"].clone());
    }
    let window = config.get("sliding_window").and_then(Value::as_u64);
    if let Some(window) = window {
        config.insert("sliding_window".to_owned(), json!(window - 1));
    } else if config["model_type"] == "qwen2" || config["model_type"] == "mixtral" {
        config.insert("sliding_window".to_owned(), json!(case.token_ids.len()));
    }
    if config["model_type"] == "mixtral" {
        config.insert("use_flash_attn".to_owned(), json!(false));
    }
    if let Some(num_experts) = config.get("num_local_experts").cloned() {
        config.insert("num_experts".to_owned(), num_experts);
    }
    if config["model_type"] == "qwen3_moe" {
        config.insert("max_window_layers".to_owned(), json!(0));
    }
    Value::Object(config)
}

#[test]
fn candle_and_transformers_agree() {
    for name in SUPPORTED {
        let case = Case::named(name);
        for prompt_len in [1, 17, case.token_ids.len()] {
            let computed = logits(&case, prompt_len);
            let recorded = case.logits_after(prompt_len);
            assert_eq!(computed.len(), recorded.len());
            for (token, (computed, recorded)) in computed.iter().zip(recorded).enumerate() {
                // Both sum in f32, in different orders; logits have a deviation near 1.5.
                assert!(
                    (computed - recorded).abs() < 1e-4,
                    "{name}: token {token} after {prompt_len} is {computed}, recorded {recorded}",
                );
            }
        }
    }
}
