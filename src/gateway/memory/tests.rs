use super::*;
use crate::config::ServeOptions;

const GIB: u64 = 1 << 30;

/// The dimensions of SmolLM2-135M.
fn header() -> ModelHeader {
    let mut header = ModelHeader::mock();
    header.facts.n_layer = 30;
    header.facts.n_embd = 576;
    header.facts.n_head = 9;
    header.facts.key_length = 64;
    header.facts.value_length = 64;
    header.facts.n_vocab = 49_152;
    header.facts.n_ctx_train = 8_192;
    header.facts.kv_elements = vec![(192, 192); 30];
    header.weights_bytes = 94 << 20;
    header.repackable_bytes = 20 << 20;
    header
}

/// The configuration in `toml`; the runner is llama.cpp unless `toml` sets another.
fn config(toml: &str) -> EngineConfig {
    let mut options: ServeOptions = toml::from_str(toml).unwrap();
    options.runner.get_or_insert(RunnerKind::LlamaCpp);
    options.data_dir = Some("/nowhere".into());
    options.resolve().unwrap().engine
}

fn file(header: ModelHeader) -> ModelFile {
    ModelFile { header, path: "model.gguf".into() }
}

fn plan(toml: &str, available: u64) -> Result<MemoryPlan, DoesNotFit> {
    MemoryPlan::make(&file(header()), None, &config(toml), available)
}

#[test]
fn defaults_hold_many_typical_requests() {
    let plan = plan("kv_layout = \"unified\"", 16 * GIB).unwrap();
    assert_eq!((plan.context_length, plan.kv_tokens), (8_192, 32_768));
    assert_eq!(plan.kv_cache, 32_768 * 30 * 384 * 2);
    assert_eq!(plan.mapped_weights + plan.private_weights, 94 << 20);
    assert_eq!(plan.private_weights, 20 << 20);
    assert!(plan.notes.is_empty(), "{:?}", plan.notes);
    assert!(plan.total() < 2 * GIB, "{plan}");
}

#[test]
fn q8_0_halves_the_cache() {
    let f16 = plan("", 16 * GIB).unwrap().kv_cache;
    let q8 = plan("kv_type = \"q8_0\"", 16 * GIB).unwrap().kv_cache;
    assert_eq!(q8 * 64, f16 * 34);
}

#[test]
fn nearly_twice_the_tokens_fit_into_pages_of_q8_0() {
    let plan = |toml: &str, available| {
        let mut config = config(&format!("context_length = 512\n{toml}"));
        config.runner = None;
        let mut header = header();
        header.uncovered = None;
        let plan = MemoryPlan::make(&file(header), None, &config, available).unwrap();
        assert_eq!(plan.spec.runner, RunnerKind::Native);
        plan
    };
    let roomy = plan("", 16 * GIB);
    let little = roomy.total() - roomy.kv_cache + (160 << 20);
    let (f16, q8) = (plan("", little), plan("kv_type = \"q8_0\"", little));
    // Half of the available memory, in steps of 256 tokens.
    for plan in [&f16, &q8] {
        assert!(plan.kv_cache <= 80 << 20 && plan.kv_cache > 75 << 20, "{plan}");
    }
    assert!(q8.kv_tokens * 10 > f16.kv_tokens * 18, "{} and {}", f16.kv_tokens, q8.kv_tokens);
}

#[test]
fn a_small_machine_shrinks_the_cache_then_the_context() {
    let most = plan("", 4 * GIB).unwrap();
    let less = plan("", most.total() - (100 << 20)).unwrap();
    assert!(less.kv_tokens < most.kv_tokens && less.context_length == 8_192, "{less}");
    assert!(less.notes.is_empty());
    let tiny = plan("", most.total() - most.kv_cache).unwrap();
    assert!(tiny.context_length < 8_192 && tiny.kv_tokens >= tiny.context_length, "{tiny}");
    assert_eq!(tiny.notes.len(), 1);
}

