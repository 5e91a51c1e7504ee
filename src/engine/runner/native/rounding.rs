//! Which inputs of a model's matrices have residuals, for each type of activations.
//!
//! Rounding to 8 bits loses most where a block of 32 values has one that is far larger than the
//! others, which are then rounded in its steps. Few blocks are like that (outlier features: Dettmers et
//! al. 2022, arXiv:2208.07339), and except in the inputs of `down` they are mostly the same ones for
//! every token, so that a tile of tokens shares them. Residuals of these blocks alone take away most
//! of the error. How the limits were chosen: docs/log/rounding.md.

use crate::ipc::ActivationType;
use crate::kernels::Residuals;

/// The residuals of the inputs of a layer's matrices.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerResiduals {
    /// Of queries, keys and values.
    pub attention: Residuals,
    /// Of the output matrix of attention.
    pub output: Residuals,
    /// Of gate and up.
    pub feed_forward: Residuals,
    pub down: Residuals,
}

impl LayerResiduals {
    fn all(residuals: Residuals) -> Self {
        Self { attention: residuals, output: residuals, feed_forward: residuals, down: residuals }
    }
}

/// The residuals of the inputs of layer `layer` of `layers`. Rounding in the last layer moves the
/// predictions most, so its limit is lower.
pub(super) fn of_layer(activations: ActivationType, layer: usize, layers: usize) -> LayerResiduals {
    match activations {
        ActivationType::I8 => LayerResiduals::all(Residuals::None),
        ActivationType::I16 => LayerResiduals::all(Residuals::All),
        ActivationType::Auto if layer + 1 == layers => LayerResiduals::all(Residuals::Above(4.0)),
        ActivationType::Auto => LayerResiduals {
            attention: Residuals::Above(6.0),
            output: Residuals::None,
            feed_forward: Residuals::Above(8.0),
            down: Residuals::Above(12.0),
        },
    }
}

/// The residuals of the inputs of the output matrix.
pub(super) fn of_head(activations: ActivationType) -> Residuals {
    match activations {
        ActivationType::I8 => Residuals::None,
        ActivationType::I16 => Residuals::All,
        ActivationType::Auto => Residuals::Above(3.0),
    }
}
