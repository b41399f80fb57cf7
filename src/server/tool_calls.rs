//! Tool calls in the output, from parser events to the wire's form.

use crate::api::chat::ToolUse;
use crate::api::chat_response::{ChatDelta, ToolCallDelta};
use crate::output::FinishReason;
use crate::text::{ToolCallParser, ToolEvent};

/// What a piece of output means for the message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// More content.
    Text(String),
    /// A new call.
    Call {
        /// Counts from 0.
        index: u32,
        /// Fresh and unique.
        id: String,
        /// Name of the function.
        name: String,
    },
    /// More arguments of a call.
    Arguments {
        /// Which call.
        index: u32,
        /// To be appended.
        text: String,
    },
}

/// Reads one continuation's text.
pub(super) struct OutputReader {
    parser: Option<ToolCallParser>,
    max_calls: usize,
    has_calls: bool,
}

impl OutputReader {
    pub fn new(tools: ToolUse) -> OutputReader {
        let max_calls = match tools {
            ToolUse::Off => 0,
            ToolUse::Single => 1,
            ToolUse::Parallel => usize::MAX,
        };
        let parser = (max_calls > 0).then(ToolCallParser::new);
        OutputReader { parser, max_calls, has_calls: false }
    }

    /// Reads more text; `is_last` when nothing follows.
    pub fn read(&mut self, text: String, is_last: bool) -> Vec<Piece> {
        let Some(parser) = &mut self.parser else {
            return if text.is_empty() { Vec::new() } else { vec![Piece::Text(text)] };
        };
        let mut events = parser.push(&text);
        if is_last {
            events.extend(parser.finish());
        }
        events.into_iter().filter_map(|event| self.piece(event)).collect()
    }

    fn piece(&mut self, event: ToolEvent) -> Option<Piece> {
        let max_calls = self.max_calls;
        let wanted = |index: usize| (index < max_calls).then_some(index as u32);
        match event {
            ToolEvent::Text(text) => Some(Piece::Text(text)),
            ToolEvent::CallStart { index, name } => {
                let index = wanted(index)?;
                self.has_calls = true;
                let id = format!("chatcmpl-tool-{}", uuid::Uuid::new_v4().simple());
                Some(Piece::Call { index, id, name })
            }
            ToolEvent::ArgumentsDelta { index, text } => {
                Some(Piece::Arguments { index: wanted(index)?, text })
            }
            ToolEvent::CallEnd { .. } => None,
        }
    }

    /// The word for why a message ended: calls count only when the model stopped by itself.
    pub fn finish_word(&self, finish: &FinishReason) -> &'static str {
        match finish.as_str() {
            "stop" if self.has_calls => "tool_calls",
            word => word,
        }
    }
}

impl From<Piece> for ChatDelta {
    fn from(piece: Piece) -> ChatDelta {
        match piece {
            Piece::Text(text) => ChatDelta { content: Some(text), ..ChatDelta::default() },
            Piece::Call { index, id, name } => call(ToolCallDelta::start(index, id, name)),
            Piece::Arguments { index, text } => call(ToolCallDelta::arguments(index, text)),
        }
    }
}

fn call(delta: ToolCallDelta) -> ChatDelta {
    ChatDelta { tool_calls: vec![delta], ..ChatDelta::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALLS: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                         <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";

    fn names(tools: ToolUse) -> Vec<String> {
        let pieces = OutputReader::new(tools).read(CALLS.to_owned(), true);
        let name = |piece| match piece {
            Piece::Call { name, .. } => Some(name),
            _ => None,
        };
        pieces.into_iter().filter_map(name).collect()
    }

    #[test]
    fn calls_are_read_only_when_there_are_tools() {
        assert_eq!(names(ToolUse::Parallel), ["f", "g"]);
        assert_eq!(names(ToolUse::Single), ["f"]);
        assert!(names(ToolUse::Off).is_empty());
    }

    #[test]
    fn a_finished_call_changes_the_finish_reason_but_a_cut_one_does_not() {
        let mut reader = OutputReader::new(ToolUse::Parallel);
        assert_eq!(reader.finish_word(&FinishReason::EndOfText), "stop");
        reader.read(CALLS.to_owned(), true);
        assert_eq!(reader.finish_word(&FinishReason::EndOfText), "tool_calls");
        assert_eq!(reader.finish_word(&FinishReason::Length), "length");
    }
}
