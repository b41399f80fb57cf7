//! Log-probabilities in the three forms that the API has.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::output::{LogprobEntry, TokenText};

/// JSON has no -∞; this stands for it.
const FLOOR: f32 = -9999.0;

fn floored(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(FLOOR) } else { FLOOR }
}

/// The number that an `f32` field is written as. A [`Value`] would widen it to 64 bits and show
/// digits that are not there, so that one log-probability would read differently in two places.
fn number(logprob: f32) -> Value {
    let logprob = floored(logprob);
    json!(logprob.to_string().parse().unwrap_or(f64::from(logprob)))
}

/// How tokens are written.
#[derive(Clone, Copy, Debug)]
pub struct LogprobStyle {
    /// Alternatives to list.
    pub top: u32,
    /// `token_id:123` instead of text.
    pub tokens_as_ids: bool,
}

impl LogprobStyle {
    fn token(self, token: &TokenText) -> String {
        if self.tokens_as_ids { format!("token_id:{}", token.token_id) } else { token.text.clone() }
    }
}

/// `logprobs` of a chat choice.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatLogprob>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct ChatLogprob {
    #[serde(flatten)]
    token: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// One entry per token.
    pub fn new(entries: &[LogprobEntry], style: LogprobStyle) -> ChatLogprobs {
        let token = |token: &TokenText, logprob: f32| ChatToken {
            token: style.token(token),
            logprob: floored(logprob),
            bytes: token.bytes.clone(),
        };
        let content = entries.iter().map(|entry| ChatLogprob {
            token: token(&entry.token, entry.logprob.unwrap_or(FLOOR)),
            top_logprobs: entry
                .top
                .iter()
                .take(style.top as usize)
                .map(|(alternative, logprob)| token(alternative, *logprob))
                .collect(),
        });
        ChatLogprobs { content: content.collect() }
    }

    /// Appends what a later part of the same choice brought.
    pub fn extend(&mut self, later: ChatLogprobs) {
        self.content.extend(later.content);
    }
}

/// `logprobs` of a text choice: parallel arrays.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl CompletionLogprobs {
    /// One entry per token; `offset` counts characters over all parts of one choice.
    pub fn new(
        entries: &[LogprobEntry],
        style: LogprobStyle,
        offset: &mut usize,
    ) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        for entry in entries {
            logprobs.text_offset.push(*offset);
            *offset += entry.token.text.chars().count();
            logprobs.token_logprobs.push(entry.logprob.map(floored));
            logprobs.tokens.push(style.token(&entry.token));
            logprobs.top_logprobs.push(entry.logprob.map(|logprob| top_map(entry, logprob, style)));
        }
        logprobs
    }

    /// Appends what a later part of the same choice brought.
    pub fn extend(&mut self, later: CompletionLogprobs) {
        self.text_offset.extend(later.text_offset);
        self.token_logprobs.extend(later.token_logprobs);
        self.tokens.extend(later.tokens);
        self.top_logprobs.extend(later.top_logprobs);
    }
}

/// The most likely tokens, and the chosen one if it is not among them.
fn top_map(entry: &LogprobEntry, logprob: f32, style: LogprobStyle) -> Map<String, Value> {
    let mut map = Map::new();
    for (token, logprob) in entry.top.iter().take(style.top as usize) {
        map.insert(style.token(token), number(*logprob));
    }
    map.entry(style.token(&entry.token)).or_insert_with(|| number(logprob));
    map
}

/// `prompt_logprobs`: per prompt token the alternatives by id, null for the first.
pub fn prompt_logprobs(entries: &[LogprobEntry], top: u32) -> Vec<Option<Map<String, Value>>> {
    let describe = |entry: &LogprobEntry| {
        let own = entry.logprob?;
        let mut map = Map::new();
        for (i, (token, logprob)) in entry.top.iter().take(top as usize).enumerate() {
            map.insert(token.token_id.to_string(), prompt_token(token, *logprob, Some(i + 1)));
        }
        let rank = entry.top.iter().position(|(token, _)| token.token_id == entry.token.token_id);
        map.entry(entry.token.token_id.to_string())
            .or_insert_with(|| prompt_token(&entry.token, own, rank.map(|rank| rank + 1)));
        Some(map)
    };
    entries.iter().map(describe).collect()
}

fn prompt_token(token: &TokenText, logprob: f32, rank: Option<usize>) -> Value {
    json!({"logprob": number(logprob), "rank": rank, "decoded_token": token.text})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(token_id: u32, text: &str) -> TokenText {
        TokenText { token_id, text: text.to_owned(), bytes: text.as_bytes().to_vec() }
    }

    fn entry(text: &str, logprob: Option<f32>) -> LogprobEntry {
        let top = vec![(token(1, "x"), -0.25), (token(2, "y"), f32::NEG_INFINITY)];
        LogprobEntry { token: token(7, text), logprob, top }
    }

    const PLAIN: LogprobStyle = LogprobStyle { top: 2, tokens_as_ids: false };

    #[test]
    fn chat_form_lists_bytes_and_floors_infinity() {
        let logprobs = ChatLogprobs::new(&[entry("é", Some(-1.5))], PLAIN);
        assert_eq!(
            serde_json::to_value(&logprobs).expect("serialises"),
            json!({"content": [{"token": "é", "logprob": -1.5, "bytes": [195, 169], "top_logprobs": [
                {"token": "x", "logprob": -0.25, "bytes": [120]},
                {"token": "y", "logprob": -9999.0, "bytes": [121]},
            ]}]})
        );
    }

    #[test]
    fn completion_form_counts_characters_and_holds_the_chosen_token() {
        let mut offset = 3;
        let style = LogprobStyle { top: 1, ..PLAIN };
        let entries = [entry("éé", None), entry("z", Some(-2.0))];
        let logprobs = CompletionLogprobs::new(&entries, style, &mut offset);
        assert_eq!(offset, 6);
        assert_eq!(
            serde_json::to_value(&logprobs).expect("serialises"),
            json!({
                "text_offset": [3, 5], "token_logprobs": [null, -2.0], "tokens": ["éé", "z"],
                "top_logprobs": [null, {"x": -0.25, "z": -2.0}],
            })
        );
    }

    #[test]
    fn a_logprob_reads_the_same_wherever_it_stands() {
        let entries = [entry("z", Some(-2.881_567_5))];
        let logprobs = CompletionLogprobs::new(&entries, PLAIN, &mut 0);
        let text = serde_json::to_string(&logprobs).expect("serialises");
        assert!(text.contains(r#""token_logprobs":[-2.8815675]"#), "{text}");
        assert!(text.contains(r#""z":-2.8815675"#) && text.contains(r#""y":-9999.0"#), "{text}");
    }

    #[test]
    fn tokens_can_be_written_as_ids() {
        let style = LogprobStyle { top: 0, tokens_as_ids: true };
        let logprobs = CompletionLogprobs::new(&[entry("z", Some(-2.0))], style, &mut 0);
        assert_eq!(logprobs.tokens, ["token_id:7"]);
    }

    #[test]
    fn prompt_form_is_keyed_by_token_id() {
        let entries = [entry("a", None), entry("b", Some(-3.0))];
        assert_eq!(
            serde_json::to_value(prompt_logprobs(&entries, 1)).expect("serialises"),
            json!([null, {
                "1": {"logprob": -0.25, "rank": 1, "decoded_token": "x"},
                "7": {"logprob": -3.0, "rank": null, "decoded_token": "b"},
            }])
        );
    }
}
