//! What a job is: plain data that the gateway, the command line and the job's process share. No tensors.
//!
//! A job is an order in a folder, a process that carries it out, and what the folder then holds:
//!
//! ```text
//! order.json      what to do; written once, before anything else
//! events.jsonl    what happened, a line each
//! log.txt         what the process said on standard error
//! cache/          tokens of the data
//! checkpoints/    step-N/, whole or not there
//! artifacts/      the files that the job made
//! outcome.json    how it ended; written last, whole or not there
//! ```
//!
//! The folder is all that a job and its starter share. If either process dies, the other finds the
//! whole state there. The process stops at SIGTERM (it writes a checkpoint first) and when its standard
//! input closes, which is when its starter has ended.
//!
//! | file | what |
//! |---|---|
//! | `spec/` | [`Spec`](spec::Spec): the specification, its defaults and checks |
//! | `resolve.rs` | [`ResolvedJob`]: from a specification and the files that it names to an order |
//! | `order.rs` | [`Order`]: a specification with every name looked up |
//! | `folder.rs` | [`Folder`]: the paths above, read and written |
//! | `events.rs` | [`EventLog`], [`Follower`]: the lines of `events.jsonl` |
//! | `outcome.rs` | [`Outcome`]: how the job ended, and its files |
//! | `estimate.rs` | [`ResourceEstimate`]: memory and disk that a job takes, before it runs |
//! | `rollout.rs` | messages between a job that trains a policy and the gateway |
//! | `process.rs` | how the job's process is started, and its exit codes |
//! | `plot.rs` | curves of a job as SVG |

mod estimate;
mod events;
mod folder;
mod order;
mod outcome;
mod plot;
mod process;
mod resolve;
pub mod rollout;
pub mod spec;

pub use estimate::ResourceEstimate;
pub use events::{
    DataReport, Entry, EventLog, Follower, JobEvent, Level, Metrics, REWARD, StepMetrics,
    Validation, now,
};
pub use folder::{Folder, write_whole};
pub use order::{Order, name_of};
pub use outcome::{Artifact, ArtifactKind, Failure, Outcome};
pub use plot::plot;
pub use process::{DISK_FULL, DONE, Process, STOPPED, spawn};
pub use resolve::{BaseModel, InitAdapter, ResolveError, ResolvedJob, Sources};
