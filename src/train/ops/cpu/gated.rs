//! SwiGLU and GeGLU (Shazeer 2020, arXiv:2002.05202).

use super::fused::{Fused, View, apply};
use crate::gguf::Gating;
use crate::train::ops::Number;
use crate::train::ops::arguments::{GELU_CUBIC, GELU_ROOT};
use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;

pub(in crate::train::ops) fn gated(gate: &Tensor, up: &Tensor, act: Gating) -> Result<Tensor> {
    apply(Gated(act), &[gate, up])
}

struct Gated(Gating);

/// The activation and its derivative at `x`. Both activations are `x s(u)` with the logistic
/// function s, where u is x (SiLU) or twice the argument of GELU's tanh.
#[inline(always)]
fn at<T: Number>(act: Gating, x: T) -> (T, T) {
    let (u, slope) = match act {
        Gating::Silu => (x, T::ONE),
        Gating::Gelu => {
            let (twice, cubic) = (T::of(2.0 * GELU_ROOT), T::of(GELU_CUBIC));
            (
                twice * x * (cubic * x).mul_add(x, T::ONE),
                twice * (T::of(3.0) * cubic * x).mul_add(x, T::ONE),
            )
        }
    };
    let s = T::ONE / (T::ONE + (-u).exp());
    (x * s, s + x * slope * s * (T::ONE - s))
}

impl Fused for Gated {
    const NAME: &'static str = "gated";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [gate, up] = [args[0], args[1]];
        let mut out = vec![T::ZERO; gate.data.len()];
        let halves = gate.data.par_chunks(CHUNK).zip(up.data.par_chunks(CHUNK));
        out.par_chunks_mut(CHUNK).zip(halves).for_each(|(out, (gate, up))| {
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = at(self.0, gate).0 * up;
            }
        });
        Ok((out, Shape::from(gate.dims)))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let [gate, up] = [args[0], args[1]];
        let mut dgate = vec![T::ZERO; gate.data.len()];
        let mut dup = dgate.clone();
        let halves = gate.data.par_chunks(CHUNK).zip(up.data.par_chunks(CHUNK));
        let out = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
        out.zip(halves).zip(grad.data.par_chunks(CHUNK)).for_each(
            |(((dgate, dup), (gate, up)), grad)| {
                let inputs = gate.iter().zip(up).zip(grad);
                for ((dgate, dup), ((&gate, &up), &grad)) in dgate.iter_mut().zip(dup).zip(inputs) {
                    let (value, slope) = at(self.0, gate);
                    *dgate = grad * up * slope;
                    *dup = grad * value;
                }
            },
        );
        Ok(vec![Some(dgate), Some(dup)])
    }
}
