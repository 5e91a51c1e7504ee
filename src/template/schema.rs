//! JSON schemas closed for constrained generation.
//!
//! A schema without `additionalProperties` allows any further key. A model that is constrained to
//! such a schema invents keys until its token limit. So an object whose properties are listed may
//! have only these, unless the schema says otherwise. llama.cpp and OpenAI's strict mode do the
//! same.

use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Keywords that specify which further keys an object may have.
const OPENING: [&str; 3] = ["additionalProperties", "patternProperties", "unevaluatedProperties"];
/// Maximum length of a chain of references.
const MAX_REFERENCES: usize = 16;

type Names = BTreeSet<String>;

/// Closes every object schema that lists `properties` and does not specify other keys. Branches of
/// `anyOf` and `oneOf` allow the keys of the schema around them; branches of `allOf` allow each
/// other's keys.
pub fn close_objects(schema: &mut Value) {
    let root = schema.clone();
    close(schema, &root, &Names::new());
}

/// `around`: keys listed by the enclosing schemas that describe the same object.
fn close(schema: &mut Value, root: &Value, around: &Names) {
    let Value::Object(map) = schema else { return };
    close_parts(map, root);
    if OPENING.iter().any(|key| map.contains_key(*key)) {
        branches(map, &["allOf", "anyOf", "oneOf"]).for_each(|branch| close_inner(branch, root));
        return;
    }
    let mut names = around.clone();
    names.extend(listed(map));
    let refers = map.contains_key("$ref") && !names.is_empty();
    if refers || map.contains_key("allOf") {
        return close_all_of(map, root, names);
    }
    if map.contains_key("anyOf") || map.contains_key("oneOf") {
        branches(map, &["anyOf", "oneOf"]).for_each(|branch| close(branch, root, &names));
        return;
    }
    if map.contains_key("properties") || (!around.is_empty() && may_be_object(map)) {
        close_with(map, &names);
    }
}

/// Closes schemas that all describe one object: it may have the keys that any of them lists.
fn close_all_of(map: &mut Map<String, Value>, root: &Value, mut names: Names) {
    let mut all = match map.remove("allOf") {
        Some(Value::Array(all)) => all,
        _ => Vec::new(),
    };
    if let Some(reference) = map.remove("$ref") {
        all.push(json!({ "$ref": reference }));
    }
    // Definitions are closed at their own place; here they are parts of a larger object.
    for schema in &mut all {
        *schema = resolved(schema, root).clone();
    }
    let known = all.iter().all(|schema| gather(schema, root, &mut names, 0));
    all.iter_mut().for_each(|schema| close_inner(schema, root));
    map.insert("allOf".into(), Value::Array(all));
    let alternatives = map.contains_key("anyOf") || map.contains_key("oneOf");
    branches(map, &["anyOf", "oneOf"]).for_each(|branch| match known {
        true => close(branch, root, &names),
        false => close_inner(branch, root),
    });
    if known && !alternatives && !names.is_empty() {
        close_with(map, &names);
    }
}

/// Collects the keys that a schema lists; false if it allows others, or restricts more than keys.
fn gather(schema: &Value, root: &Value, names: &mut Names, depth: usize) -> bool {
    let Value::Object(map) = resolved(schema, root) else { return true };
    if depth > MAX_REFERENCES
        || OPENING.iter().any(|key| map.contains_key(*key))
        || ["anyOf", "oneOf", "not", "if"].iter().any(|key| map.contains_key(*key))
    {
        return false;
    }
    names.extend(listed(map));
    let all = map.get("allOf").and_then(Value::as_array);
    all.into_iter().flatten().all(|schema| gather(schema, root, names, depth + 1))
}

/// Closes the schemas inside a schema, but not the schema itself.
fn close_inner(schema: &mut Value, root: &Value) {
    if let Value::Object(map) = schema {
        close_parts(map, root);
        branches(map, &["allOf", "anyOf", "oneOf"]).for_each(|branch| close_inner(branch, root));
    }
}

/// Closes the schemas of values other than the one that `map` describes.
fn close_parts(map: &mut Map<String, Value>, root: &Value) {
    let alone = Names::new();
    for (key, value) in map {
        match (key.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(map)) => {
                map.values_mut().for_each(|schema| close(schema, root, &alone));
            }
            ("items" | "prefixItems" | "additionalItems", Value::Array(list)) => {
                list.iter_mut().for_each(|schema| close(schema, root, &alone));
            }
            ("items" | "additionalItems" | "additionalProperties" | "contains", schema) => {
                close(schema, root, &alone);
            }
            _ => {}
        }
    }
}

fn close_with(map: &mut Map<String, Value>, names: &Names) {
    let own = map.entry("properties").or_insert(json!({}));
    if let Value::Object(own) = own {
        for name in names {
            own.entry(name.clone()).or_insert(Value::Bool(true));
        }
        map.insert("additionalProperties".into(), Value::Bool(false));
    }
}

