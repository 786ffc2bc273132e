use std::cell::RefCell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

/// Columns of a panel.
const PANEL: usize = 16;
/// Rows of the right matrix in a block: two panels of a block stay in the first-level cache.
const BLOCK: usize = 128;
/// Tiles of rows that are multiplied by a panel before the next panel.
const GROUP_TILES: usize = 4;
/// Rows of the right matrix that a tile is multiplied by in one round of its loop.
const UNROLL: usize = 4;
/// Panels of a block that all rows are multiplied by before the next ones: they stay in the second-level cache.
const PART_PANELS: usize = 32;
/// Rows of the largest tile.
const MAX_ROWS: usize = 8;

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

    /// Returns a column from a row on.
    fn column(&self, column: usize, first_row: usize) -> impl Iterator<Item = &'a f32> {
        self.data[first_row * self.row_stride + column * self.column_stride..].iter().step_by(self.row_stride)
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
                    // Columns in the outer loop: this reads a transposed view in the order of its memory.
                    for column in 0..width {
                        let values = matrix.column(first_column + column, first_row);
                        panel_chunks.iter_mut().zip(values).for_each(|(chunk, value)| chunk[column] = *value);
                    }
                    panel_chunks.iter_mut().for_each(|chunk| chunk[width..].fill(0.0));
                }
                chunks = rest;
            }
        }
    }

    /// Packs the transpose of some columns, up to a block of them, of which the first begins a panel.
    fn pack_transposed(&mut self, matrix: &PackedMatrix, columns: Range<usize>) {
        (self.num_rows, self.num_columns) = (columns.len(), matrix.num_rows);
        self.data.resize(columns.len() * matrix.num_rows.div_ceil(PANEL) * PANEL, 0.0);
        let (mut panels, _) = self.data.as_chunks_mut::<PANEL>();
        for first_row in (0..matrix.num_rows).step_by(PANEL) {
            let (transposed, rest) = panels.split_at_mut(columns.len());
            panels = rest;
            let num_rows = PANEL.min(matrix.num_rows - first_row);
            for (transposed, panel) in transposed.chunks_mut(PANEL).zip(columns.start / PANEL..) {
                transpose_tile(&matrix.panel(panel, first_row)[..num_rows], transposed);
            }
        }
    }

    /// Copies a column.
    pub fn copy_column(&self, column: usize, out: &mut [f32]) {
        for (first_row, out) in (0..self.num_rows).step_by(BLOCK).zip(out.chunks_mut(BLOCK)) {
            let panel = self.panel(column / PANEL, first_row);
            out.iter_mut().zip(panel).for_each(|(value, row)| *value = row[column % PANEL]);
        }
    }

    /// Returns the rows of a panel, from one to the end of its block.
    fn panel(&self, panel: usize, first_row: usize) -> &[[f32; PANEL]] {
        let (first_of_block, row) = (first_row / BLOCK * BLOCK, first_row % BLOCK);
        let block_len = BLOCK.min(self.num_rows - first_of_block);
        let start = first_of_block * self.num_columns.div_ceil(PANEL) + panel * block_len;
        &self.data.as_chunks().0[start + row..start + block_len]
    }

    /// Returns the number of rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Returns the number of columns.
    pub fn num_columns(&self) -> usize {
        self.num_columns
    }
}

/// How [`matmul`] uses the contents of `out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Overwrites them.
    Zero,
    /// Continues the sums: two calls on the halves of k produce the same bits as one call on the whole.
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

/// Multiplies as [`matmul`] does, with the instructions of `arch`.
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
    parts(left, num_rows, right, start, 1, out).into_iter().for_each(|part| part.run_on(arch));
}

/// Divides a product of [`matmul`] by columns into up to `num_parts` parts, which any threads may run: an element is computed in the
/// same way in whatever part it is.
///
/// # Panics
/// When the slices are shorter than the shapes say.
pub fn parts<'a>(
    left: MatrixView<'a>,
    num_rows: usize,
    right: &'a PackedMatrix,
    start: Start,
    num_parts: usize,
    out: &'a mut [f32],
) -> Vec<Part<'a>> {
    if right.num_columns == 0 {
        return Vec::new();
    }
    let num_pairs = right.num_columns.div_ceil(2 * PANEL);
    let num_parts = num_parts.clamp(1, num_pairs);
    let mut parts = Vec::with_capacity(num_parts);
    let mut rest: Vec<&mut [f32]> = out[..num_rows * right.num_columns].chunks_exact_mut(right.num_columns).collect();
    let mut columns = 0..0;
    for part in 1..=num_parts {
        columns = columns.end..right.num_columns.min(num_pairs * part / num_parts * 2 * PANEL);
        let out = if part == num_parts {
            std::mem::take(&mut rest)
        } else {
            rest.iter_mut().map(|row| row.split_off_mut(..columns.len()).expect("a row is as long")).collect()
        };
        parts.push(Part { left, num_rows, right, columns: columns.clone(), start, out });
    }
    parts
}

