//! Dense matrix products for training.
//!
//! Both operands are packed: the right one into strips of sixteen columns, of which a block of some
//! terms stays in the L1 cache; the left one into tiles of some rows, of which a block stays in the
//! L2 cache (Goto and van de Geijn 2008, doi:10.1145/1356052.1356053). The instruction set sets
//! their [`Shape`]. Every element of the result is summed in one fixed order, so no sum depends on
//! the number of threads.

use super::real::Real;
use rayon::prelude::*;
use std::ops::Range;

/// Columns per strip.
pub const STRIP: usize = 16;
/// The shape of a kernel's tiles.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Most rows of a tile, at most [`ROWS`].
    pub rows: usize,
    /// Most strips that a tile covers.
    pub strips: usize,
    /// Terms of a sum that a tile adds at a time: the strips of this depth stay in the L1 cache.
    pub depth: usize,
}

/// The shape of the scalar kernels and those of AVX2 and NEON: a strip takes 16 KB of f32.
pub(super) const NARROW: Shape = Shape { rows: 6, strips: 1, depth: 256 };
/// Most rows of any tile.
const ROWS: usize = 8;
/// Most tiles of the left operand that are multiplied by the same strips in turn: 96 KB of f32.
const TILES: usize = 16;
/// Most strips that one thread packs or computes at a time.
const STRIPS: usize = 16;
/// Most rows, columns and terms that are packed at a time: 16 MB and 8 MB of f32.
const MOST: [usize; 3] = [2048, 1024, 2048];
/// The left operand is packed only for more strips than this: for fewer, packing costs more than it
/// saves.
const FEW: usize = 2;
/// Products with fewer multiplications run on one thread: waking another takes longer.
const SMALL: usize = 1 << 19;

/// Computes a tile of the result: some rows of `a`, whose elements are `strides` apart, times some
/// strips (`depth`, [`STRIP`]), which are `distance` apart. The product is stored in `out` or added
/// to it; rows of `out` are `stride` elements apart.
///
/// # Safety
/// All of these elements must be readable and writable, and the CPU must support the instructions.
pub type Tile<T> = unsafe fn(
    depth: usize,
    a: *const T,
    strides: [usize; 2],
    strip: *const T,
    distance: usize,
    out: *mut T,
    stride: usize,
    add: bool,
);

/// A matrix view of a slice, with arbitrary strides.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    /// Distance from one row to the next, and from one column to the next.
    strides: [usize; 2],
}

impl<'a, T> Mat<'a, T> {
    /// A matrix (rows, columns) in row-major order.
    ///
    /// # Panics
    /// If the length of `data` does not match.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{rows} rows of {cols}");
        Self { data, rows, cols, strides: [cols, 1] }
    }

    /// A submatrix (rows, columns) of `x` (…, `stride`).
    pub fn part(x: &'a [T], rows: Range<usize>, cols: Range<usize>, stride: usize) -> Self {
        let whole = Mat { data: x, rows: x.len() / stride, cols: stride, strides: [stride, 1] };
        whole.rows(rows).cols(cols)
    }

    /// The transpose (columns, rows).
    pub fn t(self) -> Self {
        let [row, col] = self.strides;
        Self { rows: self.cols, cols: self.rows, strides: [col, row], ..self }
    }

    /// A range of the rows.
    pub fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let from = if rows.is_empty() { 0 } else { rows.start * self.strides[0] };
        Self { data: &self.data[from..], rows: rows.len(), ..self }
    }

    /// A range of the columns.
    pub fn cols(self, cols: Range<usize>) -> Self {
        self.t().rows(cols).t()
    }

    fn check(&self) {
        if self.rows > 0 && self.cols > 0 {
            let last = (self.rows - 1) * self.strides[0] + (self.cols - 1) * self.strides[1];
            assert!(last < self.data.len(), "the matrix is inside its slice");
        }
    }
}

/// The right operand of a product, which can be packed.
pub trait Right<T>: Sync {
    fn rows(&self) -> usize;
    fn cols(&self) -> usize;

    /// Packs a part into (columns in strips, rows, [`STRIP`]). Missing columns of the last strip
    /// are filled with zeros.
    fn pack(&self, rows: Range<usize>, cols: Range<usize>, packed: &mut [T]);
}

