//! Packs examples into rows of tokens.

use super::Encoded;
use crate::train::model::{Batch, Documents};
use std::ops::Range;
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

/// Examples that are computed in one pass. Those of a group share the rows of their common beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedGroups {
    /// Numbers of the examples.
    groups: Vec<Vec<usize>>,
}

/// Packs groups of examples, by their numbers, for passes of at most `capacity` rows each; a group
/// with more rows is divided. No example is longer than a pass.
pub fn pack_groups(
    examples: &[Encoded],
    groups: impl IntoIterator<Item = Vec<usize>>,
    capacity: usize,
) -> Vec<PackedGroups> {
    let of = |members: &[usize]| members.iter().map(|&at| &examples[at]).collect::<Vec<_>>();
    let rows = |members: &[usize]| group_rows(&of(members));
    let mut trees: Vec<Vec<usize>> = Vec::new();
    for group in groups {
        let mut tree = Vec::new();
        for member in group {
            tree.push(member);
            if tree.len() > 1 && rows(&tree) > capacity {
                tree.pop();
                trees.push(std::mem::replace(&mut tree, vec![member]));
            }
        }
        trees.push(tree);
    }
    let lengths: Vec<usize> = trees.iter().map(|tree| rows(tree)).collect();
    let packed = pack(&lengths, capacity).into_iter();
    let groups = |row: Row| row.members.into_iter().map(|tree| trees[tree].clone()).collect();
    packed.map(|row| PackedGroups { groups: groups(row) }).collect()
}

impl PackedGroups {
    /// Numbers of the examples, in the order of their rows.
    pub fn members(&self) -> impl Iterator<Item = usize> {
        self.groups.iter().flatten().copied()
    }

    /// Each example, and its range among the rows with a weight other than 0.
    pub fn counted(&self, examples: &[Encoded]) -> Vec<(usize, Range<usize>)> {
        let mut end = 0;
        let counted = self.members().map(|member| {
            let start = end;
            end += examples[member].targets();
            (member, start..end)
        });
        counted.collect()
    }

    /// The rows of the pass.
    pub fn batch(&self, examples: &[Encoded]) -> Batch {
        let of = |group: &Vec<usize>| group.iter().map(|&at| &examples[at]).collect();
        Batch::of_groups(self.groups.iter().map(of))
    }
}

/// The first and the last row of an example that predict a trained token.
fn counted_rows(example: &Encoded) -> Option<(usize, usize)> {
    let rows = example.trained.get(1..)?;
    Some((rows.iter().position(|counts| *counts)?, rows.iter().rposition(|counts| *counts)?))
}

/// Number of rows of an example that are needed: none after the last that predicts a trained token.
fn needed_rows(example: &Encoded) -> usize {
    counted_rows(example).map_or(example.tokens.len().min(1), |(_, last)| last + 1)
}

/// Number of rows that the examples of a group share: those of their common beginning, before the
/// first that predicts a trained token.
fn shared_rows(group: &[&Encoded]) -> usize {
    let [first, others @ ..] = group else { return 0 };
    let common = |other: &&Encoded| {
        first.tokens.iter().zip(&other.tokens).take_while(|(one, other)| one == other).count()
    };
    let Some(common) = others.iter().map(common).min() else { return 0 };
    let untrained = |example: &&Encoded| counted_rows(example).map_or(0, |(first, _)| first);
    common.min(group.iter().map(untrained).min().unwrap_or(0))
}

/// Number of rows of a group.
fn group_rows(group: &[&Encoded]) -> usize {
    let shared = shared_rows(group);
    shared + group.iter().map(|example| needed_rows(example) - shared).sum::<usize>()
}

/// What a batch is built from.
#[derive(Default)]
struct Rows {
    tokens: Vec<u32>,
    documents: Documents,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Rows {
    fn push(&mut self, example: &Encoded, rows: Range<usize>) {
        self.tokens.extend_from_slice(&example.tokens[rows.clone()]);
        for next in rows.start + 1..rows.end + 1 {
            // Each token predicts the next one; the last token of an example predicts nothing.
            self.targets.push(example.tokens.get(next).copied().unwrap_or(0));
            let counts = example.trained.get(next).copied().unwrap_or(false);
            self.weights.push(if counts { 1.0 } else { 0.0 });
        }
    }

    fn batch(self) -> Batch {
        Batch {
            tokens: Arc::new(self.tokens),
            documents: Arc::new(self.documents),
            targets: Arc::new(self.targets),
            weights: Arc::new(self.weights),
        }
    }
}

impl Batch {
    /// A batch of one row with these examples side by side.
    pub fn of<'a>(examples: impl IntoIterator<Item = &'a Encoded>) -> Self {
        let mut rows = Rows::default();
        for example in examples {
            rows.push(example, 0..example.tokens.len());
            rows.documents.push(example.tokens.len());
        }
        rows.batch()
    }

