//! [`peft_to_gguf`]: converts a PEFT folder to a llama.cpp LoRA GGUF.
//!
//! Source: `convert_lora_to_gguf.py` and `conversion/llama.py` for the layout, `build_lora_mm` in
//! `src/llama-graph.cpp` for the scaling.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::lora_check::SCORE_HEAD;
use super::peft::{self, Half, Layout, MAX_RANK, PeftConfig, PeftTensor};
use super::writer::write_f32;
use crate::gguf::{Gguf, GgufError, GgufWriter, ModelFacts, TensorInfo, TensorType};

/// Maximum size of `adapter_model.safetensors` in bytes: the file is read into memory.
const MAX_ADAPTER: u64 = 4 << 30;

/// Reason why an adapter was refused. The message is one sentence that names the key or tensor at
/// fault and contains no path of this machine.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// A GGUF file (base, adapter or output) is invalid.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A file of the adapter folder cannot be read.
    #[error("cannot read {file}: {source}")]
    Io {
        /// Name within the folder.
        file: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The folder does not hold a PEFT adapter.
    #[error("{0}")]
    Folder(String),
    /// A key of `adapter_config.json` or of the GGUF's metadata has an unsupported value.
    #[error("key '{key}' of the adapter is refused: {reason}")]
    Config {
        /// The key.
        key: String,
        /// The reason.
        reason: String,
    },
    /// A tensor of the adapter does not fit the base.
    #[error("tensor '{name}' of the adapter is refused: {reason}")]
    Tensor {
        /// The tensor's name in the adapter.
        name: String,
        /// The reason.
        reason: String,
    },
}

impl LoraError {
    pub(super) fn tensor(name: impl Into<String>, reason: impl Into<String>) -> LoraError {
        LoraError::Tensor { name: name.into(), reason: reason.into() }
    }

    pub(super) fn config(key: &str, reason: impl Into<String>) -> LoraError {
        LoraError::Config { key: key.to_owned(), reason: reason.into() }
    }
}

/// Properties of a checked adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraInfo {
    /// Rank; the largest if modules differ.
    pub rank: u32,
    /// Alpha as llama.cpp uses it: each module is scaled by `alpha / rank`. 0 means unscaled.
    pub alpha: f32,
    /// Number of base tensors that the adapter changes.
    pub tensors: usize,
    /// Size of the GGUF file.
    pub bytes: u64,
    /// Kinds of base tensors that the adapter changes, such as `attn_q`, sorted.
    pub targets: Vec<String>,
    /// Whether the adapter has a score head and returns scores instead of text.
    pub reward_model: bool,
}

/// Converts a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) to a LoRA GGUF at
/// `out`, for a base of the llama (Mistral, SmolLM), Qwen 2 and 3, Gemma 1 to 3 or Phi-3 family.
///
/// F16 tensors stay F16 if that is exact; all others are written as F32.
///
/// # Errors
/// [`LoraError`], which names the key or tensor that cannot be represented or does not fit the
/// base.
pub fn peft_to_gguf(
    folder: &Path,
    facts: &ModelFacts,
    base: &Gguf,
    out: &Path,
) -> Result<LoraInfo, LoraError> {
    let config = PeftConfig::read(folder)?;
    let bytes = read_tensors(folder)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| {
        LoraError::Folder(format!("adapter_model.safetensors is not a safetensors file: {e}"))
    })?;

    let mut writer = GgufWriter::new();
    writer
        .set("general.type", "adapter")
        .set("general.architecture", facts.architecture.as_str())
        .set("adapter.type", "lora")
        .set("adapter.lora.alpha", config.gguf_alpha());

    let pairs = pair_up(&tensors)?;
    let mut targets = BTreeSet::new();
    let mut rank = 0;
    for (path, (a, b)) in &pairs {
        let heads =
            |layer: usize| Some((u64::from(facts.n_head), u64::from(*facts.n_head_kv.get(layer)?)));
        let target = peft::target(path, &facts.architecture, heads)
            .map_err(|reason| LoraError::tensor(*path, reason))?;
        let pair = Pair::check(path, a, b, &target, base, &config)?;
        pair.write(&mut writer, &target, config.correction(pair.rank))?;
        rank = rank.max(pair.rank);
        targets.insert(target.short.to_owned());
    }
    if config.head {
        writer.set(SCORE_HEAD, score(&tensors, facts)?);
    }
    let bytes = writer.write(out)?;
    Ok(LoraInfo {
        rank: rank as u32,
        alpha: config.gguf_alpha(),
        tensors: pairs.len(),
        bytes,
        targets: targets.into_iter().collect(),
        reward_model: config.head,
    })
}

