//! Perplexity and KL divergence with the conventions of llama-perplexity: the text is cut into chunks,
//! each is read from an empty cache with BOS in place of its first token if the model uses BOS, and
//! the predictions of the second half count.

use super::base_logits::{Header, Reader, Row, Writer, compress};
use super::scorer::Scorer;
use super::stats::{bootstrap, quantile};
use crate::ipc::Token;
use crate::job::{DivergenceReport, EvalError, Interval, Rate};
use rayon::prelude::*;
use std::path::Path;
use std::time::Instant;

/// Number of points of the curve of KL quantiles.
const POINTS: usize = 200;

/// Measures of the predictions that count.
pub(super) struct Predictions {
    /// (chunks, rows)
    chunks: Vec<Vec<Prediction>>,
    seconds: f64,
    /// Tokens that were read.
    read: usize,
    /// (chunks) bytes of the tokens that were predicted.
    bytes: Vec<f64>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Prediction {
    /// Negative log-likelihood of the token that follows, in nats.
    nll: f64,
    against: Option<Difference>,
}

/// Compared with the reference.
#[derive(Debug, Clone, Copy)]
struct Difference {
    /// KL(reference || model) in nats.
    kl: f64,
    same_best: bool,
    reference_nll: f64,
    /// p(token) less the reference's.
    delta_p: f64,
}

/// Cuts a text into chunks.
///
/// # Errors
/// If it has fewer than two chunks.
pub(super) fn cut(
    scorer: &Scorer,
    text: &str,
    context: usize,
    chunks: Option<usize>,
) -> Result<Header, EvalError> {
    let mut tokens = scorer.tokenizer().encode_prompt(text, true, false);
    let (context, there) = (context.min(scorer.context), tokens.len());
    if context < 4 {
        return Err(EvalError::Refused(format!(
            "the model reads {} tokens at once: too few to measure anything",
            scorer.context
        )));
    }
    if there < 2 * context {
        return Err(EvalError::Refused(format!(
            "the text has {there} tokens, and two chunks of {context} are needed: take a longer \
             text, or a smaller context"
        )));
    }
    let chunks = chunks.unwrap_or(usize::MAX).min(there / context);
    tokens.truncate(chunks * context);
    Ok(Header { context, vocabulary: scorer.vocabulary(), tokens })
}

/// Reads the chunks with a model. With `base` the predictions are compared; with `save` they are
/// written to a file.
///
/// # Errors
/// If the model fails, or the files cannot be read or written.
pub(super) fn measure(
    scorer: &mut Scorer,
    header: &Header,
    mut base: Option<&mut Reader>,
    save: Option<&Path>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Predictions, EvalError> {
    let tokenizer = scorer.tokenizer();
    let vocab = tokenizer.vocab();
    let first_token = tokenizer.encode_prompt("a", true, false).first().copied();
    let bos = first_token.filter(|_| first_token == vocab.bos);
    let mut writer = save.map(|path| Writer::create(path, header)).transpose()?;
    let (first, rows, length) = (header.first(), header.rows(), header.row_length());
    let mut found = Predictions { chunks: Vec::new(), seconds: 0.0, read: 0, bytes: Vec::new() };
    for (number, tokens) in header.tokens.chunks_exact(header.context).enumerate() {
        progress(number, header.chunks());
        let mut inputs = tokens.to_vec();
        if let Some(bos) = bos {
            inputs[0] = bos;
        }
        let reference = base.as_mut().map(|base| base.chunk()).transpose()?;
        let mut predictions = Vec::with_capacity(rows);
        let started = Instant::now();
        let mut computing = 0.0;
        scorer.read(&inputs, first..first + rows, &mut |at, logits| {
            let since = Instant::now();
            let targets = &tokens[at + 1..];
            let part = logits.par_chunks_exact(header.vocabulary).zip(targets);
            let rows = at - first..;
            let part = part.enumerate().map(|(row, (logits, &target))| match &reference {
                Some(codes) => {
                    let at = (rows.start + row) * length;
                    let base = Row::of(&codes[at..at + length], header.vocabulary);
                    compare(logits, target, base)
                }
                None => Prediction { nll: nll(logits, target), against: None },
            });
            predictions.extend(part.collect::<Vec<_>>());
            if let Some(writer) = &mut writer {
                let mut codes = vec![0; logits.len() / header.vocabulary * length];
                let rows = codes.par_chunks_exact_mut(length);
                let logits = logits.par_chunks_exact(header.vocabulary);
                rows.zip(logits).zip(targets).for_each(|((row, logits), &target)| {
                    compress(logits, target, row);
                });
                writer.rows(&codes)?;
            }
            computing += since.elapsed().as_secs_f64();
            Ok(())
        })?;
        found.seconds += started.elapsed().as_secs_f64() - computing;
        found.read += first + rows;
        let predicted = &tokens[first + 1..];
        found.bytes.push(predicted.iter().map(|&token| vocab.piece(token).len() as f64).sum());
        found.chunks.push(predictions);
    }
    progress(header.chunks(), header.chunks());
    writer.map_or(Ok(()), Writer::finish)?;
    Ok(found)
}

/// The logarithm of the sum of the exponentials.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from((x - most).exp())).sum();
    f64::from(most) + sum.ln()
}

pub(super) fn nll(logits: &[f32], target: Token) -> f64 {
    log_sum_exp(logits) - f64::from(logits[target as usize])
}

/// The index of the first of the largest values.
fn best(values: impl Iterator<Item = f32>) -> usize {
    let largest = values.enumerate().fold((0, f32::NEG_INFINITY), |most, (at, value)| {
        if value > most.1 { (at, value) } else { most }
    });
    largest.0
}

/// Tokens of which the reference's log-probability is at most −16 do not count, as by
/// llama-perplexity: below that the file holds no values.
fn compare(logits: &[f32], target: Token, base: Row) -> Prediction {
    let total = log_sum_exp(logits);
    let mut kl = 0.0;
    for (token, x) in logits.iter().enumerate() {
        let log_p = base.log_p(token);
        if log_p > -16.0 {
            kl += f64::from(log_p.exp()) * (f64::from(log_p) - f64::from(*x) + total);
        }
    }
    let nll = total - f64::from(logits[target as usize]);
    let reference_nll = -f64::from(base.log_p(target as usize));
    let same_best = best(logits.iter().copied()) == best((0..base.len()).map(|at| base.log_p(at)));
    let delta_p = (-nll).exp() - (-reference_nll).exp();
    Prediction { nll, against: Some(Difference { kl, same_best, reference_nll, delta_p }) }
}

impl Predictions {
    pub(super) fn tokens_per_second(&self) -> f64 {
        self.read as f64 / self.seconds.max(1e-9)
    }

