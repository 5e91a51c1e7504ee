//! What speculation gains: the same requests with and without, in turn, in one engine.
//! `cargo bench --bench speculate -- MODEL.gguf [REPETITIONS] [DRAFT]`
//!
//! DRAFT is a draft model: a file; or `layers:N`, a copy of the model with N of its layers (the first
//! and the last); or `idle:N`, the model itself, while the served one gets N layers more that take
//! their time and change nothing, as a large model for which a small one always finds the words.
//!
//! Output tokens per second, medians, and their ratio; the texts must be equal. One stream that
//! quotes, edits JSON (free, and held to a schema) or writes freely; and a full batch of each, where
//! speculation must not cost anything.

use ingot::engine::Local;
use ingot::gguf::fixture::{CopiedLayer, with_layers};
use ingot::gguf::{Gguf, ModelFacts};
use ingot::ipc::{
    Event, FromEngine, Generate, Grammar, GrammarSpec, LoadSpec, Progress, Prompt, RunnerKind,
    Speculate, StopParams, ToEngine,
};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The binary's own: its huge pages are worth a fifth of a token's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FULL: u64 = 32;
const OUTPUT: u32 = 160;

const QUOTE: &str = "Repeat the following text word for word.\n\nThe harbour master kept a book of \
    every boat that came and went. On the first page stood the names of the seven red boats, on \
    the second page the names of the seven blue boats, and on the last page, in a smaller hand, \
    the name of one grey boat that nobody in the village had ever seen. Every evening he read the \
    names aloud, the seven red boats, the seven blue boats and the one grey boat, and every \
    evening the wind answered him.";
const EDIT: &str = "Answer with this JSON, but with every price raised by 1:\n\
    [{\"item\": \"apple\", \"color\": \"red\", \"price\": 3, \"stock\": 120}, \
    {\"item\": \"banana\", \"color\": \"yellow\", \"price\": 2, \"stock\": 75}, \
    {\"item\": \"cherry\", \"color\": \"red\", \"price\": 9, \"stock\": 40}, \
    {\"item\": \"grape\", \"color\": \"green\", \"price\": 5, \"stock\": 64}]";
const SCHEMA: &str = r#"{"type": "array", "minItems": 4, "maxItems": 4, "items": {"type": "object",
    "properties": {"item": {"type": "string"}, "color": {"type": "string"},
    "price": {"type": "integer"}, "stock": {"type": "integer"}},
    "required": ["item", "color", "price", "stock"], "additionalProperties": false}}"#;
const FREE: &str = "Write a story about a lighthouse.";

struct Bench {
    local: Local,
    next: u64,
    last: Progress,
}

impl Bench {
    fn request(&mut self, question: &str, schema: bool, drafts: bool) -> Generate {
        let text = format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
        let grammar = Grammar::JsonSchema(SCHEMA.into());
        let prompt = Prompt::Text { text, add_special: false, parse_special: true };
        self.next += 1;
        Generate {
            stop: StopParams { max_tokens: Some(OUTPUT), ..StopParams::default() },
            grammar: schema.then_some(GrammarSpec { grammar, trigger: None }),
            max_drafted: (!drafts).then_some(0),
            ..Generate::plain(self.next, prompt)
        }
    }

    /// Output tokens per second from the first token on, and the text.
    fn round(&mut self, question: &str, schema: bool, streams: u64, drafts: bool) -> (f64, String) {
        for _ in 0..streams {
            let request = self.request(question, schema, drafts);
            self.local.send(ToEngine::Generate(Box::new(request)));
        }
        let (mut open, mut tokens, mut texts) = (streams, 0, String::new());
        let (mut begun, mut ended) = (None, Instant::now());
        while open > 0 {
            let events = match self.local.frames().recv().expect("the engine lives") {
                FromEngine::Events(events) => events,
                FromEngine::Progress(progress) => {
                    self.last = progress;
                    continue;
                }
                _ => continue,
            };
            for (_, event) in events {
                match event {
                    Event::Delta { tokens: more, text, .. } => {
                        ended = Instant::now();
                        // What comes with the prompt's last step is not decoding.
                        if begun.get_or_insert(ended) < &mut ended {
                            tokens += more;
                        }
                        texts.push_str(if streams == 1 { &text } else { "" });
                    }
                    Event::Done { .. } => open -= 1,
                    Event::Failed(error) => panic!("{error}"),
                    _ => {}
                }
            }
        }
        let seconds = begun.map_or(0.0, |begun| (ended - begun).as_secs_f64());
        (f64::from(tokens) / seconds.max(1e-9), texts)
    }

