//! Which kernel multiplies, with which tiles: arithmetic on formats, sizes and a device's limits.
//!
//! | rows | kernel | k is summed by | a row's bits also depend on |
//! |---|---|---|---|
//! | 1 to 16 | `skinny` | eight warps, in a fixed order | nothing |
//! | 17 to 64 | `few`: tiles of 64 × 128 | up to eight blocks, in a fixed order | multiprocessors |
//! | 65 to 256 | `many`: tiles of 128 × 128 | as `few` | multiprocessors |
//! | more | `many` | one block | nothing |
//!
//! So a row has the same bits whatever stands beside it, as long as the number of rows stays in
//! one line of the table; between lines f32 sums are added in another order. Beyond the first line
//! dense products and those of FP8 by FP8 are a library's where there is one (`cublas`). INT8's sums are
//! integers, so that its rows have the same bits everywhere. The numbers here are those of
//! `kernels/include/{product,weights,matmul_tiles,matmul_skinny}.cuh`.
//!
//! Experts have row tiles of their own ([`RowTiles`]), by how many choices there are per expert:
//! `skinny` up to four on average, else `few` or `many`, which never cut k and sum alike. So there
//! is one line between which f32 sums differ.

use super::launcher::{DeviceFacts, Launch, count};
use crate::formats::blocks::BLOCK_ROWS;
use crate::formats::{Format, PackedMatrix};
use crate::tensor::DType;

/// Bytes of every activation row that a step takes.
const X_STEP_BYTES: usize = 128;
/// Most rows of the skinny kernels: two tiles of eight tokens.
pub(super) const MAX_SKINNY_ROWS: usize = 16;
/// Warps of a skinny block, each with its own steps of k.
const SKINNY_WARPS: usize = 8;
/// Columns of a skinny block.
const PANEL_COLUMNS: usize = 32;
/// Most steps that a skinny warp has in flight.
const MAX_STAGES: usize = 8;
/// Rows of a tile of `few` and of `many`.
const TILE_ROWS: [usize; 2] = [64, 128];
/// Columns of a tile of either.
const TILE_COLUMNS: usize = 128;
/// From this many rows on there are enough tiles without cutting k.
const MAX_SPLIT_ROWS: usize = 256;
/// Fewest steps of k that are worth a block: its pipeline must fill first.
const MIN_SPLIT_STEPS: usize = 8;
/// Room for sums of parts of k, per multiprocessor: two blocks of 64 × 128, or one of 128 × 128.
pub(super) const PARTIAL_BYTES: usize = 128 * TILE_COLUMNS * 4;
/// Choices per expert for which weights are streamed: more would stream them several times.
const SKINNY_CHOICES: usize = 4;
/// Choices per expert that fit into row tiles of `few`, most of them into one.
const FEW_CHOICES: usize = 48;
/// Most rows of a row tile of a skinny kernel: tokens of one product.
const SKINNY_EXPERT_ROWS: usize = 8;
/// Tiles that are cut, at most, per multiprocessor.
pub(super) const SPLIT_TILES: usize = 2;

/// A format as the kernels see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bf16,
    F16,
    Int8,
    W8A16,
    Q8,
    /// With groups of 64 elements or a multiple.
    Int4,
    Int4G32,
    Mxfp4,
    Fp8,
    Fp8Groups,
    /// Row-major.
    Fp8Rows,
}

impl Kind {
    /// The kernels for a matrix and activations of this dtype; none for dense matrices of another
    /// dtype, or whose rows are not whole runs of sixteen bytes.
    pub(super) fn of(weight: &PackedMatrix, x: DType) -> Option<Kind> {
        let [group, groups] = weight
            .quantized
            .as_ref()
            .map_or([0, 0], |q| [q.grid.cols, q.scales.shape().sizes()[1]]);
        match weight.format {
            Format::Dense => match (weight.data.dtype(), x) {
                _ if !weight.num_cols.is_multiple_of(8) => None,
                (DType::BF16, DType::BF16) => Some(Kind::Bf16),
                (DType::F16, DType::F16) => Some(Kind::F16),
                _ => None,
            },
            Format::Fp8Rows => Some(Kind::Fp8Rows),
            format if !format.is_in_blocks() => panic!("{format:?} does not lie in blocks"),
            Format::Int8 => Some(Kind::Int8),
            Format::W8A16 => Some(Kind::W8A16),
            Format::Q8 => Some(Kind::Q8),
            Format::Int4 if group == 32 => Some(Kind::Int4G32),
            Format::Int4 => Some(Kind::Int4),
            Format::Fp8 if groups == 1 => Some(Kind::Fp8),
            Format::Fp8 => Some(Kind::Fp8Groups),
            Format::Mxfp4 => Some(Kind::Mxfp4),
            Format::DenseBlocks => panic!("a GPU multiplies row-major bf16, not blocks of it"),
        }
    }