fn listed(map: &Map<String, Value>) -> impl Iterator<Item = String> + '_ {
    map.get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, _)| key.clone())
}

fn may_be_object(map: &Map<String, Value>) -> bool {
    let constant = map.contains_key("const") || map.contains_key("enum");
    !constant
        && match map.get("type") {
            None => true,
            Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "object"),
            Some(kind) => kind == "object",
        }
}

fn branches<'m>(
    map: &'m mut Map<String, Value>,
    keys: &'m [&str],
) -> impl Iterator<Item = &'m mut Value> {
    let lists = map.iter_mut().filter(|(key, _)| keys.contains(&key.as_str()));
    lists.filter_map(|(_, list)| list.as_array_mut()).flatten()
}

/// Follows references within `root` to the schema that they name.
fn resolved<'s>(mut schema: &'s Value, root: &'s Value) -> &'s Value {
    for _ in 0..MAX_REFERENCES {
        let target = schema.get("$ref").and_then(Value::as_str);
        let target = target.and_then(|path| root.pointer(path.strip_prefix('#')?));
        match target {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(mut schema: Value) -> Value {
        close_objects(&mut schema);
        schema
    }

    /// Asserts for each value whether the closed schema admits it.
    fn admits(schema: Value, values: &[(Value, bool)]) {
        let closed = closed(schema);
        let validator = jsonschema::validator_for(&closed).unwrap();
        for (value, fine) in values {
            assert_eq!(validator.is_valid(value), *fine, "{closed}\n{value}");
        }
    }

    #[test]
    fn listed_properties_are_all_there_are() {
        let a = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        admits(a.clone(), &[(json!({"a": 1}), true), (json!({}), true), (json!({"b": 1}), false)]);
        admits(
            json!({"type": "array", "items": a}),
            &[(json!([{"a": 1}]), true), (json!([{"a": 1, "b": 2}]), false)],
        );
        admits(
            json!({"properties": {"x": {"$ref": "#/$defs/d"}}, "$defs": {"d": a}}),
            &[(json!({"x": {"a": 1}}), true), (json!({"x": {"b": 1}}), false)],
        );
        admits(
            json!({"type": "object", "properties": {}}),
            &[(json!({}), true), (json!({"a": 1}), false)],
        );
    }

    #[test]
    fn what_a_schema_opens_stays_open() {
        for opening in [
            json!({"additionalProperties": true}),
            json!({"additionalProperties": {"type": "integer"}}),
            json!({"patternProperties": {"^b$": {"type": "integer"}}}),
        ] {
            let mut schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
            schema.as_object_mut().unwrap().extend(opening.as_object().unwrap().clone());
            assert_eq!(closed(schema.clone()), schema);
        }
        // A schema that says nothing about keys admits any object.
        for schema in [json!({"type": "object"}), json!({}), json!({"type": "string"}), json!(true)]
        {
            assert_eq!(closed(schema.clone()), schema);
        }
    }

    #[test]
    fn schemas_of_one_object_allow_each_others_keys() {
        let of = |key: &str| json!({"type": "object", "properties": {key: {"type": "integer"}}});
        admits(
            json!({"allOf": [of("a"), of("b")]}),
            &[(json!({"a": 1, "b": 1}), true), (json!({"a": 1, "c": 1}), false)],
        );
        admits(
            json!({"allOf": [{"$ref": "#/$defs/base"}, of("b")], "$defs": {"base": of("a")}}),
            &[(json!({"a": 1, "b": 1}), true), (json!({"c": 1}), false)],
        );
        admits(
            json!({"properties": {"k": {"type": "string"}}, "anyOf": [of("a"), of("b")]}),
            &[
                (json!({"k": "x", "a": 1}), true),
                (json!({"k": "x", "b": 1}), true),
                (json!({"k": "x", "c": 1}), false),
            ],
        );
        admits(
            json!({"properties": {"a": {}, "b": {}},
                "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}),
            &[
                (json!({"a": 1}), true),
                (json!({"a": 1, "b": 1}), true),
                (json!({}), false),
                (json!({"a": 1, "c": 1}), false),
            ],
        );
        admits(
            json!({"anyOf": [of("a"), {"type": "null"}]}),
            &[(json!({"a": 1}), true), (json!(null), true), (json!({"b": 1}), false)],
        );
        admits(
            json!({"$ref": "#/$defs/a", "properties": {"b": {}}, "$defs": {"a": of("a")}}),
            &[(json!({"a": 1, "b": 1}), true), (json!({"c": 1}), false)],
        );
    }

    #[test]
    fn references_in_circles_end() {
        let tree = json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}});
        admits(
            tree,
            &[(json!({"next": {"next": null}}), true), (json!({"next": {"other": 1}}), false)],
        );
        closed(json!({"$ref": "#", "properties": {"a": {}}}));
        closed(json!({"allOf": [{"$ref": "#/allOf/0"}]}));
    }
}
