//! The schemas of requests and answers.

use super::reference;
use serde_json::{Map, Value, json};

/// All of them, by name.
pub(super) fn all() -> Value {
    let mut all = Map::new();
    let groups = [requests(), conversation(), answers(), listings(), text(), admin()];
    for group in groups {
        if let Value::Object(group) = group {
            all.extend(group);
        }
    }
    Value::Object(all)
}

/// Parameters of both kinds of generation.
fn shared() -> Value {
    let number = |from: f64, to: f64| json!({"type": "number", "minimum": from, "maximum": to});
    let count = || json!({"type": "integer", "minimum": 0});
    let flag = || json!({"type": "boolean"});
    json!({
        "model": {"type": "string", "description": "A model or an adapter."},
        "n": {"type": "integer", "minimum": 1, "default": 1},
        "max_tokens": count(),
        "max_completion_tokens": count(),
        "temperature": number(0.0, 2.0),
        "top_p": number(0.0, 1.0),
        "top_k": {"type": "integer", "minimum": -1},
        "min_p": number(0.0, 1.0),
        "typical_p": number(0.0, 1.0),
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "repetition_penalty": number(0.01, 10.0),
        "penalty_window": count(),
        "dry_multiplier": number(0.0, 100.0),
        "dry_base": number(1.0, 100.0),
        "dry_allowed_length": count(),
        "dry_penalty_last_n": count(),
        "dry_sequence_breakers": strings(),
        "xtc_probability": number(0.0, 1.0),
        "xtc_threshold": number(0.0, 1.0),
        "logit_bias": {
            "type": "object",
            "description": "Bias by token id.",
            "additionalProperties": number(-100.0, 100.0),
        },
        "seed": {"type": "integer"},
        "stop": {"anyOf": [{"type": "string"}, strings()]},
        "stop_token_ids": tokens(),
        "ignore_eos": flag(),
        "stream": flag(),
        "stream_options": object(json!({"include_usage": flag()}), &[]),
        "response_format": reference("ResponseFormat"),
        "priority": {"type": "integer", "description": "Higher runs earlier."},
        "speculative.n_max": {
            "type": "integer",
            "minimum": 0,
            "description": "Tokens drafted for one step, at most; 0 is none. The output is the same.",
        },
        "user": {"type": "string"},
    })
}

fn requests() -> Value {
    let with_shared = |own: Value, required: &[&str]| {
        let mut properties = shared();
        if let (Some(all), Value::Object(own)) = (properties.as_object_mut(), own) {
            all.extend(own);
        }
        object(properties, required)
    };
    json!({
        "ChatCompletionRequest": with_shared(
            json!({
                "messages": {"type": "array", "minItems": 1, "items": reference("Message")},
                "tools": {"type": "array", "items": reference("Tool")},
                "tool_choice": {
                    "anyOf": [
                        {"enum": ["none", "auto", "required"]},
                        {"type": "object", "description": "One function by name."},
                    ],
                },
                "parallel_tool_calls": {"type": "boolean"},
                "logprobs": {"type": "boolean"},
                "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
                "reasoning_effort": {"type": "string"},
                "chat_template_kwargs": {"type": "object"},
                "add_generation_prompt": {"type": "boolean"},
                "continue_final_message": {"type": "boolean"},
            }),
            &["model", "messages"],
        ),
        "CompletionRequest": with_shared(
            json!({
                "prompt": {
                    "anyOf": [
                        {"type": "string"},
                        strings(),
                        tokens(),
                        {"type": "array", "items": tokens()},
                    ],
                },
                "suffix": {"type": ["string", "null"], "description": "Fill in the middle."},
                "echo": {"type": "boolean"},
                "logprobs": {"type": "integer", "minimum": 0},
            }),
            &["model", "prompt"],
        ),
        "EmbeddingRequest": object(
            json!({
                "model": {"type": "string"},
                "input": {
                    "anyOf": [
                        {"type": "string"},
                        strings(),
                        tokens(),
                        {"type": "array", "items": tokens()},
                    ],
                },
                "encoding_format": {"enum": ["float", "base64"], "default": "float"},
                "dimensions": {"type": "integer", "minimum": 1},
                "user": {"type": "string"},
            }),
            &["model", "input"],
        ),
        "ScoreRequest": object(
            json!({
                "model": {"type": "string"},
                "input": {
                    "description": "A text, a conversation that ends with the assistant's message, \
                        or a list of those or of lists of token ids.",
                    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}],
                },
                "user": {"type": "string"},
            }),
            &["model", "input"],
        ),
        "ScoreList": object(
            json!({
                "object": {"const": "list"},
                "data": {
                    "type": "array",
                    "items": object(
                        json!({
                            "object": {"const": "score"},
                            "index": {"type": "integer"},
                            "score": {"type": "number"},
                        }),
                        &["object", "index", "score"],
                    ),
                },
                "model": {"type": "string"},
                "usage": {"type": "object"},
            }),
            &["object", "data", "model", "usage"],
        ),
        "ResponseFormat": {
            "type": "object",
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema", "regex", "grammar"]},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "schema": {"type": "object"},
                        "strict": {"type": ["boolean", "null"]},
                    },
                },
                "regex": {"type": "string"},
                "grammar": {"type": "string", "description": "llguidance's Lark dialect."},
            },
            "required": ["type"],
        },
    })
}

