//! Tests on tiny random models: gradients compared with finite differences of the loss, and
//! different ways to compute gradients compared with each other.

use super::*;
use crate::gguf::fixture::TinyDecoder;
use crate::job::spec::Lora;
use crate::train::data::Encoded;
use crate::train::ops::Frozen;
use tempfile::TempDir;

fn tiny(architecture: &'static str) -> (TempDir, Arc<Gguf>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let model = match architecture {
        "gemma3" => TinyDecoder::new(architecture).key("attention.sliding_window", 9u32),
        _ => TinyDecoder::new(architecture),
    };
    model.write(&path).unwrap();
    (folder, Arc::new(Gguf::open(&path).unwrap()))
}

fn lora() -> Training {
    use crate::gguf::Projection::*;
    Training::Lora(Lora {
        rank: 4,
        alpha: 8.0,
        targets: vec![Q, K, V, O, Gate, Up, Down],
        rank_stabilized: false,
        dropout: 0.0,
        seed: 1,
    })
}

fn batch(documents: &[usize], seed: u32) -> Batch {
    let total: usize = documents.iter().sum();
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8;
    let tokens: Vec<u32> = (0..total).map(|i| token(i) % TinyDecoder::vocab()).collect();
    let (mut all, mut weights, mut at) = (Documents::default(), vec![1.0; total], 0);
    for len in documents {
        all.push(*len);
        at += len;
        weights[at - 1] = 0.0;
    }
    weights[2] = 0.0;
    let targets = tokens[1..].iter().copied().chain([0]).collect();
    let (tokens, targets) = (Arc::new(tokens), Arc::new(targets));
    Batch { tokens, documents: Arc::new(all), targets, weights: Arc::new(weights) }
}

fn load(file: &Arc<Gguf>, training: &Training) -> Model {
    let model = Model::load(file.clone(), training, 512, &Device::Cpu).unwrap();
    // B starts as zeros, which would make A's gradient zero.
    for (i, param) in model.params().iter().enumerate() {
        if param.name.ends_with("lora_b") {
            let count = param.var.elem_count();
            let values: Vec<f32> =
                (0..count).map(|j| ((i * 31 + j * 17) % 41) as f32 / 400.0 - 0.05).collect();
            param
                .var
                .set(&Tensor::from_vec(values, param.var.shape(), &Device::Cpu).unwrap())
                .unwrap();
        }
    }
    model
}

fn number(tensor: &Tensor) -> f64 {
    tensor.to_dtype(candle_core::DType::F64).unwrap().to_scalar().unwrap()
}

fn gradients(model: &Model, batches: &[Batch], checkpoint: bool) -> (f64, Vec<Tensor>) {
    let mut gradients = Gradients::default();
    let mut loss = 0.0;
    for batch in batches {
        loss += number(
            &model.train(batch, Pass { checkpoint, number: 3 }, &mut gradients).unwrap().sum,
        );
    }
    (loss, gradients.take(model.params()).unwrap())
}

fn norm(tensor: &Tensor) -> f64 {
    number(&tensor.sqr().unwrap().sum_all().unwrap()).sqrt()
}

#[test]
fn gradients_are_slopes_of_the_loss() {
    for architecture in ["llama", "qwen2", "qwen3", "gemma3", "phi3"] {
        let (_folder, file) = tiny(architecture);
        for training in [Training::Full, lora()] {
            let model = load(&file, &training);
            let batch = batch(&[20, 9], 3);
            let (_, grads) = gradients(&model, std::slice::from_ref(&batch), false);
            for (param, grad) in model.params().iter().zip(&grads) {
                assert!(norm(grad) > 0.0, "{architecture}: `{}` has no slope", param.name);
                // A difference along the gradient is the most precise in f32.
                let start = param.var.as_tensor().copy().unwrap();
                let step = 2e-3 / norm(grad);
                let moved = |by: f64| {
                    param.var.set(&(&start + (grad * by).unwrap()).unwrap()).unwrap();
                    number(&model.losses(&batch).unwrap().sum)
                };
                let found = (moved(step) - moved(-step)) / (2.0 * step);
                param.var.set(&start).unwrap();
                let right = norm(grad).powi(2);
                let off = (found - right).abs() / right;
                // Losses are sums of about 27 nats in f32; the remaining difference is rounding.
                let noise = 2e-5 / (step * right);
                assert!(
                    off < 0.02 + noise,
                    "{architecture}, {}: {right} by hand, {found} by differences",
                    param.name
                );
            }
        }
    }
}

