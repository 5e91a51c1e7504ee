//! Strict reader of JSON bodies: every field is taken by name and type, every error names its
//! field, and a field that was not taken is refused.

use crate::gateway::error::ApiError;
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http::{StatusCode, header};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The fields of one JSON object that have not been taken yet.
#[derive(Debug)]
pub struct Fields {
    /// Path of the object in the body: empty, or `stream_options`, or `messages[2]`.
    path: String,
    map: Map<String, Value>,
}

/// A request body, extracted if it is `application/json` and an object; otherwise an [`ApiError`].
#[derive(Debug)]
pub struct JsonBody(pub Fields);

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let content_type = request.headers().get(header::CONTENT_TYPE);
        if !content_type.is_some_and(|value| is_json(value.as_bytes())) {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "invalid_request_error",
                "The body must be JSON: send the header `Content-Type: application/json`.",
            ));
        }
        let body = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                ApiError::too_large("The request's body is larger than this server accepts.")
            } else {
                ApiError::bad_request("The request's body could not be read.")
            }
        })?;
        Fields::parse(&body).map(Self)
    }
}

/// Whether a `Content-Type` is JSON, ignoring its parameters.
fn is_json(content_type: &[u8]) -> bool {
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default();
    let essence = essence.trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
        || (essence.len() > 17
            && essence[..12].eq_ignore_ascii_case(b"application/")
            && essence[essence.len() - 5..].eq_ignore_ascii_case(b"+json"))
}

