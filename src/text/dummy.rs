//! A tokenizer for models that have none: one token per byte, filler words above.
//!
//! Serves `--load-format dummy`, where weights and output are random anyway: any text can be
//! sent, and every id that a model of this vocabulary may choose reads as something.

use serde_json::{Map, Value, json};

use crate::text::{TextError, TextPipeline};

const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\
                        {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// Text for a made-up model with `vocab_size` tokens. Ids below 256 are bytes.
pub fn pipeline(vocab_size: usize) -> Result<TextPipeline, TextError> {
    let bytes = (0..=255u8).map(|byte| byte_symbol(byte).to_string());
    // U+0120 stands for a space, so that random output has words.
    let fillers = (256..vocab_size.max(256)).map(|id| format!("\u{120}t{id}"));
    let tokens = bytes.chain(fillers);
    let vocab: Map<String, Value> =
        tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    });
    TextPipeline::from_files(tokenizer.to_string().as_bytes(), None, None, Some(TEMPLATE))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Prompt;

    #[test]
    fn any_text_becomes_its_bytes_and_every_id_reads_as_something() {
        let text = pipeline(300).unwrap();
        let prompt = Prompt::Text { text: "né €".to_owned(), add_special_tokens: true };
        let ids = text.prompt_token_ids(&prompt).unwrap();
        assert_eq!(ids, "né €".bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!(text.tokenizer().decode(&ids, true), "né €");
        assert_eq!(text.tokenizer().decode(&[299], true), " t299");
        assert!(text.has_chat_template());
    }
}
