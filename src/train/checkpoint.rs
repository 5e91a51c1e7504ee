//! Checkpoints: folders that are written atomically.
//!
//! `step-N/` contains `weights.safetensors` (the trained parameters), `optimizer.safetensors`,
//! `state.json` (the state of the run) and `manifest.json` (sizes and SHA-256 of the other files).
//! A checkpoint is written under another name, synced to disk, and renamed. Checkpoints that do not
//! match their manifest are skipped.

use crate::train::optim::{Optimization, Param};
use candle_core::{Device, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const MANIFEST: &str = "manifest.json";

/// Why a checkpoint was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {why}", path.display())]
    Broken { path: PathBuf, why: String },
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    |source| CheckpointError::Io { path, source }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    sha256: String,
}

/// The checkpoints of a job.
pub struct Checkpoints {
    folder: PathBuf,
    /// Number of checkpoints to keep.
    keep: usize,
}

/// Weights that are kept beside the checkpoints, since their validation was the best.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BestWeights {
    pub step: u64,
    sha256: String,
}

/// A checkpoint that was read and verified.
pub struct Restored<S> {
    pub step: u64,
    pub state: S,
    weights: HashMap<String, Tensor>,
    optimizer: HashMap<String, Tensor>,
}

impl Checkpoints {
    /// # Errors
    /// If the folder cannot be created.
    pub fn new(folder: &Path, keep: usize) -> Result<Self, CheckpointError> {
        fs::create_dir_all(folder).map_err(at(folder))?;
        Ok(Self { folder: folder.to_owned(), keep: keep.max(1) })
    }

    fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step}"))
    }

    /// Steps that have a checkpoint, the newest first.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let entries = fs::read_dir(&self.folder).map_err(at(&self.folder))?;
        let step = |entry: fs::DirEntry| {
            entry.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok()
        };
        let mut steps: Vec<_> = entries.flatten().filter_map(step).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// Writes a checkpoint, and deletes the oldest ones beyond the number to keep.
    ///
    /// # Errors
    /// [`CheckpointError`]; earlier checkpoints are unchanged.
    pub fn write(
        &self,
        step: u64,
        params: &[Param],
        optimization: &Optimization,
        state: &impl Serialize,
    ) -> Result<PathBuf, CheckpointError> {
        let (part, whole) = (self.folder.join(format!(".step-{step}.part")), self.path(step));
        let _ = fs::remove_dir_all(&part);
        fs::create_dir_all(&part).map_err(at(&part))?;
        let written = self.fill(&part, params, optimization, state);
        if let Err(error) = written {
            // An incomplete checkpoint would only occupy disk space.
            let _ = fs::remove_dir_all(&part);
            return Err(error);
        }
        if whole.exists() {
            fs::remove_dir_all(&whole).map_err(at(&whole))?;
        }
        fs::rename(&part, &whole).map_err(at(&whole))?;
        sync(&self.folder)?;
        for old in self.steps()?.into_iter().skip(self.keep) {
            let path = self.path(old);
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
        Ok(whole)
    }

    fn best_path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("best-{step}"))
    }

    /// Writes the weights alone, beside the checkpoints.
    ///
    /// # Errors
    /// [`CheckpointError`]; what was written before is unchanged.
    pub fn write_best(&self, step: u64, params: &[Param]) -> Result<BestWeights, CheckpointError> {
        let (part, whole) = (self.folder.join(".best.part"), self.best_path(step));
        let _ = fs::remove_dir_all(&part);
        fs::create_dir_all(&part).map_err(at(&part))?;
        let weights = packed(tensors(params), &part)?;
        put(&part.join(WEIGHTS), &weights)?;
        let _ = fs::remove_dir_all(&whole);
        fs::rename(&part, &whole).map_err(at(&whole))?;
        sync(&self.folder)?;
        Ok(BestWeights { step, sha256: digest(&weights) })
    }

    /// Sets the parameters to weights that were kept.
    ///
    /// # Errors
    /// If they cannot be read, or do not belong to these parameters; nothing is changed in this
    /// case.
    pub fn load_best(&self, best: &BestWeights, params: &[Param]) -> Result<(), CheckpointError> {
        let path = self.best_path(best.step).join(WEIGHTS);
        let bytes = get(&path)?;
        if digest(&bytes) != best.sha256 {
            return Err(broken(&path, "it is not what was written"));
        }
        let weights = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        set(params, &matching(params, &weights)?)
    }

    /// Whether these weights are there and whole.
    pub fn has_best(&self, best: &BestWeights) -> bool {
        let bytes = get(&self.best_path(best.step).join(WEIGHTS));
        bytes.is_ok_and(|bytes| digest(&bytes) == best.sha256)
    }

    /// Deletes all kept weights except these.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn delete_worse(&self, best: &BestWeights) -> Result<(), CheckpointError> {
        let kept = self.best_path(best.step);
        for entry in fs::read_dir(&self.folder).map_err(at(&self.folder))?.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path != kept && name.to_str().is_some_and(|name| name.starts_with("best-")) {
                fs::remove_dir_all(&path).map_err(at(&path))?;
            }
        }
        Ok(())
    }

    fn fill(
        &self,
        folder: &Path,
        params: &[Param],
        optimization: &Optimization,
        state: &impl Serialize,
    ) -> Result<(), CheckpointError> {
        let mut manifest = BTreeMap::new();
        let mut add = |name: &str, bytes: &[u8]| {
            let entry = Entry { bytes: bytes.len() as u64, sha256: digest(bytes) };
            manifest.insert(name.to_owned(), entry);
            put(&folder.join(name), bytes)
        };
        add(WEIGHTS, &packed(tensors(params), folder)?)?;
        add(OPTIMIZER, &packed(optimization.state(params)?, folder)?)?;
        add(STATE, &json(state, folder)?)?;
        put(&folder.join(MANIFEST), &json(&manifest, folder)?)?;
        sync(folder)
    }

    /// The newest complete checkpoint.
    ///
    /// # Errors
    /// If the folder cannot be read. Incomplete checkpoints are logged and skipped.
    pub fn newest<S: DeserializeOwned>(&self) -> Result<Option<Restored<S>>, CheckpointError> {
        for step in self.steps()? {
            match self.read(step) {
                Ok(restored) => return Ok(Some(restored)),
                Err(error) => tracing::warn!("a checkpoint is passed over: {error}"),
            }
        }
        Ok(None)
    }

    /// # Errors
    /// If the checkpoint does not exist or is incomplete.
    pub fn read<S: DeserializeOwned>(&self, step: u64) -> Result<Restored<S>, CheckpointError> {
        let folder = self.path(step);
        let parsed = |name: &str, bytes: &[u8]| {
            serde_json::from_slice(bytes).map_err(|error| broken(&folder.join(name), error))
        };
        let manifest: BTreeMap<String, Entry> =
            serde_json::from_slice(&get(&folder.join(MANIFEST))?)
                .map_err(|error| broken(&folder.join(MANIFEST), error))?;
        let checked = |name: &str| {
            let path = folder.join(name);
            let bytes = get(&path)?;
            let found = Entry { bytes: bytes.len() as u64, sha256: digest(&bytes) };
            match manifest.get(name) == Some(&found) {
                true => Ok(bytes),
                false => Err(broken(&path, "it is not what the manifest says")),
            }
        };
        Ok(Restored {
            step,
            state: parsed(STATE, &checked(STATE)?)?,
            weights: candle_core::safetensors::load_buffer(&checked(WEIGHTS)?, &Device::Cpu)?,
            optimizer: candle_core::safetensors::load_buffer(&checked(OPTIMIZER)?, &Device::Cpu)?,
        })
    }
}

impl<S> Restored<S> {
    /// Restores weights and moments.
    ///
    /// # Errors
    /// If they do not belong to these parameters; nothing is changed in this case.
    pub fn apply(
        &self,
        params: &[Param],
        optimization: &mut Optimization,
    ) -> Result<(), CheckpointError> {
        let found = matching(params, &self.weights)?;
        optimization.restore(params, self.step, &self.optimizer)?;
        set(params, &found)
    }
}

