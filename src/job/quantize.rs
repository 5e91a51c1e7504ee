//! What a quantization is: [`QuantizePlan`], and what is said about its progress; and the jobs that
//! quantize: [`QuantizeSpec`] and [`QuantizeOrder`].

use super::Folder;
use super::spec::VERSION;
use crate::gguf::TensorType;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::path::PathBuf;
use std::str::FromStr;

/// Model types by the names of llama-quantize, with the numbers of `llama_ftype`. A type is a mix:
/// it says for each tensor in which type it is stored.
const MODEL_TYPES: [(&str, u32); 39] = [
    ("F32", 0),
    ("F16", 1),
    ("BF16", 32),
    ("Q8_0", 7),
    ("Q6_K", 18),
    ("Q5_K_M", 17),
    ("Q5_K", 17),
    ("Q5_K_S", 16),
    ("Q5_1", 9),
    ("Q5_0", 8),
    ("Q4_K_M", 15),
    ("Q4_K", 15),
    ("Q4_K_S", 14),
    ("Q4_1", 3),
    ("Q4_0", 2),
    ("IQ4_NL", 25),
    ("IQ4_XS", 30),
    ("MXFP4_MOE", 38),
    ("Q3_K_L", 13),
    ("Q3_K_M", 12),
    ("Q3_K", 12),
    ("Q3_K_S", 11),
    ("IQ3_M", 27),
    ("IQ3_S", 26),
    ("IQ3_XS", 22),
    ("IQ3_XXS", 23),
    ("Q2_K", 10),
    ("Q2_K_S", 21),
    ("Q2_0", 41),
    ("IQ2_M", 29),
    ("IQ2_S", 28),
    ("IQ2_XS", 20),
    ("IQ2_XXS", 19),
    ("TQ2_0", 37),
    ("TQ1_0", 36),
    ("IQ1_M", 31),
    ("IQ1_S", 24),
    ("Q1_0", 40),
    ("COPY", 0),
];

/// The type of a quantized model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelType {
    name: &'static str,
    number: u32,
}

impl ModelType {
    /// The name in llama-quantize.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The number of `llama_ftype`.
    pub fn number(self) -> u32 {
        self.number
    }

    /// Whether tensors are copied as they are.
    pub fn copies(self) -> bool {
        self.name == "COPY"
    }
}

impl Serialize for ModelType {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.name.serialize(to)
    }
}

impl<'de> Deserialize<'de> for ModelType {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl FromStr for ModelType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = MODEL_TYPES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|&(name, number)| Self { name, number }).ok_or_else(|| {
            let names: Vec<_> = MODEL_TYPES.iter().map(|(name, _)| *name).collect();
            format!("there is no type `{name}`; there are {}", names.join(", "))
        })
    }
}

/// A tensor type for the tensors whose names match a pattern: `PATTERN=TYPE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TensorOverride {
    /// A regular expression that is searched in the tensor's name.
    pub pattern: String,
    /// The type of these tensors.
    pub ty: TensorType,
}

impl TryFrom<String> for TensorOverride {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<TensorOverride> for String {
    fn from(given: TensorOverride) -> Self {
        format!("{}={}", given.pattern, given.ty.name())
    }
}

impl FromStr for TensorOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once('=') {
            Some((pattern, _)) if pattern.contains('\0') => {
                Err("its pattern has a NUL byte: leave it out".to_owned())
            }
            Some((pattern, ty)) if !pattern.is_empty() => {
                // As llama-quantize does.
                Ok(Self { pattern: pattern.to_lowercase(), ty: tensor_type(ty)? })
            }
            _ => Err("it has the form PATTERN=TYPE, such as ffn_down=Q6_K".to_owned()),
        }
    }
}

/// Whether a tensor can be converted to this type.
fn is_target(ty: TensorType) -> bool {
    use TensorType::*;
    !matches!(ty, Q8_1 | Q8_K | I8 | I16 | I32 | I64 | F64)
}

/// A tensor type by its name in any case.
///
/// # Errors
/// The names there are.
pub fn tensor_type(name: &str) -> Result<TensorType, String> {
    let mut all = TensorType::all().filter(|ty| is_target(*ty));
    all.find(|ty| ty.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
        let all = TensorType::all().filter(|ty| is_target(*ty));
        let names: Vec<_> = all.map(TensorType::name).collect();
        format!("there is no tensor type `{name}`; there are {}", names.join(", "))
    })
}

