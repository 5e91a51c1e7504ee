//! Weights that are not trained, in the file's type.

use super::Number;
use crate::gguf::{Gguf, TensorType, dequantize};
use crate::kernels::gemm::{Right, STRIP, pack_columns, pack_row};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

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
    /// The matrix on a device other than the CPU.
    uploaded: OnceLock<Tensor>,
}

impl Frozen {
    /// Some rows of a tensor of the file.
    ///
    /// # Errors
    /// If there is no such tensor, it is not a matrix with these rows, or its type cannot be
    /// dequantized.
    pub fn new(file: Arc<Gguf>, name: &str, rows: Range<usize>) -> Result<Self> {
        let Some(tensor) = file.tensor(name) else { bail!("the file has no tensor `{name}`") };
        let &[cols, total] = tensor.dims() else { bail!("`{name}` is not a matrix") };
        let (ty, cols, name) = (tensor.ty(), cols as usize, name.to_owned());
        if rows.start > rows.end || rows.end as u64 > total {
            bail!("`{name}` has {total} rows, not {rows:?}");
        }
        if !crate::gguf::can_dequantize(ty) {
            bail!("`{name}` is of type {ty}, which cannot be decoded");
        }
        Ok(Self { file, name, ty, rows, cols, uploaded: OnceLock::new() })
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

    /// (outputs, inputs) the matrix on the device of `x`, in its type. It is uploaded once, as f32.
    pub(super) fn on_device_of(&self, x: &Tensor) -> Result<Tensor> {
        let uploaded = match self.uploaded.get() {
            Some(uploaded) => uploaded,
            None => {
                let mut values = Vec::<f32>::new();
                self.decode(0..self.outputs(), &mut values)?;
                let shape = (self.outputs(), self.cols);
                let uploaded = Tensor::from_vec(values, shape, x.device())?;
                self.uploaded.get_or_init(|| uploaded)
            }
        };
        uploaded.to_dtype(x.dtype())
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
