//! Chat templates: a conversation to the text that the model was trained on.
//!
//! Templates are Jinja as Hugging Face's `apply_chat_template` runs it: block trimming, loop
//! controls, `raise_exception`, `strftime_now`, Python's methods and spelling (see
//! [`super::python`]), and the special tokens as variables. Messages arrive as plain JSON in
//! the API's shape; [`messages`](super::messages) gives them the shape that templates expect.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write;
use std::sync::Arc;

use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json, json};

use crate::request::ChatPrompt;
use crate::text::messages::{self, ContentShape};
use crate::text::{TextError, python};

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Stands behind the final message while the template runs, to find its end afterwards. The
/// space shows whether the template trims.
const FINAL_MESSAGE_END: &str = "TOKENMILL-END-OF-FINAL-MESSAGE ";

/// A compiled chat template with the special tokens it may print. Cloning shares it.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Compiled>);

struct Compiled {
    env: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    /// How each template wants `content`; its keys are the templates that exist.
    shapes: BTreeMap<&'static str, ContentShape>,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` become variables (`bos_token`, `eos_token`, …).
    pub fn new(
        source: &str,
        special_tokens: BTreeMap<String, String>,
    ) -> Result<ChatTemplate, TextError> {
        ChatTemplate::with_tool_use(source, None, special_tokens)
    }

    /// Compiles a template and another one for conversations with tools.
    pub fn with_tool_use(
        source: &str,
        tool_use_source: Option<&str>,
        special_tokens: BTreeMap<String, String>,
    ) -> Result<ChatTemplate, TextError> {
        let mut compiled = Compiled { env: environment(), special_tokens, shapes: BTreeMap::new() };
        compiled.add(DEFAULT, source)?;
        if let Some(source) = tool_use_source {
            compiled.add(TOOL_USE, source)?;
        }
        Ok(ChatTemplate(Arc::new(compiled)))
    }

    /// Renders a conversation. With `continue_final_message` the text ends where the final
    /// message's content ends.
    pub fn render(&self, prompt: &ChatPrompt) -> Result<String, TextError> {
        let has_tools = prompt.tools.as_ref().is_some_and(|tools| !tools.is_empty());
        let name =
            if has_tools && self.0.shapes.contains_key(TOOL_USE) { TOOL_USE } else { DEFAULT };
        let shape = self.0.shapes[name];
        let mut messages = messages::for_template(&prompt.messages, shape)?;
        if !prompt.continue_final_message {
            return self.0.render(name, variables(prompt), messages).map_err(|e| describe(&e));
        }
        messages::append_to_last(&mut messages, FINAL_MESSAGE_END)?;
        let rendered = self.0.render(name, variables(prompt), messages);
        cut_after_final_message(rendered.map_err(|e| describe(&e))?)
    }
}

impl Compiled {
    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TextError> {
        let source = without_generation_blocks(source);
        self.env
            .add_template_owned(name, source)
            .map_err(|e| TextError::TemplateSyntax { name: name.to_owned(), reason: reason(&e) })?;
        let shape = messages::probe_shape(|messages| {
            let no_tools =
                json!({"tools": null, "documents": null, "add_generation_prompt": false});
            self.render(name, no_tools.as_object()?.clone(), messages).ok()
        });
        self.shapes.insert(name, shape);
        Ok(())
    }

    fn render(
        &self,
        name: &str,
        variables: Map<String, Json>,
        messages: Vec<Json>,
    ) -> Result<String, Error> {
        let tokens = self.special_tokens.iter().map(|(name, text)| (name.clone(), json!(text)));
        let mut context: Map<String, Json> = tokens.collect();
        context.extend(variables);
        context.insert("messages".to_owned(), messages.into());
        self.env.get_template(name)?.render(Value::from_serialize(context))
    }
}

/// What a request gives a template beside its messages; its own extra variables win.
fn variables(prompt: &ChatPrompt) -> Map<String, Json> {
    let mut variables = Map::new();
    variables.insert("tools".to_owned(), json!(prompt.tools));
    variables.insert("documents".to_owned(), json!(prompt.documents));
    variables.insert("add_generation_prompt".to_owned(), json!(prompt.add_generation_prompt));
    variables.extend(prompt.template_kwargs.clone());
    variables
}

/// Jinja as `transformers` configures it.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(python::call_method);
    env.set_formatter(|out, _, value| {
        let written = match (value.as_str(), value.kind()) {
            (Some(text), _) => out.write_str(text),
            (None, ValueKind::Undefined) => Ok(()),
            (None, _) => out.write_str(&python::to_str(value)),
        };
        written.map_err(Error::from)
    });
    env.add_filter("tojson", python::tojson);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        let error = Error::new(ErrorKind::InvalidOperation, "raise_exception");
        Err(error.with_source(Refusal(message)))
    });
    env.add_function("strftime_now", strftime_now);
    env
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
        let message = format!("strftime_now does not know the format {format:?}");
        Error::new(ErrorKind::InvalidOperation, message)
    })?;
    Ok(text)
}

/// What a template said when it called `raise_exception`.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn describe(error: &Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Refusal(message)) = current.downcast_ref() {
            return TextError::TemplateRefused { reason: message.clone() };
        }
        cause = current.source();
    }
    TextError::TemplateRender { reason: reason(error) }
}

fn reason(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    error.line().map_or(what.clone(), |line| format!("{what} (line {line})"))
}

/// `{% generation %}` marks the text to train on; for a prompt its body is simply printed. It
/// becomes an `if`, which keeps its whitespace control and its `end`.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, block) = rest.split_at(start);
        let end = block.find("%}").map_or(block.len(), |end| end + 2);
        out.push_str(before);
        let is_marker = |c: char| matches!(c, '{' | '}' | '%' | '-' | '+') || c.is_whitespace();
        match block[..end].trim_matches(is_marker) {
            "generation" => out.push_str(&block[..end].replace("generation", "if true")),
            "endgeneration" => out.push_str(&block[..end].replace("endgeneration", "endif")),
            _ => out.push_str(&block[..end]),
        }
        rest = &block[end..];
    }
    out + rest
}

fn cut_after_final_message(mut rendered: String) -> Result<String, TextError> {
    let reason = "the chat template does not print it";
    let end = rendered
        .rfind(FINAL_MESSAGE_END.trim_end())
        .ok_or(TextError::ContinueFinalMessage { reason })?;
    let keeps_spaces = rendered[end..].starts_with(FINAL_MESSAGE_END);
    rendered.truncate(end);
    if !keeps_spaces {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}
