//! Typed access to the fields of a JSON configuration.
//!
//! A wrong type or range is an error that names the field, its value and what would be
//! right. `null` counts as absent, as it does for the library that writes these files.

use serde_json::{Map, Value};

use super::error::ModelError;

/// Largest size that a dimension of a model may have; above it the file is nonsense.
const MAX_SIZE: usize = 1 << 24;

/// The fields of config.json or of an object within it.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// `rope_scaling.` within that object, else empty.
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of an object; `prefix` precedes their names in messages.
    pub(super) fn new(map: &'a Map<String, Value>, prefix: &'a str) -> Fields<'a> {
        Fields { map, prefix }
    }

    /// The value, unless absent or null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// True when the field is written, be it as null.
    pub(super) fn is_written(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// The error that says that this field's value is not supported.
    pub(super) fn unsupported(&self, name: &str, supported: &str) -> ModelError {
        let value = self.map.get(name).map_or_else(|| "absent".to_owned(), Value::to_string);
        ModelError::Unsupported {
            field: format!("{}{name}", self.prefix),
            value,
            supported: supported.to_owned(),
        }
    }

    /// The error that says that this field is absent.
    pub(super) fn missing(&self, name: &str) -> ModelError {
        ModelError::MissingField { field: format!("{}{name}", self.prefix) }
    }

    /// A size of at least one.
    pub(super) fn size(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let read = |value: &Value| {
            let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
            size.filter(|size| (1..=MAX_SIZE).contains(size))
                .ok_or_else(|| self.unsupported(name, "is a whole number from 1 to 16777216"))
        };
        self.get(name).map(read).transpose()
    }

    /// A size without which the model cannot be described.
    pub(super) fn required_size(&self, name: &str) -> Result<usize, ModelError> {
        self.size(name)?.ok_or_else(|| self.missing(name))
    }

    /// A number of something, from 0 on.
    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let read = |value: &Value| {
            let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
            count
                .filter(|count| *count <= MAX_SIZE)
                .ok_or_else(|| self.unsupported(name, "is a whole number from 0 to 16777216"))
        };
        self.get(name).map(read).transpose()
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, ModelError> {
        let read = |value: &Value| {
            let number = value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
            number.ok_or_else(|| self.unsupported(name, "is a number above 0"))
        };
        self.get(name).map(read).transpose()
    }

    /// A number above zero without which the model cannot be described.
    pub(super) fn required_positive(&self, name: &str) -> Result<f64, ModelError> {
        self.positive(name)?.ok_or_else(|| self.missing(name))
    }

    /// True or false.
    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        let read = |value: &Value| {
            value.as_bool().ok_or_else(|| self.unsupported(name, "are true and false"))
        };
        self.get(name).map(read).transpose()
    }

    /// A string.
    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        let read =
            |value: &'a Value| value.as_str().ok_or_else(|| self.unsupported(name, "is a string"));
        self.get(name).map(read).transpose()
    }

    /// A list of strings.
    pub(super) fn texts(&self, name: &str) -> Result<Option<Vec<String>>, ModelError> {
        let read = |value: &Value| {
            serde_json::from_value(value.clone())
                .map_err(|_| self.unsupported(name, "is a list of strings"))
        };
        self.get(name).map(read).transpose()
    }

    /// One token id or a list of them; absent is an empty list.
    pub(super) fn token_ids(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let values = value.as_array().map_or(one, Vec::as_slice);
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        values
            .iter()
            .map(id)
            .collect::<Option<Vec<u32>>>()
            .ok_or_else(|| self.unsupported(name, "is a token id or a list of them"))
    }

    /// A list of numbers from 0; absent is an empty list.
    pub(super) fn numbers(&self, name: &str) -> Result<Vec<usize>, ModelError> {
        let read = |value: &Value| {
            serde_json::from_value(value.clone())
                .map_err(|_| self.unsupported(name, "is a list of whole numbers"))
        };
        self.get(name).map_or(Ok(Vec::new()), read)
    }

    /// An object, whose fields are named after this prefix.
    pub(super) fn object(
        &self,
        name: &str,
        prefix: &'a str,
    ) -> Result<Option<Fields<'a>>, ModelError> {
        let read = |value: &'a Value| {
            let map = value.as_object().ok_or_else(|| self.unsupported(name, "is an object"))?;
            Ok(Fields::new(map, prefix))
        };
        self.get(name).map(read).transpose()
    }

    /// The names of all fields.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// The first field that is an object, if any.
    pub(super) fn first_nested(&self) -> Option<&'a str> {
        let nested =
            |(name, value): (&'a String, &Value)| value.is_object().then_some(name.as_str());
        self.map.iter().find_map(nested)
    }
}
