//! Causal attention over the paged KV cache, by streaming softmax (FlashAttention's recurrence).
//!
//! One task computes a tile of queries of one sequence for one KV head and all query heads
//! that share it, so that a KV tile is read, widened and transposed once for all of them.
//! KV tiles start at multiples of [`KV_TILE`] positions, and every part of the context starts
//! anew (`context_parts`). What happens to a query therefore
//! depends on its own position and its sequence alone: not on the chunk of the prompt that it
//! was computed in, nor on the batch. A value at a position that a query cannot see is
//! multiplied by an exact 0, so it must be finite; positions that no query of the tile can see
//! are not read.

use std::ops::Range;

use super::context_parts::{Base, Partial, State, join_rows, parts_of, within, write_means};
use super::kv_rows::{Cached, widen};
use super::share::{Parts, Scratch};
use super::simd::{Kernel, Lanes, Simd, exp, load, store, tanh};

/// Positions per KV tile.
const KV_TILE: usize = 32;
/// Query rows (queries × heads of the group) per task, unless the group alone is larger.
const MAX_ROWS: usize = 64;
/// Head sizes are padded to this in scratch: two of the widest vectors.
const DIM_STEP: usize = 32;
/// Rows of the register tile of [`product`]: with two vectors each, enough sums to hide the latency
/// of a product, and few enough for sixteen registers.
const TILE_ROWS: usize = 6;

/// Queries that one task takes for heads in groups of `group`.
pub fn queries_per_tile(group: usize) -> usize {
    (MAX_ROWS / group).max(1)
}

/// Sizes of the heads and the cache.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// Query heads.
    pub num_heads: usize,
    /// Groups of query heads: those of a key and value head, or some of all where one vector is key
    /// and value of all heads.
    pub num_kv_heads: usize,
    /// Heads of the cache: one of each group, or one of all.
    pub cache_heads: usize,
    /// Elements of a query and a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Positions per cache block.
    pub block_size: usize,
}

impl Sizes {
    /// Query heads per KV head.
    pub fn group(self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}

/// Rows of queries that a task takes.
#[derive(Clone, Copy)]
pub enum Queries<'a> {
    /// So many that follow each other.
    Run {
        /// The first one.
        first: usize,
        /// How many.
        len: usize,
    },
    /// Of several sequences, all of which see the same.
    Listed(&'a [u32]),
}

impl<'a> Queries<'a> {
    /// How many.
    pub fn len(self) -> usize {
        match self {
            Queries::Run { len, .. } => len,
            Queries::Listed(rows) => rows.len(),
        }
    }

    /// Row number `i` of them.
    pub fn row(self, i: usize) -> usize {
        match self {
            Queries::Run { first, .. } => first + i,
            Queries::Listed(rows) => rows[i] as usize,
        }
    }

    /// All of them.
    pub fn rows(self) -> impl Iterator<Item = usize> + use<'a> {
        (0..self.len()).map(move |i| self.row(i))
    }
}

/// What one task computes.
pub struct AttendTile<'a> {
    /// `[num_tokens, num_heads, head_dim]`.
    pub q: &'a [f32],
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k_cache: Cached<'a>,
    /// As `k_cache`; `None` where values are the first elements of keys.
    pub v_cache: Option<Cached<'a>>,
    /// `[num_tokens, num_heads, value_dim]`; tasks write disjoint rows and heads.
    pub out: &'a Parts<'a, f32>,
    /// Head and block sizes.
    pub sizes: Sizes,
    /// The sequence's blocks.
    pub block_table: &'a [u32],
    /// Which KV head.
    pub kv_head: usize,
    /// Which rows of `q`.
    pub queries: Queries<'a>,
    /// Position of the first of a run, whose others follow; the last that listed ones see here.
    pub first_position: usize,
    /// Multiplies q·k.
    pub scale: f32,
    /// Positions that a query sees, itself included.
    pub window: usize,
    /// Scores become `cap · tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A score per query head that brings no value.
    pub sinks: Option<&'a [f32]>,
}

/// Runs a task on vectors.
pub struct Attend<'a> {
    /// What to compute.
    pub task: AttendTile<'a>,
    /// Computes one part of the context and leaves it here, instead of finishing the queries.
    pub partial: Option<Partial<'a>>,
    /// A task that this thread will probably run next, and the positions of it.
    pub next: Option<(AttendTile<'a>, Range<usize>)>,
    /// This thread's scratch.
    pub scratch: &'a mut Scratch,
}

