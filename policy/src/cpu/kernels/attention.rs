use std::ops::Range;

use super::{LANES, softmax_in_place, sum_lanes};
use crate::AttentionShape;

/// Cosines and sines of rotary position embedding (Su et al. 2021), halves rotated against each other.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    half: usize,
    /// `[max_positions, head_dim]`: cosines, then sines.
    values: Vec<f32>,
}

impl RotaryTable {
    /// Computes the table with `libm`, which gives the same bits on every machine.
    ///
    /// - `frequencies`: radians per position, for each pair of a head's elements; 0 rotates nothing.
    pub fn new(max_positions: usize, frequencies: &[f64]) -> RotaryTable {
        let half = frequencies.len();
        let mut values = Vec::with_capacity(max_positions * 2 * half);
        for position in 0..max_positions {
            let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
            values.extend(angles.clone().map(|angle| libm::cos(angle) as f32));
            values.extend(angles.map(|angle| libm::sin(angle) as f32));
        }
        RotaryTable { half, values }
    }

    /// Returns the cosines and the sines of a position.
    ///
    /// # Panics
    /// When the position is past the table.
    #[inline(always)]
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        self.values[position * 2 * self.half..(position + 1) * 2 * self.half].split_at(self.half)
    }

    /// Rotates the queries and keys of packed rows to their positions, in place, and divides queries by sqrt(head_dim).
    ///
    /// - `qkv`: `[N, qkv_dim]`; `positions`: N of them.
    ///
    /// # Panics
    /// When a position is past the table.
    pub fn rotate(&self, shape: AttentionShape, positions: impl Iterator<Item = usize>, qkv: &mut [f32]) {
        self.rotate_by::<false>(shape, positions, qkv);
    }

    /// Converts gradients of the output of [`RotaryTable::rotate`] to gradients of its input, in place.
    ///
    /// # Panics
    /// When a position is past the table.
    pub fn rotate_back(&self, shape: AttentionShape, positions: impl Iterator<Item = usize>, grad_qkv: &mut [f32]) {
        self.rotate_by::<true>(shape, positions, grad_qkv);
    }

    fn rotate_by<const BACK: bool>(
        &self,
        shape: AttentionShape,
        positions: impl Iterator<Item = usize>,
        rows: &mut [f32],
    ) {
        vectorized!({
            let half = self.half;
            let query_scale = 1.0 / (shape.head_dim as f32).sqrt();
            for (position, row) in positions.zip(rows.chunks_exact_mut(shape.qkv_dim())) {
                let (cosines, sines) = self.at(position);
                let heads = row[..shape.value_offset(0)].chunks_exact_mut(2 * half);
                for (head, x) in heads.enumerate() {
                    let scale = if head < shape.num_heads { query_scale } else { 1.0 };
                    let (low, high) = x.split_at_mut(half);
                    for index in 0..half {
                        let sine = if BACK { -sines[index] } else { sines[index] };
                        let (x, y) = (low[index], high[index]);
                        low[index] = (x * cosines[index] - y * sine) * scale;
                        high[index] = (y * cosines[index] + x * sine) * scale;
                    }
                }
            }
        });
    }
}

/// Keys and values of one head and one sequence, keys rotated.
#[derive(Clone, Copy, Debug)]
pub struct KeyValues<'a> {
    /// By block of 16 positions: `[head_dim, 16]`.
    pub keys: &'a [f32],
    /// The row of position p begins at `p * value_stride`.
    pub values: &'a [f32],
    /// Distance between rows of values.
    pub value_stride: usize,
}

/// Writes a head vector to one position of blocks `[head_dim, 16]`.
#[inline(always)]
pub fn set_position(blocks: &mut [f32], position: usize, x: &[f32]) {
    let block = &mut blocks[position / LANES * LANES * x.len()..][..LANES * x.len()];
    for (row, value) in block.chunks_exact_mut(LANES).zip(x) {
        row[position % LANES] = *value;
    }
}

