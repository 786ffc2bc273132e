use super::LANES;

/// Computes e^x to about 1 ulp for x in [-87, 88], clamped outside.
///
/// Cody-Waite reduction by ln 2 and a polynomial of degree 6 (Cephes `expf`, coefficients by Moshier). Ours, because the
/// system's differs between machines and does not vectorise.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5e-1);
    let value = p.mul_add(r * r, r) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    value * f32::from_bits(exponent)
}

/// Sums 16 lanes as one fixed tree.
#[inline(always)]
pub fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    let mut eight = [0.0; 8];
    for i in 0..8 {
        eight[i] = lanes[i] + lanes[i + 8];
    }
    let four = [eight[0] + eight[4], eight[1] + eight[5], eight[2] + eight[6], eight[3] + eight[7]];
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Sums `f(a, b)` over two slices of equal length, a multiple of 16, in 16 lanes.
#[inline(always)]
fn sum_pairs(left: &[f32], right: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (left, _) = left.as_chunks::<LANES>();
    let (right, _) = right.as_chunks::<LANES>();
    for (left, right) in left.iter().zip(right) {
        for lane in 0..LANES {
            lanes[lane] = f(left[lane], right[lane], lanes[lane]);
        }
    }
    sum_lanes(&lanes)
}

/// Replaces `scores` by their softmax; all but the first `len` become 0. `scores` is a multiple of 16 long.
#[inline(always)]
pub fn softmax_in_place(scores: &mut [f32], len: usize) {
    let max = scores[..len].iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores[len..].fill(f32::NEG_INFINITY);
    let mut lanes = [0.0; LANES];
    let (chunks, _) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let score = chunk[lane];
            let weight = if score == f32::NEG_INFINITY { 0.0 } else { exp(score - max) };
            chunk[lane] = weight;
            lanes[lane] += weight;
        }
    }
    let scale = 1.0 / sum_lanes(&lanes);
    scores.iter_mut().for_each(|score| *score *= scale);
}

/// Normalises each row to root mean square 1 and scales it (Zhang and Sennrich 2019).
///
/// - `x`, `out`: `[N, D]`; `weight`: `[D]`, D a multiple of 16.
/// - `epsilon`: added to a row's mean square.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    vectorized!({
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let scale = inverse_rms(x, epsilon);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        }
    });
}

#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    let squares = sum_pairs(x, x, |a, b, sum| a.mul_add(b, sum));
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

/// Normalises each row in place, as [`rms_norm`] does.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
    let width = weight.len();
    vectorized!({
        for x in x.chunks_exact_mut(width) {
            let scale = inverse_rms(x, epsilon);
            for (x, weight) in x.iter_mut().zip(weight) {
                *x = *x * scale * weight;
            }
        }
    });
}

/// Computes the gradients of [`rms_norm`]: writes `grad_x [N, D]`, or adds to it, and adds to `grad_weight [D]`, rows in order.
pub fn rms_norm_backward<const ADD: bool>(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    grad_out: &[f32],
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
) {
    let width = weight.len();
    let mut weighted = vec![0.0; width];
    vectorized!({
        let rows = x.chunks_exact(width).zip(grad_out.chunks_exact(width)).zip(grad_x.chunks_exact_mut(width));
        for ((x, grad_out), grad_x) in rows {
            let scale = inverse_rms(x, epsilon);
            for index in 0..width {
                weighted[index] = grad_out[index] * weight[index];
                grad_weight[index] = (grad_out[index] * x[index]).mul_add(scale, grad_weight[index]);
            }
            let dot = sum_pairs(&weighted, x, |a, b, sum| a.mul_add(b, sum));
            let pull = scale * scale * scale * dot / width as f32;
            for index in 0..width {
                let grad = weighted[index] * scale - x[index] * pull;
                grad_x[index] = if ADD { grad_x[index] + grad } else { grad };
            }
        }
    });
}

