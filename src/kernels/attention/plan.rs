//! Determines which queries process which pages together.

use super::{RUN, Scope, TILE};
use crate::kernels::cache::PAGE;
use crate::kernels::ops::Span;
use std::cmp::Reverse;
use std::ops::Range;

/// Spans of at most this many rows have their runs computed separately: decoding, and verifying
/// drafts.
const SHORT: usize = 8;
/// Chunks per thread, if there are enough rows: small chunks keep the threads evenly busy at the
/// end.
const CHUNKS: usize = 4;

/// The queries of one row.
#[derive(Debug, Clone)]
pub(crate) struct Query<'a> {
    pub row: usize,
    /// Positions of the tokens that it attends to.
    pub seen: Range<usize>,
    /// Pages of its sequence.
    pub pages: &'a [u32],
    /// Index of the sums of its first run, if it has several runs that are merged afterwards.
    pub slot: Option<usize>,
}

impl Query<'_> {
    pub(crate) fn runs(&self) -> Range<usize> {
        self.seen.start / RUN..self.seen.end.div_ceil(RUN)
    }

    /// The tokens of a run that it attends to, relative to the run's beginning.
    pub(crate) fn seen_of(&self, run: usize) -> Range<usize> {
        let first = run * RUN;
        let end = self.seen.end.clamp(first, first + RUN);
        self.seen.start.clamp(first, end) - first..end - first
    }
}

/// Queries that share the pages of some runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tile {
    pub queries: Range<usize>,
    pub runs: Range<usize>,
}

/// The attention of a step; the same for all layers of a kind.
pub struct Plan<'a> {
    pub scope: Scope,
    pub(in crate::kernels) queries: Vec<Query<'a>>,
    /// Sorted, largest first.
    pub(in crate::kernels) tiles: Vec<Tile>,
    /// Number of sums to be merged, per head of the cache.
    pub(in crate::kernels) slots: usize,
}

impl<'a> Plan<'a> {
    /// Creates the plan for rows in which `group` query heads share each of the cache's `kv_heads`
    /// heads.
    pub fn new(
        spans: &'a [Span],
        scope: Scope,
        kv_heads: usize,
        group: usize,
        threads: usize,
    ) -> Self {
        let rows_of = |span: &'a Span| {
            let query = move |(offset, row): (usize, usize)| {
                let end = span.position + offset + 1;
                let seen = end.saturating_sub(scope.window.unwrap_or(end))..end;
                Query { row, seen, pages: &span.pages[..], slot: None }
            };
            span.rows.clone().enumerate().map(query)
        };
        let (short, long): (Vec<_>, Vec<_>) =
            spans.iter().partition(|span| span.rows.len() <= SHORT);
        // Sequences with a common prefix become adjacent.
        let mut queries: Vec<_> = short.into_iter().flat_map(rows_of).collect();
        queries.sort_by(|a, b| a.pages.cmp(b.pages));
        let mut slots = 0;
        for query in queries.iter_mut().filter(|query| query.runs().len() > 1) {
            query.slot = Some(slots);
            slots += query.runs().len();
        }
        let work = queries.iter().map(|query| query.runs().len()).sum::<usize>();
        let mut tiles = Vec::new();
        let most = largest_tile(work * kv_heads, group, threads);
        share(&queries, most, &mut tiles);
        for span in long {
            let most = largest_tile(span.rows.len() * kv_heads, group, threads);
            let first = queries.len();
            queries.extend(rows_of(span));
            for from in (first..queries.len()).step_by(most) {
                let part = from..(from + most).min(queries.len());
                let last = queries[part.end - 1].runs();
                tiles.push(Tile { runs: queries[from].runs().start..last.end, queries: part });
            }
        }
        tiles.sort_by_cached_key(|tile| {
            let seen = |query: &Query| {
                tile.runs.clone().map(|run| query.seen_of(run).len()).sum::<usize>()
            };
            Reverse(queries[tile.queries.clone()].iter().map(seen).sum::<usize>())
        });
        Self { scope, queries, tiles, slots }
    }

    /// Queries whose runs are computed separately.
    pub(in crate::kernels) fn split(&self) -> impl Iterator<Item = &Query<'a>> {
        self.queries.iter().filter(|query| query.slot.is_some())
    }
}

/// Most rows of a tile: as many as can share the conversion of a page, but so few that enough
/// chunks are left for all threads.
fn largest_tile(work: usize, group: usize, threads: usize) -> usize {
    (work / (CHUNKS * threads)).clamp(1, (TILE / group).max(1))
}

/// Adds tiles of one run each, of adjacent queries that share the run's first page.
fn share(queries: &[Query], most: usize, tiles: &mut Vec<Tile>) {
    let runs = queries.iter().map(|query| query.runs().end).max().unwrap_or(0);
    for run in 0..runs {
        let page = |query: &Query| query.pages.get(run * (RUN / PAGE)).copied();
        let mut open: Option<Tile> = None;
        for (index, query) in queries.iter().enumerate() {
            let sees = query.runs().contains(&run);
            if let Some(tile) = &mut open {
                let first = tile.queries.start;
                if sees && page(&queries[first]) == page(query) && index - first < most {
                    tile.queries.end = index + 1;
                    continue;
                }
                tiles.extend(open.take());
            }
            open = sees.then(|| Tile { queries: index..index + 1, runs: run..run + 1 });
        }
        tiles.extend(open);
    }
}
