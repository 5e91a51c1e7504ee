//! Progress bars on standard error; nothing is drawn where that is no terminal.

use crate::gateway::store::PullEvent;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows a pull: pass `|event| bar.show(event)` to [`crate::gateway::store::pull`].
#[derive(Debug)]
pub struct PullBar {
    bar: ProgressBar,
    what: String,
}

impl PullBar {
    /// `what` is named beside the bar.
    pub fn new(what: impl Into<String>) -> Self {
        Self { bar: ProgressBar::hidden(), what: what.into() }
    }

    /// Takes in one event.
    pub fn show(&mut self, event: PullEvent) {
        match event {
            PullEvent::Start { total, done } => {
                self.bar.finish_and_clear();
                self.bar =
                    ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(5));
                self.bar.set_style(style(match total {
                    Some(_) => {
                        "{prefix}  {bar:30}  {decimal_bytes}/{decimal_total_bytes}  \
                         {decimal_bytes_per_sec}  {eta}"
                    }
                    None => "{prefix}  {spinner}  {decimal_bytes}  {decimal_bytes_per_sec}",
                }));
                self.bar.set_prefix(self.what.clone());
                self.bar.set_position(done);
                // The speed is that of this try, not of the bytes that were here already.
                self.bar.reset_eta();
            }
            PullEvent::Bytes(count) => self.bar.inc(count),
            PullEvent::Note(text) => self.bar.suspend(|| eprintln!("{text}")),
        }
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// A bar of requests, drawn rarely: the load generator shares cores with the server.
pub(super) fn request_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(2));
    bar.set_style(style("{prefix}  {bar:30}  {pos}/{len} requests  {elapsed}"));
    bar
}

/// A bar of tensors.
pub(super) fn tensor_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(5));
    bar.set_style(style("{bar:30}  {pos}/{len} tensors  {msg}"));
    bar
}

/// A bar of tokens.
pub(super) fn token_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(2));
    bar.set_style(style("{prefix}  {bar:30}  {pos}/{len} tokens  {elapsed}, {eta} to go"));
    bar
}

/// A bar of optimizer steps, with a message that the caller sets.
pub(super) fn step_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(2));
    bar.set_style(style("{bar:30}  {pos}/{len} steps  {msg}  {elapsed}"));
    bar
}

/// A bar of steps of something that its prefix names.
pub(super) fn work_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
    bar.set_style(style("{prefix}  {bar:30}  {pos}/{len}  {elapsed}, {eta} to go"));
    bar
}

/// A spinner with a text that the caller sets.
pub(super) fn spinner(text: String) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(5));
    bar.set_style(style("{spinner} {msg}  {elapsed}"));
    bar.set_message(text);
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is a constant of ours")
}
