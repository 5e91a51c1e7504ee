//! [`keep_layers`]: a model without some of its layers.

use super::error::malformed;
use super::{Array, Gguf, GgufError, GgufWriter, ModelConfig, Value};
use std::path::Path;

/// Writes `model` with only the layers `kept`, which are counted from 0 and ascend. Tensors are
/// copied as they are, and numbered anew.
///
/// # Errors
/// [`GgufError`] if the model's family is not supported, or its layers are of different kinds, which
/// follow from their numbers (sliding windows of Gemma); or if the file cannot be written. No
/// incomplete file is left.
pub fn keep_layers(model: &Gguf, kept: &[usize], path: &Path) -> Result<(), GgufError> {
    let shape = match ModelConfig::read(model) {
        Ok(shape) => shape,
        Err(error) => malformed!("{error}"),
    };
    if kept.is_empty() || kept.iter().any(|&layer| layer >= shape.layers) {
        malformed!("the model has {} layers; kept are {kept:?}", shape.layers);
    }
    if shape.kinds.windows(2).any(|kinds| kinds[0] != kinds[1]) {
        malformed!(
            "the layers of a {} model are of different kinds, by their numbers: none can be removed",
            shape.architecture
        );
    }
    let mut writer = GgufWriter::new();
    writer.copy_metadata(model, |_| true);
    let prefix = format!("{}.", shape.architecture);
    for (key, value) in model.metadata().filter(|(key, _)| key.starts_with(&prefix)) {
        if let Value::Array(array) = value
            && array.len() == shape.layers
        {
            writer.set(key, Value::Array(some(array, kept)));
        }
    }
    writer.set(&format!("{prefix}block_count"), kept.len() as u32);
    for tensor in model.tensors() {
        let name = match layer_of(tensor.name()) {
            None => tensor.name().to_owned(),
            Some((layer, rest)) => match kept.iter().position(|&kept| kept == layer) {
                Some(number) => format!("blk.{number}.{rest}"),
                None => continue,
            },
        };
        writer.tensor(&name, tensor.dims(), tensor.ty(), model.data(tensor.name())?)?;
    }
    writer.write(path)?;
    Ok(())
}

/// The layer and the rest of a name `blk.LAYER.REST`.
fn layer_of(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// The elements `kept` of an array.
fn some(array: &Array, kept: &[usize]) -> Array {
    macro_rules! each {
        ($($variant:ident),*) => {
            match array {
                $(Array::$variant(all) => {
                    Array::$variant(kept.iter().map(|&at| all[at].clone()).collect())
                })*
            }
        };
    }
    each!(U8, I8, U16, I16, U32, I32, F32, Bool, String, U64, I64, F64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::fixture::TinyDecoder;

    #[test]
    fn the_kept_layers_are_numbered_anew() {
        let folder = tempfile::tempdir().unwrap();
        let [whole, cut] = ["whole.gguf", "cut.gguf"].map(|name| folder.path().join(name));
        TinyDecoder::new("llama").write(&whole).unwrap();
        let whole = Gguf::open(&whole).unwrap();
        let layers = ModelConfig::read(&whole).unwrap().layers;
        assert!(layers >= 2);
        keep_layers(&whole, &[layers - 1], &cut).unwrap();
        let made = Gguf::open(&cut).unwrap();
        assert_eq!(ModelConfig::read(&made).unwrap().layers, 1);
        let name = format!("blk.{}.attn_q.weight", layers - 1);
        assert_eq!(made.data("blk.0.attn_q.weight").unwrap(), whole.data(&name).unwrap());
        assert_eq!(
            made.data("token_embd.weight").unwrap(),
            whole.data("token_embd.weight").unwrap()
        );
        assert!(made.tensor("blk.1.attn_q.weight").is_none());
        for bad in [&[][..], &[layers]] {
            assert!(keep_layers(&whole, bad, &cut).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn layers_of_different_kinds_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("whole.gguf");
        TinyDecoder::new("gemma2").write(&path).unwrap();
        let whole = Gguf::open(&path).unwrap();
        let error = keep_layers(&whole, &[0], &folder.path().join("cut.gguf")).unwrap_err();
        assert!(error.to_string().contains("different kinds"), "{error}");
        assert!(!folder.path().join("cut.gguf").exists());
    }
}
