//! How many output columns of a matmul a task takes: arithmetic on sizes, which knows neither
//! kernels nor threads at work.
//!
//! Tasks are taken by whoever is free. They should be many, so that a fast thread takes over
//! from a slow one; long enough to stream; and of a size that deals out evenly, because the
//! operation ends with its last task. How work is cut never changes a result.

use crate::formats::blocks::BLOCK_ROWS;

/// Columns below which nothing is cut: a pair of blocks, or a panel of vectors.
pub const PAIR_COLS: usize = 2 * BLOCK_ROWS;
/// Tasks per thread that let a fast thread take over from a slow one.
pub const TASKS_PER_THREAD: usize = 4;
/// Weight bytes per task: long enough to stream, short enough to balance.
const TASK_WEIGHT_BYTES: usize = 512 << 10;
/// Most multiplications of a task: enough to hide that its first weights come late, and few enough
/// to balance cores of which one is slower.
const TASK_PRODUCTS: usize = 1 << 28;
/// Multiplications below which matrices are not cut.
const MATMUL_INLINE: usize = 1 << 18;
/// Columns of the thread with most of them that are good enough, in percent of the mean.
/// Evening out what is left would cost more in shorter tasks.
const LONGEST_PERCENT: usize = 115;
/// The same that tasks of half the length are worth.
const EVEN_PERCENT: usize = 103;

/// Sizes of one matrix of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows of activations.
    pub num_rows: usize,
    /// Groups of them that are computed one after the other: a task has rows of one group.
    pub row_groups: usize,
    /// Elements of a row.
    pub k: usize,
    /// Output columns: rows of the matrix.
    pub num_cols: usize,
    /// The same of all matrices of the operation together.
    pub all_cols: usize,
    /// Bytes of a row of the matrix.
    pub row_bytes: usize,
    /// Threads that share the operation.
    pub threads: usize,
}

impl Sizes {
    /// Output columns of a task; at least one.
    pub fn cols_per_task(self) -> usize {
        if self.num_rows * self.k * self.all_cols < MATMUL_INLINE {
            return self.num_cols.max(1);
        }
        let balanced = (self.row_groups * self.all_cols).div_ceil(self.threads * TASKS_PER_THREAD);
        let streamed = TASK_WEIGHT_BYTES / self.row_bytes.max(1);
        let computed = TASK_PRODUCTS / (self.num_rows.div_ceil(self.row_groups) * self.k);
        let most = balanced.min(streamed).min(computed).max(1).div_ceil(PAIR_COLS);
        self.even_pairs(most) * PAIR_COLS
    }