impl<T: Real> Right<T> for Mat<'_, T> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn pack(&self, rows: Range<usize>, cols: Range<usize>, packed: &mut [T]) {
        let part = Mat::rows(*self, rows.clone()).cols(cols.clone());
        for (strip, packed) in packed.chunks_exact_mut(rows.len() * STRIP).enumerate() {
            let from = strip * STRIP;
            let width = STRIP.min(cols.len() - from);
            pack_strip(part.data, from * part.strides[1], part.strides, width, packed);
        }
    }
}

/// Packs some columns of a matrix that begins at `from` into (rows, [`STRIP`]), padded with zeros.
fn pack_strip<T: Real>(
    data: &[T],
    from: usize,
    [row, col]: [usize; 2],
    width: usize,
    packed: &mut [T],
) {
    if col == 1 {
        for (k, packed) in packed.chunks_exact_mut(STRIP).enumerate() {
            packed[..width].copy_from_slice(&data[from + k * row..][..width]);
            packed[width..].fill(T::ZERO);
        }
        return;
    }
    let depth = packed.len() / STRIP;
    // If the elements of a column are contiguous, transpose blocks of eight by eight.
    let square = if row == 1 && width == STRIP { depth / 8 * 8 } else { 0 };
    for k in (0..square).step_by(8) {
        for c in [0, 8] {
            let at = &data[from + c * col + k..];
            assert!(at.len() > 7 * col + 7, "eight columns are there");
            // SAFETY: the assertion checks the source, and the strip has eight rows from here on.
            unsafe { T::transpose(at.as_ptr(), col, packed[k * STRIP + c..].as_mut_ptr(), STRIP) };
        }
    }
    for (k, packed) in packed.chunks_exact_mut(STRIP).enumerate().skip(square) {
        for (c, packed) in packed.iter_mut().enumerate() {
            *packed = if c < width { data[from + c * col + k * row] } else { T::ZERO };
        }
    }
}

/// Packs a part of a right operand given as `weights` (columns, rows), one column after the other.
pub fn pack_columns<T: Real>(weights: &[T], rows: usize, packed: &mut [T]) {
    for (weights, packed) in weights.chunks(rows * STRIP).zip(packed.chunks_exact_mut(rows * STRIP))
    {
        pack_strip(weights, 0, [1, rows], weights.len() / rows, packed);
    }
}

/// Packs row `row` of a part of a right operand that has `rows` rows.
pub fn pack_row<T: Real>(weights: &[T], row: usize, rows: usize, packed: &mut [T]) {
    for (weights, packed) in weights.chunks(STRIP).zip(packed.chunks_exact_mut(rows * STRIP)) {
        let packed = &mut packed[row * STRIP..][..STRIP];
        packed[..weights.len()].copy_from_slice(weights);
        packed[weights.len()..].fill(T::ZERO);
    }
}

/// The destination of a product: the columns from `at` on, of rows that are `stride` elements long.
#[derive(Clone, Copy)]
struct Place {
    stride: usize,
    at: usize,
    add: bool,
}

/// Computes `out = a b` or `out += a b` on this thread; `out` (rows, `stride`) receives the product
/// in its columns from `at` on.
///
/// # Panics
/// If the shapes do not match.
pub fn product_here<T: Real>(
    a: Mat<T>,
    b: Mat<T>,
    out: &mut [T],
    stride: usize,
    at: usize,
    add: bool,
) {
    let end = a.rows.saturating_sub(1) * stride + at + b.cols;
    assert!(at + b.cols <= stride && (a.rows == 0 || end <= out.len()), "the result is inside");
    let out = Out { first: out.as_mut_ptr(), place: Place { stride, at, add } };
    // SAFETY: the shapes have been checked: the result is inside `out`.
    unsafe { run(&[(a, &b)], out, false) };
}

/// As [`product_here`], on all threads, for any right operand.
///
/// # Panics
/// If the shapes do not match.
pub fn product<T: Real>(
    a: Mat<T>,
    b: impl Right<T>,
    out: &mut [T],
    stride: usize,
    at: usize,
    add: bool,
) {
    let end = a.rows.saturating_sub(1) * stride + at + b.cols();
    assert!(at + b.cols() <= stride && (a.rows == 0 || end <= out.len()), "the result is inside");
    let out = Out { first: out.as_mut_ptr(), place: Place { stride, at, add } };
    // SAFETY: the shapes have been checked: the result is inside `out`.
    unsafe { run(&[(a, &b)], out, true) };
}

