//! Computes one tile of attention: some rows' queries of one head, over some runs.

use super::{Query, ROWS, RUN, Scores};
use crate::kernels::cache::{KvCache, Numbers, PAGE};
use crate::kernels::isa::Isa;
use crate::kernels::vector::{exp, soft_cap};
use std::ops::Range;

/// Pages per run.
const PAGES: usize = RUN / PAGE;

/// One head of one layer's cache, and the `group` query heads that use it.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    pub isa: Isa,
    pub cache: &'a KvCache,
    pub layer: usize,
    pub head: usize,
    pub group: usize,
    /// Soft cap of the scores.
    pub cap: Option<f32>,
}

/// A softmax's largest score, and its sum of e^(score - largest).
#[derive(Debug, Clone, Copy)]
pub(super) struct Sum {
    max: f32,
    total: f32,
}

impl Sum {
    const NOTHING: Self = Self { max: f32::NEG_INFINITY, total: 0.0 };
}

/// Scratch buffers for a tile, one per thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// (queries, group, head_dim), already scaled.
    pub q: Vec<f32>,
    /// (queries, group) scores of one run.
    scores: Vec<Scores>,
    sums: Vec<Sum>,
    /// (queries, group, head_dim) weighted sums of one run.
    partial: Vec<f32>,
    /// Sums of all runs so far.
    totals: Vec<Sum>,
    pub out: Vec<f32>,
    /// (head_dim, 32) keys or (32, head_dim) values of a page, converted to f32.
    page: Vec<f32>,
}

impl Head<'_> {
    /// Computes attention of the queries in `scratch.q` over all of `runs`; the result is in
    /// `scratch.out`.
    pub(crate) fn attend(&self, queries: &[Query], runs: Range<usize>, scratch: &mut Scratch) {
        let (dim, group) = (self.cache.head_dim(), self.group);
        scratch.out.clear();
        scratch.out.resize(queries.len() * group * dim, 0.0);
        scratch.totals.clear();
        scratch.totals.resize(queries.len() * group, Sum::NOTHING);
        for run in runs {
            self.sum_run(queries, run, scratch);
            for (index, query) in queries.iter().enumerate() {
                if query.seen_of(run).is_empty() {
                    continue;
                }
                for row in index * group..(index + 1) * group {
                    let out = &mut scratch.out[row * dim..][..dim];
                    let partial = &scratch.partial[row * dim..][..dim];
                    merge(&mut scratch.totals[row], out, scratch.sums[row], partial);
                }
            }
        }
        for (out, sum) in scratch.out.chunks_exact_mut(dim).zip(&scratch.totals) {
            divide(out, *sum);
        }
    }

    /// Numbers that [`Head::keep`] writes: for each query head the softmax's largest score, its
    /// sum, and (head_dim) the weighted sum.
    pub(crate) fn kept(&self) -> usize {
        self.group * (self.cache.head_dim() + 2)
    }

    /// Writes the `index`-th query's sums of the last run computed by [`Head::sum_run`].
    pub(crate) fn keep(&self, scratch: &Scratch, index: usize, kept: &mut [f32]) {
        let dim = self.cache.head_dim();
        for (row, kept) in kept.chunks_exact_mut(dim + 2).enumerate() {
            let row = index * self.group + row;
            (kept[0], kept[1]) = (scratch.sums[row].max, scratch.sums[row].total);
            kept[2..].copy_from_slice(&scratch.partial[row * dim..][..dim]);
        }
    }

    /// Computes the sums of one run, for all queries that attend to part of it.
    pub(crate) fn sum_run(&self, queries: &[Query], run: usize, scratch: &mut Scratch) {
        let (dim, group) = (self.cache.head_dim(), self.group);
        let rows = queries.len() * group;
        assert!(scratch.q.len() == rows * dim, "the queries are there");
        if scratch.scores.len() < rows {
            scratch.scores.resize(rows, [0.0; RUN]);
        }
        scratch.sums.resize(rows, Sum::NOTHING);
        scratch.partial.clear();
        scratch.partial.resize(rows * dim, 0.0);
        scratch.page.resize(dim * PAGE, 0.0);
        for page in 0..PAGES {
            let at = page * PAGE;
            let place = |query: &Query| {
                let seen = query.seen_of(run);
                let sees = seen.start < at + PAGE && seen.end > at && !seen.is_empty();
                sees.then(|| query.pages[run * PAGES + page])
            };
            stretches(queries, place, |part, id| {
                let (q, scores) = (
                    &scratch.q[part.start * group * dim..part.end * group * dim],
                    &mut scratch.scores[part.start * group..part.end * group],
                );
                let keys = self.cache.keys(self.layer, id, self.head);
                self.score(q, keys, scores, at, &mut scratch.page);
            });
        }
        for (index, query) in queries.iter().enumerate() {
            let seen = query.seen_of(run);
            for row in index * group..(index + 1) * group {
                let scores = &mut scratch.scores[row][seen.clone()];
                if let Some(cap) = self.cap {
                    soft_cap(scores, cap);
                }
                let (max, total) = (self.isa.kernels().attention.softmax)(scores);
                scratch.sums[row] = Sum { max, total };
            }
        }
        for page in 0..PAGES {
            let at = page * PAGE;
            let place = |query: &Query| {
                let seen = query.seen_of(run);
                let (from, to) = (seen.start.max(at), seen.end.min(at + PAGE));
                (from < to).then(|| (query.pages[run * PAGES + page], from - at..to - at))
            };
            stretches(queries, place, |part, (id, tokens)| {
                let (rows, numbers) = (
                    part.start * group..part.end * group,
                    part.start * group * dim..part.end * group * dim,
                );
                let (scores, out) = (&scratch.scores[rows], &mut scratch.partial[numbers]);
                let values = self.cache.values(self.layer, id, self.head);
                self.accumulate_values(scores, at, tokens, values, out, &mut scratch.page);
            });
        }
    }

    /// `scores[row][at..at + 32] = q[row] · keys`.
    fn score(&self, q: &[f32], keys: Numbers, scores: &mut [Scores], at: usize, page: &mut [f32]) {
        let dim = self.cache.head_dim();
        let kernels = &self.isa.kernels().attention;
        let keys = self.widened(keys, 0..dim * PAGE, scores.len(), page);
        for (q, scores) in q.chunks(ROWS * dim).zip(scores.chunks_mut(ROWS)) {
            (kernels.score)(q, keys, scores, at);
        }
    }

    /// `out[row] += scores[row][at + t] * values[t]` for `tokens` of the page that begins at `at`.
    fn accumulate_values(
        &self,
        scores: &[Scores],
        at: usize,
        tokens: Range<usize>,
        values: Numbers,
        out: &mut [f32],
        page: &mut [f32],
    ) {
        let dim = self.cache.head_dim();
        let kernels = &self.isa.kernels().attention;
        let range = tokens.start * dim..tokens.end * dim;
        let values = self.widened(values, range, scores.len(), page);
        for (scores, out) in scores.chunks(ROWS).zip(out.chunks_mut(ROWS * dim)) {
            (kernels.accumulate_values)(scores, at, tokens.clone(), values, out);
        }
    }

    /// Numbers that the kernel reads more than once are converted to f32 once, in `page`.
    fn widened<'a>(
        &self,
        from: Numbers<'a>,
        range: Range<usize>,
        rows: usize,
        page: &'a mut [f32],
    ) -> Numbers<'a> {
        if rows <= ROWS {
            return from;
        }
        (self.isa.kernels().attention.widen)(from, range.clone(), &mut page[range]);
        let d = match from {
            Numbers::Q8 { d, .. } => Some(d),
            Numbers::F16(_) => None,
            Numbers::Wide { d, .. } => d,
        };
        Numbers::Wide { x: page, d }
    }
}

