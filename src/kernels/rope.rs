//! Computes the frequencies of the rotary position embedding that a file describes.

use super::vector::{Rope, RopePairs};
use crate::gguf::{Gguf, RopeFacts, Yarn};
use std::f64::consts::PI;

/// The rotary embedding of a file, for sequences of up to `context` tokens.
///
/// # Errors
/// If the file's frequency factors cannot be read or are invalid.
pub fn rope(file: &Gguf, facts: &RopeFacts, context: usize) -> Result<Rope, String> {
    let name = facts.factors.tensor(context).filter(|name| file.tensor(name).is_some());
    let Some(name) = name else { return Ok(of(facts, None)) };
    let factors = file.to_f32(name).map_err(|error| error.to_string())?;
    let usable = |factor: &f32| factor.is_finite() && *factor > 0.0;
    match factors.len() >= facts.dims / 2 && factors.iter().all(usable) {
        true => Ok(of(facts, Some(&factors))),
        false => Err(format!("`{name}` is no list of {} factors", facts.dims / 2)),
    }
}

/// `factors` divide the frequencies, one factor per pair.
fn of(facts: &RopeFacts, factors: Option<&[f32]>) -> Rope {
    let pairs = if facts.adjacent { RopePairs::Adjacent } else { RopePairs::Halves };
    let (base, dims, scale) = (f64::from(facts.base), facts.dims as f64, f64::from(facts.scale));
    let keeps = |pair: usize| facts.yarn.map_or(0.0, |yarn| kept(&yarn, base, dims, pair as f64));
    let frequency = |pair: usize| {
        let factor = factors.map_or(1.0, |factors| f64::from(factors[pair]));
        let plain = base.powf(-2.0 * pair as f64 / dims) / factor;
        let keep = keeps(pair);
        (plain * scale * (1.0 - keep) + plain * keep) as f32
    };
    let frequencies = (0..facts.dims / 2).map(frequency).collect();
    // YaRN's attention temperature for the longer context (equation 22).
    let sharper = facts.yarn.map_or(1.0, |_| (1.0 - 0.1 * facts.scale.ln()).max(1.0));
    Rope::new(pairs, frequencies, facts.magnitude * sharper)
}

/// The share of its original frequency that a pair keeps: 1 for pairs that rotate more than
/// `beta_fast` times in the original context, 0 for pairs below `beta_slow` rotations (equations 17
/// to 20, with the ramp over the pairs' indices and its ends rounded outwards, as in the authors'
/// code).
fn kept(yarn: &Yarn, base: f64, dims: f64, pair: f64) -> f64 {
    let turning = |turns: f32| {
        let length = yarn.original_context as f64 / (f64::from(turns) * 2.0 * PI);
        dims * length.ln() / (2.0 * base.ln())
    };
    let low = turning(yarn.beta_fast).floor().max(0.0);
    let high = turning(yarn.beta_slow).ceil().min(dims - 1.0);
    1.0 - ((pair - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yarn_keeps_fast_pairs_and_scales_slow_ones() {
        let yarn = Yarn { original_context: 4096, beta_fast: 32.0, beta_slow: 1.0 };
        let kept: Vec<_> = (0..32).map(|pair| kept(&yarn, 1e4, 64.0, f64::from(pair))).collect();
        assert!(kept.is_sorted_by(|a, b| a >= b));
        // 32 rotations in 4,096 tokens: pair 10.46; one rotation: pair 22.5.
        assert_eq!((kept[10], kept[23]), (1.0, 0.0));
        assert!((kept[17] - 6.0 / 13.0).abs() < 1e-12);
    }
}