/// Some columns of a product.
pub struct Part<'a> {
    left: MatrixView<'a>,
    num_rows: usize,
    right: &'a PackedMatrix,
    /// The first begins a panel.
    columns: Range<usize>,
    start: Start,
    /// Every row, these columns.
    out: Vec<&'a mut [f32]>,
}

impl Part<'_> {
    /// Computes it, with the machine's best instructions.
    pub fn run(self) {
        self.run_on(Arch::new());
    }

    fn run_on(mut self, arch: Arch) {
        SCRATCH.with_borrow_mut(|scratch| {
            let Part { left, num_rows, right, columns, start, out } = &mut self;
            let (left, num_rows, start, columns) = (*left, *num_rows, *start, columns.clone());
            arch.dispatch(Product { left, num_rows, right, columns, start, scratch, out });
        });
    }
}

/// Multiplies `left [num_rows, n]` by the transpose of `right [k, n]` into `out [num_rows, k]`: to the last bit the product of
/// [`matmul`] with that transpose. It is packed a strip at a time, which stays in the second-level cache.
///
/// # Panics
/// When the slices are shorter than the shapes say.
pub fn matmul_transposed(left: MatrixView<'_>, num_rows: usize, right: &PackedMatrix, out: &mut [f32]) {
    if num_rows == 0 || right.num_columns == 0 {
        return out[..num_rows * right.num_rows].fill(0.0);
    }
    STRIP.with_borrow_mut(|strip| {
        for first_column in (0..right.num_columns).step_by(BLOCK) {
            strip.pack_transposed(right, first_column..right.num_columns.min(first_column + BLOCK));
            let left = MatrixView { data: &left.data[first_column * left.column_stride..], ..left };
            matmul(left, num_rows, strip, if first_column == 0 { Start::Zero } else { Start::Out }, out);
        }
    });
}

thread_local! {
    /// The strip of a thread's product with a transpose.
    static STRIP: RefCell<PackedMatrix> = const {
        RefCell::new(PackedMatrix { num_rows: 0, num_columns: 0, data: Vec::new() })
    };

    /// Scratch of a thread's products. On the stack it would be cleared for each product, a good part of a small one's cost.
    static SCRATCH: RefCell<[f32; GROUP_TILES * MAX_ROWS * BLOCK]> =
        const { RefCell::new([0.0; GROUP_TILES * MAX_ROWS * BLOCK]) };
}

/// Writes up to 16 columns of up to 16 rows as rows, which end in zeros.
fn transpose_tile(rows: &[[f32; PANEL]], out: &mut [[f32; PANEL]]) {
    if let (Some(rows), Some(out)) = (rows.first_chunk::<PANEL>(), out.first_chunk_mut::<PANEL>()) {
        *out = std::array::from_fn(|column| std::array::from_fn(|row| rows[row][column]));
    } else {
        for (column, out) in out.iter_mut().enumerate() {
            *out = std::array::from_fn(|row| rows.get(row).map_or(0.0, |row| row[column]));
        }
    }
}

struct Product<'a, 'b> {
    left: MatrixView<'a>,
    num_rows: usize,
    right: &'a PackedMatrix,
    columns: Range<usize>,
    start: Start,
    scratch: &'a mut [f32],
    out: &'a mut [&'b mut [f32]],
}

impl WithSimd for Product<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A tile's sums leave registers for a row of the right matrix and a factor: they take 16 of 32 registers, or 12 of 16.
        match S::F32_LANES {
            16 if self.num_rows == 1 => self.tiles::<S, 1, 4, 1>(simd),
            8 if self.num_rows == 1 => self.tiles::<S, 1, 4, 2>(simd),
            16 => self.tiles::<S, 8, 2, 1>(simd),
            8 => self.tiles::<S, 6, 1, 2>(simd),
            4 => self.tiles::<S, 3, 1, 4>(simd),
            _ => self.tiles::<S, 1, 1, PANEL>(simd),
        }
    }
}

