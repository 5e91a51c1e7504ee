//! Each operation compared with finite differences in f64, and some with their definitions.

use super::*;
use crate::gguf::{Gating, Gguf, GgufWriter, TensorType};
use crate::job::spec::Divergence;
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::Cell;
use std::sync::Arc;

const CPU: Device = Device::Cpu;

fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let count = dims.iter().product();
    let values: Vec<f64> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, dims, &CPU).unwrap()
}

thread_local! {
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

pub(super) fn is_composed() -> bool {
    COMPOSED.get()
}

/// Runs `f` with the operations of `candle.rs`, on a thread that no other test uses.
pub(in crate::train) fn composed<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        COMPOSED.set(true);
        f()
    })
}

/// The result of `f`, and the gradients of its arguments from the gradient of the result, which
/// `grad_of` makes.
pub(super) fn values_and_gradients(
    args: &[Tensor],
    f: &impl Fn(&[Tensor]) -> Result<Tensor>,
    grad_of: impl Fn(&Tensor) -> Tensor,
) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = args.iter().map(|arg| Var::from_tensor(arg).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let (out, tape) = record(&[], || f(&tensors)).unwrap();
    let mut grads = tape.backward(&out, Some(&grad_of(&out))).unwrap();
    let grads = tensors.iter().map(|x| grads.remove(&x.id()).expect("it has a gradient"));
    (out.detach(), grads.collect())
}

/// Compares the gradients of `f` with finite differences in a few random directions for each
/// argument, and both with those of `candle.rs`. Random weights reduce the result to a scalar.
fn check_gradients(name: &str, args: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor> + Sync) {
    let weights_of = |out: &Tensor| random(out.dims(), 99);
    let (out, grads) = values_and_gradients(args, &f, weights_of);
    let weights = weights_of(&out);
    let (other, others) = composed(|| values_and_gradients(args, &f, weights_of));
    assert!(distance(&out, &other) < 1e-12, "{name}: the implementations differ");
    let number = |args: &[Tensor]| {
        (f(args).unwrap() * &weights).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    for (i, (grad, other)) in grads.iter().zip(&others).enumerate() {
        let off = distance(grad, other);
        assert!(off < 1e-12, "{name}, argument {i}: the implementations' gradients differ: {off}");
        for seed in 0..4 {
            let direction = random(args[i].dims(), 1000 + seed);
            let slope = (grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let moved = |by: f64| {
                let mut moved = args.to_vec();
                moved[i] = (&args[i] + (&direction * by).unwrap()).unwrap();
                number(&moved)
            };
            let step = 1e-4;
            let difference = (moved(step) - moved(-step)) / (2.0 * step);
            let close = (slope - difference).abs() < 1e-6 * (1.0 + slope.abs());
            assert!(close, "{name}, argument {i}: {slope} by hand, {difference} by differences");
        }
    }
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_dtype(DType::F64).unwrap(), b.to_dtype(DType::F64).unwrap());
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    norm((&a - &b).unwrap()) / norm(b)
}

#[test]
fn norms() {
    let args = [random(&[70, 48], 1), random(&[48], 2)];
    check_gradients("rms_norm", &args, |a| rms_norm(&a[0], &a[1], 1e-5));
}

#[test]
fn rotations() {
    for halves in [false, true] {
        let angles = (0..40 * 6).map(|i| (f64::cos(i as f64), f64::sin(i as f64))).collect();
        let rotation = Rotation { angles: Arc::new(angles), pairs: 6, halves };
        let x = random(&[40, 3, 16], 3);
        check_gradients("rotate", &[x], |a| rotate(&a[0], &rotation));
    }
}

#[test]
fn gates() {
    for act in [Gating::Silu, Gating::Gelu] {
        let args = [(random(&[33, 50], 4) * 4.0).unwrap(), random(&[33, 50], 5)];
        check_gradients("gated", &args, |a| gated(&a[0], &a[1], act));
    }
}

#[test]
fn embeddings() {
    let tokens = Arc::new(vec![3, 1, 3, 0, 7, 3]);
    check_gradients("embedding", &[random(&[8, 100], 6)], |a| embedding(&a[0], &tokens));
    assert!(embedding(&random(&[3, 4], 1), &tokens).is_err());
}

/// Documents of some lengths; those marked with `true` are continuations.
fn documents(lengths: &[(usize, bool)]) -> Arc<Documents> {
    let mut documents = Documents::default();
    for &(rows, continues) in lengths {
        match continues {
            false => documents.push(rows),
            true => documents.push_continuation(rows),
        }
    }
    Arc::new(documents)
}

/// (rows) the rows that each row attends to, from the definition.
fn seen(lengths: &[(usize, bool)], window: Option<usize>) -> Vec<Vec<usize>> {
    let (mut seen, mut start, mut prefix) = (Vec::new(), 0, Vec::new());
    for &(rows, continues) in lengths {
        for row in start..start + rows {
            let before = if continues { prefix.clone() } else { Vec::new() };
            let all: Vec<usize> = before.into_iter().chain(start..=row).collect();
            let kept = all.len() - all.len().min(window.unwrap_or(usize::MAX));
            seen.push(all[kept..].to_vec());
        }
        if !continues {
            prefix = (start..start + rows).collect();
        }
        start += rows;
    }
    seen
}

/// Attention query by query, from the definition. `seen` has the rows of each query.
fn plain_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scope: &Scope,
    seen: &[Vec<usize>],
) -> Tensor {
    let (rows, heads, dim) = q.dims3().unwrap();
    let group = heads / k.dim(1).unwrap();
    let of = |x: &Tensor| x.to_vec3::<f64>().unwrap();
    let (q, k, v) = (of(q), of(k), of(v));
    let mut out = Vec::new();
    for (queries, seen) in q.iter().zip(seen) {
        for (head, query) in queries.iter().enumerate() {
            let score = |at: &usize| {
                let dot: f64 = query.iter().zip(&k[*at][head / group]).map(|(a, b)| a * b).sum();
                let score = dot * scope.scale;
                scope.cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
            };
            let weights: Vec<f64> = seen.iter().map(score).collect();
            let total: f64 = weights.iter().sum();
            let mut sum = vec![0.0; dim];
            for (weight, at) in weights.iter().zip(seen) {
                for (sum, x) in sum.iter_mut().zip(&v[*at][head / group]) {
                    *sum += weight * x / total;
                }
            }
            out.extend(sum);
        }
    }
    Tensor::from_vec(out, (rows, heads, dim), &CPU).unwrap()
}

