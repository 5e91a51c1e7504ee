//! Embedding: rows of a table.

use super::fused::{Fused, View, apply};
use crate::train::ops::Number;
use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Columns of the table's gradient that one thread sums.
const COLS: usize = 64;

pub(in crate::train::ops) fn embedding(table: &Tensor, tokens: &Arc<Vec<u32>>) -> Result<Tensor> {
    apply(Embedding(tokens.clone()), &[table])
}

struct Embedding(Arc<Vec<u32>>);

impl Fused for Embedding {
    const NAME: &'static str = "embedding";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let (_, width) = args[0].rows();
        let mut out = Vec::with_capacity(self.0.len() * width);
        for &token in &*self.0 {
            out.extend_from_slice(&args[0].data[token as usize * width..][..width]);
        }
        Ok((out, Shape::from((self.0.len(), width))))
    }

    /// Tokens may repeat: each thread sums its own columns, in the order of the tokens.
    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let (_, width) = args[0].rows();
        let mut rows: Vec<u32> = self.0.to_vec();
        rows.sort_unstable();
        rows.dedup();
        let parts: Vec<Vec<T>> = (0..width.div_ceil(COLS))
            .into_par_iter()
            .map(|part| {
                let cols = part * COLS..((part + 1) * COLS).min(width);
                let mut sums = vec![T::ZERO; rows.len() * cols.len()];
                for (token, grad) in self.0.iter().zip(grad.data.chunks_exact(width)) {
                    let at = rows.binary_search(token).expect("every token has a row");
                    let sums = &mut sums[at * cols.len()..][..cols.len()];
                    sums.iter_mut().zip(&grad[cols.clone()]).for_each(|(sum, &g)| *sum += g);
                }
                sums
            })
            .collect();
        let mut out = vec![T::ZERO; args[0].data.len()];
        for (part, sums) in parts.iter().enumerate() {
            let cols = part * COLS..((part + 1) * COLS).min(width);
            for (&row, sums) in rows.iter().zip(sums.chunks_exact(cols.len())) {
                out[row as usize * width..][cols.clone()].copy_from_slice(sums);
            }
        }
        Ok(vec![Some(out)])
    }
}