/// (parameters) the tensor of each parameter.
fn matching<'a>(
    params: &[Param],
    weights: &'a HashMap<String, Tensor>,
) -> Result<Vec<&'a Tensor>, CheckpointError> {
    let find = |param: &Param| match weights.get(&param.name) {
        Some(tensor) if tensor.shape() == param.var.shape() => Ok(tensor),
        _ => {
            let why = format!("the checkpoint has no `{}` of its shape", param.name);
            Err(candle_core::Error::msg(why).into())
        }
    };
    params.iter().map(find).collect()
}

fn set(params: &[Param], values: &[&Tensor]) -> Result<(), CheckpointError> {
    for (param, tensor) in params.iter().zip(values) {
        param.var.set(&tensor.to_device(param.var.device())?)?;
    }
    Ok(())
}

fn tensors(params: &[Param]) -> Vec<(String, Tensor)> {
    params.iter().map(|param| (param.name.clone(), param.var.as_tensor().clone())).collect()
}

fn packed(tensors: Vec<(String, Tensor)>, folder: &Path) -> Result<Vec<u8>, CheckpointError> {
    safetensors::serialize(tensors, None).map_err(|error| broken(folder, error))
}

fn json(value: &impl Serialize, folder: &Path) -> Result<Vec<u8>, CheckpointError> {
    serde_json::to_vec_pretty(value).map_err(|error| broken(folder, error))
}

fn broken(path: &Path, why: impl std::fmt::Display) -> CheckpointError {
    CheckpointError::Broken { path: path.to_owned(), why: why.to_string() }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn put(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = File::create(path).map_err(at(path))?;
    file.write_all(bytes).map_err(at(path))?;
    file.sync_all().map_err(at(path))
}

fn get(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(at(path))?;
    Ok(bytes)
}

fn sync(folder: &Path) -> Result<(), CheckpointError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::Optimizer;
    use candle_core::Var;

    fn param(value: f32) -> Param {
        let var = Var::from_slice(&[value, 2.0], 2, &Device::Cpu).unwrap();
        Param { name: "w".into(), var, decays: true, hidden: false }
    }

    fn step(params: &[Param], optimization: &mut Optimization) {
        let grads: Vec<_> =
            params.iter().map(|param| param.var.as_tensor().copy().unwrap()).collect();
        optimization.step(params, &grads, 1.0, 0.1, 1.0).unwrap();
    }

    fn values(params: &[Param]) -> Vec<f32> {
        params[0].var.to_vec1().unwrap()
    }

    #[test]
    fn a_run_goes_on_with_the_same_bits() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), 2).unwrap();
        let (params, mut optimization) = ([param(1.0)], Optimization::new(Optimizer::default()));
        for number in 1..=5 {
            step(&params, &mut optimization);
            checkpoints.write(number, &params, &optimization, &format!("at {number}")).unwrap();
        }
        assert_eq!(checkpoints.steps().unwrap(), [5, 4]);
        let restored = checkpoints.newest::<String>().unwrap().unwrap();
        assert_eq!((restored.step, &restored.state[..]), (5, "at 5"));
        let (others, mut other) = ([param(9.0)], Optimization::new(Optimizer::default()));
        restored.apply(&others, &mut other).unwrap();
        for _ in 0..3 {
            step(&params, &mut optimization);
            step(&others, &mut other);
        }
        assert_eq!(values(&params), values(&others));
    }

    #[test]
    fn what_is_broken_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), 9).unwrap();
        let (params, mut optimization) = ([param(1.0)], Optimization::new(Optimizer::default()));
        for number in 1..=4 {
            step(&params, &mut optimization);
            checkpoints.write(number, &params, &optimization, &number).unwrap();
        }
        let flip = |name: &str| {
            let path = folder.path().join(name);
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        };
        flip("step-4/weights.safetensors");
        fs::remove_file(folder.path().join("step-3/manifest.json")).unwrap();
        fs::create_dir(folder.path().join(".step-5.part")).unwrap();
        assert_eq!(checkpoints.newest::<u64>().unwrap().unwrap().state, 2);
        let mut wrong = param(0.0);
        wrong.name = "other".into();
        let restored = checkpoints.newest::<u64>().unwrap().unwrap();
        assert!(restored.apply(&[wrong], &mut optimization).is_err());
        assert_eq!(optimization.steps(), 4, "nothing is changed");
    }
}
