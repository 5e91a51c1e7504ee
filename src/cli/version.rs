//! `ingot version`.

use crate::build_info::BUILD;
use crate::isa::isa;
use std::process::ExitCode;

/// Prints what this binary was built from and for.
pub fn main() -> ExitCode {
    println!("ingot {} ({})", BUILD.version, BUILD.revision);
    println!("target        {} (CPU: {})", BUILD.target, BUILD.target_cpu);
    println!("CPU features  {}", BUILD.cpu_features);
    println!("kernels       {}", isa());
    println!("ggml          {}", BUILD.ggml_flags);
    println!("CUDA          {}", if BUILD.cuda { "yes" } else { "no" });
    println!("compiler      {}", BUILD.rustc);
    ExitCode::SUCCESS
}
