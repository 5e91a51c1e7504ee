//! Training.
pub mod model;
pub mod ops;
pub mod optim;
pub mod schedule;
