use super::*;

fn parse(value: Value) -> Grader {
    Grader::parse(value).unwrap()
}

fn grade(grader: Value, item: &Value, output: &str) -> Graded {
    parse(grader).grade(&Context::new(item, output), &[])
}

/// The reward of a grader that must not fail.
fn reward(grader: Value, output: &str) -> f64 {
    let graded = grade(grader, &json!({}), output);
    assert!(!graded.errors.any() && graded.reasons.is_empty(), "{graded:?}");
    graded.reward
}

fn answer(number: impl Into<Option<f64>>) -> Result<Answer, Failed> {
    Ok(Answer { number: number.into(), prompt_tokens: 10, completion_tokens: 3, reasoning: None })
}

/// `value` with the keys of `more` replaced; null removes a key.
fn with(mut value: Value, more: Value) -> Value {
    for (key, new) in more.as_object().unwrap() {
        value[key] = new.clone();
    }
    value
}

fn string_check() -> Value {
    json!({"type": "string_check", "name": "s", "operation": "eq",
           "input": "{{sample.output_text}}", "reference": "{{item.answer}}"})
}

fn score_model() -> Value {
    json!({"type": "score_model", "name": "judge", "model": "m", "input": [
        {"role": "system", "content": "Score it."},
        {"role": "user", "content": [
            {"type": "input_text", "text": "Q: {{item.q}}"},
            {"type": "text", "text": "A: {{sample.output_text}}"},
        ]},
    ]})
}

fn reward_model() -> Value {
    json!({"type": "reward_model", "name": "rm", "model": "r"})
}

fn multi() -> Value {
    json!({"type": "multi", "name": "both", "graders": {"a": string_check(), "b": score_model()},
           "calculate_output": "0.75 * a + b / 4"})
}

#[test]
fn missing_keys_are_found_whatever_the_sample_is() {
    let nested = with(string_check(), json!({"reference": "{{item.a.b.0}}"}));
    let output_first = with(
        string_check(),
        json!({"input": "{{sample.output_json.x}}", "reference": "{{item.answer}}"}),
    );
    for (grader, item, missing) in [
        (string_check(), json!({"answer": 1}), None),
        (string_check(), json!({"answr": 1}), Some("item has no \"answer\"")),
        (score_model(), json!({"answer": 1}), Some("item has no \"q\"")),
        (multi(), json!({"answer": 1}), Some("item has no \"q\"")),
        (multi(), json!({"answer": 1, "q": 2}), None),
        (nested.clone(), json!({"a": {"b": [3]}}), None),
        (nested.clone(), json!({"a": {"b": []}}), Some("item.a.b has no \"0\"")),
        (nested, json!({"a": 1}), Some("item.a has no \"b\"")),
        (output_first, json!({}), Some("item has no \"answer\"")),
    ] {
        let found = parse(grader).missing_key(&item);
        assert_eq!(found.is_some(), missing.is_some(), "{item}: {found:?}");
        assert!(found.unwrap_or_default().contains(missing.unwrap_or_default()), "{item}");
    }
}

#[test]
fn strings_are_compared() {
    for (operation, output, reference, expected) in [
        ("eq", "Paris", "Paris", 1.0),
        ("eq", "paris", "Paris", 0.0),
        ("eq", "Paris ", "Paris", 0.0),
        ("ne", "Paris", "Paris", 0.0),
        ("ne", "paris", "Paris", 1.0),
        ("like", "It is Paris.", "Paris", 1.0),
        ("like", "It is paris.", "Paris", 0.0),
        ("like", "Par", "Paris", 0.0),
        ("like", "anything", "", 1.0),
        ("ilike", "It is PARIS.", "paris", 1.0),
        ("ilike", "in der STRASSE", "Straße", 0.0),
        ("ilike", "ΟΔΌΣ", "οδό", 1.0),
        ("ilike", "Rome", "paris", 0.0),
    ] {
        let grader = with(string_check(), json!({"operation": operation}));
        let graded = grade(grader, &json!({"answer": reference}), output);
        assert_eq!(graded.reward, expected, "{operation} {output} {reference}");
        assert!(graded.sub_rewards.is_empty());
    }
}

