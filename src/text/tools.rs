//! Tool calls in a stream of text, in the Hermes form that Qwen, Hermes and many others write:
//! `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`.
//!
//! The parser reads one character at a time, so its events depend on the text alone, never on
//! how it was cut into pieces. Arguments stream out as the exact text the model wrote, from the
//! moment the name is known. What turns out to be no call is given back as text. White space
//! next to a call belongs to the form, not to the content. (The crates that parse this form
//! want whole messages or the tool list beside the text; this file needs neither.)

use serde_json::{Map, Value};

use crate::text::stop::Pattern;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// What a piece of text meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolEvent {
    /// Content outside any call.
    Text(String),
    /// A call begins.
    CallStart {
        /// Counts the calls of this output from 0.
        index: usize,
        /// The tool.
        name: String,
    },
    /// More of a call's arguments.
    ArgumentsDelta {
        /// Which call.
        index: usize,
        /// JSON text, to be appended to what came before.
        text: String,
    },
    /// A call is complete; absent when the output was cut off inside it.
    CallEnd {
        /// Which call.
        index: usize,
    },
}

/// One complete call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// JSON text as the model wrote it.
    pub arguments: String,
}

/// Reads the calls of one output.
pub struct ToolCallParser {
    open: Pattern,
    close: Pattern,
    /// Content that may still belong to a call: white space and the beginning of a tag.
    held: String,
    call: Option<Call>,
    num_calls: usize,
}

/// A call that has been opened.
struct Call {
    /// White space before the tag, wanted back if this is no call.
    before: String,
    /// Everything after the tag, the closing tag included as it arrives.
    body: String,
    progress: Progress,
}

/// How far into the call the parser has come.
enum Progress {
    /// Before the arguments.
    Head,
    /// The arguments begin here, but the name has not been seen: the call waits to be whole.
    Unnamed { arguments_at: usize },
    /// Inside the arguments; `sent` is where in the body the next delta begins.
    Arguments { sent: usize, nesting: Nesting },
    /// After the arguments.
    Tail,
}

impl Default for ToolCallParser {
    fn default() -> Self {
        ToolCallParser {
            open: Pattern::new(OPEN),
            close: Pattern::new(CLOSE),
            held: String::new(),
            call: None,
            num_calls: 0,
        }
    }
}

impl ToolCallParser {
    /// A parser at the beginning of an output.
    pub fn new() -> ToolCallParser {
        ToolCallParser::default()
    }

    /// Reads a whole output: its content, and its calls in order.
    pub fn parse_whole(text: &str) -> (String, Vec<ToolCall>) {
        let mut parser = ToolCallParser::new();
        let mut events = parser.push(text);
        events.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), Vec::<ToolCall>::new());
        for event in events {
            match event {
                ToolEvent::Text(text) => content.push_str(&text),
                ToolEvent::CallStart { name, .. } => {
                    calls.push(ToolCall { name, arguments: String::new() });
                }
                ToolEvent::ArgumentsDelta { index, text } => calls[index].arguments.push_str(&text),
                ToolEvent::CallEnd { .. } => {}
            }
        }
        (content, calls)
    }

    /// Number of calls that have begun.
    pub fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Reads more text.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        for character in text.chars() {
            if self.call.is_some() {
                self.step_in_call(character, &mut events);
            } else {
                self.step_in_content(character, &mut events);
            }
        }
        self.send_arguments(&mut events);
        events
    }

    /// Reads the end of the output. A call that only lacks its closing tag counts as whole.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        let partial_close = self.close.matched_len();
        self.close = Pattern::new(CLOSE);
        self.send_arguments(&mut events);
        let Some(mut call) = self.call.take() else {
            let held = std::mem::take(&mut self.held);
            let is_trailing_space = self.num_calls > 0 && held.trim().is_empty();
            if !is_trailing_space {
                push_text(&mut events, &held);
            }
            return events;
        };
        let tag_part = call.body.split_off(call.body.len() - partial_close);
        match call.progress {
            Progress::Arguments { .. } => {}
            _ => self.end_call(&call, &tag_part, &mut events),
        }
        events
    }

    fn step_in_content(&mut self, character: char, events: &mut Vec<ToolEvent>) {
        self.held.push(character);
        if advance(&mut self.open, character) {
            self.held.truncate(self.held.len() - OPEN.len());
            self.open_call();
            return;
        }
        let certain = self.held.len() - self.open.matched_len();
        let content_len = self.held[..certain].trim_end().len();
        push_text(events, &self.held[..content_len]);
        self.held.drain(..content_len);
    }

    fn open_call(&mut self) {
        let before = std::mem::take(&mut self.held);
        self.call = Some(Call { before, body: String::new(), progress: Progress::Head });
        self.open = Pattern::new(OPEN);
        self.close = Pattern::new(CLOSE);
    }

    fn step_in_call(&mut self, character: char, events: &mut Vec<ToolEvent>) {
        let Some(call) = &mut self.call else { return };
        call.body.push(character);
        if advance(&mut self.close, character) {
            call.body.truncate(call.body.len() - CLOSE.len());
            self.close_call(CLOSE, events);
            return;
        }
        match &mut call.progress {
            Progress::Head if character == '{' => {
                if let Some(name) = call.read_head() {
                    let index = self.num_calls;
                    self.num_calls += 1;
                    events.push(ToolEvent::CallStart { index, name });
                }
            }
            Progress::Arguments { nesting, .. } => {
                if nesting.closes_at(character) {
                    self.send_arguments(events);
                    if let Some(call) = &mut self.call {
                        call.progress = Progress::Tail;
                    }
                }
            }
            // A model that forgets the closing tag goes straight on to its next call.
            Progress::Tail if advance(&mut self.open, character) => {
                self.close_call("", events);
                self.open_call();
            }
            Progress::Head | Progress::Unnamed { .. } | Progress::Tail => {}
        }
    }

    fn close_call(&mut self, tag: &str, events: &mut Vec<ToolEvent>) {
        self.close = Pattern::new(CLOSE);
        self.send_arguments(events);
        if let Some(call) = self.call.take() {
            self.end_call(&call, tag, events);
        }
    }

    /// Sends what has arrived of the arguments, up to where the closing tag may begin.
    fn send_arguments(&mut self, events: &mut Vec<ToolEvent>) {
        let Some(Call { body, progress: Progress::Arguments { sent, .. }, .. }) = &mut self.call
        else {
            return;
        };
        let certain = body.len() - self.close.matched_len();
        if *sent < certain {
            let index = self.num_calls - 1;
            let text = body[*sent..certain].to_owned();
            events.push(ToolEvent::ArgumentsDelta { index, text });
            *sent = certain;
        }
    }

    /// The call is over: reports its end, all of it at once, or that it was none.
    fn end_call(&mut self, call: &Call, tag: &str, events: &mut Vec<ToolEvent>) {
        if let Progress::Arguments { .. } | Progress::Tail = call.progress {
            events.push(ToolEvent::CallEnd { index: self.num_calls - 1 });
            return;
        }
        match call.read_whole() {
            Some(ToolCall { name, arguments: text }) => {
                let index = self.num_calls;
                self.num_calls += 1;
                events.push(ToolEvent::CallStart { index, name });
                events.push(ToolEvent::ArgumentsDelta { index, text });
                events.push(ToolEvent::CallEnd { index });
            }
            None => {
                for part in [&call.before, OPEN, &call.body, tag] {
                    push_text(events, part);
                }
            }
        }
    }
}

