//! The floating-point types of training: f32, and f64 for checks.

use super::gemm::{NARROW, Shape, Tile, plain_tile};
use super::isa::isa;
use super::isa::scalar::transpose;
use std::cell::Cell;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};
use std::thread::LocalKey;

/// f32 or f64.
pub trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Default
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + Sum
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    fn of(value: f64) -> Self;
    fn of_f32(value: f32) -> Self;
    fn wide(self) -> f64;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
    fn tanh(self) -> Self;
    /// `self * a + b`
    fn mul_add(self, a: Self, b: Self) -> Self;

    /// The shape of the tiles of dense products.
    fn shape() -> Shape;
    /// The kernel of dense products for these numbers of rows and strips, and a left operand with
    /// these strides.
    fn tile(rows: usize, strips: usize, strides: [usize; 2]) -> Tile<Self>;
    /// Transposes a block of eight by eight numbers; the rows of the source are `from_stride`
    /// numbers apart, those of the result `to_stride`.
    ///
    /// # Safety
    /// All of these numbers must be readable and writable.
    unsafe fn transpose(from: *const Self, from_stride: usize, to: *mut Self, to_stride: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { transpose(from, from_stride, to, to_stride) };
    }
    /// The thread's scratch buffer.
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>>;

    fn most(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

thread_local! {
    static SINGLE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static DOUBLE: Cell<Vec<f64>> = const { Cell::new(Vec::new()) };
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        super::vector::exp(self)
    }
    fn ln(self) -> Self {
        f32::ln(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    fn tanh(self) -> Self {
        f32::tanh(self)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }

    fn shape() -> Shape {
        isa().kernels().dense.shape
    }
    fn tile(rows: usize, strips: usize, strides: [usize; 2]) -> Tile<Self> {
        (isa().kernels().dense.tile)(rows, strips, strides)
    }
    // SAFETY: the table's function needs only what the trait requires of the caller.
    #[inline(always)]
    unsafe fn transpose(from: *const Self, from_stride: usize, to: *mut Self, to_stride: usize) {
        // SAFETY: guaranteed by the caller, and `isa` has checked the CPU.
        unsafe { (isa().kernels().dense.transpose)(from, from_stride, to, to_stride) }
    }
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>> {
        &SINGLE
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        value.into()
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn ln(self) -> Self {
        f64::ln(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }

    fn shape() -> Shape {
        NARROW
    }
    fn tile(rows: usize, _: usize, _: [usize; 2]) -> Tile<Self> {
        plain_tile(rows)
    }
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>> {
        &DOUBLE
    }
}
