//! Tests of the sampler against a slow oracle: full sorts in `f64`, penalties from the whole
//! history.

use super::*;
use proptest::prelude::*;

fn sampler(params: &SamplingParams, vocab: usize) -> Sampler {
    Sampler::new(params, 0, vocab, &|_| vec![vec![0]])
}

/// The logits with bias, mask and penalties applied, computed in the simplest way.
fn penalized(
    params: &SamplingParams,
    prompt: &[Token],
    output: &[Token],
    mask: Option<&[u32]>,
    logits: &[f32],
) -> Vec<f32> {
    let all: Vec<Token> = prompt.iter().chain(output).copied().collect();
    let window = match params.penalty_window as usize {
        0 => &all[..],
        n => &all[all.len().saturating_sub(n)..],
    };
    let dry_window = &all[all.len().saturating_sub(params.dry_penalty_last_n as usize)..];
    let mut row = logits.to_vec();
    for (id, x) in row.iter_mut().enumerate() {
        let token = id as Token;
        for (_, bias) in params.logit_bias.iter().filter(|(t, _)| *t == token) {
            *x += bias;
        }
        if mask.is_some_and(|mask| mask.get(id / 32).is_none_or(|word| word >> (id % 32) & 1 == 0))
        {
            *x = f32::NEG_INFINITY;
        }
        if window.contains(&token) {
            *x = match *x <= 0.0 {
                true => *x * params.repetition_penalty,
                false => *x / params.repetition_penalty,
            };
        }
        let count = output.iter().filter(|&&t| t == token).count();
        if count > 0 {
            *x -= count as f32 * params.frequency_penalty + params.presence_penalty;
        }
        *x -= dry_penalty(params, dry_window, token);
    }
    row
}

/// The DRY penalty of `token`; the only breaker is token 0.
fn dry_penalty(params: &SamplingParams, recent: &[Token], token: Token) -> f32 {
    let since_breaker = recent.iter().rev().take_while(|&&t| t != 0).count();
    let allowed = params.dry_allowed_length as usize;
    let mut longest = None;
    for end in 1..recent.len() {
        if recent[end] == token {
            let suffix = (0..end)
                .take_while(|i| recent[end - 1 - i] == recent[recent.len() - 1 - i])
                .count()
                .min(since_breaker);
            longest = longest.max(Some(suffix));
        }
    }
    match longest {
        Some(n) if n >= allowed && recent.len() > allowed && token != 0 => {
            params.dry_multiplier * params.dry_base.powf((n - allowed) as f32)
        }
        _ => 0.0,
    }
}

/// `(token, probability)` after all truncating stages, at temperature 1, most probable first.
fn cut(params: &SamplingParams, row: &[f32], xtc: bool) -> Vec<(Token, f64)> {
    let mut list: Vec<(Token, f64)> = row
        .iter()
        .zip(0..)
        .filter(|(x, _)| **x > f32::NEG_INFINITY)
        .map(|(&x, id)| (id, f64::from(x)))
        .collect();
    list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let max = list[0].1;
    for item in &mut list {
        item.1 = (item.1 - max).exp();
    }
    let normalize = |list: &mut Vec<(Token, f64)>| {
        let sum: f64 = list.iter().map(|item| item.1).sum();
        list.iter_mut().for_each(|item| item.1 /= sum);
    };
    let take_mass = |list: &mut Vec<(Token, f64)>, p: f32| {
        let mut sum = 0.0;
        let kept = list.iter().take_while(|i| {
            let go = sum < f64::from(p);
            sum += i.1;
            go
        });
        let kept = kept.count().max(1);
        list.truncate(kept);
    };
    if params.top_k > 0 {
        list.truncate(params.top_k as usize);
    }
    normalize(&mut list);
    if params.typical_p < 1.0 {
        let entropy: f64 = list.iter().filter(|i| i.1 > 0.0).map(|i| -i.1 * i.1.ln()).sum();
        let key = |i: &(Token, f64)| (-i.1.ln() - entropy).abs();
        list.sort_by(|a, b| key(a).total_cmp(&key(b)).then(a.0.cmp(&b.0)));
        take_mass(&mut list, params.typical_p);
        list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        normalize(&mut list);
    }
    if params.top_p < 1.0 {
        take_mass(&mut list, params.top_p);
        normalize(&mut list);
    }
    let best = list[0].1;
    list.retain(|item| item.1 >= best * f64::from(params.min_p));
    normalize(&mut list);
    if xtc {
        let above = list.iter().filter(|i| i.1 >= f64::from(params.xtc_threshold)).count();
        list.drain(..above.saturating_sub(1));
    }
    list
}

