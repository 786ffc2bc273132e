use super::{LANES, softmax_in_place};

/// The shape of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head, a multiple of 16.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Gives the width of a packed row: queries, then keys, then values.
    pub fn qkv_dim(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    fn heads_per_kv_head(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    fn query_offset(&self, head: usize) -> usize {
        head * self.head_dim
    }

    /// Where keys of a key-value head begin in a packed row.
    pub fn key_offset(&self, kv_head: usize) -> usize {
        (self.num_heads + kv_head) * self.head_dim
    }

    /// Where values of a key-value head begin in a packed row.
    pub fn value_offset(&self, kv_head: usize) -> usize {
        (self.num_heads + self.num_kv_heads + kv_head) * self.head_dim
    }
}

/// Cosines and sines of rotary position embedding (Su et al. 2021), base 10,000, halves rotated against each other.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    half: usize,
    /// `[max_positions, head_dim]`: cosines, then sines.
    values: Vec<f32>,
}

impl RotaryTable {
    /// Computes the table with `libm`, which gives the same bits on every machine.
    pub fn new(max_positions: usize, head_dim: usize) -> RotaryTable {
        let half = head_dim / 2;
        let mut values = Vec::with_capacity(max_positions * head_dim);
        for position in 0..max_positions {
            let angle = |index: usize| position as f64 * libm::pow(10_000.0, -(index as f64) / half as f64);
            values.extend((0..half).map(|index| libm::cos(angle(index)) as f32));
            values.extend((0..half).map(|index| libm::sin(angle(index)) as f32));
        }
        RotaryTable { half, values }
    }

    /// Gives the cosines and the sines of a position.
    ///
    /// # Panics
    /// When the position is past the table.
    #[inline(always)]
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        self.values[position * 2 * self.half..(position + 1) * 2 * self.half].split_at(self.half)
    }
}

/// Rotates a head vector to its position, times `scale`. With negated sines it rotates back.
#[inline(always)]
pub fn rotate(x: &[f32], (cosines, sines): (&[f32], &[f32]), sign: f32, scale: f32, out: &mut [f32]) {
    let half = cosines.len();
    let (x_low, x_high) = x.split_at(half);
    let (out_low, out_high) = out.split_at_mut(half);
    for index in 0..half {
        let sine = sign * sines[index];
        out_low[index] = (x_low[index] * cosines[index] - x_high[index] * sine) * scale;
        out_high[index] = (x_high[index] * cosines[index] + x_low[index] * sine) * scale;
    }
}

/// Multiplies a head vector by `columns [head_dim, stride]`, for at least the first `len` columns.
#[inline(always)]
fn times_columns(x: &[f32], columns: &[f32], stride: usize, len: usize, out: &mut [f32]) {
    let (chunks, _) = out.as_chunks_mut::<LANES>();
    for (chunk_index, chunk) in chunks.iter_mut().enumerate().take(len.div_ceil(LANES)) {
        let mut sums = [0f32; LANES];
        for (x, row) in x.iter().zip(columns.chunks_exact(stride)) {
            let (row, _) = row.as_chunks::<LANES>();
            let row = &row[chunk_index];
            for lane in 0..LANES {
                sums[lane] = x.mul_add(row[lane], sums[lane]);
            }
        }
        *chunk = sums;
    }
}

/// Sums rows of `rows` (width `out.len()`, distance `stride`) by weight, in order.
#[inline(always)]
fn weighted_rows(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    let width = out.len();
    let (chunks, _) = out.as_chunks_mut::<LANES>();
    for (chunk_index, chunk) in chunks.iter_mut().enumerate() {
        let mut sums = [0f32; LANES];
        for (index, weight) in weights.iter().enumerate() {
            let row = &rows[index * stride..index * stride + width];
            let (row, _) = row.as_chunks::<LANES>();
            let row = &row[chunk_index];
            for lane in 0..LANES {
                sums[lane] = weight.mul_add(row[lane], sums[lane]);
            }
        }
        *chunk = sums;
    }
}

/// Keys and values of one head and one sequence.
#[derive(Clone, Copy, Debug)]
pub struct KeyValues<'a> {
    /// `[head_dim, key_stride]`, rotated, one column a position.
    pub keys: &'a [f32],
    /// A multiple of 16.
    pub key_stride: usize,
    /// The row of position p begins at `p * value_stride`.
    pub values: &'a [f32],
    /// Distance between rows of values.
    pub value_stride: usize,
}

/// One query over `len` positions: the one place where attention is computed, in decoding and in training.
///
/// - `query`: rotated and divided by sqrt(head width).
/// - `weights`: scratch, at least `len` rounded up to 16; left holding the attention weights.
#[inline(always)]
pub fn attend_row(query: &[f32], key_values: KeyValues<'_>, len: usize, weights: &mut [f32], out: &mut [f32]) {
    let padded = len.next_multiple_of(LANES);
    times_columns(query, key_values.keys, key_values.key_stride, len, weights);
    softmax_in_place(&mut weights[..padded], len);
    weighted_rows(&weights[..len], key_values.values, key_values.value_stride, out);
}