/// The scratch of a task, cut into matrices with `dim` and `value_dim` padded.
struct Tile<'a> {
    /// `[rows, dim]`, multiplied by the scale.
    q: &'a mut [f32],
    /// `[KV_TILE, dim]`: keys before they are transposed, then values.
    wide: &'a mut [f32],
    /// `[dim, KV_TILE]`.
    keys: &'a mut [f32],
    /// `[rows, KV_TILE]`: scores, then weights.
    scores: &'a mut [f32],
    /// `[rows, value_dim]`: sums of weighted values of this part.
    acc: &'a mut [f32],
    /// Largest score and sum of weights of this part, per row.
    state: &'a mut [f32],
    /// As `acc`, of all parts before.
    joined: &'a mut [f32],
    /// As `state`, of all parts before.
    joined_state: &'a mut [f32],
    dim: usize,
    value_dim: usize,
}

impl<'a> Tile<'a> {
    fn new(scratch: &'a mut Scratch, rows: usize, sizes: Sizes) -> Tile<'a> {
        let dim = sizes.head_dim.next_multiple_of(DIM_STEP);
        let value_dim = sizes.value_dim.next_multiple_of(DIM_STEP);
        let len = rows * (dim + 2 * value_dim) + 2 * KV_TILE * dim + rows * KV_TILE + 4 * rows;
        let (q, rest) = scratch.take(len).split_at_mut(rows * dim);
        let (wide, rest) = rest.split_at_mut(KV_TILE * dim);
        let (keys, rest) = rest.split_at_mut(KV_TILE * dim);
        let (scores, rest) = rest.split_at_mut(rows * KV_TILE);
        let (acc, rest) = rest.split_at_mut(rows * value_dim);
        let (joined, rest) = rest.split_at_mut(rows * value_dim);
        let (state, joined_state) = rest.split_at_mut(2 * rows);
        joined.fill(0.0);
        Tile { q, wide, keys, scores, acc, state, joined, joined_state, dim, value_dim }
    }

    /// Forgets the part before.
    fn restart(&mut self) {
        self.acc.fill(0.0);
        for state in self.state.chunks_exact_mut(2) {
            put(state, State::START);
        }
    }

    /// Joins the part to those before.
    #[inline(always)]
    fn join<S: Simd>(&mut self, simd: S) {
        let states = self.joined_state.chunks_exact_mut(2).zip(self.state.chunks_exact(2));
        let sums = self.joined.chunks_exact_mut(self.value_dim);
        let sums = sums.zip(self.acc.chunks_exact(self.value_dim));
        for ((before, part), (joined, acc)) in states.zip(sums) {
            let (state, factors) = get(before).join(get(part), Base::E);
            put(before, state);
            join_rows(simd, joined, acc, factors);
        }
    }
}

fn get(state: &[f32]) -> State {
    State { reference: state[0], total: state[1] }
}

fn put(to: &mut [f32], state: State) {
    to.copy_from_slice(&[state.reference, state.total]);
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Attend { task, partial, scratch, .. } = self;
        let group = task.sizes.group();
        let mut tile = Tile::new(scratch, task.queries.len() * group, task.sizes);
        task.load_queries(simd, &mut tile);
        if let Some(partial) = partial {
            task.attend_part(simd, &mut tile, partial.part);
            return task.leave(&tile, partial);
        }
        for (row, state) in tile.joined_state.chunks_exact_mut(2).enumerate() {
            put(state, task.initial_state(row % group, Base::E));
        }
        for part in parts_of(&task.seen()) {
            task.attend_part(simd, &mut tile, part);
            tile.join(simd);
        }
        task.write_out(simd, &tile);
    }
}

