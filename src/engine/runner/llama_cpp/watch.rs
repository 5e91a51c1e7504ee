//! Captures llama.cpp's output of each layer, for tests.

use super::super::{Batch, RunnerError};
use super::context::{Context, ContextKind};
use super::model::Model;
use crate::ipc::LoadSpec;
use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex};

/// A model whose layer outputs are captured.
pub struct Watched {
    // Declared before the outputs that its callback writes to, so that it is dropped before them.
    context: Context,
    outputs: Box<Outputs>,
}

/// (layers, rows * width), in layer order.
type Outputs = Mutex<Vec<Vec<f32>>>;

impl Watched {
    pub fn load(spec: &LoadSpec) -> Result<Self, RunnerError> {
        crate::llama_log::install();
        let model = Arc::new(Model::load(spec)?);
        let outputs = Box::<Outputs>::default();
        let argument = std::ptr::from_ref(&*outputs).cast_mut().cast();
        let kind = ContextKind::Generate { slots: 1, exact: false };
        let context = Context::with_callback(&model, spec, kind, (Some(keep_outputs), argument))?;
        Ok(Self { context, outputs })
    }

    /// (layers, rows * width) the residual stream after each layer. All rows must want logits: the
    /// last layer computes no other rows.
    pub fn layers(&mut self, batch: &Batch) -> Result<Vec<Vec<f32>>, RunnerError> {
        self.context.decode(batch, &mut || false)?;
        Ok(std::mem::take(&mut *self.outputs.lock().expect("no other thread")))
    }
}

/// `ggml_backend_sched_eval_callback`: called first to ask whether a tensor is needed, then with
/// the computed tensor.
extern "C" fn keep_outputs(tensor: *mut sys::ggml_tensor, ask: bool, outputs: *mut c_void) -> bool {
    // SAFETY: llama.cpp calls with a live tensor, whose name is NUL-terminated.
    let (name, tensor) = unsafe { (CStr::from_ptr((*tensor).name.as_ptr()), &*tensor) };
    if !name.to_bytes().starts_with(b"l_out-") {
        return !ask;
    }
    if !ask {
        assert_eq!(tensor.type_, sys::GGML_TYPE_F32, "layers add in f32");
        let mut values = vec![0f32; (tensor.ne[0] * tensor.ne[1]) as usize];
        // SAFETY: the tensor is contiguous and was just computed; `values` has its size; `outputs`
        // is the mutex that `Watched` owns for longer than its context.
        unsafe {
            let bytes = size_of_val(&values[..]);
            sys::ggml_backend_tensor_get(tensor, values.as_mut_ptr().cast(), 0, bytes);
            (*outputs.cast::<Outputs>()).lock().expect("no other thread").push(values);
        }
    }
    true
}
