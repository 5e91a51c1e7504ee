//! [`quantize_q8_0`]: quantizes numbers bit for bit as ggml does.

use half::f16;

/// Number of values that share a scale.
const BLOCK: usize = 32;
const BLOCK_BYTES: usize = 34;

/// Quantizes whole blocks to `Q8_0`: each block is an f16 scale `d` and 32 × i8. As in
/// `quantize_row_q8_0_ref` of `ggml/src/ggml-quants.c`, values are divided by the scale before the
/// scale is rounded.
///
/// # Panics
/// If `values` is not a whole number of blocks.
pub fn quantize_q8_0(values: &[f32]) -> Vec<u8> {
    let (blocks, rest) = values.as_chunks::<BLOCK>();
    assert!(rest.is_empty(), "rows are whole blocks");
    let mut out = Vec::with_capacity(blocks.len() * BLOCK_BYTES);
    for block in blocks {
        let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend(f16::from_f32(scale).to_le_bytes());
        // As `roundf`: halves are rounded away from zero.
        out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
    }
    out
}
