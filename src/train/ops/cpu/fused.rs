//! Operations on slices as operations on candle's tensors.

use crate::train::ops::Number;
use crate::train::ops::tape::{self, Backward};
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// An argument or a result: its numbers in row-major order, and its dimensions.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    pub data: &'a [T],
    pub dims: &'a [usize],
}

impl<T> View<'_, T> {
    /// Rows and columns; all dimensions but the last count as rows.
    pub(super) fn rows(&self) -> (usize, usize) {
        let cols = self.dims.last().copied().unwrap_or(1);
        (self.data.len() / cols.max(1), cols)
    }
}

/// An operation on arguments of one type.
pub(super) trait Fused: 'static {
    const NAME: &'static str;

    /// The result and its shape.
    fn forward<T: Number>(&self, args: &[View<T>]) -> Result<(Vec<T>, Shape)>;

    /// The gradients of the arguments, as far as they are needed, from the gradient of the result.
    fn backward<T: Number>(
        &self,
        args: &[View<T>],
        result: View<T>,
        grad: View<T>,
        wanted: &[bool],
    ) -> Result<Vec<Option<Vec<T>>>>;
}

/// Applies an operation, and records it on the tape.
///
/// # Errors
/// If the tensors are not on the CPU, or of a type other than f32 and f64.
pub(super) fn apply<F: Fused>(op: F, args: &[&Tensor]) -> Result<Tensor> {
    let op = Node(op);
    let result = op.forward(args)?;
    tape::record_op(Box::new(op), args, &result);
    Ok(result)
}

/// Applies an operation without a backward pass.
///
/// # Errors
/// As [`apply`].
pub(super) fn plain<F: Fused>(op: F, args: &[&Tensor]) -> Result<Tensor> {
    Node(op).forward(args)
}

/// An operation on a tape.
struct Node<F>(F);

impl<F: Fused> Node<F> {
    fn forward(&self, args: &[&Tensor]) -> Result<Tensor> {
        match args[0].dtype() {
            DType::F32 => self.forward_of::<f32>(args),
            DType::F64 => self.forward_of::<f64>(args),
            other => bail!("{} is for f32 and f64, not {other:?}", F::NAME),
        }
    }

    fn forward_of<T: Number>(&self, args: &[&Tensor]) -> Result<Tensor> {
        let (values, shape) = views(F::NAME, args, |views| self.0.forward::<T>(views))?;
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    fn backward_of<T: Number>(
        &self,
        args: &[&Tensor],
        result: &Tensor,
        grad: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let tensors: Vec<&Tensor> = args.iter().copied().chain([result, grad]).collect();
        let grads = views(F::NAME, &tensors, |views| match views {
            [args @ .., result, grad] => self.0.backward::<T>(args, *result, *grad, wanted),
            _ => bail!("{} has no arguments", F::NAME),
        })?;
        let tensors = grads.into_iter().zip(args).map(|(grad, arg)| match grad {
            Some(grad) => Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some),
            None => Ok(None),
        });
        tensors.collect()
    }
}

impl<F: Fused> Backward for Node<F> {
    fn back(
        &self,
        args: &[&Tensor],
        result: &Tensor,
        grad: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        match grad.dtype() {
            DType::F64 => self.backward_of::<f64>(args, result, grad, wanted),
            _ => self.backward_of::<f32>(args, result, grad, wanted),
        }
    }
}

/// Calls `f` with the tensors' numbers.
fn views<T: Number, R>(
    name: &str,
    tensors: &[&Tensor],
    f: impl FnOnce(&[View<T>]) -> Result<R>,
) -> Result<R> {
    let tensors: Vec<_> = tensors.iter().map(|x| x.contiguous()).collect::<Result<_>>()?;
    let held: Vec<_> = tensors.iter().map(|x| x.storage_and_layout()).collect();
    let views = held.iter().map(|(storage, layout)| match &**storage {
        Storage::Cpu(storage) => view(storage, layout),
        _ => bail!("{name} is for the CPU"),
    });
    f(&views.collect::<Result<Vec<_>>>()?)
}

fn view<'a, T: Number>(storage: &'a CpuStorage, layout: &'a Layout) -> Result<View<'a, T>> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("the tensor is not contiguous")
    };
    Ok(View { data: &storage.as_slice::<T>()?[from..to], dims: layout.dims() })
}
