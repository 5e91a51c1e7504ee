//! Measurements of models in the calling process.
//!
//! | file | content |
//! |---|---|
//! | `verify/` | `ingot verify`: how far the runners' rounding moves a model's predictions |

pub mod verify;
