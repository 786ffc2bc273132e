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
/// - `parts`: where the keys and values of which positions lie, in order, at the place that they would have in a single part; all
///   but the last end with a block.
/// - `weights`: scratch; holds the attention weights afterwards, a row every `weight_stride`, a multiple of 16.
/// - `out`: a row every `out_stride`.
#[inline(always)]
pub fn attend<const ROWS: usize, const PARTS: usize>(
    queries: [&[f32]; ROWS],
    seen: [Range<usize>; ROWS],
    parts: &[(Range<usize>, KeyValues<'_>); PARTS],
    (weights, weight_stride): (&mut [f32], usize),
    (out, out_stride): (&mut [f32], usize),
) {
    let keys = parts.each_ref().map(|(positions, part)| (positions.clone(), part.keys));
    attention_weights(queries, &seen, keys, (&mut *weights, weight_stride));
    let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &weights[row * weight_stride..][..seen[row].end]);
    let values = parts.each_ref().map(|(positions, part)| (positions.clone(), part.values));
    weighted_rows(weights, values, parts[0].1.value_stride, queries[0].len(), (out, out_stride));
}

#[inline(always)]
fn attention_weights<const ROWS: usize, const PARTS: usize>(
    queries: [&[f32]; ROWS],
    seen: &[Range<usize>; ROWS],
    keys: [(Range<usize>, &[f32]); PARTS],
    (weights, stride): (&mut [f32], usize),
) {
    for (positions, keys) in keys {
        let blocks = positions.start / LANES..positions.end.min(seen[ROWS - 1].end).div_ceil(LANES);
        times_blocks(queries, keys, blocks, (&mut *weights, stride));
    }
    for (row, Range { start, end }) in seen.iter().cloned().enumerate() {
        let weights = &mut weights[row * stride..][..end.next_multiple_of(LANES)];
        weights[..start].fill(f32::NEG_INFINITY);
        softmax_in_place(weights, end);
    }
}

/// Multiplies head vectors by some blocks `[head_dim, 16]`.
#[inline(always)]
fn times_blocks<const ROWS: usize>(
    x: [&[f32]; ROWS],
    blocks: &[f32],
    Range { start: mut first, end }: Range<usize>,
    (out, stride): (&mut [f32], usize),
) {
    while first < end {
        // Four sums at a time hide the latency of a multiply-add.
        match (end - first).min(4 / ROWS) {
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

/// Sums rows (of `width` elements, at distance `stride`), weighted by each row of weights, in order. They lie in parts, each of which
/// has some of them at their places.
#[inline(always)]
fn weighted_rows<const ROWS: usize, const PARTS: usize>(
    weights: [&[f32]; ROWS],
    parts: [(Range<usize>, &[f32]); PARTS],
    stride: usize,
    width: usize,
    (out, out_stride): (&mut [f32], usize),
) {
    let shared = weights[0].len();
    let shared_weights = weights.map(|weights| &weights[..shared]);
    let mut first = 0;
    while first < width {
        match ((width - first) / LANES).min(4 / ROWS) {
            4.. => {
                first += weighted_rows_at::<ROWS, 4, PARTS>(shared_weights, &parts, stride, first, (out, out_stride))
            }
            2.. => {
                first += weighted_rows_at::<ROWS, 2, PARTS>(shared_weights, &parts, stride, first, (out, out_stride))
            }
            _ => first += weighted_rows_at::<ROWS, 1, PARTS>(shared_weights, &parts, stride, first, (out, out_stride)),
        }
    }
    for row in 1..ROWS {
        let sums = &mut out[row * out_stride..][..width];
        for (index, weight) in weights[row].iter().enumerate().skip(shared) {
            let part = parts.iter().find(|(positions, _)| positions.contains(&index));
            let rows = &part.expect("parts have all positions").1[index * stride..][..width];
            sums.iter_mut().zip(rows).for_each(|(sum, x)| *sum = weight.mul_add(*x, *sum));
        }
    }
}

#[inline(always)]
fn weighted_rows_at<const ROWS: usize, const CHUNKS: usize, const PARTS: usize>(
    weights: [&[f32]; ROWS],
    parts: &[(Range<usize>, &[f32]); PARTS],
    stride: usize,
    first: usize,
    (out, out_stride): (&mut [f32], usize),
) -> usize {
    let len = weights[0].len();
    let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &weights[row][..len]);
    let mut sums = [[[0f32; LANES]; CHUNKS]; ROWS];
    for (positions, rows) in parts {
        for index in positions.start..positions.end.min(len) {
            let (chunks, _) = rows[index * stride + first..].as_chunks::<LANES>();
            let chunks: &[[f32; LANES]; CHUNKS] = chunks.first_chunk().expect("the width is a multiple of 16");
            for row in 0..ROWS {
                for chunk in 0..CHUNKS {
                    for lane in 0..LANES {
                        sums[row][chunk][lane] =
                            weights[row][index].mul_add(chunks[chunk][lane], sums[row][chunk][lane]);
                    }
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

/// Consecutive rows of a sequence. Its earlier positions, if there are any, are the first ones of the segment before, which may
/// have some of them from segments before that: so sequences that begin alike share rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Position of the first row.
    pub start: usize,
    /// Number of rows.
    pub num_rows: usize,
}

impl Segment {
    /// Returns the position after the last row.
    pub fn end(&self) -> usize {
        self.start + self.num_rows
    }
}

fn longest(segments: &[Segment]) -> usize {
    segments.iter().map(Segment::end).max().unwrap_or(0)
}

/// Computes causal attention of packed rows, each over the positions of its own sequence.
///
/// - `qkv`: `[N, qkv_dim]`, rotated; `out`: `[N, num_heads * head_dim]`.
/// - `segments`: the first starts at 0; their rows sum to N.
pub fn attention_forward(shape: AttentionShape, segments: &[Segment], qkv: &[f32], out: &mut [f32]) {
    let max_len = longest(segments).next_multiple_of(LANES);
    let head = |_| [(); 2].map(|()| vec![0.0; max_len * shape.head_dim]);
    let mut heads: Vec<[Vec<f32>; 2]> = (0..shape.num_kv_heads).map(head).collect();
    let mut weights = vec![0.0; ROW_TILE * max_len];
    vectorized!({
        let width = shape.num_heads * shape.head_dim;
        let (mut qkv, mut out) = (qkv, &mut out[..]);
        for segment in segments {
            let (rows, rest) = qkv.split_at(segment.num_rows * shape.qkv_dim());
            let (rows_out, rest_out) = std::mem::take(&mut out).split_at_mut(segment.num_rows * width);
            // What earlier segments wrote before the start is what this one shares with them.
            for (kv_head, scratch) in heads.iter_mut().enumerate() {
                forward_kv_head(shape, kv_head, segment.start, rows, rows_out, scratch, (&mut weights, max_len));
            }
            (qkv, out) = (rest, rest_out);
        }
    });
}

#[inline(always)]
fn forward_kv_head(
    shape: AttentionShape,
    kv_head: usize,
    start: usize,
    qkv: &[f32],
    out: &mut [f32],
    [keys, values]: &mut [Vec<f32>; 2],
    (weights, stride): (&mut [f32], usize),
) {
    let (width, head_dim, qkv_dim) = (shape.num_heads * shape.head_dim, shape.head_dim, shape.qkv_dim());
    set_positions(keys, start, qkv, qkv_dim, shape.key_offset(kv_head), head_dim);
    copy_columns(qkv, qkv_dim, shape.value_offset(kv_head), head_dim, &mut values[start * head_dim..]);
    let parts = [(0..start + qkv.len() / qkv_dim, KeyValues { keys, values, value_stride: head_dim })];
    for head in shape.heads_of(kv_head) {
        let column = head * head_dim;
        for_row_tiles!(qkv.len() / qkv_dim, |first, ROWS| {
            let queries: [&[f32]; ROWS] =
                std::array::from_fn(|row| &qkv[(first + row) * qkv_dim + column..][..head_dim]);
            let seen = std::array::from_fn(|row| shape.seen_by(start + first + row));
            attend(queries, seen, &parts, (&mut *weights, stride), (&mut out[first * width + column..], width));
        });
    }
}

/// Writes a head's vectors of all rows to blocks, from position `start` on.
#[inline(always)]
fn set_positions(blocks: &mut [f32], start: usize, rows: &[f32], row_len: usize, column: usize, head_dim: usize) {
    for (index, row) in rows.chunks_exact(row_len).enumerate() {
        set_position(blocks, start + index, &row[column..column + head_dim]);
    }
}

/// Copies some columns of all rows.
#[inline(always)]
fn copy_columns(rows: &[f32], row_len: usize, column: usize, width: usize, out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(row_len).zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&row[column..column + width]);
    }
}

/// Computes the gradient of [`attention_forward`]; recomputes the attention weights instead of storing them. The gradients of a
/// shared key or value are added segment after segment.
///
/// - `grad_out`: `[N, num_heads * head_dim]`; `grad_qkv`: `[N, qkv_dim]`, overwritten, for the rotated queries and keys.
pub fn attention_backward(
    shape: AttentionShape,
    segments: &[Segment],
    qkv: &[f32],
    grad_out: &[f32],
    grad_qkv: &mut [f32],
) {
    let stride = longest(segments).next_multiple_of(LANES);
    let mut heads: Vec<HeadScratch> =
        (0..shape.num_kv_heads).map(|kv_head| HeadScratch::new(kv_head, stride * shape.head_dim)).collect();
    let mut tile =
        TileScratch { stride, weights: vec![0.0; ROW_TILE * stride], grad_scores: vec![0.0; ROW_TILE * stride] };
    // The rows of the current segment's positions.
    let mut path = Vec::with_capacity(stride);
    vectorized!({
        let (width, qkv_dim) = (shape.num_heads * shape.head_dim, shape.qkv_dim());
        let mut first_row = 0;
        for segment in segments {
            // No later segment sees these positions: their sums are complete.
            store_grads(shape, &heads, segment.start, &path, grad_qkv);
            path.truncate(segment.start);
            let rows = first_row..first_row + segment.num_rows;
            path.extend(rows.clone());
            let grad_out = &grad_out[rows.start * width..rows.end * width];
            let rows = rows.start * qkv_dim..rows.end * qkv_dim;
            for scratch in &mut heads {
                let (qkv, grad_qkv) = (&qkv[rows.clone()], &mut grad_qkv[rows.clone()]);
                backward_kv_head(shape, segment.start, qkv, grad_out, grad_qkv, scratch, &mut tile);
            }
            first_row += segment.num_rows;
        }
        store_grads(shape, &heads, 0, &path, grad_qkv);
    });
}

/// Writes the gradients of keys and values from position `start` on.
#[inline(always)]
fn store_grads(shape: AttentionShape, heads: &[HeadScratch], start: usize, path: &[usize], grad_qkv: &mut [f32]) {
    let head_dim = shape.head_dim;
    for (position, row) in path.iter().enumerate().skip(start) {
        let grad_row = &mut grad_qkv[row * shape.qkv_dim()..][..shape.qkv_dim()];
        let from = position * head_dim..(position + 1) * head_dim;
        for HeadScratch { kv_head, grad_keys, grad_values, .. } in heads {
            let (keys, values) = (shape.key_offset(*kv_head), shape.value_offset(*kv_head));
            grad_row[keys..keys + head_dim].copy_from_slice(&grad_keys[from.clone()]);
            grad_row[values..values + head_dim].copy_from_slice(&grad_values[from.clone()]);
        }
    }
}

/// Scratch of one key-value head: its positions in the current segment.
struct HeadScratch {
    kv_head: usize,
    /// Blocks `[head_dim, 16]`.
    keys: Vec<f32>,
    /// Blocks `[head_dim, 16]`.
    values: Vec<f32>,
    /// `[len, head_dim]`
    key_rows: Vec<f32>,
    /// `[len, head_dim]`
    grad_keys: Vec<f32>,
    /// `[len, head_dim]`
    grad_values: Vec<f32>,
}

impl HeadScratch {
    fn new(kv_head: usize, len: usize) -> HeadScratch {
        let [keys, values, key_rows, grad_keys, grad_values] = [(); 5].map(|()| vec![0.0; len]);
        HeadScratch { kv_head, keys, values, key_rows, grad_keys, grad_values }
    }
}

/// Scratch of a tile of rows, `[rows of a tile, stride]`.
struct TileScratch {
    /// The longest sequence, rounded up to 16.
    stride: usize,
    weights: Vec<f32>,
    grad_scores: Vec<f32>,
}

#[inline(always)]
fn backward_kv_head(
    shape: AttentionShape,
    start: usize,
    qkv: &[f32],
    grad_out: &[f32],
    grad_qkv: &mut [f32],
    scratch: &mut HeadScratch,
    tile: &mut TileScratch,
) {
    let (width, head_dim, qkv_dim) = (shape.num_heads * shape.head_dim, shape.head_dim, shape.qkv_dim());
    let num_rows = qkv.len() / qkv_dim;
    let HeadScratch { kv_head, keys, values, key_rows, grad_keys, grad_values } = scratch;
    let (key_offset, value_offset) = (shape.key_offset(*kv_head), shape.value_offset(*kv_head));
    let TileScratch { stride, weights, grad_scores } = tile;
    let (weights, grad_scores, stride) = (&mut weights[..], &mut grad_scores[..], *stride);
    set_positions(keys, start, qkv, qkv_dim, key_offset, head_dim);
    set_positions(values, start, qkv, qkv_dim, value_offset, head_dim);
    copy_columns(qkv, qkv_dim, key_offset, head_dim, &mut key_rows[start * head_dim..]);
    let own = start * head_dim..(start + num_rows) * head_dim;
    grad_keys[own.clone()].fill(0.0);
    grad_values[own].fill(0.0);
    for head in shape.heads_of(*kv_head) {
        let column = head * head_dim;
        for_row_tiles!(num_rows, |first, ROWS| {
            let queries: [&[f32]; ROWS] =
                std::array::from_fn(|row| &qkv[(first + row) * qkv_dim + column..][..head_dim]);
            let grad_outs: [&[f32]; ROWS] =
                std::array::from_fn(|row| &grad_out[(first + row) * width + column..][..head_dim]);
            let seen: [Range<usize>; ROWS] = std::array::from_fn(|row| shape.seen_by(start + first + row));
            attention_weights(queries, &seen, [(0..start + num_rows, keys)], (&mut *weights, stride));
            let tile_len = seen[ROWS - 1].end;
            times_blocks(grad_outs, values, 0..tile_len.div_ceil(LANES), (&mut *grad_scores, stride));
            for (row, seen) in seen.iter().enumerate() {
                let row = row * stride..row * stride + tile_len.next_multiple_of(LANES);
                softmax_backward(&mut weights[row.clone()], &mut grad_scores[row], seen.end);
            }
            let grad_scores: [&[f32]; ROWS] = std::array::from_fn(|row| &grad_scores[row * stride..][..tile_len]);
            let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &weights[row * stride..][..tile_len]);
            let grad_queries = (&mut grad_qkv[first * qkv_dim + column..], qkv_dim);
            weighted_rows(grad_scores, [(0..tile_len, key_rows)], head_dim, head_dim, grad_queries);
            add_outer(grad_scores, queries, grad_keys);
            add_outer(weights, grad_outs, grad_values);
        });
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
