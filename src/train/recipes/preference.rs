//! Training on preference pairs: a policy that prefers the chosen completions (DPO), or a reward
//! model that scores them higher than the rejected ones.

use super::run::{
    BatchSource, Each, Event, LossSums, MicroBatch, Outcome, Run, StepCount, TrainError,
};
use crate::dataset::PairFacts;
use crate::job::spec::{Dpo, Resolved, Reward};
use crate::job::write_whole;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{Cursor, Encoded, EncodedPair, Order, PreparedPairs, pack};
use crate::train::model::{Batch, Gradients, Model, OutputGrads, Outputs, Pass, Wanted};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Interval of progress messages while reference log-probabilities are computed.
const TOLD: Duration = Duration::from_secs(10);

/// The training objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    Dpo(Dpo),
    Reward(Reward),
}

/// A training run on preference pairs.
pub struct PreferenceTrainer<'a> {
    pub model: &'a Model,
    pub settings: &'a Resolved,
    pub objective: Objective,
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

impl PreferenceTrainer<'_> {
    /// Trains from the newest checkpoint to the last step, or until `stop` is set. `model` holds
    /// the initial weights.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint is kept.
    pub fn run(
        &self,
        stop: &AtomicBool,
        mut event: impl FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let Some(references) = self.references(stop, &mut event)? else {
            return Ok(Outcome::Stopped);
        };
        let run = Run { model: self.model, settings: self.settings, checkpoints: self.checkpoints };
        let order = Order::new(self.train.len(), self.shuffle);
        run.run(&mut Examples { run: self, order, references }, stop, &mut event)
    }

    /// The reference log-probabilities of the training pairs that the run will see and of the
    /// validation pairs. They are read from the file if an earlier process wrote it. `None` if
    /// `stop` was set.
    fn references(
        &self,
        stop: &AtomicBool,
        event: &mut impl FnMut(Event),
    ) -> Result<Option<[Reference; 2]>, TrainError> {
        let Objective::Dpo(_) = self.objective else {
            return Ok(Some([Reference::new(), Reference::new()]));
        };
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
                if stop.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                for row in self.rows(data, some, None)? {
                    let outputs = self.model.outputs(&row.batch, Wanted::LOG_PROBS)?;
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

    /// Pairs packed into rows of tokens; both completions of a pair are in the same row.
    fn rows(
        &self,
        data: &PreparedPairs,
        numbers: &[usize],
        reference: Option<&Reference>,
    ) -> Result<Vec<Row>, TrainError> {
        let pairs: Vec<EncodedPair> =
            numbers.iter().map(|&number| data.get(number)).collect::<Result<_, _>>()?;
        let length =
            |pair: &EncodedPair| pair.answers.iter().map(|answer| answer.tokens.len()).sum();
        let lengths: Vec<usize> = pairs.iter().map(length).collect();
        let row = |members: Vec<usize>| -> Result<Row, TrainError> {
            let answers = members.iter().flat_map(|&member| &pairs[member].answers);
            let batch = match self.objective {
                Objective::Dpo(_) => Batch::of(answers),
                Objective::Reward(_) => ends(answers),
            };
            let mut at = 0;
            let mut rows = |answer: &Encoded| {
                let counted = match self.objective {
                    Objective::Dpo(_) => answer.targets(),
                    Objective::Reward(_) => 1,
                };
                at += counted;
                at - counted..at
            };
            let mut placed = Vec::new();
            for &member in &members {
                let (number, pair) = (numbers[member], &pairs[member]);
                let [better, worse] = &pair.answers;
                placed.push(Placed {
                    number,
                    facts: pair.facts,
                    rows: [rows(better), rows(worse)],
                    reference: reference
                        .map(|reference| {
                            let missing = || std::io::Error::other("a reference is missing");
                            reference.get(&number).copied().ok_or_else(missing)
                        })
                        .transpose()?
                        .unwrap_or_default(),
                });
            }
            Ok(Row { batch, pairs: placed, objective: self.objective })
        };
        let packed = pack(&lengths, 2 * self.settings.max_length);
        let some = packed.chunks(self.settings.micro_batch);
        some.map(|rows| row(rows.iter().flat_map(|row| row.members.clone()).collect())).collect()
    }
}

/// A batch of completions in which only the last token of each has a weight other than 0.
fn ends<'a>(answers: impl IntoIterator<Item = &'a Encoded>) -> Batch {
    let batch = Batch::of(answers);
    let mut weights = vec![0.0; batch.tokens.len()];
    let ends = batch.documents[1..].iter().chain([&weights.len()]).copied().collect::<Vec<_>>();
    ends.into_iter().for_each(|end| weights[end - 1] = 1.0);
    Batch { weights: Arc::new(weights), ..batch }
}

