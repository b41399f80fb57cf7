//! The promises that `decoded` tests on a Llama, on a mixture of experts: tokens of a batch meet at
//! an expert in another order and number in every step, which must change no bit.

use std::collections::BTreeMap;

use tokenmill::request::{RequestId, TokenizedRequest};

use crate::decoded::{ROOMY, Setting, Trace, requests, run};

/// Layers with experts and without; more experts than a small batch chooses.
const CONFIG: &str = r#"{
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16", "hidden_size": 96, "intermediate_size": 160,
    "moe_intermediate_size": 72, "num_experts": 11, "num_experts_per_tok": 3,
    "norm_topk_prob": true, "mlp_only_layers": [1], "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 211,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
    "tie_word_embeddings": true, "hidden_act": "silu"
}"#;

const EXPERTS: Setting = Setting { config: CONFIG, ..ROOMY };

fn alone(requests: &[TokenizedRequest]) -> BTreeMap<(RequestId, u32), Trace> {
    let setting = Setting { caching: false, ..EXPERTS };
    requests.iter().flat_map(|r| run(vec![r.clone()], &setting).0).collect()
}

#[test]
fn batched_requests_yield_the_bits_they_yield_alone() {
    let requests = requests(12);
    assert_eq!(run(requests.clone(), &EXPERTS).0, alone(&requests));
}

#[test]
fn chunks_threads_and_block_sizes_change_no_bit() {
    let requests = requests(7);
    let expected = alone(&requests);
    for (max_num_batched_tokens, threads, block_size) in
        [(7, 1, 16), (33, 2, 8), (16, 3, 32), (512, 2, 16)]
    {
        let setting =
            Setting { max_num_batched_tokens, max_num_seqs: 7, threads, block_size, ..EXPERTS };
        assert_eq!(run(requests.clone(), &setting).0, expected, "{setting:?}");
    }
}

#[test]
fn preempted_requests_yield_the_bits_of_undisturbed_ones() {
    let requests = requests(10);
    let setting = Setting { num_blocks: 14, ..EXPERTS };
    let (outputs, num_preempted) = run(requests.clone(), &setting);
    assert!(num_preempted > 0, "the pool is meant to be too small");
    assert_eq!(outputs, alone(&requests));
}
