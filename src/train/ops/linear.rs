//! Products with weights: frozen as the file has them, with LoRA beside, or trained.

use super::fused::{Fused, Number, View, apply, covers};
use crate::gguf::{Gguf, TensorType, dequantize};
use crate::kernels::gemm::{Mat, product};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Numbers of a matrix that are decoded at a time: 4 MB of f32.
const PANEL: usize = 1 << 20;
/// Rows of a panel that a thread decodes at a time.
const ROWS: usize = 8;

/// A matrix that is not trained, where its file is mapped: (outputs, inputs) in any type that can be
/// decoded. Its numbers are those that are served.
pub struct Frozen {
    file: Arc<Gguf>,
    name: String,
    ty: TensorType,
    /// Which of the tensor's rows.
    rows: Range<usize>,
    cols: usize,
}

impl Frozen {
    /// Some rows of a tensor of the file.
    ///
    /// # Errors
    /// If there is no such tensor, it is no matrix with these rows, or its type cannot be decoded.
    pub fn new(file: Arc<Gguf>, name: &str, rows: Range<usize>) -> Result<Self> {
        let Some(tensor) = file.tensor(name) else { bail!("the file has no tensor `{name}`") };
        let &[cols, total] = tensor.dims() else { bail!("`{name}` is no matrix") };
        let (ty, cols, name) = (tensor.ty(), cols as usize, name.to_owned());
        if rows.start > rows.end || rows.end as u64 > total {
            bail!("`{name}` has {total} rows, not {rows:?}");
        }
        if !crate::gguf::can_dequantize(ty) {
            bail!("`{name}` is of type {ty}, which cannot be decoded");
        }
        Ok(Self { file, name, ty, rows, cols })
    }

    pub fn outputs(&self) -> usize {
        self.rows.len()
    }

    pub fn inputs(&self) -> usize {
        self.cols
    }

    /// Panels of rows, from the first to the last.
    pub fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (all, each) = (self.outputs(), (PANEL / self.cols).max(ROWS));
        (0..all).step_by(each).map(move |from| from..(from + each).min(all))
    }

    /// (rows, inputs) the numbers of some rows.
    pub fn decode<T: Number>(&self, rows: Range<usize>, out: &mut Vec<T>) -> Result<()> {
        let data = self.file.data(&self.name).map_err(candle_core::Error::wrap)?;
        let row = self.ty.bytes_for(self.cols as u64).unwrap_or(0) as usize;
        let from = (self.rows.start + rows.start) * row;
        let bytes = &data[from..from + rows.len() * row];
        out.resize(rows.len() * self.cols, T::ZERO);
        let chunks = out.par_chunks_mut(ROWS * self.cols).zip(bytes.par_chunks(ROWS * row));
        chunks.try_for_each_init(Vec::new, |wide: &mut Vec<f32>, (out, bytes)| {
            wide.resize(out.len(), 0.0);
            dequantize(self.ty, bytes, wide).map_err(candle_core::Error::wrap)?;
            out.iter_mut().zip(&*wide).for_each(|(out, &x)| *out = T::of_f32(x));
            Ok(())
        })
    }

    /// (rows, outputs) `x` (rows, inputs) times the matrix.
    fn forward<T: Number>(&self, x: &[T]) -> Result<Vec<T>> {
        let (rows, outputs) = (x.len() / self.cols, self.outputs());
        let mut out = vec![T::ZERO; rows * outputs];
        let mut weights = Vec::new();
        for panel in self.panels() {
            self.decode(panel.clone(), &mut weights)?;
            let w = Mat::new(&weights, panel.len(), self.cols);
            product(Mat::new(x, rows, self.cols), w.t(), &mut out, outputs, panel.start, false);
        }
        Ok(out)
    }

    /// (rows, inputs) the gradient of `x`, from that of the result.
    fn backward<T: Number>(&self, grad: &[T]) -> Result<Vec<T>> {
        let (rows, outputs) = (grad.len() / self.outputs(), self.outputs());
        let mut dx = vec![T::ZERO; rows * self.cols];
        let mut weights = Vec::new();
        let grad = Mat::new(grad, rows, outputs);
        for panel in self.panels() {
            self.decode(panel.clone(), &mut weights)?;
            let w = Mat::new(&weights, panel.len(), self.cols);
            product(grad.cols(panel), w, &mut dx, self.cols, 0, true);
        }
        Ok(dx)
    }

    /// The whole matrix as a tensor.
    fn tensor(&self, like: &Tensor) -> Result<Tensor> {
        let mut values = Vec::<f32>::new();
        self.decode(0..self.outputs(), &mut values)?;
        let shape = (self.outputs(), self.cols);
        Tensor::from_vec(values, shape, like.device())?.to_dtype(like.dtype())
    }
}

/// (rows, outputs) `x` (rows, inputs) times weights that are not trained.
///
/// # Errors
/// If the shapes do not fit, or the file cannot be read.
pub fn frozen_linear(x: &Tensor, weights: &Arc<Frozen>) -> Result<Tensor> {
    if covers(x) {
        return apply(FrozenLinear(weights.clone()), &[x]);
    }
    x.matmul(&weights.tensor(x)?.t()?)
}

