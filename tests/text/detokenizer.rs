//! Streaming ids to text gives what decoding them at once gives.

use proptest::prelude::*;
use tokenmill::text::{Detokenizer, Tokenizer};

use crate::tokenizers_for_tests::{
    BOS, FIRST_BYTE, byte_level, byte_level_referee, sentencepiece, sentencepiece_referee,
};

fn stream(tokenizer: &Tokenizer, tail: &[u32], ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), tail, skip_special);
    let mut texts: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    texts.push(detokenizer.finish());
    texts
}

/// Ids that are mostly single bytes, so that characters are split and broken in every way.
fn byte_level_ids() -> impl Strategy<Value = Vec<u32>> {
    let any_id = 0..4096_u32;
    let character = prop::sample::select(vec!["é", "世", "😀", "👩‍👩‍👧", " ", "a"]);
    let spelled = character.prop_map(|text| {
        let alphabet: Vec<String> = text.bytes().map(byte_character).collect();
        let tokenizer = byte_level();
        alphabet.iter().filter_map(|token| tokenizer.token_id(token)).collect::<Vec<u32>>()
    });
    let piece = prop_oneof![3 => spelled, 1 => any_id.prop_map(|id| vec![id])];
    let broken = prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat());
    (broken, any::<prop::sample::Index>()).prop_map(|(mut ids, cut)| {
        if !ids.is_empty() {
            ids.remove(cut.index(ids.len()));
        }
        ids
    })
}

/// How the GPT-2 byte alphabet spells a byte.
fn byte_character(byte: u8) -> String {
    let code = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7F..=0xA0 => 0x121 + u32::from(byte - 0x7F),
        0xAD => 0x143,
    };
    char::from_u32(code).expect("it is a character").to_string()
}

proptest! {
    #[test]
    fn byte_level_stream_equals_decoding_at_once(ids in byte_level_ids(), skip: bool) {
        let streamed = stream(&byte_level(), &[], &ids, skip).concat();
        prop_assert_eq!(&streamed, &byte_level().decode(&ids, skip));
        prop_assert_eq!(streamed, byte_level_referee().decode(&ids, skip).unwrap());
    }

    #[test]
    fn sentencepiece_stream_equals_decoding_at_once(
        ids in prop::collection::vec(0..271_u32, 0..24), skip: bool,
    ) {
        let tokenizer = sentencepiece();
        let streamed = stream(&tokenizer, &[], &ids, skip).concat();
        prop_assert_eq!(streamed, tokenizer.decode(&ids, skip));
    }

    #[test]
    fn sentencepiece_decodes_like_the_referee_where_bytes_are_characters(
        text in "[ a-h世界é😀]{0,12}", skip: bool,
    ) {
        let tokenizer = sentencepiece();
        let ids = tokenizer.encode(&text, true).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids, skip), sentencepiece_referee().decode(&ids, skip).unwrap());
        prop_assert_eq!(tokenizer.decode(&ids, true), text);
    }

    #[test]
    fn a_stream_never_shows_half_a_character(text in "[a-z世界é😀👩‍👩‍👧 ]{0,16}") {
        for tokenizer in [byte_level(), sentencepiece()] {
            let ids = tokenizer.encode(&text, false).unwrap();
            let texts = stream(&tokenizer, &[], &ids, true);
            let is_broken = texts.concat().contains(char::REPLACEMENT_CHARACTER);
            prop_assert!(!is_broken);
        }
    }

    #[test]
    fn output_continues_the_prompt_without_a_seam(
        ids in prop::collection::vec(0..271_u32, 2..16), cut: prop::sample::Index,
    ) {
        let tokenizer = sentencepiece();
        let whole = stream(&tokenizer, &[], &ids, true);
        let (prompt, output) = ids.split_at(1 + cut.index(ids.len() - 1));
        let shown_with_prompt = whole[prompt.len()..].concat();
        prop_assert_eq!(stream(&tokenizer, prompt, output, true).concat(), shown_with_prompt);
    }
}

#[test]
fn four_byte_tokens_make_one_emoji_with_the_last() {
    let ids: Vec<u32> = "😀".bytes().map(|byte| FIRST_BYTE + u32::from(byte)).collect();
    assert_eq!(stream(&sentencepiece(), &[], &ids, true), ["", "", "", "😀", ""]);
    assert_eq!(stream(&sentencepiece(), &[], &ids[..3], true).concat(), "\u{FFFD}");
}

#[test]
fn the_first_space_is_dropped_only_where_a_text_begins() {
    let tokenizer = sentencepiece();
    let ids = tokenizer.encode("the the", false).unwrap();
    assert_eq!(tokenizer.token_bytes(ids[0]), b" ");
    assert_eq!(stream(&tokenizer, &[], &ids, true).concat(), "the the");
    assert_eq!(stream(&tokenizer, &[BOS], &ids, true).concat(), "the the");
    assert_eq!(stream(&tokenizer, &ids, &ids, true).concat(), " the the");
}

#[test]
fn token_bytes_are_exact_for_both_kinds() {
    let sentencepiece = sentencepiece();
    assert_eq!(sentencepiece.token_bytes(FIRST_BYTE + 0xE4), [0xE4]);
    let the = sentencepiece.token_id("▁the").unwrap();
    assert_eq!(sentencepiece.token_bytes(the), b" the");
    assert_eq!(sentencepiece.token_bytes(999_999), b"");
    let byte_level = byte_level();
    let newline = byte_level.token_id("Ċ").unwrap();
    assert_eq!(byte_level.token_bytes(newline), b"\n");
    assert_eq!(byte_level.token_text(newline).text, "\n");
}

#[test]
fn a_decoder_of_another_kind_streams_what_it_decodes() {
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100,
                  "vocab": {"[UNK]": 0, "play": 1, "##ing": 2, "well": 3, ".": 4}}
    });
    let tokenizer = Tokenizer::from_json(&json.to_string()).unwrap();
    let ids = tokenizer.encode("playing well.", false).unwrap();
    assert_eq!(stream(&tokenizer, &[], &ids, true), ["play", "ing", " well", ".", ""]);
    assert_eq!(tokenizer.decode(&ids, true), "playing well.");
}
