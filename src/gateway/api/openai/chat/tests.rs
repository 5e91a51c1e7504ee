use super::constraint::Constraint;
use super::*;
use crate::gateway::api::openai::finish_reason;
use crate::gateway::api::wire::fields::Fields;
use crate::gateway::stream::fake::{accepted, delta, delta_with, done, finish, recorded};
use crate::ipc::{Event, FinishReason};
use crate::template::{ReasoningFormat, ToolFamily};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::time::Duration;

fn read(more: Value) -> Result<ChatRequest, ApiError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    ChatRequest::read(Fields::of(String::new(), body)?)
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "f"}}])
}

/// The response to `request` if the engine sends `events`.
async fn answer(request: Value, events: Vec<Event>) -> String {
    let request = read(request).unwrap();
    let constraint = Constraint {
        grammar: None,
        parts: Vec::new(),
        family: Some(ToolFamily::Hermes),
        reasoning: Some(ReasoningFormat {
            open: "<think>".into(),
            close: "</think>".into(),
            starts_open: false,
        }),
    };
    let writer = Writer::new(&request, &constraint);
    let mut all = accepted(5, 4).to_vec();
    all.extend(events);
    let response = match request.common.stream {
        Some(_) => stream::respond(recorded(all), writer, Duration::from_secs(60)),
        None => whole(recorded(all), writer).await.unwrap(),
    };
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The JSON events of a stream, which must end with `[DONE]`.
fn events(stream: &str) -> Vec<Value> {
    let body = stream.strip_suffix("data: [DONE]\n\n").expect("a whole stream");
    body.split_terminator("\n\n")
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect()
}

fn calling() -> Vec<Event> {
    let text = "<think>\nhm</think>\n\nLet me see. <tool_call>\n{\"name\": \"f\", \
                \"arguments\": {\"a\": 1}}\n</tool_call>";
    // The text is split at arbitrary places.
    let mut list: Vec<Event> = text
        .as_bytes()
        .chunks(3)
        .map(|piece| delta(0, std::str::from_utf8(piece).unwrap()))
        .collect();
    list.push(finish(0, FinishReason::Stop, 30));
    list.push(done());
    list
}

#[test]
fn bad_requests_are_named() {
    let cases = [
        (json!({"messages": null}), "messages"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"prediction": {"type": "content"}}), "prediction"),
        (json!({"web_search_options": {}}), "web_search_options"),
        (json!({"verbosity": "high"}), "verbosity"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"reasoning_effort": "heroic"}), "reasoning_effort"),
        (json!({"chat_template_kwargs": []}), "chat_template_kwargs"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "add_generation_prompt",
        ),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"prompt": "x"}), "prompt"),
        (json!({"echo": true}), "echo"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"reward_model": "r"}), "best_of"),
        (json!({"reward_model": "r", "best_of": 1}), "best_of"),
        (json!({"reward_model": "r", "best_of": 17}), "best_of"),
        (json!({"reward_model": "r", "best_of": 2, "n": 3}), "best_of"),
        (json!({"reward_model": 3, "best_of": 2}), "reward_model"),
        (
            json!({"reward_model": "r", "best_of": 2, "continue_final_message": true}),
            "reward_model",
        ),
        (json!({"reward_model": "r", "best_of": 2, "stream": true}), "stream"),
        (
            json!({"reward_model": "r", "best_of": 2,
                "tools": [{"type": "function", "function": {"name": "f"}}]}),
            "reward_model",
        ),
    ];
    for (body, param) in cases {
        let error = read(body.clone()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        assert_eq!(error.status, 400);
    }
}

#[test]
fn best_of_generates_more_than_it_returns() {
    let request = read(json!({"reward_model": "r", "best_of": 4, "n": 2})).unwrap();
    assert_eq!(request.common.choices, 4);
    let best = request.best.unwrap();
    assert_eq!((best.reward_model.as_str(), best.keep), ("r", 2));
    assert!(read(json!({"n": 2, "best_of": 2})).unwrap().best.is_none());
}

#[test]
fn what_official_clients_send_passes() {
    let request = read(json!({
        "modalities": ["text"], "verbosity": "medium", "logprobs": false, "top_logprobs": 0,
        "parallel_tool_calls": false, "tools": tools(), "tool_choice": "none", "store": false,
        "metadata": {}, "response_format": {"type": "text"}, "max_completion_tokens": 7,
        "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": false},
    }))
    .unwrap();
    assert_eq!((request.tools, request.logprobs, request.format), (None, None, None));
    assert_eq!(request.common.stop.max_tokens, Some(7));
}

#[tokio::test]
async fn a_plain_stream() {
    let stream = answer(
        json!({"stream": true, "stream_options": {"include_usage": true}}),
        vec![delta(0, "Hel"), delta(0, "lo"), finish(0, FinishReason::Length, 2), done()],
    )
    .await;
    let list = events(&stream);
    let delta = |index: usize| &list[index]["choices"][0]["delta"];
    assert_eq!(delta(0), &json!({"role": "assistant", "content": ""}));
    assert_eq!(delta(1), &json!({"content": "Hel"}));
    assert_eq!(delta(2), &json!({"content": "lo"}));
    assert_eq!(delta(3), &json!({}));
    assert_eq!(list[3]["choices"][0]["finish_reason"], "length");
    assert_eq!(list[3]["usage"], Value::Null);
    assert_eq!(list[4]["choices"], json!([]));
    let usage = json!({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4}});
    assert_eq!(list[4]["usage"], usage);
    assert_eq!(list.len(), 5);
    for event in &list {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["id"], list[0]["id"]);
        assert_eq!(event["model"], "m");
    }
}

