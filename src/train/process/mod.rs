//! The work of a job that trains, in the process that [`crate::job::main`] sets up.
//!
//! | file | content |
//! |---|---|
//! | `run.rs` | from the order to the outcome |
//! | `data.rs`, `init.rs` | the training data, and the initial weights |
//! | `policy.rs` | the served model that a job with a grader trains |
//! | `gateway_client.rs` | the connection to the gateway, which samples completions and queries grader models |
//! | `reporter.rs`, `artifacts.rs` | events while the job runs, files at its end |

mod artifacts;
mod data;
mod gateway_client;
mod init;
mod policy;
mod reporter;
mod run;
#[cfg(test)]
mod tests;

pub use run::carry_out;

/// Runs a job that trains, as its process does.
#[cfg(test)]
pub(in crate::train) fn run(
    folder: &crate::job::Folder,
    control: &crate::job::Control,
) -> Result<bool, crate::job::JobError> {
    crate::job::run(folder, control, |order, work| {
        carry_out(order.training().expect("a job that trains"), work)
    })
}
