//! The tokenizer: text to ids, and the exact bytes behind every id.
//!
//! Encoding is the `tokenizers` crate's. Decoding is ours, because a stream needs what that
//! crate does not offer: each token's own bytes. They are laid out once, when the model is
//! opened, so that streaming costs one slice per token. Knows nothing of templates or streams.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::Value;

use crate::output::TokenText;
use crate::text::TextError;

/// A model's tokenizer. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer(Arc<Shared>);

struct Shared {
    tokenizer: tokenizers::Tokenizer,
    decoding: Decoding,
    pieces: Pieces,
    special: HashSet<u32>,
}

/// How ids join to text; read from the decoder that `tokenizer.json` describes.
#[derive(Clone, Debug, PartialEq)]
enum Decoding {
    /// Tokens are spelled in the GPT-2 byte alphabet; text is their bytes in a row.
    ByteLevel,
    /// Tokens are text with replaced spaces, or `<0xNN>` for one byte.
    SentencePiece { replace: Vec<(String, String)>, leading: LeadingSpace },
    /// A token's text depends on the one before it.
    Contextual,
}

/// The bytes of every token, end to end.
struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

/// Spaces that are dropped where a text begins (SentencePiece puts one before every word).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LeadingSpace {
    remaining: usize,
    first_token_only: bool,
}

impl LeadingSpace {
    /// Nothing is dropped.
    pub(super) const KEEP: LeadingSpace = LeadingSpace { remaining: 0, first_token_only: false };

    /// The part of the next token that is text.
    pub(super) fn strip<'a>(&mut self, piece: &'a [u8]) -> &'a [u8] {
        let spaces = piece.iter().take(self.remaining).take_while(|&&byte| byte == b' ').count();
        let ended = spaces < piece.len() || self.first_token_only;
        self.remaining = if ended { 0 } else { self.remaining - spaces };
        &piece[spaces..]
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_json(json: &str) -> Result<Tokenizer, TextError> {
        Tokenizer::from_bytes(json.as_bytes())
    }

    /// Reads a `tokenizer.json`. Truncation and padding that the file asks for are switched
    /// off: they belong to training batches and would silently cut a prompt.
    pub fn from_bytes(json: &[u8]) -> Result<Tokenizer, TextError> {
        let unusable = |reason: String| TextError::TokenizerFile { reason };
        let mut tokenizer =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| unusable(e.to_string()))?;
        tokenizer.with_truncation(None).map_err(|e| unusable(e.to_string()))?;
        tokenizer.with_padding(None);
        let decoder =
            serde_json::to_value(tokenizer.get_decoder()).map_err(|e| unusable(e.to_string()))?;
        let decoding = Decoding::of(&decoder);
        let pieces = Pieces::lay_out(&tokenizer, &decoding);
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        Ok(Tokenizer(Arc::new(Shared { tokenizer, decoding, pieces, special })))
    }

    /// Text to ids; `add_special_tokens` adds BOS and the like where the model wants them.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.0.tokenizer.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|e| TextError::Encode { reason: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids to text. Bytes that are not UTF-8 become U+FFFD; unknown ids are left out.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut leading = self.leading_space();
        let mut previous = None;
        for &id in ids.iter().filter(|&&id| !(skip_special_tokens && self.is_special(id))) {
            if self.is_contextual() {
                bytes.extend_from_slice(self.text_after(previous, id).as_bytes());
            } else {
                bytes.extend_from_slice(leading.strip(self.piece(id)));
            }
            previous = Some(id);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }

    /// True for control tokens (BOS, end of turn, …), which are no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(&id)
    }

    /// The exact bytes that a token stands for; empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.piece(id).to_vec()
    }

    /// A token as log-probability reports show it.
    pub fn token_text(&self, id: u32) -> TokenText {
        let bytes = self.token_bytes(id);
        TokenText { token_id: id, text: String::from_utf8_lossy(&bytes).into_owned(), bytes }
    }

    /// Like [`Tokenizer::token_bytes`], without the copy.
    pub(super) fn piece(&self, id: u32) -> &[u8] {
        self.0.pieces.get(id)
    }

    /// What is dropped from the beginning of a text.
    pub(super) fn leading_space(&self) -> LeadingSpace {
        match &self.0.decoding {
            Decoding::SentencePiece { leading, .. } => *leading,
            Decoding::ByteLevel | Decoding::Contextual => LeadingSpace::KEEP,
        }
    }

    /// True when [`Tokenizer::text_after`] must be used instead of [`Tokenizer::piece`].
    pub(super) fn is_contextual(&self) -> bool {
        self.0.decoding == Decoding::Contextual
    }

    /// The text that a token adds after another one.
    pub(super) fn text_after(&self, previous: Option<u32>, id: u32) -> String {
        let decode = |ids: &[u32]| self.0.tokenizer.decode(ids, false).unwrap_or_default();
        let Some(previous) = previous else { return decode(&[id]) };
        let both = decode(&[previous, id]);
        match both.strip_prefix(decode(&[previous]).as_str()) {
            Some(added) => added.to_owned(),
            None => decode(&[id]),
        }
    }
}

