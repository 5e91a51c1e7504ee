//! What a run does, written down.

use super::events::REWARD;
use super::make::facts;
use super::run::Ended;
use super::{EventLog, Folder, JobEvent, Level, Order, Step, Validation};
use crate::train::export;
use crate::train::model::{Model, Training};
use crate::train::recipes::{self, Event};
use std::fs;
use std::time::Instant;

/// Steps that are told of one by one; of longer runs, every so many.
const TOLD: u64 = 5_000;
/// The pace that the time left is guessed from: how much a step counts.
const RECENT: f64 = 0.1;

/// Writes down what happens.
pub(super) struct Teller<'a> {
    pub(super) folder: &'a Folder,
    pub(super) order: &'a Order,
    pub(super) model: &'a Model,
    pub(super) training: &'a Training,
    pub(super) log: &'a mut EventLog,
    /// When the last step ended, and seconds a step.
    pub(super) pace: Option<(Instant, f64)>,
}

impl Teller<'_> {
    pub(super) fn tell(&mut self, event: Event) -> Result<(), Ended> {
        match event {
            // It has trained nothing yet.
            Event::Checkpoint { step: 0 } | Event::Resumed { step: 0 } => {}
            Event::Resumed { step } => {
                self.log.say(Level::Info, format!("Going on after step {step}."))?;
            }
            Event::Step(step) => self.step(&step)?,
            Event::Note { text } => self.log.say(Level::Info, text)?,
            Event::Evaluated(found) => {
                let bits = found.bits_per_byte;
                let bits =
                    bits.map_or_else(String::new, |bits| format!(", {bits:.3} bits per byte"));
                let what = match (found.loss, found.metrics.get(REWARD)) {
                    (Some(loss), _) => format!("loss={loss:.4}"),
                    (None, Some(reward)) => format!("reward={reward:.4}"),
                    (None, None) => "without a reward".into(),
                };
                let message = format!("Step {}: validation {what}{bits}", found.step);
                let found = Validation {
                    step: found.step,
                    validation_loss: found.loss,
                    validation_accuracy: found.accuracy,
                    bits_per_byte: found.bits_per_byte,
                    metrics: found.metrics,
                };
                self.log.add(JobEvent::Validation(found), message)?;
            }
            Event::Sample { step, text } => {
                let message = format!("Step {step}: {text}");
                self.log.add(JobEvent::Sample { step, text }, message)?;
            }
            Event::Checkpoint { step } => {
                self.checkpoint_adapter(step)?;
                let message = format!("Checkpoint created at step {step}.");
                self.log.add(JobEvent::Checkpoint { step }, message)?;
                self.log.sync()?;
            }
        }
        Ok(())
    }

    fn step(&mut self, step: &recipes::Progress) -> Result<(), Ended> {
        let now = Instant::now();
        if self.pace.is_none() {
            // What a process before us told of steps that are done again.
            *self.log = EventLog::cut(&self.folder.events(), step.step - 1)?;
        }
        let pace = match self.pace {
            Some((last, pace)) => pace + RECENT * ((now - last).as_secs_f64() - pace),
            // The first one of this process: as long as the step itself took.
            None => 0.0,
        };
        let first = self.pace.is_none();
        self.pace = Some((now, pace));
        let every = (step.total_steps / TOLD).max(1);
        if !step.step.is_multiple_of(every) && !step.last {
            return Ok(());
        }
        let left = (step.total_steps - step.step) as f64;
        let reward = step.metrics.get(REWARD);
        let reward = reward.map_or_else(String::new, |reward| format!("reward={reward:.4}, "));
        let message = format!(
            "Step {}/{}: {reward}training loss={:.4}",
            step.step, step.total_steps, step.loss
        );
        let step = Step {
            step: step.step,
            total_steps: step.total_steps,
            epoch: step.epoch,
            loss: step.loss,
            accuracy: step.accuracy,
            learning_rate: step.learning_rate,
            grad_norm: step.grad_norm,
            tokens: step.tokens,
            tokens_per_second: step.tokens_per_second,
            eta_seconds: if first { 0.0 } else { left * pace },
            memory_bytes: resident(),
            metrics: step.metrics.clone(),
        };
        Ok(self.log.add(JobEvent::Step(step), message)?)
    }

    /// The adapter as it is now, for those who want to try it before the end. Those of checkpoints
    /// that are gone are removed.
    fn checkpoint_adapter(&self, step: u64) -> Result<(), Ended> {
        let Training::Lora(lora) = self.training else { return Ok(()) };
        let facts = facts(self.order, Some(step));
        export::lora_gguf(self.model, lora, &facts, &self.folder.checkpoint_adapter(step))?;
        for file in fs::read_dir(self.folder.checkpoints())?.flatten() {
            let name = file.file_name();
            let step = name.to_str().and_then(|name| {
                name.strip_prefix("adapter-")?.strip_suffix(".gguf")?.parse::<u64>().ok()
            });
            let gone = |step| !self.folder.checkpoints().join(format!("step-{step}")).exists();
            if step.is_some_and(gone) {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
