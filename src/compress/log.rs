//! Lines of llama.cpp's log, passed on while a function of it runs.

use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, c_char, c_void};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A line of the log, and whether it is an error.
pub(super) type LogLine = (bool, String);

/// Where the lines go, and the beginning of a line: llama.cpp writes some in pieces.
static RECEIVER: Mutex<Option<LineReceiver>> = Mutex::new(None);

struct LineReceiver {
    lines: Sender<LogLine>,
    level: sys::ggml_log_level,
    line: String,
}

fn receiver() -> MutexGuard<'static, Option<LineReceiver>> {
    RECEIVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends llama.cpp's log to a channel until it is dropped. One at a time: the log is global.
pub(super) struct LogCapture;

impl LogCapture {
    pub(super) fn start(lines: Sender<LogLine>) -> Self {
        *receiver() = Some(LineReceiver { lines, level: 0, line: String::new() });
        // SAFETY: the callback is a plain function that lives as long as the program and uses no
        // user data.
        unsafe { sys::llama_log_set(Some(on_text), std::ptr::null_mut()) };
        Self
    }
}

impl Drop for LogCapture {
    fn drop(&mut self) {
        *receiver() = None;
    }
}

unsafe extern "C" fn on_text(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that outlives the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let mut guard = receiver();
    let Some(receiver) = guard.as_mut() else { return };
    if level != sys::GGML_LOG_LEVEL_CONT {
        receiver.level = level;
    }
    receiver.line.push_str(&text);
    if !receiver.line.ends_with('\n') && receiver.line.len() < 1 << 16 {
        return;
    }
    let is_error = receiver.level == sys::GGML_LOG_LEVEL_ERROR;
    for line in std::mem::take(&mut receiver.line).lines().filter(|line| !line.trim().is_empty()) {
        let _ = receiver.lines.send((is_error, line.trim().to_owned()));
    }
}
