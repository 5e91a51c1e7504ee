//! Arguments to role.

use clap::Parser;
use ingot::cli::{self, BenchCommand, Cli, CliError, Command};
use ingot::isa::choose_isa_of_environment;
use ingot::job::{JobFailure, JobOrder, JobWork, Outcome};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    if let Err(error) = choose_isa_of_environment() {
        eprintln!("ingot: INGOT_ISA: {error}");
        return ExitCode::FAILURE;
    }
    let outcome = match Cli::parse().command {
        Command::Engine => return ingot::engine::main(),
        Command::Job { folder } => return ingot::job::main(&folder, work),
        Command::Version => return cli::version::main(),
        Command::Serve(options) => serve(*options),
        Command::Run(options) => cli::run::main(options),
        Command::Pull(options) => cli::pull::main(options),
        Command::Models(options) => cli::models::main(options),
        Command::Train(options) => cli::train::main(options),
        Command::Jobs(options) => cli::jobs::main(options),
        Command::Quantize(options) => cli::quantize::main(*options, ingot::compress::quantize),
        Command::Imatrix(options) => cli::imatrix::main(*options, ingot::compress::imatrix),
        Command::Eval(options) => cli::eval::main(*options, ingot::evaluate::evaluate),
        Command::Export(options) => {
            cli::export::main(*options, ingot::train::export::export, ingot::compress::quantize)
        }
        Command::Publish(options) => cli::publish::publish(options),
        Command::Rollback(options) => cli::publish::rollback(options),
        Command::Verify(options) => cli::verify::main(options, ingot::evaluate::verify::verify),
        Command::Bench(BenchCommand::Serve(options)) => cli::bench_serve::main(*options),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("ingot: {error}");
        ExitCode::FAILURE
    })
}

/// The work of a job's kind.
fn work(order: &JobOrder, work: JobWork<'_>) -> Result<Option<Outcome>, JobFailure> {
    match order {
        JobOrder::Train(order) => ingot::train::process::carry_out(order, work),
        JobOrder::Quantize(order) => ingot::compress::job::carry_out(order, work),
        JobOrder::Evaluate(order) => ingot::evaluate::job::carry_out(order, work),
    }
}

fn serve(options: ingot::config::ServeOptions) -> Result<ExitCode, CliError> {
    ingot::gateway::serve(options.resolve()?)?;
    Ok(ExitCode::SUCCESS)
}
