//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

use super::fused::{Fused, View, apply};
use crate::train::ops::{Number, Rotation};
use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

/// Rows that a thread rotates at a time.
const ROWS: usize = 32;

pub(in crate::train::ops) fn rotate(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    apply(Rotate(rotation.clone()), &[x])
}

struct Rotate(Rotation);

impl Rotate {
    /// Rotates by the angles, or by their negatives if `back` is set.
    fn run<T: Number>(&self, x: &[T], dims: &[usize], back: bool) -> Vec<T> {
        let (head, row) = (dims[2], dims[1] * dims[2]);
        let mut out = x.to_vec();
        let angles = self.0.angles.par_chunks(ROWS * self.0.pairs);
        out.par_chunks_mut(ROWS * row).zip(angles).for_each(|(out, angles)| {
            for (out, angles) in out.chunks_exact_mut(row).zip(angles.chunks_exact(self.0.pairs)) {
                for head in out.chunks_exact_mut(head) {
                    for (i, &(cos, sin)) in angles.iter().enumerate() {
                        let (at, other) = self.0.pair(i);
                        let (cos, sin) = (T::of(cos), T::of(if back { -sin } else { sin }));
                        let (a, b) = (head[at], head[other]);
                        head[at] = a * cos - b * sin;
                        head[other] = a * sin + b * cos;
                    }
                }
            }
        });
        out
    }
}

impl Fused for Rotate {
    const NAME: &'static str = "rotate";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        Ok((self.run(args[0].data, args[0].dims, false), Shape::from(args[0].dims)))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        Ok(vec![Some(self.run(grad.data, args[0].dims, true))])
    }
}