#[test]
fn ours_have_their_rewards() {
    let number = json!({"type": "number_match", "reference": "#### 1,200", "marker": "####"});
    assert_eq!(reward(number.clone(), "so it is $1200.00."), 1.0);
    assert_eq!(reward(number.clone(), "#### 1200\nor 7"), 1.0);
    assert_eq!(reward(number, "no idea"), 0.0);

    let schema = json!({"type": "json_schema", "schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
        "additionalProperties": false,
    }});
    assert_eq!(reward(schema.clone(), "{\"a\": 1}"), 1.0);
    assert_eq!(reward(schema.clone(), "```json\n{\"a\": 1}\n```"), 1.0);
    for bad in ["{\"a\": 1.5}", "{\"a\": 1, \"b\": 2}", "{}", "a: 1", "", "{\"a\": 1} "] {
        assert_eq!(reward(schema.clone(), bad), f64::from(u8::from(bad == "{\"a\": 1} ")), "{bad}");
    }

    let words = json!({"type": "length", "unit": "words", "min": 2, "max": 4, "slack": 4});
    for (text, expected) in
        [("", 0.5), ("a", 0.75), ("a b", 1.0), ("a b c d", 1.0), ("a b c d e", 0.75)]
    {
        assert_eq!(reward(words.clone(), text), expected, "{text}");
    }
    assert_eq!(reward(words.clone(), "a b c d e f g h"), 0.0);
    assert_eq!(reward(words, &"a ".repeat(1000)), 0.0);
    let characters = json!({"type": "length", "unit": "characters", "max": 3});
    assert_eq!(reward(characters.clone(), "äöü"), 1.0);
    assert_eq!(reward(characters, "äöüß"), 0.0);

    let regex = json!({"type": "regex", "pattern": "(?i)^answer: \\d+$"});
    assert_eq!(reward(regex.clone(), "Answer: 42"), 1.0);
    assert_eq!(reward(regex, "The answer: 42"), 0.0);
    let similar = json!({"type": "text_similarity", "evaluation_metric": "fuzzy_match",
                         "input": "{{sample.output_text}}", "reference": "abcd"});
    assert_eq!(reward(similar, "abce"), 0.75);
}

#[test]
fn a_model_is_asked_for_a_number() {
    let item = json!({"q": "2+2?"});
    let context = Context::new(&item, "4");
    let sampling = json!({"temperature": 0.2, "top_p": 1, "seed": -1,
                          "max_completions_tokens": 50, "reasoning_effort": "low"});
    let grader = parse(with(score_model(), json!({"range": [0, 10], "sampling_params": sampling})));
    let message =
        |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let ask = Ask::Number {
        messages: vec![message("system", "Score it."), message("user", "Q: 2+2?\nA: 4")],
        range: (0.0, 10.0),
        sampling: Sampling {
            temperature: Some(0.2),
            top_p: Some(1.0),
            seed: Some(-1),
            max_completions_tokens: Some(50),
        },
    };
    assert_eq!(grader.questions(&context), [Question { model: "m".to_owned(), ask }]);
    assert_eq!(grader.models(), BTreeMap::from([("m", false)]));

    let graded = grader.grade(&context, &[answer(7.5)]);
    assert_eq!((graded.reward, graded.errors.any()), (7.5, false));
    let usage = Usage { prompt_tokens: 10, completion_tokens: 3 };
    assert_eq!(usage.total_tokens(), 13);
    assert_eq!(graded.usage, BTreeMap::from([("m".to_owned(), usage)]));

    for bad in [answer(10.01), answer(-0.1), answer(None), answer(f64::NAN)] {
        let graded = grader.grade(&context, &[bad]);
        assert_eq!(graded.reward, 0.0);
        assert!(graded.errors.model_grader_parse_error && graded.reasons.len() == 1);
        assert_eq!(graded.usage.len(), 1, "failed gradings count too");
    }
    let failed =
        |refused| Err(Failed { refused, permanent: false, message: "engine died".to_owned() });
    let graded = grader.grade(&context, &[failed(true)]);
    assert!(graded.errors.model_grader_refusal_error && !graded.errors.model_grader_server_error);
    let graded = grader.grade(&context, &[failed(false)]);
    assert!(graded.errors.model_grader_server_error);
    assert_eq!(graded.errors.model_grader_server_error_details.as_deref(), Some("engine died"));
    assert_eq!(graded.reasons, ["judge: engine died"]);
    // Neither a missing answer nor a surplus one panics.
    assert!(grader.grade(&context, &[]).errors.model_grader_server_error);
    assert_eq!(grader.grade(&context, &[answer(1.0), answer(2.0)]).reward, 1.0);
}

