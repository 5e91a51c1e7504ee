//! The order of examples.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The position of a run in its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cursor {
    pub epoch: u64,
    /// Examples of the epoch that were already used.
    pub taken: u64,
}

/// The order of an epoch's examples.
pub struct Order {
    examples: usize,
    /// `None` keeps the file's order.
    seed: Option<u64>,
    epoch: u64,
    order: Vec<u32>,
}

impl Order {
    pub fn new(examples: usize, seed: Option<u64>) -> Self {
        let mut order = Self { examples, seed, epoch: 0, order: Vec::new() };
        order.shuffle(0);
        order
    }

    /// Examples per epoch.
    pub fn len(&self) -> usize {
        self.examples
    }

    pub fn is_empty(&self) -> bool {
        self.examples == 0
    }

    fn shuffle(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.order = (0..self.examples as u32).collect();
        let Some(seed) = self.seed else { return };
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(epoch.to_le_bytes());
        self.order.shuffle(&mut StdRng::from_seed(hash.finalize().into()));
    }

    /// The next `count` examples; continues into the next epoch if necessary.
    pub fn next(&mut self, cursor: &mut Cursor, count: usize) -> Vec<usize> {
        let mut examples = Vec::with_capacity(count);
        while examples.len() < count && self.examples > 0 {
            if cursor.taken as usize >= self.examples {
                *cursor = Cursor { epoch: cursor.epoch + 1, taken: 0 };
            }
            if cursor.epoch != self.epoch {
                self.shuffle(cursor.epoch);
            }
            examples.push(self.order[cursor.taken as usize] as usize);
            cursor.taken += 1;
        }
        examples
    }
}