#[test]
fn attention_over_documents() {
    let apart = |lengths: &[usize]| lengths.iter().map(|&rows| (rows, false)).collect::<Vec<_>>();
    let tree = vec![(3, false), (75, false), (2, true), (66, true), (1, true), (3, false)];
    for (lengths, window, cap) in [
        (apart(&[150]), None, None),
        (apart(&[1, 69, 5, 65, 10]), None, None),
        (apart(&[64, 64, 22]), Some(9), None),
        (apart(&[100, 50]), Some(80), Some(0.5)),
        (tree.clone(), None, None),
        (tree.clone(), Some(70), None),
        (tree, Some(2), Some(0.5)),
    ] {
        let args = [random(&[150, 4, 8], 7), random(&[150, 2, 8], 8), random(&[150, 2, 8], 9)];
        let seen = seen(&lengths, window);
        let documents = documents(&lengths);
        let some: Vec<u32> =
            (0..150).filter(|row| row % 7 < 3 && !(20..40).contains(row)).collect();
        for queries in [None, Some(Arc::new(some)), Some(Arc::new(vec![149]))] {
            let (q, seen) = match &queries {
                None => (args[0].clone(), seen.clone()),
                Some(rows) => (
                    args[0].index_select(&Tensor::new(&rows[..], &CPU).unwrap(), 0).unwrap(),
                    rows.iter().map(|&row| seen[row as usize].clone()).collect(),
                ),
            };
            let args = [q, args[1].clone(), args[2].clone()];
            let scope = Scope { documents: documents.clone(), queries, scale: 0.3, window, cap };
            let ours = attention(&args[0], &args[1], &args[2], &scope).unwrap();
            let plain = plain_attention(&args[0], &args[1], &args[2], &scope, &seen);
            assert!(distance(&ours, &plain) < 1e-12, "{lengths:?}, {window:?}, {cap:?}");
            check_gradients("attention", &args, |a| attention(&a[0], &a[1], &a[2], &scope));
        }
    }
}