    /// A batch of groups of examples. The rows of the common beginning of a group are there once, and
    /// rows after the last trained token of an example are left out.
    pub fn of_groups<'a>(groups: impl IntoIterator<Item = Vec<&'a Encoded>>) -> Self {
        let mut rows = Rows::default();
        for group in groups {
            let shared = shared_rows(&group);
            if shared > 0 {
                rows.push(group[0], 0..shared);
                rows.documents.push(shared);
            }
            for example in group {
                let needed = needed_rows(example);
                rows.push(example, shared..needed);
                match shared {
                    0 => rows.documents.push(needed),
                    _ => rows.documents.push_continuation(needed - shared),
                }
            }
        }
        rows.batch()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(prompt: &[u32], completion: &[u32]) -> Encoded {
        let mut trained = vec![false; prompt.len()];
        trained.resize(prompt.len() + completion.len(), true);
        Encoded { tokens: [prompt, completion].concat(), trained }
    }

    fn grouped(group: &[Encoded]) -> Batch {
        Batch::of_groups([group.iter().collect()])
    }

    #[test]
    fn a_common_beginning_is_there_once() {
        let batch = grouped(&[example(&[1, 2, 3], &[4, 5]), example(&[1, 2, 3], &[6, 7, 8])]);
        // The last token of the prompt predicts a token of each completion, so each has it.
        assert_eq!(*batch.tokens, [1, 2, 3, 4, 3, 6, 7]);
        assert_eq!(batch.documents.positions(), [0, 1, 2, 3, 2, 3, 4]);
        assert_eq!(*batch.targets, [2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(*batch.weights, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn only_equal_untrained_beginnings_are_shared() {
        for (other, rows) in [
            (example(&[1, 2, 3], &[4]), 2 + 2 + 1),
            (example(&[1, 9, 3], &[4]), 1 + 3 + 2),
            (example(&[9, 2, 3], &[4]), 4 + 3),
            (example(&[1], &[2, 3, 4]), 4 + 3),
            (example(&[], &[1, 2, 3, 4]), 4 + 3),
            // Nothing of it is trained.
            (Encoded { tokens: vec![1, 2], trained: vec![false; 2] }, 4 + 1),
            (Encoded::default(), 4),
        ] {
            let group = [example(&[1, 2, 3], &[4, 5]), other];
            let batch = grouped(&group);
            assert_eq!(batch.tokens.len(), rows, "{:?}", group[1]);
            assert_eq!(batch.documents.rows(), rows);
            assert_eq!(group_rows(&group.iter().collect::<Vec<_>>()), rows);
            let counted = batch.weights.iter().filter(|weight| **weight != 0.0).count();
            assert_eq!(counted, group.iter().map(Encoded::targets).sum::<usize>());
        }
    }

    #[test]
    fn a_score_is_that_of_the_last_token() {
        let group = [example(&[1, 2], &[3]).scored(), example(&[1, 2], &[3, 4]).scored()];
        let batch = grouped(&group);
        assert_eq!(*batch.tokens, [1, 2, 3, 3, 4]);
        assert_eq!(*batch.weights, [0.0, 0.0, 1.0, 0.0, 1.0]);
    }

    #[test]
    fn long_groups_are_divided() {
        let examples: Vec<Encoded> = (0..5)
            .map(|i| example(&[1, 2, 3, 4, 5], &[i, i, i]))
            .chain([example(&[9], &[8])])
            .collect();
        // Four rows are shared, and each completion has three more.
        let packed = pack_groups(&examples, [vec![0, 1, 2, 3, 4], vec![5]], 10);
        let groups: Vec<_> = packed.iter().map(|pass| pass.groups.clone()).collect();
        assert_eq!(groups, [vec![vec![0, 1]], vec![vec![2, 3]], vec![vec![4], vec![5]]]);
        let counted = packed[2].counted(&examples);
        assert_eq!(counted, [(4, 0..3), (5, 3..4)]);
        for pass in packed {
            assert!(pass.batch(&examples).tokens.len() <= 10);
        }
        assert_eq!(pack_groups(&examples, [vec![0, 1, 2, 3, 4], vec![5]], 2).len(), 6);
    }
}
