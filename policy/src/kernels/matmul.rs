use pulp::{Arch, Simd, WithSimd, bytemuck};

/// Columns of a panel.
const PANEL: usize = 16;
/// Rows of the right matrix that are multiplied before the next ones: they stay in the second-level cache.
const BLOCK: usize = 256;

/// A matrix in a slice.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub column_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// Views a row-major matrix.
    pub fn row_major(data: &'a [f32], num_columns: usize) -> MatrixView<'a> {
        MatrixView { data, row_stride: num_columns, column_stride: 1 }
    }

    /// Views the transpose.
    pub fn transposed(self) -> MatrixView<'a> {
        MatrixView { data: self.data, row_stride: self.column_stride, column_stride: self.row_stride }
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        self.data[row * self.row_stride + column * self.column_stride]
    }
}

/// A right-hand matrix `[k, n]` in the order in which [`matmul`] reads it.
#[derive(Clone, Debug, Default)]
pub struct PackedMatrix {
    num_rows: usize,
    num_columns: usize,
    /// By block of rows, by panel of 16 columns, by row; columns past the last are zero.
    data: Vec<f32>,
}

impl PackedMatrix {
    /// Packs a matrix `[num_rows, num_columns]`.
    pub fn new(matrix: MatrixView<'_>, num_rows: usize, num_columns: usize) -> PackedMatrix {
        let num_panels = num_columns.div_ceil(PANEL);
        let mut data = vec![0.0; num_rows * num_panels * PANEL];
        let (mut chunks, _) = data.as_chunks_mut::<PANEL>();
        for first_row in (0..num_rows).step_by(BLOCK) {
            let block_rows = BLOCK.min(num_rows - first_row);
            for panel in 0..num_panels {
                let first_column = panel * PANEL;
                let width = PANEL.min(num_columns - first_column);
                let (panel_chunks, rest) = chunks.split_at_mut(block_rows);
                for (row, chunk) in panel_chunks.iter_mut().enumerate() {
                    if matrix.column_stride == 1 {
                        let start = (first_row + row) * matrix.row_stride + first_column;
                        chunk[..width].copy_from_slice(&matrix.data[start..start + width]);
                    } else {
                        for (column, slot) in chunk[..width].iter_mut().enumerate() {
                            *slot = matrix.at(first_row + row, first_column + column);
                        }
                    }
                }
                chunks = rest;
            }
        }
        PackedMatrix { num_rows, num_columns, data }
    }

    /// Gives the number of rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Gives the number of columns.
    pub fn num_columns(&self) -> usize {
        self.num_columns
    }
}

/// What [`matmul`] does with what is in `out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Overwrites it.
    Zero,
    /// Goes on summing: two calls on the halves of k give the bits of one call on the whole.
    Out,
}

/// Multiplies `left [num_rows, k]` by `right [k, n]` into `out [num_rows, n]`, with the machine's best instructions.
///
/// Every element is the sum over k in ascending order, each step one fused multiply-add from 0. So it depends on its row
/// and its column alone: not on the other rows, not on the instruction set, not on the blocking.
///
/// # Panics
/// When the slices are shorter than the shapes say.
pub fn matmul(left: MatrixView<'_>, num_rows: usize, right: &PackedMatrix, start: Start, out: &mut [f32]) {
    matmul_on(Arch::new(), left, num_rows, right, start, out);
}

/// As [`matmul`], with the instructions of `arch`.
///
/// # Panics
/// When the slices are shorter than the shapes say.
pub fn matmul_on(
    arch: Arch,
    left: MatrixView<'_>,
    num_rows: usize,
    right: &PackedMatrix,
    start: Start,
    out: &mut [f32],
) {
    arch.dispatch(Product { left, num_rows, right, start, out: &mut out[..num_rows * right.num_columns] });
}