/// Computes attention of rows over positions, both in decoding and in training. A row's result depends on its query and its
/// positions alone, not on the other rows.
///
/// - `queries`: rotated and divided by sqrt(head_dim).
/// - `seen`: the positions that each row sees; their ends ascend.
/// - `weights`: scratch; holds the attention weights afterwards, a row every `weight_stride`, a multiple of 16.
/// - `out`: a row every `out_stride`.
#[inline(always)]
pub fn attend<const ROWS: usize>(
    queries: [&[f32]; ROWS],
    seen: [Range<usize>; ROWS],
    key_values: KeyValues<'_>,
    (weights, weight_stride): (&mut [f32], usize),
    (out, out_stride): (&mut [f32], usize),
) {
    attention_weights(queries, &seen, key_values.keys, (&mut *weights, weight_stride));
    let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &weights[row * weight_stride..][..seen[row].end]);
    weighted_rows(weights, key_values.values, key_values.value_stride, queries[0].len(), (out, out_stride));
}

#[inline(always)]
fn attention_weights<const ROWS: usize>(
    queries: [&[f32]; ROWS],
    seen: &[Range<usize>; ROWS],
    keys: &[f32],
    (weights, stride): (&mut [f32], usize),
) {
    times_blocks(queries, keys, seen[ROWS - 1].end.div_ceil(LANES), (&mut *weights, stride));
    for (row, Range { start, end }) in seen.iter().cloned().enumerate() {
        let weights = &mut weights[row * stride..][..end.next_multiple_of(LANES)];
        weights[..start].fill(f32::NEG_INFINITY);
        softmax_in_place(weights, end);
    }
}

/// Multiplies head vectors by the first blocks `[head_dim, 16]`.
#[inline(always)]
fn times_blocks<const ROWS: usize>(
    x: [&[f32]; ROWS],
    blocks: &[f32],
    num_blocks: usize,
    (out, stride): (&mut [f32], usize),
) {
    let mut first = 0;
    while first < num_blocks {
        // Four sums at a time hide the latency of a multiply-add.
        match (num_blocks - first).min(4 / ROWS) {
            4.. => first += times_blocks_at::<ROWS, 4>(x, blocks, first, out, stride),
            2.. => first += times_blocks_at::<ROWS, 2>(x, blocks, first, out, stride),
            _ => first += times_blocks_at::<ROWS, 1>(x, blocks, first, out, stride),
        }
    }
}

