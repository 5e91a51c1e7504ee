//! The kernels with the modules that they need, and their tests; see `Cargo.toml`.

// The crate has users of what is unused here.
#![allow(dead_code)]

pub use ::gguf::gguf;
#[path = "../../../src/isa.rs"]
pub mod isa;
#[path = "../../../src/kernels/mod.rs"]
pub mod kernels;

/// A test program that does not find the instruction set would silently test others.
#[test]
fn the_expected_instruction_set_is_in_use() {
    if let Ok(name) = std::env::var("INGOT_TEST_ISA") {
        assert_eq!(isa::isa().name(), name, "INGOT_TEST_ISA");
    }
}