impl Fields {
    /// Parses a body. serde_json bounds the depth (128) and refuses numbers beyond an `f64`.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(without_mark(body)) {
            Ok(Value::Object(map)) => Ok(Self { path: String::new(), map }),
            Ok(other) => Err(ApiError::bad_request(format!(
                "The request's body must be a JSON object, got {}.",
                show(&other)
            ))),
            Err(error) => Err(ApiError::bad_request(format!(
                "We could not parse the JSON body of your request: {error}."
            ))),
        }
    }

    /// The fields of the object at `path`, or an error if the value is not an object.
    pub fn of(path: String, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            other => Err(wrong(&path, "an object", &other)),
        }
    }

    /// The full name of a field as used in errors: `stream_options.include_usage`.
    pub fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Takes a field of any type; null counts as absent.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.swap_remove(key).filter(|value| !value.is_null())
    }

    /// Takes fields that have no effect here, whatever their values.
    pub fn ignore(&mut self, keys: &[&str]) {
        keys.iter().for_each(|key| drop(self.map.swap_remove(*key)));
    }

    /// Whether a field is present and not null.
    pub fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// Puts back a field that was taken with [`Fields::take`].
    pub fn put_back(&mut self, key: &str, value: Value) {
        self.map.insert(key.to_owned(), value);
    }

    /// The error for a required field that is missing.
    pub fn missing(&self, key: &str) -> ApiError {
        let name = self.name(key);
        ApiError::invalid(&name, format!("Missing required parameter: '{name}'."))
            .with_code("missing_required_parameter")
    }

    /// An error for the value of one of these fields: `temperature must be …, got "hot"`.
    pub fn wrong(&self, key: &str, expected: &str, got: &Value) -> ApiError {
        wrong(&self.name(key), expected, got)
    }

    /// Takes a number in the range, in full precision.
    pub fn float(
        &mut self,
        key: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(key, &between("a number", &range), &value)),
        }
    }

    /// Takes a number in the range.
    pub fn number(
        &mut self,
        key: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        // Compared as f64, so that no value is rounded into the range.
        let (least, most) = range.into_inner();
        let exact = |bound: f32| bound.to_string().parse().unwrap_or(f64::from(bound));
        Ok(self.float(key, exact(least)..=exact(most))?.map(|number| number as f32))
    }

    /// Takes a whole number in the range, written without a fraction.
    pub fn integer(
        &mut self,
        key: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(key, &between("an integer", &range), &value)),
        }
    }

    /// Takes a whole number from `least` to `most`, at most the largest `u32`.
    pub fn count(&mut self, key: &str, least: u32, most: u32) -> Result<Option<u32>, ApiError> {
        let number = self.integer(key, i64::from(least)..=i64::from(most))?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    pub fn boolean(&mut self, key: &str) -> Result<Option<bool>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, "true or false", &other)),
        }
    }

    /// Takes a string of at most `most` bytes.
    pub fn string(&mut self, key: &str, most: usize) -> Result<Option<String>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) if text.len() <= most => Ok(Some(text)),
            Some(Value::String(text)) => Err(ApiError::invalid(
                self.name(key),
                format!("{} must be at most {most} bytes long, got {}", self.name(key), text.len()),
            )),
            Some(other) => Err(self.wrong(key, "a string", &other)),
        }
    }

    /// Takes a nested object.
    pub fn object(&mut self, key: &str) -> Result<Option<Self>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => Self::of(self.name(key), value).map(Some),
        }
    }

    /// Takes a list of at most `most` elements.
    pub fn list(&mut self, key: &str, most: usize) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() <= most => Ok(Some(list)),
            Some(Value::Array(list)) => Err(ApiError::invalid(
                self.name(key),
                format!("{} may have at most {most} elements, got {}", self.name(key), list.len()),
            )),
            Some(other) => Err(self.wrong(key, "a list", &other)),
        }
    }

    /// Takes a list of strings, each of `1..=longest` bytes.
    pub fn strings(
        &mut self,
        key: &str,
        most: usize,
        longest: usize,
    ) -> Result<Option<Vec<String>>, ApiError> {
        let Some(list) = self.list(key, most)? else { return Ok(None) };
        let strings = list.into_iter().enumerate().map(|(index, value)| match value {
            Value::String(text) if (1..=longest).contains(&text.len()) => Ok(text),
            other => {
                let expected = format!("a string of 1 to {longest} bytes");
                Err(wrong(&format!("{}[{index}]", self.name(key)), &expected, &other))
            }
        });
        strings.collect::<Result<_, _>>().map(Some)
    }

    /// Takes a list of token ids.
    pub fn tokens(&mut self, key: &str, most: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(list) = self.list(key, most)? else { return Ok(None) };
        tokens(&self.name(key), &list).map(Some)
    }

    /// Takes a field of another API: values in `neutral` change nothing, any other value is
    /// refused.
    pub fn only_neutral(&mut self, key: &str, neutral: &[Value]) -> Result<(), ApiError> {
        match self.take(key) {
            Some(value)
                if !(is_empty(&value) || neutral.iter().any(|same| equal(same, &value))) =>
            {
                let name = self.name(key);
                Err(ApiError::invalid(
                    &name,
                    format!("Unsupported parameter: '{name}' is not supported by this server."),
                )
                .with_code("unsupported_parameter"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses fields that were not taken, unless they are empty: null, nothing but nulls, or an
    /// empty text or list. `false` is not empty.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !is_empty(value)) {
            None => Ok(()),
            Some((key, _)) => {
                let key: String = key.chars().take(100).collect();
                let name = self.name(&key);
                Err(ApiError::invalid(&name, format!("Unrecognized request argument: {name}"))
                    .with_code("unknown_parameter"))
            }
        }
    }

    /// The object with the remaining fields.
    pub fn into_map(self) -> Map<String, Value> {
        self.map
    }
}

/// Parses token ids; `name` is used in errors.
pub fn tokens(name: &str, list: &[Value]) -> Result<Vec<u32>, ApiError> {
    let ids = list.iter().enumerate().map(|(index, value)| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .filter(|id| *id <= i32::MAX as u32)
            .ok_or_else(|| wrong(&format!("{name}[{index}]"), "a token id", value))
    });
    ids.collect()
}

/// `temperature must be a number between 0 and 2, got "hot"`.
pub fn wrong(name: &str, expected: &str, got: &Value) -> ApiError {
    ApiError::invalid(name, format!("{name} must be {expected}, got {}", show(got)))
}

fn between<T: std::fmt::Display>(what: &str, range: &RangeInclusive<T>) -> String {
    format!("{what} between {} and {}", range.start(), range.end())
}

/// Shortens a value for a quotation in an error.
fn show(value: &Value) -> String {
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

/// Strips the byte order mark that some editors and clients put in front of a body.
pub fn without_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body)
}

/// Whether a value is `null`, `""`, `[]`, `{}`, or an object that contains only such values.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_empty),
        _ => false,
    }
}

