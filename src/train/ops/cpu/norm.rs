//! RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

use super::fused::{Fused, View, apply};
use super::lanes::dot;
use crate::train::ops::Number;
use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

/// Rows whose share of a weight's gradient one thread sums.
const ROWS: usize = 32;

pub(in crate::train::ops) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    apply(RmsNorm { epsilon }, &[x, weight])
}

struct RmsNorm {
    epsilon: f64,
}

impl RmsNorm {
    /// The factor of a row: 1 / rms.
    fn scale<T: Number>(&self, row: &[T]) -> T {
        T::ONE / (dot(row, row) / T::of(row.len() as f64) + T::of(self.epsilon)).sqrt()
    }
}

impl Fused for RmsNorm {
    const NAME: &'static str = "rms_norm";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [x, weight] = [args[0], args[1]];
        let cols = weight.data.len();
        let mut out = vec![T::ZERO; x.data.len()];
        out.par_chunks_mut(ROWS * cols).zip(x.data.par_chunks(ROWS * cols)).for_each(|(out, x)| {
            for (out, row) in out.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
                let scale = self.scale(row);
                for ((out, &x), &w) in out.iter_mut().zip(row).zip(weight.data) {
                    *out = x * scale * w;
                }
            }
        });
        Ok((out, Shape::from(x.dims)))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        wanted: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let [x, weight] = [args[0], args[1]];
        let cols = weight.data.len();
        let count = T::of(cols as f64);
        let mut dx = vec![T::ZERO; x.data.len()];
        let blocks = dx.par_chunks_mut(ROWS * cols).zip(x.data.par_chunks(ROWS * cols));
        let parts: Vec<Vec<T>> = blocks
            .zip(grad.data.par_chunks(ROWS * cols))
            .map(|((dx, x), grad)| {
                let mut dw = vec![T::ZERO; if wanted[1] { cols } else { 0 }];
                let rows = dx.chunks_exact_mut(cols).zip(x.chunks_exact(cols));
                for ((dx, x), grad) in rows.zip(grad.chunks_exact(cols)) {
                    let scale = self.scale(x);
                    for ((dw, &x), &grad) in dw.iter_mut().zip(x).zip(grad) {
                        *dw += grad * x * scale;
                    }
                    // dx = scale (g - x scale² mean(g x)), g = grad weight
                    let g = grad.iter().zip(weight.data).map(|(&grad, &w)| grad * w);
                    dx.iter_mut().zip(g).for_each(|(dx, g)| *dx = g);
                    let along = dot(dx, x) * scale * scale / count;
                    dx.iter_mut().zip(x).for_each(|(dx, &x)| *dx = (*dx - x * along) * scale);
                }
                dw
            })
            .collect();
        let dw = wanted[1].then(|| sum(parts, cols));
        Ok(vec![Some(dx), dw])
    }
}

/// The sum of partial sums, added in order.
pub(super) fn sum<T: Number>(parts: Vec<Vec<T>>, len: usize) -> Vec<T> {
    let mut all = vec![T::ZERO; len];
    for part in parts {
        all.iter_mut().zip(part).for_each(|(all, x)| *all += x);
    }
    all
}