/// Scratch of one key-value head of one sequence.
struct HeadScratch {
    stride: usize,
    /// `[head_dim, stride]`, rotated.
    keys: Vec<f32>,
    query: Vec<f32>,
    weights: Vec<f32>,
}

impl HeadScratch {
    fn new(max_len: usize, head_dim: usize) -> HeadScratch {
        let stride = max_len.next_multiple_of(LANES);
        HeadScratch {
            stride,
            keys: vec![0.0; head_dim * stride],
            query: vec![0.0; head_dim],
            weights: vec![0.0; stride],
        }
    }
}

/// Scatters a head vector into a column.
#[inline(always)]
fn set_column(columns: &mut [f32], stride: usize, column: usize, x: &[f32]) {
    for (row, value) in x.iter().enumerate() {
        columns[row * stride + column] = *value;
    }
}

/// Causal attention with rotary positions over packed sequences, each on its own.
///
/// - `qkv`: `[N, qkv_dim]`; `out`: `[N, num_heads * head_dim]`.
/// - `lengths`: lengths of the sequences, summing to N.
pub fn attention_forward(shape: AttentionShape, rotary: &RotaryTable, lengths: &[usize], qkv: &[f32], out: &mut [f32]) {
    let mut scratch = HeadScratch::new(lengths.iter().copied().max().unwrap_or(0), shape.head_dim);
    vectorized!({
        let width = shape.num_heads * shape.head_dim;
        let (mut qkv, mut out) = (qkv, &mut out[..]);
        for len in lengths {
            let (sequence, rest) = qkv.split_at(len * shape.qkv_dim());
            let (sequence_out, rest_out) = std::mem::take(&mut out).split_at_mut(len * width);
            for kv_head in 0..shape.num_kv_heads {
                forward_kv_head(shape, rotary, kv_head, sequence, sequence_out, &mut scratch);
            }
            (qkv, out) = (rest, rest_out);
        }
    });
}

#[inline(always)]
fn load_keys(shape: AttentionShape, rotary: &RotaryTable, kv_head: usize, qkv: &[f32], scratch: &mut HeadScratch) {
    let offset = shape.key_offset(kv_head);
    for (position, row) in qkv.chunks_exact(shape.qkv_dim()).enumerate() {
        let key = &row[offset..offset + shape.head_dim];
        rotate(key, rotary.at(position), 1.0, 1.0, &mut scratch.query);
        set_column(&mut scratch.keys, scratch.stride, position, &scratch.query);
    }
}