impl Call {
    /// The body ends with a brace. If that brace begins the value of the object's `arguments`,
    /// the call moves on, and its name is returned when it is already known. That is so exactly
    /// when the body is a JSON object once the brace is replaced by a complete value.
    fn read_head(&mut self) -> Option<String> {
        let arguments_at = self.body.len() - 1;
        let as_if_whole = format!("{}null}}", &self.body[..arguments_at]);
        let members: Map<String, Value> = serde_json::from_str(&as_if_whole).ok()?;
        if members.keys().next_back()? != "arguments" {
            return None;
        }
        let name = name_of(&members);
        self.progress = match name {
            Some(_) => Progress::Arguments { sent: arguments_at, nesting: Nesting::opened() },
            None => Progress::Unnamed { arguments_at },
        };
        name
    }

    /// A call that is complete and whose arguments could not be sent early.
    fn read_whole(&self) -> Option<ToolCall> {
        let members: Map<String, Value> = serde_json::from_str(&self.body).ok()?;
        let name = name_of(&members)?;
        let arguments = match (&self.progress, members.get("arguments")) {
            (Progress::Unnamed { arguments_at }, _) => exact_object(&self.body[*arguments_at..])?,
            (_, None | Some(Value::Null)) => "{}",
            (_, Some(Value::String(text))) => {
                serde_json::from_str::<Map<String, Value>>(text).ok()?;
                text
            }
            _ => return None,
        };
        Some(ToolCall { name, arguments: arguments.to_owned() })
    }
}

/// Depth of braces and brackets outside strings.
struct Nesting {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Nesting {
    /// After the first opening brace.
    fn opened() -> Nesting {
        Nesting { depth: 1, in_string: false, is_escaped: false }
    }

    /// True when this character closes what was opened first.
    fn closes_at(&mut self, character: char) -> bool {
        match character {
            _ if self.is_escaped => self.is_escaped = false,
            '\\' if self.in_string => self.is_escaped = true,
            '"' => self.in_string = !self.in_string,
            '{' | '[' if !self.in_string => self.depth += 1,
            '}' | ']' if !self.in_string => self.depth -= 1,
            _ => {}
        }
        self.depth == 0
    }
}

/// The object at the beginning of a text, as it is written there.
fn exact_object(text: &str) -> Option<&str> {
    let mut nesting = Nesting::opened();
    let (last, _) = text.char_indices().skip(1).find(|&(_, c)| nesting.closes_at(c))?;
    Some(&text[..=last])
}

fn name_of(members: &Map<String, Value>) -> Option<String> {
    members.get("name")?.as_str().filter(|name| !name.is_empty()).map(str::to_owned)
}

fn advance(pattern: &mut Pattern, character: char) -> bool {
    let mut buffer = [0; 4];
    let bytes = character.encode_utf8(&mut buffer).bytes();
    bytes.fold(false, |_, byte| pattern.advance(byte))
}

fn push_text(events: &mut Vec<ToolEvent>, text: &str) {
    match events.last_mut() {
        _ if text.is_empty() => {}
        Some(ToolEvent::Text(last)) => last.push_str(text),
        _ => events.push(ToolEvent::Text(text.to_owned())),
    }
}
