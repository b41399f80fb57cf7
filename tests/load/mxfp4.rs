//! Checkpoints that hold MXFP4: both layouts, what they stand for, and what is refused.

use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use tokenmill::checkpoint::{Checkpoint, TensorRole, TensorSource};
use tokenmill::config::{CpuIsa, Quantization};
use tokenmill::formats::Format;
use tokenmill::model::check::check;
use tokenmill::model::decoder::Decoder;
use tokenmill::model::spec::ModelSpec;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::weights::Loader;
use tokenmill::weights::linear::{Linear, Partition};

/// What the codes stand for.
const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
const NUM_EXPERTS: usize = 3;

fn config(architecture: &str, quantization: &Value) -> String {
    json!({
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "quantization_config": quantization,
    })
    .to_string()
}

/// As llm-compressor writes it.
fn compressed() -> Value {
    let weights = json!({
        "num_bits": 4, "type": "float", "group_size": 32, "strategy": "group", "symmetric": true,
        "dynamic": false, "scale_dtype": "torch.uint8", "actorder": null,
        "observer": "memoryless_minmax",
    });
    json!({
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "format": "mxfp4-pack-quantized",
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {"num_bits": 4, "dynamic": true},
            "output_activations": null,
        }},
        "ignore": ["lm_head"],
        "kv_cache_scheme": null,
        "transform_config": {},
    })
}

/// As gpt-oss has it.
fn blocks() -> Value {
    let kept = ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"];
    json!({"quant_method": "mxfp4", "modules_to_not_convert": kept})
}

/// A tensor of a file.
#[derive(Clone)]
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Codes of a layer `[rows, cols]` and their scales.
fn coded(seed: usize, [rows, cols]: [usize; 2]) -> [Vec<u8>; 2] {
    let byte = |i: usize| ((i * 7919 + seed * 104_729) >> 3) as u8;
    let scale = |i: usize| 118 + ((i * 31 + seed) % 5) as u8;
    [(0..rows * cols / 2).map(byte).collect(), (0..rows * cols / 32).map(scale).collect()]
}

/// An element of such a layer.
fn value([codes, scales]: &[Vec<u8>; 2], at: usize) -> f32 {
    let code = codes[at / 2] >> (at % 2 * 4) & 15;
    let sign = if code < 8 { 1.0 } else { -1.0 };
    sign * VALUES[usize::from(code & 7)] * 2f32.powi(i32::from(scales[at / 32]) - 127)
}

/// Every tensor of a model, with the matrices that `is_coded` names by their layer.
fn tensors(spec: &ModelSpec, is_packed: bool, is_coded: impl Fn(&str) -> bool) -> Vec<Stored> {
    let mut all: Vec<Stored> = Vec::new();
    for (seed, tensor) in spec.expected_tensors().into_iter().enumerate() {
        let layer = tensor.name.strip_suffix(".weight").unwrap().to_owned();
        let is_matrix = tensor.role == TensorRole::Matrix && tensor.name != spec.embedding;
        if !is_matrix || !is_coded(&layer) {
            let bytes = vec![0; 2 * tensor.shape.iter().product::<usize>()];
            all.push(Stored { name: tensor.name, dtype: Dtype::BF16, shape: tensor.shape, bytes });
            continue;
        }
        let [rows, cols] = tensor.shape[..] else { panic!("matrices have two sizes") };
        let [codes, scales] = coded(seed, [rows, cols]);
        let expert = layer.split_once(".experts.");
        let shape = if is_packed { vec![rows, cols / 2] } else { vec![rows, cols / 32, 16] };
        let [of_codes, of_scales] = match (is_packed, expert) {
            (true, _) => ["weight_packed", "weight_scale"].map(|end| format!("{layer}.{end}")),
            (false, None) => ["blocks", "scales"].map(|end| format!("{layer}_{end}")),
            (false, Some((before, after))) => {
                let (_, after) = after.split_once('.').unwrap();
                ["blocks", "scales"].map(|end| format!("{before}.experts.{after}_{end}"))
            }
        };
        for (name, shape, bytes) in
            [(of_codes, shape, codes), (of_scales, vec![rows, cols / 32], scales)]
        {
            let is_shared = !is_packed && expert.is_some();
            match all.iter_mut().find(|stored| stored.name == name) {
                Some(stored) => stored.bytes.extend(bytes),
                None => {
                    let experts = is_shared.then_some(NUM_EXPERTS);
                    let shape = experts.into_iter().chain(shape).collect();
                    all.push(Stored { name, dtype: Dtype::U8, shape, bytes });
                }
            }
        }
    }
    all
}

