//! The block `pretrain`: dimensions of a new model, its tokenizer, its validation data and the
//! prompt of its samples.

use super::{Optimizer, Resolved, Schedule, Spec, TaskSettings, Weights, within};
use crate::dataset::DatasetKind;
use serde::{Deserialize, Serialize};

/// Default width of an attention head.
const HEAD: usize = 64;
/// Number of parameters below which the embedding is also used as the output matrix.
const TIED: usize = 100_000_000;
/// Vocabulary of single bytes, without merges.
pub const BYTES: usize = 256;
const MOST_TOKENS: usize = 1 << 18;
/// Default number of tokens per forward and backward pass, unless `micro_batch` is given.
const ROW: usize = 4096;

/// Dimensions of the model, for example `{"depth": 4}`. Missing ones are derived from the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Pretrain {
    /// Number of layers; the width is 64 times this number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Width of the feed-forward layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn: Option<usize>,
    /// Context length in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Whether the embedding is also used as the output matrix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tied: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
    /// Fraction at the end of the data that is used for validation if no validation data is given.
    /// 0.05 by default, and at most 131,072 tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
    /// Beginning of the generated samples. By default, the first words of the validation data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
}

/// A tokenizer to train, or the model whose tokenizer is used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Tokenizer {
    /// Vocabulary size. 256 means single bytes; the end-of-text token is then added to these 256.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

/// The dimensions of a new model, with every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub ffn: usize,
    pub context: usize,
    pub rope_theta: f64,
    pub tied: bool,
    /// Vocabulary size.
    pub vocab: usize,
}

/// Source of the tokenizer, with defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerPlan {
    /// Train a tokenizer with this vocabulary size on the data.
    Train { vocab_size: usize },
    /// Use the tokenizer of this model.
    From(String),
}

impl Shape {
    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        let (d, head) = (self.width, self.width / self.heads);
        let attention = 2 * d * d + 2 * d * self.kv_heads * head;
        let layer = attention + 3 * d * self.ffn + 2 * d;
        let tables = if self.tied { 1 } else { 2 };
        self.layers * layer + tables * self.vocab * d + d
    }
}

impl Pretrain {
    /// The model's dimensions for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// The key that is wrong and the values it may have.
    pub fn shape(&self, vocab: usize) -> Result<Shape, String> {
        let from_width = self.width.map(|width| (width / HEAD).max(1));
        let depth = self.depth.or(self.layers).or(from_width).unwrap_or(4);
        let layers = self.layers.unwrap_or(depth);
        within("pretrain.depth", depth as f64, 1.0, 256.0)?;
        within("pretrain.layers", layers as f64, 1.0, 256.0)?;
        let width = self.width.unwrap_or(HEAD * depth);
        multiple("pretrain.width", width, 32, 1 << 16)?;
        let heads = self.heads.unwrap_or((width / HEAD).max(1));
        within("pretrain.heads", heads as f64, 1.0, 1024.0)?;
        if !width.is_multiple_of(heads) || !(width / heads).is_multiple_of(8) {
            return Err(format!(
                "pretrain.heads: {heads} heads do not share a width of {width}, each a multiple of 8"
            ));
        }
        let fewer = if heads <= 8 { heads } else { (heads / 4).max(1) };
        let kv_heads = self.kv_heads.unwrap_or_else(|| divisor(heads, fewer));
        let group = heads.checked_div(kv_heads).unwrap_or(0) * (width / heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || !group.is_multiple_of(32) {
            return Err(format!(
                "pretrain.kv_heads: {kv_heads} does not divide {heads} heads, or leaves those that \
                 share one no multiple of 32 wide"
            ));
        }
        let ffn = self.ffn.unwrap_or((8 * width).div_ceil(3).next_multiple_of(64));
        multiple("pretrain.ffn", ffn, 32, 1 << 18)?;
        let context = self.context.unwrap_or(512);
        within("pretrain.context", context as f64, 8.0, f64::from(1 << 20))?;
        let rope_theta = self.rope_theta.unwrap_or(10_000.0);
        within("pretrain.rope_theta", rope_theta, 2.0, 1e9)?;
        let tied = self.tied.unwrap_or(true);
        let mut shape =
            Shape { width, layers, heads, kv_heads, ffn, context, rope_theta, tied, vocab };
        shape.tied = self.tied.unwrap_or(shape.parameters() < TIED);
        Ok(shape)
    }

    /// The source of the tokenizer.
    ///
    /// # Errors
    /// The key that is wrong and the values it may have.
    pub fn tokenizer(&self) -> Result<TokenizerPlan, String> {
        let key = "pretrain.tokenizer";
        match self.tokenizer.clone().unwrap_or_default() {
            Tokenizer { vocab_size: Some(_), from: Some(_) } => {
                Err(format!("{key}: it is trained (`vocab_size`) or taken (`from`), not both"))
            }
            Tokenizer { from: Some(from), .. } => Ok(TokenizerPlan::From(from)),
            Tokenizer { vocab_size, .. } => {
                let vocab_size = vocab_size.unwrap_or(32_768);
                within(&format!("{key}.vocab_size"), vocab_size as f64, 256.0, MOST_TOKENS as f64)?;
                Ok(TokenizerPlan::Train { vocab_size })
            }
        }
    }

    /// Fraction at the end of the data that is used for validation.
    pub fn held_out(&self) -> f64 {
        self.held_out.unwrap_or(0.05)
    }

    fn has_shape(&self) -> bool {
        let Self { width, layers, heads, kv_heads, ffn, context, .. } = self;
        let counted = [self.depth, *width, *layers, *heads, *kv_heads, *ffn, *context];
        counted.iter().any(Option::is_some) || self.rope_theta.is_some() || self.tied.is_some()
    }
}

impl TaskSettings for Pretrain {
    fn dataset(&self) -> Option<DatasetKind> {
        None
    }

