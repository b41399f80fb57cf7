//! Ids to text, one token at a time.
//!
//! A token is a run of bytes, not of characters: an emoji is often four tokens. The stream
//! therefore works on bytes and releases the longest prefix that is whole characters. At most
//! three bytes wait, so a push costs the token's own length, whatever came before it. (Decoding
//! a sliding window of ids, as engines in Python do, gives the same text for more work and
//! loses exactness on broken byte sequences.)

use crate::text::Tokenizer;
use crate::text::tokenizer::LeadingSpace;

/// The text of one growing sequence.
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    leading: LeadingSpace,
    previous: Option<u32>,
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A stream that continues `prompt_tail`, the last few tokens of the prompt. They decide
    /// whether a leading space belongs to the text, and may have left a character unfinished.
    pub fn new(
        tokenizer: Tokenizer,
        prompt_tail: &[u32],
        skip_special_tokens: bool,
    ) -> Detokenizer {
        let leading = tokenizer.leading_space();
        let mut stream = Detokenizer {
            tokenizer,
            skip_special_tokens,
            leading,
            previous: None,
            pending: Vec::new(),
        };
        for &id in prompt_tail {
            stream.push(id);
        }
        stream
    }

    /// The text that is certain after one more token; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return String::new();
        }
        if self.tokenizer.is_contextual() {
            let text = self.tokenizer.text_after(self.previous, id);
            self.previous = Some(id);
            return text;
        }
        self.pending.extend_from_slice(self.leading.strip(self.tokenizer.piece(id)));
        take_whole_characters(&mut self.pending)
    }

    /// What is left when the sequence ends: U+FFFD for a character that never became whole.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Takes everything but an incomplete last character; bytes that can begin no character become
/// U+FFFD exactly as [`String::from_utf8_lossy`] would write them for the whole sequence.
fn take_whole_characters(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut taken = 0;
    for chunk in pending.utf8_chunks() {
        let invalid = chunk.invalid();
        let is_last = taken + chunk.valid().len() + invalid.len() == pending.len();
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        if is_last && is_incomplete(invalid) {
            break;
        }
        if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
        taken += invalid.len();
    }
    pending.drain(..taken);
    text
}

/// True when more bytes could make these one character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incomplete_character_waits_and_a_broken_one_does_not() {
        let mut pending = b"ab\xF0\x9F\x98".to_vec();
        assert_eq!(take_whole_characters(&mut pending), "ab");
        assert_eq!(pending, b"\xF0\x9F\x98");
        pending.push(b'!');
        assert_eq!(take_whole_characters(&mut pending), "\u{FFFD}!");
        assert!(pending.is_empty());
    }
}
