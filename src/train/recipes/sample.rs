//! Sampling of text from a model in training, which shows users what the model has learned.

use super::run::TrainError;
use crate::tokenizer::Vocab;
use crate::train::model::Model;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// Tokens of a sample, for large and for small models. Each token is computed with the whole
/// sequence again, without a KV cache.
const TOKENS: [usize; 2] = [32, 100];
/// Limit of the model's weights times the tokens of its sample, approximately.
const WORK: usize = 2_000_000_000;
/// Maximum number of bytes of the prompt, and of the generated text.
const BYTES: usize = 4096;
/// Below 1, because a model after few steps generates incoherent text.
const TEMPERATURE: f64 = 0.8;

/// Generates a text that begins with `prompt`. The same seed, step and weights give the same text.
///
/// # Errors
/// If memory cannot be allocated.
pub(super) fn sample(
    model: &Model,
    vocab: &Vocab,
    prompt: &[u32],
    context: usize,
    key: (u64, u64),
) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    hash.update("sample");
    hash.update(key.0.to_le_bytes());
    hash.update(key.1.to_le_bytes());
    let mut rng = StdRng::from_seed(hash.finalize().into());
    let mut tokens = prompt.to_vec();
    let weights: usize = model.params().iter().map(|param| param.var.elem_count()).sum();
    let [least, most] = TOKENS;
    for _ in 0..(WORK / weights.max(1)).clamp(least, most) {
        let logits = model.logits(&tokens[tokens.len().saturating_sub(context)..])?;
        let token = draw(&logits, rng.random());
        if vocab.ends_generation(token) {
            break;
        }
        tokens.push(token);
    }
    let bytes: Vec<u8> =
        tokens.iter().flat_map(|token| vocab.output_piece(*token, false)).copied().collect();
    Ok(String::from_utf8_lossy(&bytes[..bytes.len().min(BYTES)]).into_owned())
}

/// The token at quantile `at`, from 0 to 1, of the distribution.
fn draw(logits: &[f32], at: f64) -> u32 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, x| most.max(*x));
    let weights: Vec<f64> =
        logits.iter().map(|x| (f64::from(x - most) / TEMPERATURE).exp()).collect();
    let mut left = at * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    weights.len().saturating_sub(1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_as_likely_as_they_are() {
        // At this temperature the second token is e^(1/0.8) times as likely as the first.
        let share = 1.0 / (1.0 + (1.0f64 / TEMPERATURE).exp());
        let low = (0..1000).filter(|i| draw(&[0.0, 1.0], f64::from(*i) / 1000.0) == 0).count();
        assert!((low as f64 / 1000.0 - share).abs() < 2e-3, "{low}");
        assert_eq!(draw(&[0.0, f32::NEG_INFINITY], 0.999_999), 0);
    }
}