impl Product<'_, '_> {
    /// Computes tiles of `ROWS` rows and `PANELS` panels of `VECTORS` vectors.
    ///
    /// Processes a block of k and a part of the columns for a few tiles of rows at a time, panel by panel. A panel comes from the
    /// second-level cache once for all these tiles, and the factors of their rows stay in the first-level cache.
    #[inline(always)]
    fn tiles<S: Simd, const ROWS: usize, const PANELS: usize, const VECTORS: usize>(self, simd: S) {
        let Product { left, num_rows, right, columns, start, scratch, out } = self;
        let panels = columns.start / PANEL..columns.end.div_ceil(PANEL);
        let (panel_vectors, tail) = S::as_simd_f32s(&right.data);
        assert!(tail.is_empty(), "panels are whole vectors");
        let (mut panel_rows, _) = panel_vectors.as_chunks::<VECTORS>();
        for first_k in (0..right.num_rows).step_by(BLOCK) {
            let block_len = BLOCK.min(right.num_rows - first_k);
            let (block, rest) = panel_rows.split_at(block_len * right.num_columns.div_ceil(PANEL));
            panel_rows = rest;
            let whole = &block[panels.start * block_len..panels.end * block_len];
            let next_len = BLOCK.min(right.num_rows - first_k - block_len);
            let next_block = &rest[panels.start * next_len..];
            let start = if first_k > 0 { Start::Out } else { start };
            for (part, block) in whole.chunks(PART_PANELS * block_len).enumerate() {
                let rest_of_block = &whole[whole.len().min((part + 1) * PART_PANELS * block_len)..];
                let after = if rest_of_block.is_empty() { next_block } else { rest_of_block };
                let first_column = part * PART_PANELS * PANEL;
                for first_row in (0..num_rows).step_by(GROUP_TILES * ROWS) {
                    let len = (GROUP_TILES * ROWS).min(num_rows - first_row);
                    // Later groups of rows find the block in the cache.
                    let after = (first_row == 0).then_some(after);
                    let group = RowGroup { simd, first_row, len, block, after, block_len, first_column, start };
                    let tiles = (0..len).step_by(ROWS).map(|row| (first_row + row, ROWS.min(len - row)));
                    if left.column_stride == 1 {
                        let (by_row, _) = scratch.as_chunks_mut::<BLOCK>();
                        let (by_row, _) = by_row.as_chunks_mut::<ROWS>();
                        for ((first_row, len), copy) in tiles.zip(&mut *by_row) {
                            copy_rows(left, first_row, len, first_k..first_k + block_len, copy);
                        }
                        group.run::<PANELS, ROWS, _>(|tile| ByRow(&by_row[tile]), out);
                    } else {
                        let (by_k, _) = scratch.as_chunks_mut::<ROWS>();
                        let (by_k, _) = by_k.as_chunks_mut::<BLOCK>();
                        for ((first_row, len), copy) in tiles.zip(&mut *by_k) {
                            copy_columns(left, first_row, len, first_k..first_k + block_len, copy);
                        }
                        group.run::<PANELS, ROWS, _>(|tile| ByK(&by_k[tile]), out);
                    }
                }
            }
        }
        if right.num_rows == 0 && start == Start::Zero {
            out.iter_mut().for_each(|row| row.fill(0.0));
        }
    }
}

/// The left-hand factors of a tile of rows, copied together. The stride of the original rows may map them to a few places of the
/// first-level cache. In the copy, an offset leads from one row to the next, instead of a register for each row.
trait Factors<const ROWS: usize>: Copy {
    fn at(&self, row: usize, k: usize) -> f32;
}

/// Factors of a matrix with contiguous rows.
#[derive(Clone, Copy)]
struct ByRow<'a, const ROWS: usize>(&'a [[f32; BLOCK]; ROWS]);

impl<const ROWS: usize> Factors<ROWS> for ByRow<'_, ROWS> {
    #[inline(always)]
    fn at(&self, row: usize, k: usize) -> f32 {
        self.0[row][k]
    }
}

/// Factors of any other matrix.
#[derive(Clone, Copy)]
struct ByK<'a, const ROWS: usize>(&'a [[f32; ROWS]; BLOCK]);

