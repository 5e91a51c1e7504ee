//! What a run does, written down.

use super::artifacts::facts;
use super::run::JobFailure;
use crate::job::{EventLog, Folder, JobEvent, Level, Order, StepMetrics};
use crate::train::export;
use crate::train::model::{Model, Training};
use crate::train::recipes::Event;
use std::fs;
use std::time::Instant;

/// Steps that are told of one by one; of longer runs, every so many.
const TOLD: u64 = 5_000;
/// The pace that the time left is guessed from: how much a step counts.
const RECENT: f64 = 0.1;

/// Steps without a signal after which a policy's job warns.
const SILENT_STEPS: u64 = 5;
/// Names among the metrics of policies.
const SILENT: &str = "frac_reward_zero_std";
const LENGTH: &str = "completion_length";

/// Writes down what happens.
pub(super) struct Reporter<'a> {
    pub(super) folder: &'a Folder,
    pub(super) order: &'a Order,
    pub(super) model: &'a Model,
    pub(super) training: &'a Training,
    pub(super) log: &'a mut EventLog,
    /// When the last step ended, and seconds a step.
    pub(super) pace: Option<(Instant, f64)>,
    /// The last steps, all of them without a signal for a policy.
    pub(super) silent: u64,
}

impl Reporter<'_> {
    pub(super) fn tell(&mut self, event: Event) -> Result<(), JobFailure> {
        match event {
            // It has trained nothing yet.
            Event::Checkpoint { step: 0 } | Event::Resumed { step: 0 } => {}
            Event::Resumed { step } => {
                self.log.say(Level::Info, format!("Going on after step {step}."))?;
            }
            Event::Step(step) => self.step(step)?,
            Event::Note { text } => self.log.say(Level::Info, text)?,
            Event::Evaluated(found) => {
                let bits = found.bits_per_byte;
                let bits =
                    bits.map_or_else(String::new, |bits| format!(", {bits:.3} bits per byte"));
                let what = match (found.loss, found.reward()) {
                    (Some(loss), _) => format!("loss={loss:.4}"),
                    (None, Some(reward)) => format!("reward={reward:.4}"),
                    (None, None) => "without a reward".into(),
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
        let mut message = format!("Step {}/{}: ", step.step, step.total_steps);
        if let Some(reward) = step.reward() {
            message += &format!("reward={reward:.4}, ");
        }
        message += &format!("training loss={:.4}", step.loss);
        // What people follow beside the loss, where the kind of job measures more than that.
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

    /// Warns when a policy is given nothing to learn from: all answers to a prompt are worth the same, for
    /// every prompt of many steps.
    fn watch_signal(&mut self, step: &StepMetrics) -> Result<(), JobFailure> {
        let Some(silent) = step.metrics.get(SILENT) else { return Ok(()) };
        self.silent = if *silent >= 1.0 { self.silent + 1 } else { 0 };
        let whole_run = self.silent >= step.step;
        let message = match () {
            () if step.last && whole_run => format!(
                "Nothing was learned: in all {} steps the answers to each prompt had equal rewards. Check \
                 the grader on some answers (POST /v1/fine_tuning/alpha/graders/run), make the task \
                 easier, or raise grpo.num_generations or grpo.temperature.",
                step.step
            ),
            () if self.silent == SILENT_STEPS => format!(
                "For {SILENT_STEPS} steps the answers to each prompt have had equal rewards (now {:.3} in \
                 the mean): there is nothing to learn from. If that is the highest reward, the task is \
                 learned, and the job can be stopped. If not, check the grader on some answers, make \
                 the task easier, or raise grpo.num_generations or grpo.temperature.",
                step.reward().unwrap_or(f64::NAN)
            ),
            () => return Ok(()),
        };
        Ok(self.log.say(Level::Warn, message)?)
    }

    /// The adapter as it is now, for those who want to try it before the end. Those of checkpoints
    /// that are gone are removed.
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

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
