//! A model that recites: one token per byte, ChatML turns, and a text to say.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use serde_json::{Map, Value, json};
use tokenmill::output::{SampledToken, TokenLogprobs};
use tokenmill::runner::{RunnerError, StepRunner};
use tokenmill::scheduler::batch::{ScheduledBatch, SequenceId, StepTokens};
use tokenmill::text::TextPipeline;

/// 256 bytes and two control tokens.
pub const VOCAB_SIZE: usize = 258;
const START_OF_TURN: u32 = 256;
/// Ends a turn.
pub const END_OF_TURN: u32 = 257;

const CHAT_TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    <|im_end|>\n{% endfor %}{% if tools %}<|im_start|>tools\n{{ tools | length }}<|im_end|>\n\
    {% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Says the same text in every continuation.
pub struct Recital {
    script: Vec<u32>,
    endless: bool,
    gate: Option<Receiver<()>>,
    fails_at: Option<u64>,
    /// Position at which each sequence sampled first.
    first: HashMap<SequenceId, u32>,
}

impl Recital {
    pub fn new(
        says: &str,
        endless: bool,
        gate: Option<Receiver<()>>,
        fails_at: Option<u64>,
    ) -> Recital {
        let script = says.bytes().map(u32::from).collect();
        Recital { script, endless, gate, fails_at, first: HashMap::new() }
    }

    fn token(&mut self, sequence: SequenceId, position: u32) -> u32 {
        let first = *self.first.entry(sequence).or_insert(position);
        let spoken = (position - first) as usize;
        match self.script.get(spoken) {
            Some(&token) => token,
            None if self.endless => self.script[spoken % self.script.len()],
            None => END_OF_TURN,
        }
    }
}

/// The token itself, then its successors, each less likely.
fn logprobs(token_id: u32, top: u32) -> TokenLogprobs {
    let top = (0..top).map(|i| ((token_id + i) % VOCAB_SIZE as u32, -0.5 - i as f32));
    TokenLogprobs { logprob: -0.5, rank: 1, top: top.collect() }
}

impl StepRunner for Recital {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        if let Some(gate) = &self.gate
            && gate.recv().is_err()
        {
            self.gate = None; // the test has let go
        }
        if self.fails_at.is_some_and(|step| batch.step >= step) {
            let reason = "the script says so".to_owned();
            return Err(RunnerError::StepFailed { step: batch.step, reason });
        }
        let mut results = Vec::new();
        for sequence in &batch.sequences {
            let end = sequence.start_position + sequence.tokens.len() as u32;
            let targets = &batch.score_targets[sequence.scores.clone()];
            let top = sequence.params.prompt_logprobs.unwrap_or(0);
            let mut result = StepTokens {
                sampled: Vec::new(),
                scores: targets.iter().map(|&target| logprobs(target, top)).collect(),
            };
            if sequence.samples {
                let token_id = self.token(sequence.id, end);
                let logprobs = sequence.params.logprobs.map(|top| logprobs(token_id, top));
                result.sampled.push(SampledToken { token_id, logprobs });
            }
            results.push(result);
        }
        Ok(results)
    }
}

/// A byte-level tokenizer with a ChatML template.
pub fn text_pipeline() -> Arc<TextPipeline> {
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [
            special(START_OF_TURN, "<|im_start|>"), special(END_OF_TURN, "<|im_end|>"),
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": byte_vocab(), "merges": []},
    });
    let config = json!({"eos_token": "<|im_end|>"}).to_string();
    let tokenizer = tokenizer.to_string();
    let text =
        TextPipeline::from_files(tokenizer.as_bytes(), Some(&config), None, Some(CHAT_TEMPLATE));
    Arc::new(text.expect("the fixture is valid"))
}

/// GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on.
fn byte_vocab() -> Map<String, Value> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut vocab = Map::new();
    for byte in 0..256u32 {
        let code = if printable(byte) { byte } else { next };
        next += u32::from(!printable(byte));
        let letter = char::from_u32(code).expect("a letter of the alphabet");
        vocab.insert(letter.to_string(), json!(byte));
    }
    vocab
}
