//! Computes one tile of attention: some rows' queries of one head, over some runs.

#[cfg(not(target_arch = "x86_64"))]
use super::plain::Number;
use super::plain::{self, Scales};
use super::{Query, ROWS, RUN, Scores};
#[cfg(target_arch = "x86_64")]
use crate::kernels::avx2::{self, Number};
use crate::kernels::cache::{KvCache, Numbers, PAGE};
use crate::kernels::matmul::Isa;
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
                let page = &mut scratch.page;
                match self.cache.keys(self.layer, id, self.head) {
                    Numbers::F16(keys) => self.score(q, (keys, ()), scores, at, page),
                    Numbers::Q8 { q: keys, d } => {
                        self.score(q, (keys, d), scores, at, page);
                    }
                }
            });
        }
        for (index, query) in queries.iter().enumerate() {
            let seen = query.seen_of(run);
            for row in index * group..(index + 1) * group {
                let scores = &mut scratch.scores[row][seen.clone()];
                if let Some(cap) = self.cap {
                    soft_cap(scores, cap);
                }
                scratch.sums[row] = softmax(scores);
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
                let page = &mut scratch.page;
                match self.cache.values(self.layer, id, self.head) {
                    Numbers::F16(values) => {
                        self.accumulate_values(scores, at, tokens, (values, ()), out, page);
                    }
                    Numbers::Q8 { q, d } => {
                        self.accumulate_values(scores, at, tokens, (q, d), out, page);
                    }
                }
            });
        }
    }

    /// `scores[row][at..at + 32] = q[row] · keys`.
    fn score<N: Number, S: Scales>(
        &self,
        q: &[f32],
        (keys, scales): (&[N], S),
        scores: &mut [Scores],
        at: usize,
        page: &mut [f32],
    ) {
        let dim = self.cache.head_dim();
        let widened = scores.len() > ROWS;
        if widened {
            widen(self.isa, keys, page);
        }
        for (q, scores) in q.chunks(ROWS * dim).zip(scores.chunks_mut(ROWS)) {
            match (self.isa, widened) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, false) => avx2::score(q, keys, scales, scores, at),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, true) => avx2::score(q, &*page, scales, scores, at),
                _ => plain::score(q, keys, scales, scores, at),
            }
        }
    }

    /// `out[row] += scores[row][at + t] * values[t]` for `tokens` of the page that begins at `at`.
    fn accumulate_values<N: Number, S: Scales>(
        &self,
        scores: &[Scores],
        at: usize,
        tokens: Range<usize>,
        (values, scales): (&[N], S),
        out: &mut [f32],
        page: &mut [f32],
    ) {
        let dim = self.cache.head_dim();
        let widened = scores.len() > ROWS;
        if widened {
            let part = tokens.start * dim..tokens.end * dim;
            widen(self.isa, &values[part.clone()], &mut page[part]);
        }
        for (scores, out) in scores.chunks(ROWS).zip(out.chunks_mut(ROWS * dim)) {
            let tokens = tokens.clone();
            match (self.isa, widened) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, false) => {
                    avx2::accumulate_values(scores, at, tokens, values, scales, out)
                }
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, true) => {
                    avx2::accumulate_values(scores, at, tokens, &*page, scales, out)
                }
                _ => plain::accumulate_values(scores, at, tokens, values, scales, out),
            }
        }
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

/// Converts numbers to f32, without their scales.
fn widen<N: Number>(isa: Isa, from: &[N], to: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::widen(from, to),
        // The scalar kernels read the numbers directly.
        _ => {}
    }
}

/// Replaces scores by e^(score - largest); returns the largest score, and the sum in lanes of
/// eight.
fn softmax(scores: &mut [f32]) -> Sum {
    let mut largest = [f32::NEG_INFINITY; 8];
    let (whole, rest) = scores.as_chunks::<8>();
    for eight in whole {
        for (largest, score) in largest.iter_mut().zip(eight) {
            *largest = largest.max(*score);
        }
    }
    let max = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut lanes = [0f32; 8];
    let (whole, rest) = scores.as_chunks_mut::<8>();
    for eight in whole {
        for (lane, score) in lanes.iter_mut().zip(eight) {
            *score = exp(*score - max);
            *lane += *score;
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *score = exp(*score - max);
        *lane += *score;
    }
    Sum { max, total: lanes.iter().sum() }
}