    /// Elements of a step of k.
    fn step_elements(self) -> usize {
        if self == Kind::Int8 { X_STEP_BYTES } else { X_STEP_BYTES / 2 }
    }

    /// Bytes of a step of sixteen weight rows.
    fn step_bytes(self) -> usize {
        match self {
            Kind::Bf16 | Kind::F16 | Kind::Int8 => 2048,
            Kind::W8A16 | Kind::Q8 | Kind::Fp8 | Kind::Fp8Groups | Kind::Fp8Rows => 1024,
            Kind::Int4 | Kind::Int4G32 | Kind::Mxfp4 => 512,
        }
    }

    /// Bytes of the scales and zero points of a step of sixteen weight rows.
    fn group_bytes(self) -> usize {
        match self {
            Kind::Int4 => 3 * BLOCK_ROWS,
            Kind::Int4G32 => 2 * 3 * BLOCK_ROWS,
            Kind::Mxfp4 => 2 * BLOCK_ROWS,
            Kind::Q8 => 2 * 2 * BLOCK_ROWS,
            Kind::Fp8Groups => 4 * BLOCK_ROWS,
            _ => 0,
        }
    }

    /// Steps of shared memory of the tile kernels `[few, many]`: what fits twice into an H100's
    /// multiprocessor, and once into the 99 KiB of a consumer card.
    fn tile_stages(self) -> [usize; 2] {
        match self {
            Kind::Bf16 | Kind::F16 | Kind::Int8 => [4, 3],
            Kind::W8A16 | Kind::Fp8 | Kind::Fp8Rows => [4, 4],
            Kind::Q8 | Kind::Fp8Groups => [4, 3],
            Kind::Int4 | Kind::Int4G32 | Kind::Mxfp4 => [5, 4],
        }
    }

    /// Those of experts; dense ones of f16 are arranged as bf16.
    fn expert_kernels(self) -> [&'static str; 3] {
        match self {
            Kind::Bf16 => ["experts_skinny_bf16", "experts_few_bf16", "experts_many_bf16"],
            Kind::F16 => panic!("experts of f16 were refused"),
            Kind::Int8 => ["experts_skinny_int8", "experts_few_int8", "experts_many_int8"],
            Kind::W8A16 => ["experts_skinny_w8a16", "experts_few_w8a16", "experts_many_w8a16"],
            Kind::Q8 => ["experts_skinny_q8", "experts_few_q8", "experts_many_q8"],
            Kind::Int4 => ["experts_skinny_int4", "experts_few_int4", "experts_many_int4"],
            Kind::Int4G32 => {
                ["experts_skinny_int4_g32", "experts_few_int4_g32", "experts_many_int4_g32"]
            }
            Kind::Mxfp4 => ["experts_skinny_mxfp4", "experts_few_mxfp4", "experts_many_mxfp4"],
            Kind::Fp8 => ["experts_skinny_fp8", "experts_few_fp8", "experts_many_fp8"],
            Kind::Fp8Groups => {
                ["experts_skinny_fp8_groups", "experts_few_fp8_groups", "experts_many_fp8_groups"]
            }
            Kind::Fp8Rows => {
                ["experts_skinny_fp8_rows", "experts_few_fp8_rows", "experts_many_fp8_rows"]
            }
        }
    }

    fn kernels(self) -> [&'static str; 3] {
        match self {
            Kind::Bf16 => ["matmul_skinny_bf16", "matmul_few_bf16", "matmul_many_bf16"],
            Kind::F16 => ["matmul_skinny_f16", "matmul_few_f16", "matmul_many_f16"],
            Kind::Int8 => ["matmul_skinny_int8", "matmul_few_int8", "matmul_many_int8"],
            Kind::W8A16 => ["matmul_skinny_w8a16", "matmul_few_w8a16", "matmul_many_w8a16"],
            Kind::Q8 => ["matmul_skinny_q8", "matmul_few_q8", "matmul_many_q8"],
            Kind::Int4 => ["matmul_skinny_int4", "matmul_few_int4", "matmul_many_int4"],
            Kind::Int4G32 => {
                ["matmul_skinny_int4_g32", "matmul_few_int4_g32", "matmul_many_int4_g32"]
            }
            Kind::Mxfp4 => ["matmul_skinny_mxfp4", "matmul_few_mxfp4", "matmul_many_mxfp4"],
            Kind::Fp8 => ["matmul_skinny_fp8", "matmul_few_fp8", "matmul_many_fp8"],
            Kind::Fp8Groups => {
                ["matmul_skinny_fp8_groups", "matmul_few_fp8_groups", "matmul_many_fp8_groups"]
            }
            Kind::Fp8Rows => {
                ["matmul_skinny_fp8_rows", "matmul_few_fp8_rows", "matmul_many_fp8_rows"]
            }
        }
    }
}

