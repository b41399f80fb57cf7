//! Every recorded model loads, and its rotary tables are those of transformers.

use tokenmill::checkpoint::{Checkpoint, TensorSource};
use tokenmill::model::check::check;
use tokenmill::model::rope::{RopeScaling, RopeTable};
use tokenmill::model::spec::{ModelSpec, MoeSpec};
use tokenmill::ops::args::Routing;
use tokenmill::tensor::{DType, Tensor};

use crate::recorded::Case;

#[test]
fn every_recorded_model_holds_exactly_the_tensors_of_its_description() {
    for case in Case::all() {
        let spec = ModelSpec::from_config(&case.config_json)
            .unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let checkpoint = Checkpoint::open(&case.folder).unwrap();
        check(&spec, &checkpoint).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let first = checkpoint.tensor(&spec.embedding).unwrap();
        assert_eq!(first.dtype(), spec.dtype, "{}", case.name);
        assert_eq!(case.logits.shape().sizes(), [case.token_ids.len(), spec.vocab_size]);
    }
}

#[test]
fn descriptions_say_what_the_recorder_asked_for() {
    let spec = |name: &str| ModelSpec::from_config(&Case::named(name).config_json).unwrap();
    let windows = |name: &str| -> Vec<Option<usize>> {
        spec(name).layers.iter().map(|layer| layer.attention.sliding_window).collect()
    };
    assert_eq!(windows("llama"), [None, None]);
    assert_eq!(windows("mistral_window"), [Some(16), Some(16)]);
    assert_eq!(windows("qwen2_tied"), [None, None]);
    assert_eq!(windows("qwen2_upper_window"), [None, Some(12)]);
    assert!(spec("qwen2_tied").tied && !spec("llama").tied);
    assert_eq!(spec("llama").norm_eps, 1e-5);
    assert_eq!(spec("llama_tied_f32").eos_token_ids, [2, 3]);
    assert_eq!(spec("llama_tied_f32").dtype, DType::F32);
    assert_eq!(spec("llama_biases").dtype, DType::F16);
    assert!(spec("llama_biases").layers[0].attention.o.bias);
    assert!(!spec("qwen2_tied").layers[0].attention.o.bias);
    assert!(spec("qwen2_tied").layers[0].attention.heads().unwrap().q.bias);
    assert_eq!(spec("qwen3").layers[0].attention.head_dim, 24);
    assert_eq!(spec("qwen3").rope.theta, 1e6);
    let experts = |name: &str| -> Vec<Option<(usize, usize)>> {
        let moe = |moe: &MoeSpec| (moe.experts.len(), moe.experts_per_token);
        spec(name).layers.iter().map(|layer| layer.feed_forward.moe().map(moe)).collect()
    };
    assert_eq!(experts("mixtral"), [Some((5, 2)); 2]);
    assert_eq!(windows("mixtral_window"), [Some(16)]);
    assert_eq!(experts("qwen3_moe"), [Some((7, 3)); 2]);
    assert_eq!(experts("qwen3_moe_dense_layers"), [None, None, None, Some((7, 3))]);
    assert_eq!(windows("qwen3_moe_dense_layers"), [Some(20); 4]);
    let routing = |name: &str| spec(name).layers[0].feed_forward.moe().map(|moe| moe.routing);
    assert_eq!(routing("qwen3_moe"), Some(Routing::Softmax { renormalize: true }));
    assert!(matches!(spec("llama_llama3").rope.scaling, RopeScaling::Llama3 { .. }));
    assert_eq!(spec("llama_linear").max_position, 1024);
    assert_eq!((spec("stablelm").norm_eps, spec("stablelm").rope.rotary_dim), (1e-3, 4));
    let capped = spec("stablelm_capped");
    assert_eq!((capped.logit_softcap, capped.rope.rotary_dim), (Some(1.5), 8));
    assert!(capped.layers[0].attention.heads().unwrap().q.bias);
    assert_eq!(spec("llama_yarn").max_position, 256);
}

/// Transformers rounds the frequency and the angle to f32, which moves an angle by up to
/// 1.2e-7 of itself; the table here is computed in f64.
fn assert_close(case: &Case, what: &str, table: &Tensor, recorded: &Tensor) {
    let width = recorded.shape().sizes()[1];
    let rows = recorded.as_slice::<f32>().chunks_exact(width);
    for (&position, recorded) in case.positions.iter().zip(rows) {
        let at = position as usize;
        let computed = table.view().rows(at..at + 1).as_slice::<f32>();
        let tolerance = 3e-7 + position as f32 * 2e-7;
        for (pair, (computed, recorded)) in computed.iter().zip(recorded).enumerate() {
            let difference = (computed - recorded).abs();
            assert!(
                difference <= tolerance,
                "{}: {what} of pair {pair} at {position} is {computed}, recorded {recorded}",
                case.name,
            );
        }
    }
}

#[test]
fn rotary_tables_equal_the_recorded_ones() {
    for case in Case::all() {
        let spec = ModelSpec::from_config(&case.config_json).unwrap();
        let last = case.positions.iter().max().unwrap();
        let table = RopeTable::new(&spec.rope, *last as usize + 1);
        assert_close(&case, "cosine", &table.cos, &case.cos);
        assert_close(&case, "sine", &table.sin, &case.sin);
    }
}
