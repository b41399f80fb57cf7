//! config.json: defaults, both spellings, and one sentence for what cannot be served.

use serde_json::{Value, json};
use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::checkpoint::{CheckpointError, TensorInfo, TensorSource};
use tokenmill::model::check::check;
use tokenmill::model::error::ModelError;
use tokenmill::model::rope::RopeScaling;
use tokenmill::model::spec::{FeedForwardSpec, ModelSpec};
use tokenmill::ops::args::Activation;
use tokenmill::tensor::{DType, Tensor};

/// The smallest config.json of an architecture, with some fields changed.
fn config(architecture: &str, changes: Value) -> String {
    let mut config = json!({
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
    });
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    config.to_string()
}

fn spec(architecture: &str, changes: Value) -> ModelSpec {
    ModelSpec::from_config(&config(architecture, changes)).unwrap()
}

fn llama(changes: Value) -> ModelSpec {
    spec("LlamaForCausalLM", changes)
}

fn refusal(changes: Value) -> String {
    ModelSpec::from_config(&config("LlamaForCausalLM", changes)).unwrap_err().to_string()
}

fn windows(spec: &ModelSpec) -> Vec<Option<usize>> {
    spec.layers.iter().map(|layer| layer.attention.sliding_window).collect()
}

#[test]
fn fields_that_are_left_out_have_the_familys_defaults() {
    let llama = llama(json!({}));
    assert_eq!(llama.layers[0].attention.num_kv_heads, 32);
    assert_eq!(llama.layers[0].attention.head_dim, 2);
    assert_eq!((llama.max_position, llama.norm_eps, llama.tied), (2048, 1e-6, false));
    assert_eq!((llama.rope.theta, llama.dtype), (10_000.0, DType::BF16));
    assert!(llama.eos_token_ids.is_empty() && llama.bos_token_id.is_none());

    let mistral = spec("MistralForCausalLM", json!({}));
    assert_eq!(mistral.layers[0].attention.num_kv_heads, 8);
    assert_eq!(windows(&mistral), [Some(4096); 3]);

    let qwen3 = spec("Qwen3ForCausalLM", json!({}));
    assert_eq!(qwen3.layers[0].attention.head_dim, 128);
    let heads = qwen3.layers[0].attention.heads().unwrap();
    assert_eq!(heads.q.out_features, 32 * 128);
    assert!(heads.qk_norm.is_some());
}

#[test]
fn null_turns_a_window_off_and_a_head_count_into_multi_head() {
    let changes = json!({"sliding_window": null, "num_key_value_heads": null});
    let mistral = spec("MistralForCausalLM", changes);
    assert_eq!(windows(&mistral), [None; 3]);
    assert_eq!(mistral.layers[0].attention.num_kv_heads, 32);
}

#[test]
fn qwen_windows_need_their_switch_and_start_at_a_layer() {
    let qwen = |changes| windows(&spec("Qwen2ForCausalLM", changes));
    assert_eq!(qwen(json!({"sliding_window": 8, "max_window_layers": 1})), [None; 3]);
    assert_eq!(
        qwen(json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1})),
        [None, Some(8), Some(8)]
    );
    assert_eq!(qwen(json!({"use_sliding_window": true, "max_window_layers": 0})), [Some(4096); 3]);
    let types = ["sliding_attention", "full_attention", "sliding_attention"];
    assert_eq!(
        qwen(json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": types})),
        [Some(8), None, Some(8)]
    );
}

#[test]
fn both_spellings_of_the_rotary_parameters_mean_the_same() {
    let scaling = json!({"type": "linear", "factor": 2.0});
    let old = llama(json!({"rope_theta": 5e5, "rope_scaling": scaling}));
    let parameters = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5});
    let new = llama(json!({"rope_parameters": parameters}));
    assert_eq!(old, new);
    assert_eq!(new.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!((new.rope.theta, new.max_position), (5e5, 4096));
}

#[test]
fn yarn_infers_its_attention_factor_and_its_reach() {
    let yarn = |changes: Value| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 4.0});
        for (name, value) in changes.as_object().unwrap() {
            scaling[name] = value.clone();
        }
        llama(json!({"rope_scaling": scaling}))
    };
    let attention_factor = |spec: &ModelSpec| match spec.rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => attention_factor,
        _ => panic!("not yarn"),
    };
    let plain = yarn(json!({"original_max_position_embeddings": 1024}));
    assert!((attention_factor(&plain) - 1.138_629_436).abs() < 1e-9);
    assert_eq!(plain.max_position, 4096);
    assert_eq!(attention_factor(&yarn(json!({"attention_factor": 1.5}))), 1.5);
    let weighted = yarn(json!({"mscale": 1.0, "mscale_all_dim": 1.0}));
    assert_eq!(attention_factor(&weighted), 1.0);
    assert_eq!(weighted.max_position, 8192);
}

#[test]
fn end_tokens_are_one_or_several() {
    assert_eq!(llama(json!({"eos_token_id": 7})).eos_token_ids, [7]);
    assert_eq!(llama(json!({"eos_token_id": [7, 9]})).eos_token_ids, [7, 9]);
}

#[test]
fn dtypes_and_activations_have_several_names() {
    assert_eq!(llama(json!({"torch_dtype": "float16"})).dtype, DType::F16);
    assert_eq!(llama(json!({"dtype": "float32"})).dtype, DType::F32);
    let activation = |name| {
        let spec = llama(json!({"hidden_act": name}));
        match &spec.layers[0].feed_forward {
            FeedForwardSpec::Mlp(mlp) => mlp.activation,
            FeedForwardSpec::Moe(_) => panic!("Llama has no experts"),
        }
    };
    assert_eq!(activation("silu"), Activation::Silu);
    assert_eq!(activation("gelu_pytorch_tanh"), Activation::GeluTanh);
    assert_eq!(activation("gelu"), Activation::Gelu);
}

