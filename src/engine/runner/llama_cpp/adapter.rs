//! LoRA adapters in llama.cpp.

use super::super::{AdapterHandle, AdapterLoader, RunnerError};
use super::model::{Model, c_path};
use llama_cpp_sys_2 as sys;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

/// A loaded adapter; freed on drop.
pub struct Adapter {
    pub(super) raw: NonNull<sys::llama_adapter_lora>,
    pub(super) scale: f32,
    model: Arc<Model>,
}

// SAFETY: an adapter is plain data, read by one context at a time. Loading and freeing change the
// model's list of adapters, which `Model::adapters` guards.
unsafe impl Send for Adapter {}

impl Drop for Adapter {
    fn drop(&mut self) {
        let _guard = self.model.adapters.lock();
        // SAFETY: the pointer came from `llama_adapter_lora_init` and is freed once; `self.model`
        // keeps alive the model that lists the adapter.
        unsafe { sys::llama_adapter_lora_free(self.raw.as_ptr()) }
    }
}

/// Reads adapter files on a thread beside the step loop.
pub(super) struct Loader {
    model: Arc<Model>,
}

impl Loader {
    pub(super) fn new(model: Arc<Model>) -> Self {
        Self { model }
    }
}

impl AdapterLoader for Loader {
    fn prepare(&self, path: &Path, scale: f32) -> Result<AdapterHandle, RunnerError> {
        let file = c_path(path)?;
        let guard = self.model.adapters.lock();
        // SAFETY: the model outlives the adapter, which holds an `Arc` of it; the string is
        // NUL-terminated; the guard prevents other threads from accessing the model's list of
        // adapters.
        let raw = unsafe { sys::llama_adapter_lora_init(self.model.as_ptr(), file.as_ptr()) };
        drop(guard);
        let raw = NonNull::new(raw).ok_or_else(|| {
            RunnerError(format!("llama.cpp could not load the adapter {}", path.display()))
        })?;
        Ok(AdapterHandle::LlamaCpp(Adapter { raw, scale, model: self.model.clone() }))
    }
}