/// Reads the head of a reward model, of shape (width).
fn score(tensors: &SafeTensors, facts: &ModelFacts) -> Result<Vec<f32>, LoraError> {
    let view = tensors.tensor(peft::SCORE);
    let view = view.map_err(|error| LoraError::tensor(peft::SCORE, error.to_string()))?;
    let head = Matrix::new(peft::SCORE, &view)?;
    match (head.rows, head.cols) {
        (1, cols) if cols == facts.n_embd as usize => Ok(head.iter().collect()),
        _ => {
            let (found, width) = (head.shape(), facts.n_embd);
            let reason = format!("it is {found}, but a reward model's is [1, {width}]");
            Err(LoraError::tensor(peft::SCORE, reason))
        }
    }
}

fn read_tensors(folder: &Path) -> Result<Vec<u8>, LoraError> {
    let file = "adapter_model.safetensors";
    let io = |source| LoraError::Io { file, source };
    let path = folder.join(file);
    let about = fs::metadata(&path).map_err(io)?;
    if !about.is_file() || about.len() > MAX_ADAPTER {
        return Err(LoraError::Folder(format!("{file} is not a file of up to 4 GiB")));
    }
    fs::read(&path).map_err(io)
}

type Views<'d> = (TensorView<'d>, TensorView<'d>);

/// Groups tensors into pairs (A, B) by module path.
fn pair_up<'t>(tensors: &'t SafeTensors<'t>) -> Result<BTreeMap<&'t str, Views<'t>>, LoraError> {
    let mut halves: BTreeMap<&str, [Option<TensorView>; 2]> = BTreeMap::new();
    for (name, view) in tensors.iter() {
        let Some((path, half)) = peft::split_name(name) else {
            // PEFT may store a copy of a frozen embedding beside its adapter; a score head is no
            // LoRA.
            if name.ends_with(".base_layer.weight") || name == peft::SCORE {
                continue;
            }
            return Err(LoraError::tensor(name, "it is not part of a LoRA (lora_A or lora_B)"));
        };
        let slot = &mut halves.entry(path).or_default()[if half == Half::A { 0 } else { 1 }];
        if slot.replace(view).is_some() {
            return Err(LoraError::tensor(name, "there is a second tensor for the same half"));
        }
    }
    if halves.is_empty() {
        return Err(LoraError::Folder("adapter_model.safetensors holds no LoRA tensors".into()));
    }
    let mut pairs = BTreeMap::new();
    for (path, halves) in halves {
        match halves {
            [Some(a), Some(b)] => pairs.insert(path, (a, b)),
            [a, _] => {
                let missing = if a.is_some() { "lora_B" } else { "lora_A" };
                return Err(LoraError::tensor(path, format!("its {missing} is missing")));
            }
        };
    }
    Ok(pairs)
}

/// Factors of a module, checked against the base: A is `[rank, in]`, B `[out, rank]`, row-major.
struct Pair<'d> {
    a: Matrix<'d>,
    b: Matrix<'d>,
    rank: u64,
}

impl<'d> Pair<'d> {
    fn check(
        path: &str,
        a: &TensorView<'d>,
        b: &TensorView<'d>,
        target: &PeftTensor,
        base: &Gguf,
        config: &PeftConfig,
    ) -> Result<Pair<'d>, LoraError> {
        let fail = |reason: String| Err(LoraError::tensor(path, reason));
        let a = Matrix::new(&format!("{path}.lora_A"), a)?;
        let b = Matrix::new(&format!("{path}.lora_B"), b)?;
        let rank = a.rows as u64;
        if b.cols as u64 != rank || !(1..=MAX_RANK).contains(&rank) {
            return fail(format!("A is {} but B is {}", a.shape(), b.shape()));
        }
        if rank != config.rank && !config.mixed_ranks {
            return fail(format!(
                "its rank is {rank}, but adapter_config.json has r {}",
                config.rank
            ));
        }
        let info = base_tensor(base, &target.tensor, path)?;
        // In Hugging Face's order a weight is `[out, in]`, an embedding table `[tokens, width]`.
        let (ne0, ne1) = (info.ne()[0] as usize, info.ne()[1] as usize);
        let (input, output) = match target.layout {
            Layout::Embedding => (ne1, ne0),
            Layout::Plain | Layout::Heads(_) => (ne0, ne1),
        };
        if (a.cols, b.rows) != (input, output) || info.dims().len() != 2 {
            return fail(format!(
                "it changes a weight of [{}, {}], but '{}' of the base is [{output}, {input}]",
                b.rows, a.cols, target.tensor
            ));
        }
        if let Layout::Heads(heads) = target.layout {
            let pairs = (heads * 2) as usize;
            if pairs == 0 || b.rows % pairs != 0 {
                return fail(format!("its {} rows do not split into {heads} heads", b.rows));
            }
        }
        Ok(Pair { a, b, rank })
    }

    fn write<'w>(
        &self,
        writer: &mut GgufWriter<'w>,
        target: &PeftTensor,
        correction: f32,
    ) -> Result<(), LoraError>
    where
        'd: 'w,
    {
        let (a, b, rank) = (self.a, self.b, self.rank);
        let name = format!("{}.lora_a", target.tensor);
        let ty = a.output_type(1.0);
        if target.layout == Layout::Embedding {
            let dims = [rank, a.cols as u64];
            writer.tensor_with(&name, &dims, ty, move |out| {
                let by_token = (0..a.cols).flat_map(|col| (0..a.rows).map(move |row| (row, col)));
                write_f32(out, ty, by_token.map(|(row, col)| a.get(row, col)))
            })?;
        } else {
            let dims = [a.cols as u64, rank];
            writer.tensor_with(&name, &dims, ty, move |out| write_f32(out, ty, a.iter()))?;
        }

        let heads = match target.layout {
            Layout::Heads(heads) => Some(heads as usize),
            Layout::Plain | Layout::Embedding => None,
        };
        let name = format!("{}.lora_b", target.tensor);
        let ty = b.output_type(correction);
        writer.tensor_with(&name, &[rank, b.rows as u64], ty, move |out| {
            let source = move |row| heads.map_or(row, |heads| interleaved(row, b.rows, heads));
            let cells = (0..b.rows).flat_map(|row| (0..b.cols).map(move |col| (row, col)));
            write_f32(out, ty, cells.map(|(row, col)| b.get(source(row), col) * correction))
        })?;
        Ok(())
    }
}

