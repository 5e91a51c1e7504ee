//! The malformed requests. Each is determined by the target and a random stream.

use super::Target;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// The bytes to send, and how to send them.
pub(super) struct Attempt {
    pub(super) kind: &'static str,
    pub(super) bytes: Vec<u8>,
    /// Pause after half of the bytes.
    pub(super) pause: Duration,
    /// Shut down the client's side of the connection after the last byte.
    pub(super) half_close: bool,
}

impl Attempt {
    pub(super) fn whole(kind: &'static str, bytes: impl Into<Vec<u8>>) -> Self {
        Self { kind, bytes: bytes.into(), pause: Duration::ZERO, half_close: false }
    }
}

pub(super) fn make(target: &Target, random: &mut Random, case: usize) -> Attempt {
    match case % 16 {
        0 => Attempt::whole("raw bytes", raw_bytes(random)),
        1 | 2 => Attempt::whole("mutated request", mutated(target, random)),
        3..=5 => Attempt::whole("wrong type", wrong_type(target, random)),
        6 => Attempt::whole("extreme number", extreme_number(target, random)),
        7 => Attempt::whole("deep JSON", deep_json(target, random)),
        8 => Attempt::whole("giant header", giant_header(target, random)),
        9 => slow_or_short(target, random),
        10 => Attempt::whole("wrong route", wrong_route(target, random)),
        11 => Attempt::whole("bad text", bad_text(target, random)),
        12 => Attempt::whole("bad form", bad_form(target, random)),
        13 => Attempt::whole("bad framing", bad_framing(target, random)),
        14 => Attempt::whole("bad grammar", bad_grammar(target, random)),
        _ => Attempt::whole("bad conversation", bad_conversation(target, random)),
    }
}

/// A complete request with a JSON body.
pub(super) fn request(target: &Target, line: &str, headers: &[(&str, &str)], body: &str) -> String {
    let mut text = format!("{line} HTTP/1.1\r\nhost: {}\r\n", target.address);
    let key = match line.contains("/admin/") {
        true => target.admin_key.as_deref(),
        false => target.api_key.as_deref(),
    };
    if let Some(key) = key {
        let _ = write!(text, "authorization: Bearer {key}\r\n");
    }
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        text.push_str("content-type: application/json\r\n");
    }
    for (name, value) in headers {
        let _ = write!(text, "{name}: {value}\r\n");
    }
    let _ = write!(text, "content-length: {}\r\n\r\n{body}", body.len());
    text
}

/// A random valid request to modify, with its route.
fn good_bodies(target: &Target, random: &mut Random) -> (&'static str, Value) {
    let model = &target.model;
    match random.below(7) {
        0 => (
            "POST /v1/chat/completions",
            json!({
                "model": model, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1,
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                ],
                "stop": ["\n"], "logprobs": true, "top_logprobs": 2, "stream": false, "n": 2,
                "tools": [{"type": "function", "function": {
                    "name": "f", "parameters": {"type": "object", "properties": {}},
                }}],
                "tool_choice": "none",
            }),
        ),
        1 => (
            "POST /v1/chat/completions",
            json!({
                "model": model, "max_completion_tokens": 3, "stream": true,
                "stream_options": {"include_usage": true},
                "messages": [{"role": "user", "content": "Hello"}],
                "response_format": {"type": "json_object"},
                "chat_template_kwargs": {"enable_thinking": false},
            }),
        ),
        2 => (
            "POST /v1/completions",
            json!({
                "model": model, "prompt": ["a", "b"], "max_tokens": 2, "echo": true, "logprobs": 1,
                "logit_bias": {"5": -100}, "presence_penalty": 0.1, "frequency_penalty": 0.1,
                "repetition_penalty": 1.1, "min_p": 0.05, "top_k": 40, "typical_p": 0.9,
                "dry_multiplier": 0.8, "dry_sequence_breakers": ["\n"], "xtc_probability": 0.1,
                "stop_token_ids": [1], "ignore_eos": false, "priority": 1, "user": "u",
                "speculative.n_max": 0,
            }),
        ),
        3 => ("POST /v1/embeddings", json!({"model": model, "input": ["a", "b"]})),
        4 => ("POST /v1/score", json!({"model": model, "input": ["a", [1, 2]]})),
        5 => ("POST /tokenize", json!({"model": model, "content": "Hello", "add_special": true})),
        _ => (
            "POST /apply-template",
            json!({"model": model, "messages": [{"role": "user", "content": "Hello"}]}),
        ),
    }
}

