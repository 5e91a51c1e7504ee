//! Metrics of running jobs, and the number of jobs by status.

use super::{GaugeVec, IntGaugeVec, Maker};

/// State of a running job at one moment.
#[derive(Debug, Clone, Default)]
pub struct JobSample {
    pub id: String,
    pub kind: String,
    pub step: u64,
    pub total_steps: u64,
    pub tokens: u64,
    pub memory_bytes: u64,
    pub epoch: f64,
    /// Nats per token.
    pub loss: f64,
    pub validation_loss: Option<f64>,
    /// Only for reinforcement learning.
    pub reward: Option<f64>,
    pub validation_reward: Option<f64>,
    pub learning_rate: f64,
    pub grad_norm: f64,
    pub tokens_per_second: f64,
    pub eta_seconds: f64,
}

/// State of all jobs at one moment.
#[derive(Debug, Clone, Default)]
pub struct JobSamples {
    /// Number of jobs by status.
    pub counts: Vec<(&'static str, usize)>,
    pub running: Vec<JobSample>,
}

#[derive(Debug)]
pub(super) struct JobSeries {
    jobs: IntGaugeVec,
    step: IntGaugeVec,
    total_steps: IntGaugeVec,
    tokens: IntGaugeVec,
    memory: IntGaugeVec,
    epoch: GaugeVec,
    loss: GaugeVec,
    validation_loss: GaugeVec,
    reward: GaugeVec,
    validation_reward: GaugeVec,
    learning_rate: GaugeVec,
    grad_norm: GaugeVec,
    tokens_per_second: GaugeVec,
    eta: GaugeVec,
}

impl JobSeries {
    pub(super) fn new(make: &Maker) -> Self {
        let count = |name, help| make.gauge(name, help, &["job", "kind"]);
        let number = |name, help| make.ratio(name, help, &["job", "kind"]);
        Self {
            jobs: make.gauge("ingot_jobs", "Jobs, by status.", &["status"]),
            step: count("ingot_job_step", "Optimizer steps done."),
            total_steps: count("ingot_job_total_steps", "Optimizer steps to do."),
            tokens: count("ingot_job_tokens", "Tokens trained on, context included."),
            memory: count("ingot_job_memory_bytes", "Resident memory of the job's process."),
            epoch: number("ingot_job_epoch", "Passes over the data."),
            loss: number("ingot_job_loss", "Training loss of the last step, nats a token."),
            validation_loss: number("ingot_job_validation_loss", "The last validation loss."),
            reward: number("ingot_job_reward", "Mean reward of the last step's answers."),
            validation_reward: number(
                "ingot_job_validation_reward",
                "Mean reward of the last answers to held-out prompts.",
            ),
            learning_rate: number("ingot_job_learning_rate", "Learning rate of the last step."),
            grad_norm: number("ingot_job_grad_norm", "Norm of the last step's gradient."),
            tokens_per_second: number("ingot_job_tokens_per_second", "Tokens trained on a second."),
            eta: number("ingot_job_eta_seconds", "Time until the last step, at the present pace."),
        }
    }

    /// Sets the gauges. Series of jobs that no longer run are removed.
    pub(super) fn collect(&self, samples: &JobSamples) {
        let counts = [&self.step, &self.total_steps, &self.tokens, &self.memory];
        let numbers = [
            &self.epoch,
            &self.loss,
            &self.validation_loss,
            &self.reward,
            &self.validation_reward,
            &self.learning_rate,
            &self.grad_norm,
            &self.tokens_per_second,
            &self.eta,
        ];
        counts.iter().for_each(|series| series.reset());
        numbers.iter().for_each(|series| series.reset());
        for (status, count) in &samples.counts {
            self.jobs.with_label_values(&[*status]).set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
        for job in &samples.running {
            let labels = [job.id.as_str(), job.kind.as_str()];
            for (series, value) in
                counts.iter().zip([job.step, job.total_steps, job.tokens, job.memory_bytes])
            {
                series.with_label_values(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
            }
            let values = [
                Some(job.epoch),
                Some(job.loss),
                job.validation_loss,
                job.reward,
                job.validation_reward,
                Some(job.learning_rate),
                Some(job.grad_norm),
                Some(job.tokens_per_second),
                Some(job.eta_seconds),
            ];
            for (series, value) in numbers.iter().zip(values) {
                if let Some(value) = value {
                    series.with_label_values(&labels).set(value);
                }
            }
        }
    }
}
