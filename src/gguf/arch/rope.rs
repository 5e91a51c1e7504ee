//! Rotary positions (RoPE) as described by a header.

use super::{Keys, UnsupportedModel, other};

/// Rotary positions (Su et al. 2021, arXiv:2104.09864) and their scaling to longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFacts {
    /// Whether the elements of a pair are adjacent; otherwise they are half the rotated elements
    /// apart.
    pub adjacent: bool,
    /// Number of rotated elements of a head.
    pub dims: usize,
    pub base: f32,
    /// Factor on positions.
    pub scale: f32,
    /// Factor on cosines and sines, in addition to that of YaRN.
    pub magnitude: f32,
    pub yarn: Option<Yarn>,
    pub factors: RopeFactors,
}

/// YaRN (Peng et al. 2023, arXiv:2309.00071): pairs that rotate often within the original context
/// keep their frequency; the frequencies of pairs that rotate rarely are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// Context length in tokens with which the model was first trained.
    pub original_context: usize,
    /// Number of rotations above which no pair is scaled, and (`beta_slow`) below which every pair
    /// is.
    pub beta_fast: f32,
    pub beta_slow: f32,
}

/// Tensors whose elements divide the frequencies, if the file has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeFactors {
    None,
    /// `rope_freqs.weight` (Llama 3.1).
    Always,
    /// LongRoPE (Ding et al. 2024, arXiv:2402.13753): one set for sequences that fit the original
    /// context, another for longer ones.
    ByContext {
        original: usize,
    },
}

impl RopeFactors {
    /// The tensor for sequences of up to `context` tokens.
    pub fn tensor(self, context: usize) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Always => Some("rope_freqs.weight"),
            Self::ByContext { original } if context > original => Some("rope_factors_long.weight"),
            Self::ByContext { .. } => Some("rope_factors_short.weight"),
        }
    }
}

impl Keys<'_> {
    /// `rope.scaling.type`; a factor without a type is linear.
    pub(super) fn rope_scaling(&self) -> Result<String, UnsupportedModel> {
        let kind = self.file.str(&self.key("rope.scaling.type"))?.unwrap_or("linear");
        match kind {
            "none" | "linear" | "yarn" | "longrope" => Ok(kind.to_owned()),
            _ => other(format!("rope scaling `{kind}` is not covered")),
        }
    }

    /// Context length in tokens before it was extended.
    pub(super) fn original_context(&self) -> Result<usize, UnsupportedModel> {
        match self.optional("rope.scaling.original_context_length")? {
            Some(tokens) if tokens > 0 => Ok(tokens),
            _ => self.needed("context_length"),
        }
    }

    pub(super) fn rope(
        &self,
        adjacent: bool,
        head_dim: usize,
    ) -> Result<RopeFacts, UnsupportedModel> {
        let kind = self.rope_scaling()?;
        let dims = self.optional("rope.dimension_count")?.unwrap_or(head_dim);
        if dims > head_dim || dims % 2 != 0 || dims == 0 {
            return other(format!("{dims} rotated elements do not fit heads of {head_dim}"));
        }
        let factor = match self.float("rope.scaling.factor")? {
            None => self.float("rope.scale_linear")?,
            factor => factor,
        };
        let factor = factor.filter(|&factor| factor != 0.0 && kind != "none").unwrap_or(1.0);
        let base = self.float("rope.freq_base")?.unwrap_or(10_000.0);
        let magnitude = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let positive = |x: f32| x.is_finite() && x > 0.0;
        if ![factor, base, magnitude].into_iter().all(positive) || base == 1.0 {
            return other(format!(
                "its rope has base {base}, factor {factor}, attn_factor {magnitude}"
            ));
        }
        let yarn = match kind.as_str() {
            "yarn" => Some(self.yarn()?),
            _ => None,
        };
        let (scale, factors) = (1.0 / factor, RopeFactors::None);
        Ok(RopeFacts { adjacent, dims, base, scale, magnitude, yarn, factors })
    }

    fn yarn(&self) -> Result<Yarn, UnsupportedModel> {
        let beta_fast = self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0);
        let beta_slow = self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0);
        if !(beta_slow > 0.0 && beta_fast >= beta_slow && beta_fast.is_finite()) {
            return other(format!("its YaRN has beta_fast {beta_fast}, beta_slow {beta_slow}"));
        }
        Ok(Yarn { original_context: self.original_context()?, beta_fast, beta_slow })
    }
}