/// Returns the sum of some products (rows, columns), computed on all threads.
///
/// # Panics
/// If the shapes do not match.
pub fn sum_of_products<T: Real>(terms: &[(Mat<T>, &dyn Right<T>)]) -> Vec<T> {
    let (rows, cols) = terms.first().map_or((0, 0), |(a, b)| (a.rows, b.cols()));
    let mut out = Vec::with_capacity(rows * cols);
    let place = Place { stride: cols, at: 0, add: false };
    // SAFETY: the vector has room for the result, and every element of it is written.
    unsafe {
        run(terms, Out { first: out.as_mut_ptr(), place }, true);
        out.set_len(rows * cols);
    }
    out
}

/// A range of the terms of a sum that is packed and multiplied at once.
struct Part<'a, T> {
    a: Mat<'a, T>,
    b: &'a dyn Right<T>,
    /// Rows of `b`; they correspond to the columns of `a`, which has already been cut.
    k: Range<usize>,
    /// Number of terms that are packed before this part.
    at: usize,
}

/// Computes a sum of products and stores it in `out` or adds it.
///
/// # Safety
/// `out` must have room for the result, and no other thread may access it.
///
/// # Panics
/// If the shapes do not match.
unsafe fn run<T: Real>(terms: &[(Mat<T>, &dyn Right<T>)], out: Out<T>, share: bool) {
    let Some((first, right)) = terms.first() else { return };
    let (rows, cols, Place { stride, at, add }) = (first.rows, right.cols(), out.place);
    let mut work = 0;
    for (a, b) in terms {
        assert!(a.cols == b.rows() && a.rows == rows && b.cols() == cols, "sizes of products");
        a.check();
        work += a.rows * a.cols * cols;
    }
    let shape = T::shape();
    let share = share && work >= SMALL && rayon::current_num_threads() > 1;
    let depths =
        terms.iter().flat_map(|&(a, b)| parts(a.cols, shape.depth).map(move |k| (a, b, k)));
    let depths: Vec<_> = depths.collect();
    if depths.is_empty() && !add {
        for row in 0..if cols > 0 { rows } else { 0 } {
            // SAFETY: guaranteed by the caller.
            unsafe { out.fill(row * stride + at, cols, T::ZERO) };
        }
    }
    for rows in parts(rows, MOST[0]) {
        for (number, depths) in depths.chunks(MOST[2] / shape.depth).enumerate() {
            let mut packed = 0;
            let cut = depths.iter().map(|(a, b, k)| {
                let at = packed;
                packed += k.len();
                Part { a: (*a).rows(rows.clone()).cols(k.clone()), b: *b, k: k.clone(), at }
            });
            let cut: Vec<_> = cut.collect();
            for cols in parts(cols, MOST[1]) {
                let at = rows.start * stride + at + cols.start;
                let place = Place { stride, at, add: add || number > 0 };
                // SAFETY: guaranteed by the caller.
                unsafe { block(rows.len(), &cut, cols, Out { place, ..out }, share) };
            }
        }
    }
}

/// Splits `all` into ranges of at most `most`.
fn parts(all: usize, most: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    (0..all).step_by(most).map(move |from| from..(from + most).min(all))
}

/// Runs `f` for each index, on all threads or on this one.
fn each(count: usize, share: bool, f: impl Fn(usize) + Send + Sync) {
    if share && count > 1 {
        (0..count).into_par_iter().with_max_len(1).for_each(f);
    } else {
        (0..count).for_each(f);
    }
}

/// A memory region that threads write to, each to its own part.
#[derive(Clone, Copy)]
struct Out<T> {
    first: *mut T,
    place: Place,
}

// SAFETY: every thread that holds a copy accesses only elements that no other thread accesses.
unsafe impl<T: Send> Send for Out<T> {}
// SAFETY: as for `Send` above.
unsafe impl<T: Send> Sync for Out<T> {}

impl<T> Out<T> {
    /// A pointer to element `at`.
    ///
    /// # Safety
    /// The element must be inside the region.
    unsafe fn at(&self, at: usize) -> *mut T {
        // SAFETY: guaranteed by the caller.
        unsafe { self.first.add(at) }
    }

