//! config.json of models with latent attention: sizes, routing, what is refused, what is unused.

use serde_json::{Value, json};
use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::checkpoint::{ExpectedTensor, TensorRole};
use tokenmill::config::{CpuIsa, Quantization};
use tokenmill::model::check::check;
use tokenmill::model::decoder::Decoder;
use tokenmill::model::spec::ModelSpec;
use tokenmill::ops::args::{GroupedRouting, RopeStyle, Routing, Scoring};
use tokenmill::ops::cpu::CpuOps;
use tokenmill::tensor::DType;
use tokenmill::weights::Loader;

/// DeepSeek-V2-Lite's config.json in small, with its published spellings.
fn config(architecture: &str, changes: Value) -> String {
    let mut config = json!({
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": null,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163_840,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096
        }
    });
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    config.to_string()
}

fn v2(changes: Value) -> ModelSpec {
    ModelSpec::from_config(&config("DeepseekV2ForCausalLM", changes)).unwrap()
}

fn v3(changes: Value) -> ModelSpec {
    ModelSpec::from_config(&config("DeepseekV3ForCausalLM", changes)).unwrap()
}

fn routing(spec: &ModelSpec) -> Routing {
    spec.layers[3].feed_forward.moe().unwrap().routing
}

#[test]
fn attention_has_one_cached_head_and_the_scale_of_its_heat() {
    let spec = v2(json!({}));
    let attention = &spec.layers[0].attention;
    assert_eq!((attention.num_kv_heads, attention.head_dim, attention.value_dim()), (1, 40, 32));
    assert_eq!(attention.cached_vectors(), 1);
    let heat = 0.1 * 0.707 * 40f64.ln() + 1.0;
    assert!((f64::from(attention.scale) - heat * heat / 24f64.sqrt()).abs() < 1e-6);
    assert_eq!((spec.rope.rotary_dim, spec.rope.style), (8, RopeStyle::Interleaved));
    assert!((spec.rope.magnitude() - 1.0).abs() < 1e-12, "equal weights cancel in angles");
    assert_eq!(spec.max_position, 163_840);
    let cold = json!({"rope_scaling": null});
    assert_eq!(v2(cold).layers[0].attention.scale, (1.0 / 24f64.sqrt()) as f32);
    let halves = v3(json!({"rope_interleave": false}));
    assert_eq!(halves.rope.style, RopeStyle::Halves);
}

#[test]
fn queries_are_compressed_or_not() {
    let latent = |spec: &ModelSpec| spec.layers[2].attention.latent().unwrap().clone();
    let direct = latent(&v2(json!({})));
    assert!(direct.q_down.is_none());
    assert_eq!(direct.q.name, "model.layers.2.self_attn.q_proj");
    assert_eq!((direct.q.out_features, direct.q.in_features), (96, 64));
    let compressed = latent(&v2(json!({"q_lora_rank": 20, "attention_bias": true})));
    let down = compressed.q_down.unwrap();
    assert_eq!((down.projection.out_features, down.projection.bias), (20, true));
    assert_eq!((compressed.q.in_features, compressed.q.bias), (20, false));
    assert_eq!(compressed.q.name, "model.layers.2.self_attn.q_b_proj");
    assert!(compressed.kv_down.projection.bias);
}

#[test]
fn layers_have_experts_from_the_first_one_on_and_shared_ones_beside() {
    let layers = |spec: &ModelSpec| -> Vec<bool> {
        spec.layers.iter().map(|layer| layer.feed_forward.moe().is_some()).collect()
    };
    assert_eq!(layers(&v2(json!({}))), [false, true, true, true]);
    assert_eq!(layers(&v2(json!({"first_k_dense_replace": 0}))), [true; 4]);
    assert_eq!(layers(&v2(json!({"moe_layer_freq": 2}))), [false, false, true, false]);
    let shared = |changes| {
        let spec = v2(changes);
        let shared = &spec.layers[1].feed_forward.moe().unwrap().shared;
        shared.as_ref().map(|shared| shared.intermediate_size)
    };
    assert_eq!(shared(json!({})), Some(32));
    assert_eq!(shared(json!({"n_shared_experts": null})), None);
}