    /// (chunks) the sum of a measure, and the number of predictions.
    fn sums(&self, of: impl Fn(&Prediction) -> f64) -> Vec<(f64, f64)> {
        let sum = |chunk: &Vec<Prediction>| (chunk.iter().map(&of).sum(), chunk.len() as f64);
        self.chunks.iter().map(sum).collect()
    }

    pub(super) fn perplexity(&self) -> Interval {
        bootstrap(&self.sums(|prediction| prediction.nll), f64::exp)
    }

    pub(super) fn bits_per_byte(&self) -> Interval {
        let sums = self.sums(|prediction| prediction.nll / std::f64::consts::LN_2);
        let per_byte: Vec<_> =
            sums.into_iter().zip(&self.bytes).map(|((bits, _), bytes)| (bits, *bytes)).collect();
        bootstrap(&per_byte, |bits| bits)
    }

    /// Compared with the reference; `None` if there was none.
    pub(super) fn divergence(&self) -> Option<DivergenceReport> {
        let all = || self.chunks.iter().flatten().filter_map(|found| found.against);
        let mut kl: Vec<f64> = all().map(|found| found.kl).collect();
        if kl.is_empty() {
            return None;
        }
        kl.sort_by(f64::total_cmp);
        let count = kl.len();
        let of = |measure: &dyn Fn(&Difference) -> f64| {
            self.sums(|found| found.against.as_ref().map_or(0.0, measure))
        };
        let ratio = self.sums(|found| found.nll - found.against.map_or(0.0, |x| x.reference_nll));
        let squares: f64 = all().map(|found| found.delta_p.powi(2)).sum();
        let reference: f64 = all().map(|found| found.reference_nll).sum();
        let agreed = all().filter(|found| found.same_best).count();
        let share = |point: usize| point as f64 / POINTS as f64;
        Some(DivergenceReport {
            mean_kl: bootstrap(&of(&|found| found.kl), |kl| kl),
            median_kl: quantile(&kl, 0.5),
            p99_kl: quantile(&kl, 0.99),
            p999_kl: quantile(&kl, 0.999),
            max_kl: kl[count - 1],
            top1_agreement: Rate::of(agreed as f64, count)?,
            rms_delta_p: (squares / count as f64).sqrt(),
            log_perplexity_ratio: bootstrap(&ratio, |ratio| ratio),
            reference_perplexity: (reference / count as f64).exp(),
            kl_quantiles: (0..=POINTS).map(|at| (share(at), quantile(&kl, share(at)))).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_is_that_of_the_definitions() {
        let p = [0.5f64, 0.25, 0.25];
        let base: Vec<f32> = p.iter().map(|p| p.ln() as f32 + 2.0).collect();
        let mut row = vec![0; 8];
        let reference = compress(&base, 2, &mut row);
        let q = [0.25f64, 0.5, 0.25];
        let logits: Vec<f32> = q.iter().map(|q| q.ln() as f32 - 1.0).collect();
        let found = compare(&logits, 2, Row::of(&row, 3));
        let against = found.against.unwrap();
        let kl = 0.5 * 2f64.ln() + 0.25 * 0.5f64.ln();
        assert!((against.kl - kl).abs() < 1e-4, "{}", against.kl);
        assert!((found.nll - 4f64.ln()).abs() < 1e-6 && !against.same_best);
        assert!((against.reference_nll - reference).abs() < 1e-4 && against.delta_p.abs() < 1e-4);
        let same = compare(&base, 0, Row::of(&row, 3)).against.unwrap();
        assert!(same.kl.abs() < 1e-4 && same.same_best, "{same:?}");
    }
}