impl AttendTile<'_> {
    /// Where the heads of one query lie in `q`.
    #[inline(always)]
    pub fn heads_of(&self, query: usize) -> Range<usize> {
        self.heads_of_len(query, self.sizes.head_dim)
    }

    /// Where they lie in `out`.
    #[inline(always)]
    pub fn results_of(&self, query: usize) -> Range<usize> {
        self.heads_of_len(query, self.sizes.value_dim)
    }

    #[inline(always)]
    fn heads_of_len(&self, query: usize, head_len: usize) -> Range<usize> {
        let len = self.sizes.group() * head_len;
        let start = (query * self.sizes.num_kv_heads + self.kv_head) * len;
        start..start + len
    }

    /// What row `row` of the heads of one query starts with.
    #[inline(always)]
    pub fn initial_state(&self, row: usize, base: Base) -> State {
        let head = self.kv_head * self.sizes.group() + row;
        self.sinks.map_or(State::START, |sinks| State::after_sink(sinks[head], base))
    }

    /// Positions that some query sees. The sequence's table has blocks for these alone.
    #[inline(always)]
    pub fn seen(&self) -> Range<usize> {
        let end = match self.queries {
            Queries::Run { len, .. } => self.first_position + len,
            Queries::Listed(_) => self.first_position + 1,
        };
        (self.first_position + 1).saturating_sub(self.window)..end
    }

    /// Leads all queries past one part, from a fresh start.
    #[inline(always)]
    fn attend_part<S: Simd>(&self, simd: S, tile: &mut Tile<'_>, part: usize) {
        tile.restart();
        let rows = self.queries.len() * self.sizes.group();
        let Range { start: begin, end } = within(&self.seen(), part);
        for start in (begin - begin % KV_TILE..end).step_by(KV_TILE) {
            let seen = start.max(begin)..end.min(start + KV_TILE);
            self.load_tile(simd, self.k_cache, (tile.wide, tile.dim), (start, seen.clone()));
            transpose(simd, tile.wide, tile.keys, tile.dim);
            let shape = Shape { rows, len: self.sizes.head_dim, width: KV_TILE };
            let (q, keys) = ((&*tile.q, tile.dim), (&*tile.keys, KV_TILE));
            product::<S, false>(simd, shape, q, keys, (tile.scores, KV_TILE));
            self.softmax(simd, tile, start);
            if let Some(v_cache) = self.v_cache {
                self.load_tile(simd, v_cache, (tile.wide, tile.dim), (start, seen));
            }
            let shape = Shape { rows, len: KV_TILE, width: tile.value_dim };
            let (weights, values) = ((&*tile.scores, KV_TILE), (&*tile.wide, tile.dim));
            product::<S, true>(simd, shape, weights, values, (tile.acc, tile.value_dim));
        }
    }

    #[inline(always)]
    fn load_queries<S: Simd>(&self, simd: S, tile: &mut Tile<'_>) {
        let scale = simd.splat(self.scale);
        let group = self.sizes.group();
        for (i, query) in self.queries.rows().enumerate() {
            let heads = self.q[self.heads_of(query)].chunks_exact(self.sizes.head_dim);
            for (row, head) in heads.enumerate() {
                let to = &mut tile.q[(i * group + row) * tile.dim..][..tile.dim];
                for at in (0..head.len()).step_by(S::LANES) {
                    store(simd, to, at, simd.mul(load(simd, head, at), scale));
                }
            }
        }
    }

    /// Widens the cached vectors at positions `seen` of the tile that starts at `start`; the
    /// other rows of the tile become 0.
    #[inline(always)]
    fn load_tile<S: Simd>(
        &self,
        simd: S,
        cache: Cached<'_>,
        (wide, dim): (&mut [f32], usize),
        (start, seen): (usize, Range<usize>),
    ) {
        wide[..(seen.start - start) * dim].fill(0.0);
        wide[(seen.end - start) * dim..].fill(0.0);
        let mut position = seen.start;
        while position < seen.end {
            let (row, run) = self.rows_at(position);
            let run = run.min(seen.end - position);
            let wide = &mut wide[(position - start) * dim..(position - start + run) * dim];
            let (rows, wide) = ((row, self.row_ahead(position)), (wide, dim));
            match cache {
                Cached::F32(cache) => self.load_rows(simd, (cache, None), rows, wide),
                Cached::Bf16(cache) => self.load_rows(simd, (cache, None), rows, wide),
                Cached::F16(cache) => self.load_rows(simd, (cache, None), rows, wide),
                Cached::Int8(cache, scales) => {
                    self.load_rows(simd, (cache, Some(scales)), rows, wide);
                }
                Cached::Fp8(cache) => self.load_rows(simd, (cache, None), rows, wide),
            }
            position += run;
        }
    }

    /// Fills `wide` from cache rows that follow each other, and asks for as many rows from
    /// `ahead` on.
    #[inline(always)]
    fn load_rows<S: Simd, E: Lanes>(
        &self,
        simd: S,
        (cache, scales): (&[E], Option<&[f32]>),
        (first_row, ahead): (usize, usize),
        (wide, dim): (&mut [f32], usize),
    ) {
        let head_dim = self.sizes.head_dim;
        let rows = cache[first_row * head_dim..].chunks_exact(head_dim);
        for (i, (row, wide)) in rows.zip(wide.chunks_exact_mut(dim)).enumerate() {
            let ahead = cache.as_ptr().wrapping_add((ahead + i) * head_dim);
            let scale = scales.map(|scales| scales[first_row + i]);
            for at in (0..head_dim).step_by(S::LANES) {
                simd.prefetch(ahead.wrapping_add(at));
                store(simd, wide, at, widen(simd, row, at, scale));
            }
            wide[head_dim..].fill(0.0);
        }
    }

    /// The cache row of the same slot one tile later, or any row when there is none: blocks
    /// lie apart, so the hardware cannot guess where the next one is.
    #[inline(always)]
    fn row_ahead(&self, position: usize) -> usize {
        self.rows_at((position + KV_TILE).min(self.seen().end - 1)).0
    }

    /// The cache row of this head at `position`, and how many rows follow in its block, itself
    /// included.
    #[inline(always)]
    pub fn rows_at(&self, position: usize) -> (usize, usize) {
        let Sizes { cache_heads, block_size, .. } = self.sizes;
        let (block, offset) = (position / block_size, position % block_size);
        let block = self.block_table[block] as usize;
        let head = self.kv_head.min(cache_heads - 1);
        ((block * cache_heads + head) * block_size + offset, block_size - offset)
    }

    /// Turns the tile's scores into weights, row by row.
    #[inline(always)]
    fn softmax<S: Simd>(&self, simd: S, tile: &mut Tile<'_>, start: usize) {
        let group = self.sizes.group();
        let sums = tile.acc.chunks_exact_mut(tile.value_dim);
        let rows = tile.scores.chunks_exact_mut(KV_TILE).zip(sums);
        for (i, ((scores, acc), state)) in rows.zip(tile.state.chunks_exact_mut(2)).enumerate() {
            let position = self.first_position + i / group;
            let first = (position + 1).saturating_sub(self.window).saturating_sub(start);
            let end = (position + 1).saturating_sub(start).min(KV_TILE);
            if first >= end {
                scores.fill(0.0);
            } else {
                if let Some(cap) = self.softcap {
                    cap_row(simd, scores, cap);
                }
                scores[..first].fill(f32::NEG_INFINITY);
                scores[end..].fill(f32::NEG_INFINITY);
                softmax_row(simd, scores, acc, state);
            }
        }
    }

    /// Leaves a part to be joined later.
    fn leave(&self, tile: &Tile<'_>, mut partial: Partial<'_>) {
        let dim = self.sizes.value_dim;
        for (row, state) in tile.state.chunks_exact(2).enumerate() {
            partial.put_state(row, get(state));
        }
        let sums = partial.sums(tile.state.len() / 2).chunks_exact_mut(dim);
        for (to, acc) in sums.zip(tile.acc.chunks_exact(tile.value_dim)) {
            to.copy_from_slice(&acc[..dim]);
        }
    }

    #[inline(always)]
    fn write_out<S: Simd>(&self, simd: S, tile: &Tile<'_>) {
        let group = self.sizes.group();
        for (i, query) in self.queries.rows().enumerate() {
            // SAFETY: this task alone writes these heads of these rows.
            let heads = unsafe { self.out.part(self.results_of(query)) };
            for (row, head) in heads.chunks_exact_mut(self.sizes.value_dim).enumerate() {
                let row = i * group + row;
                let total = tile.joined_state[2 * row + 1];
                write_means(simd, head, &tile.joined[row * tile.value_dim..], total);
            }
        }
    }
}