    /// Stores a number in `len` elements.
    ///
    /// # Safety
    /// The elements must be inside the region, and no other thread may access them.
    unsafe fn fill(&self, from: usize, len: usize, x: T)
    where
        T: Copy,
    {
        // SAFETY: guaranteed by the caller.
        (0..len).for_each(|at| unsafe { self.first.add(from + at).write(x) });
    }

    /// A slice of elements that have been written before.
    ///
    /// # Safety
    /// The elements must be inside the region, and no other thread may access them.
    #[expect(clippy::mut_from_ref, reason = "parts of different threads are apart")]
    unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        // SAFETY: guaranteed by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(from), len) }
    }
}

/// Computes some columns of a sum of products.
///
/// # Safety
/// As for [`run`].
unsafe fn block<T: Real>(
    rows: usize,
    terms: &[Part<T>],
    cols: Range<usize>,
    out: Out<T>,
    share: bool,
) {
    let depth = terms.iter().map(|part| part.k.len()).sum::<usize>();
    let shape = T::shape();
    let (tiles, strips) = (rows.div_ceil(shape.rows), cols.len().div_ceil(STRIP));
    let left = if strips > FEW { tiles * shape.rows * depth } else { 0 };
    with_scratch(left + strips * STRIP * depth, |packed| {
        let (left, right) = packed.split_at_mut(left);
        let groups: Vec<_> = parts(strips, STRIPS.min(strips.div_ceil(2))).collect();
        let bands: Vec<_> = parts(tiles, tiles.div_ceil(tiles.div_ceil(TILES))).collect();
        let to = Out { first: right.as_mut_ptr(), place: out.place };
        each(terms.len() * groups.len(), share, |i| {
            let (part, group) = (&terms[i / groups.len()], &groups[i % groups.len()]);
            let start = strips * STRIP * part.at + group.start * STRIP * part.k.len();
            // SAFETY: different groups and depths have disjoint parts of the packed operand.
            let packed = unsafe { to.part(start, group.len() * STRIP * part.k.len()) };
            let end = (group.end * STRIP).min(cols.len());
            let cols = cols.start + group.start * STRIP..cols.start + end;
            part.b.pack(part.k.clone(), cols, packed);
        });
        if !left.is_empty() {
            let to = Out { first: left.as_mut_ptr(), place: out.place };
            each(bands.len() * terms.len(), share, |i| {
                let (band, part) = (&bands[i / terms.len()], &terms[i % terms.len()]);
                for tile in band.clone() {
                    let some = tile * shape.rows..((tile + 1) * shape.rows).min(rows);
                    let start = shape.rows * (tiles * part.at + tile * part.k.len());
                    // SAFETY: tiles are disjoint.
                    let packed = unsafe { to.part(start, shape.rows * part.k.len()) };
                    match shape.rows {
                        ROWS => pack_tile::<T, ROWS>(part.a.rows(some), packed),
                        _ => pack_tile::<T, { NARROW.rows }>(part.a.rows(some), packed),
                    }
                }
            });
        }
        let sides = Sides { shape, left, right, rows, tiles, strips, cols: cols.len() };
        each(bands.len() * groups.len(), share, |i| {
            let (group, band) = (&groups[i / bands.len()], &bands[i % bands.len()]);
            for part in terms {
                // The last strip may be narrower: it is multiplied alone.
                let whole = group.start..group.end.min(cols.len() / STRIP);
                for from in whole.clone().step_by(shape.strips) {
                    let strips = from..(from + shape.strips).min(whole.end);
                    // SAFETY: `out` has room for the product, whose tiles are disjoint.
                    unsafe { sides.multiply(band.clone(), strips, part, out) };
                }
                if whole.end < group.end {
                    // SAFETY: as above.
                    unsafe { sides.multiply_narrow(band.clone(), whole.end, part, out) };
                }
            }
        });
    });
}

/// Packs the rows of a tile into (columns, `R`), padded with zeros.
fn pack_tile<T: Real, const R: usize>(a: Mat<T>, packed: &mut [T]) {
    let [row, col] = a.strides;
    let all = packed.as_chunks_mut::<R>().0;
    if a.rows == R && col == 1 {
        let rows: [&[T]; R] = std::array::from_fn(|r| &a.data[r * row..][..all.len()]);
        for (k, packed) in all.iter_mut().enumerate() {
            *packed = std::array::from_fn(|r| rows[r][k]);
        }
        return;
    }
    if a.rows == R && row == 1 {
        for (k, packed) in all.iter_mut().enumerate() {
            packed.copy_from_slice(&a.data[k * col..][..R]);
        }
        return;
    }
    for (k, packed) in all.iter_mut().enumerate() {
        *packed = std::array::from_fn(|r| match r < a.rows {
            true => a.data[r * row + k * col],
            false => T::ZERO,
        });
    }
}

