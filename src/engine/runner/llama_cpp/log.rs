//! Forwards llama.cpp's log to `tracing`.

use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;

/// An incomplete line: llama.cpp prints some lines in pieces.
static LINE: Mutex<(u32, String)> = Mutex::new((0, String::new()));

pub(super) fn install() {
    // SAFETY: the callback is a plain function that lives as long as the program and uses no user
    // data.
    unsafe { sys::llama_log_set(Some(on_line), std::ptr::null_mut()) }
}

unsafe extern "C" fn on_line(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that outlives the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let Ok(mut line) = LINE.lock() else { return };
    if level != sys::GGML_LOG_LEVEL_CONT {
        line.0 = level;
    }
    line.1.push_str(&text);
    if line.1.len() > 64 << 10 {
        line.1.truncate(0);
    }
    if !line.1.ends_with('\n') {
        return;
    }
    let whole = std::mem::take(&mut line.1);
    let whole = whole.trim_end();
    match line.0 {
        // llama.cpp's INFO level is only of use to its developers: several hundred lines per load.
        sys::GGML_LOG_LEVEL_ERROR => tracing::error!("{whole}"),
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!("{whole}"),
        _ => tracing::debug!("{whole}"),
    }
}
