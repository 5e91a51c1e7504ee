//! Products with weight matrices: frozen ones in the file's type, frozen ones with LoRA, and
//! trained ones.

use super::fused::{Fused, Number, View, apply, has_cpu_kernel};
use crate::gguf::{Gguf, TensorType, dequantize};
use crate::kernels::gemm::{Mat, Right, STRIP, pack_columns, pack_row, sum_of_products};
use candle_core::{Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows that a thread decodes at a time.
const ROWS: usize = 8;

/// A matrix that is not trained: (outputs, inputs), of any type that can be dequantized, in its
/// memory-mapped file. These are the same weights that are served.
pub struct Frozen {
    file: Arc<Gguf>,
    name: String,
    ty: TensorType,
    /// Range of the tensor's rows.
    rows: Range<usize>,
    cols: usize,
}

impl Frozen {
    /// Some rows of a tensor of the file.
    ///
    /// # Errors
    /// If there is no such tensor, it is not a matrix with these rows, or its type cannot be
    /// dequantized.
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

    /// The bytes of the columns `col` of some rows, row by row.
    fn bytes(&self, rows: Range<usize>, col: Range<usize>) -> Result<impl Iterator<Item = &[u8]>> {
        let data = self.file.data(&self.name).map_err(candle_core::Error::wrap)?;
        let bytes = |cols: usize| self.ty.bytes_for(cols as u64).unwrap_or(0) as usize;
        let (row, skip, some) = (bytes(self.cols), bytes(col.start), bytes(col.len()));
        let from = self.rows.start + rows.start;
        Ok((from..from + rows.len()).map(move |at| &data[at * row + skip..][..some]))
    }

    /// (rows, inputs) dequantizes some rows.
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

    /// (inputs, outputs) the transpose.
    pub fn turned(&self) -> Turned<'_> {
        Turned(self)
    }

    /// The whole matrix as a tensor.
    fn tensor(&self, like: &Tensor) -> Result<Tensor> {
        let mut values = Vec::<f32>::new();
        self.decode(0..self.outputs(), &mut values)?;
        let shape = (self.outputs(), self.cols);
        Tensor::from_vec(values, shape, like.device())?.to_dtype(like.dtype())
    }
}

/// Dequantizes some columns of some rows, and passes each row with its number to the callback.
fn decode_rows<T: Number>(
    weights: &Frozen,
    rows: Range<usize>,
    cols: Range<usize>,
    mut take: impl FnMut(usize, &[T]),
) {
    // Quantization blocks can only be dequantized as a whole.
    let block = weights.ty.block_size() as usize;
    let whole = cols.start / block * block..cols.end.div_ceil(block) * block;
    let inside = cols.start - whole.start..cols.end - whole.start;
    let (mut wide, mut row) = (vec![0f32; whole.len()], Vec::with_capacity(cols.len()));
    let bytes = weights.bytes(rows, whole).expect("the tensor was there when this was made");
    for (at, bytes) in bytes.enumerate() {
        dequantize(weights.ty, bytes, &mut wide).expect("its type was checked");
        row.clear();
        row.extend(wide[inside.clone()].iter().map(|x| T::of_f32(*x)));
        take(at, &row);
    }
}

impl<T: Number> Right<T> for &Frozen {
    fn rows(&self) -> usize {
        self.outputs()
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn pack(&self, rows: Range<usize>, cols: Range<usize>, packed: &mut [T]) {
        let count = rows.len();
        decode_rows(self, rows, cols, |at, row| pack_row(row, at, count, packed));
    }
}

/// The transpose of a frozen matrix: (inputs, outputs).
pub struct Turned<'a>(&'a Frozen);

impl<T: Number> Right<T> for Turned<'_> {
    fn rows(&self) -> usize {
        self.0.cols
    }

    fn cols(&self) -> usize {
        self.0.outputs()
    }

    fn pack(&self, rows: Range<usize>, cols: Range<usize>, packed: &mut [T]) {
        let depth = rows.len();
        let mut some = vec![T::ZERO; STRIP * depth];
        for (strip, packed) in packed.chunks_exact_mut(STRIP * depth).enumerate() {
            let from = cols.start + strip * STRIP;
            let cols = from..(from + STRIP).min(cols.end);
            let count = cols.len() * depth;
            decode_rows(self.0, cols, rows.clone(), |at, row| {
                some[at * depth..][..depth].copy_from_slice(row);
            });
            pack_columns(&some[..count], depth, packed);
        }
    }
}

/// (rows, outputs) product of `x` (rows, inputs) and frozen weights.
///
/// # Errors
/// If the shapes do not fit, or the file cannot be read.
pub fn frozen_linear(x: &Tensor, weights: &Arc<Frozen>) -> Result<Tensor> {
    if has_cpu_kernel(x) {
        return apply(FrozenLinear(weights.clone()), &[x]);
    }
    x.matmul(&weights.tensor(x)?.t()?)
}

/// (rows, outputs) product of `x` (rows, inputs) and the trained `weight` (outputs, inputs).
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if has_cpu_kernel(x) { apply(Linear, &[x, weight]) } else { x.matmul(&weight.t()?) }
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
    if has_cpu_kernel(x) {
        let low = Mutex::new(None);
        return apply(LoraLinear { weights: weights.clone(), scale, low }, &[x, a, b]);
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
