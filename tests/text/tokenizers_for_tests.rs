//! Small tokenizers of the two kinds that language models use, and the bundled model's own.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use tokenmill::text::Tokenizer;

/// The bundled model's tokenizer: byte-level BPE.
pub const BUNDLED: &str = include_str!("../../models/tiny/tokenizer.json");
/// Its configuration, with the chat template.
pub const BUNDLED_CONFIG: &str = include_str!("../../models/tiny/tokenizer_config.json");

/// Ids of the SentencePiece tokenizer's special tokens.
pub const BOS: u32 = 1;
/// The first of its 256 byte tokens.
pub const FIRST_BYTE: u32 = 3;

const PIECES: [&str; 12] =
    ["▁", "▁the", "▁▁", "he", "h", "e", "t", "▁naïve", "界", "▁世", "😀", "."];

/// In the manner of Llama 2: `▁` for spaces, bytes for what the vocabulary lacks.
pub fn sentencepiece_json() -> Value {
    let mut vocab = Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.insert(token, json!(id));
    };
    ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().for_each(&mut add);
    (0..=255).map(|byte| format!("<0x{byte:02X}>")).for_each(&mut add);
    PIECES.map(str::to_owned).into_iter().for_each(&mut add);
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                  "vocab": vocab, "merges": ["h e", "▁ ▁"]}
    })
}

/// [`sentencepiece_json`], read.
pub fn sentencepiece() -> Tokenizer {
    static READ: LazyLock<Tokenizer> = LazyLock::new(|| {
        Tokenizer::from_json(&sentencepiece_json().to_string()).expect("the file is valid")
    });
    READ.clone()
}

/// The bundled tokenizer, read.
pub fn byte_level() -> Tokenizer {
    static READ: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::from_json(BUNDLED).expect("the file is valid"));
    READ.clone()
}

/// The `tokenizers` crate's own reading of the bundled file: the referee for decoding.
pub fn byte_level_referee() -> &'static tokenizers::Tokenizer {
    static READ: LazyLock<tokenizers::Tokenizer> =
        LazyLock::new(|| tokenizers::Tokenizer::from_bytes(BUNDLED).expect("the file is valid"));
    &READ
}

/// The same for [`sentencepiece_json`].
pub fn sentencepiece_referee() -> &'static tokenizers::Tokenizer {
    static READ: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| {
        let json = sentencepiece_json().to_string();
        tokenizers::Tokenizer::from_bytes(json).expect("the file is valid")
    });
    &READ
}
