//! Resolves a specification to an order. The server and the command line look up models in
//! different places; everything after that is the same for both.

use super::estimate::ResourceEstimate;
use super::order::{Order, name_of};
use super::spec::{Resolved, Spec};
use crate::gguf::{Gguf, ModelConfig};
use std::path::PathBuf;

/// The files of the models that a specification names.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `model`
    pub base: Option<BaseModel>,
    /// `adapter.init`
    pub init: Option<InitAdapter>,
    /// `pretrain.tokenizer.from`: the GGUF whose tokenizer the new model takes.
    pub tokenizer: Option<PathBuf>,
    /// `distill.teacher`
    pub teacher: Option<PathBuf>,
    /// Size of the files of training and validation data.
    pub data_bytes: u64,
}

/// The model to continue training from.
#[derive(Debug, Clone)]
pub struct BaseModel {
    /// The name under which the model is served.
    pub name: String,
    /// The GGUF file.
    pub path: PathBuf,
    /// SHA-256 of the file, if known.
    pub sha256: Option<String>,
    /// The Hugging Face folder from which the file was converted.
    pub parent: Option<PathBuf>,
    /// Name and file of the adapter, if the specification's `model` names an adapter. Training
    /// continues from this adapter.
    pub adapter: Option<(String, PathBuf)>,
}

/// An adapter to continue training from.
#[derive(Debug, Clone)]
pub struct InitAdapter {
    /// A PEFT folder or a GGUF file.
    pub path: PathBuf,
    /// The name of the adapter's base model, if known.
    pub base: Option<String>,
}

/// Why a specification cannot become a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// `key: allowed values`
    #[error("{0}")]
    Spec(String),
    #[error("adapter.init must name an adapter of the model")]
    Init,
    #[error(
        "adapter is null, which trains all weights, but the model named is an adapter: name its base"
    )]
    AllWeightsOfAdapter,
    #[error("The model cannot be trained: {0}")]
    Model(String),
}

impl ResolveError {
    /// The key of the specification that is wrong.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::Spec(why) => {
                why.split_once(": ").map(|(key, _)| key).filter(|key| !key.contains(' '))
            }
            Self::Init => Some("adapter.init"),
            Self::AllWeightsOfAdapter => Some("adapter"),
            Self::Model(_) => Some("model"),
        }
    }
}

/// A specification that can be run: its models are found and its settings resolved.
#[derive(Debug)]
pub struct ResolvedJob {
    /// If `model` named an adapter, it now names the base model, and `adapter.init` names the
    /// adapter.
    pub spec: Spec,
    pub settings: Resolved,
    pub estimate: ResourceEstimate,
    base: Option<BaseModel>,
    init: Option<PathBuf>,
    tokenizer: Option<PathBuf>,
    teacher: Option<PathBuf>,
}

impl ResolvedJob {
    /// Resolves the settings, and reads the header of the base model.
    ///
    /// # Errors
    /// [`ResolveError`] if a setting or the model's family is not supported.
    pub fn new(mut spec: Spec, sources: Sources) -> Result<Self, ResolveError> {
        let settings = spec.resolve().map_err(ResolveError::Spec)?;
        let Sources { base, init, tokenizer, teacher, data_bytes } = sources;
        let mut path = None;
        if let Some(base) = &base {
            spec.model = Some(base.name.clone());
            if let Some((name, file)) = &base.adapter {
                let adapter = spec.adapter.as_mut().ok_or(ResolveError::AllWeightsOfAdapter)?;
                adapter.init.get_or_insert_with(|| name.clone());
                path = Some(file.clone());
            }
        }
        if let Some(init) = init {
            let base = base.as_ref().map(|base| &base.name);
            if init.base.is_some() && init.base.as_ref() != base {
                return Err(ResolveError::Init);
            }
            path = Some(init.path);
        }
        let header = base.as_ref().map(|base| Gguf::open_header(&base.path)).transpose();
        let header = header.map_err(|error| ResolveError::Model(error.to_string()))?;
        if let Some(Ok(config)) = header.as_ref().map(ModelConfig::read) {
            let checked = spec.task.settings().check_layers(&config);
            checked.map_err(ResolveError::Spec)?;
        }
        let estimate = ResourceEstimate::of(header.as_ref(), &spec, &settings);
        let estimate = estimate.map_err(ResolveError::Model)?;
        let (model, teacher_file) = (header.as_ref(), teacher.as_deref());
        let estimate = estimate.with_teacher(model, &spec, &settings, teacher_file, data_bytes);
        Ok(Self { spec, settings, estimate, base, init: path, tokenizer, teacher })
    }

    /// SHA-256 of the base model, if it was converted from a Hugging Face folder.
    pub fn digest_of_folder(&self) -> Option<&str> {
        let converted = self.base.as_ref().filter(|base| base.parent.is_some());
        converted.and_then(|base| base.sha256.as_deref())
    }

