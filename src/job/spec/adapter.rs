//! The block `adapter` of a specification.

use crate::gguf::Projection;
use serde::{Deserialize, Serialize};

/// A LoRA adapter: low-rank matrices added to frozen weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// The adapter to continue training from. Its rank, alpha and targets replace the ones below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    #[serde(default = "rank")]
    pub r: usize,
    #[serde(default = "alpha")]
    pub alpha: f64,
    #[serde(default)]
    pub targets: Targets,
    #[serde(default)]
    pub rslora: bool,
    /// Dropout rate of the inputs of the adapter's matrices.
    #[serde(default)]
    pub dropout: f64,
}

/// `"all-linear"`, or a list of PEFT's module names.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Targets {
    #[default]
    All,
    Some(Vec<String>),
}

const ALL_LINEAR: &str = "all-linear";

impl Serialize for Targets {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => to.serialize_str(ALL_LINEAR),
            Self::Some(names) => names.serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> serde::de::Visitor<'de> for Names {
            type Value = Targets;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "\"{ALL_LINEAR}\", or a list of names such as [\"q_proj\", \"v_proj\"]")
            }

            fn visit_str<E>(self, name: &str) -> Result<Targets, E> {
                Ok(match name {
                    ALL_LINEAR => Targets::All,
                    // A single name stands for a list with that name, as in PEFT.
                    name => Targets::Some(vec![name.to_owned()]),
                })
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> Result<Targets, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = seq.next_element()? {
                    names.push(name);
                }
                Ok(Targets::Some(names))
            }
        }
        from.deserialize_any(Names)
    }
}

/// PEFT's module names.
const NAMES: [(&str, Projection); 7] = [
    ("q_proj", Projection::Q),
    ("k_proj", Projection::K),
    ("v_proj", Projection::V),
    ("o_proj", Projection::O),
    ("gate_proj", Projection::Gate),
    ("up_proj", Projection::Up),
    ("down_proj", Projection::Down),
];

fn rank() -> usize {
    16
}
fn alpha() -> f64 {
    32.0
}

impl Adapter {
    /// The adapter that a job trains by default.
    pub fn usual() -> Option<Self> {
        let (init, targets) = (None, Targets::All);
        Some(Self { init, r: rank(), alpha: alpha(), targets, rslora: false, dropout: 0.0 })
    }

    /// Resolves the block to the settings that the model takes.
    ///
    /// # Errors
    /// If a target is unknown or there is none.
    pub fn lora(&self, seed: u64) -> Result<Lora, String> {
        let targets = match &self.targets {
            Targets::All => NAMES.iter().map(|(_, target)| *target).collect(),
            Targets::Some(names) => {
                let find = |name: &String| {
                    let known = NAMES.iter().find(|(known, _)| known == name);
                    known.map(|(_, target)| *target).ok_or_else(|| {
                        let known: Vec<_> = NAMES.iter().map(|(known, _)| *known).collect();
                        let known = known.join(", ");
                        format!("adapter.targets: `{name}` is none of {known}")
                    })
                };
                names.iter().map(find).collect::<Result<Vec<_>, _>>()?
            }
        };
        if targets.is_empty() {
            return Err("adapter.targets is empty: nothing would be trained".into());
        }
        let (rank, alpha, rank_stabilized) = (self.r, self.alpha, self.rslora);
        Ok(Lora { rank, alpha, targets, rank_stabilized, dropout: self.dropout, seed })
    }
}

/// LoRA (Hu et al. 2021, arXiv:2106.09685).
#[derive(Debug, Clone)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    pub targets: Vec<Projection>,
    /// Scales by alpha/√rank instead of alpha/rank (Kalajdzievski 2023, arXiv:2312.03732).
    pub rank_stabilized: bool,
    /// Dropout rate of the inputs of the adapter's matrices.
    pub dropout: f64,
    pub seed: u64,
}

impl Lora {
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }
}
