//! `GET /openapi.json`: `docs/openapi.json` without the routes that this server does not have.
//! Tests compare the document with the routes, and with requests and responses
//! (`tests/e2e/test_document.py`).

use crate::gateway::app::App;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;

const DOCUMENT: &str = include_str!("../../../docs/openapi.json");

/// `GET /openapi.json`. Admin routes are listed only if they exist.
pub async fn document(State(app): State<Arc<App>>) -> Json<Value> {
    let keys = &app.config.keys;
    Json(describe(!keys.api_keys.is_empty(), keys.admin_key.is_some()))
}

/// The document for a server with or without API keys, and with or without admin routes.
pub(crate) fn describe(keys: bool, admin: bool) -> Value {
    let mut document: Value =
        serde_json::from_str(DOCUMENT).expect("docs/openapi.json is JSON, as the tests see");
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    let Some(paths) = document["paths"].as_object_mut() else { return document };
    paths.retain(|path, _| admin || !path.starts_with("/admin/"));
    if !keys {
        let items = paths.values_mut().filter_map(Value::as_object_mut);
        for operation in items.flat_map(|item| item.values_mut()).filter_map(Value::as_object_mut) {
            let is_guarded = operation.get("security").is_some_and(|list| *list != json!([]));
            // Admin routes need the admin key instead.
            if is_guarded && !operation["security"].to_string().contains("adminKey") {
                operation.insert("security".into(), json!([]));
                if let Some(responses) = operation["responses"].as_object_mut() {
                    responses.shift_remove("401");
                }
            }
        }
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `visit` with every `$ref` in the document.
    fn references(value: &Value, visit: &mut impl FnMut(&str)) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(target)) = map.get("$ref") {
                    visit(target);
                }
                map.values().for_each(|value| references(value, visit));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, visit)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_is_defined_and_every_schema_used() {
        let document = describe(true, true);
        let mut used = std::collections::BTreeSet::new();
        references(&document, &mut |target| {
            let pointer = target.strip_prefix('#').expect("references are local");
            assert!(document.pointer(pointer).is_some(), "{target} is not defined");
            used.insert(target.rsplit('/').next().unwrap_or_default().to_owned());
        });
        for name in document["components"]["schemas"].as_object().unwrap().keys() {
            assert!(used.contains(name), "{name} is not used");
        }
    }

    #[test]
    fn operations_are_whole_and_distinct() {
        let document = describe(true, true);
        let mut ids = std::collections::BTreeSet::new();
        for (path, operations) in document["paths"].as_object().unwrap() {
            for (method, operation) in operations.as_object().unwrap() {
                if method == "parameters" {
                    continue;
                }
                let id = operation["operationId"].as_str().unwrap();
                assert!(ids.insert(id.to_owned()), "{id} twice");
                assert!(operation["summary"].is_string(), "{method} {path}");
                let responses = operation["responses"].as_object().unwrap();
                assert!(responses.keys().any(|status| status.starts_with('2')), "{path}");
            }
        }
    }

    #[test]
    fn admin_routes_are_hidden_without_an_admin_key() {
        let document = describe(false, false);
        assert!(document["paths"].as_object().unwrap().keys().all(|p| !p.starts_with("/admin")));
        let chat = &document["paths"]["/v1/chat/completions"]["post"];
        assert_eq!(chat["security"], json!([]));
        assert!(chat["responses"].get("401").is_none());
        let guarded = describe(true, true);
        let chat = &guarded["paths"]["/v1/chat/completions"]["post"];
        assert!(chat["security"] != json!([]) && chat["responses"].get("401").is_some());
        assert_ne!(guarded["paths"]["/admin/jobs"]["get"]["security"], json!([]));
    }
}