fn checkpoint(tensors: &[Stored]) -> Checkpoint {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap();
        (tensor.name.as_str(), view)
    });
    let bytes = serialize(views, None).unwrap();
    Checkpoint::from_static(bytes.leak(), "model.safetensors").unwrap()
}

/// Panics unless all coded layers are read as what they stand for, and take the bytes that were
/// announced.
fn assert_read(spec: &ModelSpec, source: &Checkpoint, is_coded: impl Fn(&str) -> bool) {
    check(spec, source).unwrap();
    let loader = Loader::new(source).quantized(None, 2);
    let mut num_read = 0;
    for (seed, tensor) in spec.expected_tensors().into_iter().enumerate() {
        let layer = tensor.name.strip_suffix(".weight").unwrap();
        let is_matrix = tensor.role == TensorRole::Matrix && tensor.name != spec.embedding;
        if !is_matrix || !is_coded(layer) {
            continue;
        }
        let [rows, cols] = tensor.shape[..] else { panic!("matrices have two sizes") };
        let linear =
            Linear::load(&loader, layer, [rows, cols], false, Partition::Replicated).unwrap();
        assert_eq!(linear.weight.format, Format::Mxfp4, "{layer}");
        assert_eq!(linear.weight.size_bytes(), loader.size_bytes(std::slice::from_ref(&tensor)));
        let coded = coded(seed, [rows, cols]);
        for row in 0..rows {
            for (col, got) in linear.weight.row(row).into_iter().enumerate() {
                assert_eq!(got, value(&coded, row * cols + col), "{layer} [{row}, {col}]");
            }
        }
        num_read += 1;
    }
    assert!(num_read > 0);
    let ops = CpuOps::new(Some(1), CpuIsa::Auto).unwrap();
    Decoder::load(spec, &loader.arranged(&ops), 64).unwrap();
}

fn is_inner(layer: &str) -> bool {
    layer != "lm_head"
}

#[test]
fn packed_layers_are_read_as_what_they_stand_for() {
    for architecture in ["LlamaForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"] {
        let spec = ModelSpec::from_config(&config(architecture, &compressed())).unwrap();
        let mut stored = tensors(&spec, true, is_inner);
        assert_read(&spec, &checkpoint(&stored), is_inner);
        // The element type that such bytes have a name for.
        for tensor in stored.iter_mut().filter(|tensor| tensor.name.ends_with("weight_scale")) {
            tensor.dtype = Dtype::F8_E8M0;
        }
        assert_read(&spec, &checkpoint(&stored), is_inner);
    }
}

#[test]
fn blocks_are_read_as_what_they_stand_for_and_experts_from_one_tensor() {
    let spec = ModelSpec::from_config(&config("LlamaForCausalLM", &blocks())).unwrap();
    assert_read(&spec, &checkpoint(&tensors(&spec, false, is_inner)), is_inner);
    for architecture in ["MixtralForCausalLM", "Qwen3MoeForCausalLM"] {
        let spec = ModelSpec::from_config(&config(architecture, &blocks())).unwrap();
        let is_expert = |layer: &str| layer.contains(".experts.");
        let source = checkpoint(&tensors(&spec, false, is_expert));
        let name = "model.layers.0.block_sparse_moe.experts.w1_blocks";
        if architecture == "MixtralForCausalLM" {
            assert_eq!(source.info(name).unwrap().shape, [NUM_EXPERTS, 160, 2, 16]);
        }
        assert_read(&spec, &source, is_expert);
    }
}