fn frozen(rows: usize, cols: usize, ty: TensorType) -> Arc<Frozen> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.gguf");
    let values: Vec<f32> =
        random(&[rows * cols], 10).to_vec1::<f64>().unwrap().iter().map(|x| *x as f32).collect();
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", "llama");
    let dims = [cols as u64, rows as u64];
    match ty {
        // A scale of 0.01 and arbitrary integers.
        TensorType::Q8_0 => {
            let block = |block: &[f32]| {
                let mut bytes = half::f16::from_f32(0.01).to_le_bytes().to_vec();
                bytes.extend(block.iter().map(|x| (x * 100.0) as i8 as u8));
                bytes
            };
            let bytes: Vec<u8> = values.chunks(32).flat_map(block).collect();
            writer.tensor("w", &dims, ty, bytes).unwrap();
        }
        _ => {
            writer.tensor_f32("w", &dims, ty, values).unwrap();
        }
    }
    writer.write(&path).unwrap();
    Arc::new(Frozen::new(Arc::new(Gguf::open(&path).unwrap()), "w", 0..rows).unwrap())
}

#[test]
fn linears() {
    let x = random(&[150, 64], 11);
    let w = frozen(40, 64, TensorType::Q8_0);
    check_gradients("frozen_linear", std::slice::from_ref(&x), |a| frozen_linear(&a[0], &w));
    let args = [x.clone(), random(&[40, 64], 12)];
    check_gradients("linear", &args, |a| linear(&a[0], &a[1]));
    let args = [x, random(&[4, 64], 13), random(&[40, 4], 14)];
    check_gradients("lora_linear", &args, |a| lora_linear(&a[0], &w, &a[1], &a[2], 0.7));
}

#[test]
fn sums() {
    let args = [random(&[40, 3, 10], 21), random(&[40, 3, 10], 22)];
    check_gradients("add", &args, |a| add(&a[0], &a[1]));
    check_gradients("scale", &args[..1], |a| scale(&a[0], -0.7));
    check_gradients("reshape", &args[..1], |a| reshape(&a[0], (120, 10)));
    let args = [random(&[70, 12], 23), random(&[12], 24)];
    check_gradients("add_bias", &args, |a| add_bias(&a[0], &a[1]));
    assert!(add(&args[0], &args[1]).is_err());
    // A tensor that is used twice has the sum of both gradients.
    check_gradients("twice", &args[..1], |a| add(&scale(&a[0], 2.0)?, &a[0]));
}

#[test]
fn dropped_numbers() {
    let draw = Draw { key: 5, rate: 0.3 };
    check_gradients("dropout", &[random(&[33, 50], 25)], |a| dropout(&a[0], draw));
}

#[test]
fn nothing_is_kept_outside_of_a_recording() {
    let x = Var::from_tensor(&random(&[4, 8], 26)).unwrap();
    let of = || rms_norm(&x, &random(&[8], 27), 1e-5).unwrap();
    let composed = composed(|| of().track_op());
    assert!(!composed && !of().track_op());
    let (tracked, _) = record(&[], || Ok(without_gradients(|| tape::tracked(&of())))).unwrap();
    assert!(!tracked);
}

#[test]
fn weighed_sums() {
    let weights = Arc::new((0..70).map(|i| f64::from(i) - 20.0).collect::<Vec<_>>());
    check_gradients("weighed", &[random(&[70, 1], 21)], |a| weighed(&a[0], &weights));
    assert!(weighed(&random(&[3], 1), &weights).is_err());
}