    /// The rate of a new model of width 512; [`TaskSettings::resolve`] scales it.
    fn learning_rates(&self) -> [f64; 2] {
        [1e-3; 2]
    }

    fn weights(&self) -> Weights {
        Weights::All("pretraining trains all weights")
    }

    fn new_model(&self) -> Option<&Pretrain> {
        Some(self)
    }

    fn check(&self, _: &Resolved) -> Result<(), String> {
        within("pretrain.held_out", self.held_out(), 0.0, 0.5)
    }

    fn is_evaluated(&self, spec: &Spec) -> bool {
        spec.data.validation.is_some() || self.held_out() > 0.0
    }

    fn resolve(&self, spec: &Spec) -> Result<Resolved, String> {
        match (&spec.model, &spec.name) {
            (None, None) => {
                return Err("name: a job of kind `pretrain` needs one, or a `model`".into());
            }
            (Some(_), Some(_)) => {
                let why =
                    "name: it is for a fresh model; a `model` trained further takes a `suffix`";
                return Err(why.into());
            }
            (Some(_), None) if self.has_shape() || self.tokenizer.is_some() => {
                return Err("pretrain: a `model` that is trained further has its dimensions and \
                            its tokenizer already"
                    .into());
            }
            _ => {}
        }
        if self.held_out.is_some() && spec.data.validation.is_some() {
            return Err("pretrain.held_out: `data.validation` is given already".into());
        }
        let shape = match self.tokenizer()? {
            TokenizerPlan::Train { vocab_size } => self.shape(vocab_size)?,
            TokenizerPlan::From(_) => self.shape(BYTES)?,
        };
        let train = &spec.train;
        let fresh = spec.model.is_none();
        let max_length = train.max_length.unwrap_or(shape.context);
        if fresh && max_length > shape.context {
            return Err(format!(
                "train.max_length: {max_length} is more than the model sees; raise \
                 `pretrain.context` ({})",
                shape.context
            ));
        }
        let batch_size = train.batch_size.unwrap_or(32);
        let (betas, eps, weight_decay, clip) = ([0.9, 0.95], 1e-8, 0.1, 1.0);
        let adamw = Optimizer::AdamW { betas, eps, weight_decay, clip };
        // A lower rate for an existing model: the rate of a new model would destroy what it has
        // learned.
        let [_, rate] = self.learning_rates();
        let rate = if fresh { rate * (512.0 / shape.width as f64).sqrt() } else { 5e-5 };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Resolved {
            epochs: train.epochs.or(train.max_steps.is_none().then_some(1.0)),
            max_steps: train.max_steps,
            max_minutes: train.max_minutes,
            batch_size,
            micro_batch: train.micro_batch.unwrap_or((ROW / max_length).clamp(1, batch_size)),
            max_length,
            learning_rate: train.learning_rate.unwrap_or(rate),
            schedule: train.schedule.unwrap_or(Schedule::WarmupStableDecay),
            warmup: train.warmup.unwrap_or(0.01),
            warmup_steps: train.warmup_steps,
            eval_every: train.eval_every.unwrap_or(250),
            checkpoint_every: train.checkpoint_every.unwrap_or(250),
            keep_checkpoints: train.keep_checkpoints.unwrap_or(3),
            load_best_model_at_end: train.load_best_model_at_end.unwrap_or(false),
            threads: train.threads.unwrap_or(cores),
            device: train.device.unwrap_or_default(),
            activation_checkpointing: train.activation_checkpointing.unwrap_or(false),
            optimizer: train.optimizer.clone().unwrap_or(adamw),
        })
    }
}

/// The largest divisor of `whole` that is at most `most`.
fn divisor(whole: usize, most: usize) -> usize {
    (1..=most).rev().find(|part| whole.is_multiple_of(*part)).unwrap_or(1)
}

