//! What `build.rs` recorded, for `ingot version` and `/version`.

/// What this binary was built from and for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct BuildInfo {
    pub version: &'static str,
    /// Of the Git checkout; `+` marks uncommitted changes.
    pub revision: &'static str,
    pub target: &'static str,
    /// `-C target-cpu`.
    pub target_cpu: &'static str,
    /// Comma-separated, as rustc names them.
    pub cpu_features: &'static str,
    /// How ggml was told to use the CPU.
    pub ggml_flags: &'static str,
    pub rustc: &'static str,
    pub cuda: bool,
}

/// The facts of this binary.
pub const BUILD: BuildInfo = BuildInfo {
    version: env!("CARGO_PKG_VERSION"),
    revision: env!("INGOT_GIT_REVISION"),
    target: env!("INGOT_TARGET"),
    target_cpu: env!("INGOT_TARGET_CPU"),
    cpu_features: env!("INGOT_CPU_FEATURES"),
    ggml_flags: env!("INGOT_GGML_FLAGS"),
    rustc: env!("INGOT_RUSTC"),
    cuda: cfg!(feature = "cuda"),
};