/// The token drawn with the random number `u`, in the order of ids.
fn draw(list: &[(Token, f64)], temperature: f32, u: f64) -> Token {
    let mut list: Vec<(Token, f64)> =
        list.iter().map(|&(id, p)| (id, p.powf(1.0 / f64::from(temperature)))).collect();
    list.sort_by_key(|item| item.0);
    let total: f64 = list.iter().map(|item| item.1).sum();
    let mut sum = 0.0;
    for &(id, p) in &list {
        sum += p;
        if sum > u * total {
            return id;
        }
    }
    list[list.len() - 1].0
}

/// All tokens possible within the rounding of `f32`: every threshold and the draw are varied
/// slightly.
fn answers(params: &SamplingParams, row: &[f32], position: u64) -> Vec<Token> {
    let u = rng::uniform(params.seed, 0, position, Stream::Token);
    let xtc = params.xtc_probability > 0.0
        && params.xtc_threshold <= 0.5
        && rng::uniform(params.seed, 0, position, Stream::Xtc) < f64::from(params.xtc_probability);
    let nudges = |on: bool| if on { &[0.0f32, 1e-5, -1e-5][..] } else { &[0.0][..] };
    let mut found = Vec::new();
    for a in nudges(params.top_p < 1.0) {
        for b in nudges(params.typical_p < 1.0) {
            for c in nudges(params.min_p > 0.0) {
                for d in nudges(xtc) {
                    let moved = SamplingParams {
                        top_p: params.top_p * (1.0 + a),
                        typical_p: params.typical_p * (1.0 + b),
                        min_p: params.min_p * (1.0 + c),
                        xtc_threshold: params.xtc_threshold * (1.0 + d),
                        ..params.clone()
                    };
                    let list = cut(&moved, row, xtc);
                    let us = [u, (u + 2e-6).min(1.0), (u - 2e-6).max(0.0)];
                    found.extend(us.map(|u| draw(&list, params.temperature, u)));
                }
            }
        }
    }
    found
}

prop_compose! {
    fn any_row()(
        size in prop_oneof![1usize..40, Just(300usize), Just(1500), Just(6000)],
        scale in prop_oneof![Just(0.05f32), Just(1.0), Just(4.0)],
        seed in any::<u64>(),
        holes in any::<bool>(),
    ) -> Vec<f32> {
        (0..size as u64).map(|i| {
            let u = rng::uniform(seed, 1, i, Stream::Token) as f32;
            let v = rng::uniform(seed, 2, i, Stream::Token) as f32;
            let normal = (-2.0 * (u + 1e-9).ln()).sqrt() * (std::f32::consts::TAU * v).cos();
            match i % 7 {
                3 if holes => f32::NAN,
                4 if holes => f32::NEG_INFINITY,
                _ => normal * scale,
            }
        }).collect()
    }
}

fn off_or<T: Strategy<Value = f32> + 'static>(off: f32, on: T) -> impl Strategy<Value = f32> {
    prop_oneof![Just(off).boxed(), on.boxed()]
}

prop_compose! {
    fn any_cuts()(
        temperature in 0.2f32..2.0,
        top_k in prop_oneof![Just(0u32), Just(40), 1u32..2000],
        top_p in off_or(1.0, 0.05f32..0.999),
        min_p in off_or(0.0, 0.001f32..0.9),
        typical_p in off_or(1.0, 0.05f32..0.999),
        xtc_probability in off_or(0.0, 0.0f32..1.0),
        xtc_threshold in 0.001f32..0.6,
        seed in any::<u64>(),
    ) -> SamplingParams {
        SamplingParams {
            temperature, top_k, top_p, min_p, typical_p, xtc_probability, xtc_threshold, seed,
            ..SamplingParams::default()
        }
    }
}

