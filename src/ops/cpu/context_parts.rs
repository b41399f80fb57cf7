//! Parts of a context, and how what attention yields for each of them is joined.
//!
//! Every part starts anew, and its sums are joined to those of the parts before it in ascending
//! order: by the task that leads a query past all of them, or afterwards when every part was a
//! task of its own. Parts begin at multiples of [`PART`] positions, so that how work is cut
//! changes no bit: a long context can occupy more threads than there are sequences and heads.

use std::ops::Range;

use super::attention::AttendTile;
use super::share::Scratch;
use super::simd::{Kernel, Simd, load, store};

/// Positions per part: enough for joining to cost nothing beside them, and few enough for what
/// conversations have in common, some hundred tokens of instructions, to be whole parts.
pub const PART: usize = 512;

/// What one query of one head has seen so far, beside its sum of weighted values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    /// Weights are powers of scores minus this.
    pub reference: f32,
    /// Sum of the weights.
    pub total: f32,
}

/// What weights are powers of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Euler's number.
    E,
    /// Two; references are whole numbers, and factors exact.
    Two,
}

impl Base {
    fn power(self, exponent: f32) -> f32 {
        match self {
            Base::E => exponent.exp(),
            Base::Two => exponent.exp2(),
        }
    }
}

impl State {
    /// Before anything was seen.
    pub const START: State = State { reference: f32::MIN, total: 0.0 };

    /// After a key with this score and a value of 0; -∞ is no key.
    pub fn after_sink(sink: f32, base: Base) -> State {
        let (score, reference) = match base {
            Base::E => (sink, sink),
            Base::Two => {
                let score = sink * std::f32::consts::LOG2_E;
                (score, score.ceil())
            }
        };
        let reference = reference.max(f32::MIN);
        State { reference, total: base.power(score - reference) }
    }

    /// What both have seen, and what the sums of each must be multiplied by.
    pub fn join(self, later: State, base: Base) -> (State, [f32; 2]) {
        let reference = self.reference.max(later.reference);
        let [a, b] = [self, later].map(|state| base.power(state.reference - reference));
        (State { reference, total: self.total * a + later.total * b }, [a, b])
    }
}

/// Parts that hold some of `positions`.
pub fn parts_of(positions: &Range<usize>) -> Range<usize> {
    positions.start / PART..positions.end.div_ceil(PART)
}

/// Those of `positions` that lie in `part`.
pub fn within(positions: &Range<usize>, part: usize) -> Range<usize> {
    positions.start.max(part * PART)..positions.end.min((part + 1) * PART)
}

/// Where a task leaves what one part yields: two numbers of state per row, then the rows' sums.
pub struct Partial<'a> {
    /// Which part.
    pub part: usize,
    /// At least [`Partial::len`] numbers.
    pub numbers: &'a mut [f32],
}

impl Partial<'_> {
    /// Numbers that `rows` rows of `value_dim` elements take.
    pub fn len(rows: usize, value_dim: usize) -> usize {
        rows * (2 + value_dim)
    }

    /// The state of row `row`, to be written.
    pub fn put_state(&mut self, row: usize, state: State) {
        self.numbers[2 * row..2 * row + 2].copy_from_slice(&[state.reference, state.total]);
    }

    /// The sums of all of `rows` rows, to be written.
    pub fn sums(&mut self, rows: usize) -> &mut [f32] {
        &mut self.numbers[2 * rows..]
    }
}

/// Rows of a [`Partial`] that belong to one task: all of them, or some of what several
/// sequences share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where its numbers begin among those of all.
    pub start: usize,
    /// Rows that it has in all.
    pub rows: usize,
    /// The first one that belongs to the task.
    pub first_row: usize,
}

impl Piece {
    /// The state and the sums of row `row` of the task.
    #[inline(always)]
    fn row<'a>(&self, partials: &'a [f32], row: usize, dim: usize) -> (State, &'a [f32]) {
        let (numbers, row) = (&partials[self.start..], self.first_row + row);
        let state = State { reference: numbers[2 * row], total: numbers[2 * row + 1] };
        (state, &numbers[2 * self.rows + row * dim..][..dim])
    }
}

/// Joins the parts of a task that was cut.
pub struct JoinParts<'a> {
    /// The task as a whole.
    pub task: AttendTile<'a>,
    /// What tasks have left.
    pub partials: &'a [f32],
    /// Which of it belongs to this task, a piece per part, in ascending order.
    pub pieces: &'a [Piece],
    /// Base of the weights.
    pub base: Base,
    /// This thread's scratch.
    pub scratch: &'a mut Scratch,
}

impl Kernel for JoinParts<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (group, dim) = (self.task.sizes.group(), self.task.sizes.value_dim);
        let rows = self.task.queries.len() * group;
        let sums = self.scratch.take(dim);
        for row in 0..rows {
            let mut state = self.task.initial_state(row % group, self.base);
            sums.fill(0.0);
            for piece in self.pieces {
                let (later, part_sums) = piece.row(self.partials, row, dim);
                let (joined, factors) = state.join(later, self.base);
                state = joined;
                join_rows(simd, sums, part_sums, factors);
            }
            let heads = self.task.results_of(self.task.queries.row(row / group));
            let at = heads.start + row % group * dim;
            // SAFETY: this task alone writes these heads of these rows.
            let out = unsafe { self.task.out.part(at..at + dim) };
            write_means(simd, out, sums, state.total);
        }
    }
}

/// `sums = sums * factors[0] + later * factors[1]`.
#[inline(always)]
pub fn join_rows<S: Simd>(simd: S, sums: &mut [f32], later: &[f32], factors: [f32; 2]) {
    let [a, b] = factors.map(|factor| simd.splat(factor));
    for at in (0..sums.len()).step_by(S::LANES) {
        let scaled = simd.mul(load(simd, sums, at), a);
        store(simd, sums, at, simd.mul_add(load(simd, later, at), b, scaled));
    }
}

/// `out = sums · (1 / total)`. A sum of -0 counts as 0, because joining a part that holds nothing for
/// the query would have made it one.
#[inline(always)]
pub fn write_means<S: Simd>(simd: S, out: &mut [f32], sums: &[f32], total: f32) {
    let (zero, inverse) = (simd.splat(0.0), simd.splat(1.0 / total));
    for at in (0..out.len()).step_by(S::LANES) {
        let sum = simd.add(load(simd, sums, at), zero);
        store(simd, out, at, simd.mul(sum, inverse));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_a_part_that_holds_nothing_changes_nothing() {
        for base in [Base::E, Base::Two] {
            let state = State { reference: -3.0, total: 0.7 };
            assert_eq!(State::START.join(state, base), (state, [0.0, 1.0]));
            assert_eq!(state.join(State::START, base), (state, [1.0, 0.0]));
            assert_eq!(State::START.join(State::START, base).0, State::START);
            assert_eq!(State::after_sink(f32::NEG_INFINITY, base), State::START);
        }
    }

    #[test]
    fn positions_are_cut_at_multiples_of_a_part() {
        assert_eq!(parts_of(&(0..PART)), 0..1);
        assert_eq!(parts_of(&(PART - 1..2 * PART + 1)), 0..3);
        assert_eq!(within(&(PART - 1..2 * PART + 1), 0), PART - 1..PART);
        assert_eq!(within(&(PART - 1..2 * PART + 1), 2), 2 * PART..2 * PART + 1);
    }
}
