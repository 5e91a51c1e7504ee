//! Wraps operations on slices as operations on candle tensors.

use super::tape;
use crate::kernels::real::Real;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Storage,
    Tensor, WithDType, bail,
};

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

/// The number types that operations support.
pub trait Number: Real + WithDType {}
impl Number for f32 {}
impl Number for f64 {}

/// An operation with up to three arguments, all contiguous and of one type.
pub(super) trait Fused: Send + Sync + 'static {
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

/// Applies an operation to tensors on the CPU.
///
/// # Errors
/// If the tensors are of a type other than f32 and f64.
pub(super) fn apply<F: Fused>(op: F, args: &[&Tensor]) -> Result<Tensor> {
    if tape::recording() {
        let op = Node(op);
        let result = op.plain(args)?;
        tape::record_op(Box::new(op), args, &result);
        return Ok(result);
    }
    let args: Vec<_> = args.iter().map(|arg| arg.contiguous()).collect::<Result<_>>()?;
    let op = Node(op);
    match &args[..] {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => bail!("{} takes one to three tensors, not {}", F::NAME, args.len()),
    }
}

/// Applies an operation without a backward pass.
///
/// # Errors
/// As [`apply`].
pub(super) fn plain<F: Fused>(op: F, args: &[&Tensor]) -> Result<Tensor> {
    Node(op).plain(args)
}

/// Whether the fused operation supports the tensor's device and type.
pub(super) fn has_cpu_kernel(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cpu) && matches!(x.dtype(), DType::F32 | DType::F64)
}

/// An operation as a node of candle's graph or of a tape.
pub(super) struct Node<F>(F);

impl<F: Fused> Node<F> {
    /// The result only.
    fn plain(&self, args: &[&Tensor]) -> Result<Tensor> {
        let args: Vec<_> = args.iter().map(|arg| arg.contiguous()).collect::<Result<_>>()?;
        let held: Vec<_> = args.iter().map(|arg| arg.storage_and_layout()).collect();
        let each = held.iter().map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => Ok((storage, *layout)),
            _ => bail!("{} is for the CPU", F::NAME),
        });
        let (storage, shape) = self.forward(&each.collect::<Result<Vec<_>>>()?)?;
        match storage {
            CpuStorage::F32(values) => Tensor::from_vec(values, shape, &Device::Cpu),
            CpuStorage::F64(values) => Tensor::from_vec(values, shape, &Device::Cpu),
            _ => bail!("{} is for f32 and f64", F::NAME),
        }
    }

    fn forward(&self, args: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        match args[0].0.dtype() {
            DType::F32 => self.forward_of::<f32>(args),
            DType::F64 => self.forward_of::<f64>(args),
            other => bail!("{} is for f32 and f64, not {other:?}", F::NAME),
        }
    }

    fn forward_of<T: Number>(
        &self,
        args: &[(&CpuStorage, &Layout)],
    ) -> Result<(CpuStorage, Shape)> {
        let views: Vec<_> =
            args.iter().map(|(storage, layout)| view(storage, layout)).collect::<Result<_>>()?;
        let (values, shape) = self.0.forward::<T>(&views)?;
        Ok((T::to_cpu_storage_owned(values), shape))
    }

    /// The gradients of the arguments, as far as they are needed, from the gradient of the result.
    ///
    /// # Errors
    /// The errors of the operation.
    pub(super) fn backward(
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

    fn candles(
        &self,
        args: &[&Tensor],
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let wanted: Vec<_> = args.iter().map(|arg| arg.track_op()).collect();
        self.backward(args, result, grad, &wanted)
    }

    fn backward_of<T: Number>(
        &self,
        args: &[&Tensor],
        result: &Tensor,
        grad: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = grad.contiguous()?;
        let args: Vec<Tensor> = args.iter().map(|arg| arg.contiguous()).collect::<Result<_>>()?;
        let tensors: Vec<&Tensor> = args.iter().chain([result, &grad]).collect();
        let held: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
        let views: Vec<View<T>> = held
            .iter()
            .map(|(storage, layout)| match &**storage {
                Storage::Cpu(storage) => view(storage, layout),
                _ => bail!("{} is for the CPU", F::NAME),
            })
            .collect::<Result<_>>()?;
        let [views @ .., result, grad] = &views[..] else { bail!("no arguments") };
        let grads = self.0.backward(views, *result, *grad, wanted)?;
        let tensors = grads.into_iter().zip(&args).map(|(grad, arg)| match grad {
            Some(grad) => Tensor::from_vec(grad, arg.shape(), arg.device()).map(Some),
            None => Ok(None),
        });
        tensors.collect()
    }
}

fn view<'a, T: Number>(storage: &'a CpuStorage, layout: &'a Layout) -> Result<View<'a, T>> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("the tensor is not contiguous")
    };
    Ok(View { data: &storage.as_slice::<T>()?[from..to], dims: layout.dims() })
}

impl<F: Fused> CustomOp1 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s, l)])
    }

    fn bwd(&self, a: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.candles(&[a], result, grad)?.swap_remove(0))
    }
}

impl<F: Fused> CustomOp2 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.candles(&[a, b], result, grad)?.into_iter();
        Ok((grads.next().flatten(), grads.next().flatten()))
    }
}

impl<F: Fused> CustomOp3 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.candles(&[a, b, c], result, grad)?.into_iter();
        Ok((grads.next().flatten(), grads.next().flatten(), grads.next().flatten()))
    }
}
