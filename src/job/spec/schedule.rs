//! Learning-rate schedules.

use serde::{Deserialize, Serialize};

/// How the learning rate changes after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Constant,
    /// Linear decay to zero.
    Linear,
    /// Half a cosine, decaying to zero (Loshchilov and Hutter 2016, arXiv:1608.03983).
    Cosine,
    /// Half a cosine, decaying to a tenth, as in nanoGPT.
    CosineToTenth,
    /// Constant, then linear decay to a tenth over the last 40% (Hägele et al. 2024,
    /// arXiv:2405.18392).
    WarmupStableDecay,
}

impl Schedule {
    /// The factor of the learning rate at step `step` of `total`, counted from 0. It rises linearly
    /// to 1 in the first `warmup` steps.
    pub fn factor(self, step: u64, total: u64, warmup: u64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let all = total.saturating_sub(warmup).max(1) as f64;
        let done = ((step - warmup) as f64 / all).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - done,
            Self::Cosine => cosine,
            Self::CosineToTenth => 0.1 + 0.9 * cosine,
            Self::WarmupStableDecay => {
                const STABLE: f64 = 0.6;
                let last = (step as f64 / total.max(1) as f64 - STABLE).max(0.0) / (1.0 - STABLE);
                1.0 - 0.9 * last.min(1.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_climb_and_fall() {
        for schedule in [
            Schedule::Constant,
            Schedule::Linear,
            Schedule::Cosine,
            Schedule::CosineToTenth,
            Schedule::WarmupStableDecay,
        ] {
            let factors: Vec<_> = (0..100).map(|step| schedule.factor(step, 100, 10)).collect();
            assert!((factors[0] - 0.1).abs() < 1e-12 && factors[9] == 1.0, "{schedule:?}");
            assert!(factors[10..].windows(2).all(|two| two[1] <= two[0]), "{schedule:?}");
            let last = match schedule {
                Schedule::Constant => 1.0..=1.0,
                Schedule::Linear => 0.01..=0.02,
                Schedule::Cosine => 0.0..=0.001,
                Schedule::CosineToTenth => 0.1..=0.101,
                Schedule::WarmupStableDecay => 0.1..=0.13,
            };
            assert!(last.contains(&factors[99]), "{schedule:?}: {}", factors[99]);
        }
    }

    #[test]
    fn the_constant_part_lasts_to_the_last_two_fifths() {
        let factor = |step| Schedule::WarmupStableDecay.factor(step, 1000, 10);
        assert_eq!(factor(600), 1.0);
        assert!((factor(800) - 0.55).abs() < 1e-9);
    }
}
