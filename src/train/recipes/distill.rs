//! Distillation: a student learns the token distributions of a teacher. The loss is in
//! `ops/cpu/distillation.rs`; `teacher.rs` runs the teacher, `on_policy.rs` samples completions of the
//! student.

use super::on_policy::{Mixture, OnPolicy};
use super::run::{
    BatchSource, Each, Event, LossSums, MicroBatch, Outcome, Run, StepCount, TrainError,
};
use super::teacher::{Teacher, TeacherCache};
use super::{Job, Recipe, Student};
use crate::gguf::keep_layers;
use crate::job::spec::Distill;
use crate::job::{Control, write_whole};
use crate::train::data::{Cursor, Encoded, Order, Prepared, pack};
use crate::train::model::{Batch, Gradients, Model, Pass};
use crate::train::ops::{Distillation, DistillationSums};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Tokens on which the loss without each layer is measured, at least if there are so many.
const SAMPLE: usize = 1_024;
/// File of the losses before training.
const BEFORE: &str = "before.json";

/// The report of a job, an artifact.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    before: Before,
    /// Loss after training, in nats per token.
    student: f64,
    /// Share of the difference between student and teacher that training has made up for.
    recovered: Option<f64>,
}

/// Losses of the validation data before training, in nats per token.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Before {
    teacher: f64,
    student_before: f64,
}

impl Recipe for Distill {
    type Data = Prepared;

    fn student(&self, mut student: Student<'_, Prepared>) -> Result<bool, TrainError> {
        let Some(layers) = self.layers else { return Ok(false) };
        if !student.path.exists() {
            let kept = self.kept(layers, &mut student)?;
            keep_layers(student.base, &kept, student.path)?;
        }
        Ok(true)
    }

    fn run(
        &self,
        job: &Job<'_, Prepared>,
        control: &Control,
        event: &mut dyn FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let Some(path) = job.teacher else {
            return Err(TrainError::Spec("distill.teacher: name the teacher".into()));
        };
        let teacher = Teacher::load(path, self, job)?;
        let on_policy = OnPolicy::new(self, job, control, event)?;
        let cache = |data: &Prepared, name: &str| {
            TeacherCache::open(&job.making.cache.join(name), data, teacher.top_k)
        };
        let mut source = Examples {
            block: self,
            job,
            order: Order::new(job.train.len(), job.shuffle),
            caches: [
                Some(Arc::new(cache(job.train, "teacher.train")?)),
                job.validation
                    .map(|data| cache(data, "teacher.validation").map(Arc::new))
                    .transpose()?,
            ],
            teacher: Arc::new(teacher),
            on_policy,
            measured: LossSums::default(),
        };
        let run = Run { model: job.model, settings: job.settings, checkpoints: job.checkpoints };
        let before = source.before(&run, event)?;
        let outcome = run.run(&mut source, control, &mut |told| event(told))?;
        if let (Some(before), Outcome::Done { .. }) = (before, outcome)
            && let Some(student) = cross_entropy(&run, &source)?
        {
            source.report(before, student, event)?;
        }
        Ok(outcome)
    }
}

impl Distill {
    /// The layers that the student keeps: again and again the one is removed without which the loss
    /// is lowest.
    fn kept(
        &self,
        layers: usize,
        student: &mut Student<'_, Prepared>,
    ) -> Result<Vec<usize>, TrainError> {
        let model = super::teacher::frozen(student.base.clone(), student.settings, student.device)?;
        let mut kept: Vec<usize> = (0..model.shape().layers).collect();
        let batch = sample(student.data)?;
        let tokens: f64 = batch.weights.iter().map(|weight| f64::from(*weight)).sum();
        let per_token = |sum: f64| sum / tokens.max(1.0);
        let of_all = model.losses(&batch)?.sum.to_dtype(candle_core::DType::F64)?;
        let mut before = per_token(of_all.to_scalar::<f64>()?);
        while kept.len() > layers {
            if student.control.stops() {
                return Err(TrainError::Stopped);
            }
            let losses = model.losses_without_each(&batch, &kept)?;
            let all = losses.into_iter().map(per_token).enumerate();
            let least = all.min_by(|a, b| a.1.total_cmp(&b.1));
            let Some((at, loss)) = least.filter(|(_, loss)| loss.is_finite()) else {
                return Err(TrainError::NotFinite { step: 0, loss: f64::NAN });
            };
            let layer = kept.remove(at);
            let text = format!(
                "Layer {layer} is removed: without it the loss is {loss:.4} nats per token, before \
                 {before:.4}. {} layers are left.",
                kept.len()
            );
            (student.event)(Event::Note { text });
            before = loss;
        }
        Ok(kept)
    }
}