prop_compose! {
    fn any_penalties()(
        repetition_penalty in off_or(1.0, 0.5f32..2.0),
        presence_penalty in off_or(0.0, -2.0f32..2.0),
        frequency_penalty in off_or(0.0, -2.0f32..2.0),
        penalty_window in prop_oneof![Just(0u32), 1u32..20],
        dry_multiplier in off_or(0.0, 0.1f32..2.0),
        dry_allowed_length in 0u32..4,
        dry_penalty_last_n in 1u32..60,
        logit_bias in prop::collection::vec((0u32..20, -5.0f32..5.0), 0..3),
    ) -> SamplingParams {
        SamplingParams {
            temperature: 0.0, repetition_penalty, presence_penalty, frequency_penalty,
            penalty_window, dry_multiplier, dry_allowed_length, dry_penalty_last_n, logit_bias,
            dry_sequence_breakers: vec!["0".into()],
            ..SamplingParams::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn draws_equal_the_oracles(row in any_row(), params in any_cuts(), position in any::<u64>()) {
        prop_assume!(row.iter().any(|&x| x > f32::NEG_INFINITY));
        let allowed = answers(&params, &row, position);
        let mut logits = row.clone();
        let token = sampler(&params, row.len())
            .sample(&mut logits, None, position, &mut Scratch::default()).expect("possible");
        prop_assert!(allowed.contains(&token), "{token} is none of {allowed:?}");
    }

    #[test]
    fn penalties_equal_the_oracles(
        params in any_penalties(),
        prompt in prop::collection::vec(0u32..8, 0..60),
        output in prop::collection::vec(0u32..8, 0..60),
        row in prop::collection::vec(-9.0f32..9.0, 10),
        mask in prop::option::of(1u32..1024),
    ) {
        let mask = mask.map(|m| [m]);
        let mask = mask.as_ref().map(|m| &m[..]);
        let expected = penalized(&params, &prompt, &output, mask, &row);
        let mut sampler = sampler(&params, row.len());
        sampler.accept_prompt(&prompt);
        output.iter().for_each(|&t| sampler.accept(t));
        let mut logits = row.clone();
        let token = sampler.sample(&mut logits, mask, 0, &mut Scratch::default());
        for (fast, slow) in logits.iter().zip(&expected) {
            prop_assert!(fast == slow || (fast - slow).abs() < 1e-4, "{logits:?} {expected:?}");
        }
        prop_assert_eq!(token, Ok(numeric::argmax(&logits).expect("possible") as Token));
    }

    #[test]
    fn hostile_values_do_no_harm(
        floats in prop::collection::vec(any::<f32>(), 11),
        ints in prop::collection::vec(any::<u32>(), 6),
        row in prop::collection::vec(any::<f32>(), 0..400),
        tokens in prop::collection::vec(0u32..500, 0..50),
    ) {
        let params = SamplingParams {
            temperature: floats[0], top_p: floats[1], top_k: ints[0], min_p: floats[2],
            typical_p: floats[3], presence_penalty: floats[4], frequency_penalty: floats[5],
            repetition_penalty: floats[6], penalty_window: ints[1], dry_multiplier: floats[7],
            dry_base: floats[8], dry_allowed_length: ints[2] % 8, dry_penalty_last_n: ints[3],
            xtc_probability: floats[9], xtc_threshold: floats[10],
            logit_bias: vec![(ints[4], floats[0]), (3, floats[1])],
            ..SamplingParams::default()
        };
        let mut sampler = sampler(&params, row.len());
        sampler.accept_prompt(&tokens);
        let mut scratch = Scratch::default();
        for (position, &token) in tokens.iter().enumerate() {
            let mut logits = row.clone();
            if let Ok(drawn) = sampler.sample(&mut logits, None, position as u64, &mut scratch) {
                prop_assert!((drawn as usize) < row.len());
            }
            sampler.accept(token);
        }
    }

    #[test]
    fn logprobs_equal_the_oracles(row in any_row(), k in 0usize..30) {
        let mut scratch = Scratch::default();
        let exact: f64 = row.iter().filter(|x| !x.is_nan()).map(|&x| f64::from(x).exp()).sum();
        let mut sorted: Vec<(Token, f32)> = row.iter().zip(0..)
            .filter(|(x, _)| **x > f32::NEG_INFINITY).map(|(&x, id)| (id, x)).collect();
        sorted.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("no NaN").then(a.0.cmp(&b.0)));
        sorted.truncate(k);
        let (chosen, top) = logprobs(&row, 0, k, &mut scratch);
        prop_assert_eq!(top.len(), sorted.len());
        for ((id, got), (expected, logit)) in top.iter().zip(&sorted) {
            prop_assert_eq!(id, expected);
            prop_assert!((f64::from(*got) - (f64::from(*logit) - exact.ln())).abs() < 1e-5);
        }
        match row[0].is_nan() {
            true => prop_assert_eq!(chosen, LOGPROB_FLOOR),
            false => prop_assert!((f64::from(chosen) - (f64::from(row[0]) - exact.ln())).abs() < 1e-5),
        }
    }
}

/// Asserts that the chi-square of the observed counts is near its degrees of freedom.
fn assert_fits(counts: &[f64], probabilities: &[f64]) {
    let n: f64 = counts.iter().sum();
    let (mut chi, mut bins) = (0.0, 0.0);
    for (count, p) in counts.iter().zip(probabilities) {
        if p * n >= 5.0 {
            chi += (count - p * n).powi(2) / (p * n);
            bins += 1.0;
        }
    }
    let freedom: f64 = bins - 1.0;
    assert!(chi < freedom + 4.0 * (2.0 * freedom).sqrt(), "chi-square {chi} of {freedom}");
}

#[test]
fn temperature_sampling_follows_the_softmax() {
    let mut scratch = Scratch::default();
    for (size, top_k) in [(50usize, 0), (50, 20), (3000, 0)] {
        let row: Vec<f32> = (0..size).map(|i| ((i * 37 % 101) as f32) * 0.05).collect();
        let params = SamplingParams { temperature: 0.7, top_k, ..SamplingParams::default() };
        let mut counts = vec![0f64; size];
        for seed in 0..60_000 {
            let mut sampler = sampler(&SamplingParams { seed, ..params.clone() }, size);
            let token = sampler.sample(&mut row.clone(), None, seed % 7, &mut scratch);
            counts[token.expect("possible") as usize] += 1.0;
        }
        let mut weights = vec![0f64; size];
        let list = cut(&params, &row, false);
        list.iter().for_each(|&(id, p)| weights[id as usize] = p.powf(1.0 / 0.7));
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= total);
        assert_fits(&counts, &weights);
    }
}