/// How a model is quantized.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeSettings {
    #[serde(rename = "type")]
    pub ty: ModelType,
    /// An importance matrix in llama.cpp's GGUF format: a path, or in the specification of a job the
    /// id of an uploaded file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imatrix: Option<PathBuf>,
    /// The first one whose pattern matches counts.
    #[serde(default, rename = "tensor_types", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<TensorOverride>,
    /// Type of `output.weight`.
    #[serde(default, with = "named_type", skip_serializing_if = "Option::is_none")]
    pub output_type: Option<TensorType>,
    /// Type of `token_embd.weight`.
    #[serde(default, with = "named_type", skip_serializing_if = "Option::is_none")]
    pub embedding_type: Option<TensorType>,
    /// Stores all matrices in the same type, without a mix.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pure: bool,
    /// Allows to quantize a model that is quantized already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub requantize: bool,
    /// Keeps `output.weight` as it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leave_output: bool,
}

/// A tensor type by its name.
mod named_type {
    use super::*;

    pub(super) fn serialize<S: Serializer>(
        ty: &Option<TensorType>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        ty.map(TensorType::name).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<TensorType>, D::Error> {
        let name = Option::<String>::deserialize(from)?;
        name.map(|name| tensor_type(&name)).transpose().map_err(D::Error::custom)
    }
}

/// A quantization.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizePlan {
    /// A GGUF file (of a split model the first), or a Hugging Face folder.
    pub input: PathBuf,
    /// The file to write. With `keep_split`, `-0000I-of-0000N` is put before its extension.
    pub output: PathBuf,
    pub settings: QuantizeSettings,
    /// Writes as many files as the input has.
    pub keep_split: bool,
    /// Threads, 1 to 1024.
    pub threads: usize,
    /// Replaces an existing output.
    pub force: bool,
}

/// The specification of a job that quantizes a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeSpec {
    #[serde(default = "version")]
    pub version: u32,
    pub kind: QuantizeKind,
    /// The model to quantize.
    pub model: String,
    /// Name of the new model; by default the old one's and the type, such as `smollm2-Q4_K_M`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub quantize: QuantizeSettings,
}

/// The `kind` of a [`QuantizeSpec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizeKind {
    Quantize,
}

fn version() -> u32 {
    VERSION
}

impl QuantizeSpec {
    /// Name of the new model.
    pub fn new_name(&self) -> String {
        let usual = || format!("{}-{}", self.model, self.quantize.ty.name());
        self.name.clone().unwrap_or_else(usual)
    }
}

/// The order of a job that quantizes a model: every name is replaced by a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizeOrder {
    pub version: u32,
    pub id: String,
    pub spec: QuantizeSpec,
    /// Name of the new model.
    pub name: String,
    /// A GGUF file.
    pub model: PathBuf,
    /// SHA-256 of `model`, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imatrix: Option<PathBuf>,
}

impl QuantizeOrder {
    /// File of the new model among the artifacts.
    pub const OUTPUT: &str = "model.gguf";

    /// What to carry out in the job's folder.
    pub fn plan(&self, folder: &Folder) -> QuantizePlan {
        QuantizePlan {
            input: self.model.clone(),
            output: folder.artifacts().join(Self::OUTPUT),
            settings: QuantizeSettings {
                imatrix: self.imatrix.clone(),
                ..self.spec.quantize.clone()
            },
            keep_split: false,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            force: true,
        }
    }
}

/// A tensor that is now written.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedTensor {
    /// From 1 to `total`.
    pub number: usize,
    /// Number of tensors of the model.
    pub total: usize,
    /// The tensor's name in the file.
    pub name: String,
    /// Size in MiB before and after.
    pub before: f64,
    pub after: f64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeReport {
    /// The files that were written.
    pub files: Vec<PathBuf>,
    /// Bytes of the input (of a folder as GGUF) and of the output.
    pub before: u64,
    pub after: u64,
    /// Number of weights.
    pub weights: u64,
    /// What the user should know: tensors whose type was replaced, settings of a folder that were
    /// left out.
    pub notes: Vec<String>,
}

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// The message names the file or tensor, and what to change.
    #[error("{0}")]
    Refused(String),
    #[error("{path} cannot be written: {source}")]
    Write { path: PathBuf, source: std::io::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_llama_quantizes() {
        let of = |name: &str| name.parse::<ModelType>();
        assert_eq!(of("q4_k_m").unwrap().number(), 15);
        assert_eq!(of("Q4_K").unwrap().number(), 15);
        assert!(of("COPY").unwrap().copies() && !of("F32").unwrap().copies());
        assert!(of("Q9").unwrap_err().contains("Q8_0"));
        let found: TensorOverride = "Ffn_Down=q6_k".parse().unwrap();
        assert_eq!((found.pattern.as_str(), found.ty), ("ffn_down", TensorType::Q6_K));
        for bad in
            ["=Q6_K", "a\0=Q6_K", "ffn_down", "ffn_down=Q99", "ffn_down=Q8_K", "ffn_down=I32"]
        {
            assert!(bad.parse::<TensorOverride>().is_err(), "{bad}");
        }
    }
}