/// (rows, outputs) `x` (rows, inputs) times `weight` (outputs, inputs), which is trained.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if covers(x) { apply(Linear, &[x, weight]) } else { x.matmul(&weight.t()?) }
}

/// `x W + scale (x A) B`: (rows, outputs) of `x` (rows, inputs), `a` (rank, inputs), `b` (outputs,
/// rank) (Hu et al. 2021, arXiv:2106.09685).
///
/// # Errors
/// As of [`frozen_linear`].
pub fn lora_linear(
    x: &Tensor,
    weights: &Arc<Frozen>,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    if covers(x) {
        return apply(LoraLinear { weights: weights.clone(), scale }, &[x, a, b]);
    }
    let low = (x.matmul(&a.t()?)? * scale)?;
    frozen_linear(x, weights)? + low.matmul(&b.t()?)?
}

struct FrozenLinear(Arc<Frozen>);

impl Fused for FrozenLinear {
    const NAME: &'static str = "frozen_linear";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let (rows, cols) = args[0].rows();
        if cols != self.0.inputs() {
            bail!("{cols} columns, and weights for {}", self.0.inputs());
        }
        Ok((self.0.forward(args[0].data)?, Shape::from((rows, self.0.outputs()))))
    }

    fn backward<T: Number>(
        &self,
        _: &[View<T>],
        _: View<T>,
        grad: View<T>,
        _: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>> {
        Ok(vec![Some(self.0.backward(grad.data)?)])
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
        let mut out = vec![T::ZERO; rows * outputs];
        let w = Mat::new(args[1].data, outputs, inputs);
        product(Mat::new(args[0].data, rows, cols), w.t(), &mut out, outputs, 0, false);
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
        let dx = wanted[0].then(|| {
            let mut dx = vec![T::ZERO; rows * inputs];
            product(grad, Mat::new(args[1].data, outputs, inputs), &mut dx, inputs, 0, false);
            dx
        });
        let dw = wanted[1].then(|| {
            let mut dw = vec![T::ZERO; outputs * inputs];
            product(grad.t(), Mat::new(args[0].data, rows, inputs), &mut dw, inputs, 0, false);
            dw
        });
        Ok(vec![dx, dw])
    }
}

struct LoraLinear {
    weights: Arc<Frozen>,
    scale: f64,
}

impl LoraLinear {
    /// (rows, rank) `scale x A`
    fn low<T: Number>(&self, x: Mat<T>, a: Mat<T>, rows: usize, rank: usize) -> Vec<T> {
        let mut low = vec![T::ZERO; rows * rank];
        product(x, a.t(), &mut low, rank, 0, false);
        let scale = T::of(self.scale);
        low.iter_mut().for_each(|x| *x *= scale);
        low
    }
}

impl Fused for LoraLinear {
    const NAME: &'static str = "lora_linear";

    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)> {
        let [x, a, b] = [args[0], args[1], args[2]];
        let ((rows, inputs), (outputs, rank)) = (x.rows(), b.rows());
        if a.dims != [rank, inputs] || outputs != self.weights.outputs() {
            bail!(
                "factors {:?} and {:?} for {} by {inputs}",
                a.dims,
                b.dims,
                self.weights.outputs()
            );
        }
        let mut out = self.weights.forward(x.data)?;
        let low =
            self.low(Mat::new(x.data, rows, inputs), Mat::new(a.data, rank, inputs), rows, rank);
        let b = Mat::new(b.data, outputs, rank);
        product(Mat::new(&low, rows, rank), b.t(), &mut out, outputs, 0, true);
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
        let x = Mat::new(args[0].data, rows, inputs);
        let a = Mat::new(args[1].data, rank, inputs);
        let b = Mat::new(args[2].data, outputs, rank);
        let g = Mat::new(grad.data, rows, outputs);
        // (rows, rank) the gradient of x A.
        let mut dlow = vec![T::ZERO; rows * rank];
        product(g, b, &mut dlow, rank, 0, false);
        let scale = T::of(self.scale);
        dlow.iter_mut().for_each(|x| *x *= scale);
        let dlow = Mat::new(&dlow, rows, rank);
        let dx = match wanted[0] {
            true => {
                let mut dx = self.weights.backward(grad.data)?;
                product(dlow, a, &mut dx, inputs, 0, true);
                Some(dx)
            }
            false => None,
        };
        // As (inputs, rank): the rank is too few rows to share out.
        let mut across = vec![T::ZERO; inputs * rank];
        product(x.t(), dlow, &mut across, rank, 0, false);
        let at = |i: usize| across[i % inputs * rank + i / inputs];
        let da = (0..rank * inputs).map(at).collect();
        let low = self.low(x, a, rows, rank);
        let mut db = vec![T::ZERO; outputs * rank];
        product(g.t(), Mat::new(&low, rows, rank), &mut db, rank, 0, false);
        Ok(vec![dx, Some(da), Some(db)])
    }
}