/// Both operands of a product, packed.
struct Sides<'a, T> {
    shape: Shape,
    /// Empty if the left operand is read in place.
    left: &'a [T],
    right: &'a [T],
    rows: usize,
    tiles: usize,
    strips: usize,
    cols: usize,
}

impl<T: Real> Sides<'_, T> {
    /// Calls `run` for each of some tiles: with its number of rows, the left operand and its
    /// strides, and the index of the first row.
    fn each_tile(
        &self,
        tiles: Range<usize>,
        part: &Part<T>,
        mut run: impl FnMut(usize, *const T, [usize; 2], usize),
    ) {
        let most = self.shape.rows;
        for tile in tiles {
            let row = tile * most;
            let (left, strides) = match self.left {
                [] => (&part.a.data[row * part.a.strides[0]..], part.a.strides),
                left => (&left[self.tiles * most * part.at + row * part.k.len()..], [1, most]),
            };
            run(most.min(self.rows - row), left.as_ptr(), strides, row);
        }
    }

    /// The packed strips from `strip` on, for a range of the terms, and the distance of two strips.
    fn strips_from(&self, strips: Range<usize>, part: &Part<T>) -> (*const T, usize) {
        let distance = STRIP * part.k.len();
        let at = self.strips * STRIP * part.at;
        (self.right[at..][strips.start * distance..strips.end * distance].as_ptr(), distance)
    }

    /// Multiplies some tiles by some strips of full width, for a range of the terms.
    ///
    /// # Safety
    /// `out` must have room for the product, and no other thread may access these tiles of it.
    unsafe fn multiply(
        &self,
        tiles: Range<usize>,
        strips: Range<usize>,
        part: &Part<T>,
        out: Out<T>,
    ) {
        let Place { stride, at, add } = out.place;
        let (depth, add) = (part.k.len(), add || part.at > 0);
        let (b, distance) = self.strips_from(strips.clone(), part);
        // All tiles but the last have the same number of rows.
        let mut kernel: Option<(usize, Tile<T>)> = None;
        self.each_tile(tiles, part, |rows, left, strides, row| {
            let run = match kernel {
                Some((of, run)) if of == rows => run,
                _ => T::tile(rows, strips.len(), strides),
            };
            kernel = Some((rows, run));
            // SAFETY: `a` was checked to be inside its slice or was packed, the strips have `depth`
            // rows, and the caller guarantees the room in `out`.
            unsafe {
                let out = out.at(row * stride + at + strips.start * STRIP);
                run(depth, left, strides, b, distance, out, stride, add);
            }
        });
    }

    /// Multiplies some tiles by the last strip, which has fewer columns.
    ///
    /// # Safety
    /// As for [`Sides::multiply`].
    unsafe fn multiply_narrow(
        &self,
        tiles: Range<usize>,
        strip: usize,
        part: &Part<T>,
        out: Out<T>,
    ) {
        let Place { stride, at, add } = out.place;
        let (depth, add) = (part.k.len(), add || part.at > 0);
        let width = self.cols - strip * STRIP;
        let (b, distance) = self.strips_from(strip..strip + 1, part);
        self.each_tile(tiles, part, |rows, left, strides, row| {
            let run = T::tile(rows, 1, strides);
            let mut whole = [T::ZERO; ROWS * STRIP];
            // SAFETY: as in `multiply`; the buffer holds a whole tile.
            unsafe { run(depth, left, strides, b, distance, whole.as_mut_ptr(), STRIP, false) };
            for (r, whole) in whole.chunks_exact(STRIP).take(rows).enumerate() {
                for (c, &x) in whole[..width].iter().enumerate() {
                    // SAFETY: guaranteed by the caller.
                    unsafe {
                        let out = out.at((row + r) * stride + at + strip * STRIP + c);
                        out.write(if add { *out + x } else { x });
                    }
                }
            }
        });
    }
}

