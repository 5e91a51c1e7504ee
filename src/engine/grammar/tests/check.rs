//! A small JSON schema checker that supports what the tests use.

use super::Value;

/// Whether `value` satisfies `schema`; `$ref` is resolved from `root`.
pub(super) fn fits(root: &Value, schema: &Value, value: &Value) -> bool {
    if let Some(path) = schema["$ref"].as_str() {
        let target = root.pointer(path.trim_start_matches('#')).expect("a known $ref");
        return fits(root, target, value);
    }
    let any_of = |key: &str| {
        schema[key].as_array().is_none_or(|all| all.iter().any(|s| fits(root, s, value)))
    };
    let typed = match &schema["type"] {
        Value::String(name) => is_a(name, value),
        Value::Array(names) => names.iter().any(|n| is_a(n.as_str().expect("a name"), value)),
        _ => true,
    };
    typed
        && any_of("anyOf")
        && any_of("oneOf")
        && schema["enum"].as_array().is_none_or(|all| all.contains(value))
        && schema.get("const").is_none_or(|only| only == value)
        && number(schema, value)
        && string(schema, value)
        && array(root, schema, value)
        && object(root, schema, value)
}

fn is_a(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64() || is_whole(value),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("unknown type {other}"),
    }
}

/// Integers of more than 64 bits, and -0, are parsed as floats.
fn is_whole(value: &Value) -> bool {
    value.as_f64().is_some_and(|x| x.fract() == 0.0)
}

fn number(schema: &Value, value: &Value) -> bool {
    let Some(x) = value.as_f64() else { return true };
    schema["minimum"].as_f64().is_none_or(|low| x >= low)
        && schema["maximum"].as_f64().is_none_or(|high| x <= high)
}

fn string(schema: &Value, value: &Value) -> bool {
    let Some(text) = value.as_str() else { return true };
    let length = text.chars().count() as u64;
    schema["maxLength"].as_u64().is_none_or(|most| length <= most)
        && schema["minLength"].as_u64().is_none_or(|least| length >= least)
}

fn array(root: &Value, schema: &Value, value: &Value) -> bool {
    let Some(items) = value.as_array() else { return true };
    schema["maxItems"].as_u64().is_none_or(|most| items.len() as u64 <= most)
        && schema["minItems"].as_u64().is_none_or(|least| items.len() as u64 >= least)
        && (schema["items"].is_null() || items.iter().all(|i| fits(root, &schema["items"], i)))
}

fn object(root: &Value, schema: &Value, value: &Value) -> bool {
    let Some(fields) = value.as_object() else { return true };
    let required = schema["required"].as_array();
    let properties = schema["properties"].as_object();
    required.is_none_or(|all| all.iter().all(|k| fields.contains_key(k.as_str().expect("a key"))))
        && fields.iter().all(|(key, field)| {
            match (properties.and_then(|p| p.get(key)), &schema["additionalProperties"]) {
                (Some(property), _) => fits(root, property, field),
                (None, Value::Null | Value::Bool(true)) => true,
                (None, Value::Bool(false)) => false,
                (None, other) => fits(root, other, field),
            }
        })
}
