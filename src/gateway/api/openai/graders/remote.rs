//! Questions to the models of other servers ([`crate::gateway::remote`]), by OpenAI's chat
//! completions.

use super::{NUMBER_TOKENS, TOP_TOKENS, number_schema, plain, preference};
use crate::config::RemoteModel;
use crate::gateway::error::ApiError;
use crate::gateway::remote::RemoteModels;
use crate::grade::{Answer, Ask, Message, Reasoning, Sampling, Usage};
use serde_json::{Value, json};

/// Answers a question with a model of another server.
///
/// # Errors
/// As [`RemoteModels::chat`]; 400 for a question that only a reward model of this server can
/// answer.
pub(super) async fn answer(
    models: &RemoteModels,
    model: &RemoteModel,
    ask: &Ask,
) -> Result<Answer, ApiError> {
    match ask {
        Ask::Number { messages, range, sampling } => {
            number(models, model, messages, *range, sampling).await
        }
        Ask::Choice { messages, labels, reasoning } => {
            choice(models, model, messages, labels, reasoning.as_ref()).await
        }
        Ask::Score { .. } => Err(ApiError::bad_request(format!(
            "`{}` is a model of another server: it cannot be used as a reward model.",
            model.name
        ))),
    }
}

async fn number(
    models: &RemoteModels,
    model: &RemoteModel,
    messages: &[Message],
    range: (f64, f64),
    sampling: &Sampling,
) -> Result<Answer, ApiError> {
    let schema = number_schema(range);
    let mut body = json!({
        "messages": messages.iter().map(plain).collect::<Vec<_>>(),
        "max_tokens": sampling.max_completions_tokens.unwrap_or(NUMBER_TOKENS),
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "grader", "schema": schema, "strict": true},
        },
    });
    for (key, value) in [
        ("temperature", sampling.temperature.map(Value::from)),
        ("top_p", sampling.top_p.map(Value::from)),
        ("seed", sampling.seed.map(Value::from)),
    ] {
        if let Some(value) = value {
            body[key] = value;
        }
    }
    let found = models.chat(model, body).await?;
    let content = found["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    let result: Value = serde_json::from_str(content).unwrap_or_default();
    let Usage { prompt_tokens, completion_tokens } = usage(&found);
    let number = result["result"].as_f64();
    Ok(Answer { number, prompt_tokens, completion_tokens, reasoning: None })
}

async fn choice(
    models: &RemoteModels,
    model: &RemoteModel,
    messages: &[Message],
    labels: &[String; 2],
    reasoning: Option<&Reasoning>,
) -> Result<Answer, ApiError> {
    let mut messages: Vec<Value> = messages.iter().map(plain).collect();
    let (mut spent, mut written) = (Usage::default(), None);
    if let Some(Reasoning { max_tokens, then }) = reasoning {
        let body = json!({"messages": messages, "max_tokens": max_tokens, "temperature": 0});
        let found = models.chat(model, body).await?;
        spent = usage(&found);
        let text = found["choices"][0]["message"]["content"].as_str().unwrap_or_default();
        messages.push(json!({"role": "assistant", "content": text}));
        messages.push(json!({"role": "user", "content": then}));
        written = Some(text.to_owned());
    }
    let body = json!({
        "messages": messages,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": true,
        "top_logprobs": TOP_TOKENS,
    });
    let found = models.chat(model, body).await?;
    let top = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"].as_array();
    let token = |token: &Value| {
        let logprob = token["logprob"].as_f64().filter(|logprob| *logprob <= 0.0)?;
        Some((token["token"].as_str()?.to_owned(), logprob))
    };
    let top: Vec<(String, f64)> = top.into_iter().flatten().filter_map(token).collect();
    if top.is_empty() {
        return Err(ApiError::bad_request(format!(
            "The server of the remote model `{}` returns no `top_logprobs`: a judge needs them.",
            model.name
        )));
    }
    let last = usage(&found);
    Ok(Answer {
        number: preference(top.iter().map(|(text, logprob)| (text.as_bytes(), *logprob)), labels),
        prompt_tokens: spent.prompt_tokens + last.prompt_tokens,
        completion_tokens: spent.completion_tokens + last.completion_tokens,
        reasoning: written,
    })
}