fn raw_bytes(random: &mut Random) -> Vec<u8> {
    let length = 1 + random.below(2_000);
    let mut bytes: Vec<u8> = (0..length).map(|_| random.byte()).collect();
    if random.chance(2) {
        bytes.splice(0..0, *b"POST /v1/completions HTTP/1.1\r\n");
    }
    bytes
}

/// A valid request with bytes changed, removed, doubled or cut.
fn mutated(target: &Target, random: &mut Random) -> Vec<u8> {
    let (line, body) = good_bodies(target, random);
    let mut bytes = request(target, line, &[], &body.to_string()).into_bytes();
    for _ in 0..1 + random.below(8) {
        let at = random.below(bytes.len().max(1)).min(bytes.len().saturating_sub(1));
        match random.below(5) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.byte(),
            2 => drop(bytes.drain(at..(at + 1 + random.below(10)).min(bytes.len()))),
            3 => bytes.insert(at, random.pick(b"\r\n \"{}[]:,\\\0\xff")),
            _ => {
                let end = (at + 1 + random.below(40)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
        }
        if bytes.is_empty() {
            return b"\r\n".to_vec();
        }
    }
    bytes
}

/// A valid body in which one field has another type.
fn wrong_type(target: &Target, random: &mut Random) -> String {
    let (line, mut body) = good_bodies(target, random);
    for _ in 0..1 + random.below(2) {
        let value = any_value(random, 0);
        replace_somewhere(&mut body, value, random);
    }
    if random.chance(4) {
        let name: String = (0..1 + random.below(30)).map(|_| random.letter()).collect();
        body[name] = any_value(random, 0);
    }
    request(target, line, &[], &body.to_string())
}

/// Replaces a field at a random depth by `value`.
fn replace_somewhere(spot: &mut Value, value: Value, random: &mut Random) {
    let deeper = random.chance(2);
    match spot {
        Value::Object(map) if !map.is_empty() => {
            let at = random.below(map.len());
            let inner = map.values_mut().nth(at).expect("within the map");
            if deeper { replace_somewhere(inner, value, random) } else { *inner = value }
        }
        Value::Array(list) if !list.is_empty() => {
            let at = random.below(list.len());
            if deeper {
                replace_somewhere(&mut list[at], value, random);
            } else {
                list[at] = value;
            }
        }
        _ => *spot = value,
    }
}

fn any_value(random: &mut Random, depth: usize) -> Value {
    match random.below(if depth < 3 { 12 } else { 9 }) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(-1),
        3 => json!(random.next()),
        4 => json!(1e300),
        5 => json!(0.5),
        6 => json!(""),
        7 => json!("\u{0}\u{7f}\u{202e}😀"),
        8 => json!("x".repeat(random.below(5_000))),
        9 => json!([]),
        10 => Value::Array((0..random.below(5)).map(|_| any_value(random, depth + 1)).collect()),
        _ => json!({"type": any_value(random, depth + 1), "x": any_value(random, depth + 1)}),
    }
}

fn extreme_number(target: &Target, random: &mut Random) -> String {
    let numbers = [
        "1e308",
        "-1e308",
        "1e999",
        "-1e999",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
        "4294967296",
        "2147483648",
        "-0",
        "0.0",
        "1e-999",
        "NaN",
        "Infinity",
        "00",
        "0x10",
        "1.",
        "+1",
        "99999999999999999999999999999999999999999999999999",
    ];
    let fields = [
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "penalty_window",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "logprobs",
        "xtc_probability",
        "xtc_threshold",
        "priority",
        "speculative.n_max",
        "best_of",
    ];
    let (field, number) = (random.pick(&fields), random.pick(&numbers));
    let limit = if field == "max_tokens" { "" } else { ", \"max_tokens\": 1" };
    let body = match random.below(3) {
        0 => format!("{{\"model\": {}, \"prompt\": [{number}]{limit}}}", json!(target.model)),
        _ => format!(
            "{{\"model\": {}, \"prompt\": \"a\", \"{field}\": {number}{limit}}}",
            json!(target.model)
        ),
    };
    request(target, "POST /v1/completions", &[], &body)
}

