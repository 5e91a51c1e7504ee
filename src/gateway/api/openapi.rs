//! `GET /openapi.json`: every route in OpenAPI 3.1, written beside nothing but the wire types that
//! it describes. A test holds the list of paths against the router's.

mod schemas;
mod training;

use crate::gateway::app::App;
use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// `GET /openapi.json`. Admin routes are listed only where they exist.
pub async fn document(State(app): State<Arc<App>>) -> Json<Value> {
    let keys = &app.config.keys;
    Json(describe(!keys.api_keys.is_empty(), keys.admin_key.is_some()))
}

/// The document, for a server with API keys or without, and with admin routes or without.
pub(crate) fn describe(keys: bool, admin: bool) -> Value {
    let mut paths = Map::new();
    let mut add = |path: &str, operations: Value| {
        paths.insert(path.to_owned(), operations);
    };
    generation_paths(keys, &mut add);
    text_paths(keys, &mut add);
    model_paths(keys, &mut add);
    training::file_paths(keys, &mut add);
    training::fine_tuning_paths(keys, &mut add);
    operation_paths(&mut add);
    let mut schemas = schemas::all();
    merge(&mut schemas, training::schemas());
    if admin {
        admin_paths(&mut add);
        training::job_paths(&mut add);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Ingot",
            "description": "An OpenAI-compatible server for GGUF models, which also trains them.",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "inference"}, {"name": "models"}, {"name": "files"}, {"name": "fine-tuning"},
            {"name": "operations"}, {"name": "admin"},
        ],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "Error": {
                    "description": "OpenAI's error body.",
                    "headers": {
                        "x-request-id": {"schema": {"type": "string"}},
                        "retry-after": {
                            "description": "Seconds, with 429 and 503.",
                            "schema": {"type": "integer"},
                        },
                    },
                    "content": content(&reference("Error")),
                },
            },
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer"},
                "adminKey": {"type": "http", "scheme": "bearer"},
            },
        },
    })
}

fn merge(into: &mut Value, other: Value) {
    if let (Value::Object(into), Value::Object(other)) = (into, other) {
        into.extend(other);
    }
}

fn generation_paths(keys: bool, add: &mut impl FnMut(&str, Value)) {
    let both = |plain: &str, chunk: &str| {
        json!({
            "application/json": {"schema": reference(plain)},
            "text/event-stream": {"schema": reference(chunk)},
        })
    };
    add(
        "/v1/chat/completions",
        json!({"post": operation("createChatCompletion", "inference", keys)
            .summary("Answers a conversation, whole or as a stream of server-sent events.")
            .body("ChatCompletionRequest")
            .answers("200", both("ChatCompletion", "ChatCompletionChunk"))
            .fails(&["400", "404", "429", "503", "504"])
            .0}),
    );
    add(
        "/v1/completions",
        json!({"post": operation("createCompletion", "inference", keys)
            .summary("Goes on with a text, whole or as a stream of server-sent events.")
            .body("CompletionRequest")
            .answers("200", both("Completion", "Completion"))
            .fails(&["400", "404", "429", "503", "504"])
            .0}),
    );
    add(
        "/v1/embeddings",
        json!({"post": operation("createEmbedding", "inference", keys)
            .summary("One vector for each input.")
            .body("EmbeddingRequest")
            .answers("200", content(&reference("EmbeddingList")))
            .fails(&["400", "404", "429", "503", "504"])
            .0}),
    );
    add(
        "/v1/score",
        json!({"post": operation("createScore", "inference", keys)
            .summary("One number for each text or conversation, by a reward model.")
            .body("ScoreRequest")
            .answers("200", content(&reference("ScoreList")))
            .fails(&["400", "404", "429", "503", "504"])
            .0}),
    );
}

fn text_paths(keys: bool, add: &mut impl FnMut(&str, Value)) {
    for (path, id, summary, request, answer) in [
        ("/tokenize", "tokenize", "Text to tokens.", "TokenizeRequest", "Tokens"),
        ("/detokenize", "detokenize", "Tokens to text.", "DetokenizeRequest", "Content"),
        (
            "/apply-template",
            "applyTemplate",
            "The prompt that a conversation becomes.",
            "ApplyTemplateRequest",
            "Prompt",
        ),
    ] {
        add(
            path,
            json!({"post": operation(id, "inference", keys)
                .summary(summary)
                .body(request)
                .answers("200", content(&reference(answer)))
                .fails(&["400", "404", "429", "503"])
                .0}),
        );
    }
}

