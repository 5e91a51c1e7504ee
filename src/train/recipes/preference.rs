//! Training on preference pairs, for any [`Objective`].

use super::Job;
use super::run::{
    BatchSource, Each, Event, LossSums, MicroBatch, Outcome, Run, StepCount, TrainError,
};
use crate::dataset::PairFacts;
use crate::job::Control;
use crate::job::spec::Resolved;
use crate::job::write_whole;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{
    Cursor, Encoded, EncodedPair, Order, PackedGroups, PreparedPairs, pack_groups,
};
use crate::train::model::{Batch, Gradients, Model, OutputGrads, Outputs, Pass, Wanted};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

/// Interval of progress messages while reference log-probabilities are computed.
const TOLD: Duration = Duration::from_secs(10);

/// The quantity in which the chosen completion of a pair should exceed the rejected one.
pub(super) trait Objective: Debug + Sync {
    /// The outputs of the model that the loss depends on.
    fn outputs(&self) -> Wanted;

    /// Whether the loss depends on the log-probabilities by the initial model.
    fn needs_reference(&self) -> bool;

    /// A completion after its prompt, whose trained tokens are those that the loss needs outputs of.
    fn example(&self, completion: Encoded) -> Encoded;

    /// The loss of a pair, and the scores of its completions. Sets the gradient with respect to
    /// their rows, and measures what is particular to the objective.
    fn loss(
        &self,
        pair: &Placed,
        outputs: &Outputs,
        gradients: &mut OutputGrads,
        sums: &mut LossSums,
    ) -> (f64, [f64; 2]);
}

/// A training run on preference pairs.
pub(super) struct PreferenceTrainer<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub objective: &'a dyn Objective,
    pub train: &'a PreparedPairs,
    pub validation: Option<&'a PreparedPairs>,
    pub checkpoints: &'a Checkpoints,
    /// Shuffle seed; `None` keeps the file's order.
    pub shuffle: Option<u64>,
    /// File of the reference log-probabilities, those of the initial model.
    pub reference: &'a Path,
}

/// Reference log-probabilities (chosen, rejected) by pair number.
type Reference = BTreeMap<usize, [f64; 2]>;

impl<'a> PreferenceTrainer<'a> {
    pub(super) fn new(objective: &'a dyn Objective, job: &Job<'a, PreparedPairs>) -> Self {
        Self {
            model: job.model,
            settings: job.settings,
            objective,
            train: job.train,
            validation: job.validation,
            checkpoints: job.checkpoints,
            shuffle: job.shuffle,
            reference: job.reference,
        }
    }

    /// Trains from the newest checkpoint to the last step, or until `control` stops it. `model` holds
    /// the initial weights.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint is kept.
    pub(super) fn run(
        &self,
        control: &Control,
        mut event: impl FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let Some(references) = self.references(control, &mut event)? else {
            return Ok(Outcome::Stopped);
        };
        let run = Run { model: self.model, settings: self.settings, checkpoints: self.checkpoints };
        let order = Order::new(self.train.len(), self.shuffle);
        run.run(&mut Examples { run: self, order, references }, control, &mut event)
    }

    /// The reference log-probabilities of the training pairs that the run will see and of the
    /// validation pairs. They are read from the file if an earlier process wrote it. `None` if
    /// `control` stopped it.
    fn references(
        &self,
        control: &Control,
        event: &mut impl FnMut(Event),
    ) -> Result<Option<[Reference; 2]>, TrainError> {
        if !self.objective.needs_reference() {
            return Ok(Some([Reference::new(), Reference::new()]));
        }
        match fs::read(self.reference) {
            Ok(bytes) => {
                let found = rmp_serde::from_slice(&bytes);
                return found.map(Some).map_err(|error| std::io::Error::other(error).into());
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        let seen = self.seen();
        let others: BTreeSet<usize> = (0..self.validation.map_or(0, PreparedPairs::len)).collect();
        let total = seen.len() + others.len();
        let (mut done, mut told) = (0, Instant::now());
        let mut found = [Reference::new(), Reference::new()];
        let sides = [(Some(self.train), seen), (self.validation, others)];
        for (reference, (data, pairs)) in found.iter_mut().zip(sides) {
            let (Some(data), pairs) = (data, Vec::from_iter(pairs)) else { continue };
            for some in pairs.chunks(self.settings.batch_size) {
                if control.stops() {
                    return Ok(None);
                }
                for row in self.rows(data, some, None)? {
                    let outputs = self.model.outputs(&row.batch, self.objective.outputs())?;
                    for pair in &row.pairs {
                        reference
                            .insert(pair.number, pair.rows.clone().map(|rows| sum(&outputs, rows)));
                    }
                }
                done += some.len();
                if told.elapsed() > TOLD {
                    told = Instant::now();
                    let text = format!("The reference has read {done} of {total} pairs.");
                    event(Event::Note { text });
                }
            }
        }
        let bytes = rmp_serde::to_vec(&found).map_err(std::io::Error::other)?;
        write_whole(self.reference, &bytes)?;
        Ok(Some(found))
    }

    /// Numbers of the training pairs that the run will see.
    fn seen(&self) -> BTreeSet<usize> {
        let all = self.train.len();
        let seen = StepCount::new(all, self.settings).seen().min(all as u64);
        Order::new(all, self.shuffle)
            .next(&mut Cursor::default(), seen as usize)
            .into_iter()
            .collect()
    }

    /// Pairs packed for passes; both completions of a pair are in the same pass and share the rows
    /// of their prompt.
    fn rows(
        &self,
        data: &PreparedPairs,
        numbers: &[usize],
        reference: Option<&Reference>,
    ) -> Result<Vec<Row<'a>>, TrainError> {
        let (mut examples, mut lengths, mut facts) = (Vec::new(), Vec::new(), Vec::new());
        for &number in numbers {
            let EncodedPair { answers, facts: of_pair } = data.get(number)?;
            lengths.extend(answers.iter().map(|answer| answer.tokens.len()));
            examples.extend(answers.map(|answer| self.objective.example(answer)));
            facts.push(of_pair);
        }
        let reference = |number: usize| match reference {
            None => Ok([0.0; 2]),
            Some(reference) => {
                let missing = || std::io::Error::other("a reference is missing");
                reference.get(&number).copied().ok_or_else(missing)
            }
        };
        let row = |pass: PackedGroups| -> Result<Row<'a>, TrainError> {
            let counted = pass.counted(&examples);
            let pairs = counted.chunks_exact(2).map(|pair| {
                let (first, number) = (pair[0].0, numbers[pair[0].0 / 2]);
                Ok::<_, TrainError>(Placed {
                    number,
                    facts: facts[first / 2],
                    rows: [pair[0].1.clone(), pair[1].1.clone()],
                    reference: reference(number)?,
                })
            });
            Ok(Row {
                pairs: pairs.collect::<Result<_, _>>()?,
                tokens: pass.members().map(|member| lengths[member]).sum(),
                batch: pass.batch(&examples),
                objective: self.objective,
            })
        };
        let pairs = (0..numbers.len()).map(|pair| vec![2 * pair, 2 * pair + 1]);
        let capacity = 2 * self.settings.max_length * self.settings.micro_batch;
        pack_groups(&examples, pairs, capacity).into_iter().map(row).collect()
    }
}