fn multiple(key: &str, value: usize, of: usize, most: usize) -> Result<(), String> {
    match value > 0 && value.is_multiple_of(of) && value <= most {
        true => Ok(()),
        false => Err(format!("{key}: {value} is no multiple of {of} up to {most}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(more: &str) -> Result<(Spec, Resolved), String> {
        let text = format!(r#"{{"kind": "pretrain", "data": {{"train": "f"}}, {more}}}"#);
        let spec: Spec = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let resolved = spec.resolve()?;
        Ok((spec, resolved))
    }

    fn shape(text: &str, vocab: usize) -> Result<Shape, String> {
        serde_json::from_str::<Pretrain>(text).unwrap().shape(vocab)
    }

    #[test]
    fn one_dial_gives_the_methods_shape() {
        let four = shape(r#"{"depth": 4}"#, 4096).unwrap();
        assert_eq!((four.width, four.layers, four.heads, four.kv_heads), (256, 4, 4, 4));
        assert_eq!((four.ffn, four.context, four.rope_theta, four.tied), (704, 512, 1e4, true));
        // 8/3 of 768 is 2,048; 12 query heads share 3 key-value heads.
        let twelve = shape(r#"{"depth": 12}"#, 32_768).unwrap();
        assert_eq!((twelve.ffn, twelve.heads, twelve.kv_heads), (2048, 12, 3));
        let ten = shape(r#"{"depth": 10}"#, 32_768).unwrap();
        assert_eq!((ten.heads, ten.kv_heads), (10, 2));
        let twenty = shape(r#"{"depth": 20}"#, 32_768).unwrap();
        assert!(!twenty.tied && twenty.parameters() > TIED);
        // nanoGPT's dimensions, given one by one.
        let text = r#"{"width": 128, "layers": 4, "heads": 4, "context": 64, "tied": false}"#;
        let own = shape(text, 65).unwrap();
        assert_eq!((own.width, own.kv_heads, own.ffn, own.tied), (128, 4, 384, false));
        assert_eq!(
            own.parameters(),
            4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 2 * 65 * 128 + 128
        );
    }

    #[test]
    fn defaults_are_those_of_the_method() {
        let (spec, resolved) = spec(r#""name": "m""#).unwrap();
        assert_eq!(spec.adapter, None);
        assert_eq!(resolved.learning_rate, 1e-3 * 2f64.sqrt());
        assert_eq!((resolved.schedule, resolved.warmup), (Schedule::WarmupStableDecay, 0.01));
        let Optimizer::AdamW { betas, weight_decay, clip, .. } = resolved.optimizer else {
            panic!("{:?}", resolved.optimizer)
        };
        assert_eq!((betas, weight_decay, clip), ([0.9, 0.95], 0.1, 1.0));
        assert_eq!((resolved.max_length, resolved.micro_batch), (512, 8));
        let plan = spec.task.settings().new_model().unwrap().tokenizer().unwrap();
        assert_eq!(plan, TokenizerPlan::Train { vocab_size: 32_768 });
        let again: Spec = serde_json::from_str(
            r#"{"kind": "pretrain", "data": {"train": "f"}, "name": "m", "adapter": null}"#,
        )
        .unwrap();
        let text = serde_json::to_string(&again).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), again);
    }

    #[test]
    fn mistakes_are_named() {
        for (more, why) in [
            (r#""suffix": "x""#, "name: "),
            (r#""name": "m", "model": "n""#, "`suffix`"),
            (r#""name": "m", "adapter": {"r": 16}"#, "adapter: "),
            (r#""model": "m", "adapter": {}"#, "adapter: "),
            (r#""model": "m", "pretrain": {"depth": 4}"#, "already"),
            (r#""name": "m", "pretrain": {"deep": 4}"#, "deep"),
            (r#""name": "m", "pretrain": {"width": 100}"#, "pretrain.width"),
            (r#""name": "m", "pretrain": {"heads": 7}"#, "pretrain.heads"),
            (r#""name": "m", "pretrain": {"heads": 0}"#, "pretrain.heads"),
            (r#""name": "m", "pretrain": {"kv_heads": 3}"#, "pretrain.kv_heads"),
            (r#""name": "m", "pretrain": {"kv_heads": 0}"#, "pretrain.kv_heads"),
            (r#""name": "m", "pretrain": {"layers": 0}"#, "pretrain.depth"),
            (r#""name": "m", "pretrain": {"held_out": 0.9}"#, "pretrain.held_out"),
            (r#""name": "m", "pretrain": {"tokenizer": {"vocab_size": 100}}"#, "vocab_size"),
            (r#""name": "m", "pretrain": {"tokenizer": {"size": 300}}"#, "size"),
            (
                r#""name": "m", "pretrain": {"tokenizer": {"vocab_size": 300, "from": "m"}}"#,
                "not both",
            ),
            (r#""name": "m", "train": {"max_length": 1024}"#, "pretrain.context"),
            (r#""name": "m", "train": {"max_minutes": 0}"#, "train.max_minutes"),
        ] {
            let error = spec(more).unwrap_err();
            assert!(error.contains(why), "{more}: {error}");
        }
        let sft = r#"{"kind": "sft", "model": "m", "data": {"train": "f"}, "pretrain": {}}"#;
        let error = serde_json::from_str::<Spec>(sft).unwrap_err().to_string();
        assert!(error.contains("pretrain: "), "{error}");
    }
}
