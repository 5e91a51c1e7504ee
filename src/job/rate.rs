//! Shares with their intervals.

use serde::Serialize;

/// A standard normal variable is within ± this with probability 95%.
const Z: f64 = 1.959_964;

/// A share of `count` observations, with its 95% interval (Wilson 1927).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    pub value: f64,
    pub low: f64,
    pub high: f64,
    pub count: usize,
}

impl Rate {
    /// `None` without observations. A tie is half of a success.
    pub fn of(successes: f64, count: usize) -> Option<Self> {
        if count == 0 {
            return None;
        }
        let (n, value) = (count as f64, successes / count as f64);
        let scale = 1.0 + Z * Z / n;
        let middle = (value + Z * Z / (2.0 * n)) / scale;
        let width = Z / scale * (value * (1.0 - value) / n + Z * Z / (4.0 * n * n)).sqrt();
        Some(Self { value, low: (middle - width).max(0.0), high: (middle + width).min(1.0), count })
    }
}