fn model_paths(keys: bool, add: &mut impl FnMut(&str, Value)) {
    add(
        "/v1/models",
        json!({"get": operation("listModels", "models", keys)
            .summary("Models and adapters that requests may name.")
            .answers("200", content(&reference("ModelList")))
            .fails(&[])
            .0}),
    );
    add(
        "/v1/models/{model}",
        json!({
            "parameters": [path_parameter("model")],
            "get": operation("retrieveModel", "models", keys)
                .summary("One of them.")
                .answers("200", content(&reference("Model")))
                .fails(&["404"])
                .0,
            "delete": operation("deleteModel", "models", keys)
                .summary("Deletes a model that a job of this key made.")
                .answers("200", content(&json!({"type": "object"})))
                .fails(&["404"])
                .0
        }),
    );
}

fn operation_paths(add: &mut impl FnMut(&str, Value)) {
    let any = json!({"type": "object"});
    for (path, id, summary, answer) in [
        ("/health", "health", "The gateway lives.", content(&any)),
        ("/ready", "ready", "Every model takes requests.", content(&reference("Readiness"))),
        ("/version", "version", "Name and version.", content(&any)),
        (
            "/metrics",
            "metrics",
            "Prometheus' text format.",
            json!({"text/plain": {"schema": {"type": "string"}}}),
        ),
        ("/openapi.json", "openapi", "This document.", content(&any)),
    ] {
        let mut described =
            operation(id, "operations", false).summary(summary).answers("200", answer);
        if path == "/ready" {
            described = described.answers("503", content(&reference("Readiness")));
        }
        add(path, json!({"get": described.0}));
    }
}

fn admin_paths(add: &mut impl FnMut(&str, Value)) {
    let object = || content(&json!({"type": "object"}));
    let admin = |id: &str, summary: &str| operation(id, "admin", false).admin().summary(summary);
    add(
        "/admin/models",
        json!({
            "get": admin("adminListModels", "Loaded, loading and stored models.")
                .answers("200", object()).fails(&[]).0,
            "post": admin("adminLoadModel", "Loads a model of the data folder.")
                .body("LoadModelRequest").answers("201", object())
                .fails(&["400", "404", "409", "422"]).0,
        }),
    );
    add(
        "/admin/models/{name}",
        json!({
            "parameters": [path_parameter("name")],
            "delete": admin("adminUnloadModel", "Unloads it when its requests have ended.")
                .answers("200", object()).fails(&["404", "409"]).0,
        }),
    );
    let mut load = admin("adminLoadAdapter", "Loads an adapter, or replaces one atomically.")
        .body("LoadAdapterRequest")
        .answers("201", object())
        .fails(&["400", "404", "409", "413", "422"]);
    load.0["requestBody"]["content"]["multipart/form-data"] =
        json!({"schema": reference("UploadAdapterRequest")});
    add(
        "/admin/adapters",
        json!({
            "get": admin("adminListAdapters", "Loaded and stored adapters.")
                .answers("200", object()).fails(&[]).0,
            "post": load.0,
        }),
    );
    add(
        "/admin/adapters/{name}",
        json!({
            "parameters": [path_parameter("name")],
            "delete": admin("adminUnloadAdapter", "Unloads it when its requests have ended.")
                .answers("200", object()).fails(&["404"]).0,
        }),
    );
}

/// One operation in the making.
struct Operation(Value);

fn operation(id: &str, tag: &str, keys: bool) -> Operation {
    let security = if keys { json!([{"apiKey": []}]) } else { json!([]) };
    Operation(json!({
        "operationId": id, "tags": [tag], "security": security, "responses": {},
    }))
}

impl Operation {
    fn admin(mut self) -> Self {
        self.0["security"] = json!([{"adminKey": []}]);
        self
    }

    fn summary(mut self, text: &str) -> Self {
        self.0["summary"] = text.into();
        self
    }

    fn body(mut self, schema: &str) -> Self {
        self.0["requestBody"] = json!({"required": true, "content": content(&reference(schema))});
        self
    }

    fn answers(mut self, status: &str, content: Value) -> Self {
        let description = if status.starts_with('2') { "Success." } else { "Not now." };
        self.0["responses"][status] = json!({"description": description, "content": content});
        self
    }

    /// Statuses of its own, and those that every guarded route may give.
    fn fails(mut self, statuses: &[&str]) -> Self {
        let guarded = self.0["security"].as_array().is_some_and(|list| !list.is_empty());
        let mut all = statuses.to_vec();
        all.extend(guarded.then_some("401"));
        if self.0.get("requestBody").is_some() {
            all.extend(["408", "413", "415"]);
        }
        all.extend(["403", "500", "503"]);
        for status in all {
            self.0["responses"][status] = json!({"$ref": "#/components/responses/Error"});
        }
        self
    }
}

fn content(schema: &Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn path_parameter(name: &str) -> Value {
    json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}})
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
    }
}
