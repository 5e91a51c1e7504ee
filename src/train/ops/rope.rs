//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

use super::fused::{Fused, Number, View, apply, has_cpu_kernel};
use crate::kernels::vector::{Rope, RopePairs};
use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Rows that a thread rotates at a time.
const ROWS: usize = 32;

/// Cosines and sines for the rows of a batch, and the pairing of a head's dimensions.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// (rows, pairs) cosine and sine.
    pub angles: Arc<Vec<(f64, f64)>>,
    pub pairs: usize,
    /// Pairs dimension `i` with `i + pairs` (NeoX), instead of `2i` with `2i + 1` (GGUF's Llama).
    pub halves: bool,
}

impl Rotation {
    /// The rotation for rows at these positions.
    pub fn new(rope: &Rope, positions: &[usize]) -> Self {
        let (mut angles, mut row) = (Vec::new(), Vec::new());
        for &position in positions {
            rope.angles(position, &mut row);
            angles.extend(row.iter().map(|&(cos, sin)| (f64::from(cos), f64::from(sin))));
        }
        let pairs = rope.rotated() / 2;
        Self { angles: Arc::new(angles), pairs, halves: rope.pairs() == RopePairs::Halves }
    }

    /// The two dimensions of pair `i`.
    fn pair(&self, i: usize) -> (usize, usize) {
        if self.halves { (i, i + self.pairs) } else { (2 * i, 2 * i + 1) }
    }
}

/// Rotates the first `2 * pairs` dimensions of every head of `x` (rows, heads, head_dim).
///
/// # Errors
/// If the shapes do not fit.
pub fn rotate(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    if has_cpu_kernel(x) {
        return apply(Rotate(rotation.clone()), &[x]);
    }
    let (rows, _, dims) = x.dims3()?;
    let of = |f: fn(&(f64, f64)) -> f64| {
        let values: Vec<f32> = rotation.angles.iter().map(|angle| f(angle) as f32).collect();
        Tensor::from_vec(values, (rows, 1, rotation.pairs), x.device())?.to_dtype(x.dtype())
    };
    let (cos, sin) = (of(|angle| angle.0)?, of(|angle| angle.1)?);
    let column = |odd: bool| {
        let at = (0..rotation.pairs).map(|i| rotation.pair(i));
        let at: Vec<_> = at.map(|(a, b)| if odd { b as u32 } else { a as u32 }).collect();
        x.index_select(&Tensor::new(at, x.device())?, 2)
    };
    let (a, b) = (column(false)?, column(true)?);
    let ra = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let rb = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    let rest = x.narrow(2, 2 * rotation.pairs, dims - 2 * rotation.pairs)?;
    let rotated = match rotation.halves {
        true => Tensor::cat(&[ra, rb], 2)?,
        false => Tensor::stack(&[ra, rb], 3)?.flatten(2, 3)?,
    };
    if rest.elem_count() == 0 { Ok(rotated) } else { Tensor::cat(&[rotated, rest], 2) }
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
