//! The step loop: schedule -> run -> sample -> emit.

use super::commands::{AdapterFacts, Command};
use super::grammar::MaskWorker;
use super::kv::KvCacheManager;
use super::output_processor::OutputProcessor;
use super::runner::{Batch, BatchSequence, ModelRunner, Ran, RunnerError, Wants};
use super::sampler::Scratch;
use super::scheduler::{Limits, ScheduledSequence, Scheduler, SchedulerOutput};
use super::sequence::SeqKey;
use super::speculate::DraftModel;
use crate::ipc::{AdapterId, EngineError, FromEngine, LoadSpec, RequestId, Speculate, Token};
use crate::tokenizer::Tokenizer;
use crossbeam_channel::{Receiver, Sender};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One thread is enough: a mask takes a fraction of a step.
const MASK_THREADS: usize = 1;

/// Inputs to be embedded or scored. They are computed in chunks of rows between steps, so that a
/// long input or a long list does not block other requests.
pub(super) struct Pooling {
    pub call: u64,
    pub inputs: VecDeque<Vec<Token>>,
    /// Rows of the first input that have been computed.
    pub done: usize,
    pub tokens: u32,
    pub adapter: Option<AdapterId>,
    /// Head of the reward model, shape (width); it turns pooled rows into scores.
    pub head: Option<Arc<[f32]>>,
    pub vectors: Vec<Vec<f32>>,
    pub scores: Vec<f32>,
}

pub(super) struct StepLoop {
    pub(super) runner: Box<dyn ModelRunner>,
    pub(super) tokenizer: Arc<dyn Tokenizer>,
    pub(super) scheduler: Scheduler,
    pub(super) kv: KvCacheManager,
    pub(super) output: OutputProcessor,
    pub(super) commands: Receiver<Command>,
    /// Commands that arrived while a step was running.
    pub(super) early: VecDeque<Command>,
    /// Requests that were cancelled before they left intake.
    pub(super) cancelled: BTreeSet<RequestId>,
    pub(super) poolings: VecDeque<Pooling>,
    /// The installed adapters.
    pub(super) adapters: HashMap<AdapterId, AdapterFacts>,
    /// Adapters to remove as soon as no sequence uses them.
    pub(super) retiring: Vec<AdapterId>,
    pub(super) scratch: Scratch,
    /// A copy of the model's own logits, if they are needed after sampling.
    pub(super) row: Vec<f32>,
    /// The logits of `row` divided by a temperature.
    pub(super) tempered: Vec<f32>,
    draft_model: Option<DraftModel>,
    masks: MaskWorker<SeqKey>,
    batch: Batch,
}

impl StepLoop {
    pub(super) fn new(
        runner: Box<dyn ModelRunner>,
        draft: Option<Box<dyn ModelRunner>>,
        spec: &LoadSpec,
        commands: Receiver<Command>,
        frames: Sender<FromEngine>,
    ) -> Result<Self, EngineError> {
        let info = runner.info();
        let limits = Limits {
            max_sequences: info.max_sequences as usize,
            batch_tokens: spec.batch_tokens as usize,
            target_step: Duration::from_millis(u64::from(spec.target_step_ms)),
            first_step: Duration::try_from_secs_f32(info.step_seconds).unwrap_or_default(),
            queue_limit: spec.queue_limit as usize,
            mixes_adapters: info.mixes_adapters,
            speculate: if info.speculates { spec.speculate } else { Speculate::Off },
        };
        let kv = KvCacheManager::new(
            info.kv_pages,
            runner.slots(),
            runner.slots_hold_pages(),
            info.shares_prefixes,
        );
        Ok(Self {
            tokenizer: runner.tokenizer(),
            scheduler: Scheduler::new(limits),
            kv,
            output: OutputProcessor::new(frames),
            commands,
            early: VecDeque::new(),
            cancelled: BTreeSet::new(),
            poolings: VecDeque::new(),
            adapters: HashMap::new(),
            retiring: Vec::new(),
            scratch: Scratch::default(),
            row: Vec::new(),
            tempered: Vec::new(),
            draft_model: draft.map(|draft| DraftModel::new(draft, info.vocab_size as usize)),
            masks: MaskWorker::new(MASK_THREADS, limits.max_sequences)?,
            batch: Batch::default(),
            runner,
        })
    }

    /// Runs until shutdown.
    pub(super) fn run(mut self) {
        let mut idle = true;
        while self.drain_commands(idle) {
            let pooled = self.pool_chunk();
            let stepped = self.step();
            idle = !pooled && !stepped;
            self.output.report(&self.scheduler, &self.kv, self.adapters.len(), idle);
        }
    }

