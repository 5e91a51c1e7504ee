//! Quantized tiny models: types, bytes, and errors that leave nothing behind.

use super::quantize;
use crate::gguf::fixture::{TinyLlama, tiny_llama};
use crate::gguf::{Gguf, GgufWriter, TensorType};
use crate::job::{
    ArtifactKind, CompressError, Control, Folder, Follower, ImatrixPlan, JobEvent, JobOrder,
    Outcome, QuantizeOrder, QuantizePlan, QuantizeReport, QuantizeSettings, QuantizeSpec,
};
use llama_cpp_sys_2 as sys;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A model whose matrices have rows of 256.
fn model(folder: &Path, ty: TensorType) -> PathBuf {
    let path = folder.join("model.gguf");
    let options =
        TinyLlama { n_embd: 256, n_head: 4, n_head_kv: 2, n_ff: 512, ty, ..TinyLlama::default() };
    tiny_llama(&path, &options).unwrap();
    path
}

fn plan(folder: &Path, ty: &str) -> QuantizePlan {
    QuantizePlan {
        input: folder.join("model.gguf"),
        output: folder.join("out.gguf"),
        settings: QuantizeSettings {
            ty: ty.parse().unwrap(),
            imatrix: None,
            overrides: Vec::new(),
            output_type: None,
            embedding_type: None,
            pure: false,
            requantize: false,
            leave_output: false,
        },
        keep_split: false,
        threads: 2,
        force: true,
    }
}

/// The plan with other settings.
fn with(plan: &QuantizePlan, change: impl FnOnce(&mut QuantizeSettings)) -> QuantizePlan {
    let mut plan = plan.clone();
    change(&mut plan.settings);
    plan
}

fn run(plan: &QuantizePlan) -> Result<(QuantizeReport, Gguf), CompressError> {
    let mut seen = Vec::new();
    let report = quantize(plan, &mut |tensor| seen.push(tensor))?;
    let made = Gguf::open(&plan.output).unwrap();
    assert_eq!(seen.len(), made.tensors().len());
    assert!(seen.iter().enumerate().all(|(at, tensor)| tensor.number == at + 1), "{seen:?}");
    assert_eq!(report.after, std::fs::metadata(&plan.output).unwrap().len());
    Ok((report, made))
}

/// An importance matrix for some tensors of the model.
fn imatrix(path: &Path, tensors: &[(&str, usize)]) {
    let mut writer = GgufWriter::new();
    writer.set("general.type", "imatrix");
    for (name, columns) in tensors {
        let sums: Vec<f32> = (0..*columns).map(|i| 4.0 + ((i * 37) % 101) as f32).collect();
        writer
            .tensor_f32(&format!("{name}.in_sum2"), &[*columns as u64, 1], TensorType::F32, sums)
            .unwrap();
        writer.tensor_f32(&format!("{name}.counts"), &[1, 1], TensorType::F32, vec![2.0]).unwrap();
    }
    writer.write(path).unwrap();
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The bytes that ggml makes of a tensor's numbers.
fn by_ggml(values: &[f32], columns: usize, ty: TensorType, importance: Option<&[f32]>) -> Vec<u8> {
    let rows = values.len() / columns;
    let mut bytes = vec![0u8; ty.bytes_for(values.len() as u64).unwrap() as usize];
    let importance = importance.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: `bytes` has the size of the quantized rows, and `importance` a number per column.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            ty as sys::ggml_type,
            values.as_ptr(),
            bytes.as_mut_ptr().cast(),
            0,
            rows as i64,
            columns as i64,
            importance,
        )
    };
    assert_eq!(written, bytes.len());
    bytes
}

