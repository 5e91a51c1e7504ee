//! A tape: the backward pass over recorded operations, instead of candle's.
//!
//! candle initializes every gradient with zeros and adds to it, which costs more than most
//! operations. The tape takes the first gradient of a tensor as it is, and frees the stored values
//! of an operation as soon as its gradients are computed. On devices other than the CPU the
//! backward pass is candle's.

use candle_core::{Result, Tensor, TensorId};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

/// Gradients of variables, and of tensors that are not the result of an operation.
pub type Grads = HashMap<TensorId, Tensor>;

/// The backward pass of an operation.
pub(super) trait Backward {
    /// The gradients of the arguments that need one.
    fn back(
        &self,
        args: &[&Tensor],
        result: &Tensor,
        grad: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

struct Entry {
    op: Box<dyn Backward>,
    args: Vec<Tensor>,
    wanted: Vec<bool>,
    result: Tensor,
}

/// The recorded operations on tracked tensors, in order.
#[derive(Default)]
pub struct Tape {
    entries: Vec<Entry>,
    tracked: HashSet<TensorId>,
    /// Recording is disabled: no gradients are needed.
    off: bool,
}

thread_local! {
    /// The tapes of this thread; operations are recorded on the last one.
    static TAPES: RefCell<Vec<Tape>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f`, and records what it computes from variables and from the tensors `from`.
///
/// # Errors
/// The errors of `f`.
pub fn record<R>(from: &[&Tensor], f: impl FnOnce() -> Result<R>) -> Result<(R, Tape)> {
    let tracked = from.iter().map(|tensor| tensor.id()).collect();
    let (result, tape) = with(Tape { tracked, ..Tape::default() }, f);
    Ok((result?, tape))
}

/// Runs `f` without recording operations.
pub fn without_gradients<R>(f: impl FnOnce() -> R) -> R {
    with(Tape { off: true, ..Tape::default() }, f).0
}

fn with<R>(tape: Tape, f: impl FnOnce() -> R) -> (R, Tape) {
    TAPES.with_borrow_mut(|tapes| tapes.push(tape));
    let result = f();
    (result, TAPES.with_borrow_mut(Vec::pop).unwrap_or_default())
}

/// Whether a tensor needs a gradient.
pub(super) fn tracked(tensor: &Tensor) -> bool {
    TAPES.with_borrow(|tapes| match tapes.last() {
        Some(tape) => !tape.off && (tensor.is_variable() || tape.tracked.contains(&tensor.id())),
        None => false,
    })
}

/// Whether operations are recorded on this thread.
pub(super) fn recording() -> bool {
    TAPES.with_borrow(|tapes| tapes.last().is_some_and(|tape| !tape.off))
}

/// Records an operation if any of its arguments needs a gradient.
pub(super) fn record_op(op: Box<dyn Backward>, args: &[&Tensor], result: &Tensor) {
    let wanted: Vec<bool> = args.iter().map(|arg| tracked(arg)).collect();
    if !wanted.contains(&true) {
        return;
    }
    TAPES.with_borrow_mut(|tapes| {
        if let Some(tape) = tapes.last_mut() {
            tape.tracked.insert(result.id());
            let args = args.iter().map(|arg| (*arg).clone()).collect();
            tape.entries.push(Entry { op, args, wanted, result: result.clone() });
        }
    });
}

impl Tape {
    /// The gradients of `out`, whose own gradient is `grad`, or one.
    ///
    /// # Errors
    /// If an operation has no backward pass, or memory cannot be allocated.
    pub fn backward(self, out: &Tensor, grad: Option<&Tensor>) -> Result<Grads> {
        let grad = match grad {
            Some(grad) => grad.clone(),
            None => out.ones_like()?,
        };
        if !super::uses_cpu_ops(out) {
            return super::candle::backward(out, &grad);
        }
        let mut grads = Grads::from([(out.id(), grad)]);
        for Entry { op, args, wanted, result } in self.entries.into_iter().rev() {
            let Some(grad) = grads.remove(&result.id()) else { continue };
            let refs: Vec<&Tensor> = args.iter().collect();
            let found = op.back(&refs, &result, &grad, &wanted)?;
            for (arg, grad) in args.iter().zip(found).zip(&wanted).filter_map(given) {
                let sum = match grads.remove(&arg.id()) {
                    Some(sum) => super::cpu::sum(&sum, &grad)?,
                    None => grad,
                };
                grads.insert(arg.id(), sum);
            }
        }
        Ok(grads)
    }
}

fn given<'a>(
    ((arg, grad), wanted): ((&'a Tensor, Option<Tensor>), &bool),
) -> Option<(&'a Tensor, Tensor)> {
    grad.filter(|_| *wanted).map(|grad| (arg, grad))
}
