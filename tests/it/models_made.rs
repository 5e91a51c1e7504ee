//! Tiny models and adapters, generated for a test.

use ingot::gateway::store::{Store, StoredModel};
use ingot::gguf::fixture::{TinyLlama, tiny_llama, tiny_peft};
use ingot::gguf::{Gguf, GgufWriter, ModelFacts, TensorType, Value};
use std::path::{Path, PathBuf};

/// Writes `<folder>/<name>.gguf`: a Llama model whose output depends on `seed`.
pub(crate) fn llama(folder: &Path, name: &str, seed: u64) -> PathBuf {
    let path = folder.join(format!("{name}.gguf"));
    let options = TinyLlama { seed, ..TinyLlama::default() };
    tiny_llama(&path, &options).expect("the model is written");
    path
}

/// Writes the PEFT folder `<folder>/<name>` for a base model.
pub(crate) fn peft(folder: &Path, name: &str, base: &Path, seed: u64) -> PathBuf {
    let path = folder.join(name);
    tiny_peft(&path, &facts(base), 4, seed).expect("the adapter is written");
    path
}

pub(crate) fn facts(model: &Path) -> ModelFacts {
    let gguf = Gguf::open_header(model).expect("the model is readable");
    ModelFacts::read(&gguf).expect("the model is complete")
}

/// Changes to make in a copy of a model.
#[derive(Default)]
pub(crate) struct Changes<'a> {
    pub set: Vec<(&'a str, Value)>,
    pub remove: Vec<&'a str>,
    /// Tensors to omit.
    pub without: Vec<&'a str>,
    /// Values to add to tensors.
    pub add: Vec<(String, Vec<f32>)>,
}

/// Copies a model with F32 tensors, with changes.
pub(crate) fn copy_with(from: &Path, to: &Path, changes: &Changes<'_>) {
    let gguf = Gguf::open(from).expect("the model is readable");
    let mut writer = GgufWriter::new();
    writer.copy_metadata(&gguf, |key| !changes.remove.contains(&key));
    for (key, value) in &changes.set {
        writer.set(key, value.clone());
    }
    for tensor in gguf.tensors().iter().filter(|t| !changes.without.contains(&t.name())) {
        let mut values = gguf.to_f32(tensor.name()).expect("F32");
        for (_, delta) in changes.add.iter().filter(|(name, _)| name == tensor.name()) {
            assert_eq!(values.len(), delta.len());
            values.iter_mut().zip(delta).for_each(|(value, delta)| *value += delta);
        }
        writer
            .tensor_f32(tensor.name(), tensor.dims(), TensorType::F32, values)
            .expect("the tensor fits");
    }
    writer.write(to).expect("the model is written");
}

/// Registers a file in the data folder as a model, as `ingot pull` would.
pub(crate) fn store(data: &Path, name: &str, file: &Path) {
    let folder = data.join("models");
    std::fs::create_dir_all(&folder).expect("the folder is made");
    let inside = Path::new("models").join(format!("{name}.gguf"));
    std::fs::copy(file, data.join(&inside)).expect("the file is copied");
    let bytes = std::fs::metadata(file).expect("the file exists").len();
    let model = StoredModel {
        name: name.to_owned(),
        file: inside,
        sha256: "0".repeat(64),
        bytes,
        source: format!("test:{name}"),
        created_at: 0,
    };
    Store::open(data).and_then(|store| store.put_model(&model)).expect("the model is listed");
}