fn sum(outputs: &Outputs, rows: Range<usize>) -> f64 {
    outputs.log_probs[rows].iter().sum()
}

/// Pairs that are computed in one pass.
struct Row {
    batch: Batch,
    pairs: Vec<Placed>,
    objective: Objective,
}

/// A pair, and the ranges of its completions among the rows with a weight other than 0.
struct Placed {
    number: usize,
    facts: PairFacts,
    rows: [Range<usize>; 2],
    reference: [f64; 2],
}

impl Row {
    fn wanted(&self) -> Wanted {
        match self.objective {
            Objective::Dpo(_) => Wanted::LOG_PROBS,
            Objective::Reward(_) => Wanted::VALUES,
        }
    }

    /// The loss, and its gradient with respect to the outputs.
    fn loss(&self, outputs: &Outputs) -> (LossSums, OutputGrads) {
        let mut sums = LossSums { weight: self.pairs.len() as f64, ..LossSums::default() };
        let mut slopes = OutputGrads {
            log_probs: vec![0.0; outputs.log_probs.len()],
            values: vec![0.0; outputs.values.len()],
        };
        for pair in &self.pairs {
            let (found, scores) = match self.objective {
                Objective::Dpo(dpo) => {
                    let policy = pair.rows.clone().map(|rows| sum(outputs, rows));
                    let tokens = pair.rows.clone().map(|rows| rows.len());
                    let found = dpo.pair(policy, pair.reference, tokens, pair.facts.label);
                    for which in 0..2 {
                        slopes.log_probs[pair.rows[which].clone()].fill(found.slopes[which]);
                    }
                    let [better, worse] = policy;
                    sums.measure("logps_chosen", better);
                    sums.measure("logps_rejected", worse);
                    let [by_better, by_worse] = pair.reference;
                    (found, [dpo.reward(better, by_better), dpo.reward(worse, by_worse)])
                }
                Objective::Reward(reward) => {
                    let scores = pair.rows.clone().map(|rows| outputs.values[rows.start]);
                    let found = reward.pair(scores, pair.facts.margin, pair.facts.label);
                    for which in 0..2 {
                        slopes.values[pair.rows[which].start] = found.slopes[which];
                    }
                    (found, scores)
                }
            };
            let [better, worse] = scores;
            sums.loss += found.loss;
            *sums.correct.get_or_insert_default() += f64::from(better > worse);
            sums.measure("reward_chosen", better);
            sums.measure("reward_rejected", worse);
            sums.measure("reward_margin", better - worse);
        }
        (sums, slopes)
    }
}

impl MicroBatch for Row {
    fn tokens(&self) -> usize {
        self.batch.tokens.len()
    }

    fn train(
        &self,
        model: &Model,
        pass: Pass,
        gradients: &mut Gradients,
    ) -> Result<LossSums, TrainError> {
        let mut found = LossSums::default();
        model.train_with(&self.batch, pass, self.wanted(), gradients, |outputs| {
            let (sums, slopes) = self.loss(outputs);
            found = sums;
            slopes
        })?;
        Ok(found)
    }

    fn evaluate_part(&self, model: &Model) -> Result<LossSums, TrainError> {
        Ok(self.loss(&model.outputs(&self.batch, self.wanted())?).0)
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
        matches!(self.run.objective, Objective::Dpo(_)).then(|| &self.references[which])
    }
}

impl BatchSource for Examples<'_> {
    type MicroBatch = Row;

    fn extent(&self) -> StepCount {
        StepCount::new(self.run.train.len(), self.run.settings)
    }

    fn next(&mut self, cursor: &mut Cursor, count: usize) -> Result<Vec<Row>, TrainError> {
        let pairs = self.order.next(cursor, count);
        self.run.rows(self.run.train, &pairs, self.reference(0))
    }

    fn held_out(&self, each: &mut Each<Row>) -> Result<bool, TrainError> {
        let Some(data) = self.run.validation else { return Ok(false) };
        let all: Vec<usize> = (0..data.len()).collect();
        for some in all.chunks(self.run.settings.batch_size) {
            self.run.rows(data, some, self.reference(1))?.into_iter().try_for_each(&mut *each)?;
        }
        Ok(true)
    }
}
