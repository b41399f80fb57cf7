//! Parts of the context that several sequences have in common: blocks of a cached prefix, which the
//! queries of all of them are led past at once (cascade attention).
//!
//! What a query gains from a part depends on nothing but the query and the part, and joining parts
//! does not ask who computed them, so that sharing changes no bit.

use std::ops::Range;

use super::attention::{Queries, Sizes};
use super::context_parts::{PART, Partial, Piece, parts_of};
use crate::tensor::View;

/// Query rows of a tile that may be cut into parts; more would leave too much to be joined.
const FEW_ROWS: usize = 16;
/// Query rows that share a task.
const MOST_SHARED_ROWS: usize = 128;

/// Some queries of one sequence, for all heads.
pub struct QueryTile {
    /// Which sequence.
    pub seq: usize,
    /// Rows of `q`.
    pub queries: Range<usize>,
    /// Position of the first of them.
    pub first_position: usize,
}

impl QueryTile {
    /// Parts of the context that some query sees.
    pub fn parts(&self, window: usize) -> Range<usize> {
        let begin = (self.first_position + 1).saturating_sub(window);
        parts_of(&(begin..self.first_position + self.queries.len()))
    }

    /// Parts that every query sees from end to end.
    fn whole_parts(&self, window: usize) -> Range<usize> {
        let last = self.first_position + self.queries.len() - 1;
        let begin = (last + 1).saturating_sub(window).div_ceil(PART);
        begin..((self.first_position + 1) / PART).max(begin)
    }

    /// Whether it may be cut into parts.
    pub fn has_few_rows(&self, sizes: Sizes) -> bool {
        self.queries.len() == 1 || self.queries.len() * sizes.group() <= FEW_ROWS
    }

    /// Its queries.
    pub fn run(&self) -> Queries<'static> {
        Queries::Run { first: self.queries.start, len: self.queries.len() }
    }
}

/// The blocks of every sequence.
#[derive(Clone, Copy)]
pub struct BlockTables<'a> {
    /// `[num_seqs, width]`.
    ids: &'a [u32],
    width: usize,
    blocks_per_part: usize,
}

impl<'a> BlockTables<'a> {
    /// Tables `[num_seqs, width]` of blocks of this size.
    pub fn of(tables: View<'a>, block_size: usize) -> BlockTables<'a> {
        let blocks_per_part = PART / block_size;
        BlockTables { ids: tables.as_slice(), width: tables.size(1), blocks_per_part }
    }

    /// The blocks of a sequence.
    pub fn of_seq(&self, seq: usize) -> &'a [u32] {
        &self.ids[seq * self.width..][..self.width]
    }

    /// Those of a part.
    fn of_part(&self, seq: usize, part: usize) -> &'a [u32] {
        &self.of_seq(seq)[part * self.blocks_per_part..][..self.blocks_per_part]
    }
}

/// Tiles that have a part in common.
pub struct SharedPart {
    /// Which part.
    pub part: usize,
    /// A sequence that has it.
    pub seq: usize,
    /// Their queries, among the rows of all.
    rows: Range<usize>,
    /// Where the numbers begin that its tasks leave.
    start: usize,
}

impl SharedPart {
    /// How many queries share it.
    pub fn len(&self) -> usize {
        self.rows.len()
    }
}

/// A tile that finds a part in a group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Member {
    tile: usize,
    part: usize,
    group: usize,
    /// Its first query among those of the group.
    query: usize,
}

/// A part that others may have too.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    part: usize,
    first_block: u32,
    tile: usize,
}

/// What is shared in one step; kept to be filled again.
#[derive(Default)]
pub struct SharedParts {
    /// Every group of at least two tiles.
    pub groups: Vec<SharedPart>,
    rows: Vec<u32>,
    /// In order of tiles and parts.
    members: Vec<Member>,
    candidates: Vec<Candidate>,
}