/// Lends the thread's scratch buffer. Allocates a second one if the first is in use.
fn with_scratch<T: Real>(len: usize, run: impl FnOnce(&mut [T])) {
    let mut scratch = T::scratch().take();
    if scratch.len() < len {
        scratch.resize(len, T::ZERO);
    }
    run(&mut scratch[..len]);
    T::scratch().set(scratch);
}

/// The scalar kernel for this number of rows, and one strip.
pub(super) fn plain_tile<T: Real>(rows: usize) -> Tile<T> {
    match rows {
        1 => run_plain::<T, 1>,
        2 => run_plain::<T, 2>,
        3 => run_plain::<T, 3>,
        4 => run_plain::<T, 4>,
        5 => run_plain::<T, 5>,
        6 => run_plain::<T, 6>,
        _ => unreachable!("no tile has {rows} rows"),
    }
}

/// A tile in scalar code.
///
/// # Safety
/// As for [`Tile`].
unsafe fn run_plain<T: Real, const R: usize>(
    depth: usize,
    a: *const T,
    strides: [usize; 2],
    strip: *const T,
    _: usize,
    out: *mut T,
    stride: usize,
    add: bool,
) {
    let mut sums = [[T::ZERO; STRIP]; R];
    for k in 0..depth {
        for r in 0..R {
            for c in 0..STRIP {
                // SAFETY: guaranteed by the caller.
                let (x, w) =
                    unsafe { (*a.add(r * strides[0] + k * strides[1]), *strip.add(k * STRIP + c)) };
                sums[r][c] += x * w;
            }
        }
    }
    for r in 0..R {
        for c in 0..STRIP {
            // SAFETY: guaranteed by the caller.
            unsafe {
                let out = out.add(r * stride + c);
                *out = if add { *out + sums[r][c] } else { sums[r][c] };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn numbers(count: usize, seed: u64) -> Vec<f64> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// Checks f32 and f64 products of matrices with various strides against the definition.
    #[test]
    fn products_are_what_they_should_be() {
        for (m, n, k) in [
            (1, 1, 1),
            (6, 16, 512),
            (7, 17, 513),
            (130, 40, 33),
            (61, 100, 1030),
            (5, 3, 0),
            // More than the amount packed at a time, in each dimension.
            (2051, 3, 5),
            (3, 1030, 9),
            (13, 50, 2060),
        ] {
            for turned in 0..4 {
                let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                let (stride, at) = (n + 5, 3);
                let before = numbers(m * stride, 3);
                for add in [false, true] {
                    let mut right = before.clone();
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let at_a = |x| if turned & 1 == 0 { i * k + x } else { x * m + i };
                        let at_b = |x| if turned & 2 == 0 { x * n + j } else { j * k + x };
                        let sum: f64 = (0..k).map(|x| a[at_a(x)] * b[at_b(x)]).sum();
                        let out = &mut right[i * stride + at + j];
                        *out = if add { *out + sum } else { sum };
                    }
                    fn run<T: Real>(
                        [a, b, before]: [&[f64]; 3],
                        [m, n, k]: [usize; 3],
                        turned: usize,
                        place: Place,
                    ) -> [Vec<f64>; 2] {
                        let of = |x: &[f64]| x.iter().map(|x| T::of(*x)).collect::<Vec<T>>();
                        let (a, b) = (of(a), of(b));
                        let a = if turned & 1 == 0 {
                            Mat::new(&a, m, k)
                        } else {
                            Mat::new(&a, k, m).t()
                        };
                        let b = if turned & 2 == 0 {
                            Mat::new(&b, k, n)
                        } else {
                            Mat::new(&b, n, k).t()
                        };
                        [product::<T>, product_here::<T>].map(|product| {
                            let mut out = of(before);
                            product(a, b, &mut out, place.stride, place.at, place.add);
                            out.iter().map(|x| x.wide()).collect()
                        })
                    }
                    let place = Place { stride, at, add };
                    let wide = run::<f64>([&a, &b, &before], [m, n, k], turned, place);
                    let narrow = run::<f32>([&a, &b, &before], [m, n, k], turned, place);
                    assert_eq!(narrow[0], narrow[1], "threads change nothing");
                    for (found, bound) in [(&wide[0], 1e-12), (&wide[1], 1e-12), (&narrow[0], 1e-4)]
                    {
                        for (found, right) in found.iter().zip(&right) {
                            assert!((found - right).abs() < bound, "{m} {n} {k}: {found}, {right}");
                        }
                    }
                }
            }
        }
    }
}