#[test]
fn tensors_are_ggmls_byte_for_byte() {
    for (source, name) in [(TensorType::F32, "F32"), (TensorType::F16, "F16")] {
        let folder = folder();
        let original = Gguf::open(model(folder.path(), source)).unwrap();
        for ty in [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_K, TensorType::Q6_K] {
            let plan = with(&plan(folder.path(), ty.name()), |with| with.pure = true);
            let (_, made) = run(&plan).unwrap();
            let mut quantized = 0;
            for tensor in original.tensors() {
                let found = made.tensor(tensor.name()).unwrap();
                let bytes = made.data(tensor.name()).unwrap();
                if tensor.dims().len() < 2 {
                    assert_eq!(bytes, original.data(tensor.name()).unwrap(), "{}", tensor.name());
                    continue;
                }
                assert_eq!(found.ty(), ty, "{name}: {}", tensor.name());
                let values = original.to_f32(tensor.name()).unwrap();
                let right = by_ggml(&values, tensor.dims()[0] as usize, ty, None);
                assert_eq!(bytes, right, "{name} to {ty}: {}", tensor.name());
                quantized += 1;
            }
            assert!(quantized > 7);
        }
    }
}

#[test]
fn mixes_and_overrides_choose_types() {
    let folder = folder();
    model(folder.path(), TensorType::F32);
    let ty = |made: &Gguf, name: &str| made.tensor(name).unwrap().ty();
    let (report, made) = run(&plan(folder.path(), "Q4_K_M")).unwrap();
    assert_eq!(ty(&made, "blk.0.attn_q.weight"), TensorType::Q4_K);
    assert_eq!(ty(&made, "blk.1.ffn_down.weight"), TensorType::Q6_K);
    assert_eq!(ty(&made, "output_norm.weight"), TensorType::F32);
    assert!(report.before > report.after && report.weights > 0, "{report:?}");
    let mut changed = plan(folder.path(), "Q4_K_M");
    changed.settings.overrides =
        vec!["attn_q=Q5_1".parse().unwrap(), "blk\\.1\\..*up=Q8_0".parse().unwrap()];
    changed.settings.embedding_type = Some(TensorType::F16);
    let (_, made) = run(&changed).unwrap();
    assert_eq!(ty(&made, "blk.0.attn_q.weight"), TensorType::Q5_1);
    assert_eq!(ty(&made, "blk.1.ffn_up.weight"), TensorType::Q8_0);
    assert_eq!(ty(&made, "blk.0.ffn_up.weight"), TensorType::Q4_K);
    assert_eq!(ty(&made, "token_embd.weight"), TensorType::F16);
    // A copy has the same tensors.
    let (_, copy) = run(&plan(folder.path(), "COPY")).unwrap();
    let original = Gguf::open(folder.path().join("model.gguf")).unwrap();
    for tensor in original.tensors() {
        assert_eq!(copy.data(tensor.name()).unwrap(), original.data(tensor.name()).unwrap());
    }
}

#[test]
fn rows_of_another_length_fall_back() {
    let folder = folder();
    tiny_llama(&folder.path().join("model.gguf"), &TinyLlama::default()).unwrap();
    let (report, made) = run(&plan(folder.path(), "Q4_K_M")).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("fallback")), "{:?}", report.notes);
    assert!(made.tensors().iter().all(|tensor| tensor.ty() != TensorType::Q4_K));
}

#[test]
fn an_importance_matrix_weighs_the_columns() {
    let folder = folder();
    let original = Gguf::open(model(folder.path(), TensorType::F32)).unwrap();
    let name = "blk.0.attn_q.weight";
    let file = folder.path().join("model.imatrix");
    imatrix(&file, &[(name, 256)]);
    let plan = with(&plan(folder.path(), "Q4_K_S"), |with| with.imatrix = Some(file.clone()));
    let (_, made) = run(&plan).unwrap();
    let importance: Vec<f32> = (0..256).map(|i| (4.0 + ((i * 37) % 101) as f32) / 2.0).collect();
    let values = original.to_f32(name).unwrap();
    let right = by_ggml(&values, 256, TensorType::Q4_K, Some(&importance));
    assert_eq!(made.data(name).unwrap(), right);
    assert_ne!(right, by_ggml(&values, 256, TensorType::Q4_K, None));
    for (entries, why) in [
        (vec![(name, 128)], "another model"),
        (vec![("blk.7.other.weight", 256)], "no entry"),
        (vec![], "no entries"),
    ] {
        imatrix(&file, &entries);
        let error = run(&plan).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("model.imatrix"), "{error}");
    }
}

