//! The instruction sets that the kernels are written for, and which of them this process uses.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// An instruction set, from the slowest to the fastest among those of one architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    Scalar,
    Avx2,
    /// AVX2 with dot products of bytes in registers of 256 bits, on CPUs without AVX-512: Intel's
    /// client CPUs since Alder Lake, and Sierra Forest.
    AvxVnni,
    Avx512,
    /// NEON with the dot products of Armv8.2 (`dotprod`). An aarch64 CPU without them, such as the
    /// Cortex-A72, uses the scalar kernels.
    Neon,
}

impl Isa {
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Neon];

    /// The name, as `INGOT_ISA` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// Whether this CPU has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => {
                std::arch::is_aarch64_feature_detected!("neon")
                    && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            // Of another architecture.
            _ => false,
        }
    }

    /// The instruction sets of this CPU, from the slowest to the fastest.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an instruction set cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    #[error("there is no instruction set {name:?}: use one of {}", Isa::ALL.map(Isa::name).join(", "))]
    Unknown { name: String },
    #[error(
        "this CPU lacks the instructions of {isa}: use one of {}",
        Isa::available().map(Isa::name).collect::<Vec<_>>().join(", ")
    )]
    Unavailable { isa: Isa },
    #[error(
        "{0} is already in use: an instruction set is chosen once, before the first kernel runs"
    )]
    Chosen(Isa),
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        let isa = Self::ALL.into_iter().find(|isa| isa.name() == name);
        isa.ok_or_else(|| IsaError::Unknown { name: name.to_owned() })
    }
}

static CHOSEN: OnceLock<Isa> = OnceLock::new();

/// The instruction set in use: the one that was chosen with [`choose_isa`], or else the fastest of
/// this CPU.
pub fn isa() -> Isa {
    *CHOSEN.get_or_init(|| Isa::available().next_back().unwrap_or(Isa::Scalar))
}

/// Chooses the instruction set for this process.
///
/// # Errors
/// If the CPU lacks it, or another one is already in use.
pub fn choose_isa(isa: Isa) -> Result<(), IsaError> {
    if !isa.is_available() {
        return Err(IsaError::Unavailable { isa });
    }
    match *CHOSEN.get_or_init(|| isa) {
        chosen if chosen == isa => Ok(()),
        chosen => Err(IsaError::Chosen(chosen)),
    }
}

/// Chooses the instruction set that the environment variable `INGOT_ISA` names, if it is set. Every
/// process of the program calls this first.
///
/// # Errors
/// As for [`choose_isa`], or if there is no such instruction set.
pub fn choose_isa_of_environment() -> Result<(), IsaError> {
    match std::env::var_os("INGOT_ISA") {
        Some(name) => choose_isa(name.to_string_lossy().parse()?),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_errors_say_what_can_be_chosen() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        let names = "scalar, avx2, avxvnni, avx512, neon";
        assert_eq!(error, format!("there is no instruction set \"sse9\": use one of {names}"));
        assert!(Isa::available().eq(Isa::ALL.into_iter().filter(|isa| isa.is_available())));
        let used = isa();
        assert_eq!(choose_isa(used), Ok(()));
        let other = Isa::available().find(|isa| *isa != used).unwrap_or(used);
        assert!(other == used || choose_isa(other) == Err(IsaError::Chosen(used)));
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
            assert_eq!(choose_isa(isa), Err(IsaError::Unavailable { isa }));
        }
    }
}