impl SharedParts {
    /// Finds parts that several tiles of few rows see from end to end, in the same blocks. Their
    /// tasks, and what else must then be cut, leave at most `most_numbers`.
    pub fn find(
        &mut self,
        tiles: &[QueryTile],
        sizes: Sizes,
        window: usize,
        tables: BlockTables<'_>,
        most_numbers: usize,
    ) {
        self.groups.clear();
        self.rows.clear();
        self.members.clear();
        self.candidates.clear();
        if !PART.is_multiple_of(sizes.block_size) {
            return;
        }
        // Cut into parts, tiles leave this much, shared or not.
        let numbers = |tile: &QueryTile| {
            let rows = tile.queries.len() * sizes.group();
            sizes.num_kv_heads * tile.parts(window).len() * Partial::len(rows, sizes.value_dim)
        };
        let few = tiles.iter().enumerate().filter(|(_, tile)| tile.has_few_rows(sizes));
        let mut sum = 0;
        for (i, tile) in few.filter(|(_, tile)| !tile.whole_parts(window).is_empty()) {
            sum += numbers(tile);
            if sum > most_numbers {
                break;
            }
            self.candidates.extend(tile.whole_parts(window).map(|part| {
                let first_block = tables.of_part(tile.seq, part)[0];
                Candidate { part, first_block, tile: i }
            }));
        }
        self.candidates.sort_unstable();
        self.group(tiles, sizes, tables);
        self.members.sort_unstable();
    }

    /// Makes groups of candidates with equal blocks.
    fn group(&mut self, tiles: &[QueryTile], sizes: Sizes, tables: BlockTables<'_>) {
        let SharedParts { groups, rows, members, candidates } = self;
        let mut start = 0;
        for alike in candidates.chunk_by(|a, b| (a.part, a.first_block) == (b.part, b.first_block))
        {
            let part = alike[0].part;
            let blocks = |candidate: &Candidate| tables.of_part(tiles[candidate.tile].seq, part);
            let same = alike.iter().filter(|candidate| blocks(candidate) == blocks(&alike[0]));
            let mut same = same.map(|candidate| candidate.tile).peekable();
            while let Some(leader) = same.next() {
                let (first_row, first_member) = (rows.len(), members.len());
                let mut next = Some(leader);
                while let Some(tile) = next {
                    let (group, query) = (groups.len(), rows.len() - first_row);
                    members.push(Member { tile, part, group, query });
                    rows.extend(tiles[tile].queries.clone().map(|row| row as u32));
                    let len = rows.len() - first_row;
                    next = same.next_if(|&tile| {
                        (len + tiles[tile].queries.len()) * sizes.group() <= MOST_SHARED_ROWS
                    });
                }
                if members.len() == first_member + 1 {
                    members.truncate(first_member);
                    rows.truncate(first_row);
                    continue;
                }
                let group =
                    SharedPart { part, seq: tiles[leader].seq, rows: first_row..rows.len(), start };
                start +=
                    sizes.num_kv_heads * Partial::len(group.len() * sizes.group(), sizes.value_dim);
                groups.push(group);
            }
        }
    }

    /// Whether a tile finds some part in a group.
    pub fn has(&self, tile: usize) -> bool {
        let at = self.members.partition_point(|member| member.tile < tile);
        self.members.get(at).is_some_and(|member| member.tile == tile)
    }

    /// The group in which a tile finds a part, and its first query there.
    pub fn place(&self, tile: usize, part: usize) -> Option<(usize, usize)> {
        let at = self.members.binary_search_by_key(&(tile, part), |m| (m.tile, m.part)).ok()?;
        Some((self.members[at].group, self.members[at].query))
    }