struct Product<'a> {
    left: MatrixView<'a>,
    num_rows: usize,
    right: &'a PackedMatrix,
    start: Start,
    out: &'a mut [f32],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // The tile of sums fills the registers: 16 of 8 lanes, 32 of 16 lanes, 32 of 4 lanes.
        match S::F32_LANES {
            16 => self.tiles::<S, 12, 1>(simd),
            8 => self.tiles::<S, 6, 2>(simd),
            4 => self.tiles::<S, 6, 4>(simd),
            _ => self.tiles::<S, 1, PANEL>(simd),
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn tiles<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let Product { left, num_rows, right, start, out } = self;
        let num_columns = right.num_columns;
        let (panel_vectors, tail) = S::as_simd_f32s(&right.data);
        debug_assert!(tail.is_empty());
        let (mut block_rows, _) = panel_vectors.as_chunks::<VECTORS>();
        let mut left_tile = [[0f32; ROWS]; BLOCK];
        for first_k in (0..right.num_rows).step_by(BLOCK) {
            let block_len = BLOCK.min(right.num_rows - first_k);
            let (block, rest) = block_rows.split_at(block_len * num_columns.div_ceil(PANEL));
            block_rows = rest;
            for first_row in (0..num_rows).step_by(ROWS) {
                let tile_rows = ROWS.min(num_rows - first_row);
                pack_left(&left, first_row, tile_rows, first_k, &mut left_tile[..block_len]);
                for (panel, panel_rows) in block.chunks_exact(block_len).enumerate() {
                    let first_column = panel * PANEL;
                    let width = PANEL.min(num_columns - first_column);
                    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
                    if first_k > 0 || start == Start::Out {
                        for (row, sum) in sums[..tile_rows].iter_mut().enumerate() {
                            let start = (first_row + row) * num_columns + first_column;
                            let lanes: &mut [f32] = bytemuck::cast_slice_mut(sum);
                            copy_lanes(&out[start..start + width], lanes);
                        }
                    }
                    for (left_column, right_row) in left_tile[..block_len].iter().zip(panel_rows) {
                        for row in 0..ROWS {
                            let factor = simd.splat_f32s(left_column[row]);
                            for vector in 0..VECTORS {
                                sums[row][vector] = simd.mul_add_f32s(factor, right_row[vector], sums[row][vector]);
                            }
                        }
                    }
                    for (row, sum) in sums[..tile_rows].iter().enumerate() {
                        let start = (first_row + row) * num_columns + first_column;
                        let lanes: &[f32] = bytemuck::cast_slice(sum);
                        copy_lanes(&lanes[..width], &mut out[start..start + width]);
                    }
                }
            }
        }
        if right.num_rows == 0 && start == Start::Zero {
            out.fill(0.0);
        }
    }
}

/// Copies up to a panel's width; a full panel without a call.
#[inline(always)]
fn copy_lanes(from: &[f32], to: &mut [f32]) {
    match (from.first_chunk::<PANEL>(), to.first_chunk_mut::<PANEL>()) {
        (Some(from), Some(to)) => *to = *from,
        _ => to.iter_mut().zip(from).for_each(|(to, from)| *to = *from),
    }
}

/// Copies a tile `[rows, k]` of the left matrix as `[k, rows]`; rows past the last keep whatever was there, and their sums
/// are not stored.
#[inline(always)]
fn pack_left<const ROWS: usize>(
    left: &MatrixView<'_>,
    first_row: usize,
    tile_rows: usize,
    first_k: usize,
    tile: &mut [[f32; ROWS]],
) {
    if left.column_stride == 1 {
        for row in 0..tile_rows {
            let start = (first_row + row) * left.row_stride + first_k;
            let values = &left.data[start..start + tile.len()];
            for (column, value) in tile.iter_mut().zip(values) {
                column[row] = *value;
            }
        }
    } else {
        for (k, column) in tile.iter_mut().enumerate() {
            let start = first_row * left.row_stride + (first_k + k) * left.column_stride;
            if left.row_stride == 1 {
                column[..tile_rows].copy_from_slice(&left.data[start..start + tile_rows]);
            } else {
                for (row, slot) in column[..tile_rows].iter_mut().enumerate() {
                    *slot = left.data[start + row * left.row_stride];
                }
            }
        }
    }
}
