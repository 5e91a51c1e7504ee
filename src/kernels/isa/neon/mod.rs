//! Kernels for NEON with dot products. All are the scalar ones so far.

use super::{Kernels, scalar};

pub(super) const KERNELS: Kernels = scalar::KERNELS;