#[test]
fn a_reward_model_scores_the_conversation() {
    let item = json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "2+2?"}], "weight": 1},
    ]});
    let context = Context::new(&item, "4");
    let grader = parse(reward_model());
    let questions = grader.questions(&context);
    let Ask::Score { messages } = &questions[0].ask else { panic!("{questions:?}") };
    let all: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(all, [("user", "2+2?"), ("assistant", "4")]);
    assert_eq!(grader.grade(&context, &[answer(-3.5)]).reward, -3.5);
    assert_eq!(grader.models(), BTreeMap::from([("r", true)]));

    let sigmoid = parse(with(reward_model(), json!({"scale": "sigmoid"})));
    assert_eq!(sigmoid.grade(&context, &[answer(0.0)]).reward, 0.5);
    assert_eq!(sigmoid.grade(&context, &[answer(-1e308)]).reward, 0.0);
    assert_eq!(sigmoid.grade(&context, &[answer(1e308)]).reward, 1.0);
    let graded = sigmoid.grade(&context, &[answer(f64::INFINITY)]);
    assert!(graded.errors.model_grader_parse_error);

    let input = json!([{"role": "user", "content": "{{sample.output_text}}"}]);
    let own = parse(with(reward_model(), json!({"input": input})));
    assert_eq!(own.questions(&context).len(), 1);

    for item in [
        json!({}),
        json!(null),
        json!({"messages": "hi"}),
        json!({"messages": [{"role": "user"}]}),
        json!({"messages": [{"role": "user", "content": null}]}),
        json!({"messages": [{"role": 1, "content": ""}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}),
        json!({"messages": [7]}),
    ] {
        let context = Context::new(&item, "4");
        assert!(grader.questions(&context).is_empty());
        assert!(grader.grade(&context, &[]).errors.invalid_variable_error, "{item}");
    }
    let turn = json!({"role": "user", "content": "x".repeat(2000)});
    for turns in [vec![turn.clone(); 1025], vec![turn; 600]] {
        let item = json!({"messages": turns});
        assert!(grader.grade(&Context::new(&item, ""), &[]).errors.other_error);
    }
}

#[test]
fn a_multi_computes_its_formula() {
    let item = json!({"q": "2+2?", "answer": "4"});
    let context = Context::new(&item, "4");
    let grader = parse(multi());
    assert_eq!(grader.questions(&context).len(), 1);
    let graded = grader.grade(&context, &[answer(0.5)]);
    assert_eq!(graded.reward, 0.875);
    let sub = |a, b| BTreeMap::from([("a".to_owned(), a), ("b".to_owned(), b)]);
    assert_eq!(graded.sub_rewards, sub(1.0, 0.5));
    assert!(!graded.errors.any());
    assert_eq!((grader.kind(), grader.name()), ("multi", "both"));

    // A grader that failed counts as 0 and sets its flag.
    let graded = grader.grade(&context, &[answer(None)]);
    assert_eq!((graded.reward, &graded.sub_rewards), (0.75, &sub(1.0, 0.0)));
    assert!(graded.errors.model_grader_parse_error);
    let inverse = parse(with(multi(), json!({"calculate_output": "1 / b"})));
    let graded = inverse.grade(&context, &[answer(0.0)]);
    assert!(graded.errors.formula_parse_error && graded.reward == 0.0);

    // A question that could not be rendered does not take the answer of the next one.
    let graders = json!({"x": score_model(), "y": with(score_model(), json!({"model": "n",
        "input": [{"role": "user", "content": "{{sample.output_text}}"}]}))});
    let two = parse(with(multi(), json!({"graders": graders, "calculate_output": "x + y"})));
    let item = json!({});
    let context = Context::new(&item, "4");
    let questions = two.questions(&context);
    assert_eq!(questions.iter().map(|q| q.model.as_str()).collect::<Vec<_>>(), ["n"]);
    let graded = two.grade(&context, &[answer(1.0)]);
    assert_eq!((graded.reward, graded.errors.invalid_variable_error), (1.0, true));
    assert_eq!(graded.reasons, ["x: item has no \"q\""]);
    assert_eq!(graded.usage.keys().collect::<Vec<_>>(), ["n"]);

    // The other forms of `graders`.
    let list = json!([with(string_check(), json!({"name": "one"})), score_model()]);
    let grader = parse(with(multi(), json!({"graders": list, "calculate_output": "one+judge"})));
    assert_eq!(grader.leaves.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["one", "judge"]);
    let single = parse(with(multi(), json!({"graders": string_check(), "calculate_output": "s"})));
    let item = json!({"answer": "4"});
    assert_eq!(single.grade(&Context::new(&item, "4"), &[]).reward, 1.0);
}