    /// The queries of a group.
    pub fn queries(&self, group: &SharedPart) -> Queries<'_> {
        Queries::Listed(&self.rows[group.rows.clone()])
    }

    /// Where the task of a group and KV head leaves its numbers: their start and how many.
    pub fn room(sizes: Sizes, group: &SharedPart, kv_head: usize) -> (usize, usize) {
        let len = Partial::len(group.len() * sizes.group(), sizes.value_dim);
        (group.start + kv_head * len, len)
    }

    /// What a group leaves for the tile whose first query there is `query`.
    pub fn piece(&self, sizes: Sizes, group: usize, kv_head: usize, query: usize) -> Piece {
        let group = &self.groups[group];
        let rows = group.len() * sizes.group();
        let start = SharedParts::room(sizes, group, kv_head).0;
        Piece { start, rows, first_row: query * sizes.group() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        num_heads: 14,
        num_kv_heads: 2,
        cache_heads: 2,
        head_dim: 64,
        value_dim: 64,
        block_size: 128,
    };

    /// Decodes at these positions; tables have four blocks per part.
    fn find(positions: &[usize], tables: &[[u32; 8]], window: usize, most: usize) -> SharedParts {
        let tile = |(seq, &position): (usize, &usize)| QueryTile {
            seq,
            queries: seq..seq + 1,
            first_position: position,
        };
        let tiles: Vec<QueryTile> = positions.iter().enumerate().map(tile).collect();
        let tables = View::of(tables.as_flattened(), [tables.len(), 8]);
        let mut shared = SharedParts::default();
        shared.find(&tiles, SIZES, window, BlockTables::of(tables, 128), most);
        shared
    }

    fn places(shared: &SharedParts, num_tiles: usize) -> Vec<[Option<(usize, usize)>; 2]> {
        (0..num_tiles).map(|tile| [0, 1].map(|part| shared.place(tile, part))).collect()
    }

    #[test]
    fn sequences_that_begin_in_the_same_blocks_share_their_whole_parts() {
        let tables = [
            [1, 2, 3, 4, 5, 6, 7, 8],
            [1, 2, 3, 4, 5, 6, 7, 8],
            [1, 2, 3, 4, 9, 9, 9, 9],
            [1, 2, 3, 10, 11, 12, 13, 14],
            [1, 2, 3, 4, 5, 6, 7, 8],
        ];
        // The last sequence does not see its first part's end.
        let shared = find(&[1023, 1023, 750, 1023, 510], &tables, usize::MAX, 1 << 20);
        let expected = [
            [Some((0, 0)), Some((1, 0))],
            [Some((0, 1)), Some((1, 1))],
            [Some((0, 2)), None],
            [None, None],
            [None, None],
        ];
        assert_eq!(places(&shared, 5), expected);
        let rows: Vec<usize> = shared.queries(&shared.groups[0]).rows().collect();
        assert_eq!(rows, [0, 1, 2]);
        assert!(shared.has(2) && !shared.has(3));
        // Rooms follow each other, and a piece lies in its group's.
        let len = Partial::len(3 * 7, 64);
        assert_eq!(SharedParts::room(SIZES, &shared.groups[0], 1), (len, len));
        assert_eq!(SharedParts::room(SIZES, &shared.groups[1], 0).0, 2 * len);
        let piece = Piece { start: len, rows: 21, first_row: 14 };
        assert_eq!(shared.piece(SIZES, 0, 1, 2), piece);
    }

    #[test]
    fn a_window_that_hides_a_part_from_one_keeps_it_from_being_shared() {
        let tables = [[1, 2, 3, 4, 5, 6, 7, 8]; 3];
        let shared = find(&[999, 999, 1023], &tables, 1000, 1 << 20);
        assert_eq!(places(&shared, 3), [[Some((0, 0)), None], [Some((0, 1)), None], [None, None]]);
    }

    #[test]
    fn groups_are_bounded_by_rows_and_by_room() {
        let tables = [[1, 2, 3, 4, 5, 6, 7, 8]; 20];
        let shared = find(&[600; 20], &tables, usize::MAX, 1 << 20);
        let lens: Vec<usize> = shared.groups.iter().map(SharedPart::len).collect();
        assert_eq!(lens, [18, 2]);
        // Two parts of seven rows and two KV heads each.
        let of_one = 2 * 2 * Partial::len(7, 64);
        let shared = find(&[600; 20], &tables, usize::MAX, 5 * of_one);
        assert_eq!(shared.groups.iter().map(SharedPart::len).collect::<Vec<_>>(), [5]);
    }
}
