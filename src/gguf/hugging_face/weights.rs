//! `model.safetensors`, or the files that `model.safetensors.index.json` lists: mapped, checked,
//! and written tensor by tensor.

use super::ConvertError;
use super::config::{Change, Wanted};
use super::folder::object;
use crate::gguf::{GgufWriter, TensorType};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Weights in PyTorch's pickle format.
const PICKLED: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Tensors that are computed from the configuration, or that no forward pass reads.
const IDLE: &[&str] =
    &["rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "rotary_emb.cos_cached"];
/// Name prefixes of the vision and audio parts of multimodal models.
const OTHER_SENSES: &[&str] =
    &["vision_tower.", "multi_modal_projector.", "audio_tower.", "embed_vision.", "embed_audio."];

/// All tensors of a folder.
pub(super) struct Weights {
    files: Vec<(String, Mmap)>,
    /// Positions by the name that a text-only model uses.
    places: BTreeMap<String, Place>,
    /// Prefixes of tensors that are left out.
    left: BTreeSet<&'static str>,
    /// Files with weights in another format that were written later.
    newer: Vec<&'static str>,
}

struct Place {
    file: usize,
    /// Name in the file.
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Weights {
    /// Opens the files and checks their headers.
    pub(super) fn open(folder: &Path) -> Result<Self, ConvertError> {
        let names = names(folder)?;
        let mut weights = Self {
            files: Vec::new(),
            places: BTreeMap::new(),
            left: BTreeSet::new(),
            newer: vec![],
        };
        let changed = |name: &str| fs::metadata(folder.join(name)).ok()?.modified().ok();
        let read = names.files.iter().filter_map(|name| changed(name)).max();
        let later =
            |name: &&str| changed(name).is_some_and(|at| read.is_some_and(|read| at > read));
        weights.newer = PICKLED.into_iter().filter(later).collect();
        for name in names.files {
            weights.add(folder, &name)?;
        }
        for (tensor, file) in names.tensors {
            let found = weights.files.iter().position(|(name, _)| *name == file);
            let there = |place: &Place| place.name == tensor && Some(place.file) == found;
            // Tensors that are left out need not be present.
            let plain = plain(&tensor);
            if plain.as_ref().is_ok_and(|plain| !weights.places.get(plain).is_some_and(there)) {
                let reason =
                    format!("`{tensor}` should be in {file}, and is not: download it again");
                return Err(ConvertError::new(INDEX, reason));
            }
        }
        Ok(weights)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    fn add(&mut self, folder: &Path, name: &str) -> Result<(), ConvertError> {
        let map = map(&folder.join(name), name)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
            let reason =
                format!("it is torn, or no file of safetensors: {error}; download it again");
            ConvertError::new(name, reason)
        })?;
        let data = 8 + header;
        for (tensor, info) in metadata.tensors() {
            let plain = match plain(&tensor) {
                Ok(plain) => plain,
                Err(Some(part)) => {
                    self.left.insert(part);
                    continue;
                }
                Err(None) => continue,
            };
            let (start, end) = info.data_offsets;
            let place = Place {
                file: self.files.len(),
                name: tensor.clone(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: data + start..data + end,
            };
            if let Some(other) = self.places.insert(plain, place) {
                let (one, other) = (other.name, tensor);
                let reason = format!("`{other}` is a tensor that `{one}` is already");
                return Err(ConvertError::new(name, reason));
            }
        }
        self.files.push((name.to_owned(), map));
        Ok(())
    }

    /// Checks every tensor and adds all to the writer. Data is read only when it is written.
    pub(super) fn write<'a>(
        &'a self,
        wanted: &[Wanted],
        writer: &mut GgufWriter<'a>,
        lacking: &mut Vec<String>,
    ) -> Result<(), ConvertError> {
        let mut types: BTreeMap<TensorType, u64> = BTreeMap::new();
        for wanted in wanted {
            let (place, ty) = self.check(wanted)?;
            let data = &self.files[place.file].1[place.bytes.clone()];
            let (change, matrix) = (wanted.change, wanted.dims.len() > 1);
            if matrix {
                *types.entry(ty).or_default() += data.len() as u64;
            }
            let row = (wanted.dims[0] * ty.block_bytes()) as usize;
            // Vectors are always exact F32.
            let to = if matrix { ty } else { TensorType::F32 };
            writer.tensor_with(&wanted.name, &wanted.dims, to, move |out| match change {
                Change::None if matrix => out.write_all(data),
                Change::Neighbours(heads) if matrix => neighbours(out, data, heads as usize, row),
                change => vector(out, &numbers(data, ty), change),
            })?;
        }
        self.check_rest(wanted)?;
        self.note_unused_head(wanted, lacking);
        lacking.extend(self.newer.iter().map(|file| {
            format!(
                "{file} is newer than the weights that are read, which are those in safetensors"
            )
        }));
        // `general.file_type` in llama.cpp's numbering, by the type of most weights.
        let most = types.into_iter().max_by_key(|(_, bytes)| *bytes);
        let file_type = match most {
            Some((TensorType::F16, _)) => 1u32,
            Some((TensorType::BF16, _)) => 32,
            _ => 0,
        };
        writer.set("general.file_type", file_type);
        lacking.extend(
            self.left.iter().map(|part| format!("`{part}*`: only the model of text is taken")),
        );
        Ok(())
    }

    fn check(&self, wanted: &Wanted) -> Result<(&Place, TensorType), ConvertError> {
        let name = &wanted.from;
        let Some(place) = self.places.get(name) else {
            let file = self.files.first().map_or(WHOLE, |(file, _)| file);
            let file = if self.files.len() > 1 { INDEX } else { file };
            let reason = format!(
                "there is no tensor `{name}`, which the model that config.json describes has"
            );
            return Err(ConvertError::new(file, reason));
        };
        let file = &self.files[place.file].0;
        let ty = match place.dtype {
            Dtype::F32 => TensorType::F32,
            Dtype::F16 => TensorType::F16,
            Dtype::BF16 => TensorType::BF16,
            other => {
                let reason = format!(
                    "`{name}` is of type {other:?}; save the model as F32, F16 or BF16 (torch_dtype)"
                );
                return Err(ConvertError::new(file, reason));
            }
        };
        let shape: Vec<u64> = place.shape.iter().rev().map(|dim| *dim as u64).collect();
        if shape != wanted.dims {
            let expected: Vec<_> = wanted.dims.iter().rev().collect();
            let reason = format!(
                "`{name}` has the shape {:?}, but by config.json it has {expected:?}",
                place.shape
            );
            return Err(ConvertError::new(file, reason));
        }
        Ok((place, ty))
    }

    /// A tied model has one matrix for embedding and output: a separate head in its file is
    /// ignored, as in transformers.
    fn note_unused_head(&self, wanted: &[Wanted], lacking: &mut Vec<String>) {
        const HEAD: &str = "lm_head.weight";
        let bytes = |place: &Place| &self.files[place.file].1[place.bytes.clone()];
        let embedding = self.places.get("model.embed_tokens.weight");
        let (Some(head), Some(embedding)) = (self.places.get(HEAD), embedding) else { return };
        let used = wanted.iter().any(|wanted| wanted.from == HEAD);
        if !used && (head.dtype != embedding.dtype || bytes(head) != bytes(embedding)) {
            lacking.push(
                "`lm_head.weight` differs from the embedding, and is not used: config.json ties the \
                 two (tie_word_embeddings), as transformers reads it"
                    .to_owned(),
            );
        }
    }

    /// Refuses tensors that would be left out.
    fn check_rest(&self, wanted: &[Wanted]) -> Result<(), ConvertError> {
        let taken: BTreeSet<&str> = wanted.iter().map(|wanted| &wanted.from[..]).collect();
        let rest = self.places.iter().find(|(name, _)| {
            // The head of a tied model is a copy of the embedding.
            !taken.contains(&name[..]) && *name != "lm_head.weight"
        });
        match rest {
            None => Ok(()),
            Some((_, place)) => {
                let (file, name) = (&self.files[place.file].0, &place.name);
                let reason = format!(
                    "`{name}` is not a tensor of the model that config.json describes, and would be \
                     left out: remove it from the file (load the model with transformers, and \
                     `save_pretrained(folder)`), or correct config.json"
                );
                Err(ConvertError::new(file, reason))
            }
        }
    }
}

/// The name that a text-only model uses for a tensor; otherwise the optional part of the model to
/// which the tensor belongs.
fn plain(name: &str) -> Result<String, Option<&'static str>> {
    if IDLE.iter().any(|idle| name.ends_with(idle)) {
        return Err(None);
    }
    let mut inner = name;
    while let Some(rest) =
        inner.strip_prefix("model.").or_else(|| inner.strip_prefix("language_model."))
    {
        inner = rest;
    }
    if let Some(part) = OTHER_SENSES.iter().find(|part| inner.starts_with(**part)) {
        return Err(Some(part));
    }
    match inner.starts_with("lm_head.") {
        true => Ok(inner.to_owned()),
        false => Ok(format!("model.{inner}")),
    }
}

