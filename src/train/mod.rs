//! Training.
pub mod checkpoint;
pub mod data;
pub mod export;
pub mod model;
pub mod ops;
pub mod optim;
pub mod recipes;
pub mod schedule;
pub mod spec;