/// How the rows of experts are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowTiles {
    /// Which of a format's kernels.
    kernel: usize,
    /// Rows of a row tile, all of one expert.
    pub(super) rows: usize,
}

impl RowTiles {
    /// For choices that tokens made among experts.
    pub(super) fn new(choices: usize, tokens: usize, experts: usize) -> RowTiles {
        let experts = experts.max(1);
        let (kernel, rows) = match choices.div_ceil(experts) {
            of_one if of_one <= SKINNY_CHOICES => (0, SKINNY_EXPERT_ROWS.min(tokens).max(1)),
            of_one if of_one <= FEW_CHOICES => (1, TILE_ROWS[0]),
            _ => (2, TILE_ROWS[1]),
        };
        RowTiles { kernel, rows }
    }

    /// Row tiles of so many of these choices, at most: every expert that was chosen has one that is
    /// not full.
    pub(super) fn most(self, choices: usize, experts: usize) -> usize {
        (choices + experts.min(choices) * (self.rows - 1)) / self.rows
    }

    /// As many as any step has with up to this many choices.
    pub(super) fn most_of_all(choices: usize, experts: usize) -> usize {
        choices.min(choices / TILE_ROWS[0] + SKINNY_CHOICES * experts)
    }
}

/// What one launch computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Problem<'a> {
    pub(super) kind: Kind,
    pub(super) rows: usize,
    /// Elements of a weight row.
    pub(super) k: usize,
    /// Output columns of each weight.
    pub(super) columns: &'a [usize],
    /// Whether the two weights are gate and up.
    pub(super) is_gated: bool,
}

/// How it is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) kernel: &'static str,
    pub(super) launch: Launch,
    /// Steps of k.
    pub(super) steps: usize,
    /// Parts of k that are summed by blocks of their own.
    pub(super) splits: usize,
    /// Steps in flight, of the skinny kernels.
    pub(super) stages: usize,
    /// Panels, of the skinny kernels; `None` for the others.
    pub(super) panels: Option<usize>,
}

