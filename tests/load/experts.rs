//! config.json of models with experts: which layers have them, how they choose, what is refused.

use serde_json::{Value, json};
use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::checkpoint::{TensorRole, TensorSource};
use tokenmill::config::{CpuIsa, Quantization};
use tokenmill::model::check::check;
use tokenmill::model::decoder::Decoder;
use tokenmill::model::spec::{ModelSpec, MoeSpec};
use tokenmill::ops::args::Routing;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::tensor::DType;
use tokenmill::weights::Loader;

fn config(architecture: &str, changes: Value) -> String {
    let mut config = json!({
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    });
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    config.to_string()
}

fn spec(architecture: &str, changes: Value) -> ModelSpec {
    ModelSpec::from_config(&config(architecture, changes)).unwrap()
}

fn qwen(changes: Value) -> ModelSpec {
    spec("Qwen3MoeForCausalLM", changes)
}

/// The layers with experts.
fn moes(spec: &ModelSpec) -> Vec<Option<&MoeSpec>> {
    spec.layers.iter().map(|layer| layer.feed_forward.moe()).collect()
}

#[test]
fn fields_that_are_left_out_have_the_familys_defaults() {
    let mixtral = spec("MixtralForCausalLM", json!({}));
    let moe = moes(&mixtral)[3].unwrap();
    assert_eq!((moe.experts.len(), moe.experts_per_token), (8, 2));
    assert_eq!(moe.routing, Routing::Softmax { renormalize: true });
    assert_eq!(moe.experts[7].intermediate_size, 96);
    assert_eq!((mixtral.rope.theta, mixtral.norm_eps), (1e6, 1e-5));
    assert!(mixtral.layers.iter().all(|layer| layer.attention.sliding_window.is_none()));

    let qwen = qwen(json!({}));
    let moe = moes(&qwen)[0].unwrap();
    assert_eq!((moe.experts.len(), moe.experts_per_token), (128, 8));
    assert_eq!(moe.routing, Routing::Softmax { renormalize: false });
    assert_eq!(moe.experts[0].intermediate_size, 768);
    assert_eq!(qwen.layers[0].attention.num_kv_heads, 4);
    assert_eq!((qwen.num_experts(), qwen.experts_per_token()), (128, 8));
}

#[test]
fn tensors_have_the_names_of_their_family() {
    let mixtral = spec("MixtralForCausalLM", json!({}));
    let moe = moes(&mixtral)[2].unwrap();
    assert_eq!(moe.router.name, "model.layers.2.block_sparse_moe.gate");
    let names = [&moe.experts[5].gate, &moe.experts[5].up, &moe.experts[5].down];
    let ends = names.map(|linear| linear.name.rsplit_once("experts.").unwrap().1);
    assert_eq!(ends, ["5.w1", "5.w3", "5.w2"]);
    assert_eq!((moe.experts[5].down.out_features, moe.experts[5].down.in_features), (64, 96));

    let qwen = qwen(json!({}));
    let moe = moes(&qwen)[1].unwrap();
    assert_eq!(moe.router.name, "model.layers.1.mlp.gate");
    assert_eq!(moe.experts[127].up.name, "model.layers.1.mlp.experts.127.up_proj");
}

#[test]
fn layers_have_experts_by_step_and_exception() {
    let layers =
        |changes| -> Vec<bool> { moes(&qwen(changes)).iter().map(Option::is_some).collect() };
    assert_eq!(layers(json!({"decoder_sparse_step": 2})), [false, true, false, true]);
    assert_eq!(layers(json!({"mlp_only_layers": [0, 2]})), [false, true, false, true]);
    let both = json!({"decoder_sparse_step": 2, "mlp_only_layers": [1]});
    assert_eq!(layers(both), [false, false, false, true]);
    assert_eq!(layers(json!({"mlp_only_layers": null})), [true; 4]);
}

