//! Sums, reshaping and scaling.

use super::fused::{Fused, View, apply};
use crate::train::ops::Number;
use crate::train::ops::tape::{self, Backward};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::sync::Arc;

const CHUNK: usize = 1 << 14;
/// Rows whose share of a bias's gradient one thread sums.
const ROWS: usize = 32;

pub(in crate::train::ops) fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let out = sum(x, y)?;
    tape::record_op(Box::new(Same), &[x, y], &out);
    Ok(out)
}

/// `x + y` without a backward pass.
pub(in crate::train::ops) fn sum(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    super::fused::plain(Add, &[x, y])
}

pub(in crate::train::ops) fn reshape(x: &Tensor, shape: Shape) -> Result<Tensor> {
    let out = x.detach().reshape(shape)?;
    tape::record_op(Box::new(Same), &[x], &out);
    Ok(out)
}

pub(in crate::train::ops) fn weighed(x: &Tensor, weights: &Arc<Vec<f64>>) -> Result<Tensor> {
    apply(Weighed(weights.clone()), &[x])
}

struct Weighed(Arc<Vec<f64>>);

impl Fused for Weighed {
    const NAME: &'static str = "weighed";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let sum: f64 = args[0].data.iter().zip(&*self.0).map(|(x, weight)| x.wide() * weight).sum();
        Ok((vec![T::of(sum)], Shape::from(())))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let by = grad.data[0].wide();
        Ok(vec![Some(self.0.iter().map(|weight| T::of(weight * by)).collect())])
    }
}

pub(in crate::train::ops) fn add_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    apply(Bias, &[x, bias])
}

pub(in crate::train::ops) fn scale(x: &Tensor, by: f64) -> Result<Tensor> {
    apply(Scale(by), &[x])
}

/// An operation whose gradients are passed on unchanged.
struct Same;

impl Backward for Same {
    fn back(
        &self,
        args: &[&Tensor],
        _: &Tensor,
        grad: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        args.iter().map(|arg| grad.reshape(arg.shape()).map(Some)).collect()
    }
}

struct Add;

impl Fused for Add {
    const NAME: &'static str = "add";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [x, y] = [args[0], args[1]];
        let sums = x.data.par_iter().zip(y.data).with_min_len(CHUNK).map(|(&x, &y)| x + y);
        Ok((sums.collect(), Shape::from(x.dims)))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        _: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        bail!("sums are passed by their gradients")
    }
}

struct Bias;

impl Fused for Bias {
    const NAME: &'static str = "add_bias";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [x, bias] = [args[0], args[1]];
        if x.rows().1 != bias.data.len() {
            bail!("{:?} and a bias of {}", x.dims, bias.data.len());
        }
        let mut out = x.data.to_vec();
        out.par_chunks_mut(bias.data.len()).with_min_len(ROWS).for_each(|row| {
            row.iter_mut().zip(bias.data).for_each(|(x, &bias)| *x += bias);
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
        let cols = args[1].data.len();
        let dbias = wanted[1].then(|| {
            let parts = grad.data.par_chunks(ROWS * cols).map(|rows| {
                let mut sum = vec![T::ZERO; cols];
                for row in rows.chunks_exact(cols) {
                    sum.iter_mut().zip(row).for_each(|(sum, &g)| *sum += g);
                }
                sum
            });
            super::norm::sum(parts.collect(), cols)
        });
        Ok(vec![wanted[0].then(|| grad.data.to_vec()), dbias])
    }
}

struct Scale(f64);

impl Fused for Scale {
    const NAME: &'static str = "scale";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let by = T::of(self.0);
        let scaled = args[0].data.par_iter().with_min_len(CHUNK).map(|&x| x * by);
        Ok((scaled.collect(), Shape::from(args[0].dims)))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let by = T::of(self.0);
        Ok(vec![Some(grad.data.par_iter().with_min_len(CHUNK).map(|&x| x * by).collect())])
    }
}