impl<const ROWS: usize> Factors<ROWS> for ByK<'_, ROWS> {
    #[inline(always)]
    fn at(&self, row: usize, k: usize) -> f32 {
        self.0[k][row]
    }
}

/// Copies the first `len` rows of a tile. Repeats the last one for the other rows, whose sums are not stored.
#[inline(always)]
fn copy_rows<const ROWS: usize>(
    left: MatrixView<'_>,
    first_row: usize,
    len: usize,
    ks: Range<usize>,
    copy: &mut [[f32; BLOCK]; ROWS],
) {
    for (row, copy) in copy.iter_mut().enumerate() {
        let from = &left.data[(first_row + row.min(len - 1)) * left.row_stride..][ks.clone()];
        match from.first_chunk() {
            // Avoids a function call.
            Some(whole) => *copy = *whole,
            None => copy[..from.len()].copy_from_slice(from),
        }
    }
}

/// Copies as [`copy_rows`] does, but groups the factors by k.
#[inline(always)]
fn copy_columns<const ROWS: usize>(
    left: MatrixView<'_>,
    first_row: usize,
    len: usize,
    ks: Range<usize>,
    copy: &mut [[f32; ROWS]; BLOCK],
) {
    for (k, copy) in ks.zip(copy) {
        if left.row_stride == 1 && len == ROWS {
            let column = left.data[k * left.column_stride + first_row..].first_chunk();
            *copy = *column.expect("the tile is full");
        } else {
            *copy = std::array::from_fn(|row| left.at(first_row + row.min(len - 1), k));
        }
    }
}

/// Some tiles of rows of the product over one block of k.
struct RowGroup<'a, S: Simd, const VECTORS: usize> {
    simd: S,
    first_row: usize,
    /// Rows that are stored.
    len: usize,
    /// By panel, by k.
    block: &'a [[S::f32s; VECTORS]],
    /// What follows the block, if both have to come from memory.
    after: Option<&'a [[S::f32s; VECTORS]]>,
    block_len: usize,
    /// Column of the first panel, among those of the part.
    first_column: usize,
    start: Start,
}