#[test]
fn both_spellings_of_the_number_of_experts_mean_the_same() {
    let old = qwen(json!({"num_experts": 6, "num_experts_per_tok": 6, "norm_topk_prob": true}));
    let new =
        qwen(json!({"num_local_experts": 6, "num_experts_per_tok": 6, "norm_topk_prob": true}));
    assert_eq!(old, new);
    assert_eq!(moes(&old)[0].unwrap().routing, Routing::Softmax { renormalize: true });
}

#[test]
fn a_window_is_every_layers_if_it_is_used() {
    let windows = |changes| -> Vec<Option<usize>> {
        qwen(changes).layers.iter().map(|layer| layer.attention.sliding_window).collect()
    };
    let changes = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 2});
    assert_eq!(windows(changes), [Some(9); 4]);
    assert_eq!(windows(json!({"sliding_window": 9})), [None; 4]);
}

#[test]
fn what_cannot_be_served_is_refused_with_one_sentence() {
    let cases = [
        (
            json!({"num_experts": 4, "num_experts_per_tok": 5}),
            "config.json: num_experts_per_tok is 5; supported are numbers up to that of the \
             experts, which is 4",
        ),
        (
            json!({"num_experts": 100_000}),
            "config.json: num_experts is 100000; supported is a whole number from 1 to 65536",
        ),
        (
            json!({"num_experts": 0}),
            "config.json: num_experts is 0; supported is a whole number from 1 to 16777216",
        ),
        (
            json!({"mlp_only_layers": [-1]}),
            "config.json: mlp_only_layers is [-1]; supported is a list of whole numbers",
        ),
        (
            json!({"norm_topk_prob": 1}),
            "config.json: norm_topk_prob is 1; supported are true and false",
        ),
    ];
    for (changes, sentence) in cases {
        let config = config("Qwen3MoeForCausalLM", changes);
        assert_eq!(ModelSpec::from_config(&config).unwrap_err().to_string(), sentence);
    }
}

#[test]
fn a_router_is_not_quantized_and_sizes_are_announced() {
    let spec = spec("MixtralForCausalLM", json!({}));
    let source = DummySource::new(spec.expected_tensors(), DType::BF16);
    check(&spec, &source).unwrap();
    let ops = CpuOps::new(Some(1), CpuIsa::Auto).unwrap();
    let of_role = |role| -> Vec<_> {
        spec.expected_tensors().into_iter().filter(|tensor| tensor.role == role).collect()
    };
    let plain = Loader::new(&source).arranged(&ops);
    let quantized = plain.quantized(Some(Quantization::Int4), 1);
    let routers = of_role(TensorRole::Router);
    assert_eq!(routers.len(), 4);
    assert_eq!(quantized.size_bytes(&routers), plain.size_bytes(&routers));
    let matrices = of_role(TensorRole::Matrix);
    assert!(quantized.size_bytes(&matrices) * 3 < plain.size_bytes(&matrices));
    Decoder::load(&spec, &quantized, 64).unwrap();
    assert!(source.info("model.layers.0.block_sparse_moe.gate.weight").is_some());
}

#[test]
fn a_checkpoint_without_an_expert_is_refused_by_the_tensors_name() {
    let spec = qwen(json!({"num_experts": 3, "num_experts_per_tok": 2}));
    let missing = "model.layers.1.mlp.experts.2.up_proj.weight";
    let mut tensors = spec.expected_tensors();
    tensors.retain(|tensor| tensor.name != missing);
    let narrow = tensors.iter_mut().find(|t| t.name.ends_with("layers.0.mlp.gate.weight")).unwrap();
    narrow.shape = vec![2, 64];
    let error = check(&spec, &DummySource::new(tensors, DType::BF16)).unwrap_err().to_string();
    assert!(error.contains(missing), "{error}");
    assert!(error.contains("model.layers.0.mlp.gate.weight"), "{error}");
    assert!(error.contains("[2, 64]") && error.contains("[3, 64]"), "{error}");
}