#[test]
fn a_draw_depends_on_seed_choice_and_position_only() {
    let row: Vec<f32> = (0..5000).map(|i| (i % 13) as f32 * 0.1).collect();
    for top_p in [1.0, 0.9, 0.01] {
        let params = SamplingParams { seed: 11, top_p, ..SamplingParams::default() };
        let fresh = |choice, position| {
            Sampler::new(&params, choice, row.len(), &|_| vec![])
                .sample(&mut row.clone(), None, position, &mut Scratch::default())
                .expect("possible")
        };
        let mut used = Sampler::new(&params, 0, row.len(), &|_| vec![]);
        let mut scratch = Scratch::default();
        let mut distinct = std::collections::HashSet::new();
        for position in (0..40).rev() {
            let token = used.sample(&mut row.clone(), None, position, &mut scratch);
            used.accept(position as Token);
            assert_eq!(token, Ok(fresh(0, position)));
            distinct.insert((fresh(0, position), fresh(1, position)));
        }
        assert!(distinct.len() > 30, "draws must differ between positions");
    }
}

#[test]
fn impossible_rows_are_errors_and_infinities_win() {
    let mut scratch = Scratch::default();
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let mut run = |row: &[f32], mask: Option<&[u32]>| {
            sampler(&params, row.len()).sample(&mut row.to_vec(), mask, 0, &mut scratch)
        };
        assert_eq!(run(&[], None), Err(SampleError::NoToken));
        assert_eq!(run(&[f32::NAN, f32::NEG_INFINITY], None), Err(SampleError::NoToken));
        assert_eq!(run(&[1.0, 2.0], Some(&[0])), Err(SampleError::NoToken));
        assert_eq!(run(&[1.0, 2.0], Some(&[])), Err(SampleError::NoToken));
        assert_eq!(run(&[1.0, f32::INFINITY, f32::INFINITY], None), Ok(1));
        assert_eq!(run(&[-99.0, 150.0, 3.0], Some(&[0b101])), Ok(2));
    }
}

#[test]
fn logprobs_of_impossible_tokens_can_be_written_as_json() {
    let mut scratch = Scratch::default();
    let row = [0.0, f32::NEG_INFINITY, f32::NAN];
    let (chosen, top) = logprobs(&row, 1, 3, &mut scratch);
    assert_eq!(chosen, LOGPROB_FLOOR);
    assert_eq!(top, [(0, 0.0)]);
    assert_eq!(logprobs(&row, 9, 0, &mut scratch).0, LOGPROB_FLOOR);
    assert_eq!(logprobs(&[f32::NAN], 0, 1, &mut scratch), (LOGPROB_FLOOR, vec![]));
    let (certain, _) = logprobs(&[f32::INFINITY, 1.0], 0, 1, &mut scratch);
    assert_eq!(certain, 0.0);
}
