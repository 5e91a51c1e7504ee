//! JSON schemas, compiled once. Nothing is fetched: a reference leads inside the schema, or to one of
//! the standard's own meta-schemas.

use jsonschema::{PatternOptions, Retrieve, Uri, Validator};
use serde_json::Value;
use std::sync::Arc;

/// The largest schema, in bytes of compact JSON.
const LONGEST: usize = 64 << 10;
/// What one compiled `pattern` of a schema may take, in bytes.
const PATTERN_SIZE: usize = 256 << 10;

#[derive(Clone, Debug)]
pub(super) struct Schema {
    source: Value,
    validator: Arc<Validator>,
}

impl PartialEq for Schema {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

/// Fetches nothing.
struct Nothing;

impl Retrieve for Nothing {
    fn retrieve(
        &self,
        uri: &Uri<String>,
    ) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
        Err(format!("{uri} is outside the schema, and nothing is fetched").into())
    }
}

impl Schema {
    /// Compiles a schema; the error follows the key's name.
    pub fn compile(source: Value) -> Result<Self, String> {
        if !matches!(source, Value::Object(_) | Value::Bool(_)) {
            return Err("must be a JSON schema: an object, or true or false".to_owned());
        }
        let length = source.to_string().len();
        if length > LONGEST {
            return Err(format!("must be at most {LONGEST} bytes of JSON, got {length}"));
        }
        // Patterns of the crate `regex`: backtracking ones could take for ever.
        let patterns =
            PatternOptions::regex().size_limit(PATTERN_SIZE).dfa_size_limit(PATTERN_SIZE);
        let validator = jsonschema::options()
            .with_retriever(Nothing)
            .with_pattern_options(patterns)
            .build(&source)
            .map_err(|error| format!("must be a JSON schema: {}", short(&error.to_string())))?;
        Ok(Self { source, validator: Arc::new(validator) })
    }

    pub fn source(&self) -> &Value {
        &self.source
    }

    pub fn accepts(&self, value: &Value) -> bool {
        self.validator.is_valid(value)
    }
}

/// The start of a message that may quote the whole schema.
fn short(message: &str) -> String {
    const MOST: usize = 300;
    let start = &message[..message.floor_char_boundary(MOST)];
    if start.len() < message.len() { format!("{start}…") } else { start.to_owned() }
}
