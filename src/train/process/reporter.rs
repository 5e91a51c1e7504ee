//! Writes the events of a run to the event log.

use super::artifacts::facts;
use crate::job::JobFailure;
use crate::job::{Control, EventLog, Folder, JobEvent, Level, Order, StepMetrics, rollout_table};
use crate::train::export;
use crate::train::model::{Model, Training};
use crate::train::recipes::Event;
use std::fs;
use std::time::Instant;

/// Number of steps up to which each step is logged. Longer runs log every n-th step.
const TOLD: u64 = 5_000;
/// Weight of the last step in the running mean of the step time, which gives the remaining time.
const RECENT: f64 = 0.1;

/// Number of successive steps without a reward signal after which a policy's job logs a warning.
const SILENT_STEPS: u64 = 5;
/// Metric names of policies.
const SILENT: &str = "frac_reward_zero_std";
const LENGTH: &str = "completion_length";

/// Writes the events of a run.
pub(super) struct Reporter<'a> {
    folder: &'a Folder,
    order: &'a Order,
    model: &'a Model,
    training: &'a Training,
    log: &'a mut EventLog,
    /// End of the last step, and the mean seconds per step.
    pace: Option<(Instant, f64)>,
    /// Number of successive steps without a reward signal.
    silent: u64,
    /// The first event that could not be written.
    failure: Option<JobFailure>,
}

impl<'a> Reporter<'a> {
    pub(super) fn new(
        folder: &'a Folder,
        order: &'a Order,
        model: &'a Model,
        training: &'a Training,
        log: &'a mut EventLog,
    ) -> Self {
        Self { folder, order, model, training, log, pace: None, silent: 0, failure: None }
    }

    /// Writes an event. An error ends the training loop through `stop`, its only way to end early.
    pub(super) fn tell(&mut self, event: Event, control: &Control) {
        if let Err(error) = self.write(event) {
            control.stop();
            self.failure.get_or_insert(error);
        }
    }

    /// # Errors
    /// The first event that could not be written.
    pub(super) fn finish(self) -> Result<(), JobFailure> {
        self.failure.map_or(Ok(()), Err)
    }

    fn write(&mut self, event: Event) -> Result<(), JobFailure> {
        match event {
            // Nothing has been trained yet.
            Event::Checkpoint { step: 0 } | Event::Resumed { step: 0 } => {}
            Event::Resumed { step } => {
                self.log.say(Level::Info, format!("Going on after step {step}."))?;
            }
            Event::Step(step) => self.step(step)?,
            Event::Rollouts(rows) => rollout_table::append(&self.folder.rollouts(), &rows)?,
            Event::Note { text } => self.log.say(Level::Info, text)?,
            Event::Evaluated(found) => {
                let bits = found.bits_per_byte;
                let bits =
                    bits.map_or_else(String::new, |bits| format!(", {bits:.3} bits per byte"));
                let what = match (found.loss, found.reward()) {
                    (Some(loss), _) => format!("loss={loss:.4}"),
                    (None, Some(reward)) => format!("reward={reward:.4}"),
                    (None, None) => {
                        let metrics = found.metrics.iter();
                        let each: Vec<_> =
                            metrics.map(|(name, value)| format!("{name}={value:.3}")).collect();
                        each.join(", ")
                    }
                };
                let message = format!("Step {}: validation {what}{bits}", found.step);
                self.log.add(JobEvent::Validation(found), message)?;
            }
            Event::Sample { step, text } => {
                let message = format!("Step {step}: {text}");
                self.log.add(JobEvent::Sample { step, text }, message)?;
            }
            Event::Checkpoint { step } => {
                self.checkpoint_adapter(step)?;
                rollout_table::sync(&self.folder.rollouts())?;
                let message = format!("Checkpoint created at step {step}.");
                self.log.add(JobEvent::Checkpoint { step }, message)?;
                self.log.sync()?;
            }
        }
        Ok(())
    }

    fn step(&mut self, step: StepMetrics) -> Result<(), JobFailure> {
        let now = Instant::now();
        if self.pace.is_none() {
            // Removes the entries of an earlier process about steps that are now repeated.
            *self.log = EventLog::cut(&self.folder.events(), step.step - 1)?;
            rollout_table::cut(&self.folder.rollouts(), step.step)?;
        }
        let pace = match self.pace {
            Some((last, pace)) => pace + RECENT * ((now - last).as_secs_f64() - pace),
            // The first step of this process: no time has passed besides the step itself.
            None => 0.0,
        };
        let first = self.pace.is_none();
        self.pace = Some((now, pace));
        let every = (step.total_steps / TOLD).max(1);
        if !step.step.is_multiple_of(every) && !step.last {
            return Ok(());
        }
        let left = (step.total_steps - step.step) as f64;
        let mut message = format!("Step {}/{}: ", step.step, step.total_steps);
        if let Some(reward) = step.reward() {
            message += &format!("reward={reward:.4}, ");
        }
        message += &format!("training loss={:.4}", step.loss);
        // Metrics that users watch besides the loss, for kinds of jobs that have them.
        if let Some(accuracy) = step.accuracy.filter(|_| !step.metrics.is_empty()) {
            message += &format!(", accuracy={accuracy:.3}");
        }
        for (name, shown) in [("reward_margin", "margin"), ("kl", "kl"), (LENGTH, "answer tokens")]
        {
            if let Some(value) = step.metrics.get(name) {
                message += &format!(", {shown}={value:.3}");
            }
        }
        self.watch_signal(&step)?;
        let eta_seconds = if first { 0.0 } else { left * pace };
        let step = StepMetrics { eta_seconds, memory_bytes: resident(), ..step };
        Ok(self.log.add(JobEvent::Step(step), message)?)
    }

    /// Warns when a policy has no reward signal: in many successive steps, all completions of each
    /// prompt had equal rewards.
    fn watch_signal(&mut self, step: &StepMetrics) -> Result<(), JobFailure> {
        let Some(silent) = step.metrics.get(SILENT) else { return Ok(()) };
        self.silent = if *silent >= 1.0 { self.silent + 1 } else { 0 };
        let whole_run = self.silent >= step.step;
        let kind = self.order.spec.task.name();
        let message = match () {
            // A run that ends before its last step has reached its target.
            () if step.step == step.total_steps && whole_run => format!(
                "Nothing was learned: in all {} steps the answers to each prompt had equal rewards. Check \
                 the grader on some answers (POST /v1/fine_tuning/alpha/graders/run), make the task \
                 easier, or raise {kind}.num_generations or {kind}.temperature.",
                step.step
            ),
            () if self.silent == SILENT_STEPS => format!(
                "For {SILENT_STEPS} steps the answers to each prompt have had equal rewards (now {:.3} in \
                 the mean): there is nothing to learn from. If that is the highest reward, the task is \
                 learned, and the job can be stopped. If not, check the grader on some answers, make \
                 the task easier, or raise {kind}.num_generations or {kind}.temperature.",
                step.reward().unwrap_or(f64::NAN)
            ),
            () => return Ok(()),
        };
        Ok(self.log.say(Level::Warn, message)?)
    }

    /// Writes the adapter at a checkpoint, so that users can try it before the job ends. Adapters
    /// of deleted checkpoints are removed.
    fn checkpoint_adapter(&self, step: u64) -> Result<(), JobFailure> {
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

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