/// Files with weights, and the file of each tensor according to the index.
struct Names {
    files: BTreeSet<String>,
    tensors: Vec<(String, String)>,
}

fn names(folder: &Path) -> Result<Names, ConvertError> {
    if folder.join(WHOLE).exists() || !folder.join(INDEX).exists() {
        let there = folder.join(WHOLE).exists();
        return match PICKLED.into_iter().find(|name| folder.join(name).exists()) {
            _ if there => Ok(Names { files: [WHOLE.to_owned()].into(), tensors: Vec::new() }),
            Some(pickled) => Err(ConvertError::new(
                pickled,
                "weights in this form can run code, and are not read: convert them to safetensors \
                 (load the model with transformers, and `save_pretrained(folder)`)",
            )),
            None => Err(ConvertError::new(WHOLE, format!("there is no such file, and no {INDEX}"))),
        };
    }
    let index = object(folder, INDEX)?.unwrap_or_default();
    let wrong = |reason: String| ConvertError::new(INDEX, reason);
    let Some(Json::Object(listed)) = index.get("weight_map") else {
        return Err(wrong("it has no object `weight_map`".into()));
    };
    let mut names = Names { files: BTreeSet::new(), tensors: Vec::new() };
    for (tensor, file) in listed {
        let file = file.as_str().unwrap_or("");
        // A plain file name, which cannot lead out of the folder.
        if !file.ends_with(".safetensors") || file.contains(['/', '\\']) {
            return Err(wrong(format!(
                "`{tensor}` is in `{file}`, which is no *.safetensors beside"
            )));
        }
        names.files.insert(file.to_owned());
        names.tensors.push((tensor.clone(), file.to_owned()));
    }
    match names.files.is_empty() {
        true => Err(wrong("its `weight_map` is empty".into())),
        false => Ok(names),
    }
}

