use pulp::{Arch, Simd, WithSimd, bytemuck};

/// Columns of a panel.
const PANEL: usize = 16;
/// Rows of the right matrix that are multiplied before the next ones: two panels of them stay in the first-level cache.
const BLOCK: usize = 128;

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
        let mut packed = PackedMatrix::default();
        packed.pack(matrix, num_rows, num_columns);
        packed
    }

    /// Packs another matrix into the same memory.
    pub fn pack(&mut self, matrix: MatrixView<'_>, num_rows: usize, num_columns: usize) {
        let num_panels = num_columns.div_ceil(PANEL);
        (self.num_rows, self.num_columns) = (num_rows, num_columns);
        self.data.resize(num_rows * num_panels * PANEL, 0.0);
        let (mut chunks, _) = self.data.as_chunks_mut::<PANEL>();
        for first_row in (0..num_rows).step_by(BLOCK) {
            let block_rows = BLOCK.min(num_rows - first_row);
            for panel in 0..num_panels {
                let first_column = panel * PANEL;
                let width = PANEL.min(num_columns - first_column);
                let (panel_chunks, rest) = chunks.split_at_mut(block_rows);
                if width == PANEL && matrix.column_stride == 1 {
                    for (row, chunk) in panel_chunks.iter_mut().enumerate() {
                        let start = (first_row + row) * matrix.row_stride + first_column;
                        *chunk = *matrix.data[start..].first_chunk().expect("the view holds the matrix");
                    }
                } else {
                    // Columns outside: the view of a transpose is read in the order of its memory.
                    for column in 0..PANEL {
                        for (row, chunk) in panel_chunks.iter_mut().enumerate() {
                            let (row, from) = (first_row + row, first_column + column);
                            chunk[column] = if column < width { matrix.at(row, from) } else { 0.0 };
                        }
                    }
                }
                chunks = rest;
            }
        }
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
        // A tile's sums leave registers for a row of the right matrix and a factor: 16 sums of 32 registers, 8 of 16.
        match S::F32_LANES {
            16 => self.tiles::<S, 8, 2, 1>(simd),
            8 => self.tiles::<S, 4, 1, 2>(simd),
            4 => self.tiles::<S, 4, 1, 4>(simd),
            _ => self.tiles::<S, 1, 1, PANEL>(simd),
        }
    }
}

impl Product<'_> {
    /// Computes tiles of `ROWS` rows and `PANELS` panels of `VECTORS` vectors.
    #[inline(always)]
    fn tiles<S: Simd, const ROWS: usize, const PANELS: usize, const VECTORS: usize>(self, simd: S) {
        let Product { left, num_rows, right, start, out } = self;
        let (panel_vectors, tail) = S::as_simd_f32s(&right.data);
        debug_assert!(tail.is_empty());
        let (mut panel_rows, _) = panel_vectors.as_chunks::<VECTORS>();
        for first_k in (0..right.num_rows).step_by(BLOCK) {
            let block_len = BLOCK.min(right.num_rows - first_k);
            let (block, rest) = panel_rows.split_at(block_len * right.num_columns.div_ceil(PANEL));
            panel_rows = rest;
            let start = if first_k > 0 { Start::Out } else { start };
            for first_row in (0..num_rows).step_by(ROWS) {
                let tile = RowTile { simd, first_row, len: ROWS.min(num_rows - first_row), block, block_len, start };
                if left.column_stride == 1 {
                    // Rows past the last repeat it, and their sums are not stored.
                    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| {
                        let start = (first_row + row.min(tile.len - 1)) * left.row_stride + first_k;
                        &left.data[start..start + block_len]
                    });
                    tile.run::<PANELS, ROWS>(|k| std::array::from_fn(|row| rows[row][k]), out, right.num_columns);
                } else if left.row_stride == 1 && tile.len == ROWS {
                    // Side by side: where columns are far apart they share few places of the first-level cache.
                    let mut factors = [[0.0; ROWS]; BLOCK];
                    let columns = &left.data[first_k * left.column_stride + first_row..];
                    for (k, factors) in factors[..block_len].iter_mut().enumerate() {
                        let column = columns[k * left.column_stride..].first_chunk::<ROWS>();
                        *factors = *column.expect("the tile is full");
                    }
                    tile.run::<PANELS, ROWS>(|k| factors[k], out, right.num_columns);
                } else {
                    let at = |row: usize, k: usize| left.at(first_row + row.min(tile.len - 1), first_k + k);
                    tile.run::<PANELS, ROWS>(|k| std::array::from_fn(|row| at(row, k)), out, right.num_columns);
                }
            }
        }
        if right.num_rows == 0 && start == Start::Zero {
            out.fill(0.0);
        }
    }
}

