//! A student's divergence from a teacher, and the teacher's most probable tokens.
//!
//! The teacher's `top_k` tokens of a row are events of their own; all other tokens together are one
//! more. With the probabilities p of the teacher and q of the student of these events, a divergence
//! D(p, q) has the gradient `q_j (g_b − Σ q g)` with respect to logit j, where b is the event of
//! token j and g = ∂D/∂q.

use super::fused::{Fused, View, plain};
use super::lanes;
use super::logits::{Logits, RowLoss, linear_loss, shape};
use crate::job::spec::Divergence;
use crate::train::ops::{
    Distillation, DistillationLosses, DistillationSums, Head, LEAST_MASS, Number, Targets,
};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::ops::Add;

pub(in crate::train::ops) fn distillation(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
    distillation: &Distillation,
) -> Result<DistillationLosses> {
    let rule = Student { targets: targets.clone(), distillation: distillation.clone() };
    let (sum, Found { sums, .. }) = linear_loss(hidden, head, rule)?;
    Ok(DistillationLosses { sum, sums })
}

/// The rule of [`distillation`].
struct Student {
    targets: Targets,
    distillation: Distillation,
}

#[derive(Clone, Copy, Default)]
struct Found {
    loss: f64,
    sums: DistillationSums,
}

impl Add for Found {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let (one, more) = (self.sums, other.sums);
        Self {
            loss: self.loss + other.loss,
            sums: DistillationSums {
                divergence: one.divergence + more.divergence,
                cross_entropy: one.cross_entropy + more.cross_entropy,
                correct: one.correct + more.correct,
            },
        }
    }
}

impl RowLoss for Student {
    type Found = Found;

    const NAME: &'static str = "distillation";

    fn row<T: Number>(&self, row: usize, logits: &mut [T]) -> Found {
        let (target, weight) = (self.targets.tokens[row] as usize, self.targets.weights[row]);
        if weight == 0.0 {
            logits.fill(T::ZERO);
            return Found::default();
        }
        let weight = f64::from(weight);
        let Distillation { temperature, cross_entropy, .. } = self.distillation;
        let slopes = shape(logits, &self.targets);
        let most = lanes::most(logits);
        let right = logits[target];
        // The student's probabilities at the temperature, which stay apart if it is not 1.
        let mut warm: Vec<T> = match temperature {
            1.0 => Vec::new(),
            _ => logits.iter().map(|&x| T::of(x.wide() / temperature)).collect(),
        };
        let warm_total = lanes::exp_from(&mut warm, T::of(most.wide() / temperature));
        let total = lanes::exp_from(logits, most);
        let loss = (most - right).wide() + total.wide().ln();
        let (shares, shares_total) = match temperature {
            1.0 => (&*logits, total),
            _ => (&warm[..], warm_total),
        };
        let compared = self.compare(row, shares, shares_total);
        // d(T² D)/d logit = T q (g − Σ q g), as the logits are divided by T.
        let by_divergence = weight * (1.0 - cross_entropy) * temperature;
        let by_target = weight * cross_entropy;
        let share = T::of(by_target) / total;
        let rest = T::of(by_divergence * compared.rest) / shares_total;
        match temperature {
            1.0 => logits.iter_mut().for_each(|x| *x *= share + rest),
            _ => logits.iter_mut().zip(&warm).for_each(|(x, &warm)| *x = *x * share + warm * rest),
        }
        for (&token, further) in self.teacher_tokens(row).iter().zip(compared.further) {
            logits[token as usize] += T::of(by_divergence * further);
        }
        logits[target] += -T::of(by_target);
        if let Some(slopes) = slopes {
            logits.iter_mut().zip(slopes).for_each(|(x, slope)| *x *= slope);
        }
        let divergence = weight * compared.divergence;
        let sums = DistillationSums {
            divergence,
            cross_entropy: weight * loss,
            correct: if right >= most { weight } else { 0.0 },
        };
        let of_divergence = (1.0 - cross_entropy) * temperature * temperature * divergence;
        Found { loss: of_divergence + cross_entropy * sums.cross_entropy, sums }
    }

    fn loss(found: &Found) -> f64 {
        found.loss
    }
}

/// A divergence and its gradient.
struct Compared {
    divergence: f64,
    /// What q of each token is multiplied with.
    rest: f64,
    /// What the teacher's tokens get further.
    further: Vec<f64>,
}

impl Student {
    fn teacher_tokens(&self, row: usize) -> &[u32] {
        let teacher = &self.distillation.teacher;
        &teacher.tokens[row * teacher.top_k..][..teacher.top_k]
    }

