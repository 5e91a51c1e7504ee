//! Strict reader of objects: every key is taken by name and type; a key that was not taken is
//! refused.

use super::GraderError;
use super::template::{self, Template};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Maximum length of the name of a grader or a model, in bytes.
const LONGEST_NAME: usize = 256;

/// The keys of one object that have not been taken yet.
#[derive(Debug)]
pub(super) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The keys of the object at `path`.
    pub(super) fn of(path: String, value: Value) -> Result<Self, GraderError> {
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            other => Err(wrong(&path, "an object", &other)),
        }
    }

    /// The full name of a key.
    pub(super) fn path(&self, key: &str) -> String {
        format!("{}.{key}", self.path)
    }

    /// Takes a key of any type; null counts as absent.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    /// Puts back a key that was taken with [`Fields::take`].
    pub(super) fn put_back(&mut self, key: &str, value: Value) {
        self.map.insert(key.to_owned(), value);
    }

    pub(super) fn need(&mut self, key: &str) -> Result<Value, GraderError> {
        self.take(key).ok_or_else(|| self.missing(key))
    }

    pub(super) fn missing(&self, key: &str) -> GraderError {
        let param = self.path(key);
        GraderError { message: format!("Missing required parameter: '{param}'."), param }
    }

    /// An error for a key: `grader.range must be …`; `what` follows the key's name.
    pub(super) fn error(&self, key: &str, what: impl std::fmt::Display) -> GraderError {
        let param = self.path(key);
        GraderError { message: format!("{param} {what}"), param }
    }

    /// Takes a string of at most `most` bytes.
    pub(super) fn string(&mut self, key: &str, most: usize) -> Result<Option<String>, GraderError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) if text.len() <= most => Ok(Some(text)),
            Some(Value::String(text)) => {
                Err(self
                    .error(key, format!("must be at most {most} bytes long, got {}", text.len())))
            }
            Some(other) => Err(wrong(&self.path(key), "a string", &other)),
        }
    }

    /// Takes a non-empty name.
    pub(super) fn name(&mut self, key: &str) -> Result<Option<String>, GraderError> {
        match self.string(key, LONGEST_NAME)? {
            Some(name) if name.is_empty() => Err(self.error(key, "must not be empty")),
            name => Ok(name),
        }
    }

    /// Takes a required name.
    pub(super) fn need_name(&mut self, key: &str) -> Result<String, GraderError> {
        let value = self.need(key)?;
        self.put_back(key, value);
        Ok(self.name(key)?.unwrap_or_default())
    }

    /// Takes a required string of at most `most` bytes.
    pub(super) fn need_string(&mut self, key: &str, most: usize) -> Result<String, GraderError> {
        let value = self.need(key)?;
        self.put_back(key, value);
        Ok(self.string(key, most)?.unwrap_or_default())
    }

    /// Takes a string that is one of `known`.
    pub(super) fn one_of<T: Copy>(
        &mut self,
        key: &str,
        known: &[(&'static str, T)],
    ) -> Result<Option<T>, GraderError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let found = known.iter().find(|(name, _)| value.as_str() == Some(name));
        found.map(|(_, what)| Some(*what)).ok_or_else(|| {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            wrong(&self.path(key), &format!("one of {}", names.join(", ")), &value)
        })
    }

    /// As [`Fields::one_of`], but required.
    pub(super) fn need_one_of<T: Copy>(
        &mut self,
        key: &str,
        known: &[(&'static str, T)],
    ) -> Result<T, GraderError> {
        let value = self.need(key)?;
        self.put_back(key, value);
        let one = self.one_of(key, known)?;
        one.ok_or_else(|| self.error(key, "must be given"))
    }

    pub(super) fn number(
        &mut self,
        key: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, GraderError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(wrong(&self.path(key), &between("a number", &range), &value)),
        }
    }

    /// Takes a whole number, written without a fraction.
    pub(super) fn integer(
        &mut self,
        key: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, GraderError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(wrong(&self.path(key), &between("an integer", &range), &value)),
        }
    }

    /// Takes a list of `1..=most` elements, each with its path.
    pub(super) fn list(
        &mut self,
        key: &str,
        most: usize,
    ) -> Result<Option<Vec<(String, Value)>>, GraderError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(list)) if (1..=most).contains(&list.len()) => {
                let path = self.path(key);
                let paths = (0..list.len()).map(|index| format!("{path}[{index}]"));
                Ok(Some(paths.zip(list).collect()))
            }
            Some(other) => {
                Err(wrong(&self.path(key), &format!("a list of 1 to {most} elements"), &other))
            }
        }
    }

    /// Takes a required template.
    pub(super) fn template(&mut self, key: &str) -> Result<Template, GraderError> {
        let value = self.need(key)?;
        template_at(&self.path(key), value)
    }

    /// Takes a template; the default is the sample's text.
    pub(super) fn template_or_output(&mut self, key: &str) -> Result<Template, GraderError> {
        let value = self.take(key).unwrap_or_else(|| Value::from(template::OUTPUT_TEXT));
        template_at(&self.path(key), value)
    }

    /// Refuses keys that were not taken.
    pub(super) fn finish(self) -> Result<(), GraderError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((key, _)) => {
                let key: String = key.chars().take(100).collect();
                let param = self.path(&key);
                Err(GraderError {
                    message: format!("Unrecognized request argument: {param}"),
                    param,
                })
            }
        }
    }
}

/// Parses the template at `path`.
pub(super) fn template_at(path: &str, value: Value) -> Result<Template, GraderError> {
    let Value::String(source) = value else { return Err(wrong(path, "a string", &value)) };
    Template::parse(source).map_err(|why| GraderError {
        param: path.to_owned(),
        message: format!("{path} is no valid template: {why}"),
    })
}

/// `grader.operation must be one of eq, ne, got "is"`.
pub(super) fn wrong(path: &str, expected: &str, got: &Value) -> GraderError {
    GraderError {
        param: path.to_owned(),
        message: format!("{path} must be {expected}, got {}", show(got)),
    }
}

fn between<T: std::fmt::Display>(what: &str, range: &RangeInclusive<T>) -> String {
    format!("{what} between {} and {}", range.start(), range.end())
}

/// Shortens a value for a quotation in an error.
pub(super) fn show(value: &Value) -> String {
    const MOST: usize = 60;
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.len() > MOST => {
            let start = &text[..text.floor_char_boundary(MOST)];
            format!("{}… ({} bytes)", Value::from(start), text.len())
        }
        other => other.to_string(),
    }
}