    /// Runs one step. Returns false if no sequence could run.
    fn step(&mut self) -> bool {
        let mut plan = self.scheduler.schedule(&mut self.kv);
        self.scheduler.draft(&mut plan, &mut self.kv, self.draft_model.as_mut());
        self.prepare(&plan);
        if plan.work.is_empty() {
            return false;
        }
        self.submit_masks(&plan);
        // Clients learn that they were admitted before a long step, not after it.
        self.output.flush();
        self.output.expect(self.scheduler.expected(&plan));
        let started = Instant::now();
        let ran = self.run_batch(&plan);
        let took = started.elapsed();
        self.collect_masks();
        match ran {
            // The step counts as not scheduled; the commands that interrupted it are handled first.
            Ok(Ran::Interrupted) => {}
            Ok(Ran::Complete) => {
                tracing::trace!(decoding = plan.decoding, prefill = plan.prefill, ?took, "step");
                self.scheduler.observe(&plan, took);
                self.output.stepped(self.batch.tokens.len(), plan.decoding, plan.prefill);
                for (key, rows) in self.commit(&plan) {
                    self.sample(key, rows);
                }
            }
            Err(error) => self.fail_batch(&plan, &error),
        }
        self.output.flush();
        true
    }

    /// Runs the batch. A step of prompts alone may take long: it is abandoned on shutdown, or when
    /// the clients of half its rows have disconnected.
    fn run_batch(&mut self, plan: &SchedulerOutput) -> Result<Ran, RunnerError> {
        if plan.decoding > 0 {
            return self.runner.step(&self.batch).map(|()| Ran::Complete);
        }
        let rows_of = |request: RequestId| {
            let mine = |work: &&ScheduledSequence| {
                self.scheduler.running[work.index].key.request == request
            };
            plan.work.iter().filter(mine).map(|work| work.rows).sum::<usize>()
        };
        let (commands, early) = (&self.commands, &mut self.early);
        let mut gone = 0;
        let mut interrupt = || {
            while let Ok(command) = commands.try_recv() {
                match &command {
                    Command::Cancel(request) => gone += rows_of(*request),
                    Command::Shutdown => gone = usize::MAX / 2,
                    _ => {}
                }
                early.push_back(command);
            }
            gone > 0 && 2 * gone >= plan.prefill
        };
        self.runner.run(&self.batch, &mut interrupt)
    }

    /// Applies the plan's cache changes to the runner and fills the batch.
    fn prepare(&mut self, plan: &SchedulerOutput) {
        self.kv.apply_changes(&mut *self.runner);
        for &(request, cached) in &plan.admitted {
            self.output.started(request, cached);
        }
        self.batch.clear();
        self.batch.adapter = plan.adapter;
        for work in &plan.work {
            let sequence = &self.scheduler.running[work.index];
            let pages = sequence.pages.as_ref().expect("running sequences have pages");
            let (start, from) = (self.batch.tokens.len(), sequence.computed);
            self.batch.tokens.extend_from_slice(&sequence.tokens[from..from + work.rows]);
            self.batch.tokens.extend_from_slice(sequence.draft(work.drafted));
            self.batch.sequences.push(BatchSequence {
                slot: pages.slot,
                rows: start..self.batch.tokens.len(),
                position: from,
                wants: if work.drafted > 0 { Wants::AllLogits } else { work.wants },
                pages: pages.page_ids().collect(),
                adapter: sequence.facts.adapter,
            });
        }
    }

    /// Starts to compute grammar masks. They depend only on tokens already sampled, so they are
    /// computed while the model runs.
    fn submit_masks(&mut self, plan: &SchedulerOutput) {
        for work in plan.work.iter().filter(|work| work.samples) {
            let sequence = &mut self.scheduler.running[work.index];
            if let Some(grammar) = sequence.grammar.take_if(|grammar| grammar.needs_mask()) {
                self.masks.submit(sequence.key, grammar);
            }
        }
    }

    fn collect_masks(&mut self) {
        for masked in self.masks.collect() {
            if let Some(sequence) = self.scheduler.sequence_mut(masked.key) {
                sequence.grammar = Some(masked.grammar);
                sequence.failed = masked.result.err();
            }
        }
    }

    /// Marks the plan's rows as computed. Returns the sequences whose next token can be sampled,
    /// each with the rows of its logits: the first row is the next token's, the rows of a draft
    /// follow.
    fn commit(&mut self, plan: &SchedulerOutput) -> Vec<(SeqKey, Range<usize>)> {
        let (mut complete, mut echoed) = (Vec::new(), Vec::new());
        for (work, rows) in plan.work.iter().zip(&self.batch.sequences) {
            let sequence = &mut self.scheduler.running[work.index];
            sequence.computed += work.rows;
            let pages = sequence.pages.as_mut().expect("running sequences have pages");
            self.kv.commit(pages, &sequence.tokens[..sequence.computed]);
            let key = sequence.key;
            if work.samples {
                complete.push((key, rows.rows.end - 1 - work.drafted..rows.rows.end));
            }
            if work.wants == Wants::AllLogits {
                echoed.push((key, rows.rows.clone(), rows.position));
            }
        }
        for (key, rows, position) in echoed {
            self.score_prompt(key, rows, position);
        }
        // Drafts release pages that forking a prompt's other choices may need.
        complete.sort_by_key(|(_, rows)| rows.len() == 1);
        complete
    }

    /// Handles a failed runner step: every request in the batch fails, all others continue.
    fn fail_batch(&mut self, plan: &SchedulerOutput, error: &RunnerError) {
        tracing::error!("a step of {} rows failed: {error}", self.batch.tokens.len());
        let requests: Vec<_> =
            plan.work.iter().map(|work| self.scheduler.running[work.index].key.request).collect();
        for request in requests {
            self.fail(request, EngineError::internal(format!("the model failed: {error}")));
        }
    }
}