impl Problem<'_> {
    /// The kernel, and how it is launched.
    pub(super) fn plan(&self, facts: &DeviceFacts) -> Plan {
        let skinny = (self.rows <= MAX_SKINNY_ROWS).then(|| self.skinny(1, facts)).flatten();
        skinny.unwrap_or_else(|| self.tiles(facts))
    }

    /// The same for up to `most` row tiles of experts, each of these sizes.
    pub(super) fn plan_experts(&self, tiles: RowTiles, most: usize, facts: &DeviceFacts) -> Plan {
        let problem = Problem { rows: tiles.rows, ..*self };
        let kernel = self.kind.expert_kernels()[tiles.kernel];
        if tiles.kernel == 0 {
            let skinny = problem.skinny(most, facts);
            return Plan { kernel, ..skinny.expect("two steps of eight rows fit into every GPU") };
        }
        let plan = problem.tiles(facts);
        let [_, columns, _] = plan.launch.grid;
        let launch = Launch { grid: [count(most), columns, 1], ..plan.launch };
        Plan { kernel, launch, splits: 1, ..plan }
    }

    /// The number of tiles of `columns` columns.
    fn num_tiles(&self, columns: usize) -> usize {
        let halves = columns / BLOCK_ROWS;
        let tiles = |blocks: usize| blocks.div_ceil(halves);
        let blocks = self.columns.iter().map(|columns| columns.div_ceil(BLOCK_ROWS));
        if self.is_gated { tiles(2 * blocks.max().unwrap_or(0)) } else { blocks.map(tiles).sum() }
    }

    fn steps(&self) -> usize {
        self.k.div_ceil(self.kind.step_elements())
    }

    /// Nothing when two steps do not fit into shared memory. A block takes several panels where
    /// there are many, so that it loads the next while it adds up the last.
    fn skinny(&self, row_tiles: usize, facts: &DeviceFacts) -> Option<Plan> {
        let step_bytes = 2 * (self.kind.step_bytes() + self.kind.group_bytes());
        let stage_bytes = SKINNY_WARPS * (step_bytes + self.rows * X_STEP_BYTES);
        let sum_bytes = SKINNY_WARPS * self.rows * PANEL_COLUMNS * 4;
        let limit = facts.shared_bytes_per_block as usize;
        // Two blocks per multiprocessor where its memory is large: one loads while the other adds.
        let room = (if limit >= 160 << 10 { limit / 2 } else { limit }).saturating_sub(sum_bytes);
        let stages = (room / stage_bytes).clamp(2, MAX_STAGES);
        let shared_bytes = stages * stage_bytes + sum_bytes;
        if shared_bytes > limit {
            return None;
        }
        let panels = self.num_tiles(PANEL_COLUMNS);
        let resident = facts.multiprocessors as usize * (limit / shared_bytes).clamp(1, 3);
        let items = row_tiles * panels;
        let items_per_block = items.div_ceil(resident).max(1);
        let launch = Launch::new(items.div_ceil(items_per_block), 32 * SKINNY_WARPS);
        Some(Plan {
            kernel: self.kind.kernels()[0],
            launch: launch.with_shared(shared_bytes),
            steps: self.steps(),
            splits: 1,
            stages,
            panels: Some(panels),
        })
    }

    fn tiles(&self, facts: &DeviceFacts) -> Plan {
        let size = usize::from(self.rows > TILE_ROWS[0]);
        let (rows, halves) = (TILE_ROWS[size], TILE_COLUMNS / BLOCK_ROWS);
        let weights_bytes = halves * (self.kind.step_bytes() + self.kind.group_bytes());
        let shared_bytes = self.kind.tile_stages()[size] * (rows * X_STEP_BYTES + weights_bytes);
        let column_tiles = self.num_tiles(TILE_COLUMNS);
        let splits = self.splits(facts, column_tiles);
        // Sums of groups take a second set of registers: eight warps of 64 × 32 then share a large
        // tile, not four of 64 × 64.
        let threads = if size == 1 && self.kind.group_bytes() > 0 { 256 } else { 128 };
        let mut launch = Launch::new(self.rows.div_ceil(rows), threads).by(column_tiles);
        launch.grid[2] = splits as u32;
        Plan {
            kernel: self.kind.kernels()[1 + size],
            launch: launch.with_shared(shared_bytes),
            steps: self.steps(),
            splits,
            stages: 0,
            panels: None,
        }
    }

    /// Parts of k, so that every multiprocessor has a block; the same for all numbers of rows
    /// that a line of the table names.
    fn splits(&self, facts: &DeviceFacts, column_tiles: usize) -> usize {
        let multiprocessors = facts.multiprocessors as usize;
        let blocks = match self.rows {
            rows if rows <= TILE_ROWS[0] => 2 * multiprocessors / column_tiles.max(1),
            rows if rows <= MAX_SPLIT_ROWS => multiprocessors / (2 * column_tiles).max(1),
            _ => 1,
        };
        blocks.min(self.steps() / MIN_SPLIT_STEPS).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: DeviceFacts = DeviceFacts {
        compute_capability: (9, 0),
        multiprocessors: 132,
        shared_bytes_per_block: 227 << 10,
    };
    const CONSUMER: DeviceFacts = DeviceFacts {
        compute_capability: (8, 6),
        multiprocessors: 82,
        shared_bytes_per_block: 99 << 10,
    };

    const KINDS: [Kind; 11] = [
        Kind::Bf16,
        Kind::F16,
        Kind::Int8,
        Kind::W8A16,
        Kind::Q8,
        Kind::Int4,
        Kind::Int4G32,
        Kind::Mxfp4,
        Kind::Fp8,
        Kind::Fp8Groups,
        Kind::Fp8Rows,
    ];

    fn problem(kind: Kind, rows: usize, columns: &[usize]) -> Problem<'_> {
        Problem { kind, rows, k: 4096, columns, is_gated: false }
    }

    #[test]
    fn every_plan_fits_into_a_consumer_card() {
        for kind in KINDS {
            for rows in (1..=300).step_by(5) {
                let plan = problem(kind, rows, &[4096]).plan(&CONSUMER);
                assert!(plan.launch.shared_bytes <= CONSUMER.shared_bytes_per_block, "{plan:?}");
            }
        }
    }

    #[test]
    fn sixteen_rows_are_skinny_where_there_is_room() {
        assert_eq!(problem(Kind::Bf16, 16, &[4096]).plan(&H100).kernel, "matmul_skinny_bf16");
        assert_eq!(problem(Kind::Bf16, 8, &[4096]).plan(&CONSUMER).kernel, "matmul_skinny_bf16");
        assert_eq!(problem(Kind::Bf16, 16, &[4096]).plan(&CONSUMER).kernel, "matmul_few_bf16");
    }

    #[test]
    fn the_number_of_rows_splits_nothing_differently_within_a_line_of_the_table() {
        for kind in KINDS {
            for (first, last) in [(17, 64), (65, 256), (257, 5000)] {
                let plan = |rows| problem(kind, rows, &[1024]).plan(&H100);
                let (a, b) = (plan(first), plan(last));
                assert_eq!((a.kernel, a.splits, a.steps), (b.kernel, b.splits, b.steps));
            }
            assert!(problem(kind, 64, &[1024]).plan(&H100).splits > 1);
            assert_eq!(problem(kind, 257, &[1024]).plan(&H100).splits, 1);
        }
    }

    #[test]
    fn parts_of_k_fit_into_what_is_reserved_for_them() {
        for kind in KINDS {
            for rows in [17, 64, 65, 128, 129, 256, 257] {
                for columns in [1, 100, 1000, 4096, 16_000, 128_000] {
                    let plan = problem(kind, rows, &[columns]).plan(&H100);
                    let [x, y, z] = plan.launch.grid.map(|n| n as usize);
                    if plan.splits > 1 {
                        let tile_rows = TILE_ROWS[usize::from(rows > 64)];
                        let bytes = x * y * z * tile_rows * TILE_COLUMNS * 4;
                        assert!(bytes <= 132 * PARTIAL_BYTES, "{plan:?}");
                        assert!(x * y <= 132 * SPLIT_TILES, "{plan:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn experts_have_row_tiles_for_whoever_chose_them() {
        // Every token its own expert, all one expert, and anything between.
        for (tokens, per_token, experts) in
            [(1, 8, 128), (5, 2, 8), (64, 8, 128), (300, 2, 8), (4096, 8, 128), (70, 1, 1)]
        {
            let choices = tokens * per_token;
            let tiles = RowTiles::new(choices, tokens, experts);
            let count = |chosen: &[usize]| -> usize {
                assert_eq!(chosen.iter().sum::<usize>(), choices);
                chosen.iter().map(|choices| choices.div_ceil(tiles.rows)).sum()
            };
            let chosen = experts.min(choices);
            let mut uneven = vec![1; chosen];
            uneven[0] = choices - (chosen - 1);
            let even: Vec<usize> =
                (0..chosen).map(|i| choices / chosen + usize::from(i < choices % chosen)).collect();
            for counted in [count(&[choices]), count(&uneven), count(&even)] {
                assert!(counted <= tiles.most(choices, experts), "{tiles:?}: {counted}");
            }
            let most = tiles.most(choices, experts);
            assert!(most <= RowTiles::most_of_all(choices, experts), "{tiles:?}: {most}");
        }
        assert_eq!(RowTiles::new(8, 1, 128), RowTiles { kernel: 0, rows: 1 });
        assert_eq!(RowTiles::new(96, 48, 2).kernel, 1);
        assert_eq!(RowTiles::new(98, 49, 2).kernel, 2);
    }

    #[test]
    fn experts_fit_into_a_consumer_card_and_never_cut_k() {
        for kind in KINDS.into_iter().filter(|kind| *kind != Kind::F16) {
            for (tokens, per_token) in [(1, 8), (40, 8), (300, 8), (5000, 8)] {
                let tiles = RowTiles::new(tokens * per_token, tokens, 64);
                let plan = problem(kind, 0, &[4096]).plan_experts(tiles, 500, &CONSUMER);
                assert!(plan.launch.shared_bytes <= CONSUMER.shared_bytes_per_block, "{plan:?}");
                assert_eq!((plan.splits, plan.launch.grid[2]), (1, 1));
            }
        }
    }

    #[test]
    fn gate_and_up_share_tiles() {
        let gated = Problem { is_gated: true, ..problem(Kind::Int4, 1, &[48, 48]) };
        assert_eq!(gated.plan(&H100).panels, Some(3));
        assert_eq!(problem(Kind::Int4, 1, &[48, 48]).plan(&H100).panels, Some(4));
    }
}
