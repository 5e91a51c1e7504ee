use super::*;
use crate::gateway::api::wire::logprobs::tests::token;
use crate::gateway::stream::fake::{accepted, delta, delta_with, done, finish, recorded, running};
use crate::ipc::FinishReason;
use http_body_util::BodyExt;
use serde_json::json;
use std::time::Duration;

fn read(more: Value) -> Result<CompletionRequest, ApiError> {
    let mut body = json!({"model": "m", "prompt": "once"});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    CompletionRequest::read(Fields::of(String::new(), body).unwrap())
}

async fn text(response: Response) -> String {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn writer(more: Value) -> Writer {
    let mut writer = Writer::new(&read(more).unwrap());
    writer.answer.id = "cmpl-1".into();
    writer.answer.created = 1;
    writer.answer.system_fingerprint = "f";
    writer
}

#[test]
fn every_form_of_prompt() {
    let text = |text: &str| Input::Text(text.into());
    let cases = [
        (json!("a"), vec![text("a")]),
        (json!(""), vec![text("")]),
        (json!(["a", "b"]), vec![text("a"), text("b")]),
        (json!([1, 2]), vec![Input::Tokens(vec![1, 2])]),
        (json!([[1], [2]]), vec![Input::Tokens(vec![1]), Input::Tokens(vec![2])]),
    ];
    for (prompt, expected) in cases {
        assert_eq!(read(json!({"prompt": prompt})).unwrap().prompts, expected, "{prompt}");
    }
    assert_eq!(read(json!({})).unwrap().common.stop.max_tokens, Some(16));
    let scored = read(json!({"echo": true, "max_tokens": 0, "logprobs": 0})).unwrap();
    assert_eq!(scored.common.stop.max_tokens, Some(0));
}

#[test]
fn bad_requests_are_named() {
    let cases = [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": vec![""; 200]}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [1, -1]}), "prompt[1]"),
        (json!({"prompt": [1, "a"]}), "prompt[1]"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": vec!["a"; 100], "n": 3}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"echo": "yes"}), "echo"),
        (json!({"suffix": 1}), "suffix"),
        (json!({"suffix": "b", "echo": true}), "echo"),
        (json!({"suffix": "b", "prompt": [1]}), "suffix"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"messages": [{"role": "user"}]}), "messages"),
    ];
    for (body, param) in cases {
        let error = read(body.clone()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
    }
}

#[tokio::test]
async fn a_stream_has_texts_finishes_and_usage() {
    let writer = writer(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let mut events = accepted(2, 1).to_vec();
    events.extend([delta(0, "upon"), delta(0, ""), finish(0, FinishReason::Length, 2), done()]);
    let answer = text(stream::respond(recorded(events), writer, Duration::from_secs(60))).await;
    let head = r#"data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","system_fingerprint":"f","choices":"#;
    let expected = format!(
        concat!(
            "{0}[{{\"text\":\"upon\",\"index\":0,\"logprobs\":null,\"finish_reason\":null}}],\"usage\":null}}\n\n",
            "{0}[{{\"text\":\"\",\"index\":0,\"logprobs\":null,\"finish_reason\":\"length\"}}],\"usage\":null}}\n\n",
            "{0}[],\"usage\":{{\"prompt_tokens\":2,\"completion_tokens\":2,\"total_tokens\":4,",
            "\"prompt_tokens_details\":{{\"cached_tokens\":1}}}}}}\n\ndata: [DONE]\n\n",
        ),
        head
    );
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn echo_and_logprobs_of_a_whole_answer() {
    let writer = writer(json!({"echo": true, "logprobs": 1, "n": 2}));
    let mut events = accepted(1, 0).to_vec();
    events.push(Event::Prompt { text: "once".into(), logprobs: vec![token(b"once", None, &[])] });
    for choice in 0..2 {
        let tokens = vec![token(b" x", Some(-0.5), &[(b" y", -0.25)])];
        events.push(delta_with(choice, " x", tokens));
        events.push(finish(choice, FinishReason::StopString("z".into()), 1));
    }
    events.push(done());
    let answer = text(whole(recorded(events), writer).await.unwrap()).await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let choice = |index| {
        json!({"text": "once x", "index": index, "finish_reason": "stop", "logprobs": {
            "tokens": ["once", " x"], "token_logprobs": [null, -0.5],
            "top_logprobs": [null, {" y": -0.25, " x": -0.5}], "text_offset": [0, 4],
        }})
    };
    assert_eq!(answer["choices"], json!([choice(0), choice(1)]));
    assert_eq!(answer["usage"]["total_tokens"], 3);
}

#[tokio::test]
async fn choices_are_numbered_over_all_prompts() {
    let writer = writer(json!({"prompt": ["a", "b"], "n": 2}));
    let (running, senders) = running(2, Duration::from_secs(60));
    for (prompt, sender) in senders.iter().enumerate() {
        for choice in 0..2 {
            sender.send(delta(choice, &format!("{prompt}.{choice}"))).unwrap();
            sender.send(finish(choice, FinishReason::Stop, 1)).unwrap();
        }
        sender.send(done()).unwrap();
    }
    let answer = text(whole(running, writer).await.unwrap()).await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let texts: Vec<&Value> =
        answer["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["0.0", "0.1", "1.0", "1.1"]);
}

#[tokio::test]
async fn a_failure_before_the_answer_is_a_status() {
    let events = vec![delta(0, "a"), Event::Failed(crate::ipc::EngineError::internal("secret"))];
    let error = whole(recorded(events), writer(json!({}))).await.unwrap_err();
    assert_eq!(error.status, 500);
    assert!(!error.message.contains("secret"));
}