#[tokio::test]
async fn calls_are_streamed_as_deltas() {
    let stream = answer(json!({"stream": true, "tools": tools()}), calling()).await;
    let (mut content, mut reasoning, mut arguments) = <(String, String, String)>::default();
    let mut heads = Vec::new();
    for event in events(&stream) {
        assert_eq!(event.get("usage"), None);
        let delta = &event["choices"][0]["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
        if let Some(call) = delta["tool_calls"].get(0) {
            assert_eq!(call["index"], 0);
            arguments += call["function"]["arguments"].as_str().unwrap();
            heads.extend(call.get("id").map(|_| call.clone()));
        }
    }
    assert_eq!((content.trim(), reasoning.trim()), ("Let me see.", "hm"));
    assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), json!({"a": 1}));
    assert_eq!(heads.len(), 1);
    assert_eq!(
        (&heads[0]["type"], &heads[0]["function"]["name"]),
        (&json!("function"), &json!("f"))
    );
    assert!(stream.contains("\"finish_reason\":\"tool_calls\""));
}

#[tokio::test]
async fn a_whole_answer_equals_its_stream() {
    let body: Value =
        serde_json::from_str(&answer(json!({"tools": tools()}), calling()).await).unwrap();
    let choice = &body["choices"][0];
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"].as_str().unwrap().trim(), "Let me see.");
    assert_eq!(choice["message"]["reasoning_content"].as_str().unwrap().trim(), "hm");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "f");
    let arguments = call["function"]["arguments"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(arguments).unwrap(), json!({"a": 1}));
    // Without tools the same text is content.
    let body: Value = serde_json::from_str(&answer(json!({}), calling()).await).unwrap();
    assert!(body["choices"][0]["message"]["content"].as_str().unwrap().contains("<tool_call>"));
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn logprobs_are_never_lost() {
    use crate::gateway::api::wire::logprobs::tests::token;
    let events_of = || {
        vec![
            // The parser holds this text back, because it may begin a marker.
            delta_with(0, "<thi", vec![token(b"<thi", Some(-1.0), &[])]),
            delta_with(0, "s", vec![token(b"s", Some(-2.0), &[(b"nk", -3.0)])]),
            delta_with(0, "", vec![token(b"", Some(-4.0), &[])]),
            finish(0, FinishReason::Stop, 3),
            done(),
        ]
    };
    let stream = answer(json!({"stream": true, "logprobs": true}), events_of()).await;
    let mut streamed = Vec::new();
    for event in events(&stream) {
        let content = &event["choices"][0]["logprobs"]["content"];
        streamed.extend(content.as_array().cloned().unwrap_or_default());
    }
    let body = answer(json!({"logprobs": true, "top_logprobs": 1}), events_of()).await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["choices"][0]["logprobs"]["content"], json!(streamed));
    assert_eq!(streamed.len(), 3);
    assert_eq!(body["choices"][0]["message"]["content"], "<this");
}

#[tokio::test]
async fn choices_keep_apart() {
    let list = vec![
        delta(1, "b"),
        delta(0, "a"),
        finish(1, FinishReason::Stop, 1),
        finish(0, FinishReason::Length, 1),
        done(),
    ];
    let body: Value = serde_json::from_str(&answer(json!({"n": 2}), list).await).unwrap();
    let content = |index: usize| &body["choices"][index]["message"]["content"];
    assert_eq!((content(0), content(1)), (&json!("a"), &json!("b")));
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["choices"][1]["finish_reason"], "stop");
}

#[tokio::test]
async fn streams_have_no_line_ends_but_their_own() {
    let text = "a\u{2028}b\u{2029}c\u{85}d\ne";
    let stream = answer(
        json!({"stream": true}),
        vec![delta(0, text), finish(0, FinishReason::Stop, 2), done()],
    )
    .await;
    assert!(!stream.contains(['\u{2028}', '\u{2029}', '\u{85}']), "{stream:?}");
    assert!(stream.contains("\\u2028b\\u2029c\\u0085d\\ne"), "{stream}");
    let told: String = events(&stream)
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(told, text);
}

#[tokio::test]
async fn a_call_made_twice_is_told_once() {
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n";
    let made = || {
        vec![
            delta(0, call),
            delta(0, call),
            delta(0, "<tool_call>\n{\"name"),
            finish(0, FinishReason::Length, 30),
            done(),
        ]
    };
    let whole = answer(json!({"tools": tools()}), made()).await;
    let whole: Value = serde_json::from_str(&whole).unwrap();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(
        (&choice["message"]["content"], &choice["finish_reason"]),
        (&json!(null), &json!("tool_calls"))
    );
    let stream = answer(json!({"tools": tools(), "stream": true}), made()).await;
    let list = events(&stream);
    assert_eq!(list.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    let starts =
        list.iter().filter(|event| event["choices"][0]["delta"]["tool_calls"][0]["id"].is_string());
    assert_eq!(starts.count(), 1);
}

#[tokio::test]
async fn a_call_that_is_cut_off_says_so() {
    for (text, reason, content) in [
        ("<tool_call>\n{\"na", FinishReason::Length, json!(null)),
        ("<tool_call>\n{\"na", FinishReason::StopString("x".into()), json!(null)),
        ("Let me see. <tool_call>\n{\"na", FinishReason::Length, json!("Let me see.")),
        ("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a", FinishReason::Length, json!(null)),
    ] {
        let expected = finish_reason(&reason);
        let made = vec![delta(0, text), finish(0, reason, 3), done()];
        let whole = answer(json!({"tools": tools()}), made).await;
        let whole: Value = serde_json::from_str(&whole).unwrap();
        let choice = &whole["choices"][0];
        assert_eq!(choice["finish_reason"], expected, "{text}");
        assert_eq!(choice["message"]["content"], content, "{text}");
    }
}