#[test]
fn what_was_asked_for_is_refused_rather_than_shrunk() {
    let error = plan("context_length = 8192\nkv_tokens = 1000000", GIB).unwrap_err().to_string();
    for part in ["needs", "available", "1000000 tokens", "--kv-tokens", "--kv-type q8_0"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let error = plan("", 64 << 20).unwrap_err().to_string();
    assert!(error.contains("64.0 MiB is available"), "{error}");
}

#[test]
fn the_context_is_bounded_by_model_and_cache() {
    let long = plan("context_length = 100000", 16 * GIB).unwrap();
    assert_eq!((long.context_length, long.notes.len()), (8_192, 1));
    let small = plan("kv_tokens = 1024", 16 * GIB).unwrap();
    assert_eq!((small.context_length, small.kv_tokens), (1_024, 1_024));
    assert!(plan("kv_tokens = 7\nkv_layout = \"streams\"", 16 * GIB).is_err());
}

#[test]
fn streams_give_every_sequence_a_whole_context() {
    let roomy = plan("kv_layout = \"streams\"\nmax_sequences = 4", 64 * GIB).unwrap();
    assert_eq!((roomy.spec.max_sequences, roomy.kv_tokens), (4, 4 * 8_192));
    let tight = plan("kv_layout = \"streams\"", GIB).unwrap();
    assert!(tight.spec.max_sequences < 32 && tight.spec.max_sequences >= 1);
    assert_eq!(tight.kv_tokens, tight.spec.max_sequences * tight.context_length);
}

#[test]
fn streams_are_chosen_where_they_take_a_quarter_of_the_memory() {
    let layout = |toml: &str, available| plan(toml, available).unwrap().spec.kv_layout;
    let roomy = plan("", 16 * GIB).unwrap();
    assert_eq!((roomy.spec.kv_layout, roomy.kv_tokens), (KvLayout::Streams, 8 * 8_192));
    assert_eq!(layout("", 4 * GIB), KvLayout::Unified);
    assert_eq!(layout("max_sequences = 2", 4 * GIB), KvLayout::Streams);
    assert_eq!(layout("max_sequences = 64", 16 * GIB), KvLayout::Unified);
    assert_eq!(layout("kv_tokens = 1024", 16 * GIB), KvLayout::Unified);
    assert_eq!(layout("runner = \"mock\"", 16 * GIB), KvLayout::Unified);
}

#[test]
fn flash_attention_is_used_where_it_wins() {
    let flash = |toml: &str| plan(toml, 16 * GIB).unwrap().spec.flash_attention;
    assert!(!flash(""));
    assert!(flash("flash_attention = true"));
    assert!(flash("kv_layout = \"unified\""));
    assert!(flash("kv_type = \"q8_0\""));
    assert!(flash("gpu_layers = 1"));
}

#[test]
fn the_native_runner_takes_what_it_covers() {
    let runner = |covered: bool, toml: &str| {
        let mut header = header();
        header.uncovered = (!covered).then(|| "a reason".into());
        let mut config = config(toml);
        config.runner = config.runner.filter(|runner| *runner != RunnerKind::LlamaCpp);
        let plan = MemoryPlan::make(&file(header), None, &config, 16 * GIB).unwrap();
        (plan.spec.runner, plan.notes.join(", "))
    };
    for toml in ["", "kv_type = \"q8_0\""] {
        assert_eq!(runner(true, toml), (RunnerKind::Native, String::new()), "{toml}");
    }
    let (kind, note) = runner(false, "runner = \"native\"");
    assert_eq!((kind, note.as_str()), (RunnerKind::LlamaCpp, "llama.cpp runs it: a reason"));
    for toml in ["gpu_layers = 1", "kv_layout = \"unified\""] {
        assert_eq!(runner(true, toml).0, RunnerKind::LlamaCpp, "{toml}");
    }
}

#[test]
fn models_without_a_cache_or_a_context_are_planned_too() {
    let mut header = header();
    header.facts.kv_elements.clear();
    header.facts.n_ctx_train = 0;
    header.facts.causal = false;
    let plan = MemoryPlan::make(&file(header), None, &config(""), 16 * GIB).unwrap();
    assert_eq!((plan.kv_cache, plan.context_length), (0, 8_192));
    // Bidirectional attention: the whole input is one batch.
    assert_eq!(plan.spec.batch_tokens, 8_192);
}

#[test]
fn layers_on_a_gpu_leave_the_machine() {
    let all = plan("gpu_layers = 9999", 16 * GIB).unwrap();
    assert!(all.mapped_weights < 94 << 15 && all.on_gpu > 94 << 20, "{all}");
}

#[test]
fn extreme_headers_do_not_overflow() {
    let mut header = header();
    header.facts.n_vocab = u32::MAX;
    header.facts.n_embd = 1 << 24;
    header.facts.n_head = 1 << 24;
    header.facts.kv_elements = vec![(1 << 48, 1 << 48); 512];
    header.weights_bytes = 1 << 62;
    let model = file(header);
    for toml in ["", "kv_tokens = 4294967295", "flash_attention = false", "kv_layout = \"streams\""]
    {
        for draft in [None, Some(&model)] {
            assert!(MemoryPlan::make(&model, draft, &config(toml), GIB).is_err(), "{toml}");
        }
    }
}

#[test]
fn the_table_names_every_part() {
    let text = plan("", 16 * GIB).unwrap().to_string();
    for part in ["weights", "KV cache", "65536 tokens of f16", "compute buffers", "total"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_draft_model_is_counted_with_its_cache() {
    let make = |toml: &str, available: u64| {
        let (mut model, mut small) = (header(), header());
        model.uncovered = None;
        small.facts.n_ctx_train = 2_048;
        small.weights_bytes = 10 << 20;
        let mut config = config(toml);
        config.runner = Some(RunnerKind::Native);
        let draft = ModelFile { header: small, path: "draft.gguf".into() };
        MemoryPlan::make(&file(model), Some(&draft), &config, available)
    };
    let plan = make("", 16 * GIB).unwrap();
    assert_eq!(plan.spec.draft, Some("draft.gguf".into()));
    assert!(plan.draft_model > (10 << 20) + plan.kv_cache, "{plan}");
    assert!(plan.notes.join(" ").contains("2048"), "{plan}");
    assert!(plan.to_string().contains("draft model"));
    let error = make("kv_tokens = 32768", plan.total() - 1).unwrap_err().to_string();
    for part in ["for the draft model", "no --draft-model"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let without = make("speculate = \"off\"", 16 * GIB).unwrap();
    assert_eq!((without.spec.draft, without.draft_model), (None, 0));
}
