//! Products with weight matrices: frozen ones in the file's type, frozen ones with LoRA, and
//! trained ones.

use super::fused::{Fused, View, apply};
use crate::kernels::gemm::{Mat, sum_of_products};
use crate::train::ops::{Frozen, Number};
use candle_core::{Result, Shape, Tensor, bail};
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

pub(in crate::train::ops) fn frozen_linear(x: &Tensor, weights: &Arc<Frozen>) -> Result<Tensor> {
    apply(FrozenLinear(weights.clone()), &[x])
}

pub(in crate::train::ops) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    apply(Linear, &[x, weight])
}

pub(in crate::train::ops) fn lora_linear(
    x: &Tensor,
    weights: &Arc<Frozen>,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    apply(LoraLinear { weights: weights.clone(), scale, low: Mutex::new(None) }, &[x, a, b])
}

struct FrozenLinear(Arc<Frozen>);

impl Fused for FrozenLinear {
    const NAME: &'static str = "frozen_linear";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let (rows, cols) = args[0].rows();
        if cols != self.0.inputs() {
            bail!("{cols} columns, and weights for {}", self.0.inputs());
        }
        let out = sum_of_products(&[(Mat::new(args[0].data, rows, cols), &self.0.turned())]);
        Ok((out, Shape::from((rows, self.0.outputs()))))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let (rows, cols) = grad.rows();
        let frozen: &Frozen = &self.0;
        let dx = sum_of_products(&[(Mat::new(grad.data, rows, cols), &frozen)]);
        Ok(vec![Some(dx)])
    }
}

struct Linear;

impl Fused for Linear {
    const NAME: &'static str = "linear";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let ((rows, cols), (outputs, inputs)) = (args[0].rows(), args[1].rows());
        if cols != inputs {
            bail!("{cols} columns, and weights for {inputs}");
        }
        let w = Mat::new(args[1].data, outputs, inputs);
        let out = sum_of_products(&[(Mat::new(args[0].data, rows, cols), &w.t())]);
        Ok((out, Shape::from((rows, outputs))))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        wanted: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let ((rows, inputs), (outputs, _)) = (args[0].rows(), args[1].rows());
        let grad = Mat::new(grad.data, rows, outputs);
        let [x, w] =
            [Mat::new(args[0].data, rows, inputs), Mat::new(args[1].data, outputs, inputs)];
        let dx = wanted[0].then(|| sum_of_products(&[(grad, &w)]));
        let dw = wanted[1].then(|| sum_of_products(&[(grad.t(), &x)]));
        Ok(vec![dx, dw])
    }
}

struct LoraLinear {
    weights: Arc<Frozen>,
    scale: f64,
    /// (rows, rank) `scale x A`, stored for the backward pass: a `Vec<T>`.
    low: Mutex<Option<Box<dyn Any + Send>>>,
}

fn scaled<T: Number>(mut x: Vec<T>, by: f64) -> Vec<T> {
    let by = T::of(by);
    x.iter_mut().for_each(|x| *x *= by);
    x
}

impl Fused for LoraLinear {
    const NAME: &'static str = "lora_linear";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [x, a, b] = [args[0], args[1], args[2]];
        let ((rows, inputs), (outputs, rank)) = (x.rows(), b.rows());
        if a.dims != [rank, inputs] || outputs != self.weights.outputs() {
            let wanted = self.weights.outputs();
            bail!("factors {:?} and {:?} for {wanted} by {inputs}", a.dims, b.dims);
        }
        let (x, a) = (Mat::new(x.data, rows, inputs), Mat::new(a.data, rank, inputs));
        let low = scaled(sum_of_products(&[(x, &a.t())]), self.scale);
        let b = Mat::new(b.data, outputs, rank);
        let out =
            sum_of_products(&[(x, &self.weights.turned()), (Mat::new(&low, rows, rank), &b.t())]);
        let kept: Box<dyn Any + Send> = Box::new(low);
        *self.low.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        Ok((out, Shape::from((rows, outputs))))
    }

    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        wanted: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let ((rows, inputs), (outputs, rank)) = (args[0].rows(), args[2].rows());
        let kept = self.low.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(low) = kept.as_ref().and_then(|kept| kept.downcast_ref::<Vec<T>>()) else {
            bail!("the forward pass was of another type");
        };
        let x = Mat::new(args[0].data, rows, inputs);
        let a = Mat::new(args[1].data, rank, inputs);
        let b = Mat::new(args[2].data, outputs, rank);
        let g = Mat::new(grad.data, rows, outputs);
        // (rows, rank) the gradient of x A.
        let dlow = scaled(sum_of_products(&[(g, &b)]), self.scale);
        let dlow = Mat::new(&dlow, rows, rank);
        let frozen: &Frozen = &self.weights;
        let dx = wanted[0].then(|| sum_of_products(&[(g, &frozen), (dlow, &a)]));
        // Computed as (inputs, rank), because `rank` rows are too few to split over threads.
        let across = sum_of_products(&[(x.t(), &dlow)]);
        let at = |i: usize| across[i % inputs * rank + i / inputs];
        let da = (0..rank * inputs).map(at).collect();
        let db = sum_of_products(&[(g.t(), &Mat::new(low, rows, rank))]);
        Ok(vec![dx, Some(da), Some(db)])
    }
}