#[test]
fn log_probs_follow_cap_and_temperature() {
    let (hidden, head) = (random(&[33, 64], 15), frozen(40, 64, TensorType::F16));
    let head = Head::Frozen(head);
    let of = |weights: Vec<f32>| Targets {
        tokens: Arc::new((0..33).map(|i| i * 7 % 40).collect()),
        weights: Arc::new(weights),
        cap: Some(2.0),
        temperature: 0.6,
    };
    let said = log_probs(&hidden, &head, &of(vec![0.0; 33])).unwrap();
    let other = composed(|| log_probs(&hidden, &head, &of(vec![0.0; 33])).unwrap());
    let of_targets = |a: &LogProbs| a.of_targets.to_vec1::<f64>().unwrap();
    let pairs = |a: &LogProbs| [of_targets(a), a.entropies.clone()].concat();
    for (ours, other) in pairs(&said).iter().zip(pairs(&other)) {
        assert!((ours - other).abs() < 1e-12, "{ours}, composed {other}");
    }
    for row in [0, 20, 32] {
        let mut weights = vec![0.0; 33];
        weights[row] = 1.0;
        let loss = linear_cross_entropy(&hidden, &head, &of(weights)).unwrap().sum;
        let loss = loss.to_scalar::<f64>().unwrap();
        let said = of_targets(&said)[row];
        assert!((loss + said).abs() < 1e-12, "{loss} {said}");
    }
    assert!(said.entropies.iter().all(|entropy| (0.0..40f64.ln()).contains(entropy)));
    for (cap, temperature) in [(None, 1.0), (Some(2.0), 0.6)] {
        let targets = Targets { cap, temperature, ..of(vec![0.0; 33]) };
        let args = [random(&[33, 64], 15), random(&[40, 64], 16)];
        check_gradients("log_probs", &args, |a| {
            Ok(log_probs(&a[0], &Head::Trained(a[1].clone()), &targets)?.of_targets)
        });
        check_gradients("log_probs, frozen", &args[..1], |a| {
            Ok(log_probs(&a[0], &head, &targets)?.of_targets)
        });
    }
}

#[test]
fn losses() {
    let targets = |(cap, temperature)| Targets {
        tokens: Arc::new((0..90).map(|i| i * 7 % 40).collect()),
        weights: Arc::new((0..90).map(|i| [0.0, 1.0, -0.5][i % 3]).collect()),
        cap,
        temperature,
    };
    for cap in [(None, 1.0), (Some(2.0), 1.0), (None, 0.7), (Some(2.0), 1.5)] {
        let args = [random(&[90, 64], 15), random(&[40, 64], 16)];
        let loss = |a: &[Tensor]| {
            let head = Head::Trained(a[1].clone());
            linear_cross_entropy(&a[0], &head, &targets(cap)).map(|losses| losses.sum)
        };
        check_gradients("linear_cross_entropy", &args, loss);
        let head = Head::Frozen(frozen(40, 64, TensorType::F16));
        let loss = |a: &[Tensor]| Ok(linear_cross_entropy(&a[0], &head, &targets(cap))?.sum);
        check_gradients("linear_cross_entropy, frozen", &args[..1], loss);
    }
    // The loss from its definition.
    let (hidden, head) = (random(&[90, 64], 15), random(&[40, 64], 16));
    let (trained, targets) = (Head::Trained(head.clone()), targets((None, 1.0)));
    let found = linear_cross_entropy(&hidden, &trained, &targets).unwrap();
    let said = log_probs(&hidden, &trained, &targets).unwrap();
    let of_targets = said.of_targets.to_vec1::<f64>().unwrap();
    let logits = hidden.matmul(&head.t().unwrap()).unwrap().to_vec2::<f64>().unwrap();
    let (mut sum, mut correct) = (0.0, 0.0);
    for (row, logits) in logits.iter().enumerate() {
        let (target, weight) = (row * 7 % 40, [0.0, 1.0, -0.5][row % 3]);
        let total: f64 = logits.iter().map(|x| x.exp()).sum();
        let each = logits.iter().map(|x| x - total.ln());
        let entropy: f64 = each.map(|logprob| -logprob.exp() * logprob).sum();
        assert!((of_targets[row] - (logits[target] - total.ln())).abs() < 1e-9);
        assert!((said.entropies[row] - entropy).abs() < 1e-9);
        sum += weight * (total.ln() - logits[target]);
        let best = logits.iter().copied().fold(f64::MIN, f64::max);
        correct += if logits[target] == best { weight } else { 0.0 };
    }
    assert!((found.sum.to_scalar::<f64>().unwrap() - sum).abs() < 1e-9);
    assert_eq!(found.correct, correct);
    let other = composed(|| linear_cross_entropy(&hidden, &trained, &targets).unwrap().correct);
    assert_eq!(other, correct);
}