#[test]
fn errors_say_what_to_change_and_leave_nothing() {
    let folder = folder();
    let path = model(folder.path(), TensorType::F32);
    let good = plan(folder.path(), "Q4_0");
    let refuse = |plan: &QuantizePlan, why: &str| {
        let error = run(plan).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(why), "{why}: {error}");
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with('.'))
            .collect();
        assert!(left.is_empty(), "{why}: {left:?} is left");
    };
    refuse(&plan(folder.path(), "IQ2_XXS"), "`imatrix`");
    let no_folder = folder.path().join("none/out.gguf");
    refuse(&QuantizePlan { output: no_folder, ..good.clone() }, "no such folder");
    refuse(&QuantizePlan { output: path.clone(), ..good.clone() }, "it is the input");
    let missing = folder.path().join("missing.gguf");
    refuse(&QuantizePlan { input: missing, ..good.clone() }, "missing.gguf");
    let embedding = with(&good, |with| with.embedding_type = Some(TensorType::Q4_K));
    let odd = folder.path().join("odd.gguf");
    tiny_llama(&odd, &TinyLlama::default()).unwrap();
    refuse(&QuantizePlan { input: odd, ..embedding }, "no multiple of 256");
    let overrides = vec!["attn_q=Q8_0".parse().unwrap()];
    refuse(&with(&plan(folder.path(), "F16"), |with| with.overrides = overrides), "no effect");
    let bad = with(&good, |with| with.overrides = vec!["attn_(q=Q8_0".parse().unwrap()]);
    refuse(&bad, "model.gguf");

    let (_, made) = run(&good).unwrap();
    drop(made);
    let before = std::fs::read(&good.output).unwrap();
    refuse(&QuantizePlan { force: false, ..good.clone() }, "--force");
    let again = folder.path().join("again.gguf");
    let twice = QuantizePlan { input: good.output.clone(), output: again, ..good.clone() };
    refuse(&twice, "`requantize`");
    run(&with(&twice, |with| with.requantize = true)).unwrap();

    // A truncated file, and a weight that is NaN.
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1000]).unwrap();
    refuse(&good, "model.gguf");
    let file = Gguf::open_header(folder.path().join("again.gguf")).unwrap();
    drop(file);
    let mut poisoned = bytes.clone();
    let end = poisoned.len();
    poisoned[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, &poisoned).unwrap();
    refuse(&good, "invalid data");
    assert_eq!(std::fs::read(&good.output).unwrap(), before, "an earlier output stays");
    // What a killed process left is removed.
    std::fs::write(&path, &bytes).unwrap();
    std::fs::write(folder.path().join(".out.gguf.part"), "half").unwrap();
    run(&good).unwrap();
    assert!(!folder.path().join(".out.gguf.part").exists());
}