/// The operations that other devices use give the same losses and gradients.
#[test]
fn both_implementations_of_the_operations_agree() {
    for architecture in ["llama", "qwen2", "qwen3", "gemma3", "phi3"] {
        let (_folder, file) = tiny(architecture);
        for training in [Training::Full, lora()] {
            let model = load(&file, &training);
            let batch = batch(&[20, 9], 3);
            let run = |checkpoint| gradients(&model, std::slice::from_ref(&batch), checkpoint);
            let (loss, grads) = run(false);
            for checkpoint in [false, true] {
                let (other, others) = ops::composed(|| run(checkpoint));
                assert!((loss - other).abs() < 1e-5 * loss, "{architecture}: {loss}, {other}");
                for ((ours, other), param) in grads.iter().zip(&others).zip(model.params()) {
                    let off = norm(&(ours - other).unwrap()) / norm(ours);
                    assert!(off < 1e-4, "{architecture}, {}: {off}", param.name);
                }
            }
            let looked = |wanted| model.outputs(&batch, wanted).unwrap();
            let (ours, other) =
                (looked(Wanted::LOG_PROBS), ops::composed(|| looked(Wanted::LOG_PROBS)));
            for (ours, other) in ours.log_probs.iter().zip(&other.log_probs) {
                assert!((ours - other).abs() < 1e-4, "{architecture}: {ours}, {other}");
            }
        }
    }
}

#[test]
fn checkpointing_and_packing_change_nothing() {
    let (_folder, file) = tiny("llama");
    for training in [Training::Full, lora()] {
        let model = load(&file, &training);
        let packed = batch(&[40, 30], 5);
        let (loss, grads) = gradients(&model, std::slice::from_ref(&packed), false);
        let alone = |from: usize, to: usize| Batch {
            tokens: Arc::new(packed.tokens[from..to].to_vec()),
            documents: Arc::new(Documents::one(to - from)),
            targets: Arc::new(packed.targets[from..to].to_vec()),
            weights: Arc::new(packed.weights[from..to].to_vec()),
        };
        for (name, batches, checkpoint) in [
            ("checkpointed", vec![packed.clone()], true),
            ("apart", vec![alone(0, 40), alone(40, 70)], false),
            ("apart, checkpointed", vec![alone(0, 40), alone(40, 70)], true),
        ] {
            let (other_loss, other) = gradients(&model, &batches, checkpoint);
            assert!((loss - other_loss).abs() < 1e-4 * loss, "{name}: {loss}, {other_loss}");
            for ((param, a), b) in model.params().iter().zip(&grads).zip(&other) {
                let off = norm(&(a - b).unwrap()) / norm(a);
                assert!(off < 1e-4, "{name}, {}: {off}", param.name);
            }
        }
        let again = gradients(&model, std::slice::from_ref(&packed), false);
        for (a, b) in grads.iter().zip(&again.1) {
            assert_eq!(norm(&(a - b).unwrap()), 0.0, "the same again gives the same bits");
        }
    }
}

/// Completions that share the rows of their prompt have the outputs and the gradients of separate
/// sequences.
#[test]
fn shared_prompts_change_nothing() {
    let text = |seed: u32, count: u32| (0..count).map(move |i| (seed * 31 + i * 17) % 59);
    let example = |seeds: [u32; 2], prompt: u32, completion: u32| Encoded {
        tokens: text(seeds[0], prompt).chain(text(seeds[1], completion)).collect(),
        trained: (0..prompt + completion).map(|at| at >= prompt).collect(),
    };
    let examples = [
        example([1, 2], 70, 5),
        example([1, 3], 70, 1),
        example([1, 4], 70, 66),
        example([5, 6], 3, 9),
        example([7, 8], 12, 4),
        example([7, 9], 12, 4),
    ];
    let wanted = Wanted { values: true, temperature: 0.7, ..Wanted::LOG_PROBS };
    for architecture in ["llama", "gemma3", "qwen3"] {
        let (_folder, file) = tiny(architecture);
        for training in [Training::Full, lora()] {
            let model = load(&file, &training);
            let head = (0..model.shape.width).map(|i| (i as f32).sin()).collect();
            let model = model.with_head(VALUE, head).unwrap();
            let run = |batches: &[Batch], checkpoint: bool| {
                let (mut gradients, mut outputs) = (Gradients::default(), Outputs::default());
                for batch in batches {
                    let found = model.outputs(batch, wanted).unwrap();
                    let pass = Pass { number: 1, checkpoint };
                    model
                        .train_with(batch, pass, wanted, &mut gradients, |seen| {
                            for (one, other) in seen.log_probs.iter().zip(&found.log_probs) {
                                assert!((one - other).abs() < 1e-5, "{one}, {other}");
                            }
                            let slope = |x: &f64| (x * 3.0).sin();
                            OutputGrads {
                                log_probs: seen.log_probs.iter().map(slope).collect(),
                                values: seen.values.iter().map(slope).collect(),
                            }
                        })
                        .unwrap();
                    outputs.log_probs.extend(found.log_probs);
                    outputs.entropies.extend(found.entropies);
                    outputs.values.extend(found.values);
                }
                (outputs, gradients.take(model.params()).unwrap())
            };
            let apart: Vec<Batch> = examples.iter().map(|one| Batch::of([one])).collect();
            let (right, grads) = run(&apart, false);
            let all: Vec<&Encoded> = examples.iter().collect();
            let groups = [all[..3].to_vec(), all[3..4].to_vec(), all[4..].to_vec()];
            let shared = [Batch::of_groups(groups)];
            assert_eq!(shared[0].tokens.len(), 69 + 5 + 1 + 66 + 11 + 11 + 4 + 4);
            for checkpoint in [false, true] {
                let (found, others) = run(&shared, checkpoint);
                for (one, other) in [
                    (&right.log_probs, &found.log_probs),
                    (&right.entropies, &found.entropies),
                    (&right.values, &found.values),
                ] {
                    assert_eq!(one.len(), 5 + 1 + 66 + 9 + 4 + 4);
                    for (one, other) in one.iter().zip(other) {
                        assert!((one - other).abs() < 1e-4, "{architecture}: {one}, {other}");
                    }
                }
                for ((param, one), other) in model.params().iter().zip(&grads).zip(&others) {
                    let off = norm(&(one - other).unwrap()) / norm(one);
                    assert!(off < 1e-4, "{architecture}, {}: {off}", param.name);
                }
            }
        }
    }
}