#[test]
fn other_matrices_can_be_quantized_beside_stored_codes() {
    let spec = ModelSpec::from_config(&config("LlamaForCausalLM", &compressed())).unwrap();
    let source = checkpoint(&tensors(&spec, true, is_inner));
    let plain = Loader::new(&source);
    let quantized = plain.quantized(Some(Quantization::Int8), 1);
    let all = spec.expected_tensors();
    assert!(quantized.size_bytes(&all) < plain.size_bytes(&all));
    let load = |name: &str, shape| {
        Linear::load(&quantized, name, shape, false, Partition::Column).unwrap().weight.format
    };
    assert_eq!(load("lm_head", [100, 64]), Format::Int8);
    assert_eq!(load("model.layers.0.mlp.down_proj", [64, 160]), Format::Mxfp4);
}

#[test]
fn a_scale_that_is_no_number_is_refused_with_its_place() {
    let refusal = |architecture, is_packed, tensor: &str, at| {
        let quantization = if is_packed { compressed() } else { blocks() };
        let spec = ModelSpec::from_config(&config(architecture, &quantization)).unwrap();
        let mut stored = tensors(&spec, is_packed, is_inner);
        stored.iter_mut().find(|stored| stored.name == tensor).unwrap().bytes[at] = 255;
        let source = checkpoint(&stored);
        check(&spec, &source).unwrap();
        Decoder::load(&spec, &Loader::new(&source), 64).err().unwrap().to_string()
    };
    assert_eq!(
        refusal("LlamaForCausalLM", true, "model.layers.0.mlp.down_proj.weight_scale", 5 * 7 + 3),
        "model.layers.0.mlp.down_proj.weight_scale in model.safetensors holds 255 at [7, 3], which \
         is no scale (E8M0: not a number); convert or download the checkpoint again"
    );
    let experts = "model.layers.0.block_sparse_moe.experts.w2_scales";
    let refused = refusal("MixtralForCausalLM", false, experts, 2 * 64 * 5 + 5 * 63 + 4);
    assert!(
        refused.contains("w2_scales in model.safetensors holds 255 at [2, 63, 4]"),
        "{refused}"
    );
}

/// What is said about a checkpoint after a change.
fn problems(quantization: &Value, is_packed: bool, change: impl Fn(&mut Vec<Stored>)) -> String {
    let spec = ModelSpec::from_config(&config("MixtralForCausalLM", quantization)).unwrap();
    let mut stored = tensors(&spec, is_packed, is_inner);
    change(&mut stored);
    check(&spec, &checkpoint(&stored)).unwrap_err().to_string()
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    const Q: &str = "model.layers.0.self_attn.q_proj";
    let find = |stored: &mut Vec<Stored>, name: &str| {
        stored.iter().position(|tensor| tensor.name.ends_with(name)).unwrap()
    };
    let text = problems(&compressed(), true, |stored| {
        let at = find(stored, "q_proj.weight_packed");
        (stored[at].shape, stored[at].dtype) = (vec![64, 64], Dtype::U8);
        stored[at].bytes.resize(64 * 64, 0);
    });
    assert!(text.contains(&format!("{Q}.weight_packed in")), "{text}");
    assert!(text.contains("has shape [64, 64] instead of [64, 32]"), "{text}");
    // Scales of NVFP4 are other numbers.
    let text = problems(&compressed(), true, |stored| {
        let at = find(stored, "q_proj.weight_scale");
        stored[at].dtype = Dtype::F8_E4M3;
    });
    assert!(text.contains("q_proj.weight_scale in model.safetensors has dtype F8_E4M3"), "{text}");
    assert!(text.contains("supported are U8"), "{text}");
    let text = problems(&compressed(), true, |stored| {
        let at = find(stored, "q_proj.weight_scale");
        stored.remove(at);
    });
    assert!(text.contains(&format!("{Q}.weight_scale [64, 2] is missing")), "{text}");
    // An expert too many.
    let text = problems(&blocks(), false, |stored| {
        let at = find(stored, "experts.w2_scales");
        let Stored { shape, bytes, .. } = &mut stored[at];
        shape[0] += 1;
        bytes.resize(shape.iter().product(), 127);
    });
    assert!(text.contains("has shape [4, 64, 5] instead of [3, 64, 5]"), "{text}");
    // Codes that config.json does not announce, or announces in another layout.
    for quantization in [Value::Null, blocks()] {
        let text = problems(&quantization, true, |_| {});
        assert!(text.contains(&format!("{Q}.weight [64, 64] is missing")), "{text}");
    }
    // Rows of a table are looked up, not multiplied.
    let text = problems(&compressed(), true, |stored| {
        let at = find(stored, "embed_tokens.weight");
        stored[at].name += "_packed";
    });
    assert!(text.contains("model.embed_tokens.weight [100, 64] is missing"), "{text}");
}