/// The log-probability of a completion.
pub(super) fn sum(outputs: &Outputs, rows: Range<usize>) -> f64 {
    outputs.log_probs[rows].iter().sum()
}

/// Pairs that are computed in one pass.
struct Row<'a> {
    batch: Batch,
    /// Number of tokens of the completions, each with its prompt.
    tokens: usize,
    pairs: Vec<Placed>,
    objective: &'a dyn Objective,
}

/// A pair, and the ranges of its completions among the rows with a weight other than 0.
pub(super) struct Placed {
    number: usize,
    pub facts: PairFacts,
    pub rows: [Range<usize>; 2],
    pub reference: [f64; 2],
}

impl Row<'_> {
    /// The loss, and its gradient with respect to the outputs.
    fn loss(&self, outputs: &Outputs) -> (LossSums, OutputGrads) {
        let mut sums = LossSums { weight: self.pairs.len() as f64, ..LossSums::default() };
        let mut gradients = OutputGrads {
            log_probs: vec![0.0; outputs.log_probs.len()],
            values: vec![0.0; outputs.values.len()],
        };
        for pair in &self.pairs {
            let (loss, [better, worse]) =
                self.objective.loss(pair, outputs, &mut gradients, &mut sums);
            sums.loss += loss;
            *sums.correct.get_or_insert_default() += f64::from(better > worse);
            sums.measure("reward_chosen", better);
            sums.measure("reward_rejected", worse);
            sums.measure("reward_margin", better - worse);
        }
        (sums, gradients)
    }
}

impl MicroBatch for Row<'_> {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn train(
        &self,
        model: &Model,
        pass: Pass,
        gradients: &mut Gradients,
    ) -> Result<LossSums, TrainError> {
        let mut found = LossSums::default();
        model.train_with(&self.batch, pass, self.objective.outputs(), gradients, |outputs| {
            let (sums, slopes) = self.loss(outputs);
            found = sums;
            slopes
        })?;
        Ok(found)
    }

    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError> {
        Ok(self.loss(&model.outputs(&self.batch, self.objective.outputs())?).0)
    }
}

/// The batches of preference pairs, one per step.
struct Examples<'a> {
    run: &'a PreferenceTrainer<'a>,
    order: Order,
    references: [Reference; 2],
}

impl Examples<'_> {
    fn reference(&self, which: usize) -> Option<&Reference> {
        self.run.objective.needs_reference().then(|| &self.references[which])
    }
}

impl<'a> BatchSource for Examples<'a> {
    type MicroBatch = Row<'a>;

    fn extent(&self) -> StepCount {
        StepCount::new(self.run.train.len(), self.run.settings)
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Row<'a>>, TrainError> {
        let pairs = self.order.next(cursor, count);
        self.run.rows(self.run.train, &pairs, self.reference(0))
    }

    fn held_out(&self, each: &mut Each<Row<'a>>) -> Result<bool, TrainError> {
        let Some(data) = self.run.validation else { return Ok(false) };
        let all: Vec<usize> = (0..data.len()).collect();
        for some in all.chunks(self.run.settings.batch_size) {
            self.run.rows(data, some, self.reference(1))?.into_iter().try_for_each(&mut *each)?;
        }
        Ok(true)
    }
}
