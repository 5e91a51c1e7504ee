//! [`JobSpec`] and [`JobOrder`]: a job of any kind.

use super::spec::{Spec, Task, VERSION};
use super::{EvaluateOrder, EvaluateSpec, Order, QuantizeOrder, QuantizeSpec};
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// The specification of a job of any kind, which its key `kind` names.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum JobSpec {
    Train(Box<Spec>),
    Quantize(QuantizeSpec),
    Evaluate(EvaluateSpec),
}

impl JobSpec {
    /// Parses JSON.
    ///
    /// # Errors
    /// What is wrong and, where it is known, in which line.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Peek {
            kind: Option<Value>,
            version: Option<Value>,
        }
        let Peek { kind, version } = read(json)?;
        if let Some(version) = version.filter(|version| *version != VERSION) {
            return Err(format!("version: this is {version}, and this Ingot knows {VERSION}"));
        }
        let kind = kind.as_ref().and_then(Value::as_str);
        match kind {
            Some("quantize") => read(json).map(Self::Quantize),
            Some("evaluate") => read(json).map(Self::Evaluate),
            Some(kind) if !Task::NAMES.contains(&kind) => {
                let names: Vec<_> =
                    Task::NAMES.iter().chain(&["quantize", "evaluate"]).copied().collect();
                let kind: String = kind.chars().take(100).collect();
                Err(format!("kind: there is no kind `{kind}`; there are {}", names.join(", ")))
            }
            _ => read(json).map(Box::new).map(Self::Train),
        }
    }
}

fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// The order of a job of any kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum JobOrder {
    Train(Box<Order>),
    Quantize(QuantizeOrder),
    Evaluate(EvaluateOrder),
}

impl JobOrder {
    /// Version of the format.
    pub(super) fn version(&self) -> u32 {
        match self {
            Self::Train(order) => order.version,
            Self::Quantize(order) => order.version,
            Self::Evaluate(order) => order.version,
        }
    }

    pub fn id(&self) -> &str {
        match self {
            Self::Train(order) => &order.id,
            Self::Quantize(order) => &order.id,
            Self::Evaluate(order) => &order.id,
        }
    }

    /// Name of the model or adapter that the job makes, or of the evaluation.
    pub fn name(&self) -> &str {
        match self {
            Self::Train(order) => &order.name,
            Self::Quantize(order) => &order.name,
            Self::Evaluate(order) => &order.name,
        }
    }

    /// The `kind` of the specification.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Train(order) => order.spec.task.name(),
            Self::Quantize(_) => "quantize",
            Self::Evaluate(_) => "evaluate",
        }
    }

    /// The model from which the job makes another one.
    pub fn base_model(&self) -> Option<&str> {
        match self {
            Self::Train(order) => order.spec.model.as_deref(),
            Self::Quantize(order) => Some(&order.spec.model),
            Self::Evaluate(_) => None,
        }
    }

    /// The specification, as JSON.
    ///
    /// # Errors
    /// Numbers that JSON cannot hold.
    pub fn spec(&self) -> serde_json::Result<Value> {
        match self {
            Self::Train(order) => serde_json::to_value(&order.spec),
            Self::Quantize(order) => serde_json::to_value(&order.spec),
            Self::Evaluate(order) => serde_json::to_value(&order.spec),
        }
    }

    /// The order, if the job trains.
    pub fn training(&self) -> Option<&Order> {
        match self {
            Self::Train(order) => Some(order),
            Self::Quantize(_) | Self::Evaluate(_) => None,
        }
    }
}

impl From<Order> for JobOrder {
    fn from(order: Order) -> Self {
        Self::Train(Box::new(order))
    }
}

impl<'de> Deserialize<'de> for JobOrder {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(from)?;
        match value["spec"]["kind"].as_str() {
            Some("quantize") => QuantizeOrder::deserialize(value).map(Self::Quantize),
            Some("evaluate") => EvaluateOrder::deserialize(value).map(Self::Evaluate),
            _ => Order::deserialize(value).map(Box::new).map(Self::Train),
        }
        .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_says_which_specification_it_is() {
        let parse = |text: &str| JobSpec::parse(text.as_bytes());
        let train = r#"{"kind": "sft", "model": "m", "data": {"train": "f"}}"#;
        assert!(matches!(parse(train), Ok(JobSpec::Train(_))));
        let quantize = r#"{"kind": "quantize", "model": "m",
            "quantize": {"type": "q4_k_m", "tensor_types": ["ffn_down=q6_k"], "output_type": "Q8_0"}}"#;
        let Ok(JobSpec::Quantize(spec)) = parse(quantize) else { panic!("{:?}", parse(quantize)) };
        assert_eq!(spec.new_name(), "m-Q4_K_M");
        let text = serde_json::to_string(&JobSpec::Quantize(spec.clone())).unwrap();
        assert!(
            text.contains(r#""tensor_types":["ffn_down=Q6_K"],"output_type":"Q8_0""#),
            "{text}"
        );
        assert_eq!(parse(&text), Ok(JobSpec::Quantize(spec)));
        for (bad, why) in [
            (r#"{"kind": "bake"}"#, "kind: there is no kind `bake`; there are sft, pretrain"),
            (r#"{"kind": "quantize", "model": "m"}"#, "missing field `quantize`"),
            (
                r#"{"kind": "quantize", "model": "m", "quantize": {"type": "Q9"}}"#,
                "there is no type `Q9`",
            ),
            (
                r#"{"kind": "quantize", "model": "m", "quantize": {"type": "Q8_0", "output_type": "Q9"}}"#,
                "no tensor type `Q9`",
            ),
            (r#"{"kind": "quantize", "version": 2}"#, "version: this is 2"),
            (r#"{"kind": "quantize", "kind": "evaluate"}"#, "duplicate field `kind`"),
            ("[]", "invalid"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