#[test]
fn what_is_not_mxfp4_is_refused_with_one_sentence() {
    let refusal = |path: &str, value: Value| {
        let mut quantization = compressed();
        *quantization.pointer_mut(path).unwrap() = value;
        let config = config("LlamaForCausalLM", &quantization);
        ModelSpec::from_config(&config).unwrap_err().to_string()
    };
    let group = |end: &str| format!("/config_groups/group_0{end}");
    assert_eq!(
        refusal("/format", json!("nvfp4-pack-quantized")),
        r#"config.json: quantization_config.format is "nvfp4-pack-quantized"; supported are "mxfp4-pack-quantized" and null"#
    );
    assert_eq!(
        refusal(&group("/weights/group_size"), json!(16)),
        "config.json: quantization_config.config_groups.group_0.weights.group_size is 16; supported is 32"
    );
    assert_eq!(
        refusal(&group("/weights/num_bits"), Value::Null),
        "config.json: quantization_config.config_groups.group_0.weights.num_bits is null; supported is 4"
    );
    assert_eq!(
        refusal(&group("/input_activations/dynamic"), json!(false)),
        "config.json: quantization_config.config_groups.group_0.input_activations.dynamic is false; supported is true"
    );
    assert_eq!(
        refusal("/config_groups", json!({})),
        "config.json: quantization_config.config_groups is {}; supported is an object with a group"
    );
    assert_eq!(
        refusal(&group("/weights"), Value::Null),
        "config.json has no quantization_config.config_groups.group_0.weights"
    );
    assert!(
        refusal("/transform_config", json!({"config_groups": {}})).contains("transform_config")
    );
    assert!(refusal("/kv_cache_scheme", json!({"num_bits": 8})).contains("kv_cache_scheme"));
    for place in
        ["/weights/symmetric", "/weights/type", "/weights/strategy", "/weights/scale_dtype"]
    {
        let text = refusal(&group(place), json!("other"));
        assert!(text.contains(r#" is "other"; supported "#), "{text}");
    }
    let kept = json!({"quant_method": "mxfp4", "modules_to_not_convert": "lm_head"});
    let error = ModelSpec::from_config(&config("LlamaForCausalLM", &kept)).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"config.json: quantization_config.modules_to_not_convert is "lm_head"; supported is a list of strings"#
    );
    // The format may stand in the groups alone.
    let mut quantization = compressed();
    quantization["format"] = Value::Null;
    ModelSpec::from_config(&config("LlamaForCausalLM", &quantization)).unwrap();
    quantization["config_groups"]["group_0"]["format"] = Value::Null;
    let error = ModelSpec::from_config(&config("LlamaForCausalLM", &quantization)).unwrap_err();
    assert!(error.to_string().contains("group_0.format is null"), "{error}");
}
