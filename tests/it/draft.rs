//! `--draft-model`: output is unchanged, and a model that cannot draft is rejected with a reason.

use crate::models_made::{Changes, copy_with, llama};
use crate::support::{Options, real_model};
use ingot::gguf::Gguf;
use ingot::gguf::fixture::tiny_bert;
use std::path::Path;

fn with_draft(model: &Path, draft: &Path) -> Options {
    Options::models(&[model]).flag("--draft-model", draft.display())
}

/// The log of a server that refuses to start.
fn refused(options: Options) -> String {
    let (status, log) = options.run();
    assert!(!status.success(), "{log}");
    log
}

#[test]
fn a_drafted_answer_is_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "model", 1);
    let prompts = ["Once upon a time", "On and on", "The cat sat on the mat"];
    let answers = |options: Options| {
        let server = options.admin().start();
        let texts = prompts.map(|prompt| server.complete("model", prompt, 100));
        let status = server.admin().get("/admin/models").good();
        let planned = status["data"][0]["memory"]["draft_model"].as_u64();
        (texts, planned, server.metric("ingot_spec_decode_num_accepted_tokens_total", &[]))
    };
    let (plain, none, _) = answers(Options::models(&[&model]).flag("--speculate", "off"));
    let (_, _, copied) = answers(Options::models(&[&model]).flag("--speculate", "always"));
    let itself = with_draft(&model, &model).flag("--speculate", "always");
    let (drafted, planned, accepted) = answers(itself);
    assert_eq!(plain, drafted);
    assert!(accepted > copied.max(150.0), "{accepted}, {copied} of them without a draft model");
    assert!(none == Some(0) && planned.is_some_and(|bytes| bytes > 0), "{none:?}, {planned:?}");
    // Almost every token drafted by another model with the same vocabulary is wrong.
    let other = llama(folder.path(), "other", 2);
    let (drafted, ..) = answers(with_draft(&model, &other).flag("--speculate", "always"));
    assert_eq!(plain, drafted);
}

#[test]
fn what_cannot_draft_is_refused_in_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "model", 1);
    let renamed = folder.path().join("renamed.gguf");
    let gguf = Gguf::open_header(&model).expect("readable");
    let mut tokens =
        gguf.strings("tokenizer.ggml.tokens").expect("strings").expect("there").to_vec();
    tokens[4] = "</thought>".into();
    let set = vec![("tokenizer.ggml.tokens", tokens.into())];
    copy_with(&model, &renamed, &Changes { set, ..Changes::default() });
    let log = refused(with_draft(&model, &renamed));
    let difference = "token 4 is \"</thought>\" instead of \"</think>\"";
    assert!(log.contains(difference) && log.contains("--draft-model"), "{log}");

    let encoder = folder.path().join("encoder.gguf");
    tiny_bert(&encoder).expect("the model is written");
    let log = refused(with_draft(&model, &encoder));
    assert!(log.contains("native runner") && log.contains("`bert`"), "{log}");

    let log = refused(with_draft(&model, &model).flag("--runner", "llama-cpp"));
    assert!(log.contains("llama.cpp runs the model") && log.contains("--draft-model"), "{log}");

    let log = refused(with_draft(&model, &folder.path().join("nowhere.gguf")));
    assert!(log.contains("nowhere.gguf"), "{log}");
    // Without speculation the draft model is not even read.
    with_draft(&model, &renamed).flag("--speculate", "off").start();
}

/// Needs the vocabulary of a real model, which the tiny model does not have.
#[test]
fn the_numbers_of_tokens_are_compared() {
    let folder = tempfile::tempdir().expect("a folder");
    let tiny = llama(folder.path(), "tiny", 1);
    let log = refused(with_draft(&real_model(), &tiny));
    assert!(log.contains("vocabulary") && log.contains("49152"), "{log}");
}