/// Scores of one row become `cap · tanh(score / cap)`.
#[inline(always)]
pub(super) fn cap_row<S: Simd>(simd: S, scores: &mut [f32], cap: f32) {
    let (cap, inverse) = (simd.splat(cap), simd.splat(1.0 / cap));
    for at in (0..scores.len()).step_by(S::LANES) {
        let part = tanh(simd, simd.mul(load(simd, scores, at), inverse));
        store(simd, scores, at, simd.mul(part, cap));
    }
}

/// One step of the recurrence for one row: a new maximum rescales what was summed before.
#[inline(always)]
fn softmax_row<S: Simd>(simd: S, scores: &mut [f32], acc: &mut [f32], state: &mut [f32]) {
    let mut max = simd.splat(state[0]);
    for at in (0..KV_TILE).step_by(S::LANES) {
        max = simd.max(load(simd, scores, at), max);
    }
    let max = simd.max_lane(max);
    // Most tiles bring no new maximum, and a call would empty the vector registers.
    let rescale = if state[0] == max { 1.0 } else { (state[0] - max).exp() };
    let mut total = simd.splat(0.0);
    for at in (0..KV_TILE).step_by(S::LANES) {
        let weight = exp(simd, simd.sub(load(simd, scores, at), simd.splat(max)));
        store(simd, scores, at, weight);
        total = simd.add(total, weight);
    }
    state[0] = max;
    state[1] = state[1] * rescale + simd.sum(total);
    if rescale != 1.0 {
        let rescale = simd.splat(rescale);
        for at in (0..acc.len()).step_by(S::LANES) {
            store(simd, acc, at, simd.mul(load(simd, acc, at), rescale));
        }
    }
}

