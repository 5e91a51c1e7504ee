use super::*;

fn take(mut body: Value) -> Result<Common, ApiError> {
    if body.get("model").is_none() {
        body["model"] = json!("m");
    }
    let mut fields = Fields::of(String::new(), body)?;
    let common = Common::take(&mut fields)?;
    take_max_tokens(&mut fields, 1)?;
    fields.finish()?;
    Ok(common)
}

#[test]
fn defaults_are_neutral_and_the_seed_is_drawn() {
    let (one, two) = (take(json!({})).unwrap(), take(json!({})).unwrap());
    assert_ne!(one.sampling.seed, two.sampling.seed);
    let expected = SamplingParams { seed: one.sampling.seed, ..SamplingParams::default() };
    assert_eq!(one.sampling, expected);
    assert_eq!((one.choices, one.priority, one.stream), (1, 0, None));
    assert_eq!(one.stop, StopParams::default());
}

#[test]
fn values_arrive() {
    let common = take(json!({
        "n": 3, "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "typical_p": 0.9,
        "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5,
        "penalty_window": 0, "dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3,
        "dry_penalty_last_n": 64, "dry_sequence_breakers": ["x"], "xtc_probability": 0.5,
        "xtc_threshold": 0.2, "logit_bias": {"5": -100, "7": 1.5}, "seed": -1, "stop": ["a", "b"],
        "stop_token_ids": [2], "ignore_eos": true, "priority": -3, "speculative.n_max": 0,
        "stream": true, "stream_options": {"include_usage": true},
    }))
    .unwrap();
    let sampling = SamplingParams {
        temperature: 0.0,
        top_p: 0.5,
        top_k: 0,
        min_p: 0.1,
        typical_p: 0.9,
        presence_penalty: -2.0,
        frequency_penalty: 2.0,
        repetition_penalty: 1.5,
        penalty_window: 0,
        dry_multiplier: 0.8,
        dry_base: 2.0,
        dry_allowed_length: 3,
        dry_penalty_last_n: 64,
        dry_sequence_breakers: vec!["x".into()],
        xtc_probability: 0.5,
        xtc_threshold: 0.2,
        logit_bias: vec![(5, -100.0), (7, 1.5)],
        seed: u64::MAX,
    };
    assert_eq!(common.sampling, sampling);
    assert_eq!(common.stop.strings, ["a", "b"]);
    assert_eq!((common.stop.token_ids.as_slice(), common.stop.ignore_eos), (&[2][..], true));
    assert_eq!((common.choices, common.priority, common.max_drafted), (3, -3, Some(0)));
    assert_eq!(common.stream, Some(StreamOptions { include_usage: true }));
}

#[test]
fn null_neutral_and_bookkeeping_values_pass() {
    let cases = [
        json!({"temperature": null, "stop": null, "logit_bias": null, "stream": null}),
        json!({"stop": "", "stream": false, "stream_options": null, "n": null}),
        json!({"stop": [], "stop_token_ids": [], "logit_bias": {}, "dry_sequence_breakers": []}),
        json!({"metadata": {"a": "b"}, "store": true, "service_tier": "auto", "user": "u"}),
        json!({"prompt_cache_key": "k", "safety_identifier": "s", "prompt_cache_retention": "24h"}),
        json!({"best_of": 1, "length_penalty": 1.0, "use_beam_search": false, "min_tokens": 0}),
        json!({"n": 4, "best_of": 4}),
        json!({"skip_special_tokens": true, "whatever": null, "another": []}),
        json!({"max_tokens": 5, "max_completion_tokens": 5}),
    ];
    for body in cases {
        take(body.clone()).unwrap_or_else(|error| panic!("{body}: {error}"));
    }
}

#[test]
fn bad_values_are_400_and_named() {
    let many: Vec<String> = (0..17).map(|number| number.to_string()).collect();
    let biases: serde_json::Map<String, Value> =
        (0..1025).map(|number: u32| (number.to_string(), json!(1))).collect();
    let cases = [
        (json!({"model": ""}), "model"),
        (json!({"model": 1}), "model"),
        (json!({"model": "m".repeat(600)}), "model"),
        (json!({"n": 0}), "n"),
        (json!({"n": 17}), "n"),
        (json!({"n": 1.5}), "n"),
        (json!({"n": -1}), "n"),
        (json!({"n": u64::MAX}), "n"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"temperature": true}), "temperature"),
        (json!({"top_p": 1.01}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 0.5}), "top_k"),
        (json!({"min_p": -1}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"dry_base": 0}), "dry_base"),
        (json!({"dry_sequence_breakers": ["".to_owned()]}), "dry_sequence_breakers[0]"),
        (json!({"xtc_threshold": 2}), "xtc_threshold"),
        (json!({"logit_bias": []}), "logit_bias"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias"),
        (json!({"logit_bias": {"4294967295": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
        (json!({"logit_bias": biases}), "logit_bias"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"seed": "1"}), "seed"),
        (json!({"stop": 1}), "stop"),
        (json!({"stop": [1]}), "stop[0]"),
        (json!({"stop": [""]}), "stop[0]"),
        (json!({"stop": many}), "stop"),
        (json!({"stop": "x".repeat(257)}), "stop"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids[0]"),
        (json!({"ignore_eos": 1}), "ignore_eos"),
        (json!({"priority": 1e10}), "priority"),
        (json!({"speculative.n_max": -1}), "speculative.n_max"),
        (json!({"speculative.n_max": true}), "speculative.n_max"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
        ),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 3_000_000_000_u64}), "max_tokens"),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), "max_tokens"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"min_tokens": 5}), "min_tokens"),
        (json!({"metadata": "x"}), "metadata"),
        (json!({"store": "x"}), "store"),
        (json!({"foo": 1}), "foo"),
    ];
    for (body, param) in cases {
        let error = take(body.clone()).unwrap_err();
        assert_eq!(error.status, 400, "{body}");
        assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        assert!(error.message.contains(param.split(['.', '[']).next().unwrap()), "{error}");
    }
}

#[test]
fn a_missing_model_is_named() {
    let error = Common::take(&mut Fields::of(String::new(), json!({})).unwrap()).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("model"));
    assert_eq!(error.code.as_deref(), Some("missing_required_parameter"));
}