#[test]
fn one_process_writes_an_output_at_a_time() {
    let folder = folder();
    model(folder.path(), TensorType::F32);
    let plan = plan(folder.path(), "Q8_0");
    let lock = std::fs::File::create(folder.path().join(".out.gguf.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let error = quantize(&plan, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    drop(lock);
    let report = run(&plan).unwrap().0;
    assert_eq!(report.files, std::slice::from_ref(&plan.output));
    assert!(!folder.path().join(".out.gguf.lock").exists());
}

#[test]
fn a_part_of_a_split_model_is_refused_if_it_is_not_the_first() {
    let folder = folder();
    let path = model(folder.path(), TensorType::F32);
    let second = folder.path().join("m-00002-of-00003.gguf");
    std::fs::rename(&path, &second).unwrap();
    let plan = QuantizePlan { input: second, ..plan(folder.path(), "Q8_0") };
    let error = quantize(&plan, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("m-00001-of-00003.gguf"), "{error}");
}

fn imatrix_plan(folder: &Path) -> ImatrixPlan {
    let model = folder.join("m.gguf");
    tiny_llama(&model, &TinyLlama { ty: TensorType::F32, ..TinyLlama::default() }).unwrap();
    ImatrixPlan {
        model,
        output: folder.join("imatrix.gguf"),
        text: "The quick brown fox jumps over the lazy dog. ".repeat(20),
        text_name: "fox.txt".into(),
        context: 32,
        chunks: Some(5),
        output_tensor: false,
        threads: 2,
        force: false,
    }
}

#[test]
fn an_importance_matrix_holds_the_squares_of_the_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let plan = imatrix_plan(folder.path());
    let mut seen = Vec::new();
    let report = super::imatrix(&plan, &mut |done, total| seen.push((done, total))).unwrap();
    let file = Gguf::open(&plan.model).unwrap();
    let matrices: Vec<_> = file
        .tensors()
        .iter()
        .filter(|tensor| tensor.name().starts_with("blk.") && tensor.dims().len() == 2)
        .map(|tensor| tensor.name().to_owned())
        .collect();
    assert_eq!((report.chunks, report.tokens, report.tensors), (5, 160, matrices.len()));
    assert_eq!((seen[0], seen[5]), ((0, 5), (5, 5)));
    assert!(report.unused_experts.is_empty());
    let found = Gguf::open(&plan.output).unwrap();
    let of = |name: &str| found.to_f32(name).unwrap();
    for name in &matrices {
        assert_eq!(of(&format!("{name}.counts")), [160.0], "{name}");
    }
    // The inputs of a layer are normalized: without the norm's weights their mean square is 1.
    for (matrix, norm) in [("attn_q", "attn_norm"), ("ffn_up", "ffn_norm")] {
        let sums = of(&format!("blk.0.{matrix}.weight.in_sum2"));
        let weights = file.to_f32(&format!("blk.0.{norm}.weight")).unwrap();
        let mean: f32 = sums.iter().zip(&weights).map(|(sum, w)| sum / (w * w)).sum::<f32>()
            / (160.0 * sums.len() as f32);
        assert!((mean - 1.0).abs() < 1e-3, "{matrix}: {mean}");
    }
    let same = |a: &str, b: &str| {
        let of = |name: &str| of(&format!("blk.0.{name}.weight.in_sum2"));
        assert_eq!(of(a), of(b));
    };
    same("attn_q", "attn_k");
    same("attn_q", "attn_v");
    same("ffn_gate", "ffn_up");
    assert!(found.tensor("output.weight.in_sum2").is_none());
    // Our reader takes it, and so does quantization.
    let means = super::imatrix::Imatrix::read(&plan.output).unwrap().means;
    assert_eq!(means.len(), matrices.len());
    let all = ImatrixPlan { output_tensor: true, force: true, ..plan.clone() };
    assert_eq!(super::imatrix(&all, &mut |_, _| ()).unwrap().tensors, matrices.len() + 1);
}

#[test]
fn an_importance_matrix_that_cannot_be_computed_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let plan = imatrix_plan(folder.path());
    let refused = |plan: &ImatrixPlan| {
        let error = super::imatrix(plan, &mut |_, _| ()).unwrap_err().to_string();
        assert!(!plan.output.exists() || plan.output == plan.model, "{error}");
        error
    };
    let short = ImatrixPlan { text: "a fox".into(), ..plan.clone() };
    assert!(refused(&short).contains("two chunks of 32"));
    let nowhere = ImatrixPlan { output: folder.path().join("none/x.gguf"), ..plan.clone() };
    assert!(refused(&nowhere).contains("no such folder"));
    let exists = ImatrixPlan { output: plan.model.clone(), ..plan.clone() };
    assert!(refused(&exists).contains("it exists"));
    let forced = ImatrixPlan { force: true, ..exists };
    assert!(refused(&forced).contains("it is the model"));
    let cut = ImatrixPlan { model: folder.path().join("cut.gguf"), ..plan.clone() };
    let bytes = std::fs::read(&plan.model).unwrap();
    std::fs::write(&cut.model, &bytes[..bytes.len() / 2]).unwrap();
    assert!(refused(&cut).contains("cut.gguf"));
    // A NaN weight makes activations NaN.
    let mut bytes = bytes;
    let norm = Gguf::open(&plan.model).unwrap().to_f32("blk.0.attn_norm.weight").unwrap();
    let norm: Vec<u8> = norm.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    let at = bytes.windows(norm.len()).position(|window| window == norm).unwrap();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let nan = ImatrixPlan { model: folder.path().join("nan.gguf"), ..plan.clone() };
    std::fs::write(&nan.model, &bytes).unwrap();
    let error = refused(&nan);
    assert!(
        error.contains("nan.gguf") && error.contains("blk.0.") && error.contains("NaN"),
        "{error}"
    );
}

