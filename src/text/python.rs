//! Python's spelling of values, for templates that were written for Jinja on Python.
//!
//! A model was trained on prompts that Python rendered: `True`, `None`, `1e-05`, and JSON with
//! a space after every comma and colon. A different spelling is a different prompt, so these
//! functions reproduce `str`, `repr` and `json.dumps`, and the string methods that templates
//! call but `minijinja-contrib` lacks. One difference stays: the engine has no tuples, so a tuple
//! prints as a list.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// How `json.dumps` was asked to write.
struct JsonStyle {
    /// Spaces per level; `None` writes one line.
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl JsonStyle {
    fn from_kwargs(kwargs: &Kwargs) -> Result<JsonStyle, Error> {
        let indent = kwargs.get::<Option<usize>>("indent")?;
        let line_end = if indent.is_some() { "," } else { ", " };
        let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
        let separators = separators.unwrap_or_else(|| vec![line_end.to_owned(), ": ".to_owned()]);
        let Ok([item_separator, key_separator]) = <[String; 2]>::try_from(separators) else {
            let message = "separators are a pair of strings";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        };
        let flag = |name| kwargs.get::<Option<bool>>(name).map(|flag| flag.unwrap_or(false));
        let (sort_keys, ensure_ascii) = (flag("sort_keys")?, flag("ensure_ascii")?);
        kwargs.assert_all_used()?;
        Ok(JsonStyle { indent, item_separator, key_separator, sort_keys, ensure_ascii })
    }
}

/// The `tojson` filter of Hugging Face templates: `json.dumps` that leaves non-ASCII alone.
#[expect(clippy::needless_pass_by_value, reason = "filters get owned arguments")]
pub fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let style = JsonStyle::from_kwargs(&kwargs)?;
    let mut writer = JsonWriter { style: &style, depth: 0, out: String::new() };
    writer.value(value)?;
    Ok(writer.out)
}

struct JsonWriter<'a> {
    style: &'a JsonStyle,
    depth: usize,
    out: String,
}

impl JsonWriter<'_> {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items('[', ']', &items, Self::value)?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.style.sort_keys {
                    keys.sort();
                }
                self.items('{', '}', &keys, |writer, key| {
                    writer.string(&to_str(key));
                    writer.out.push_str(&writer.style.key_separator);
                    writer.value(&value.get_item(key)?)
                })?;
            }
            kind => {
                let message = format!("a value of type {kind} cannot be written as JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        close: char,
        items: &[Value],
        mut item: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        self.depth += 1;
        for (index, value) in items.iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.style.item_separator);
            }
            self.line_break();
            item(self, value)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.line_break();
        }
        self.out.push(close);
        Ok(())
    }

    fn line_break(&mut self) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * self.depth));
        }
    }

    /// Escapes what JSON demands, as `json.dumps` and `serde_json` both do.
    fn string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.style.ensure_ascii {
            self.out.push_str(&quoted);
            return;
        }
        for character in quoted.chars() {
            if character.is_ascii() {
                self.out.push(character);
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    self.out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

/// Python's `str`: what `{{ value }}` prints.
pub fn to_str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => repr(value),
    }
}

/// Python's `repr`; an undefined value is empty, as Jinja prints it.
pub fn repr(value: &Value) -> String {
    let join = |parts: Vec<String>| parts.join(", ");
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number => number(value),
        ValueKind::String => repr_str(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items = value.try_iter().into_iter().flatten();
            format!("[{}]", join(items.map(|item| repr(&item)).collect()))
        }
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            let member = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            format!("{{{}}}", join(keys.map(member).collect()))
        }
        _ => value.to_string(),
    }
}