#[allow(unsafe_code)]
fn map(path: &Path, name: &str) -> Result<Mmap, ConvertError> {
    let about = fs::metadata(path).map_err(ConvertError::io(name))?;
    if !about.is_file() || about.len() < 8 {
        return Err(ConvertError::new(name, "it is torn, or no file of safetensors"));
    }
    let file = File::open(path).map_err(ConvertError::io(name))?;
    // SAFETY: the mapping is read-only and private to this value. It is sound as long as no process
    // shrinks or rewrites the file meanwhile. The file belongs to the caller, who named it on the
    // command line; download tools and `save_pretrained` replace such files by rename.
    unsafe { Mmap::map(&file) }.map_err(ConvertError::io(name))
}

/// Reorders rows from halves to adjacent pairs: row i + j·half of a head becomes row 2i + j.
fn neighbours(out: &mut dyn Write, data: &[u8], heads: usize, row: usize) -> io::Result<()> {
    let dim = data.len() / row / heads;
    for head in data.chunks_exact(dim * row) {
        for pair in 0..dim / 2 {
            for half in [0, dim / 2] {
                out.write_all(&head[(half + pair) * row..][..row])?;
            }
        }
    }
    Ok(())
}

/// Writes numbers as F32, with 1 added for Gemma's norms.
fn vector(out: &mut dyn Write, values: &[f32], change: Change) -> io::Result<()> {
    let more = if change == Change::PlusOne { 1.0 } else { 0.0 };
    let bytes: Vec<u8> = values.iter().flat_map(|x| (x + more).to_le_bytes()).collect();
    match change {
        Change::Neighbours(heads) => neighbours(out, &bytes, heads as usize, 4),
        _ => out.write_all(&bytes),
    }
}

fn numbers(data: &[u8], ty: TensorType) -> Vec<f32> {
    match ty {
        TensorType::F16 => {
            data.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).to_f32()).collect()
        }
        TensorType::BF16 => {
            data.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect()
        }
        _ => data.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
    }
}