/// Calls `each` for every maximal sequence of adjacent queries whose `place` is equal and not
/// `None`.
fn stretches<P: PartialEq>(
    queries: &[Query],
    place: impl Fn(&Query) -> Option<P>,
    mut each: impl FnMut(Range<usize>, P),
) {
    let mut from = 0;
    while from < queries.len() {
        let here = place(&queries[from]);
        let more = queries[from + 1..].iter().take_while(|query| place(query) == here).count();
        let part = from..from + 1 + more;
        from = part.end;
        if let Some(here) = here {
            each(part, here);
        }
    }
}

/// Merges one query's runs, as written by [`Head::keep`], in order into its result: `out` (group,
/// head_dim).
pub(crate) fn merge_runs(runs: &[f32], out: &mut [f32], dim: usize) {
    let group = out.len() / dim;
    out.fill(0.0);
    for (row, out) in out.chunks_exact_mut(dim).enumerate() {
        let mut total = Sum::NOTHING;
        for kept in runs.chunks_exact(group * (dim + 2)) {
            let kept = &kept[row * (dim + 2)..][..dim + 2];
            merge(&mut total, out, Sum { max: kept[0], total: kept[1] }, &kept[2..]);
        }
        divide(out, total);
    }
}

/// Merges the next run of a query into its sums so far.
fn merge(sum: &mut Sum, out: &mut [f32], run: Sum, partial: &[f32]) {
    let max = sum.max.max(run.max);
    // For the first run the old weight is e^-inf = 0.
    let (old, new) = (exp(sum.max - max), exp(run.max - max));
    for (out, partial) in out.iter_mut().zip(partial) {
        *out = out.mul_add(old, partial * new);
    }
    *sum = Sum { max, total: sum.total.mul_add(old, run.total * new) };
}

fn divide(out: &mut [f32], sum: Sum) {
    out.iter_mut().for_each(|x| *x /= sum.total);
}
