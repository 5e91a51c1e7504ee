//! The division of a batch into documents, and the rows that each row attends to.

use std::ops::Range;

/// The rows of a batch, divided into documents. A row attends to the rows of its document up to
/// itself. A continuation attends to all rows of the document that it continues as well, so that the
/// completions of one prompt share the prompt's rows: they are computed once, and the gradients are
/// those of separate sequences.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Documents {
    all: Vec<Document>,
    rows: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Document {
    rows: Range<usize>,
    /// Rows of the document that it continues, which comes before it; empty if it continues none.
    prefix: Range<usize>,
}

/// Consecutive rows of one document, or some of its rows in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowBlock {
    /// Number of the document.
    document: usize,
    /// Indices in the list of rows; the rows themselves if that is of all rows.
    pub(super) range: Range<usize>,
    /// Positions of the first and the last row in the sequence of prefix and document.
    pub(super) positions: (usize, usize),
}

impl Documents {
    /// One document.
    pub fn one(rows: usize) -> Self {
        let mut documents = Self::default();
        documents.push(rows);
        documents
    }

    /// Documents without continuations that begin at these rows in ascending order, the first of
    /// which is 0.
    pub fn starting_at(starts: &[usize], rows: usize) -> Self {
        let mut documents = Self::default();
        let ends = starts.iter().skip(1).copied().chain([rows]);
        starts.iter().zip(ends).for_each(|(&start, end)| documents.push(end - start));
        documents
    }

    /// Adds a document of `rows` rows.
    pub fn push(&mut self, rows: usize) {
        self.add(rows, 0..0);
    }

    /// Adds a document that continues the last one that is not a continuation itself.
    pub fn push_continuation(&mut self, rows: usize) {
        let first = self.all.iter().rfind(|document| document.prefix.is_empty());
        self.add(rows, first.map_or(0..0, |first| first.rows.clone()));
    }

    fn add(&mut self, rows: usize, prefix: Range<usize>) {
        if rows > 0 {
            self.all.push(Document { rows: self.rows..self.rows + rows, prefix });
            self.rows += rows;
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// (rows) the position of each row in the sequence of prefix and document.
    pub fn positions(&self) -> Vec<usize> {
        let positions = |document: &Document| {
            let first = document.prefix.len();
            first..first + document.rows.len()
        };
        self.all.iter().flat_map(positions).collect()
    }

    /// Whether the rows of the block `queries` may attend to those of the block `keys`.
    pub(super) fn reaches(&self, queries: &RowBlock, keys: &RowBlock) -> bool {
        let continued = || self.all[queries.document].prefix == self.all[keys.document].rows;
        keys.positions.0 <= queries.positions.1
            && (queries.document == keys.document || continued())
    }

    /// The rows at some positions of the sequence of a document: those of the prefix, and its own.
    pub(super) fn rows_at(&self, block: &RowBlock, positions: Range<usize>) -> [Range<usize>; 2] {
        let Document { rows, prefix } = &self.all[block.document];
        let within = |position: usize| position.min(prefix.len()) + prefix.start;
        let beyond = |position: usize| position.saturating_sub(prefix.len()) + rows.start;
        [
            within(positions.start)..within(positions.end),
            beyond(positions.start)..beyond(positions.end),
        ]
    }

    /// Divides `rows`, in ascending order, into blocks of at most `most` rows of one document; all
    /// rows if none are given.
    pub(super) fn blocks(&self, rows: Option<&[u32]>, most: usize) -> Vec<RowBlock> {
        let mut blocks = Vec::new();
        let row = |index: usize| rows.map_or(index, |rows| rows[index] as usize);
        let index = |row: usize| {
            rows.map_or(row, |rows| rows.partition_point(|&other| (other as usize) < row))
        };
        for (document, Document { rows, prefix }) in self.all.iter().enumerate() {
            let range = index(rows.start)..index(rows.end);
            for start in range.clone().step_by(most) {
                let range = start..(start + most).min(range.end);
                let position = |index: usize| row(index) - rows.start + prefix.len();
                let positions = (position(range.start), position(range.end - 1));
                blocks.push(RowBlock { document, range, positions });
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Documents {
        let mut documents = Documents::one(2);
        documents.push(3);
        documents.push_continuation(4);
        documents.push_continuation(0);
        documents.push_continuation(2);
        documents.push(1);
        documents
    }

    #[test]
    fn continuations_have_the_positions_after_their_prefix() {
        let documents = documents();
        assert_eq!(documents.rows(), 12);
        assert_eq!(documents.positions(), [0, 1, 0, 1, 2, 3, 4, 5, 6, 3, 4, 0]);
        assert_eq!(Documents::starting_at(&[0, 2], 5).positions(), [0, 1, 0, 1, 2]);
        let mut first = Documents::default();
        first.push_continuation(2);
        assert_eq!(first, Documents::one(2));
    }

    #[test]
    fn blocks_are_of_one_document() {
        let documents = documents();
        let ranges = |rows: Option<&[u32]>, most| -> Vec<_> {
            documents.blocks(rows, most).into_iter().map(|block| block.range).collect()
        };
        assert_eq!(ranges(None, 8), [0..2, 2..5, 5..9, 9..11, 11..12]);
        assert_eq!(ranges(None, 3), [0..2, 2..5, 5..8, 8..9, 9..11, 11..12]);
        assert_eq!(ranges(Some(&[1, 5, 8, 10]), 8), [0..1, 1..3, 3..4]);
        let blocks = documents.blocks(Some(&[1, 5, 8, 10]), 8);
        assert_eq!(blocks[1].positions, (3, 6));
        assert_eq!(documents.rows_at(&blocks[1], 1..7), [3..5, 5..9]);
        assert_eq!(documents.rows_at(&blocks[2], 3..5), [5..5, 9..11]);
        assert_eq!(documents.rows_at(&blocks[0], 0..2), [0..0, 0..2]);
    }

    #[test]
    fn continuations_reach_their_prefix_and_no_other_document() {
        let blocks = documents().blocks(None, 2);
        // The first rows of the blocks that a block reaches.
        let reached = |query: usize| -> Vec<usize> {
            let reaches = |key: &&RowBlock| documents().reaches(&blocks[query], key);
            blocks.iter().filter(reaches).map(|block| block.range.start).collect()
        };
        // Blocks: 0..2, 2..4, 4..5, 5..7, 7..9, 9..11, 11..12.
        assert_eq!(reached(0), [0]);
        assert_eq!(reached(2), [2, 4]);
        assert_eq!(reached(4), [2, 4, 5, 7]);
        assert_eq!(reached(5), [2, 4, 9]);
        assert_eq!(reached(6), [11]);
    }
}