impl<S: Simd, const VECTORS: usize> RowGroup<'_, S, VECTORS> {
    /// Multiplies the rows, tile by tile, by all panels.
    #[inline(always)]
    fn run<const PANELS: usize, const ROWS: usize, F: Factors<ROWS>>(
        &self,
        factors: impl Fn(usize) -> F,
        out: &mut [&mut [f32]],
    ) {
        let mut rest = self.block;
        let mut first_column = self.first_column;
        while let Some((group, later)) = rest.split_at_checked(PANELS * self.block_len) {
            let next = self.after.map_or(&[][..], |after| if later.is_empty() { after } else { later });
            let next = &next[..next.len().min(group.len())];
            self.panels::<PANELS, ROWS, F>(&factors, group, next, first_column, out);
            first_column += PANELS * PANEL;
            rest = later;
        }
        for panel in rest.chunks_exact(self.block_len) {
            self.panels::<1, ROWS, F>(&factors, panel, &[], first_column, out);
            first_column += PANEL;
        }
    }

    #[inline(always)]
    fn panels<const PANELS: usize, const ROWS: usize, F: Factors<ROWS>>(
        &self,
        factors: &impl Fn(usize) -> F,
        panels: &[[S::f32s; VECTORS]],
        next: &[[S::f32s; VECTORS]],
        first_column: usize,
        out: &mut [&mut [f32]],
    ) {
        // Tiles fetch as much of what comes next as they compute of what is here, so that neither waits for the other.
        let num_tiles = self.len.div_ceil(ROWS);
        let per_round = next.len().div_ceil(num_tiles * (self.block_len / UNROLL).max(1));
        let per_tile = per_round * (self.block_len / UNROLL);
        let panels: [&[[S::f32s; VECTORS]]; PANELS] =
            std::array::from_fn(|panel| &panels[panel * self.block_len..(panel + 1) * self.block_len]);
        for (tile, first_row) in (0..self.len).step_by(ROWS).enumerate() {
            let len = ROWS.min(self.len - first_row);
            let factors = factors(tile);
            let next = (&next[next.len().min(tile * per_tile)..], per_round);
            let out = &mut out[self.first_row + first_row..][..len];
            let width = (PANELS * PANEL).min(out[0].len() - first_column);
            if let Some(out) = out.first_chunk_mut::<ROWS>()
                && width == PANELS * PANEL
            {
                let rows = out.each_mut().map(|row| &mut row[first_column..]);
                self.tile(factors, panels, next, rows);
            } else {
                let mut whole = [[[0.0; PANEL]; PANELS]; ROWS];
                for (out, whole) in out.iter().zip(&mut whole) {
                    whole.as_flattened_mut()[..width].copy_from_slice(&out[first_column..][..width]);
                }
                self.tile(factors, panels, next, whole.each_mut().map(|row| row.as_flattened_mut()));
                for (out, whole) in out.iter_mut().zip(&whole) {
                    out[first_column..][..width].copy_from_slice(&whole.as_flattened()[..width]);
                }
            }
        }
    }

    /// Multiplies a tile of rows by some panels. Every round fetches some of what comes next.
    #[inline(always)]
    fn tile<const PANELS: usize, const ROWS: usize>(
        &self,
        factors: impl Factors<ROWS>,
        panels: [&[[S::f32s; VECTORS]]; PANELS],
        (next, per_round): (&[[S::f32s; VECTORS]], usize),
        mut out: [&mut [f32]; ROWS],
    ) {
        let simd = self.simd;
        let mut sums = [[[simd.splat_f32s(0.0); VECTORS]; PANELS]; ROWS];
        if self.start == Start::Out {
            for (out, sums) in out.iter_mut().zip(&mut sums) {
                *sums = *row_vectors::<S, PANELS, VECTORS>(out);
            }
        }
        // Several k per round: the loop's overhead beside the multiply-adds matters if a core is shared.
        let num_rounds = self.block_len.min(BLOCK) / UNROLL;
        let panel_rounds = panels.map(|panel| &panel.as_chunks::<UNROLL>().0[..num_rounds]);
        #[expect(clippy::needless_range_loop, reason = "a round is one of each panel and of the factors")]
        for round in 0..num_rounds {
            let fetched = next.get(round * per_round..(round + 1) * per_round).unwrap_or(&[]);
            fetched.iter().for_each(prefetch);
            let panels: [&[_; UNROLL]; PANELS] = std::array::from_fn(|panel| &panel_rounds[panel][round]);
            for k in 0..UNROLL {
                add_products(simd, |row| factors.at(row, round * UNROLL + k), panels.map(|panel| &panel[k]), &mut sums);
            }
        }
        for k in num_rounds * UNROLL..self.block_len.min(BLOCK) {
            add_products(simd, |row| factors.at(row, k), panels.map(|panel| &panel[k]), &mut sums);
        }
        for (out, sums) in out.into_iter().zip(&sums) {
            *row_vectors::<S, PANELS, VECTORS>(out) = *sums;
        }
    }
}

/// Asks for a row of a panel to be brought to the second-level cache. Without that, a product of few rows alternates between waiting
/// for the memory and computing.
#[inline(always)]
fn prefetch<T>(row: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        #[expect(unsafe_code, reason = "no safe function asks for a cache line")]
        // SAFETY: every x86-64 processor has the instruction, which changes nothing but caches.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(row).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// Adds the products of one k to a tile's sums.
#[inline(always)]
fn add_products<S: Simd, const ROWS: usize, const PANELS: usize, const VECTORS: usize>(
    simd: S,
    factor: impl Fn(usize) -> f32,
    panels: [&[S::f32s; VECTORS]; PANELS],
    sums: &mut [[[S::f32s; VECTORS]; PANELS]; ROWS],
) {
    for (row, sums) in sums.iter_mut().enumerate() {
        let factor = simd.splat_f32s(factor(row));
        for (panel, sums) in panels.iter().zip(sums) {
            for (x, sum) in panel.iter().zip(sums) {
                *sum = simd.mul_add_f32s(factor, *x, *sum);
            }
        }
    }
}

/// Views the start of a row of `out` as the vectors of some panels.
#[inline(always)]
fn row_vectors<S: Simd, const PANELS: usize, const VECTORS: usize>(
    row: &mut [f32],
) -> &mut [[S::f32s; VECTORS]; PANELS] {
    let (vectors, _) = S::as_mut_simd_f32s(&mut row[..PANELS * PANEL]);
    let (panels, _) = vectors.as_chunks_mut::<VECTORS>();
    panels.first_chunk_mut().expect("a panel is 16 columns")
}
