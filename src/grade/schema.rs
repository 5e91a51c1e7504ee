//! JSON schemas, compiled once. Nothing is fetched: references must lead to places inside the
//! schema, or to one of the standard's own meta-schemas.

use jsonschema::{PatternOptions, Retrieve, Uri, Validator};
use serde_json::{Value, json};
use std::sync::Arc;

/// Maximum size of a schema, in bytes of compact JSON.
const LONGEST: usize = 64 << 10;
/// Maximum number of values in a schema with its references followed.
const MOST_NODES: usize = 20_000;
/// Maximum size of one compiled `pattern` of a schema, in bytes.
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

/// Retriever that fetches nothing.
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
    /// Compiles a schema; the error message follows the key's name.
    pub(super) fn compile(source: Value) -> Result<Self, String> {
        if !matches!(source, Value::Object(_) | Value::Bool(_)) {
            return Err("must be a JSON schema: an object, or true or false".to_owned());
        }
        let length = source.to_string().len();
        if length > LONGEST {
            return Err(format!("must be at most {LONGEST} bytes of JSON, got {length}"));
        }
        // Patterns of the crate `regex`: with backtracking, a match could take exponential time.
        let patterns =
            PatternOptions::regex().size_limit(PATTERN_SIZE).dfa_size_limit(PATTERN_SIZE);
        // Validation follows references every time it meets them, so that a schema of a few lines
        // can take exponential time. So references are replaced once, here.
        let mut room = MOST_NODES;
        let plain = inlined(&source, &source, &mut Vec::new(), &mut room)?;
        let validator = jsonschema::options()
            .with_retriever(Nothing)
            .with_pattern_options(patterns)
            .build(&plain)
            .map_err(|error| format!("must be a JSON schema: {}", short(&error.to_string())))?;
        Ok(Self { source, validator: Arc::new(validator) })
    }

    pub(super) fn source(&self) -> &Value {
        &self.source
    }

    pub(super) fn accepts(&self, value: &Value) -> bool {
        self.validator.is_valid(value)
    }
}

/// A schema with its references replaced by the schemas that they name.
fn inlined(
    value: &Value,
    root: &Value,
    open: &mut Vec<String>,
    room: &mut usize,
) -> Result<Value, String> {
    *room = room.checked_sub(1).ok_or_else(|| {
        format!("is too large with its references followed: {MOST_NODES} values at most")
    })?;
    let object = match value {
        Value::Object(object) => object,
        Value::Array(list) => {
            let each = list.iter().map(|value| inlined(value, root, open, room));
            return each.collect::<Result<_, _>>().map(Value::Array);
        }
        plain => return Ok(plain.clone()),
    };
    let mut plain = serde_json::Map::new();
    for (key, value) in object {
        match (key.as_str(), value) {
            (
                "$dynamicRef" | "$recursiveRef" | "$id" | "$anchor" | "$dynamicAnchor",
                Value::String(_),
            ) => {
                return Err(format!("uses {key}, which is not followed: use $ref and #/$defs/…"));
            }
            // A definition is inserted where it is used; an unused one has no effect.
            ("$ref", Value::String(_)) | ("$defs" | "definitions", Value::Object(_)) => {}
            ("const" | "enum" | "default" | "examples", value) => {
                plain.insert(key.clone(), value.clone());
            }
            // By name, because a property may have the name of a keyword.
            ("properties" | "patternProperties" | "dependentSchemas", Value::Object(named)) => {
                let mut schemas = serde_json::Map::new();
                for (name, schema) in named {
                    schemas.insert(name.clone(), inlined(schema, root, open, room)?);
                }
                plain.insert(key.clone(), Value::Object(schemas));
            }
            (_, value) => {
                plain.insert(key.clone(), inlined(value, root, open, room)?);
            }
        }
    }
    let Some(Value::String(name)) = object.get("$ref") else { return Ok(Value::Object(plain)) };
    if open.contains(name) {
        return Err(format!("leads back to itself at {}: that is not followed", short(name)));
    }
    let named = name.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
    let named = named.ok_or_else(|| {
        format!("has a reference to {}, which is not in it; nothing is fetched", short(name))
    })?;
    open.push(name.clone());
    let named = inlined(named, root, open, room)?;
    open.pop();
    if plain.is_empty() {
        return Ok(named);
    }
    let besides = Value::Object(plain);
    Ok(json!({"allOf": [named, besides]}))
}

/// The beginning of a message that may quote the whole schema.
pub(super) fn short(message: &str) -> String {
    const MOST: usize = 300;
    let start = &message[..message.floor_char_boundary(MOST)];
    if start.len() < message.len() { format!("{start}…") } else { start.to_owned() }
}
