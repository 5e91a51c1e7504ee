//! A kind of job for tests: it shows what a new kind has to say of itself, and that nothing else
//! has to know it.

use super::{Event, Job, Outcome, Recipe, TrainError};
use crate::dataset::DatasetKind;
use crate::job::Control;
use crate::job::spec::{Resolved, TaskSettings};
use crate::train::data::PreparedPairs;
use serde::{Deserialize, Serialize};

/// The block `dummy`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dummy {
    greeting: String,
}

impl TaskSettings for Dummy {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::Preference)
    }

    fn learning_rates(&self) -> [f64; 2] {
        [0.5, 0.25]
    }

    fn check(&self, _: &Resolved) -> Result<(), String> {
        match self.greeting.is_empty() {
            true => Err("dummy.greeting: it is empty".into()),
            false => Ok(()),
        }
    }
}

impl Recipe for Dummy {
    type Data = PreparedPairs;

    /// Reports the greeting, and the number of pairs as tokens.
    fn run(
        &self,
        job: &Job<'_, PreparedPairs>,
        _: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        event(Event::Note { text: self.greeting.clone() });
        Ok(Outcome::Done { tokens: job.train.len() as u64 })
    }
}

#[cfg(test)]
mod tests {
    use crate::gguf::fixture::TinyDecoder;
    use crate::job::spec::Spec;
    use crate::job::{ArtifactKind, Control, Folder, Follower, Order, Outcome};
    use crate::train::process;
    use std::fs;

    fn spec(more: &str) -> Result<Spec, String> {
        let text =
            format!(r#"{{"kind": "dummy", "model": "tiny", "data": {{"train": "t"}}{more}}}"#);
        serde_json::from_str::<Spec>(&text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_new_kind_is_a_block_and_a_recipe() {
        let spec = spec(r#", "dummy": {"greeting": "hello"}"#).unwrap();
        assert_eq!(spec.resolve().unwrap().learning_rate, 0.5);
        let text = serde_json::to_string(&spec).unwrap();
        assert!(text.contains(r#""kind":"dummy","dummy":{"greeting":"hello"}"#), "{text}");
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);

        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        TinyDecoder::new("llama").write(&path("base.gguf")).unwrap();
        let pair = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
        fs::write(path("train.jsonl"), format!("{pair}\n{pair}\n{pair}\n")).unwrap();
        let mut order = Order::new("1".into(), spec, "dummy".into(), path("train.jsonl"));
        order.model = Some(path("base.gguf"));
        let job = Folder::new(path("job"));
        job.create(&order.into()).unwrap();
        assert!(process::run(&job, &Control::default()).unwrap());
        let Some(Outcome::Succeeded { trained_tokens, artifacts }) = job.outcome().unwrap() else {
            panic!("{:?}", job.outcome())
        };
        assert_eq!(trained_tokens, 3);
        assert_eq!(artifacts[0].kind, ArtifactKind::Adapter);
        let events = Follower::new(job.events(), 0).read().unwrap();
        assert!(events.iter().any(|event| event.message == "hello"), "{events:?}");
    }

    #[test]
    fn its_mistakes_are_named() {
        for (more, why) in [
            ("", "dummy: missing field `greeting`"),
            (r#", "dummy": {}"#, "missing field `greeting`"),
            (r#", "dummy": {"greeting": 1}"#, "a string"),
            (r#", "dummy": {"greeting": "a", "more": 1}"#, "unknown field `more`"),
            (r#", "dummy": {"greeting": "a"}, "dpo": {}"#, "dpo: it is for jobs of kind `dpo`"),
        ] {
            let error = spec(more).unwrap_err();
            assert!(error.contains(why), "{more}: {error}");
        }
        let empty = spec(r#", "dummy": {"greeting": ""}"#).unwrap();
        assert_eq!(empty.resolve().unwrap_err(), "dummy.greeting: it is empty");
    }
}
