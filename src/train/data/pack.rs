//! Packs examples into rows of tokens.

use super::Encoded;
use crate::train::model::Batch;
use std::sync::Arc;

/// Examples that share a row; attention does not cross their boundaries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// Numbers of the examples.
    pub members: Vec<usize>,
    pub tokens: usize,
}

/// Packs examples of these lengths into rows of at most `capacity` tokens by best-fit decreasing:
/// the longest example first, each into the fullest row that has room. No example is longer than a
/// row.
pub fn pack(lengths: &[usize], capacity: usize) -> Vec<Row> {
    let mut longest: Vec<usize> = (0..lengths.len()).collect();
    longest.sort_by_key(|&member| (std::cmp::Reverse(lengths[member]), member));
    let mut rows: Vec<Row> = Vec::new();
    for member in longest {
        let length = lengths[member];
        let fits = |row: &&mut Row| row.tokens + length <= capacity;
        // The first one of equally full rows.
        let fullest = rows.iter_mut().filter(fits).rev().max_by_key(|row| row.tokens);
        match fullest {
            Some(row) => {
                row.members.push(member);
                row.tokens += length;
            }
            None => rows.push(Row { members: vec![member], tokens: length }),
        }
    }
    rows
}

impl Batch {
    /// A batch of one row with these examples side by side.
    pub fn of<'a>(examples: impl IntoIterator<Item = &'a Encoded>) -> Self {
        let (mut tokens, mut targets, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut documents = Vec::new();
        for example in examples {
            documents.push(tokens.len());
            tokens.extend_from_slice(&example.tokens);
            // Each token predicts the next one; the last token of an example predicts nothing.
            targets.extend(example.tokens.iter().skip(1).copied().chain([0]));
            let counts = |trained: &bool| if *trained { 1.0 } else { 0.0 };
            weights.extend(example.trained.iter().skip(1).map(counts).chain([0.0]));
        }
        Self {
            tokens: Arc::new(tokens),
            documents: Arc::new(documents),
            targets: Arc::new(targets),
            weights: Arc::new(weights),
        }
    }
}
