//! Fairness between keys: virtual token counters (Sheng et al., "Fairness in Serving Large
//! Language Models", OSDI 2024).
//!
//! Every key is charged for the tokens that it is served; the key with the smallest counter is
//! served first. When an idle key becomes active, its counter is raised to the smallest counter of
//! the active keys, so that idle time earns no credit.

use std::collections::HashMap;

/// One output token is charged as this many prompt tokens.
const OUTPUT_WEIGHT: f64 = 4.0;
/// Beyond this many keys, the counters of inactive keys are dropped.
const MAX_KEYS: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct FairShares {
    counters: HashMap<u64, f64>,
}

impl FairShares {
    /// Records the arrival of a request of `key`; `active` are the keys that already have requests.
    pub(super) fn arrive(&mut self, key: u64, active: impl Iterator<Item = u64>) {
        let mut floor = f64::INFINITY;
        for other in active {
            if other == key {
                return;
            }
            floor = floor.min(self.counter(other));
        }
        if floor.is_finite() {
            let counter = self.counters.entry(key).or_default();
            *counter = counter.max(floor);
        }
        if self.counters.len() > MAX_KEYS {
            self.counters.retain(|&other, _| other == key);
        }
    }

    pub(super) fn counter(&self, key: u64) -> f64 {
        self.counters.get(&key).copied().unwrap_or(0.0)
    }

    /// The counter at which each request would be served, if the requests are served in this order.
    /// A request is given as its key and its prompt length; earlier requests of a key are charged
    /// before later ones.
    pub(super) fn places(&self, requests: impl Iterator<Item = (u64, usize)>) -> Vec<u64> {
        let mut counters = HashMap::new();
        let mut place = |(key, prompt): (u64, usize)| {
            let counter = counters.entry(key).or_insert_with(|| self.counter(key));
            std::mem::replace(counter, *counter + prompt as f64) as u64
        };
        requests.map(&mut place).collect()
    }

    pub(super) fn charge(&mut self, key: u64, prompt: usize, output: usize) {
        *self.counters.entry(key).or_default() += prompt as f64 + OUTPUT_WEIGHT * output as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_key_comes_back_without_credit() {
        let mut shares = FairShares::default();
        shares.arrive(1, std::iter::empty());
        shares.charge(1, 1000, 100);
        shares.arrive(2, [1].into_iter());
        assert_eq!(shares.counter(2), shares.counter(1));
        shares.charge(2, 10, 0);
        assert!(shares.counter(2) > shares.counter(1));
    }
}
