//! What several test binaries need: a byte-level tokenizer, a chat template, engine options.

#![allow(dead_code)] // each binary uses its own part

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokenmill::config::SchedulingPolicy;
use tokenmill::engine::{EngineOptions, ModelInfo};
use tokenmill::request::SamplingDefaults;
use tokenmill::scheduler::SchedulerParams;
use tokenmill::telemetry::Metrics;
use tokenmill::text::TextPipeline;

/// Id of `<|im_end|>`, the end token of [`text_pipeline`].
pub const EOS: u32 = 257;

/// Tokens in the vocabulary of [`text_pipeline`]: one per byte and two special ones.
pub const VOCAB_SIZE: usize = 258;

/// A tokenizer with one token per byte (the id is the byte) and a ChatML template.
pub fn text_pipeline() -> Arc<TextPipeline> {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let config = json!({"chat_template": template, "eos_token": "<|im_end|>"}).to_string();
    let pipeline = TextPipeline::from_files(tokenizer_json().as_bytes(), Some(&config), None, None);
    Arc::new(pipeline.expect("the fixture is a valid tokenizer"))
}

fn tokenizer_json() -> String {
    let vocab: Map<String, Value> =
        (0..=255u8).map(|byte| (byte_symbol(byte).to_string(), json!(byte))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "added_tokens": [special(256, "<|im_start|>"), special(EOS, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                          "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                    "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    })
    .to_string()
}

/// The printable character that stands for a byte in byte-level vocabularies (GPT-2's table).
fn byte_symbol(byte: u8) -> char {
    let is_printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if is_printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !is_printable(b)).count() as u32;
    char::from_u32(256 + rank).expect("these code points exist")
}

/// Scheduler parameters with room for everything a small test does.
pub fn scheduler_params() -> SchedulerParams {
    SchedulerParams {
        max_num_seqs: 64,
        max_num_batched_tokens: 256,
        max_model_len: 512,
        policy: SchedulingPolicy::Fcfs,
        block_size: 16,
        num_blocks: 1024,
        enable_prefix_caching: true,
        eos_token_ids: vec![EOS],
    }
}

/// Engine options around the given scheduler.
pub fn engine_options(scheduler: SchedulerParams) -> EngineOptions {
    EngineOptions {
        model: ModelInfo {
            root: "test".to_owned(),
            created: 0,
            max_model_len: scheduler.max_model_len,
            vocab_size: VOCAB_SIZE,
            eos_token_ids: vec![EOS],
            block_size: scheduler.block_size,
            num_blocks: scheduler.num_blocks,
            defaults: SamplingDefaults::default(),
        },
        metrics: Arc::new(Metrics::new("test", scheduler.max_model_len)),
        scheduler,
        max_num_queued_requests: 64,
        step_timeout: Duration::MAX,
    }
}