impl Decoding {
    /// Recognises the decoders that language models use; any other is contextual.
    fn of(decoder: &Value) -> Decoding {
        let single = std::slice::from_ref(decoder);
        let steps = decoder["decoders"].as_array().map_or(single, Vec::as_slice);
        if steps.iter().any(|step| step["type"] == "ByteLevel") {
            return Decoding::ByteLevel;
        }
        let mut replace = Vec::new();
        let mut leading = LeadingSpace::KEEP;
        for step in steps {
            match step["type"].as_str() {
                Some("Replace") => match (step["pattern"]["String"].as_str(), &step["content"]) {
                    (Some(from), Value::String(to)) => replace.push((from.to_owned(), to.clone())),
                    _ => return Decoding::Contextual,
                },
                Some("Metaspace") => {
                    let from = step["replacement"].as_str().unwrap_or("▁");
                    replace.push((from.to_owned(), " ".to_owned()));
                    if step["prepend_scheme"] != "never" {
                        leading = LeadingSpace { remaining: usize::MAX, first_token_only: true };
                    }
                }
                Some("Strip") if step["content"] == " " && step["stop"] == 0 => {
                    leading.remaining = step["start"].as_u64().unwrap_or(0) as usize;
                }
                Some("ByteFallback" | "Fuse") => {}
                _ => return Decoding::Contextual,
            }
        }
        Decoding::SentencePiece { replace, leading }
    }

    /// The bytes of a token of the vocabulary.
    fn bytes_of(&self, token: &str, is_added: bool) -> Vec<u8> {
        match self {
            Decoding::ByteLevel if is_added => token.as_bytes().to_vec(),
            Decoding::ByteLevel => {
                let spelled: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                spelled.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Decoding::SentencePiece { replace, .. } => match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => {
                    let spell =
                        |text: String, (from, to): &(String, String)| text.replace(from, to);
                    replace.iter().fold(token.to_owned(), spell).into_bytes()
                }
            },
            Decoding::Contextual => token.as_bytes().to_vec(),
        }
    }
}

impl Pieces {
    fn lay_out(tokenizer: &tokenizers::Tokenizer, decoding: &Decoding) -> Pieces {
        let mut tokens: Vec<(u32, String)> =
            tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort_unstable();
        let added = tokenizer.get_added_tokens_decoder();
        let mut pieces = Pieces { bytes: Vec::new(), ends: Vec::with_capacity(tokens.len()) };
        for (id, token) in tokens {
            // An id with two spellings comes twice; an added spelling wins below.
            if (id as usize) < pieces.ends.len() {
                continue;
            }
            let token = added.get(&id).map_or(token.as_str(), |added| added.content.as_str());
            pieces.ends.resize(id as usize, pieces.bytes.len() as u32);
            pieces.bytes.extend(decoding.bytes_of(token, added.contains_key(&id)));
            pieces.ends.push(pieces.bytes.len() as u32);
        }
        pieces
    }

    fn get(&self, id: u32) -> &[u8] {
        let index = id as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// The byte that a character of the GPT-2 alphabet stands for: printable Latin-1 stands for
/// itself, the other 68 bytes were moved, in order, to U+0100 and up.
fn byte_of_char(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The byte of a SentencePiece byte token, `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_exactly_one_character_in_the_byte_alphabet() {
        let mut found: Vec<u8> = ('\0'..='\u{200}').filter_map(byte_of_char).collect();
        found.sort_unstable();
        assert_eq!(found, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
    }

    #[test]
    fn only_two_hex_digits_name_a_fallback_byte() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xE4>"), Some(0xE4));
        assert_eq!(fallback_byte("<0xE>"), None);
        assert_eq!(fallback_byte("<0x+4>"), None);
        assert_eq!(fallback_byte("<s>"), None);
    }
}