/// A teacher's rows, and what is learned from them.
fn distillation_of(
    rows: usize,
    vocab: usize,
    top_k: usize,
    divergence: Divergence,
) -> Distillation {
    let (hidden, head) = (random(&[rows, 16], 31), random(&[vocab, 16], 32));
    let targets = Targets {
        tokens: Arc::new(vec![0; rows]),
        weights: Arc::new(vec![1.0; rows]),
        cap: None,
        temperature: 1.3,
    };
    let head = Head::Trained((head * 2.0).unwrap());
    let teacher = top_log_probs(&hidden, &head, &targets, top_k).unwrap();
    let other = composed(|| top_log_probs(&hidden, &head, &targets, top_k).unwrap());
    assert_eq!(teacher.tokens, other.tokens);
    Distillation {
        teacher: Arc::new(teacher),
        divergence,
        beta: 0.3,
        temperature: 1.3,
        cross_entropy: 0.4,
    }
}

const DIVERGENCES: [Divergence; 3] =
    [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::Jsd];

#[test]
fn distillations() {
    let (rows, vocab) = (40, 30);
    for (divergence, top_k) in DIVERGENCES.into_iter().flat_map(|d| [(d, 1), (d, 7), (d, vocab)]) {
        for (temperature, cross_entropy, cap) in [(1.3, 0.4, None), (1.0, 0.0, Some(2.0))] {
            let distillation = Distillation {
                temperature,
                cross_entropy,
                ..distillation_of(rows, vocab, top_k, divergence)
            };
            let targets = Targets {
                tokens: Arc::new((0..rows as u32).map(|i| i * 7 % 30).collect()),
                weights: Arc::new((0..rows).map(|i| [0.0, 1.0, 0.5][i % 3]).collect()),
                cap,
                temperature: 1.0,
            };
            let args = [random(&[rows, 64], 15), random(&[vocab, 64], 16)];
            let of = |a: &[Tensor]| {
                super::distillation(&a[0], &Head::Trained(a[1].clone()), &targets, &distillation)
            };
            let name = format!("{divergence:?} {top_k} {temperature}");
            check_gradients(&name, &args, |a| of(a).map(|losses| losses.sum));
            let found = of(&args).unwrap().sums;
            let other = composed(|| of(&args).unwrap().sums);
            assert!((found.divergence - other.divergence).abs() < 1e-9, "{name}");
            assert!((found.cross_entropy - other.cross_entropy).abs() < 1e-9, "{name}");
            assert_eq!(found.correct, other.correct, "{name}");
            assert!(found.divergence > 0.0, "{name}");
        }
    }
}

/// The values for two tokens, as TRL's `generalized_jsd_loss` computes them.
#[test]
fn divergences_have_their_closed_forms() {
    let identity = Tensor::from_vec(vec![1.0f64, 0.0, 0.0, 1.0], (2, 2), &CPU).unwrap();
    let teacher =
        TeacherRows { top_k: 2, tokens: vec![1, 0], log_probs: vec![0.8f32.ln(), 0.2f32.ln()] };
    let targets = Targets {
        tokens: Arc::new(vec![0]),
        weights: Arc::new(vec![1.0]),
        cap: None,
        temperature: 1.0,
    };
    for (divergence, beta, right) in [
        (Divergence::ForwardKl, 0.5, 0.192_745),
        (Divergence::ReverseKl, 0.5, 0.223_144),
        (Divergence::Jsd, 0.1, 0.017_473),
        (Divergence::Jsd, 0.9, 0.019_599),
    ] {
        let teacher = Arc::new(teacher.clone());
        let how = Distillation { teacher, divergence, beta, temperature: 1.0, cross_entropy: 0.0 };
        // Both tokens of the student are equally probable.
        let hidden = Tensor::from_vec(vec![3.0f64, 3.0], (1, 2), &CPU).unwrap();
        let head = Head::Trained(identity.clone());
        let found = super::distillation(&hidden, &head, &targets, &how).unwrap().sums.divergence;
        assert!((found - right).abs() < 1e-6, "{divergence:?}, {beta}: {found}");
    }
}