fn conversation() -> Value {
    json!({
        "Message": object(
            json!({
                "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                "content": {
                    "anyOf": [
                        {"type": ["string", "null"]},
                        {
                            "type": "array",
                            "items": object(
                                json!({"type": {"const": "text"}, "text": {"type": "string"}}),
                                &["type", "text"],
                            ),
                        },
                    ],
                },
                "name": {"type": "string"},
                "tool_calls": {"type": "array", "items": reference("ToolCall")},
                "tool_call_id": {"type": "string"},
                "reasoning_content": {"type": ["string", "null"]},
            }),
            &["role"],
        ),
        "Tool": object(
            json!({
                "type": {"const": "function"},
                "function": object(
                    json!({
                        "name": {"type": "string"},
                        "description": {"type": "string"},
                        "parameters": {"type": "object", "description": "A JSON schema."},
                        "strict": {"type": ["boolean", "null"]},
                    }),
                    &["name"],
                ),
            }),
            &["type", "function"],
        ),
        "ToolCall": object(
            json!({
                "index": {"type": "integer", "description": "In streams."},
                "id": {"type": "string"},
                "type": {"const": "function"},
                "function": object(
                    json!({
                        "name": {"type": "string"},
                        "arguments": {"type": "string", "description": "JSON."},
                    }),
                    &["arguments"],
                ),
            }),
            &["function"],
        ),
    })
}

fn answers() -> Value {
    let answer = |kind: &str, choice: Value| {
        object(
            json!({
                "id": {"type": "string"},
                "object": {"const": kind},
                "created": {"type": "integer"},
                "model": {"type": "string"},
                "system_fingerprint": {"type": "string"},
                "choices": {"type": "array", "items": choice},
                "usage": {"anyOf": [reference("Usage"), {"type": "null"}]},
            }),
            &["id", "object", "created", "model", "choices"],
        )
    };
    let choice = |name: &str, value: Value, reasons: Value| {
        object(
            json!({
                "index": {"type": "integer"},
                name: value,
                "logprobs": {"type": ["object", "null"]},
                "finish_reason": {"enum": reasons},
            }),
            &["index", name],
        )
    };
    let chat = json!(["stop", "length", "tool_calls", null]);
    let text = json!(["stop", "length", null]);
    let string = json!({"type": "string"});
    json!({
        "ChatCompletion": answer(
            "chat.completion", choice("message", reference("Message"), chat.clone()),
        ),
        "ChatCompletionChunk": answer(
            "chat.completion.chunk", choice("delta", json!({"type": "object"}), chat),
        ),
        "Completion": answer("text_completion", choice("text", string, text)),
        "EmbeddingList": object(
            json!({
                "object": {"const": "list"},
                "data": {
                    "type": "array",
                    "items": object(
                        json!({
                            "object": {"const": "embedding"},
                            "index": {"type": "integer"},
                            "embedding": {
                                "anyOf": [
                                    {"type": "array", "items": {"type": "number"}},
                                    {"type": "string", "contentEncoding": "base64"},
                                ],
                            },
                        }),
                        &["object", "index", "embedding"],
                    ),
                },
                "model": {"type": "string"},
                "usage": {"type": "object"},
            }),
            &["object", "data", "model", "usage"],
        ),
        "Usage": object(
            json!({
                "prompt_tokens": {"type": "integer"},
                "completion_tokens": {"type": "integer"},
                "total_tokens": {"type": "integer"},
                "prompt_tokens_details": object(
                    json!({"cached_tokens": {"type": "integer"}}), &[],
                ),
            }),
            &["prompt_tokens", "completion_tokens", "total_tokens"],
        ),
    })
}