/// The Hugging Face row for `row` of a GGUF q or k matrix with `rows` rows.
///
/// Rotary embedding rotates pairs of rows. Hugging Face pairs row `i` of a head's first half with
/// row `i` of its second half; llama.cpp pairs adjacent rows. So `[first half, second half]` of
/// each head becomes `[first 0, second 0, first 1, second 1, …]`.
fn interleaved(row: usize, rows: usize, heads: usize) -> usize {
    let width = rows / heads;
    let (head, within) = (row / width, row % width);
    head * width + (within % 2) * (width / 2) + within / 2
}

/// A 2-D tensor of a safetensors file, row-major; every element is finite.
#[derive(Clone, Copy)]
struct Matrix<'d> {
    data: &'d [u8],
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl<'d> Matrix<'d> {
    fn new(name: &str, view: &TensorView<'d>) -> Result<Matrix<'d>, LoraError> {
        let dtype = view.dtype();
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let reason = format!("its type is {dtype:?}, but only F32, F16 and BF16 are supported");
            return Err(LoraError::tensor(name, reason));
        }
        let &[rows, cols] = view.shape() else {
            return Err(LoraError::tensor(
                name,
                format!("its shape {:?} is not 2-D", view.shape()),
            ));
        };
        let matrix = Matrix { data: view.data(), dtype, rows, cols };
        if !matrix.iter().all(f32::is_finite) {
            return Err(LoraError::tensor(name, "it holds values that are not finite"));
        }
        Ok(matrix)
    }

    fn shape(&self) -> String {
        format!("[{}, {}]", self.rows, self.cols)
    }

    fn at(&self, index: usize) -> f32 {
        let d = self.data;
        match self.dtype {
            Dtype::F32 => {
                let i = index * 4;
                f32::from_le_bytes([d[i], d[i + 1], d[i + 2], d[i + 3]])
            }
            Dtype::F16 => f16::from_le_bytes([d[index * 2], d[index * 2 + 1]]).to_f32(),
            _ => bf16::from_le_bytes([d[index * 2], d[index * 2 + 1]]).to_f32(),
        }
    }

    fn get(&self, row: usize, col: usize) -> f32 {
        self.at(row * self.cols + col)
    }

    fn iter(self) -> impl Iterator<Item = f32> + 'd {
        (0..self.rows * self.cols).map(move |index| self.at(index))
    }

    /// F16 if that loses nothing, otherwise F32.
    fn output_type(&self, factor: f32) -> TensorType {
        if self.dtype == Dtype::F16 && factor == 1.0 { TensorType::F16 } else { TensorType::F32 }
    }
}

/// Finds the base tensor that an adapter changes.
pub(super) fn base_tensor<'b>(
    base: &'b Gguf,
    name: &str,
    adapter: &str,
) -> Result<&'b TensorInfo, LoraError> {
    let tied = base.tensor("output.weight").is_none();
    if tied && name == "output.weight" {
        let reason = "the base has no lm_head of its own: it is tied to the embedding";
        return Err(LoraError::tensor(adapter, reason));
    }
    if tied && name == "token_embd.weight" {
        // llama.cpp would use the same adapter for the output matrix, whose shapes are transposed,
        // and abort the process.
        let reason = "the base ties its embedding to lm_head, and then neither can be adapted";
        return Err(LoraError::tensor(adapter, reason));
    }
    base.tensor(name)
        .ok_or_else(|| LoraError::tensor(adapter, format!("the base has no tensor '{name}'")))
}