/// Some examples from all over the data, side by side.
fn sample(data: &Prepared) -> Result<Batch, TrainError> {
    let all: usize = (0..data.len()).map(|example| data.length(example)).sum();
    let every = (all / SAMPLE).clamp(1, data.len().max(1));
    let (mut found, mut tokens) = (Vec::new(), 0);
    for example in (0..data.len()).step_by(every) {
        if tokens >= SAMPLE {
            break;
        }
        let example = data.get(example)?;
        tokens += example.tokens.len();
        found.push(example);
    }
    Ok(Batch::of(&found))
}

/// The cross-entropy of the validation data.
fn cross_entropy(run: &Run<'_>, source: &Examples<'_>) -> Result<Option<f64>, TrainError> {
    let found = run.evaluate(source, 0)?;
    Ok(found.and_then(|found| found.metrics.get("cross_entropy").copied()))
}

/// Examples with the teacher's distributions.
struct Examples<'a> {
    block: &'a Distill,
    job: &'a Job<'a, Prepared>,
    order: Order,
    teacher: Arc<Teacher>,
    /// Of the training and of the validation data.
    caches: [Option<Arc<TeacherCache>>; 2],
    on_policy: Option<OnPolicy<'a>>,
    /// The metrics of the last batch's sampling.
    measured: LossSums,
}

/// Examples that are computed in one pass. The teacher's distributions are read or computed in this
/// pass, so that those of one micro-batch at a time are in memory.
struct DistillationBatch<'a> {
    batch: Batch,
    /// Numbers of the examples in the data, by which `cache` finds them; unused without a cache.
    numbers: Vec<usize>,
    block: &'a Distill,
    teacher: Arc<Teacher>,
    cache: Option<Arc<TeacherCache>>,
}

impl<'a> Examples<'a> {
    /// Packs examples into rows, and groups the rows into micro-batches.
    fn read(
        &self,
        data: &Prepared,
        cache: Option<&Arc<TeacherCache>>,
        numbers: &[usize],
    ) -> Result<Vec<DistillationBatch<'a>>, TrainError> {
        let examples: Vec<Encoded> =
            numbers.iter().map(|&example| data.get(example)).collect::<Result<_, _>>()?;
        Ok(self.pack(&examples, cache, numbers))
    }

    fn pack(
        &self,
        examples: &[Encoded],
        cache: Option<&Arc<TeacherCache>>,
        numbers: &[usize],
    ) -> Vec<DistillationBatch<'a>> {
        let settings = self.job.settings;
        let lengths: Vec<_> = examples.iter().map(|example| example.tokens.len()).collect();
        let rows = pack(&lengths, settings.max_length);
        let part = |members: Vec<usize>| DistillationBatch {
            batch: Batch::of(members.iter().map(|&member| &examples[member])),
            numbers: members.iter().map(|&member| numbers[member]).collect(),
            block: self.block,
            teacher: self.teacher.clone(),
            cache: cache.cloned(),
        };
        let some = rows.chunks(settings.micro_batch);
        let some = some.map(|rows| rows.iter().flat_map(|row| row.members.clone()).collect());
        some.map(part).collect()
    }

    /// The losses before training, which an earlier process may have measured.
    fn before(
        &self,
        run: &Run<'_>,
        event: &mut dyn FnMut(Event),
    ) -> Result<Option<Before>, TrainError> {
        let Some(data) = self.job.validation else { return Ok(None) };
        let path = self.job.making.cache.join(BEFORE);
        if let Ok(bytes) = std::fs::read(&path) {
            return Ok(serde_json::from_slice(&bytes).ok());
        }
        let teacher = self.teacher.loss(data, self.job.settings)?;
        let Some(student_before) = cross_entropy(run, self)? else { return Ok(None) };
        let before = Before { teacher, student_before };
        write_whole(&path, &serde_json::to_vec(&before).map_err(std::io::Error::from)?)?;
        let text = format!(
            "Before training the loss of the validation data is {student_before:.4} nats per token, \
             the teacher's is {teacher:.4}."
        );
        event(Event::Note { text });
        Ok(Some(before))
    }

    /// Writes what training has recovered, as an artifact and as an event.
    fn report(
        &self,
        before: Before,
        student: f64,
        event: &mut dyn FnMut(Event),
    ) -> Result<(), TrainError> {
        let Before { teacher, student_before } = before;
        let lost = student_before - teacher;
        let recovered = (lost > 0.0).then(|| (student_before - student) / lost);
        let folder = self.job.making.folder;
        std::fs::create_dir_all(folder)?;
        let report = Report { before, student, recovered };
        let bytes = serde_json::to_vec_pretty(&report).map_err(std::io::Error::from)?;
        write_whole(&folder.join("distillation.json"), &bytes)?;
        let share = recovered
            .map_or_else(String::new, |share| format!(": {:.0}% is recovered", 100.0 * share));
        let text = format!(
            "The loss of the validation data is {student:.4} nats per token, before training \
             {student_before:.4}, of the teacher {teacher:.4}{share}."
        );
        event(Event::Note { text });
        Ok(())
    }
}