#[test]
fn routing_is_that_of_the_generation() {
    let grouped = |scoring, num_groups, num_chosen_groups, renormalize, scale| {
        Routing::Grouped(GroupedRouting {
            scoring,
            num_groups,
            num_chosen_groups,
            renormalize,
            scale,
        })
    };
    assert_eq!(routing(&v2(json!({}))), grouped(Scoring::Softmax, 1, 1, false, 1.0));
    let limited = json!({
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3,
        "routed_scaling_factor": 16.0
    });
    assert_eq!(routing(&v2(limited)), grouped(Scoring::Softmax, 4, 3, false, 16.0));
    let newer = json!({
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 4, "topk_group": 2,
        "norm_topk_prob": true, "routed_scaling_factor": 2.5
    });
    let spec = v3(newer);
    assert_eq!(routing(&spec), grouped(Scoring::Sigmoid, 4, 2, true, 2.5));
    let bias = spec.layers[1].feed_forward.moe().unwrap().bias.clone().unwrap();
    assert_eq!(bias, "model.layers.1.mlp.gate.e_score_correction_bias");
}

#[test]
fn what_cannot_be_served_is_refused_with_one_sentence() {
    let cases = [
        (
            json!({"topk_method": "noaux_tc"}),
            "topk_method is \"noaux_tc\"; supported are greedy and \
          group_limited_greedy",
        ),
        (json!({"scoring_func": "sigmoid"}), "scoring_func is \"sigmoid\"; supported is softmax"),
        (json!({"norm_topk_prob": true}), "norm_topk_prob is true; supported is false"),
        (json!({"qk_rope_head_dim": 7}), "qk_rope_head_dim is 7; supported are even numbers"),
        (
            json!({"topk_method": "group_limited_greedy", "n_group": 3}),
            "n_group is 3; supported are divisors of n_routed_experts, which is 8, up to 32",
        ),
        (
            json!({"topk_method": "group_limited_greedy", "n_group": 8, "num_experts_per_tok": 2}),
            "topk_group is absent; supported are numbers up to 8 of groups that have 2 experts",
        ),
    ];
    for (changes, sentence) in cases {
        let config = config("DeepseekV2ForCausalLM", changes);
        let error = ModelSpec::from_config(&config).unwrap_err().to_string();
        assert_eq!(error, format!("config.json: {sentence}"));
    }
    let config = config("DeepseekV2ForCausalLM", json!({"kv_lora_rank": null}));
    let error = ModelSpec::from_config(&config).unwrap_err().to_string();
    assert_eq!(error, "config.json has no kv_lora_rank");
}

#[test]
fn layers_that_predict_further_tokens_are_not_missed() {
    let spec = v3(json!({"num_nextn_predict_layers": 1}));
    let mut tensors = spec.expected_tensors();
    let extra = |name: &str| ExpectedTensor {
        name: name.to_owned(),
        shape: vec![64],
        role: TensorRole::Norm,
    };
    tensors.push(extra("model.layers.4.eh_proj.weight"));
    check(&spec, &DummySource::new(tensors.clone(), DType::BF16)).unwrap();
    tensors.push(extra("model.layers.5.eh_proj.weight"));
    let error = check(&spec, &DummySource::new(tensors, DType::BF16)).unwrap_err().to_string();
    assert!(error.contains("model.layers.5.eh_proj.weight"), "{error}");
}

#[test]
fn matrices_of_heads_are_not_quantized_and_sizes_are_announced() {
    let spec = v3(json!({}));
    let source = DummySource::new(spec.expected_tensors(), DType::BF16);
    let ops = CpuOps::new(Some(1), CpuIsa::Auto).unwrap();
    let mut heads = spec.expected_tensors();
    heads.retain(|tensor| tensor.role == TensorRole::Heads);
    assert_eq!(heads.len(), 4);
    for quantization in [None, Some(Quantization::Int8), Some(Quantization::Int4)] {
        let loader = Loader::new(&source).arranged(&ops).quantized(quantization, 1);
        assert_eq!(loader.size_bytes(&heads), 4 * 4 * (16 + 24) * 32 * 2);
        Decoder::load(&spec, &loader, 64).unwrap();
    }
}