#[inline(always)]
fn forward_kv_head(
    shape: AttentionShape,
    rotary: &RotaryTable,
    kv_head: usize,
    qkv: &[f32],
    out: &mut [f32],
    scratch: &mut HeadScratch,
) {
    load_keys(shape, rotary, kv_head, qkv, scratch);
    let (width, head_dim) = (shape.num_heads * shape.head_dim, shape.head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let HeadScratch { stride, keys, query, weights } = scratch;
    let values = &qkv[shape.value_offset(kv_head)..];
    let key_values = KeyValues { keys, key_stride: *stride, values, value_stride: shape.qkv_dim() };
    for (position, row) in qkv.chunks_exact(shape.qkv_dim()).enumerate() {
        for head in kv_head * shape.heads_per_kv_head()..(kv_head + 1) * shape.heads_per_kv_head() {
            let offset = shape.query_offset(head);
            rotate(&row[offset..offset + head_dim], rotary.at(position), 1.0, scale, query);
            let out = &mut out[position * width + offset..position * width + offset + head_dim];
            attend_row(query, key_values, position + 1, weights, out);
        }
    }
}

/// Gradient of [`attention_forward`]; recomputes the attention weights instead of storing them.
///
/// - `grad_out`: `[N, num_heads * head_dim]`; `grad_qkv`: `[N, qkv_dim]`, overwritten.
pub fn attention_backward(
    shape: AttentionShape,
    rotary: &RotaryTable,
    lengths: &[usize],
    qkv: &[f32],
    grad_out: &[f32],
    grad_qkv: &mut [f32],
) {
    let max_len = lengths.iter().copied().max().unwrap_or(0);
    let mut scratch = HeadScratch::new(max_len, shape.head_dim);
    let mut backward = BackwardScratch::new(max_len, shape.head_dim);
    vectorized!({
        let width = shape.num_heads * shape.head_dim;
        let (mut qkv, mut grad_out, mut grad_qkv) = (qkv, grad_out, &mut grad_qkv[..]);
        for len in lengths {
            let (sequence, rest) = qkv.split_at(len * shape.qkv_dim());
            let (sequence_grad_out, rest_grad_out) = grad_out.split_at(len * width);
            let (grad, rest_grad) = std::mem::take(&mut grad_qkv).split_at_mut(len * shape.qkv_dim());
            for kv_head in 0..shape.num_kv_heads {
                backward_kv_head(
                    shape,
                    rotary,
                    kv_head,
                    (sequence, sequence_grad_out),
                    grad,
                    &mut scratch,
                    &mut backward,
                );
            }
            (qkv, grad_out, grad_qkv) = (rest, rest_grad_out, rest_grad);
        }
    });
}

struct BackwardScratch {
    /// `[len, head_dim]`, rotated.
    key_rows: Vec<f32>,
    /// `[head_dim, stride]`
    value_columns: Vec<f32>,
    grad_weights: Vec<f32>,
    grad_query: Vec<f32>,
    /// `[len, head_dim]`, in the rotated frame.
    grad_keys: Vec<f32>,
    grad_values: Vec<f32>,
}

impl BackwardScratch {
    fn new(max_len: usize, head_dim: usize) -> BackwardScratch {
        let stride = max_len.next_multiple_of(LANES);
        BackwardScratch {
            key_rows: vec![0.0; max_len * head_dim],
            value_columns: vec![0.0; head_dim * stride],
            grad_weights: vec![0.0; stride],
            grad_query: vec![0.0; head_dim],
            grad_keys: vec![0.0; max_len * head_dim],
            grad_values: vec![0.0; max_len * head_dim],
        }
    }
}

#[inline(always)]
fn backward_kv_head(
    shape: AttentionShape,
    rotary: &RotaryTable,
    kv_head: usize,
    (qkv, grad_out): (&[f32], &[f32]),
    grad_qkv: &mut [f32],
    scratch: &mut HeadScratch,
    backward: &mut BackwardScratch,
) {
    let (width, head_dim, qkv_dim) = (shape.num_heads * shape.head_dim, shape.head_dim, shape.qkv_dim());
    let len = qkv.len() / qkv_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let (key_offset, value_offset) = (shape.key_offset(kv_head), shape.value_offset(kv_head));
    load_keys(shape, rotary, kv_head, qkv, scratch);
    let HeadScratch { stride, keys, query, weights } = scratch;
    let BackwardScratch { key_rows, value_columns, grad_weights, grad_query, grad_keys, grad_values } = backward;
    for (position, row) in qkv.chunks_exact(qkv_dim).enumerate() {
        let key = &row[key_offset..key_offset + head_dim];
        rotate(key, rotary.at(position), 1.0, 1.0, &mut key_rows[position * head_dim..(position + 1) * head_dim]);
        set_column(value_columns, *stride, position, &row[value_offset..value_offset + head_dim]);
    }
    grad_keys[..len * head_dim].fill(0.0);
    grad_values[..len * head_dim].fill(0.0);
    for head in kv_head * shape.heads_per_kv_head()..(kv_head + 1) * shape.heads_per_kv_head() {
        let offset = shape.query_offset(head);
        for (position, row) in qkv.chunks_exact(qkv_dim).enumerate() {
            let attended = position + 1;
            let padded = attended.next_multiple_of(LANES);
            let grad_out = &grad_out[position * width + offset..position * width + offset + head_dim];
            rotate(&row[offset..offset + head_dim], rotary.at(position), 1.0, scale, query);
            times_columns(query, keys, *stride, attended, weights);
            softmax_in_place(&mut weights[..padded], attended);
            times_columns(grad_out, value_columns, *stride, attended, grad_weights);
            let mut dot = 0.0;
            for (weight, grad) in weights[..attended].iter().zip(&grad_weights[..attended]) {
                dot = weight.mul_add(*grad, dot);
            }
            for (grad, weight) in grad_weights[..attended].iter_mut().zip(&weights[..attended]) {
                *grad = weight * (*grad - dot);
            }
            weighted_rows(&grad_weights[..attended], key_rows, head_dim, grad_query);
            let grad_row = &mut grad_qkv[position * qkv_dim + offset..position * qkv_dim + offset + head_dim];
            rotate(grad_query, rotary.at(position), -1.0, scale, grad_row);
            for other in 0..attended {
                let rows = other * head_dim..(other + 1) * head_dim;
                let (grad_score, weight) = (grad_weights[other], weights[other]);
                for (grad_key, query) in grad_keys[rows.clone()].iter_mut().zip(&*query) {
                    *grad_key = grad_score.mul_add(*query, *grad_key);
                }
                for (grad_value, grad_out) in grad_values[rows].iter_mut().zip(grad_out) {
                    *grad_value = weight.mul_add(*grad_out, *grad_value);
                }
            }
        }
    }
    for (position, grad_row) in grad_qkv.chunks_exact_mut(qkv_dim).enumerate() {
        let rows = position * head_dim..(position + 1) * head_dim;
        let grad_key = &mut grad_row[key_offset..key_offset + head_dim];
        rotate(&grad_keys[rows.clone()], rotary.at(position), -1.0, 1.0, grad_key);
        grad_row[value_offset..value_offset + head_dim].copy_from_slice(&grad_values[rows]);
    }
}