#[test]
fn dropout_has_the_slopes_of_its_loss_and_only_training_drops() {
    let (_folder, file) = tiny("llama");
    let Training::Lora(plain) = lora() else { unreachable!("it is LoRA") };
    let dropping = Lora { dropout: 0.3, ..plain };
    let model = load(&file, &Training::Lora(dropping));
    let batch = batch(&[20, 9], 3);
    let (loss, grads) = gradients(&model, std::slice::from_ref(&batch), false);
    let (again, checkpointed) = gradients(&model, std::slice::from_ref(&batch), true);
    assert!((loss - again).abs() < 1e-4 * loss, "{loss}, {again}");
    let pass = |number: u64| {
        let pass = Pass { number, checkpoint: false };
        number_of(&model.train(&batch, pass, &mut Gradients::default()).unwrap())
    };
    assert_eq!(pass(3), pass(3));
    assert_ne!(pass(3), pass(4), "each pass drops others");
    let whole = load(&file, &lora());
    let held_out = |model: &Model| number_of(&model.losses(&batch).unwrap());
    assert_eq!(held_out(&model), held_out(&whole), "nothing is dropped where nothing is trained");
    for ((param, grad), other) in model.params().iter().zip(&grads).zip(&checkpointed) {
        let off = norm(&(grad - other).unwrap()) / norm(grad);
        assert!(off < 1e-4, "{}: {off} when computed again", param.name);
        let start = param.var.as_tensor().copy().unwrap();
        let step = 2e-3 / norm(grad);
        let moved = |by: f64| {
            param.var.set(&(&start + (grad * by).unwrap()).unwrap()).unwrap();
            pass(3)
        };
        let found = (moved(step) - moved(-step)) / (2.0 * step);
        param.var.set(&start).unwrap();
        let right = norm(grad).powi(2);
        let noise = 2e-5 / (step * right);
        assert!((found - right).abs() / right < 0.02 + noise, "{}: {right}, {found}", param.name);
    }
}

fn number_of(losses: &Losses) -> f64 {
    number(&losses.sum)
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    // Wide enough for products that are split over threads.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    TinyDecoder { width: 128, ff: 256, layers: 1, ..TinyDecoder::new("llama") }
        .write(&path)
        .unwrap();
    let file = Arc::new(Gguf::open(&path).unwrap());
    for training in [Training::Full, lora()] {
        let model = load(&file, &training);
        let batch = batch(&[100, 60], 5);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gradients(&model, std::slice::from_ref(&batch), false))
        };
        let (loss, grads) = on(1);
        for threads in [2, 3] {
            let (other_loss, other) = on(threads);
            assert_eq!(loss, other_loss);
            for ((param, a), b) in model.params().iter().zip(&grads).zip(&other) {
                let bits = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(bits(a), bits(b), "{} on {threads} threads", param.name);
            }
        }
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_its_a_has_no_slope() {
    let (_folder, file) = tiny("llama");
    let model = Model::load(file.clone(), &lora(), 512, &Device::Cpu).unwrap();
    let full = load(&file, &Training::Full);
    let batch = batch(&[50], 1);
    let [fresh, plain] = [&model, &full].map(|model| number(&model.losses(&batch).unwrap().sum));
    assert!((fresh - plain).abs() < 1e-4 * plain, "{fresh}, {plain}");
    let (_, grads) = gradients(&model, &[batch], false);
    for (param, grad) in model.params().iter().zip(&grads) {
        assert_eq!(norm(grad) == 0.0, param.name.ends_with("lora_a"), "{}", param.name);
    }
}

#[test]
fn what_is_not_there_is_said() {
    let (_folder, file) = tiny("llama");
    assert!(Frozen::new(file.clone(), "blk.9.attn_q.weight", 0..1).is_err());
    let model = load(&file, &lora());
    let mut wrong = batch(&[5], 1);
    wrong.tokens = Arc::new(vec![1, 2, 3, 1 << 30, 4]);
    assert!(model.losses(&wrong).is_err());
}