fn deep_json(target: &Target, random: &mut Random) -> String {
    let depth = random.pick(&[100, 127, 128, 129, 1_000, 100_000]);
    let (open, close) = random.pick(&[("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]")]);
    let closed = random.chance(2);
    let tail = if closed { close.repeat(depth) } else { String::new() };
    let value = format!("{}1{tail}", open.repeat(depth));
    let body = match random.below(3) {
        0 => value,
        1 => format!("{{\"model\": {}, \"messages\": {value}}}", json!(target.model)),
        _ => format!(
            "{{\"model\": {}, \"messages\": [{{\"role\": \"user\", \"content\": \"a\"}}], \
             \"max_tokens\": 1, \"response_format\": {{\"type\": \"json_schema\", \"json_schema\": \
             {{\"name\": \"x\", \"schema\": {value}}}}}}}",
            json!(target.model)
        ),
    };
    request(target, "POST /v1/chat/completions", &[], &body)
}

fn giant_header(target: &Target, random: &mut Random) -> String {
    let size = random.pick(&[1_000, 9_000, 40_000, 300_000]);
    let long = "x".repeat(size);
    match random.below(5) {
        0 => request(target, "GET /health", &[("x-long", &long)], ""),
        1 => request(target, &format!("GET /{long}"), &[], ""),
        2 => request(target, &format!("GET /v1/models/{}", "%41".repeat(size / 3)), &[], ""),
        3 => request(target, "GET /v1/models", &[("authorization", &format!("Bearer {long}"))], ""),
        _ => {
            let many: String = (0..size / 10).map(|i| format!("h{i}: 1\r\n")).collect();
            format!("GET /health HTTP/1.1\r\nhost: {}\r\n{many}\r\n", target.address)
        }
    }
}

/// Senders that pause, stop half-way, or close their side of the connection.
fn slow_or_short(target: &Target, random: &mut Random) -> Attempt {
    let (line, body) = good_bodies(target, random);
    let mut bytes = request(target, line, &[], &body.to_string()).into_bytes();
    if random.chance(2) {
        bytes.truncate(1 + random.below(bytes.len() - 1));
    }
    Attempt {
        kind: "slow or short",
        bytes,
        pause: Duration::from_millis(random.below(3) as u64 * 50),
        half_close: random.chance(2),
    }
}

fn wrong_route(target: &Target, random: &mut Random) -> String {
    let methods = [
        "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get",
        "PRI", "HEAD", "",
    ];
    let paths = [
        "/",
        "",
        "*",
        "/v1",
        "/v1/",
        "/v1//models",
        "/v1/models/",
        "/v1/models/%00",
        "/v1/models/%ff",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2f",
        "/v1/chat/completions/",
        "/admin",
        "/admin/models",
        "/admin/models/../x",
        "/admin/adapters/%zz",
        "//",
        "/\u{fc}",
        "/ready?x=%",
        "/v1/responses",
        "/v1/messages",
        "http://evil.example/v1/models",
        "evil.example:80",
        "/metrics/..",
        "/openapi.json#x",
        "/health;x",
    ];
    let line = format!("{} {}", random.pick(&methods), random.pick(&paths));
    let headers: &[(&str, &str)] = match random.below(6) {
        0 => &[("host", "evil.example")],
        1 => &[("upgrade", "websocket"), ("connection", "upgrade")],
        2 => &[("expect", "200-ok")],
        3 => &[("content-type", "text/html")],
        _ => &[],
    };
    request(target, &line, headers, random.pick(&["", "{}", "null", "[1]"]))
}