/// `to [dim, KV_TILE] = fromᵀ` for `from [KV_TILE, dim]`.
#[inline(always)]
fn transpose<S: Simd>(simd: S, from: &[f32], to: &mut [f32], dim: usize) {
    assert!(from.len() == KV_TILE * dim && to.len() == KV_TILE * dim);
    for row in (0..KV_TILE).step_by(S::LANES) {
        for col in (0..dim).step_by(S::LANES) {
            // SAFETY: both sizes are multiples of the lanes and the lengths were just checked.
            unsafe {
                let (from, to) = (from.as_ptr(), to.as_mut_ptr());
                simd.transpose(
                    from.add(row * dim + col),
                    dim,
                    to.add(col * KV_TILE + row),
                    KV_TILE,
                );
            }
        }
    }
}

/// `[rows, len] · [len, width] → [rows, width]`; `width` is a multiple of two vectors.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    len: usize,
    width: usize,
}

/// `out = a · b`, or `out += a · b` when `ADD`; operands come with their row strides. Every
/// element sums in ascending order along the shared axis, in one accumulator.
#[inline(always)]
fn product<S: Simd, const ADD: bool>(
    simd: S,
    shape: Shape,
    a: (&[f32], usize),
    b: (&[f32], usize),
    (out, out_stride): (&mut [f32], usize),
) {
    let Shape { rows, len, width } = shape;
    assert!(rows > 0 && len > 0 && width.is_multiple_of(2 * S::LANES));
    assert!(a.0.len() >= (rows - 1) * a.1 + len && b.0.len() >= (len - 1) * b.1 + width);
    assert!(out.len() >= (rows - 1) * out_stride + width);
    for col in (0..width).step_by(2 * S::LANES) {
        for row in (0..rows).step_by(TILE_ROWS) {
            // SAFETY: the tile lies inside the operands, whose sizes were just checked.
            unsafe {
                let a = (a.0.as_ptr().add(row * a.1), a.1);
                let b = (b.0.as_ptr().add(col), b.1);
                let out = (out.as_mut_ptr().add(row * out_stride + col), out_stride);
                match rows - row {
                    1 => product_tile::<S, 1, ADD>(simd, len, a, b, out),
                    2 => product_tile::<S, 2, ADD>(simd, len, a, b, out),
                    3 => product_tile::<S, 3, ADD>(simd, len, a, b, out),
                    4 => product_tile::<S, 4, ADD>(simd, len, a, b, out),
                    5 => product_tile::<S, 5, ADD>(simd, len, a, b, out),
                    _ => product_tile::<S, TILE_ROWS, ADD>(simd, len, a, b, out),
                }
            }
        }
    }
}

/// `R` rows by two vectors of [`product`].
///
/// # Safety
/// `a` must have `R` rows of `len` elements, `b` `len` rows of two vectors, `out` `R` rows of
/// two vectors.
#[inline(always)]
unsafe fn product_tile<S: Simd, const R: usize, const ADD: bool>(
    simd: S,
    len: usize,
    a: (*const f32, usize),
    b: (*const f32, usize),
    out: (*mut f32, usize),
) {
    let mut acc = [[simd.splat(0.0); 2]; R];
    // SAFETY: all addresses are inside the caller's tiles.
    unsafe {
        if ADD {
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[0] = simd.load_f32(out.0.add(r * out.1));
                acc[1] = simd.load_f32(out.0.add(r * out.1 + S::LANES));
            }
        }
        for i in 0..len {
            let b0 = simd.load_f32(b.0.add(i * b.1));
            let b1 = simd.load_f32(b.0.add(i * b.1 + S::LANES));
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = simd.splat(*a.0.add(r * a.1 + i));
                acc[0] = simd.mul_add(a, b0, acc[0]);
                acc[1] = simd.mul_add(a, b1, acc[1]);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            simd.store_f32(out.0.add(r * out.1), acc[0]);
            simd.store_f32(out.0.add(r * out.1 + S::LANES), acc[1]);
        }
    }
}