    /// The order of this job, with the data files `train` and `validation`.
    pub fn order(self, id: String, train: PathBuf, validation: Option<PathBuf>) -> Order {
        let name = name_of(&self.spec, &id);
        let mut order = Order::new(id, self.spec.filled(&self.settings), name, train);
        order.validation = validation;
        order.init = self.init;
        order.tokenizer = self.tokenizer;
        order.teacher = self.teacher;
        if let Some(base) = self.base {
            order.model = Some(base.path);
            order.model_sha256 = base.sha256;
            order.parent = base.parent;
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::fixture::TinyDecoder;

    fn spec(more: &str) -> Spec {
        let text = format!(r#"{{"kind": "sft", "model": "m", "data": {{"train": "f"}}{more}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn base(folder: &std::path::Path, adapter: Option<(&str, &str)>) -> Option<BaseModel> {
        let path = folder.join("base.gguf");
        TinyDecoder::new("llama").write(&path).unwrap();
        let adapter = adapter.map(|(name, file)| (name.to_owned(), PathBuf::from(file)));
        let (sha256, parent) = (Some("00".into()), None);
        Some(BaseModel { name: "base".into(), path, sha256, parent, adapter })
    }

    #[test]
    fn orders_name_the_base_and_the_adapter() {
        let folder = tempfile::tempdir().unwrap();
        let of = |adapter: Option<(&str, &str)>, init: Option<(&str, Option<&str>)>, more: &str| {
            let init = init.map(|(path, base)| InitAdapter {
                path: path.into(),
                base: base.map(str::to_owned),
            });
            let sources =
                Sources { base: base(folder.path(), adapter), init, ..Sources::default() };
            ResolvedJob::new(spec(more), sources)
                .map(|job| job.order("ftjob-12345678".into(), "train".into(), None))
        };
        let order = of(None, None, "").unwrap();
        assert_eq!(order.spec.model.as_deref(), Some("base"));
        assert_eq!(order.name, "ft:base:ingot::12345678");
        assert_eq!((order.init, order.model_sha256.as_deref()), (None, Some("00")));
        assert!(order.spec.train.learning_rate.is_some());
        // If `model` names an adapter, training continues from it.
        let order = of(Some(("mine", "mine.gguf")), None, "").unwrap();
        assert_eq!(order.init, Some("mine.gguf".into()));
        assert_eq!(order.spec.adapter.unwrap().init.as_deref(), Some("mine"));
        let error = of(Some(("mine", "mine.gguf")), None, r#", "adapter": null"#).unwrap_err();
        assert_eq!((error.param(), &error), (Some("adapter"), &ResolveError::AllWeightsOfAdapter));
        // `adapter.init` takes precedence over an adapter in `model`, and must have the same base.
        for known in [Some("base"), None] {
            let order = of(Some(("mine", "mine.gguf")), Some(("other.gguf", known)), "").unwrap();
            assert_eq!(order.init, Some("other.gguf".into()));
        }
        let error = of(None, Some(("other.gguf", Some("another"))), "").unwrap_err();
        assert_eq!(error.param(), Some("adapter.init"));
    }

    #[test]
    fn errors_name_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let of = |more: &str, base: Option<BaseModel>| {
            let sources = Sources { base, ..Sources::default() };
            ResolvedJob::new(spec(more), sources).unwrap_err()
        };
        let error = of(r#", "train": {"warmup": 2}"#, base(folder.path(), None));
        assert_eq!(error.param(), Some("train.warmup"), "{error}");
        let error = of(r#", "adapter": {"targets": ["w"]}"#, base(folder.path(), None));
        assert_eq!(error.param(), Some("adapter.targets"), "{error}");
        let text = r#"{"kind": "distill", "model": "m", "data": {"train": "f"},
            "distill": {"layers": 3}}"#;
        let sources = Sources { base: base(folder.path(), None), ..Sources::default() };
        let error = ResolvedJob::new(serde_json::from_str(text).unwrap(), sources).unwrap_err();
        assert_eq!(error.param(), Some("distill.layers"), "{error}");
        // Layers of several kinds, by their numbers.
        let mut gemma = base(folder.path(), None).unwrap();
        gemma.path = folder.path().join("gemma.gguf");
        TinyDecoder::new("gemma2").write(&gemma.path).unwrap();
        let sources = Sources { base: Some(gemma), ..Sources::default() };
        let text = text.replace(": 3}", ": 1}");
        let error = ResolvedJob::new(serde_json::from_str(&text).unwrap(), sources).unwrap_err();
        assert_eq!(error.param(), Some("distill.layers"), "{error}");
        assert!(error.to_string().contains("several kinds"), "{error}");
        let mut missing = base(folder.path(), None).unwrap();
        missing.path = folder.path().join("none.gguf");
        assert_eq!(of("", Some(missing)).param(), Some("model"));
    }
}
