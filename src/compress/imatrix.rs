//! Importance matrices in llama.cpp's GGUF format: for each tensor the sums of its squared inputs
//! (`NAME.in_sum2`), and the number of rows that were summed (`NAME.counts`), for each expert.

use crate::gguf::{Gguf, GgufError, Value};
use std::collections::BTreeMap;
use std::path::Path;

pub(super) const SUMS: &str = ".in_sum2";
pub(super) const COUNTS: &str = ".counts";

/// Mean squared inputs of tensors.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Imatrix {
    /// (experts × columns) by name of the tensor.
    pub means: BTreeMap<String, Vec<f32>>,
}

/// Why an importance matrix cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImatrixError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("{0}")]
    Invalid(String),
}

impl Imatrix {
    /// # Errors
    /// [`ImatrixError`] if the file is none, or a tensor of it is malformed.
    pub(super) fn read(path: &Path) -> Result<Self, ImatrixError> {
        let file = Gguf::open(path)?;
        let invalid = |why: String| ImatrixError::Invalid(why);
        if !matches!(file.get("general.type"), Some(Value::String(ty)) if ty == "imatrix") {
            return Err(invalid("general.type is not `imatrix`".into()));
        }
        let mut means = BTreeMap::new();
        for tensor in file.tensors() {
            let Some(name) = tensor.name().strip_suffix(SUMS) else { continue };
            let counts = format!("{name}{COUNTS}");
            if file.tensor(&counts).is_none() {
                return Err(invalid(format!("`{counts}` is missing")));
            }
            let (mut sums, counts) = (file.to_f32(tensor.name())?, file.to_f32(&counts)?);
            if counts.is_empty() || sums.is_empty() || !sums.len().is_multiple_of(counts.len()) {
                return Err(invalid(format!(
                    "`{name}` has {} sums and {} counts",
                    sums.len(),
                    counts.len()
                )));
            }
            if sums.iter().chain(&counts).any(|x| !x.is_finite() || *x < 0.0) {
                return Err(invalid(format!("`{name}` has numbers that are no sums of squares")));
            }
            let columns = sums.len() / counts.len();
            for (sums, &count) in sums.chunks_exact_mut(columns).zip(&counts) {
                // An expert without data has no preference.
                sums.iter_mut().for_each(|sum| *sum = if count > 0.0 { *sum / count } else { 1.0 });
            }
            means.insert(name.to_owned(), sums);
        }
        match means.is_empty() {
            true => Err(invalid("it has no entries".into())),
            false => Ok(Self { means }),
        }
    }

    /// Checks that the matrix is of this model.
    ///
    /// # Errors
    /// The tensor that does not fit.
    pub(super) fn check(&self, models: &[Gguf]) -> Result<(), ImatrixError> {
        let mut fits = 0;
        for (name, means) in &self.means {
            let found = models.iter().find_map(|model| model.tensor(name));
            let Some(tensor) = found else { continue };
            let [columns, _, rest @ ..] = tensor.dims() else { continue };
            let wanted = columns * rest.iter().product::<u64>();
            if means.len() as u64 != wanted {
                return Err(ImatrixError::Invalid(format!(
                    "`{name}` has {} numbers, and the model's tensor needs {wanted}: it is of another model",
                    means.len()
                )));
            }
            fits += 1;
        }
        match fits {
            0 => Err(ImatrixError::Invalid("no entry is of a tensor of the model".into())),
            _ => Ok(()),
        }
    }
}