    /// Compares the teacher's row with the student's probabilities `shares / total`.
    fn compare<T: Number>(&self, row: usize, shares: &[T], total: T) -> Compared {
        let teacher = &self.distillation.teacher;
        let p = &teacher.log_probs[row * teacher.top_k..][..teacher.top_k];
        let tokens = self.teacher_tokens(row);
        let mut divergence = 0.0;
        let mut slopes = Vec::with_capacity(p.len());
        let mut q_all = Vec::with_capacity(p.len());
        let (mut p_sum, mut q_sum, mut mean) = (0.0, 0.0, 0.0);
        for (&log_p, &token) in p.iter().zip(tokens) {
            let log_p = f64::from(log_p);
            let (p, q) = (log_p.exp(), (shares[token as usize] / total).wide());
            let (of, slope) = self.event(p, log_p, q);
            divergence += of;
            mean += slope;
            p_sum += p;
            q_sum += q;
            slopes.push(slope);
            q_all.push(q);
        }
        // Without other tokens all of the mean is the rest.
        let mut rest = 0.0;
        if teacher.top_k < shares.len() {
            let [p, q] = [p_sum, q_sum].map(|sum: f64| (1.0 - sum).max(LEAST_MASS));
            let (of, slope) = self.event(p, p.ln(), q);
            divergence += of;
            mean += slope;
            rest = slope / q;
        }
        let rest = rest - mean;
        let further = slopes.iter().zip(&q_all).map(|(slope, q)| slope - q * mean - q * rest);
        Compared { divergence, rest, further: further.collect() }
    }

    /// The part of an event in the divergence, and `q ∂D/∂q`, up to a multiple of q that is the same
    /// for all events.
    fn event(&self, p: f64, log_p: f64, q: f64) -> (f64, f64) {
        // A probability may round to 0.
        let log_q = q.max(f64::MIN_POSITIVE).ln();
        match self.distillation.divergence {
            Divergence::ForwardKl => (p * (log_p - log_q), -p),
            Divergence::ReverseKl => (q * (log_q - log_p), q * (log_q - log_p)),
            Divergence::Jsd => {
                let beta = self.distillation.beta;
                let log_m = (beta * p + (1.0 - beta) * q).max(f64::MIN_POSITIVE).ln();
                let of_student = (1.0 - beta) * q * (log_q - log_m);
                (beta * p * (log_p - log_m) + of_student, of_student)
            }
        }
    }
}

/// (rows, top_k, 2) tokens as numbers, and their log-probabilities.
pub(in crate::train::ops) fn top_log_probs(
    hidden: &Tensor,
    head: &Head,
    targets: &Targets,
    top_k: usize,
) -> Result<Tensor> {
    let op = Top { logits: Logits::new(head)?, targets: targets.clone(), top_k };
    match head {
        Head::Frozen(_) => plain(op, &[hidden]),
        Head::Trained(head) => plain(op, &[hidden, head]),
    }
}

struct Top {
    logits: Logits,
    targets: Targets,
    top_k: usize,
}

impl Fused for Top {
    const NAME: &'static str = "top_log_probs";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let rows = args[0].rows().0;
        let width = 2 * self.top_k;
        let mut found = vec![T::ZERO; rows * width];
        self.logits.blocks(args, |block, logits| {
            let of = &mut found[block.start * width..block.end * width];
            let rows = logits.par_chunks_mut(self.logits.vocab).zip(of.par_chunks_mut(width));
            rows.for_each(|(logits, found)| {
                shape(logits, &self.targets);
                let most = lanes::most(logits);
                let normal = lanes::exp_moment(logits, most).0.wide().ln();
                for (pair, token) in found.chunks_mut(2).zip(highest(logits, self.top_k)) {
                    pair[0] = T::of(token as f64);
                    pair[1] = T::of((logits[token] - most).wide() - normal);
                }
            });
            Ok(())
        })?;
        Ok((found, Shape::from((rows, self.top_k, 2))))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        _: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        bail!("{} has no way back", Self::NAME)
    }
}

/// The indices of the highest numbers, of equal ones the first; the highest first.
pub(in crate::train::ops) fn highest<T: Number>(values: &[T], count: usize) -> Vec<usize> {
    let falling = |a: &T, b: &T| b.wide().total_cmp(&a.wide());
    let mut sorted = values.to_vec();
    let (_, &mut bound, _) = sorted.select_nth_unstable_by(count - 1, falling);
    let mut found: Vec<usize> = Vec::with_capacity(count);
    found.extend((0..values.len()).filter(|&i| falling(&values[i], &bound).is_lt()));
    let equal = (0..values.len()).filter(|&i| falling(&values[i], &bound).is_eq());
    let missing = count - found.len();
    found.extend(equal.take(missing));
    found.sort_by(|&a, &b| falling(&values[a], &values[b]).then(a.cmp(&b)));
    found
}
