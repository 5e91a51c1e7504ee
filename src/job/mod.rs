//! Jobs as plain data, shared by the gateway, the command line and the job process. There are no
//! tensors in this module.
//!
//! A job consists of an order in a folder, a process that carries it out, and the files in that
//! folder:
//!
//! ```text
//! order.json      the resolved specification; written once, before anything else
//! events.jsonl    the event log, one event per line
//! log.txt         standard error of the process
//! rollouts.jsonl  the completions that a policy was trained on
//! made/           examples that the job made, and reports about them
//! finish          asks the job to end training early and to keep what it has learned
//! cache/          tokenized data
//! checkpoints/    step-N/, written atomically
//! artifacts/      the files that the job produces
//! waits.json      what a job that exited before its end waits for
//! outcome.json    how the job ended; written last and atomically
//! ```
//!
//! The folder is the only state shared by a job and the process that started it. If either process
//! dies, the other finds the whole state in the folder. The job process stops at SIGTERM, after it
//! has written a checkpoint, and when its standard input closes, which means that its parent has
//! ended.
//!
//! | file | content |
//! |---|---|
//! | `kinds.rs` | [`JobSpec`], [`JobOrder`]: a job of any kind |
//! | `spec/` | [`Spec`](spec::Spec): the specification of training, its defaults and checks |
//! | `resolve.rs` | [`ResolvedJob`]: resolves a specification and the files that it names to an order |
//! | `order.rs` | [`Order`]: a specification of training with every name replaced by a file |
//! | `folder.rs` | [`Folder`]: reads and writes the files above |
//! | `events.rs` | [`EventLog`], [`Follower`]: write and read `events.jsonl` |
//! | `outcome.rs` | [`Outcome`]: how the job ended, and its files |
//! | `estimate.rs` | [`ResourceEstimate`]: memory and disk space that a job needs |
//! | `rollout.rs` | messages between a job that trains a policy and the gateway |
//! | `rollout_table.rs` | the completions that a policy was trained on |
//! | `quantize.rs` | what a quantization is; it runs in the process of `ingot quantize`, or of a job |
//! | `imatrix.rs` | what the computation of an importance matrix is; it runs in the process of `ingot imatrix` |
//! | `evaluation.rs`, `evaluation_report.rs` | what an evaluation is, and its report; it runs in the process of `ingot eval`, or of a job |
//! | `evaluation_job.rs` | [`EvaluateSpec`], [`EvaluateOrder`]: jobs that evaluate |
//! | `export.rs`, `card.md` | what an export is, and its model card; it runs in the process of `ingot export` |
//! | `rate.rs` | shares with intervals |
//! | `verify.rs` | what a verification is; it runs in the process of `ingot verify` |
//! | `control.rs` | [`Control`]: what is asked of a job while it runs |
//! | `process.rs` | starting the job process, and its exit codes |
//! | `work.rs` | [`main()`]: what every job process does, around the work of its kind |
//! | `plot.rs`, `report.rs` | plots of a job as SVG; its report as HTML |

mod control;
mod estimate;
mod evaluation;
mod evaluation_job;
mod evaluation_report;
mod events;
mod export;
mod folder;
mod imatrix;
mod kinds;
mod order;
mod outcome;
mod plot;
mod process;
mod quantize;
mod rate;
mod report;
mod resolve;
pub mod rollout;
pub mod rollout_table;
pub mod spec;
mod verify;
mod work;

pub use control::Control;
pub use estimate::ResourceEstimate;
pub use evaluation::{
    DivergenceReport, EVAL_CONTEXT, EvalError, EvalModel, EvalPlan, EvalProgress, EvalReference,
    EvalReport, EvalSample, EvalTask, Gate, GateReport, Generation, GenerationSettings, Interval,
    ModelReport, MultipleChoice, Questions, TaskReport, TextFacts, question_text,
};
pub use evaluation_job::{
    Evaluate, EvaluateKind, EvaluateOrder, EvaluateSpec, EvaluateTask, OrderFault,
};
pub use events::{
    DataReport, Entry, EventLog, Follower, JobEvent, Level, Metrics, REWARD, StepMetrics,
    Validation, now,
};
pub use export::{
    EvaluationFacts, ExportAdapter, ExportFormat, ExportPlan, ExportRefused, ModelCard,
};
pub use folder::{Folder, write_whole};
pub use imatrix::{IMATRIX_CONTEXT, ImatrixPlan, ImatrixReport};
pub use kinds::{JobOrder, JobSpec};
pub use order::{Order, name_of};
pub use outcome::{Artifact, ArtifactKind, Failure, Outcome};
pub use plot::plot;
pub use process::{DISK_FULL, DONE, Process, STOPPED, WAITS, spawn};
pub use quantize::{
    CompressError, ModelType, QuantizeKind, QuantizeOrder, QuantizePlan, QuantizeReport,
    QuantizeSettings, QuantizeSpec, QuantizedTensor, TensorOverride, tensor_type,
};
pub use rate::Rate;
pub use report::report;
pub use resolve::{BaseModel, InitAdapter, ResolveError, ResolvedJob, Sources};
pub use verify::{
    RunnerSummary, VERIFY_WINDOW, VerifyCheck, VerifyError, VerifyPlan, VerifyProgress,
    VerifyReport,
};
pub use work::{JobError, JobFailure, JobWork, classify, failed, main, run};
