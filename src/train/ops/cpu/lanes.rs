//! Reductions of a row in sixteen lanes, which vectorize and whose order of summation is fixed.

use crate::kernels::real::Real;
use crate::train::ops::Number;

/// The dot product.
pub(super) fn dot<T: Number>(x: &[T], y: &[T]) -> T {
    let (xs, ys) = (x.as_chunks::<16>(), y.as_chunks::<16>());
    let mut lanes = [T::ZERO; 16];
    for (x, y) in xs.0.iter().zip(ys.0) {
        for i in 0..16 {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    let rest = xs.1.iter().zip(ys.1).map(|(&x, &y)| x * y).sum::<T>();
    lanes.into_iter().sum::<T>() + rest
}

/// The maximum; -∞ for an empty slice.
pub(super) fn most<T: Number>(x: &[T]) -> T {
    let (xs, rest) = x.as_chunks::<16>();
    let mut lanes = [T::NEG_INFINITY; 16];
    for x in xs {
        for i in 0..16 {
            lanes[i] = lanes[i].most(x[i]);
        }
    }
    lanes.iter().chain(rest).fold(T::NEG_INFINITY, |most, &x| most.most(x))
}

/// Replaces each number by `exp(x - from)`; returns their sum.
pub(super) fn exp_from<T: Number>(x: &mut [T], from: T) -> T {
    let (xs, rest) = x.as_chunks_mut::<16>();
    let mut lanes = [T::ZERO; 16];
    for x in xs {
        for i in 0..16 {
            x[i] = Real::exp(x[i] - from);
            lanes[i] += x[i];
        }
    }
    let mut total = lanes.into_iter().sum::<T>();
    for x in rest {
        *x = Real::exp(*x - from);
        total += *x;
    }
    total
}

/// The sums of `exp(x - from)` and of `exp(x - from) (x - from)`.
pub(super) fn exp_moment<T: Number>(x: &[T], from: T) -> (T, T) {
    let (xs, rest) = x.as_chunks::<16>();
    let (mut lanes, mut moments) = ([T::ZERO; 16], [T::ZERO; 16]);
    for x in xs {
        for i in 0..16 {
            let by = x[i] - from;
            let share = Real::exp(by);
            lanes[i] += share;
            // A probability of 0 adds 0, not 0 · ∞.
            moments[i] += if share > T::ZERO { share * by } else { T::ZERO };
        }
    }
    let (mut total, mut moment) = (lanes.into_iter().sum::<T>(), moments.into_iter().sum::<T>());
    for x in rest {
        let share = Real::exp(*x - from);
        total += share;
        moment += if share > T::ZERO { share * (*x - from) } else { T::ZERO };
    }
    (total, moment)
}