#[test]
fn faults_have_their_flags() {
    let flag = |grader: Value, output: &str| {
        let graded = grade(grader, &json!({"n": null}), output);
        assert!(graded.reward == 0.0 && graded.reasons.len() == 1, "{graded:?}");
        serde_json::to_value(graded.errors).unwrap()
    };
    assert_eq!(flag(string_check(), "")["invalid_variable_error"], true);
    let json = with(string_check(), json!({"reference": "{{sample.output_json.a}}"}));
    assert_eq!(flag(json.clone(), "not JSON")["sample_parse_error"], true);
    assert_eq!(flag(json, "{}")["invalid_variable_error"], true);
    let number = json!({"type": "number_match", "reference": "{{item.n}}"});
    assert_eq!(flag(number, "4")["invalid_variable_error"], true);
    let similar = json!({"type": "text_similarity", "evaluation_metric": "rouge_l",
                         "input": "{{sample.output_text}}", "reference": "x"});
    assert_eq!(flag(similar, &"ä".repeat(65_537))["other_error"], true);
    let regex = json!({"type": "regex", "pattern": "x"});
    assert_eq!(flag(regex, &"x".repeat(65_537))["other_error"], true);
}

/// The names of OpenAI's `GraderRunResponse.metadata.errors`.
#[test]
fn flags_are_those_of_openai() {
    let Value::Object(errors) = serde_json::to_value(Errors::default()).unwrap() else { panic!() };
    let mut names: Vec<&str> = errors.keys().map(String::as_str).collect();
    names.sort_unstable();
    let expected = [
        "formula_parse_error",
        "invalid_variable_error",
        "model_grader_parse_error",
        "model_grader_refusal_error",
        "model_grader_server_error",
        "model_grader_server_error_details",
        "other_error",
        "python_grader_runtime_error",
        "python_grader_runtime_error_details",
        "python_grader_server_error",
        "python_grader_server_error_type",
        "sample_parse_error",
        "truncated_observation_error",
        "unresponsive_reward_error",
    ];
    assert_eq!(names, expected);
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn errors_name_the_key_and_what_it_may_be() {
    let ours = |kind: &str, more: Value| with(json!({"type": kind}), more);
    let message = |more: Value| {
        with(score_model(), json!({"input": [with(json!({"role": "user", "content": "x"}), more)]}))
    };
    let inside = |key: &str, grader: Value| {
        let mut multi = multi();
        multi["graders"][key] = grader;
        multi
    };
    let many: serde_json::Map<_, _> =
        (0..33).map(|index| (format!("g{index}"), string_check())).collect();
    let (text, name) = ("x".repeat((1 << 20) + 1), "n".repeat(257));
    let wide = vec![json!({"role": "user", "content": "x"}); 65];
    for (value, param, part) in [
        (json!(7), "grader", "must be an object, got 7"),
        (json!({}), "grader.type", "Missing required parameter: 'grader.type'."),
        (json!({"type": 1}), "grader.type", "one of string_check, text_similarity, score_model"),
        (json!({"type": "label_model"}), "grader.type", "one of string_check"),
        (
            json!({"type": "python", "source": "x"}),
            "grader.type",
            "Python is not run here. There are string_check",
        ),
        (
            with(string_check(), json!({"operation": "is"})),
            "grader.operation",
            "one of eq, ne, like, ilike, got \"is\"",
        ),
        (with(string_check(), json!({"operation": null})), "grader.operation", "Missing"),
        (with(string_check(), json!({"input": null})), "grader.input", "Missing"),
        (with(string_check(), json!({"input": 5})), "grader.input", "must be a string, got 5"),
        (with(string_check(), json!({"input": text})), "grader.input", "1048576"),
        (with(string_check(), json!({"reference": "{{item.x"})), "grader.reference", "not closed"),
        (
            with(string_check(), json!({"reference": "{{ref}}"})),
            "grader.reference",
            "{{ref}} names nothing: there are item",
        ),
        (with(string_check(), json!({"name": ""})), "grader.name", "must not be empty"),
        (with(string_check(), json!({"name": name})), "grader.name", "at most 256 bytes"),
        (with(string_check(), json!({"name": ["x"]})), "grader.name", "a string, got a list of 1"),
        (
            with(string_check(), json!({"extra": 1})),
            "grader.extra",
            "Unrecognized request argument: grader.extra",
        ),
        (
            with(string_check(), json!({"evaluation_metric": "bleu"})),
            "grader.evaluation_metric",
            "Unrecognized",
        ),
        (
            ours("text_similarity", json!({"evaluation_metric": "cosine"})),
            "grader.evaluation_metric",
            "fuzzy_match, bleu, gleu, rouge_1, rouge_2, rouge_3, rouge_4, rouge_5, rouge_l, got \"cosine\"",
        ),
        (
            ours("text_similarity", json!({"evaluation_metric": "meteor"})),
            "grader.evaluation_metric",
            "got \"meteor\"",
        ),
        (ours("number_match", json!({})), "grader.reference", "Missing"),
        (ours("number_match", json!({"reference": "1", "marker": ""})), "grader.marker", "empty"),
        (
            ours("number_match", json!({"reference": "1", "tolerance": -1})),
            "grader.tolerance",
            "a number between 0 and",
        ),
        (ours("json_schema", json!({})), "grader.schema", "Missing"),
        (
            ours("json_schema", json!({"schema": "x"})),
            "grader.schema",
            "must be a JSON schema: an object",
        ),
        (
            ours("json_schema", json!({"schema": {"type": "thing"}})),
            "grader.schema",
            "must be a JSON schema",
        ),
        (
            ours("json_schema", json!({"schema": {"pattern": "(?=x)"}})),
            "grader.schema",
            "must be a JSON schema",
        ),
        (
            ours("json_schema", json!({"schema": {"$ref": "https://example.com/s.json"}})),
            "grader.schema",
            "nothing is fetched",
        ),
        (
            ours("json_schema", json!({"schema": {"$ref": "file:///etc/passwd"}})),
            "grader.schema",
            "nothing is fetched",
        ),
        (
            ours("json_schema", json!({"schema": {"$ref": "#/$defs/x"}})),
            "grader.schema",
            "which is not in it",
        ),
        (
            ours("json_schema", json!({"schema": {"$schema": "https://example.com/draft"}})),
            "grader.schema",
            "must be a JSON schema",
        ),
        (
            ours("json_schema", json!({"schema": {"const": "x".repeat(65 << 10)}})),
            "grader.schema",
            "at most 65536 bytes",
        ),
        (ours("length", json!({"max": 3})), "grader.unit", "Missing"),
        (
            ours("length", json!({"unit": "tokens", "max": 3})),
            "grader.unit",
            "one of characters, words",
        ),
        (ours("length", json!({"unit": "words"})), "grader.min", "or max must be given"),
        (
            ours("length", json!({"unit": "words", "min": 3, "max": 2})),
            "grader.min",
            "at most max, 2, got 3",
        ),
        (
            ours("length", json!({"unit": "words", "min": 1.5})),
            "grader.min",
            "an integer between 0",
        ),
        (ours("length", json!({"unit": "words", "min": -1})), "grader.min", "an integer between 0"),
        (
            ours("length", json!({"unit": "words", "min": 1, "slack": "x"})),
            "grader.slack",
            "a number",
        ),
        (ours("regex", json!({})), "grader.pattern", "Missing"),
        (ours("regex", json!({"pattern": "("})), "grader.pattern", "must be a pattern"),
        (ours("regex", json!({"pattern": "(?=x)"})), "grader.pattern", "look-around"),
        (ours("regex", json!({"pattern": "((a{99}){99}){99}"})), "grader.pattern", "size limit"),
        (
            ours("regex", json!({"pattern": "(".repeat(4000)})),
            "grader.pattern",
            "must be a pattern",
        ),
        (
            ours("regex", json!({"pattern": "a".repeat(5000)})),
            "grader.pattern",
            "at most 4096 bytes",
        ),
        (with(score_model(), json!({"model": null})), "grader.model", "Missing"),
        (with(score_model(), json!({"input": null})), "grader.input", "Missing"),
        (with(score_model(), json!({"input": []})), "grader.input", "a list of 1 to 64 elements"),
        (with(score_model(), json!({"input": wide})), "grader.input", "a list of 1 to 64 elements"),
        (with(score_model(), json!({"input": ["x"]})), "grader.input[0]", "an object, got \"x\""),
        (
            message(json!({"role": "tool"})),
            "grader.input[0].role",
            "one of user, assistant, system, developer",
        ),
        (message(json!({"content": null})), "grader.input[0].content", "Missing"),
        (message(json!({"content": []})), "grader.input[0].content", "1 to 64"),
        (
            message(json!({"content": 5})),
            "grader.input[0].content",
            "a string or an object with a text",
        ),
        (message(json!({"content": "{{x}}"})), "grader.input[0].content", "names nothing"),
        (
            message(json!({"content": [{"type": "input_image", "image_url": "x"}]})),
            "grader.input[0].content[0].type",
            "one of input_text, output_text, text",
        ),
        (
            message(json!({"content": ["a", {"type": "text"}]})),
            "grader.input[0].content[1].text",
            "Missing",
        ),
        (
            message(json!({"content": [{"type": "text", "text": "x", "y": 1}]})),
            "grader.input[0].content[0].y",
            "Unrecognized",
        ),
        (message(json!({"type": "reasoning"})), "grader.input[0].type", "one of message"),
        (message(json!({"name": "x"})), "grader.input[0].name", "Unrecognized"),
        (
            with(score_model(), json!({"range": [1, 0]})),
            "grader.range",
            "two numbers, the smaller one first, got [1,0]",
        ),
        (with(score_model(), json!({"range": [1, 1]})), "grader.range", "two numbers"),
        (with(score_model(), json!({"range": [0, 1, 2]})), "grader.range", "two numbers"),
        (with(score_model(), json!({"range": [-1e308, 1e308]})), "grader.range", "two numbers"),
        (with(score_model(), json!({"range": "0-1"})), "grader.range", "two numbers"),
        (with(score_model(), json!({"sampling_params": 1})), "grader.sampling_params", "an object"),
        (
            with(score_model(), json!({"sampling_params": {"temperature": 3}})),
            "grader.sampling_params.temperature",
            "between 0 and 2",
        ),
        (
            with(score_model(), json!({"sampling_params": {"max_completions_tokens": 0}})),
            "grader.sampling_params.max_completions_tokens",
            "an integer between 1",
        ),
        (
            with(score_model(), json!({"sampling_params": {"reasoning_effort": "huge"}})),
            "grader.sampling_params.reasoning_effort",
            "one of none, minimal",
        ),
        (
            with(score_model(), json!({"sampling_params": {"max_tokens": 5}})),
            "grader.sampling_params.max_tokens",
            "Unrecognized",
        ),
        (with(reward_model(), json!({"scale": "log"})), "grader.scale", "one of raw, sigmoid"),
        (with(reward_model(), json!({"range": [0, 1]})), "grader.range", "Unrecognized"),
        (with(multi(), json!({"graders": null})), "grader.graders", "Missing"),
        (with(multi(), json!({"graders": {}})), "grader.graders", "1 to 32 graders, got 0"),
        (with(multi(), json!({"graders": many})), "grader.graders", "1 to 32 graders, got 33"),
        (with(multi(), json!({"graders": 5})), "grader.graders", "an object of graders"),
        (with(multi(), json!({"graders": {"a": 5}})), "grader.graders.a", "an object, got 5"),
        (
            with(multi(), json!({"graders": [json!({"type": "length"})]})),
            "grader.graders[0].name",
            "Missing",
        ),
        (
            with(multi(), json!({"graders": [string_check(), string_check()]})),
            "grader.graders[1].name",
            "unique",
        ),
        (
            with(multi(), json!({"graders": with(string_check(), json!({"name": "a b"}))})),
            "grader.graders.name",
            "usable in the formula",
        ),
        (inside("a-b", string_check()), "grader.graders.a-b", "usable in the formula"),
        (inside("min", string_check()), "grader.graders.min", "usable in the formula"),
        (inside("c", multi()), "grader.graders.c.type", "cannot be multi inside a multi"),
        (inside("c", json!({"type": "python"})), "grader.graders.c.type", "Python is not run here"),
        (
            inside("a", with(string_check(), json!({"operation": 1}))),
            "grader.graders.a.operation",
            "one of eq",
        ),
        (
            inside(
                "b",
                with(
                    score_model(),
                    json!({"input": [{"role": "user", "content": [{"type": "text", "text": "{{y}}"}]}]}),
                ),
            ),
            "grader.graders.b.input[0].content[0].text",
            "names nothing",
        ),
        (with(multi(), json!({"calculate_output": null})), "grader.calculate_output", "Missing"),
        (
            with(multi(), json!({"calculate_output": "a + c"})),
            "grader.calculate_output",
            "c is no grader here: there are a, b",
        ),
        (
            with(multi(), json!({"calculate_output": "a +"})),
            "grader.calculate_output",
            "is no valid formula",
        ),
        (
            with(multi(), json!({"calculate_output": "1+".repeat(3000)})),
            "grader.calculate_output",
            "at most 4096 bytes",
        ),
        (with(multi(), json!({"reward": 1})), "grader.reward", "Unrecognized"),
    ] {
        let error = Grader::parse(value).unwrap_err();
        assert_eq!(error.param, param, "{error}");
        assert!(error.message.contains(part), "{param}: {error}");
        assert!(error.message.contains(param) && error.message.len() < 800, "{error}");
    }
    let error = Grader::parse_at("method.reinforcement.grader", json!({})).unwrap_err();
    assert_eq!(error.param, "method.reinforcement.grader.type");
}

#[test]
fn the_normal_form_reads_back() {
    let text = "{{item.a}} \u{202e}é";
    let part =
        json!({"role": "user", "content": [{"type": "text", "text": "{{sample.output_json}}"}]});
    for (value, normal) in [
        (string_check(), None),
        (
            json!({"type": "text_similarity", "name": "t", "input": text, "reference": "",
                "evaluation_metric": "rouge_l"}),
            None,
        ),
        (
            score_model(),
            Some(json!({"type": "score_model", "name": "judge", "model": "m", "input": [
            {"role": "system", "content": "Score it."},
            {"role": "user", "content": [
                {"type": "input_text", "text": "Q: {{item.q}}"},
                {"type": "input_text", "text": "A: {{sample.output_text}}"},
            ]},
        ], "range": [0.0, 1.0], "sampling_params": {}})),
        ),
        (
            with(
                score_model(),
                json!({"range": [-1, 0.1], "sampling_params": {"seed": 7, "top_p": 0.1,
            "reasoning_effort": "high"}}),
            ),
            None,
        ),
        (reward_model(), Some(with(reward_model(), json!({"scale": "raw"})))),
        (with(reward_model(), json!({"name": null, "input": [part], "scale": "sigmoid"})), None),
        (
            json!({"type": "number_match", "reference": "{{item.answer}}"}),
            Some(json!({"type": "number_match", "name": "number_match",
                "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
                "tolerance": 1e-6})),
        ),
        (json!({"type": "number_match", "reference": "1", "marker": "####", "tolerance": 0}), None),
        (json!({"type": "json_schema", "schema": {"type": "object", "minProperties": 1}}), None),
        (
            json!({"type": "length", "unit": "words", "max": 5}),
            Some(json!({"type": "length", "name": "length", "input": "{{sample.output_text}}",
                "unit": "words", "max": 5, "slack": 0.0})),
        ),
        (json!({"type": "regex", "pattern": "^\\p{Greek}+$"}), None),
        (multi(), None),
        (
            with(
                multi(),
                json!({"name": null, "graders": [score_model(), string_check()],
            "calculate_output": "max(judge, s)^2"}),
            ),
            None,
        ),
    ] {
        let grader = parse(value);
        let written = serde_json::to_value(&grader).unwrap();
        if let Some(normal) = normal {
            assert_eq!(written, normal);
        }
        let text = serde_json::to_string(&grader).unwrap();
        let again: Grader = serde_json::from_str(&text).unwrap();
        assert_eq!(again, grader);
        assert_eq!(serde_json::to_value(&again).unwrap(), written);
        assert_eq!(written["type"], grader.kind());
        assert_eq!(written["name"], grader.name());
    }
    let error = serde_json::from_str::<Grader>("{\"type\": \"python\"}").unwrap_err();
    assert!(error.to_string().contains("Python is not run here"));
    assert_ne!(parse(string_check()), parse(with(string_check(), json!({"operation": "ne"}))));
}

#[test]
fn hostile_patterns_are_quick() {
    let start = std::time::Instant::now();
    for (pattern, text) in [
        ("(a+)+$", "a".repeat(60_000) + "b"),
        ("(x+x+)+y", "x".repeat(60_000)),
        ("(a|aa)+$", "a".repeat(60_000) + "!"),
        ("(.*?,){40}P", "1,".repeat(30_000)),
        ("[ab]*a[ab]{400}c", "ab".repeat(30_000)),
        ("(?:[^z]{1,50}){20}z", "é".repeat(60_000)),
    ] {
        // A pattern that would need too much memory is refused.
        let Ok(grader) = Grader::parse(json!({"type": "regex", "pattern": pattern})) else {
            continue;
        };
        let graded = grader.grade(&Context::new(&json!({}), &text), &[]);
        assert_eq!(graded.reward, 0.0, "{pattern}");
    }
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
}

#[test]
fn hostile_schemas_are_quick() {
    let start = std::time::Instant::now();
    let grade = |schema: Value, text: &str| {
        let grader = json!({"type": "json_schema", "schema": schema});
        Grader::parse(grader)
            .map(|grader| grader.grade(&Context::new(&json!({}), text), &[]).reward)
    };
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    // Two references at every depth.
    let twice = json!({"$ref": "#/$defs/n", "$defs": {"n": {
        "allOf": [{"items": {"$ref": "#/$defs/n"}}, {"items": {"$ref": "#/$defs/n"}}]}}});
    assert!(grade(twice, &deep).is_err());
    // Two references at every name, and a failure at their end.
    let mut defs = serde_json::Map::new();
    for at in 0..60 {
        let next = json!({"$ref": format!("#/$defs/d{}", at + 1)});
        defs.insert(format!("d{at}"), json!({"anyOf": [next, next]}));
    }
    defs.insert("d60".to_owned(), json!({"type": "string"}));
    let ladder = json!({"$ref": "#/$defs/d0", "$defs": defs});
    assert!(grade(ladder, "1").is_err());
    // A schema that refers to itself directly.
    assert!(grade(json!({"$ref": "#"}), "1").is_err());
    let circle = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
    assert!(grade(circle, "1").is_err());
    // A definition that is used twice applies in both places.
    let pair = json!({"$defs": {"n": {"type": "integer"}}, "required": ["a", "b"],
        "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n", "minimum": 3}}});
    assert_eq!(grade(pair.clone(), r#"{"a": 1, "b": 3}"#), Ok(1.0));
    assert_eq!(grade(pair.clone(), r#"{"a": 1, "b": 2}"#), Ok(0.0));
    assert_eq!(grade(pair, r#"{"a": "1", "b": 3}"#), Ok(0.0));
    let named =
        json!({"properties": {"definitions": {"type": "string"}, "enum": {"type": "null"}}});
    assert_eq!(grade(named.clone(), r#"{"definitions": 1}"#), Ok(0.0));
    assert_eq!(grade(named, r#"{"definitions": "x", "enum": null}"#), Ok(1.0));
    let strings = json!({"type": "string", "pattern": "(a+)+$"});
    assert_eq!(grade(strings, &format!("\"{}b\"", "a".repeat(50_000))), Ok(0.0));
    let unique = json!({"uniqueItems": true});
    let list = format!("[{}1]", (0..50_000).map(|i| format!("[{i}],")).collect::<String>());
    let _ = grade(unique, &list);
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
}

#[test]
fn hostile_texts_are_graded() {
    let graders = [
        string_check(),
        json!({"type": "number_match", "reference": "7"}),
        json!({"type": "json_schema", "schema": true}),
        json!({"type": "length", "unit": "words", "max": 5, "slack": 1e-3}),
        json!({"type": "regex", "pattern": "\\w+\\s*$"}),
        json!({"type": "text_similarity", "evaluation_metric": "gleu",
               "input": "{{sample.output_text}}", "reference": "a"}),
        score_model(),
    ];
    for text in [
        String::new(),
        "\u{0}\u{1}\u{feff}\u{202e}".to_owned(),
        "e\u{301}".repeat(40_000),
        "𝟙𝟚𝟛 ١٢٣ ４２".to_owned(),
        "[".repeat(1 << 20),
        "{\"a\":".repeat(100_000),
        "9".repeat(1 << 20),
        "-.,$%".repeat(1 << 18),
        "{{item.x}}".to_owned(),
        "x".repeat((1 << 20) + 1),
    ] {
        for grader in &graders {
            let item = json!({"answer": text, "q": text});
            let graded = grade(grader.clone(), &item, &text);
            assert!((0.0..=1.0).contains(&graded.reward) && graded.reasons.len() <= 1);
        }
    }
    // Text that is filled in is not a template itself.
    let item = json!({"answer": "{{item.answer}}"});
    assert_eq!(grade(string_check(), &item, "{{item.answer}}").reward, 1.0);
}
