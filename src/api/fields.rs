//! A JSON body, read field by field.
//!
//! Knows which fields were asked for, so that the rest can be reported as ignored, and the path
//! of every value, so that an error can name it.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::error::{ApiError, ErrorKind};

/// Longest list of ignored fields that is reported; a client that sends more has other worries.
const MAX_REPORTED: usize = 32;

/// Longest reason quoted from the parser, in characters.
const MAX_REASON_LEN: usize = 300;

/// The top-level object of a request body.
#[derive(Debug)]
pub struct Fields {
    values: Map<String, Value>,
    known: BTreeSet<&'static str>,
    ignored: Vec<String>,
}

impl Fields {
    /// Parses a body, which must be one JSON object without repeated keys.
    pub fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        let values = serde_json::from_slice(body).map_err(|error| body_error(&error));
        let UniqueMap(values) = values?;
        Ok(Fields { values, known: BTreeSet::new(), ignored: Vec::new() })
    }

    /// Takes a field; `None` when it is absent or null.
    pub fn take_value(&mut self, name: &'static str) -> Option<Value> {
        self.known.insert(name);
        self.values.get_mut(name).map(Value::take).filter(|value| !value.is_null())
    }

    /// Takes a field of a given type; `None` when it is absent or null. Keys inside it that the
    /// type does not have are noted as ignored.
    pub fn take<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take_value(name) else { return Ok(None) };
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
        let ignored = &mut self.ignored;
        let parsed = serde_ignored::deserialize(tracked, |path| {
            if ignored.len() < MAX_REPORTED {
                ignored.push(format!("{name}.{path}"));
            }
        });
        parsed.map(Some).map_err(|error| {
            let path = join(name, &track.path().to_string());
            let reason = shorten(&error.to_string());
            ApiError::invalid(path.as_str(), format!("`{path}` has a wrong value: {reason}."))
        })
    }

    /// Takes a field with a default.
    pub fn take_or<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        default: T,
    ) -> Result<T, ApiError> {
        Ok(self.take(name)?.unwrap_or(default))
    }

    /// Takes a field that must be there.
    pub fn require<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, ApiError> {
        self.take(name)?
            .ok_or_else(|| ApiError::invalid(name, format!("`{name}` is required, but missing.")))
    }

    /// Notes a field as ignored although its name is known.
    pub fn ignore(&mut self, name: &'static str) {
        if self.take_value(name).is_some() {
            self.ignored.push(name.to_owned());
        }
    }

    /// Names of the fields that had no effect, in the order sent.
    pub fn into_ignored(self) -> Vec<String> {
        let Fields { values, known, ignored } = self;
        let unknown = values.into_iter().map(|(name, _)| name);
        let unknown = unknown.filter(|name| !known.contains(name.as_str()));
        unknown.chain(ignored).take(MAX_REPORTED).collect()
    }
}

/// `messages` and `[0].role` make `messages[0].role`.
fn join(name: &str, path: &str) -> String {
    match path {
        "" | "." => name.to_owned(),
        path if path.starts_with('[') => format!("{name}{path}"),
        path => format!("{name}.{path}"),
    }
}

/// The parser quotes what the client sent, which may be megabytes.
fn shorten(reason: &str) -> String {
    match reason.char_indices().nth(MAX_REASON_LEN) {
        None => reason.to_owned(),
        Some((end, _)) => format!("{}…", &reason[..end]),
    }
}

fn body_error(error: &serde_json::Error) -> ApiError {
    let is_data = error.is_data();
    let error = shorten(&error.to_string());
    let message = if is_data {
        format!("The request body is not usable: {error}.")
    } else {
        format!("The request body is not valid JSON: {error}.")
    };
    ApiError::new(ErrorKind::BadRequest, message)
}

/// An object whose keys are distinct; what to do with two values is nobody's guess.
struct UniqueMap(Map<String, Value>);

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<UniqueMap, D::Error> {
        deserializer.deserialize_map(UniqueMapVisitor).map(UniqueMap)
    }
}

struct UniqueMapVisitor;

impl<'de> Visitor<'de> for UniqueMapVisitor {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!("the key `{key}` appears twice")));
            }
            map.insert(key, access.next_value()?);
        }
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[expect(dead_code)]
        flag: bool,
    }

    #[test]
    fn unknown_fields_are_reported_with_their_path() {
        let mut fields =
            Fields::parse(br#"{"n": 1, "x": 2, "inner": {"flag": true, "y": 0}}"#).expect("JSON");
        assert_eq!(fields.take::<i64>("n").expect("integer"), Some(1));
        fields.take::<Inner>("inner").expect("object");
        assert_eq!(fields.into_ignored(), ["x", "inner.y"]);
    }

    #[test]
    fn a_wrong_type_names_its_path() {
        let mut fields =
            Fields::parse(br#"{"inner": {"flag": 3}, "ids": [1, "a"]}"#).expect("JSON");
        let error = fields.take::<Inner>("inner").expect_err("not a bool");
        assert_eq!(error.param.as_deref(), Some("inner.flag"));
        let error = fields.take::<Vec<i64>>("ids").expect_err("not an integer");
        assert_eq!(error.param.as_deref(), Some("ids[1]"));
        assert!(error.message.contains("\"a\""), "{}", error.message);
    }

    #[test]
    fn a_long_wrong_value_is_not_sent_back_whole() {
        let body = format!(r#"{{"n": "{}"}}"#, "é".repeat(10_000));
        let error = Fields::parse(body.as_bytes()).expect("JSON").take::<i64>("n");
        assert!(error.expect_err("a string").message.chars().count() < 400);
    }

    #[test]
    fn null_is_absent() {
        let mut fields = Fields::parse(br#"{"n": null}"#).expect("JSON");
        assert_eq!(fields.take::<i64>("n").expect("null"), None);
        assert!(fields.into_ignored().is_empty());
    }

    #[test]
    fn bodies_that_are_no_object_are_refused() {
        let deep = "[".repeat(100_000);
        let nested = format!("{{\"a\": {deep}");
        let bodies = ["", "[]", "3", "{\"a\":1,\"a\":2}", "{\"a\":NaN}", "{\"a\":1e999}", &nested];
        for body in bodies {
            let error = Fields::parse(body.as_bytes()).expect_err("refused");
            assert_eq!(error.kind, ErrorKind::BadRequest);
        }
        assert!(Fields::parse(b"{\"a\": \"\xff\"}").is_err());
    }
}