#[test]
fn a_job_quantizes_and_says_what_it_did() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(folder.path(), TensorType::F32);
    let spec = r#"{"kind": "quantize", "model": "m", "quantize": {"type": "Q4_K_M",
        "tensor_types": ["attn_k=Q8_0"]}}"#;
    let order = |name: &str, model: &Path, spec: &str| {
        let job = Folder::new(folder.path().join(name));
        let spec: QuantizeSpec = serde_json::from_str(spec).unwrap();
        let order = QuantizeOrder {
            version: 1,
            id: name.into(),
            name: spec.new_name(),
            spec,
            model: model.to_owned(),
            model_sha256: None,
            imatrix: None,
        };
        job.create(&JobOrder::Quantize(order)).unwrap();
        job
    };
    let run_job = |job: &Folder| {
        let done = crate::job::run(job, &Control::default(), |order, work| match order {
            JobOrder::Quantize(order) => super::job::carry_out(order, work),
            other => panic!("{other:?}"),
        });
        assert!(done.unwrap());
        job.outcome().unwrap().unwrap()
    };
    let job = order("a", &source, spec);
    // What an attempt that was killed leaves.
    std::fs::create_dir_all(job.artifacts()).unwrap();
    std::fs::write(job.artifacts().join(".model.gguf.part"), "half").unwrap();
    let Outcome::Succeeded { trained_tokens: 0, artifacts } = run_job(&job) else {
        panic!("{:?}", job.outcome())
    };
    let kinds: Vec<_> = artifacts.iter().map(|artifact| artifact.kind).collect();
    assert_eq!(kinds, [ArtifactKind::Model, ArtifactKind::Provenance]);
    assert_eq!(std::fs::read_dir(job.artifacts()).unwrap().count(), 2);
    // The same bytes as without a job.
    let mut alone = plan(folder.path(), "Q4_K_M");
    alone.settings.overrides = vec!["attn_k=Q8_0".parse().unwrap()];
    run(&alone).unwrap();
    let written = job.path().join(&artifacts[0].file);
    assert!(std::fs::read(written).unwrap() == std::fs::read(&alone.output).unwrap());
    let events = Follower::new(job.events(), 0).read().unwrap();
    let progress = events.iter().rev().find_map(|entry| match entry.event {
        JobEvent::Progress { done, total } => Some((done, total)),
        _ => None,
    });
    assert!(progress.is_some_and(|(done, total)| done == total && total > 7), "{events:?}");
    assert!(events.last().unwrap().message.contains("bits per weight"), "{events:?}");
    // A second run of an ended job does nothing.
    run_job(&job);
    assert_eq!(Follower::new(job.events(), 0).read().unwrap(), events);

    let job = order("b", &alone.output, spec);
    let Outcome::Failed { failure, artifacts } = run_job(&job) else {
        panic!("{:?}", job.outcome())
    };
    assert!(artifacts.is_empty() && failure.message.contains("`requantize`"), "{failure:?}");
}