/// Equality in which `1` equals `1.0`.
fn equal(left: &Value, right: &Value) -> bool {
    match (left.as_f64(), right.as_f64()) {
        (Some(left), Some(right)) => left == right,
        _ => left == right,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::of(String::new(), value).unwrap()
    }

    #[test]
    fn errors_name_the_field_and_quote_the_value() {
        let error = fields(json!({"temperature": "hot"})).number("temperature", 0.0..=2.0);
        let error = error.unwrap_err();
        assert_eq!(error.message, "temperature must be a number between 0 and 2, got \"hot\"");
        assert_eq!(error.param.as_deref(), Some("temperature"));
        let mut outer = fields(json!({"a": {"b": [1, "x"]}}));
        let mut inner = outer.object("a").unwrap().unwrap();
        let error = inner.tokens("b", 9).unwrap_err();
        assert_eq!(error.message, "a.b[1] must be a token id, got \"x\"");
    }

    #[test]
    fn a_byte_order_mark_is_no_error() {
        let marked = [b"\xef\xbb\xbf", &b"{\"a\": 1}"[..]].concat();
        let mut fields = Fields::parse(&marked).unwrap();
        assert_eq!(fields.take("a"), Some(json!(1)));
        // Only one mark is accepted, only in front, and only before JSON.
        for body in [&b"\xef\xbb\xbf\xef\xbb\xbf{}"[..], b"{}\xef\xbb\xbf", b"\xef\xbb\xbf"] {
            assert_eq!(Fields::parse(body).unwrap_err().status, 400);
        }
    }

    #[test]
    fn numbers_keep_their_digits() {
        for number in [0.02, 0.1, 1e-4, 123_456.789] {
            let found = fields(json!({"x": number})).float("x", 0.0..=1e6).unwrap();
            assert_eq!(found, Some(number));
        }
        // A bound is the decimal number in the code, not the nearest f32.
        assert!(fields(json!({"x": 0.01})).number("x", 0.01..=10.0).is_ok());
        assert!(fields(json!({"x": 0.009_999_999_9})).number("x", 0.01..=10.0).is_err());
        assert!(fields(json!({"x": 2.1})).float("x", 0.0..=2.0).is_err());
    }

    #[test]
    fn numbers_are_checked_before_they_are_rounded() {
        for (value, fine) in [
            (json!(2), true),
            (json!(2.0), true),
            (json!(2.000_000_000_1), false),
            (json!(-1e-300), false),
            (json!(1e308), false),
            (json!(true), false),
            (json!([1]), false),
        ] {
            let got = fields(json!({"x": value.clone()})).number("x", 0.0..=2.0);
            assert_eq!(got.is_ok(), fine, "{value}");
        }
        for (value, fine) in [
            (json!(3), true),
            (json!(3.0), false),
            (json!(-1), false),
            (json!(u64::MAX), false),
            (json!("3"), false),
        ] {
            let got = fields(json!({"x": value.clone()})).integer("x", 0..=10);
            assert_eq!(got.is_ok(), fine, "{value}");
        }
    }

    #[test]
    fn bodies_that_are_no_objects_are_refused() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(500), "]".repeat(500));
        let cases: [&[u8]; 8] = [
            b"",
            b"[]",
            b"{",
            b"\"x\"",
            b"{\"a\":NaN}",
            b"{\"a\":1e400}",
            b"{\"a\":\"\xff\"}",
            deep.as_bytes(),
        ];
        for body in cases {
            let error = Fields::parse(body).unwrap_err();
            assert_eq!(error.status, 400, "{}", String::from_utf8_lossy(body));
        }
        assert!(Fields::parse(b"{\"a\":1,\"a\":2}").is_ok());
    }

    #[test]
    fn what_nobody_took_is_refused_unless_it_says_nothing() {
        let nulls = json!({"a": null, "b": {"c": null, "d": []}});
        for neutral in [json!(null), json!(""), json!([]), json!({}), json!({"a": null}), nulls] {
            fields(json!({"foo": neutral})).finish().unwrap();
        }
        for value in [
            json!(0),
            json!(true),
            json!(false),
            json!("x"),
            json!([0]),
            json!([null]),
            json!({"a": {"b": false}}),
        ] {
            let error = fields(json!({"foo": value})).finish().unwrap_err();
            assert_eq!(error.message, "Unrecognized request argument: foo");
            assert_eq!(error.code.as_deref(), Some("unknown_parameter"));
        }
    }

    #[test]
    fn neutral_values_of_unsupported_parameters_pass() {
        let neutral = [json!(1)];
        for value in [json!(1), json!(1.0), json!(null), json!([])] {
            fields(json!({"best_of": value})).only_neutral("best_of", &neutral).unwrap();
        }
        let error = fields(json!({"best_of": 2})).only_neutral("best_of", &neutral).unwrap_err();
        assert_eq!(error.code.as_deref(), Some("unsupported_parameter"));
        assert_eq!(error.param.as_deref(), Some("best_of"));
    }

    #[test]
    fn json_content_types() {
        for yes in ["application/json", "Application/JSON; charset=utf-8", "application/x+json"] {
            assert!(is_json(yes.as_bytes()), "{yes}");
        }
        for no in ["", "text/plain", "application/jsonx", "text/json+", "+json", "application/"] {
            assert!(!is_json(no.as_bytes()), "{no}");
        }
    }
}
