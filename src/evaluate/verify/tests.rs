//! Tests of the bounds on a tiny model and on the default one, widened for the small number of
//! tokens.

use super::*;
use crate::gguf::fixture::{TinyLlama, tiny_bert, tiny_llama};
use std::path::PathBuf;

fn plan(model: PathBuf, folder: &Path, tokens: usize) -> VerifyPlan {
    let (text, folder) = (Some(SAMPLE.to_owned()), folder.to_owned());
    VerifyPlan { model, text, tokens, window: 128, threads: 2, folder }
}

fn run(plan: &VerifyPlan) -> Result<VerifyReport, VerifyError> {
    verify(plan, &mut |_| ())
}

fn tiny(folder: &Path, ty: TensorType) -> PathBuf {
    let path = folder.join("tiny.gguf");
    tiny_llama(&path, &TinyLlama { ty, ..TinyLlama::default() }).unwrap();
    path
}

/// Asserts that the temporary copy has been deleted.
fn assert_only(folder: &Path, files: usize) {
    assert_eq!(fs::read_dir(folder).unwrap().count(), files, "nothing is left behind");
}

#[test]
fn an_f32_model_is_its_own_reference() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path(), TensorType::F32);
    let mut seen = Vec::new();
    let plan = plan(model, folder.path(), 300);
    let report = verify(&plan, &mut |progress| seen.push(progress)).unwrap();
    assert!(report.passed(), "{report:#?}");
    assert_eq!((report.rows, report.window, report.runners.len()), (300, 128, 2));
    assert!(!seen.iter().any(|progress| matches!(progress, VerifyProgress::Writing(_))));
    assert!(seen.contains(&VerifyProgress::Reading { done: 128, total: 300 }));
    assert_only(folder.path(), 1);
}

#[test]
fn other_models_are_held_against_their_f32_copy() {
    let folder = tempfile::tempdir().unwrap();
    let report = run(&plan(tiny(folder.path(), TensorType::F16), folder.path(), 300)).unwrap();
    assert!(report.passed(), "{report:#?}");
    assert_eq!(report.runners.len(), 3);
    assert_only(folder.path(), 1);
}

#[test]
fn what_native_does_not_cover_is_measured_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    // No kernel supports heads of 10 elements.
    let shape = TinyLlama { n_embd: 40, ty: TensorType::F16, ..TinyLlama::default() };
    tiny_llama(&model, &shape).unwrap();
    let report = run(&plan(model, folder.path(), 300)).unwrap();
    assert!(report.native_missing.as_ref().unwrap().contains("no kernel fits"), "{report:#?}");
    let names: Vec<_> = report.runners.iter().map(|summary| summary.runner).collect();
    assert_eq!((names, report.checks.len(), report.passed()), (vec![LLAMA_CPP], 1, true));
}

#[test]
fn what_cannot_be_measured_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path(), TensorType::F32);
    let mut short = plan(model.clone(), folder.path(), 300);
    short.text = Some("a".into());
    assert!(matches!(run(&short), Err(VerifyError::TooShort(1))));
    let mut nowhere = plan(tiny(folder.path(), TensorType::F16), folder.path(), 300);
    nowhere.folder = folder.path().join("none");
    assert!(matches!(run(&nowhere), Err(VerifyError::Folder { .. })));
    tiny_bert(&model).unwrap();
    let error = run(&plan(model, folder.path(), 300)).unwrap_err();
    assert_eq!(error.to_string(), "this model cannot generate text");
}

#[test]
fn windows_follow_each_other() {
    let windows = |bos| {
        let text = Text { bos, tokens: (10..17).collect() };
        let windows = text.windows(4).into_iter();
        windows.map(|window| (window.inputs, window.targets)).collect::<Vec<_>>()
    };
    let some = |range: std::ops::Range<Token>| range.map(Some).collect::<Vec<_>>();
    let last = [&some(15..17)[..], &[None]].concat();
    assert_eq!(windows(None), [(vec![10, 11, 12, 13], some(11..15)), (vec![14, 15, 16], last)]);
    let last = vec![Some(16), None];
    assert_eq!(
        windows(Some(1)),
        [
            (vec![1, 10, 11, 12], some(10..14)),
            (vec![1, 13, 14, 15], some(13..17)),
            (vec![1, 16], last)
        ]
    );
}

/// Needs the default model's file, which CI provides.
#[test]
fn the_default_model_keeps_the_bounds() {
    let model = std::env::var_os("INGOT_TEST_MODEL").map(PathBuf::from);
    assert!(model.is_some() || std::env::var_os("CI").is_none(), "CI sets INGOT_TEST_MODEL");
    let Some(model) = model else { return };
    let folder = tempfile::tempdir().unwrap();
    let report = run(&plan(model, folder.path(), 384)).unwrap();
    println!("{report:#?}");
    let kl = |name: &str| report.runner(name).unwrap().mean_kl;
    assert!(kl(PROOF) <= 1e-5, "F32 in F32: {}", kl(PROOF));
    // With so few rows, single rows have a large effect: the bounds on 20,000 tokens are 1.1 and
    // 0.5%.
    assert!(kl(NATIVE) <= 1.4 * kl(LLAMA_CPP), "{} and {}", kl(NATIVE), kl(LLAMA_CPP));
    let native = report.runner(NATIVE).unwrap();
    assert!(native.perplexity_difference_percent.abs() < 2.5, "{native:?}");
    assert!(native.top1_agreement_percent > 90.0, "{native:?}");
    assert_only(folder.path(), 0);
}