#[test]
fn what_cannot_be_served_is_refused_with_one_sentence() {
    let cases = [
        (
            json!({"rope_scaling": {"rope_type": "longrope"}}),
            r#"config.json: rope_scaling.rope_type is "longrope"; supported are default, linear, llama3, yarn"#,
        ),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}),
            r#"config.json: rope_parameters.full_attention is {"rope_theta":1.0}; supported is one set of rotary parameters for all layers"#,
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear"}}),
            "config.json has no rope_scaling.factor",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "config.json: partial_rotary_factor is 0.5; supported is 1",
        ),
        (
            json!({"architectures": ["GPT2LMHeadModel"]}),
            r#"config.json: architectures is ["GPT2LMHeadModel"]; supported are DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, StableLmForCausalLM"#,
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            r#"config.json: quantization_config.quant_method is "gptq"; supported are mxfp4, compressed-tensors in the format mxfp4-pack-quantized, and checkpoints without quantization_config (bf16, f16 or f32 weights)"#,
        ),
        (
            json!({"hidden_act": "relu"}),
            r#"config.json: hidden_act is "relu"; supported are silu, gelu and gelu_pytorch_tanh"#,
        ),
        (
            json!({"num_key_value_heads": 5}),
            "config.json: num_key_value_heads is 5; supported are divisors of num_attention_heads, which is 32",
        ),
        (
            json!({"hidden_size": 65}),
            "config.json: hidden_size is 65; supported are multiples of num_attention_heads, which is 32",
        ),
        (json!({"head_dim": 3}), "config.json: head_dim is 3; supported are even widths of a head"),
        (json!({"vocab_size": null}), "config.json has no vocab_size"),
        (
            json!({"vocab_size": "many"}),
            r#"config.json: vocab_size is "many"; supported is a whole number from 1 to 16777216"#,
        ),
        (
            json!({"num_hidden_layers": 100_000}),
            "config.json: num_hidden_layers is 100000; supported is a whole number from 1 to 4096",
        ),
        (
            json!({"rms_norm_eps": -1.0}),
            "config.json: rms_norm_eps is -1.0; supported is a number above 0",
        ),
        (
            json!({"dtype": "float8_e4m3fn"}),
            r#"config.json: dtype is "float8_e4m3fn"; supported are bfloat16, float16 and float32"#,
        ),
        (
            json!({"eos_token_id": -1}),
            "config.json: eos_token_id is -1; supported is a token id or a list of them",
        ),
    ];
    for (changes, sentence) in cases {
        assert_eq!(refusal(changes), sentence);
    }
    assert!(matches!(ModelSpec::from_config("{"), Err(ModelError::MalformedConfig { .. })));
    assert!(matches!(ModelSpec::from_config("[]"), Err(ModelError::MalformedConfig { .. })));
}

/// A source in which some tensors have another shape, are absent, or were added.
struct Altered {
    inner: DummySource,
    absent: Vec<String>,
    added: Vec<String>,
}

impl TensorSource for Altered {
    fn names(&self) -> Vec<String> {
        let mut names = self.inner.names();
        names.retain(|name| !self.absent.contains(name));
        names.extend(self.added.iter().cloned());
        names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let name = if self.added.iter().any(|a| a == name) { "model.norm.weight" } else { name };
        self.inner.info(name).filter(|_| !self.absent.iter().any(|a| a == name))
    }

    fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        self.inner.tensor(name)
    }
}

/// The sentence of the check when the checkpoint was written for another configuration.
fn mismatch(written_for: Value, absent: &[&str], added: &[&str]) -> String {
    let inner = DummySource::new(llama(written_for).expected_tensors(), DType::BF16);
    let own = |names: &[&str]| names.iter().copied().map(str::to_owned).collect();
    let source = Altered { inner, absent: own(absent), added: own(added) };
    match check(&llama(json!({})), &source) {
        Ok(()) => "fits".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_checkpoint_is_compared_with_its_description() {
    assert_eq!(mismatch(json!({}), &[], &[]), "fits");
    assert_eq!(mismatch(json!({}), &[], &["model.layers.0.rotary_emb.inv_freq"]), "fits");
    assert_eq!(
        mismatch(json!({}), &["lm_head.weight"], &["model.layers.0.extra.weight"]),
        "the checkpoint does not match config.json: lm_head.weight [100, 64] is missing; \
         model.layers.0.extra.weight [64] in random weights is not part of the model"
    );
    assert_eq!(
        mismatch(json!({"vocab_size": 101}), &[], &[]),
        "the checkpoint does not match config.json: model.embed_tokens.weight in random weights \
         has shape [101, 64] instead of [100, 64]; lm_head.weight in random weights has shape \
         [101, 64] instead of [100, 64]"
    );
    let many = mismatch(json!({"hidden_size": 128}), &[], &[]);
    assert!(many.ends_with("and 20 more"), "{many}");
    assert_eq!(many.matches("instead of").count(), 10);
}

#[test]
fn tied_models_need_no_output_projection_and_ignore_a_spare_one() {
    let tied = llama(json!({"tie_word_embeddings": true}));
    let untied = llama(json!({}));
    assert_eq!(untied.expected_tensors().len(), tied.expected_tensors().len() + 1);
    let source = DummySource::new(untied.expected_tensors(), DType::BF16);
    assert!(check(&tied, &source).is_ok());
    let source = DummySource::new(tied.expected_tensors(), DType::BF16);
    assert!(check(&untied, &source).is_err());
}