fn listings() -> Value {
    json!({
        "Model": object(
            json!({
                "id": {"type": "string"},
                "object": {"const": "model"},
                "created": {"type": "integer"},
                "owned_by": {"type": "string"},
                "root": {"type": "string"},
                "parent": {"type": ["string", "null"], "description": "Base of an adapter."},
                "max_model_len": {"type": "integer"},
            }),
            &["id", "object", "created", "owned_by"],
        ),
        "ModelList": object(
            json!({
                "object": {"const": "list"},
                "data": {"type": "array", "items": reference("Model")},
            }),
            &["object", "data"],
        ),
        "Readiness": object(
            json!({
                "ready": {"type": "boolean"},
                "reasons": {
                    "type": "array",
                    "items": object(
                        json!({"model": {"type": "string"}, "reason": {"type": "string"}}),
                        &["reason"],
                    ),
                },
            }),
            &["ready", "reasons"],
        ),
        "Error": object(
            json!({
                "error": object(
                    json!({
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": ["string", "null"]},
                    }),
                    &["message", "type", "param", "code"],
                ),
            }),
            &["error"],
        ),
    })
}

fn text() -> Value {
    let model = || json!({"type": "string"});
    json!({
        "TokenizeRequest": object(
            json!({
                "model": model(),
                "content": {"type": "string"},
                "add_special": {"type": "boolean", "default": false},
                "parse_special": {"type": "boolean", "default": true},
                "with_pieces": {"type": "boolean", "default": false},
            }),
            &["content"],
        ),
        "Tokens": object(
            json!({"tokens": {"type": "array", "items": {"type": ["integer", "object"]}}}),
            &["tokens"],
        ),
        "DetokenizeRequest": object(
            json!({
                "model": model(),
                "tokens": tokens(),
                "render_special": {"type": "boolean", "default": true},
            }),
            &["tokens"],
        ),
        "Content": object(json!({"content": {"type": "string"}}), &["content"]),
        "ApplyTemplateRequest": object(
            json!({
                "model": model(),
                "messages": {"type": "array", "items": reference("Message")},
                "tools": {"type": "array", "items": reference("Tool")},
                "chat_template_kwargs": {"type": "object"},
                "add_generation_prompt": {"type": "boolean"},
                "continue_final_message": {"type": "boolean"},
            }),
            &["messages"],
        ),
        "Prompt": object(json!({"prompt": {"type": "string"}}), &["prompt"]),
    })
}

fn admin() -> Value {
    let file = || json!({"type": "string", "contentMediaType": "application/octet-stream"});
    json!({
        "LoadModelRequest": object(
            json!({
                "model": {
                    "type": "string",
                    "description": "Name in the data folder, or the reference it was pulled by.",
                },
                "name": {"type": "string", "description": "What requests call it."},
            }),
            &["model"],
        ),
        "LoadAdapterRequest": object(
            json!({
                "name": {"type": "string"},
                "base": {"type": "string", "description": "May be absent with one model."},
                "source": {"type": "string", "description": "Id in the adapters folder."},
                "scale": {"type": "number", "default": 1},
            }),
            &["name"],
        ),
        "UploadAdapterRequest": object(
            json!({
                "name": {"type": "string"},
                "base": {"type": "string"},
                "scale": {"type": "number", "default": 1},
                "adapter_config.json": file(),
                "adapter_model.safetensors": file(),
                "adapter.gguf": file(),
            }),
            &["name"],
        ),
    })
}

fn object(properties: Value, required: &[&str]) -> Value {
    let mut object = json!({"type": "object", "properties": properties});
    if !required.is_empty() {
        object["required"] = required.into();
    }
    object
}

fn strings() -> Value {
    json!({"type": "array", "items": {"type": "string"}})
}

fn tokens() -> Value {
    json!({"type": "array", "items": {"type": "integer", "minimum": 0}})
}