#[test]
fn a_student_that_is_the_teacher_has_nothing_to_learn() {
    let (rows, vocab) = (20, 50);
    let (hidden, head) = (random(&[rows, 16], 33), Head::Trained(random(&[vocab, 16], 34)));
    let targets = Targets {
        tokens: Arc::new(vec![3; rows]),
        weights: Arc::new(vec![1.0; rows]),
        cap: None,
        temperature: 1.0,
    };
    for divergence in DIVERGENCES {
        for top_k in [3, vocab] {
            let teacher = Arc::new(top_log_probs(&hidden, &head, &targets, top_k).unwrap());
            let how = Distillation {
                teacher,
                divergence,
                beta: 0.5,
                temperature: 1.0,
                cross_entropy: 0.0,
            };
            let of = |a: &[Tensor]| super::distillation(&a[0], &head, &targets, &how);
            let found = of(std::slice::from_ref(&hidden)).unwrap().sums.divergence;
            assert!(found.abs() < 1e-5, "{divergence:?}: {found}");
            let sum = |a: &[Tensor]| of(a).map(|losses| losses.sum);
            let (_, grads) = values_and_gradients(std::slice::from_ref(&hidden), &sum, |out| {
                out.ones_like().unwrap()
            });
            let most = grads[0].abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(most < 1e-5, "{divergence:?}, {top_k}: {most}");
        }
    }
    let mut wrong = distillation_of(rows, vocab, 3, Divergence::ForwardKl);
    Arc::make_mut(&mut wrong.teacher).tokens[4] = vocab as u32;
    assert!(super::distillation(&hidden, &head, &targets, &wrong).is_err());
    assert!(top_log_probs(&hidden, &head, &targets, vocab + 1).is_err());
}

/// A token that is improbable for both has a probability that rounds to 0.
#[test]
fn probabilities_of_zero_give_numbers() {
    let identity = Tensor::from_vec(vec![1.0f64, 0.0, 0.0, 1.0], (2, 2), &CPU).unwrap();
    let hidden = Tensor::from_vec(vec![0.0f64, -2000.0], (1, 2), &CPU).unwrap();
    let teacher = TeacherRows { top_k: 2, tokens: vec![0, 1], log_probs: vec![0.0, -800.0] };
    let targets = Targets {
        tokens: Arc::new(vec![0]),
        weights: Arc::new(vec![1.0]),
        cap: None,
        temperature: 1.0,
    };
    for divergence in DIVERGENCES {
        let teacher = Arc::new(teacher.clone());
        let (beta, temperature, cross_entropy) = (0.5, 1.0, 0.0);
        let how = Distillation { teacher, divergence, beta, temperature, cross_entropy };
        let head = Head::Trained(identity.clone());
        let sum = |a: &[Tensor]| {
            super::distillation(&a[0], &head, &targets, &how).map(|losses| losses.sum)
        };
        let found = || {
            let args = std::slice::from_ref(&hidden);
            let (value, grads) = values_and_gradients(args, &sum, |out| out.ones_like().unwrap());
            let grads = grads[0].flatten_all().unwrap().to_vec1::<f64>().unwrap();
            [&[value.to_scalar::<f64>().unwrap()], &grads[..]].concat()
        };
        for values in [found(), composed(found)] {
            assert!(values.iter().all(|value| value.abs() < 1e-9), "{divergence:?}: {values:?}");
        }
    }
}