impl<'a> BatchSource for Examples<'a> {
    type MicroBatch = DistillationBatch<'a>;

    fn extent(&self) -> StepCount {
        StepCount::new(self.job.train.len(), self.job.settings)
    }

    fn next(
        &mut self,
        cursor: &mut Cursor,
        count: usize,
    ) -> Result<Vec<DistillationBatch<'a>>, TrainError> {
        let before = *cursor;
        let examples = self.order.next(cursor, count);
        let (data, cache) = (self.job.train, self.caches[0].as_ref());
        let Some(on_policy) = &self.on_policy else { return self.read(data, cache, &examples) };
        let Mixture { kept, sampled, measured } = on_policy.mix(data, examples, &before)?;
        let mut batches = self.read(data, cache, &kept)?;
        let numbers: Vec<usize> = (0..sampled.len()).collect();
        // Each completion is new: the teacher's distributions are not kept.
        batches.extend(self.pack(&sampled, None, &numbers));
        self.measured = measured;
        Ok(batches)
    }

    fn extra_losses(&self) -> LossSums {
        self.measured.clone()
    }

    fn held_out(&self, each: &mut Each<DistillationBatch<'a>>) -> Result<bool, TrainError> {
        let Some(data) = self.job.validation else { return Ok(false) };
        let all: Vec<usize> = (0..data.len()).collect();
        for some in all.chunks(self.job.settings.batch_size) {
            let parts = self.read(data, self.caches[1].as_ref(), some)?;
            parts.into_iter().try_for_each(&mut *each)?;
        }
        Ok(true)
    }
}

impl DistillationBatch<'_> {
    fn distillation(&self) -> Result<Distillation, TrainError> {
        let teacher = self.teacher.rows(&self.batch, &self.numbers, self.cache.as_deref())?;
        let Distill { divergence, beta, temperature, cross_entropy, .. } = *self.block;
        let teacher = Arc::new(teacher);
        Ok(Distillation { teacher, divergence, beta, temperature, cross_entropy })
    }

    fn sums(&self, (loss, sums): (f64, DistillationSums)) -> LossSums {
        let weight = self.batch.weights.iter().map(|weight| f64::from(*weight)).sum();
        let mut found =
            LossSums { loss, correct: Some(sums.correct), weight, ..LossSums::default() };
        found.measure_all("divergence", sums.divergence, weight);
        found.measure_all("cross_entropy", sums.cross_entropy, weight);
        found
    }
}

impl MicroBatch for DistillationBatch<'_> {
    fn tokens(&self) -> usize {
        self.batch.tokens.len()
    }

    fn train(
        &self,
        model: &Model,
        pass: Pass,
        gradients: &mut Gradients,
    ) -> Result<LossSums, TrainError> {
        Ok(self.sums(model.distill(&self.batch, pass, &self.distillation()?, gradients)?))
    }

    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError> {
        Ok(self.sums(model.distillation(&self.batch, &self.distillation()?)?))
    }
}
