//! Descriptions of published models: the tensors they name add up to the published sizes.

use serde_json::{Value, json};
use tokenmill::model::rope::RopeScaling;
use tokenmill::model::spec::ModelSpec;

/// The parts of config.json that are the same in no two models.
fn spec(config: Value) -> ModelSpec {
    ModelSpec::from_config(&config.to_string()).unwrap()
}

fn num_parameters(spec: &ModelSpec) -> usize {
    spec.expected_tensors().iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum()
}

#[test]
fn llama_3_2_1b_has_its_published_size_and_reach() {
    let spec = spec(json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        },
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "vocab_size": 128256
    }));
    assert_eq!(num_parameters(&spec), 1_235_814_400);
    assert_eq!(spec.max_position, 131_072);
    assert!(matches!(spec.rope.scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
}

#[test]
fn stablelm_3b_has_its_published_size_and_rotates_a_quarter_of_a_head() {
    let spec = spec(json!({
        "architectures": ["StableLmForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 6912,
        "layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "model_type": "stablelm",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 50304
    }));
    assert_eq!(num_parameters(&spec), 2_795_443_200);
    assert_eq!((spec.layers[0].attention.head_dim, spec.rope.rotary_dim), (80, 20));
}

#[test]
fn mistral_7b_has_its_published_size_and_window() {
    let spec = spec(json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "vocab_size": 32000
    }));
    assert_eq!(num_parameters(&spec), 7_241_732_096);
    assert!(spec.layers.iter().all(|layer| layer.attention.sliding_window == Some(4096)));
}

#[test]
fn qwen2_5_0_5b_has_its_published_size_and_no_window() {
    let spec = spec(json!({
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_sliding_window": false,
        "vocab_size": 151936
    }));
    assert_eq!(num_parameters(&spec), 494_032_768);
    assert!(spec.layers.iter().all(|layer| layer.attention.sliding_window.is_none()));
}

#[test]
fn mixtral_8x7b_has_its_published_size() {
    let spec = spec(json!({
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": false, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 32000
    }));
    assert_eq!(num_parameters(&spec), 46_702_792_704);
}

#[test]
fn qwen3_30b_a3b_has_its_published_size() {
    let spec = spec(json!({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false,
        "vocab_size": 151936
    }));
    assert_eq!(num_parameters(&spec), 30_532_122_624);
}

#[test]
fn qwen3_0_6b_has_its_published_size_and_wide_heads() {
    let spec = spec(json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936
    }));
    assert_eq!(num_parameters(&spec), 596_049_920);
    let heads = spec.layers[0].attention.heads().unwrap();
    assert_eq!(heads.q.out_features, 2048);
}
