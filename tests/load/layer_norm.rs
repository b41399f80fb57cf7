//! Descriptions of StableLM: layer norms, heads of which a part rotates; and capped logits.

use serde_json::{Value, json};
use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::checkpoint::{CheckpointError, StoredDType, TensorInfo, TensorSource};
use tokenmill::model::check::check;
use tokenmill::model::error::ModelError;
use tokenmill::model::spec::{ModelSpec, NormSpec};
use tokenmill::tensor::{DType, Tensor};

fn read(architecture: &str, changes: Value) -> Result<ModelSpec, ModelError> {
    let mut config = json!({
        "architectures": [architecture], "vocab_size": 100, "hidden_size": 64,
        "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2
    });
    let changes = changes.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(changes);
    ModelSpec::from_config(&config.to_string())
}

fn stablelm(changes: Value) -> ModelSpec {
    read("StableLmForCausalLM", changes).unwrap()
}

fn refusal(changes: Value) -> String {
    read("StableLmForCausalLM", changes).unwrap_err().to_string()
}

#[test]
fn layer_norms_have_biases_and_their_own_epsilon() {
    let spec = stablelm(json!({"layer_norm_eps": 1e-3, "rms_norm_eps": 1e-2}));
    assert_eq!(spec.norm_eps, 1e-3);
    assert_eq!(stablelm(json!({})).norm_eps, 1e-5);
    let norm = |name: &str| NormSpec::Layer {
        weight: format!("{name}.weight"),
        bias: format!("{name}.bias"),
    };
    assert_eq!(spec.final_norm, norm("model.norm"));
    assert_eq!(spec.layers[1].input_norm, norm("model.layers.1.input_layernorm"));
    let names: Vec<String> = spec.expected_tensors().into_iter().map(|t| t.name).collect();
    assert!(names.contains(&"model.layers.0.post_attention_layernorm.bias".to_owned()));
    assert!(!names.iter().any(|name| name.ends_with("_proj.bias")), "{names:?}");
}

#[test]
fn biases_of_projections_are_where_the_familys_own_field_says() {
    let has_bias = |changes: Value| {
        let attention = &stablelm(changes).layers[0].attention;
        (attention.heads().unwrap().q.bias, attention.o.bias)
    };
    assert_eq!(has_bias(json!({"use_qkv_bias": true})), (true, false));
    assert_eq!(has_bias(json!({"attention_bias": true})), (false, false));
    let llama = read("LlamaForCausalLM", json!({"use_qkv_bias": true})).unwrap();
    assert!(!llama.layers[0].attention.heads().unwrap().q.bias);
}

#[test]
fn a_part_of_a_head_rotates_and_the_rotary_parameters_have_the_last_word() {
    let rotary_dim = |changes: Value| stablelm(changes).rope.rotary_dim;
    assert_eq!(rotary_dim(json!({})), 4);
    assert_eq!(rotary_dim(json!({"partial_rotary_factor": 1.0})), 16);
    let both = json!({
        "partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}
    });
    assert_eq!(rotary_dim(both), 8);
    for (factor, shown) in [(0.2, "0.2"), (0.05, "0.05"), (1.5, "1.5")] {
        assert_eq!(
            refusal(json!({"partial_rotary_factor": factor})),
            format!(
                "config.json: partial_rotary_factor is {shown}; supported are parts up to 1 that \
                 are an even number of 16 elements"
            ),
        );
    }
    // What config.json leaves out is the family's, which must fit its heads too.
    let odd = refusal(json!({"hidden_size": 24}));
    assert_eq!(
        odd,
        "config.json: partial_rotary_factor is absent; supported are parts up to 1 \
                     that are an even number of 6 elements"
    );
}

#[test]
fn blocks_that_there_are_not_are_refused_by_the_field_that_asks_for_them() {
    for flag in ["qk_layernorm", "use_parallel_residual"] {
        assert_eq!(
            refusal(json!({flag: true})),
            format!("config.json: {flag} is true; supported is false")
        );
        assert!(read("StableLmForCausalLM", json!({flag: false})).is_ok());
    }
}

#[test]
fn logits_are_capped_where_a_field_says_so() {
    assert_eq!(stablelm(json!({})).logit_softcap, None);
    let capped = json!({"final_logit_softcapping": 30.0});
    assert_eq!(stablelm(capped.clone()).logit_softcap, Some(30.0));
    assert_eq!(read("LlamaForCausalLM", capped).unwrap().logit_softcap, Some(30.0));
    assert_eq!(
        refusal(json!({"final_logit_softcapping": 0})),
        "config.json: final_logit_softcapping is 0; supported is a number above 0"
    );
}

/// A checkpoint in bf16 with one bias in f32.
struct Mixed(DummySource);

impl TensorSource for Mixed {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = self.0.info(name)?;
        let is_wide = name == "model.norm.bias";
        Some(if is_wide { TensorInfo { dtype: StoredDType::F32, ..info } } else { info })
    }

    fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        self.0.tensor(name)
    }
}

#[test]
fn a_norms_bias_of_another_dtype_than_its_weight_is_refused_by_name() {
    let spec = stablelm(json!({}));
    let source = DummySource::new(spec.expected_tensors(), DType::BF16);
    assert!(check(&spec, &source).is_ok());
    assert_eq!(
        check(&spec, &Mixed(source)).unwrap_err().to_string(),
        "the checkpoint does not match config.json: model.norm.bias in random weights has dtype \
         F32; supported are those of the norm's weight"
    );
}
