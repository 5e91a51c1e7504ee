//! The device that trains.

use serde::{Deserialize, Serialize};

/// Where the arithmetic of a training job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum TrainDevice {
    /// The first CUDA device in a build with the feature `cuda` that finds one, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The first CUDA device.
    Cuda,
}

impl TrainDevice {
    /// # Errors
    /// If this build cannot use the device.
    pub(super) fn check(self) -> Result<(), String> {
        match self {
            Self::Cuda if !cfg!(feature = "cuda") => {
                Err("train.device: this build has no CUDA; use `auto` or `cpu`, or build with \
                 `--features cuda`"
                    .into())
            }
            _ => Ok(()),
        }
    }
}