fn repr_str(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Integers as they are; floats with Python's exponent (`1e-05`, not `1e-5`).
fn number(value: &Value) -> String {
    let float = (!value.is_integer()).then(|| f64::try_from(value.clone()).ok()).flatten();
    let Some(float) = float else { return value.to_string() };
    let shortest = format!("{float:?}");
    match shortest.split_once('e') {
        None => shortest,
        Some((mantissa, exponent)) => {
            let (sign, digits) = match exponent.strip_prefix('-') {
                Some(digits) => ('-', digits),
                None => ('+', exponent),
            };
            format!("{mantissa}e{sign}{digits:0>2}")
        }
    }
}

/// Methods of Python's values that templates call.
pub fn call_method(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let texts = (value.as_str(), args.first().and_then(Value::as_str));
    if let (Some(text), Some(argument)) = texts
        && let Some(result) = string_method(name, text, argument, args.get(1))
    {
        return Ok(result);
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The string methods of one string argument that `pycompat` lacks.
fn string_method(name: &str, text: &str, argument: &str, limit: Option<&Value>) -> Option<Value> {
    let list = |parts: &[&str]| parts.iter().copied().map(Value::from).collect::<Vec<Value>>();
    Some(match name {
        "removeprefix" => Value::from(text.strip_prefix(argument).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(argument).unwrap_or(text)),
        "partition" => match text.split_once(argument) {
            Some((head, tail)) => Value::from(list(&[head, argument, tail])),
            None => Value::from(list(&[text, "", ""])),
        },
        "rpartition" => match text.rsplit_once(argument) {
            Some((head, tail)) => Value::from(list(&[head, argument, tail])),
            None => Value::from(list(&["", "", text])),
        },
        "rsplit" => {
            let limit = limit.and_then(Value::as_usize).unwrap_or(usize::MAX - 1);
            let mut parts: Vec<&str> = text.rsplitn(limit + 1, argument).collect();
            parts.reverse();
            Value::from(list(&parts))
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::Environment;
    use serde_json::json;

    fn value(json: serde_json::Value) -> Value {
        Value::from_serialize(json)
    }

    fn render(source: &str) -> String {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        env.set_unknown_method_callback(call_method);
        let context = json!({"x": {"b": [1, 2.0, "é<&'\n"], "a": {}, "c": null}});
        env.render_str(source, context).expect("the template renders")
    }

    #[test]
    fn json_is_spaced_and_unescaped_like_json_dumps() {
        assert_eq!(render("{{ x|tojson }}"), r#"{"b": [1, 2.0, "é<&'\n"], "a": {}, "c": null}"#);
        assert_eq!(
            render("{{ x|tojson(sort_keys=true, separators=[',', ':'], ensure_ascii=true) }}"),
            r#"{"a":{},"b":[1,2.0,"\u00e9<&'\n"],"c":null}"#
        );
    }

    #[test]
    fn indented_json_breaks_every_member_but_no_empty_container() {
        let expected = "{\n    \"b\": [\n        1,\n        2.0,\n        \"é<&'\\n\"\n    ],\n    \"a\": {},\n    \"c\": null\n}";
        assert_eq!(render("{{ x|tojson(indent=4) }}"), expected);
    }

    #[test]
    fn values_print_as_python_prints_them() {
        let all =
            json!([true, false, null, 1, 0.5, 1e16, 1e-5, 1e15, "it's", "a\"b'\n", {"k": "v"}]);
        let expected = r#"[True, False, None, 1, 0.5, 1e+16, 1e-05, 1000000000000000.0, "it's", 'a"b\'\n', {'k': 'v'}]"#;
        assert_eq!(to_str(&value(all)), expected);
        assert_eq!(to_str(&Value::UNDEFINED), "");
    }

    #[test]
    fn string_methods_behave_as_in_python() {
        assert_eq!(render("{{ 'a.b.c'.rsplit('.', 1)|tojson }}"), r#"["a.b", "c"]"#);
        assert_eq!(render("{{ 'a.b'.partition('.')|tojson }}"), r#"["a", ".", "b"]"#);
        assert_eq!(render("{{ 'ab'.partition('.')|tojson }}"), r#"["ab", "", ""]"#);
        assert_eq!(render("{{ 'ab'.rpartition('.')|tojson }}"), r#"["", "", "ab"]"#);
        assert_eq!(render("{{ 'xay'.removeprefix('x').removesuffix('y') }}"), "a");
        assert_eq!(render("{{ '  a '.strip() }}"), "a");
        assert_eq!(render("{{ 'a\\nb</think>\\nc'.split('</think>')[-1].lstrip('\\n') }}"), "c");
    }
}
