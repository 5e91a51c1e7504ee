//! The block `distill`. The loss is in `train/ops/cpu/distillation.rs`.

use super::{Resolved, TaskSettings, Weights, within};
use crate::dataset::DatasetKind;
use crate::gguf::ModelConfig;
use serde::{Deserialize, Serialize};

/// Distillation: a student learns the token distributions of a teacher (Hinton et al. 2015,
/// arXiv:1503.02531). The block `distill` of a specification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Distill {
    /// The teacher: a model with the student's tokenizer. By default the model from which the
    /// student is cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// The student is the model without its least important layers, with so many layers left. A
    /// layer is as important as the loss rises without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    pub divergence: Divergence,
    /// Weight β of the teacher in the mixture of [`Divergence::Jsd`].
    pub beta: f64,
    /// Divisor of the logits of teacher and student. The divergence is multiplied by its square.
    pub temperature: f64,
    /// Weight of the cross-entropy with the data's tokens; that of the divergence is the rest of 1.
    pub cross_entropy: f64,
    /// Number of the teacher's most probable tokens that are kept for each token; all others are
    /// one more.
    pub top_k: usize,
    /// Share of the examples whose completion the student writes: it learns the teacher's
    /// distributions on its own completions (GKD's λ; Agarwal et al. 2024, arXiv:2306.13649).
    pub on_policy: f64,
    /// Maximum number of tokens of such a completion.
    pub max_tokens: usize,
}

/// How the distributions of teacher p and student q are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// Σ p ln(p / q).
    ForwardKl,
    /// Σ q ln(q / p).
    ReverseKl,
    /// β KL(p || m) + (1 − β) KL(q || m) with m = β p + (1 − β) q (Agarwal et al. 2024,
    /// arXiv:2306.13649).
    Jsd,
}

impl Default for Distill {
    fn default() -> Self {
        Self {
            teacher: None,
            layers: None,
            divergence: Divergence::ForwardKl,
            beta: 0.5,
            temperature: 1.0,
            cross_entropy: 0.0,
            top_k: 64,
            on_policy: 0.0,
            max_tokens: 128,
        }
    }
}

impl TaskSettings for Distill {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::PromptCompletion)
    }

    fn learning_rates(&self) -> [f64; 2] {
        [2e-4, 1e-4]
    }

    fn weights(&self) -> Weights {
        match (self.layers, self.samples()) {
            (Some(_), _) => Weights::All("all weights of a model without some layers are trained"),
            (None, true) => Weights::Adapter(
                "with `distill.on_policy` the server samples from its model with the student's adapter",
            ),
            (None, false) => Weights::Any,
        }
    }

    fn samples(&self) -> bool {
        self.on_policy > 0.0
    }

    fn teacher(&self) -> Option<&str> {
        self.teacher.as_deref()
    }

    fn distillation(&self) -> Option<&Self> {
        Some(self)
    }

    fn check_layers(&self, model: &ModelConfig) -> Result<(), String> {
        let (Some(kept), layers) = (self.layers, model.layers) else { return Ok(()) };
        if kept >= layers {
            return Err(format!(
                "distill.layers: the model has {layers} layers, and the student must have fewer than \
                 it, not {kept}"
            ));
        }
        match model.kinds.windows(2).any(|kinds| kinds[0] != kinds[1]) {
            true => Err(format!(
                "distill.layers: the layers of a {} model are of several kinds, by their numbers, so \
                 that none can be removed: name a smaller model, and a `distill.teacher`",
                model.architecture
            )),
            false => Ok(()),
        }
    }

    fn check(&self, settings: &Resolved) -> Result<(), String> {
        if self.teacher.is_none() && self.layers.is_none() {
            return Err(
                "distill.teacher: name the teacher, or with `distill.layers` how many layers of the \
                 model the student keeps"
                    .into(),
            );
        }
        if self.layers == Some(0) {
            return Err("distill.layers: 0 is not above 0".into());
        }
        within("distill.beta", self.beta, 0.01, 0.99)?;
        within("distill.temperature", self.temperature, 0.05, 20.0)?;
        within("distill.cross_entropy", self.cross_entropy, 0.0, 1.0)?;
        within("distill.top_k", self.top_k as f64, 1.0, f64::from(1 << 20))?;
        within("distill.on_policy", self.on_policy, 0.0, 1.0)?;
        if self.samples() && self.layers.is_some() {
            return Err(
                "distill.on_policy: a model without some layers is not served while it is trained: \
                 first train it on data, then serve it and name it as `model`"
                    .into(),
            );
        }
        let most =
            if self.samples() { settings.max_length as f64 - 1.0 } else { f64::from(1 << 20) };
        within("distill.max_tokens", self.max_tokens as f64, 1.0, most)
    }
}

#[cfg(test)]
mod tests {
    use crate::job::spec::Spec;

    fn resolve(block: &str) -> Result<Spec, String> {
        let text = format!(
            r#"{{"kind": "distill", "model": "m", "data": {{"train": "f"}}, "distill": {block}}}"#
        );
        let spec: Spec = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        spec.resolve().map(|_| spec)
    }

    #[test]
    fn a_teacher_or_a_number_of_layers_is_needed() {
        assert!(resolve(r#"{"teacher": "big"}"#).unwrap().adapter.is_some());
        assert!(resolve(r#"{"layers": 24}"#).unwrap().adapter.is_none());
        let samples = |block| resolve(block).unwrap().task.settings().samples();
        assert!(!samples(r#"{"teacher": "big"}"#));
        assert!(samples(r#"{"teacher": "big", "on_policy": 1}"#));
        assert!(resolve(r#"{"teacher": "big", "max_tokens": 5000}"#).is_ok());
        for (block, key) in [
            ("{}", "distill.teacher: "),
            (r#"{"layers": 0}"#, "distill.layers: "),
            (r#"{"layers": 2, "beta": 0}"#, "distill.beta: "),
            (r#"{"layers": 2, "beta": 1}"#, "distill.beta: "),
            (r#"{"layers": 2, "temperature": 0}"#, "distill.temperature: "),
            (r#"{"layers": 2, "cross_entropy": 1.1}"#, "distill.cross_entropy: "),
            (r#"{"layers": 2, "top_k": 0}"#, "distill.top_k: "),
            (r#"{"layers": 2, "on_policy": 0.5}"#, "distill.on_policy: "),
            (r#"{"teacher": "t", "on_policy": 1.5}"#, "distill.on_policy: "),
            (r#"{"teacher": "t", "on_policy": -0.1}"#, "distill.on_policy: "),
            (r#"{"teacher": "t", "on_policy": 1, "max_tokens": 0}"#, "distill.max_tokens: "),
            (r#"{"teacher": "t", "on_policy": 1, "max_tokens": 1024}"#, "distill.max_tokens: "),
        ] {
            let error = resolve(block).unwrap_err();
            assert!(error.starts_with(key), "{block}: {error}");
        }
    }
}