/// Computes silu(gate) * up (Shazeer 2020) for rows of `[gate | up]`.
///
/// - `gate_up`: `[N, 2 F]`; `out`: `[N, F]`.
pub fn swiglu(gate_up: &[f32], out: &mut [f32], width: usize) {
    vectorized!({
        for (gate_up, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = gate_up.split_at(width);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * (1.0 / (1.0 + exp(-gate))) * up;
            }
        }
    });
}

/// Computes the gradient of [`swiglu`]: writes `grad_gate_up [N, 2 F]`, and again the output of [`swiglu`].
pub fn swiglu_backward(gate_up: &[f32], grad_out: &[f32], grad_gate_up: &mut [f32], out: &mut [f32], width: usize) {
    vectorized!({
        let rows = gate_up.chunks_exact(2 * width).zip(grad_out.chunks_exact(width));
        let to = grad_gate_up.chunks_exact_mut(2 * width).zip(out.chunks_exact_mut(width));
        for ((gate_up, grad_out), (grad, out)) in rows.zip(to) {
            let (gate, up) = gate_up.split_at(width);
            let (grad_gate, grad_up) = grad.split_at_mut(width);
            for index in 0..width {
                let sigmoid = 1.0 / (1.0 + exp(-gate[index]));
                let silu = gate[index] * sigmoid;
                out[index] = silu * up[index];
                grad_up[index] = grad_out[index] * silu;
                grad_gate[index] = grad_out[index] * up[index] * (sigmoid + silu * (1.0 - sigmoid));
            }
        }
    });
}

/// Adds `y` to `x`.
pub fn add(x: &mut [f32], y: &[f32]) {
    vectorized!({ x.iter_mut().zip(y).for_each(|(x, y)| *x += y) });
}

/// Writes `x + y`.
pub fn sum(x: &[f32], y: &[f32], out: &mut [f32]) {
    vectorized!({ out.iter_mut().zip(x).zip(y).for_each(|((out, x), y)| *out = x + y) });
}

/// The constants of one AdamW update, bias corrections included.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Learning rate over the first moment's bias correction.
    pub step_size: f32,
    /// Inverse square root of the second moment's bias correction.
    pub inverse_root: f32,
    /// The fraction of a weight that weight decay keeps.
    pub keep: f32,
    /// Factor by which gradients are multiplied first.
    pub clip: f32,
}

/// Updates weights and moments in place (Loshchilov and Hutter 2019, algorithm 2; epsilon 1e-8).
pub fn adamw(weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], step: AdamWStep) {
    vectorized!({
        for (((weight, gradient), first), second) in weights.iter_mut().zip(gradient).zip(first).zip(second) {
            let gradient = gradient * step.clip;
            *first = step.beta1 * *first + (1.0 - step.beta1) * gradient;
            *second = step.beta2 * *second + (1.0 - step.beta2) * gradient * gradient;
            *weight = *weight * step.keep - step.step_size * *first / (second.sqrt() * step.inverse_root + 1e-8);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_truth() {
        for step in -870..=880 {
            let x = step as f32 * 0.1;
            let truth = f64::from(x).exp();
            assert!((f64::from(exp(x)) / truth - 1.0).abs() < 2e-7, "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e9), exp(-87.0));
    }

    /// numpy: x = [1, 2, 3, 4] * 4; x / sqrt(mean(x * x) + 1e-6) * 0.5
    #[test]
    fn rms_norm_by_hand() {
        let x: Vec<f32> = (0..16).map(|index| (index % 4 + 1) as f32).collect();
        let mut out = vec![0.0; 16];
        rms_norm(&x, &[0.5; 16], 1e-6, &mut out);
        for (out, expected) in out.iter().zip([0.1826, 0.3651, 0.5477, 0.7303]) {
            assert!((out - expected).abs() < 1e-4);
        }
    }

    #[test]
    fn softmax_ignores_what_is_past_the_end() {
        let mut short = [0.5f32; 16];
        let mut long = [f32::NAN; 48];
        short[1] = -1.0;
        long[..16].copy_from_slice(&short);
        softmax_in_place(&mut short, 3);
        softmax_in_place(&mut long, 3);
        assert_eq!(short, long[..16]);
        assert!((short.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(short[3..], [0.0; 13]);
    }
}