#[inline(always)]
fn times_blocks_at<const ROWS: usize, const BLOCKS: usize>(
    x: [&[f32]; ROWS],
    blocks: &[f32],
    first: usize,
    out: &mut [f32],
    stride: usize,
) -> usize {
    let head_dim = x[0].len();
    let x: [&[f32]; ROWS] = std::array::from_fn(|row| &x[row][..head_dim]);
    let (block_rows, _) = blocks.as_chunks::<LANES>();
    let blocks: [&[[f32; LANES]]; BLOCKS] =
        std::array::from_fn(|block| &block_rows[(first + block) * head_dim..][..head_dim]);
    let mut sums = [[[0f32; LANES]; BLOCKS]; ROWS];
    for index in 0..head_dim {
        for row in 0..ROWS {
            for block in 0..BLOCKS {
                for lane in 0..LANES {
                    sums[row][block][lane] = x[row][index].mul_add(blocks[block][index][lane], sums[row][block][lane]);
                }
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        out[row * stride + first * LANES..][..BLOCKS * LANES].copy_from_slice(sums.as_flattened());
    }
    BLOCKS
}

/// Sums rows of `rows` (of `width` elements, at distance `stride`), weighted by each row of weights, in order.
#[inline(always)]
fn weighted_rows<const ROWS: usize>(
    weights: [&[f32]; ROWS],
    rows: &[f32],
    stride: usize,
    width: usize,
    (out, out_stride): (&mut [f32], usize),
) {
    let shared = weights[0].len();
    let shared_weights = weights.map(|weights| &weights[..shared]);
    let mut first = 0;
    while first < width {
        match ((width - first) / LANES).min(4 / ROWS) {
            4.. => first += weighted_rows_at::<ROWS, 4>(shared_weights, rows, stride, first, out, out_stride),
            2.. => first += weighted_rows_at::<ROWS, 2>(shared_weights, rows, stride, first, out, out_stride),
            _ => first += weighted_rows_at::<ROWS, 1>(shared_weights, rows, stride, first, out, out_stride),
        }
    }
    for row in 1..ROWS {
        let sums = &mut out[row * out_stride..][..width];
        for (index, weight) in weights[row].iter().enumerate().skip(shared) {
            let rows = &rows[index * stride..][..width];
            sums.iter_mut().zip(rows).for_each(|(sum, x)| *sum = weight.mul_add(*x, *sum));
        }
    }
}

#[inline(always)]
fn weighted_rows_at<const ROWS: usize, const CHUNKS: usize>(
    weights: [&[f32]; ROWS],
    rows: &[f32],
    stride: usize,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) -> usize {
    let len = weights[0].len();
    let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &weights[row][..len]);
    let mut sums = [[[0f32; LANES]; CHUNKS]; ROWS];
    for index in 0..len {
        let (chunks, _) = rows[index * stride + first..].as_chunks::<LANES>();
        let chunks: &[[f32; LANES]; CHUNKS] = chunks.first_chunk().expect("the width is a multiple of 16");
        for row in 0..ROWS {
            for chunk in 0..CHUNKS {
                for lane in 0..LANES {
                    sums[row][chunk][lane] = weights[row][index].mul_add(chunks[chunk][lane], sums[row][chunk][lane]);
                }
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        out[row * out_stride + first..][..CHUNKS * LANES].copy_from_slice(sums.as_flattened());
    }
    CHUNKS * LANES
}

/// The largest tile of `for_row_tiles`.
pub const ROW_TILE: usize = 4;

/// Runs a block for tiles of 4, 2 or 1 of `$count` rows. `$first` is a tile's first row, `$rows` its constant number of rows.
macro_rules! for_row_tiles {
    ($count:expr, |$first:ident, $rows:ident| $body:block) => {{
        let count: usize = $count;
        let mut $first = 0;
        while $first < count {
            match count - $first {
                4.. => {
                    const $rows: usize = 4;
                    $body
                    $first += $rows;
                }
                2.. => {
                    const $rows: usize = 2;
                    $body
                    $first += $rows;
                }
                _ => {
                    const $rows: usize = 1;
                    $body
                    $first += $rows;
                }
            }
        }
    }};
}

pub(crate) use for_row_tiles;

/// Computes causal attention within each of the packed sequences.
///
/// - `qkv`: `[N, qkv_dim]`, rotated; `out`: `[N, num_heads * head_dim]`.
/// - `lengths`: lengths of the sequences, summing to N.
pub fn attention_forward(shape: AttentionShape, lengths: &[usize], qkv: &[f32], out: &mut [f32]) {
    let max_len = lengths.iter().copied().max().unwrap_or(0).next_multiple_of(LANES);
    let mut keys = vec![0.0; max_len * shape.head_dim];
    let mut weights = vec![0.0; ROW_TILE * max_len];
    vectorized!({
        let width = shape.num_heads * shape.head_dim;
        let (mut qkv, mut out) = (qkv, &mut out[..]);
        for len in lengths {
            let (sequence, rest) = qkv.split_at(len * shape.qkv_dim());
            let (sequence_out, rest_out) = std::mem::take(&mut out).split_at_mut(len * width);
            for kv_head in 0..shape.num_kv_heads {
                forward_kv_head(shape, kv_head, sequence, sequence_out, &mut keys, (&mut weights, max_len));
            }
            (qkv, out) = (rest, rest_out);
        }
    });
}

#[inline(always)]
fn forward_kv_head(
    shape: AttentionShape,
    kv_head: usize,
    qkv: &[f32],
    out: &mut [f32],
    keys: &mut [f32],
    (weights, stride): (&mut [f32], usize),
) {
    let (width, head_dim, qkv_dim) = (shape.num_heads * shape.head_dim, shape.head_dim, shape.qkv_dim());
    set_positions(keys, qkv, qkv_dim, shape.key_offset(kv_head), head_dim);
    let key_values = KeyValues { keys, values: &qkv[shape.value_offset(kv_head)..], value_stride: qkv_dim };
    for head in shape.heads_of(kv_head) {
        let column = head * head_dim;
        for_row_tiles!(qkv.len() / qkv_dim, |first, ROWS| {
            let queries: [&[f32]; ROWS] =
                std::array::from_fn(|row| &qkv[(first + row) * qkv_dim + column..][..head_dim]);
            let seen = std::array::from_fn(|row| shape.seen_by(first + row));
            attend(queries, seen, key_values, (&mut *weights, stride), (&mut out[first * width + column..], width));
        });
    }
}

/// Writes a head's vectors of all rows to blocks.
#[inline(always)]
fn set_positions(blocks: &mut [f32], rows: &[f32], row_len: usize, column: usize, head_dim: usize) {
    for (position, row) in rows.chunks_exact(row_len).enumerate() {
        set_position(blocks, position, &row[column..column + head_dim]);
    }
}

/// Computes the gradient of [`attention_forward`]; recomputes the attention weights instead of storing them.
///
/// - `grad_out`: `[N, num_heads * head_dim]`; `grad_qkv`: `[N, qkv_dim]`, overwritten, for the rotated queries and keys.
pub fn attention_backward(
    shape: AttentionShape,
    lengths: &[usize],
    qkv: &[f32],
    grad_out: &[f32],
    grad_qkv: &mut [f32],
) {
    let mut scratch = BackwardScratch::new(lengths.iter().copied().max().unwrap_or(0), shape.head_dim);
    vectorized!({
        let width = shape.num_heads * shape.head_dim;
        let (mut qkv, mut grad_out, mut grad_qkv) = (qkv, grad_out, &mut grad_qkv[..]);
        for len in lengths {
            let (sequence, rest) = qkv.split_at(len * shape.qkv_dim());
            let (sequence_grad_out, rest_grad_out) = grad_out.split_at(len * width);
            let (grad, rest_grad) = std::mem::take(&mut grad_qkv).split_at_mut(len * shape.qkv_dim());
            for kv_head in 0..shape.num_kv_heads {
                backward_kv_head(shape, kv_head, sequence, sequence_grad_out, grad, &mut scratch);
            }
            (qkv, grad_out, grad_qkv) = (rest, rest_grad_out, rest_grad);
        }
    });
}

/// Scratch of one key-value head of one sequence.
struct BackwardScratch {
    /// The longest sequence, rounded up to 16.
    stride: usize,
    /// Blocks `[head_dim, 16]`.
    keys: Vec<f32>,
    /// Blocks `[head_dim, 16]`.
    values: Vec<f32>,
    /// `[rows of a tile, stride]`
    weights: Vec<f32>,
    /// `[rows of a tile, stride]`
    grad_scores: Vec<f32>,
    /// `[len, head_dim]`
    grad_keys: Vec<f32>,
    /// `[len, head_dim]`
    grad_values: Vec<f32>,
}

impl BackwardScratch {
    fn new(max_len: usize, head_dim: usize) -> BackwardScratch {
        let stride = max_len.next_multiple_of(LANES);
        BackwardScratch {
            stride,
            keys: vec![0.0; head_dim * stride],
            values: vec![0.0; head_dim * stride],
            weights: vec![0.0; ROW_TILE * stride],
            grad_scores: vec![0.0; ROW_TILE * stride],
            grad_keys: vec![0.0; max_len * head_dim],
            grad_values: vec![0.0; max_len * head_dim],
        }
    }
}

#[inline(always)]
fn backward_kv_head(
    shape: AttentionShape,
    kv_head: usize,
    qkv: &[f32],
    grad_out: &[f32],
    grad_qkv: &mut [f32],
    scratch: &mut BackwardScratch,
) {
    let (width, head_dim, qkv_dim) = (shape.num_heads * shape.head_dim, shape.head_dim, shape.qkv_dim());
    let len = qkv.len() / qkv_dim;
    let (key_offset, value_offset) = (shape.key_offset(kv_head), shape.value_offset(kv_head));
    let BackwardScratch { keys, values, weights, grad_scores, grad_keys, grad_values, stride } = scratch;
    let (weights, grad_scores, stride) = (&mut weights[..], &mut grad_scores[..], *stride);
    set_positions(keys, qkv, qkv_dim, key_offset, head_dim);
    set_positions(values, qkv, qkv_dim, value_offset, head_dim);
    grad_keys[..len * head_dim].fill(0.0);
    grad_values[..len * head_dim].fill(0.0);
    for head in shape.heads_of(kv_head) {
        let column = head * head_dim;
        for_row_tiles!(len, |first, ROWS| {
            let queries: [&[f32]; ROWS] =
                std::array::from_fn(|row| &qkv[(first + row) * qkv_dim + column..][..head_dim]);
            let grad_outs: [&[f32]; ROWS] =
                std::array::from_fn(|row| &grad_out[(first + row) * width + column..][..head_dim]);
            let seen: [Range<usize>; ROWS] = std::array::from_fn(|row| shape.seen_by(first + row));
            attention_weights(queries, &seen, keys, (&mut *weights, stride));
            let tile_len = seen[ROWS - 1].end;
            times_blocks(grad_outs, values, tile_len.div_ceil(LANES), (&mut *grad_scores, stride));
            for (row, seen) in seen.iter().enumerate() {
                let row = row * stride..row * stride + tile_len.next_multiple_of(LANES);
                softmax_backward(&mut weights[row.clone()], &mut grad_scores[row], seen.end);
            }
            let grad_scores: [&[f32]; ROWS] = std::array::from_fn(|row| &grad_scores[row * stride..][..tile_len]);
            let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &weights[row * stride..][..tile_len]);
            let grad_queries = (&mut grad_qkv[first * qkv_dim + column..], qkv_dim);
            weighted_rows(grad_scores, &qkv[key_offset..], qkv_dim, head_dim, grad_queries);
            add_outer(grad_scores, queries, grad_keys);
            add_outer(weights, grad_outs, grad_values);
        });
    }
    for (position, grad_row) in grad_qkv.chunks_exact_mut(qkv_dim).enumerate() {
        let rows = position * head_dim..(position + 1) * head_dim;
        grad_row[key_offset..key_offset + head_dim].copy_from_slice(&grad_keys[rows.clone()]);
        grad_row[value_offset..value_offset + head_dim].copy_from_slice(&grad_values[rows]);
    }
}

/// Converts gradients of attention weights to gradients of scores, in place; sets both to 0 past `len`.
#[inline(always)]
fn softmax_backward(weights: &mut [f32], grad: &mut [f32], len: usize) {
    weights[len..].fill(0.0);
    grad[len..].fill(0.0);
    let (weights, _) = weights.as_chunks::<LANES>();
    let (grads, _) = grad.as_chunks_mut::<LANES>();
    let mut lanes = [0f32; LANES];
    for (weights, grads) in weights.iter().zip(&*grads) {
        for lane in 0..LANES {
            lanes[lane] = weights[lane].mul_add(grads[lane], lanes[lane]);
        }
    }
    let dot = sum_lanes(&lanes);
    for (weights, grads) in weights.iter().zip(grads) {
        for lane in 0..LANES {
            grads[lane] = weights[lane] * (grads[lane] - dot);
        }
    }
}

/// Adds `x[row] * weights[row][position]` to every position's row of `out`, rows in order.
#[inline(always)]
fn add_outer<const ROWS: usize>(weights: [&[f32]; ROWS], x: [&[f32]; ROWS], out: &mut [f32]) {
    let width = x[0].len();
    for chunk in 0..width / LANES {
        let x: [&[f32; LANES]; ROWS] =
            std::array::from_fn(|row| x[row][chunk * LANES..].first_chunk().expect("a chunk is whole"));
        for index in 0..weights[0].len() {
            let out: &mut [f32; LANES] = out[index * width + chunk * LANES..].first_chunk_mut().expect("as above");
            for row in 0..ROWS {
                for lane in 0..LANES {
                    out[lane] = weights[row][index].mul_add(x[row][lane], out[lane]);
                }
            }
        }
    }
}