    /// The most pairs of columns, up to `most`, with which all threads get the same, if half of
    /// `most` is enough for that; else those with which no thread gets much more than others; where
    /// none does, those with which the longest gets least.
    fn even_pairs(self, most: usize) -> usize {
        let (pairs, groups) = (self.all_cols.div_ceil(PAIR_COLS), self.row_groups);
        let threads = self.threads;
        let longest = |size: usize| {
            let (whole, rest) = (groups * (pairs / size), pairs % size);
            let each = whole / threads * size;
            // What is left of the matrix goes to threads that have one task less, if there are any.
            let less = (threads - whole % threads) % threads;
            let rests = groups.saturating_sub(less).div_ceil(threads) * rest;
            each + rests + if less == 0 { 0 } else { size }
        };
        let all = groups * pairs;
        let is_within = |size: usize, percent| longest(size) * threads * 100 <= all * percent;
        let sizes = || (1..=most).rev();
        sizes()
            .take_while(|size| 2 * size >= most)
            .find(|&size| is_within(size, EVEN_PERCENT))
            .or_else(|| sizes().find(|&size| is_within(size, LONGEST_PERCENT)))
            .or_else(|| sizes().min_by_key(|&size| longest(size)))
            .unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Model {
        hidden: usize,
        intermediate: usize,
        q: usize,
        kv: usize,
        vocab: usize,
    }

    const MODELS: [Model; 3] = [
        Model { hidden: 896, intermediate: 4864, q: 14 * 64, kv: 2 * 64, vocab: 32_768 },
        Model { hidden: 2048, intermediate: 8192, q: 32 * 64, kv: 8 * 64, vocab: 32_768 },
        Model { hidden: 4096, intermediate: 14_336, q: 32 * 128, kv: 8 * 128, vocab: 128_256 },
    ];
    const THREADS: [usize; 3] = [2, 16, 64];
    /// Sizes to start from.
    const NONE: Sizes = Sizes {
        num_rows: 0,
        row_groups: 1,
        k: 0,
        num_cols: 0,
        all_cols: 0,
        row_bytes: 0,
        threads: 1,
    };

    impl Model {
        /// Every operation: `k`, and the columns of its matrices.
        fn operations(&self) -> [(usize, Vec<usize>); 5] {
            [
                (self.hidden, vec![self.q, self.kv, self.kv]),
                (self.q, vec![self.hidden]),
                (self.hidden, vec![self.intermediate]),
                (self.intermediate, vec![self.hidden]),
                (self.hidden, vec![self.vocab]),
            ]
        }
    }

    /// Bytes of a row of `k` elements: f32, bf16, bytes, INT4.
    fn row_bytes(k: usize) -> [usize; 4] {
        [4 * k, 2 * k, k, k / 2]
    }

    /// Columns of the tasks of an operation, in the order in which they are taken.
    fn tasks(sizes: Sizes, matrices: &[usize]) -> Vec<usize> {
        let all_cols = matrices.iter().sum();
        let of_matrix = |&num_cols: &usize| {
            let size = Sizes { num_cols, all_cols, ..sizes }.cols_per_task();
            (0..num_cols).step_by(size).map(move |col| size.min(num_cols - col))
        };
        matrices.iter().flat_map(of_matrix).collect()
    }

    /// Columns of the thread with most, when whoever is done takes the next task.
    fn longest(tasks: &[usize], threads: usize) -> usize {
        let mut loads = vec![0; threads];
        for cols in tasks {
            *loads.iter_mut().min().unwrap() += cols;
        }
        loads.into_iter().max().unwrap()
    }

    /// Checks an operation: tasks are whole pairs except at the end of a matrix, and no thread
    /// has more than 1.15 of the mean or than dealing out single pairs would give it.
    fn check(sizes: Sizes, matrices: &[usize]) {
        let (threads, groups) = (sizes.threads, sizes.row_groups);
        let tasks = tasks(sizes, matrices).repeat(groups);
        let what = format!("{sizes:?}, {matrices:?}: {tasks:?}");
        let ends = tasks.iter().filter(|cols| !cols.is_multiple_of(PAIR_COLS)).count();
        assert!(ends <= groups * matrices.len(), "{what}");
        let total: usize = tasks.iter().sum();
        assert_eq!(total, groups * matrices.iter().sum::<usize>(), "{what}");
        let pairs: usize = matrices.iter().map(|cols| cols.div_ceil(PAIR_COLS)).sum();
        let pairs = groups * pairs;
        let by_pairs = pairs.div_ceil(threads) * PAIR_COLS;
        let most = (total * LONGEST_PERCENT / (100 * threads)).max(by_pairs);
        assert!(longest(&tasks, threads) <= most, "{} of {most}: {what}", longest(&tasks, threads));
        if pairs >= 8 * threads {
            assert!(by_pairs * threads * 100 <= total * LONGEST_PERCENT, "{what}");
        }
    }

    #[test]
    fn no_thread_of_a_small_or_a_large_machine_gets_much_more_than_the_mean() {
        for model in &MODELS {
            for (k, matrices) in model.operations() {
                for row_bytes in row_bytes(k) {
                    for (num_rows, row_groups) in [(1, 1), (16, 1), (64, 1), (1024, 1), (1024, 4)] {
                        for threads in THREADS {
                            let sizes =
                                Sizes { num_rows, row_groups, k, row_bytes, threads, ..NONE };
                            check(sizes, &matrices);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_matrix_of_any_width_is_dealt_out_evenly() {
        for num_rows in [1, 1024] {
            for threads in 1..=72 {
                for num_cols in (320..12_000).step_by(224) {
                    let (row_bytes, k) = (2048, 1024);
                    let sizes = Sizes { num_rows, k, row_bytes, threads, ..NONE };
                    check(sizes, &[num_cols]);
                }
            }
        }
    }

    #[test]
    fn two_threads_get_long_tasks() {
        let size = |num_rows, k, num_cols| {
            let (row_bytes, all_cols) = (2 * k, num_cols);
            let sizes = Sizes { num_rows, k, num_cols, all_cols, row_bytes, threads: 2, ..NONE };
            sizes.cols_per_task()
        };
        // Up to half a megabyte of weights where they are streamed.
        assert_eq!(
            [size(1, 896, 4864), size(1, 2048, 8192), size(32, 4096, 14_336)],
            [224, 128, 64]
        );
        // Up to a quarter of a billion multiplications where there are many rows.
        assert_eq!([size(256, 896, 4864), size(1024, 2048, 8192)], [224, 128]);
        assert_eq!([size(1024, 4864, 896), size(1024, 896, 4864)], [64, 224]);
        // Groups of rows make longer tasks of fewer rows, as many as before.
        let down = Sizes { num_rows: 1024, row_groups: 4, k: 4864, num_cols: 896, ..NONE };
        let down = Sizes { all_cols: 896, row_bytes: 4864, threads: 2, ..down };
        assert_eq!(down.cols_per_task(), 128);
        // Not fewer tasks than let a fast thread take over.
        assert_eq!([size(1, 896, 896), size(64, 4864, 896)], [64, 64]);
    }

    #[test]
    fn an_operation_below_a_microsecond_or_so_is_not_cut() {
        let (num_rows, row_bytes, threads) = (1, 256, 16);
        let (num_cols, all_cols) = (512, 1024);
        let sizes = Sizes { num_rows, k: 64, num_cols, all_cols, row_bytes, threads, ..NONE };
        assert_eq!(sizes.cols_per_task(), 512);
        assert_eq!(Sizes { num_cols: 0, all_cols: 0, ..sizes }.cols_per_task(), 1);
        assert_eq!(Sizes { num_rows: 16, ..sizes }.cols_per_task(), PAIR_COLS);
    }
}