    fn counts(&self) -> [f64; 4] {
        let last = &self.last;
        [
            last.drafted_tokens as f64,
            last.accepted_tokens as f64,
            last.draft_model_tokens as f64,
            last.draft_model_accepted as f64,
        ]
    }
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// The served model and its draft model, made in a folder where need be.
fn models(model: PathBuf, draft: &str, folder: &Path) -> (PathBuf, PathBuf) {
    let header = Gguf::open_header(&model).expect("the model is readable");
    let layers = ModelFacts::read(&header).expect("the model is complete").n_layer as usize;
    let made = folder.join("made.gguf");
    let number = |text: &str| text.parse::<usize>().expect("a number of layers");
    if let Some(kept) = draft.strip_prefix("layers:").map(number) {
        let first = kept.div_ceil(2).min(layers);
        let last = layers - (kept - first).min(layers - first);
        let kept: Vec<_> = (0..first).chain(last..layers).map(CopiedLayer::Whole).collect();
        with_layers(&model, &made, &kept).expect("the copy is written");
        (model, made)
    } else if let Some(idle) = draft.strip_prefix("idle:").map(number) {
        let whole = (0..layers).map(CopiedLayer::Whole);
        let all = whole.chain((0..idle).map(|at| CopiedLayer::Idle(at % layers)));
        with_layers(&model, &made, &all.collect::<Vec<_>>()).expect("the copy is written");
        (made, model)
    } else {
        (model, draft.into())
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let model = arguments.first().cloned().or_else(|| std::env::var("INGOT_TEST_MODEL").ok());
    let Some(mut model) = model.map(PathBuf::from) else {
        println!("name a model: cargo bench --bench speculate -- MODEL.gguf");
        return;
    };
    let repetitions = arguments.get(1).and_then(|count| count.parse().ok()).unwrap_or(5);
    let folder = tempfile::tempdir().expect("a folder");
    let mut draft = None;
    if let Some(named) = arguments.get(2) {
        let (served, drafts) = models(model, named, folder.path());
        (model, draft) = (served, Some(drafts));
    }
    let local = Local::start(LoadSpec {
        draft,
        kv_tokens: 65_536,
        max_sequences: FULL as u32,
        threads: std::thread::available_parallelism().map_or(2, |count| count.get() as u32),
        speculate: Speculate::Auto,
        ..LoadSpec::plain(model, RunnerKind::Native)
    });
    let mut bench =
        Bench { local: local.expect("threads start"), next: 0, last: Progress::default() };
    let loaded = bench.local.frames().recv().expect("the engine lives");
    let FromEngine::Loaded(info) = loaded else { panic!("{loaded:?}") };
    assert!(info.speculates, "the native runner does not cover this model");
    println!(
        "{:<28} {:>9} {:>9} {:>7}  accepted of drafted",
        "tokens/s", "without", "with", "ratio"
    );
    for (name, question, schema) in [
        ("quote", QUOTE, false),
        ("edit JSON", EDIT, false),
        ("edit JSON, with a schema", EDIT, true),
        ("write freely", FREE, false),
    ] {
        for streams in [1, 8, FULL] {
            bench.round(question, schema, streams, true);
            let (mut without, mut with) = (Vec::new(), Vec::new());
            let before = bench.counts();
            for _ in 0..repetitions {
                let (rate, plain) = bench.round(question, schema, streams, false);
                without.push(rate);
                let (rate, drafted) = bench.round(question, schema, streams, true);
                with.push(rate);
                assert_eq!(plain, drafted, "the text is the same");
            }
            let after = bench.counts();
            let (without, with) = (median(&mut without), median(&mut with));
            let [drafted, accepted, modelled, right] =
                std::array::from_fn(|at| after[at] - before[at]);
            println!(
                "{:<28} {without:>9.1} {with:>9.1} {:>7.2}  {accepted} of {drafted}, the draft \
                 model's {right} of {modelled}",
                format!("{name}, {streams} at once"),
                with / without,
            );
        }
    }
}
