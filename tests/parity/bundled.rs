//! The bundled model against what PyTorch generated with the same weights, token by token.
//!
//! `models/tiny/golden_smoke.json` is written by the training scripts, greedily in float32.
//! Backends that compute in float32 must say exactly that; those that round activations or
//! weights must choose the same token nearly always, each time after the recorded text.

use std::sync::Arc;

use serde_json::Value;
use tokenmill::checkpoint::files::{CONFIG, ModelFiles};
use tokenmill::checkpoint::hub::Progress;
use tokenmill::config::{CpuIsa, LoadFormat, ModelSource, Quantization};
use tokenmill::device::RankContext;
use tokenmill::model::batch::{BatchEntry, BatchLimits, ForwardBatch};
use tokenmill::model::decoder::Decoder;
use tokenmill::model::kv_cache::KvCache;
use tokenmill::model::spec::ModelSpec;
use tokenmill::model::workspace::Workspace;
use tokenmill::ops::Ops;
use tokenmill::ops::cpu::{CpuOps, Isa};
use tokenmill::tensor::DType;
use tokenmill::weights::Loader;

const SMOKE: &str = include_str!("../../models/tiny/golden_smoke.json");
const BLOCK_SIZE: usize = 16;
const MAX_LEN: usize = 2048;

/// The bundled model with a cache for one sequence.
pub struct Greedy {
    decoder: Decoder,
    rank: RankContext,
    cache: KvCache,
    workspace: Workspace,
    batch: ForwardBatch,
    block_ids: Vec<u32>,
}

impl Greedy {
    pub fn new(isa: CpuIsa, quantization: Option<Quantization>, kv_dtype: DType) -> Greedy {
        let ops: Arc<dyn Ops> = Arc::new(CpuOps::new(None, isa).unwrap());
        Greedy::on(&ops, quantization, kv_dtype)
    }

    pub fn on(ops: &Arc<dyn Ops>, quantization: Option<Quantization>, kv_dtype: DType) -> Greedy {
        let (rank, ops) = (RankContext::solo(Arc::clone(ops)), &**ops);
        let files = ModelFiles::open(&ModelSource::Bundled, Progress::Hidden).unwrap();
        let spec = ModelSpec::from_config(&files.required_text(CONFIG).unwrap()).unwrap();
        let source = files.weights(LoadFormat::Auto, spec.expected_tensors(), spec.dtype).unwrap();
        let loader = Loader::new(&*source).quantized(quantization, 2).arranged(ops);
        let num_blocks = MAX_LEN / BLOCK_SIZE;
        let limits = BatchLimits {
            max_num_tokens: MAX_LEN,
            max_num_seqs: 1,
            max_blocks_per_seq: num_blocks,
        };
        Greedy {
            decoder: Decoder::load(&spec, &loader, MAX_LEN).unwrap(),
            rank,
            cache: KvCache::new(ops, &spec, num_blocks, BLOCK_SIZE, kv_dtype).unwrap(),
            workspace: Workspace::new(ops, &spec, MAX_LEN, 1).unwrap(),
            batch: ForwardBatch::new(ops, limits).unwrap(),
            block_ids: (0..num_blocks as u32).collect(),
        }
    }

    /// The most likely token after `token_ids`, which start at `start_position`.
    fn next(&mut self, token_ids: &[u32], start_position: usize) -> u32 {
        let start_position = start_position as u32;
        let entry = BatchEntry { token_ids, start_position, block_ids: &self.block_ids };
        self.batch.fill(BLOCK_SIZE, [entry].into_iter());
        self.batch.select([token_ids.len() as u32 - 1].into_iter());
        self.batch.upload(&*self.rank.ops);
        self.decoder.forward(&self.rank, &self.batch, &mut self.cache, &mut self.workspace);
        self.decoder.logits(&self.rank, &self.batch, 0..1, &mut self.workspace);
        let mut bytes = vec![0; self.workspace.logits.size_bytes()];
        self.rank.ops.download(&mut bytes, self.workspace.logits.view());
        self.rank.ops.synchronize().unwrap();
        let logits: Vec<f32> =
            bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
        let best = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
        (0..logits.len()).fold(0, best) as u32
    }

    /// As many tokens as wanted after the first recorded prompt.
    pub fn first_answer(mut self, num_tokens: usize) -> Vec<u32> {
        let cases: Vec<Value> = serde_json::from_str(SMOKE).unwrap();
        let prompt = ids(&cases[0]["prompt_ids"]);
        let mut answer = vec![self.next(&prompt, 0)];
        while answer.len() < num_tokens {
            let at = prompt.len() + answer.len() - 1;
            answer.push(self.next(&[answer[answer.len() - 1]], at));
        }
        answer
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// How many of the recorded tokens the model chooses after the recorded text before them, and of
/// how many; panics at the first other choice when `exact`.
fn agreement(mut model: Greedy, exact: bool) -> (usize, usize) {
    let cases: Vec<Value> = serde_json::from_str(SMOKE).unwrap();
    assert!(cases.len() >= 12);
    let (mut same, mut total) = (0, 0);
    for case in cases {
        let (prompt, expected) = (ids(&case["prompt_ids"]), ids(&case["output_ids"]));
        let mut token = model.next(&prompt, 0);
        for (i, &expected) in expected.iter().enumerate() {
            assert!(!exact || token == expected, "{}: token {i} is {token}", case["id"]);
            same += usize::from(token == expected);
            total += 1;
            token = model.next(&[expected], prompt.len() + i);
        }
    }
    (same, total)
}

#[test]
fn the_bundled_model_says_what_it_said_in_pytorch() {
    for isa in Isa::supported() {
        let exact = !matches!(isa.choice(), CpuIsa::Amx | CpuIsa::Avx512Bf16);
        let (same, total) = agreement(Greedy::new(isa.choice(), None, DType::F32), exact);
        assert!(same * 100 >= total * 99, "{}: {same} of {total} tokens", isa.name());
    }
}

#[test]
fn quantized_weights_seldom_change_what_it_says() {
    use Quantization::*;
    for (format, least) in
        [(Int8, 97), (W8A16, 98), (Q8_0, 98), (Fp8, 96), (Int4, 90), (Int4G64, 90), (Int4G128, 88)]
    {
        let (same, total) = agreement(Greedy::new(CpuIsa::Auto, Some(format), DType::F32), false);
        assert!(same * 100 >= total * least, "{format:?}: {same} of {total} tokens");
    }
}

#[test]
fn caches_of_bytes_seldom_change_what_it_says() {
    for (kv_dtype, least) in [(DType::I8, 99), (DType::Fp8, 98)] {
        for isa in Isa::supported() {
            let (same, total) = agreement(Greedy::new(isa.choice(), None, kv_dtype), false);
            let what = format!("{kv_dtype} on {}: {same} of {total} tokens", isa.name());
            assert!(same * 100 >= total * least, "{what}");
        }
    }
}
