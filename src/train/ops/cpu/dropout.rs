//! Dropout (Srivastava et al. 2014, JMLR 15): some numbers are set to zero, the others are scaled
//! up.

use super::fused::{Fused, View, apply};
use crate::train::ops::{Draw, Number};
use candle_core::{Result, Shape, Tensor};

pub(in crate::train::ops) fn dropout(x: &Tensor, draw: Draw) -> Result<Tensor> {
    apply(Dropout(draw), &[x])
}

struct Dropout(Draw);

impl Fused for Dropout {
    const NAME: &'static str = "dropout";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        Ok((self.0.applied(args[0].data), Shape::from(args[0].dims)))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        Ok(vec![Some(self.0.applied(grad.data))])
    }
}
