//! llama.cpp's log: to `tracing`, or to a channel while a function of llama.cpp runs whose progress
//! and errors are in it.
//!
//! llama.cpp has one log callback for the process. This module keeps a log for each thread, so a
//! capture gets no lines about models that other threads run.

#![allow(unsafe_code)]

use llama_cpp_sys_2 as sys;
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;
use std::sync::mpsc::Sender;

/// A line of the log, and whether it is an error.
pub type LogLine = (bool, String);

/// Maximum number of bytes of a line.
const LONGEST: usize = 64 << 10;

static INSTALLED: Once = Once::new();

/// The log of a thread.
#[derive(Default)]
struct ThreadLog {
    level: sys::ggml_log_level,
    /// The beginning of a line: llama.cpp writes some in pieces.
    line: String,
    capture: Option<Sender<LogLine>>,
}

thread_local! {
    static LOG: RefCell<ThreadLog> = RefCell::default();
}

/// Has llama.cpp log to this module.
pub fn install() {
    INSTALLED.call_once(|| {
        // SAFETY: the callback is a plain function that lives as long as the program and uses no
        // user data.
        unsafe { sys::llama_log_set(Some(on_text), std::ptr::null_mut()) }
    });
}

/// Sends the log of this thread to a channel until it is dropped.
#[derive(Debug)]
pub struct LogCapture {
    // Dropped on the thread that it was made on.
    _here: std::marker::PhantomData<*const ()>,
}

impl LogCapture {
    /// Begins to capture the log of the calling thread.
    pub fn start(lines: Sender<LogLine>) -> Self {
        install();
        LOG.with_borrow_mut(|log| {
            *log = ThreadLog { capture: Some(lines), ..ThreadLog::default() };
        });
        Self { _here: std::marker::PhantomData }
    }
}

impl Drop for LogCapture {
    fn drop(&mut self) {
        LOG.with_borrow_mut(|log| *log = ThreadLog::default());
    }
}

unsafe extern "C" fn on_text(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that outlives the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    // A thread that ends, or that logs while it logs, has no log.
    let _ = LOG.try_with(|log| log.try_borrow_mut().map(|mut log| log.write(level, &text)));
}

impl ThreadLog {
    fn write(&mut self, level: sys::ggml_log_level, text: &str) {
        if level != sys::GGML_LOG_LEVEL_CONT {
            self.level = level;
        }
        self.line.push_str(text);
        if !self.line.ends_with('\n') && self.line.len() < LONGEST {
            return;
        }
        let text = std::mem::take(&mut self.line);
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            match (&self.capture, self.level) {
                (Some(lines), level) => {
                    // The receiver may have read enough.
                    let _ = lines.send((level == sys::GGML_LOG_LEVEL_ERROR, line.to_owned()));
                }
                (None, sys::GGML_LOG_LEVEL_ERROR) => tracing::error!("{line}"),
                (None, sys::GGML_LOG_LEVEL_WARN) => tracing::warn!("{line}"),
                // llama.cpp's INFO level is only of use to its developers: several hundred lines per
                // load.
                (None, _) => tracing::debug!("{line}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn say(level: sys::ggml_log_level, text: &str) {
        let text = std::ffi::CString::new(text).unwrap();
        // SAFETY: the text is NUL-terminated.
        unsafe { on_text(level, text.as_ptr(), std::ptr::null_mut()) };
    }

    #[test]
    fn a_capture_gets_whole_lines_of_its_thread() {
        let (lines, log) = channel();
        let capture = LogCapture::start(lines);
        say(sys::GGML_LOG_LEVEL_INFO, "[ 1/ 2] a");
        std::thread::spawn(|| say(sys::GGML_LOG_LEVEL_ERROR, "another thread\n")).join().unwrap();
        say(sys::GGML_LOG_LEVEL_CONT, " .. b\nsecond\n\n");
        say(sys::GGML_LOG_LEVEL_ERROR, "wrong\n");
        drop(capture);
        say(sys::GGML_LOG_LEVEL_ERROR, "later\n");
        let found: Vec<LogLine> = log.iter().collect();
        let right = [(false, "[ 1/ 2] a .. b"), (false, "second"), (true, "wrong")];
        assert_eq!(found, right.map(|(is_error, line)| (is_error, line.to_owned())));
    }
}
