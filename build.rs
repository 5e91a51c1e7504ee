//! Records what this binary was built from and for: shown by `ingot version` and `/version`.
//!
//! llama-cpp-sys-2 takes ggml's CPU flags from the same two variables that are read here, so what is
//! recorded is what ggml got.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for name in ["HEAD", "index"] {
        if let Some(path) = run("git", &["rev-parse", "--git-path", name])
            && std::path::Path::new(&path).exists()
        {
            println!("cargo:rerun-if-changed={path}");
        }
    }

    let revision = run("git", &["rev-parse", "--short=12", "HEAD"]).map(|revision| {
        let changed = run("git", &["status", "--porcelain", "--untracked-files=no"]);
        if changed.is_some_and(|files| !files.is_empty()) { revision + "+" } else { revision }
    });
    let arch = env("CARGO_CFG_TARGET_ARCH");
    let features = env("CARGO_CFG_TARGET_FEATURE");
    let cpu = target_cpu();
    let rustc = run(&env("RUSTC"), &["--version"]);

    let ggml = match cpu.as_deref() {
        Some("native") => "GGML_NATIVE=ON".to_owned(),
        _ => derived_flags(cpu.as_deref(), &features),
    };
    if arch == "x86_64" && !features.split(',').any(|feature| feature == "avx2") {
        println!(
            "cargo:warning=ggml is built for a CPU without AVX2 and will be several times slower. \
             An environment RUSTFLAGS replaces .cargo/config.toml: add `-C target-cpu=native`, or \
             `-C target-cpu=x86-64-v3` for a portable binary."
        );
    }

    record("INGOT_GIT_REVISION", revision.as_deref().unwrap_or("unknown"));
    record("INGOT_TARGET", &env("TARGET"));
    record("INGOT_TARGET_CPU", cpu.as_deref().unwrap_or("baseline"));
    record("INGOT_CPU_FEATURES", &features);
    record("INGOT_GGML_FLAGS", &ggml);
    record("INGOT_RUSTC", rustc.as_deref().unwrap_or("unknown"));
}

fn record(name: &str, value: &str) {
    println!("cargo:rustc-env={name}={value}");
}

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// The output of a command, or `None` where it is missing or fails (outside a Git checkout).
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// `-C target-cpu=…` of the flags that rustc gets.
fn target_cpu() -> Option<String> {
    let flags = env("CARGO_ENCODED_RUSTFLAGS");
    let last = flags.split('\u{1f}').filter_map(|flag| flag.split_once("target-cpu=")).next_back();
    last.map(|(_, cpu)| cpu.to_owned())
}

/// The flags that the sys crate derives from rustc's features when it does not build natively.
fn derived_flags(cpu: Option<&str>, features: &str) -> String {
    let known =
        ["sse4.2", "avx", "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512vnni", "avxvnni"];
    let mut flags = vec!["GGML_NATIVE=OFF".to_owned()];
    flags.extend(cpu.map(|cpu| format!("-march={cpu}")));
    flags.extend(
        features
            .split(',')
            .filter(|feature| known.contains(feature))
            .map(|feature| format!("GGML_{}=ON", feature.to_uppercase().replace('.', ""))),
    );
    flags.join(" ")
}