/// Text that is not UTF-8, not JSON, or not text.
fn bad_text(target: &Target, random: &mut Random) -> Vec<u8> {
    let piece = random.pick::<&[u8]>(&[
        &b"\xff\xfe"[..],
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\\udc00\\ud800",
        b"\\u0000",
        b"\\x41",
        b"\n",
        b"\0",
        b"\\",
        b"<|im_start|>",
        b"</s><s>[INST]",
    ]);
    let mut body =
        format!("{{\"model\": {}, \"max_tokens\": 1, \"prompt\": \"", json!(target.model))
            .into_bytes();
    for _ in 0..1 + random.below(200) {
        body.extend_from_slice(piece);
    }
    let ends: [&[u8]; 5] = [b"\"}", b"\"", b"\"}}", b"\"} {}", b"\",}"];
    body.extend_from_slice(random.pick(&ends));
    let mut bytes = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n{}\
         content-length: {}\r\n\r\n",
        target.address,
        target
            .api_key
            .as_ref()
            .map_or_else(String::new, |key| format!("authorization: Bearer {key}\r\n")),
        body.len()
    )
    .into_bytes();
    bytes.extend(body);
    bytes
}

fn bad_form(target: &Target, random: &mut Random) -> String {
    let part = |name: &str, file: Option<&str>, content: &str| {
        let file = file.map_or_else(String::new, |file| format!("; filename=\"{file}\""));
        format!("--b\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n{content}\r\n")
    };
    let names = ["name", "base", "scale", "file", "adapter_config.json", "", "x"];
    let files = [
        "a.gguf",
        "adapter_config.json",
        "adapter_model.safetensors",
        "../../../../etc/passwd.gguf",
        "/etc/passwd",
        "\\\\host\\x.gguf",
        ".gguf",
    ];
    let contents =
        ["", "a", "GGUF\u{3}\0\0\0", "{}", "NaN", "{\"peft_type\": \"LORA\", \"r\": -1}"];
    let mut body = String::new();
    for _ in 0..random.below(20) {
        let file = random.chance(2).then(|| random.pick(&files));
        body.push_str(&part(random.pick(&names), file, random.pick(&contents)));
    }
    match random.below(4) {
        0 => {}
        1 => body.push_str("--b"),
        2 => body.insert_str(0, "preamble"),
        _ => body.push_str("--b--\r\n"),
    }
    let kind = random.pick(&[
        "multipart/form-data; boundary=b",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=\"b",
        "multipart/mixed; boundary=b",
    ]);
    let line = random.pick(&["POST /admin/adapters", "POST /v1/chat/completions"]);
    request(target, line, &[("content-type", kind)], &body)
}

/// Bodies whose declared length is wrong.
fn bad_framing(target: &Target, random: &mut Random) -> String {
    let head = |line: &str| {
        format!("{line} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n", target.address)
    };
    let head = head("POST /v1/completions");
    match random.below(9) {
        0 => format!("{head}transfer-encoding: chunked\r\n\r\nzz\r\n{{}}\r\n0\r\n\r\n"),
        1 => format!("{head}transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n{{}}"),
        2 => format!(
            "{head}transfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n{}",
            "t: x\r\n".repeat(5_000)
        ),
        3 => format!("{head}transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n{{}}"),
        4 => format!("{head}content-length: 18446744073709551616\r\n\r\n{{}}"),
        5 => format!("{head}content-length: -1\r\n\r\n{{}}"),
        6 => format!("{head}content-length: 99999999999\r\n\r\n{{}}"),
        7 => format!("{head}content-length: 2\r\n\r\n{{}}GET /health HTTP/1.1\r\n\r\n\r\n\r\n{{}}"),
        _ => format!("{head}content-encoding: gzip\r\ncontent-length: 2\r\n\r\n\u{1f}\u{b}"),
    }
}