fn usage(response: &Value) -> Usage {
    let tokens = |key: &str| response["usage"][key].as_u64().unwrap_or(0);
    Usage { prompt_tokens: tokens("prompt_tokens"), completion_tokens: tokens("completion_tokens") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::time::Duration;

    /// A server that gives these answers in turn, and returns the requests: their heads and bodies.
    fn server(
        answers: Vec<(u16, Value)>,
    ) -> (String, std::thread::JoinHandle<Vec<(String, Value)>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1/", listener.local_addr().unwrap());
        let serve = move || {
            let each = answers.into_iter().map(|(status, answer)| {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut reader, mut head) = (BufReader::new(stream.try_clone().unwrap()), String::new());
                while !head.ends_with("\r\n\r\n") {
                    reader.read_line(&mut head).unwrap();
                }
                let lower = head.to_lowercase();
                let (_, length) = lower.split_once("content-length: ").unwrap();
                let length = length.lines().next().unwrap().parse().unwrap();
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let text = answer.to_string();
                write!(
                    stream,
                    "HTTP/1.1 {status} Status\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
                    text.len()
                )
                .unwrap();
                (head, serde_json::from_slice(&body).unwrap())
            });
            each.collect()
        };
        (url, std::thread::spawn(serve))
    }

    fn remote(url: &str) -> (RemoteModels, RemoteModel) {
        let model = RemoteModel {
            name: "judge".into(),
            url: url.into(),
            model: "strong".into(),
            key: Some("secret-key".parse().unwrap()),
        };
        (RemoteModels::new(std::slice::from_ref(&model), Duration::from_secs(5)), model)
    }

    fn chosen(top: &[(&str, f64)]) -> Value {
        let top: Vec<_> = top
            .iter()
            .map(|(token, p): &(&str, f64)| json!({"token": token, "logprob": p.ln()}))
            .collect();
        json!({
            "choices": [{"logprobs": {"content": [{"token": "A", "top_logprobs": top}]}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 1},
        })
    }

    fn said(text: &str) -> Value {
        json!({
            "choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3},
        })
    }

    fn question() -> Vec<Message> {
        vec![Message { role: "user".into(), content: "Which?".into() }]
    }

    fn choice_of(reasoning: Option<Reasoning>) -> Ask {
        let labels = ["A", "B"].map(str::to_owned);
        Ask::Choice { messages: question(), labels, reasoning }
    }

    #[tokio::test]
    async fn a_choice_is_read_from_the_likeliest_tokens() {
        let reasoning = Reasoning { max_tokens: 9, then: "A or B?".into() };
        let (url, requests) =
            server(vec![(200, said("Hm.")), (200, chosen(&[("A", 0.6), (" B", 0.2), ("I", 0.1)]))]);
        let (models, model) = remote(&url);
        let found = answer(&models, &model, &choice_of(Some(reasoning))).await.unwrap();
        assert!((found.number.unwrap() - 0.75).abs() < 1e-9, "{found:?}");
        assert_eq!((found.prompt_tokens, found.completion_tokens), (12, 4));
        assert_eq!(found.reasoning.as_deref(), Some("Hm."));
        let requests = requests.join().unwrap();
        let (head, first) = &requests[0];
        assert!(head.starts_with("POST /v1/chat/completions "), "{head}");
        assert!(head.contains("Bearer secret-key"), "{head}");
        assert_eq!((&first["model"], &first["max_tokens"]), (&json!("strong"), &json!(9)));
        let roles: Vec<_> = requests[1].1["messages"].as_array().unwrap().iter().collect();
        assert_eq!(
            roles.iter().map(|message| &message["role"]).collect::<Vec<_>>(),
            ["user", "assistant", "user"]
        );
        assert_eq!(requests[1].1["top_logprobs"], 20);
    }

    #[tokio::test]
    async fn a_number_is_read_from_json() {
        for (text, right) in [(r#"{"result": 0.5}"#, Some(0.5)), ("five", None)] {
            let (url, requests) = server(vec![(200, said(text))]);
            let (models, model) = remote(&url);
            let sampling = Sampling { seed: Some(3), ..Sampling::default() };
            let ask = Ask::Number { messages: question(), range: (0.0, 1.0), sampling };
            assert_eq!(answer(&models, &model, &ask).await.unwrap().number, right);
            let body = &requests.join().unwrap()[0].1;
            let schema = &body["response_format"]["json_schema"]["schema"];
            assert_eq!(schema["properties"]["result"]["maximum"], 1.0);
            assert_eq!(body["seed"], 3);
            assert!(body.get("temperature").is_none());
        }
    }

    #[tokio::test]
    async fn errors_say_whether_the_question_may_be_asked_again() {
        let refusal = json!({"error": {"message": "no such key: secret-key"}});
        for (status, right) in
            [(401, 400), (404, 400), (408, 503), (429, 429), (500, 503), (503, 503)]
        {
            let (url, requests) = server(vec![(status, refusal.clone())]);
            let (models, model) = remote(&url);
            let error = answer(&models, &model, &choice_of(None)).await.unwrap_err();
            assert_eq!(error.status.as_u16(), right, "{status}");
            assert!(error.message.contains("no such key") && error.message.contains("`judge`"));
            assert!(!error.message.contains("secret-key"));
            requests.join().unwrap();
        }
        // A server without log-probabilities cannot judge, one that is not there is asked again.
        let (url, requests) = server(vec![(200, said("A"))]);
        let (models, model) = remote(&url);
        let error = answer(&models, &model, &choice_of(None)).await.unwrap_err();
        assert!(error.message.contains("top_logprobs"), "{}", error.message);
        requests.join().unwrap();
        let error = answer(&models, &model, &choice_of(None)).await.unwrap_err();
        assert_eq!(error.status.as_u16(), 503, "{}", error.message);
        let ask = Ask::Score { messages: question() };
        assert!(answer(&models, &model, &ask).await.is_err());
    }
}
