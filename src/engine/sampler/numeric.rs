//! Passes over a whole row of logits, written so that LLVM vectorizes them.
//!
//! Sums run over fixed lanes of fixed blocks, so a result does not depend on the CPU's vector
//! width. NaN counts as minus infinity throughout: every comparison is written so that it is false
//! for NaN.

/// Logits per block: few enough to stay in the L1 cache, enough to amortise the reduction over
/// lanes.
pub(super) const BLOCK: usize = 1024;
const LANES: usize = 16;

/// Below this argument the exponential is zero; the smallest normal `f32` is about e^-87.3.
const EXP_MIN: f32 = -87.0;

/// `e^x` for `x <= 0`, within 2e-7 relative; 0 below -87 and for NaN.
///
/// Cody-Waite reduction by ln 2 in two parts and the polynomial of Cephes' `expf`
/// (<https://www.netlib.org/cephes/>). No branches and no fused multiply-add, so it vectorizes and
/// gives the same bits on every target.
#[inline(always)]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let y = if x >= EXP_MIN { x } else { EXP_MIN };
    let shifted = y * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (y - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.0e-1;
    p = (p * r) * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x >= EXP_MIN { p * scale } else { 0.0 }
}

/// Returns the largest logit; minus infinity for an empty row or a row of only NaN.
pub(super) fn max(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let mut best = f32::NEG_INFINITY;
    for &x in lanes.iter().chain(rest) {
        best = if x > best { x } else { best };
    }
    best
}

/// Returns the index of the largest logit, the lowest one of equals; `None` if all are minus
/// infinity or NaN.
pub(super) fn argmax(logits: &[f32]) -> Option<usize> {
    let mut best = f32::NEG_INFINITY;
    let mut block = 0;
    for (i, chunk) in logits.chunks(BLOCK).enumerate() {
        let m = max(chunk);
        if m > best {
            best = m;
            block = i;
        }
    }
    if best == f32::NEG_INFINITY {
        return None;
    }
    let start = block * BLOCK;
    logits[start..].iter().position(|&x| x == best).map(|i| start + i)
}

/// Sum of `exp((x - max) * scale)` over one block.
#[inline]
fn block_weight(block: &[f32], max: f32, scale: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = block.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += exp_nonpositive((x - max) * scale);
        }
    }
    let mut sum = 0f32;
    for lane in lanes {
        sum += lane;
    }
    for &x in rest {
        sum += exp_nonpositive((x - max) * scale);
    }
    sum
}

/// Sum of `exp(x - max)` over the row: the denominator of the softmax. `max` must be finite and not
/// less than any logit.
pub(super) fn weight(logits: &[f32], max: f32) -> f64 {
    logits.chunks(BLOCK).map(|b| f64::from(block_weight(b, max, 1.0))).sum()
}

/// Draws from `softmax(logits * scale)` by inverting the cumulative distribution in the order of
/// ids. Costs one exponential per logit, plus those of the selected block.
///
/// `u` is uniform in `[0, 1)`; `max` is the largest logit and finite; `blocks` is scratch.
pub(super) fn draw(logits: &[f32], max: f32, scale: f32, u: f64, blocks: &mut Vec<f64>) -> usize {
    blocks.clear();
    let mut total = 0f64;
    for block in logits.chunks(BLOCK) {
        total += f64::from(block_weight(block, max, scale));
        blocks.push(total);
    }
    let target = u * total;
    // If rounding puts the target beyond the end, use the last block with nonzero weight.
    let hit = blocks.partition_point(|&cumulative| cumulative <= target);
    let hit = hit.min(blocks.partition_point(|&cumulative| cumulative < total));
    let before = if hit == 0 { 0.0 } else { blocks[hit - 1] };
    let start = hit * BLOCK;
    let mut cumulative = before;
    let mut last = start;
    for (i, &x) in logits[start..].iter().take(BLOCK).enumerate() {
        let w = exp_nonpositive((x - max) * scale);
        if w > 0.0 {
            cumulative += f64::from(w);
            last = start + i;
            if cumulative > target {
                break;
            }
        }
    }
    last
}

/// Forbids every token whose bit is not set, and tokens beyond the mask's end.
pub(super) fn apply_mask(logits: &mut [f32], mask: &[u32]) {
    let covered = logits.len().min(mask.len().saturating_mul(32));
    let (inside, outside) = logits.split_at_mut(covered);
    outside.fill(f32::NEG_INFINITY);
    for (chunk, &word) in inside.chunks_mut(32).zip(mask) {
        match word {
            u32::MAX => {}
            0 => chunk.fill(f32::NEG_INFINITY),
            _ => {
                for (bit, x) in chunk.iter_mut().enumerate() {
                    *x = if word >> bit & 1 == 1 { *x } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        let mut worst = 0f64;
        let mut x = -87.0f32;
        while x <= 0.0 {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_nonpositive(x)) - exact).abs() / exact);
            x += 0.000_37;
        }
        assert!(worst < 2e-7, "relative error {worst}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-88.0), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive(f32::NAN), 0.0);
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals_and_ignores_nan() {
        let mut row = vec![-1.0f32; 3000];
        assert_eq!(argmax(&row), Some(0));
        row[2050] = 4.0;
        row[1030] = 4.0;
        row[5] = f32::NAN;
        assert_eq!(argmax(&row), Some(1030));
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
    }

    #[test]
    fn mask_forbids_what_it_does_not_name() {
        let mut row = vec![1.0f32; 100];
        apply_mask(&mut row, &[u32::MAX, 0b101]);
        for (i, &x) in row.iter().enumerate() {
            assert_eq!(x == 1.0, i <= 32 || i == 34, "token {i}");
        }
    }

    #[test]
    fn draw_covers_both_ends() {
        let row = [f32::NEG_INFINITY, 0.0, 0.0, f32::NAN];
        let mut blocks = Vec::new();
        assert_eq!(draw(&row, 0.0, 1.0, 0.0, &mut blocks), 1);
        assert_eq!(draw(&row, 0.0, 1.0, 0.499, &mut blocks), 1);
        assert_eq!(draw(&row, 0.0, 1.0, 0.501, &mut blocks), 2);
        assert_eq!(draw(&row, 0.0, 1.0, 1.0, &mut blocks), 2);
    }
}