fn bad_grammar(target: &Target, random: &mut Random) -> String {
    let schema = |schema: Value| {
        let named = json!({"name": "s", "schema": schema});
        json!({"type": "json_schema", "json_schema": named})
    };
    let formats = [
        json!({"type": "regex", "regex": "((a{1,1000}){1,1000}){1,1000}"}),
        json!({"type": "regex", "regex": "(((("}),
        json!({"type": "regex", "regex": "[z-a]"}),
        json!({"type": "regex", "regex": "(a|b|".repeat(500)}),
        json!({"type": "regex", "regex": ""}),
        json!({"type": "grammar", "grammar": "start: start"}),
        json!({"type": "grammar", "grammar": "start: nothing"}),
        json!({"type": "grammar", "grammar": "x".repeat(100_000)}),
        json!({"type": "grammar", "grammar": "start: \"a\"~1..1000000000"}),
        json!({"type": "grammar"}),
        json!({"type": "no such type"}),
        json!({"type": "json_schema"}),
        schema(json!({"$ref": "#"})),
        schema(json!({"$ref": "http://evil.example/schema"})),
        schema(json!({"$ref": "file:///etc/passwd"})),
        schema(json!({"type": "no such type"})),
        schema(json!({"type": "string", "pattern": "(?<=a)b\\1"})),
        schema(json!({"type": "string", "minLength": 1u64 << 60})),
        schema(json!({"type": "array", "minItems": 1_000_000_000, "maxItems": 1})),
        schema(json!({"enum": []})),
        schema(json!({"not": {}})),
        schema(json!({"allOf": [{"type": "string"}, {"type": "number"}]})),
        schema(
            json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "required": ["a"]}),
        ),
        schema(json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
        schema(json!(true)),
        schema(json!(5)),
    ];
    let body = json!({
        "model": target.model, "max_tokens": 4,
        "messages": [{"role": "user", "content": "Hello"}],
        "response_format": random.pick(&formats), "stream": random.chance(2),
    });
    request(target, "POST /v1/chat/completions", &[], &body.to_string())
}

fn bad_conversation(target: &Target, random: &mut Random) -> String {
    let call = |arguments: &str| json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
    let messages = [
        json!([]),
        json!([{}]),
        json!([{"role": "user"}]),
        json!([{"role": "nobody", "content": "a"}]),
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
        json!([{"role": "user", "content": {"text": "a"}}]),
        json!([{"role": "assistant", "tool_calls": call("{not json")}]),
        json!([{"role": "assistant", "content": null, "tool_calls": call("[1]")}]),
        json!([{"role": "tool", "content": "a", "tool_call_id": "nobody"}]),
        json!([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
        json!([{"role": "user", "content": "{{ raise_exception('x') }}{% for x in range(999999) %}"}]),
        json!([{"role": "user", "content": "a ".repeat(200_000)}]),
        Value::Array(vec![json!({"role": "user", "content": "a"}); 20_000]),
    ];
    let extras = [
        json!({}),
        json!({"n": 1_000_000}),
        json!({"stop": vec!["x"; 10_000]}),
        json!({"logit_bias": {"999999999": 1, "-1": 5, "x": 1}}),
        json!({"top_logprobs": 1_000, "logprobs": true}),
        json!({"tools": [{"type": "function", "function": {"name": "a b\n"}}]}),
        json!({"tools": vec![json!({"type": "function", "function": {"name": "f"}}); 2_000]}),
        json!({"tool_choice": {"type": "function", "function": {"name": "missing"}}}),
        json!({"tool_choice": "required"}),
        json!({"chat_template_kwargs": {"messages": 5, "add_generation_prompt": "x"}}),
        json!({"model": "x".repeat(100_000)}),
        json!({"model": "../../etc/passwd"}),
        json!({"stream_options": {"include_usage": true}}),
        json!({"audio": {"voice": "x"}, "modalities": ["audio"]}),
    ];
    let mut body = json!({"model": target.model, "max_tokens": 2});
    body["messages"] = random.pick(&messages);
    if let (Some(body), Some(extra)) = (body.as_object_mut(), random.pick(&extras).as_object()) {
        body.extend(extra.clone());
    }
    request(target, "POST /v1/chat/completions", &[], &body.to_string())
}

/// The SplitMix64 random generator.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `bound`, exclusive.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// True with probability 1 / `times`.
    fn chance(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    fn letter(&mut self) -> char {
        char::from(b'a' + self.below(26) as u8)
    }

    fn pick<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())].clone()
    }
}