/// Some rows of the product over one block of k.
struct RowTile<'a, S: Simd, const VECTORS: usize> {
    simd: S,
    first_row: usize,
    /// Rows that are stored.
    len: usize,
    /// By panel, by k.
    block: &'a [[S::f32s; VECTORS]],
    block_len: usize,
    start: Start,
}

impl<S: Simd, const VECTORS: usize> RowTile<'_, S, VECTORS> {
    /// Multiplies the rows, whose factors at k are `left(k)`, by all panels.
    #[inline(always)]
    fn run<const PANELS: usize, const ROWS: usize>(
        &self,
        left: impl Fn(usize) -> [f32; ROWS],
        out: &mut [f32],
        num_columns: usize,
    ) {
        let mut groups = self.block.chunks_exact(PANELS * self.block_len);
        let mut first_column = 0;
        for group in &mut groups {
            self.panels::<PANELS, ROWS>(&left, group, first_column, out, num_columns);
            first_column += PANELS * PANEL;
        }
        for panel in groups.remainder().chunks_exact(self.block_len) {
            self.panels::<1, ROWS>(&left, panel, first_column, out, num_columns);
            first_column += PANEL;
        }
    }

    #[inline(always)]
    fn panels<const PANELS: usize, const ROWS: usize>(
        &self,
        left: &impl Fn(usize) -> [f32; ROWS],
        group: &[[S::f32s; VECTORS]],
        first_column: usize,
        out: &mut [f32],
        num_columns: usize,
    ) {
        let simd = self.simd;
        let width = (PANELS * PANEL).min(num_columns - first_column);
        let out_row = |row: usize| {
            let start = (self.first_row + row) * num_columns + first_column;
            start..start + width
        };
        let panels: [&[[S::f32s; VECTORS]]; PANELS] =
            std::array::from_fn(|panel| &group[panel * self.block_len..(panel + 1) * self.block_len]);
        let mut sums = [[[simd.splat_f32s(0.0); VECTORS]; PANELS]; ROWS];
        if self.start == Start::Out {
            for (row, sum) in sums[..self.len].iter_mut().enumerate() {
                copy_lanes::<PANELS>(&out[out_row(row)], bytemuck::cast_slice_mut(sum.as_flattened_mut()));
            }
        }
        #[expect(clippy::needless_range_loop, reason = "k walks the panels and the rows side by side")]
        for k in 0..self.block_len {
            let factors = left(k);
            for row in 0..ROWS {
                let factor = simd.splat_f32s(factors[row]);
                for panel in 0..PANELS {
                    for vector in 0..VECTORS {
                        let sum = &mut sums[row][panel][vector];
                        *sum = simd.mul_add_f32s(factor, panels[panel][k][vector], *sum);
                    }
                }
            }
        }
        for (row, sum) in sums[..self.len].iter().enumerate() {
            copy_lanes::<PANELS>(bytemuck::cast_slice(sum.as_flattened()), &mut out[out_row(row)]);
        }
    }
}

/// Copies what both slices hold; full panels without a call.
#[inline(always)]
fn copy_lanes<const PANELS: usize>(from: &[f32], to: &mut [f32]) {
    let (from_panels, _) = from.as_chunks::<PANEL>();
    let (to_panels, _) = to.as_chunks_mut::<PANEL>();
    match (from_panels.first_chunk::<PANELS>(), to_panels.first_chunk_mut::<PANELS>()) {
        (Some(from), Some(to)) => *to = *from,
        _ => to.iter_mut().zip(from).for_each(|(to, from)| *to = *from),
    }
}
