//! Rows in blocks of sixteen, so that sixteen output columns are the lanes of a vector or the
//! columns of a tile.
//!
//! A row's bytes are cut into words of four: four codes or two bf16 that follow each other along
//! the summed axis. A block holds word 0 of its sixteen rows, then word 1, and so on. Rows are
//! padded to [`ROW_ALIGN`](super::ROW_ALIGN) elements, blocks to sixteen rows; blocks follow
//! each other, so that a product reads one long run of memory.
//!
//! Codes of four bits are blocks of bytes folded once more: of the sixteen lines of 64 codes,
//! line `i` lies in the low halves of 64 bytes and line `8 + i` in their high halves.

/// Rows of a block.
pub const BLOCK_ROWS: usize = 16;
/// Bytes of a word.
pub const WORD_BYTES: usize = 4;
/// Bytes of a line: one word of every row.
pub const LINE_BYTES: usize = BLOCK_ROWS * WORD_BYTES;
/// Bytes of the folded codes of sixteen lines.
pub const FOLDED_BYTES: usize = 8 * LINE_BYTES;

/// Puts sixteen rows that follow each other into a block of the same size.
pub fn interleave(rows: &[u8], block: &mut [u8]) {
    assert_eq!(rows.len(), block.len());
    let rows = rows.as_chunks::<WORD_BYTES>().0;
    let words_per_row = rows.len() / BLOCK_ROWS;
    let lines = block.as_chunks_mut::<WORD_BYTES>().0.as_chunks_mut::<BLOCK_ROWS>().0;
    for (word, line) in lines.iter_mut().enumerate() {
        for (row, to) in line.iter_mut().enumerate() {
            *to = rows[row * words_per_row + word];
        }
    }
}

/// Takes a block apart into its sixteen rows.
pub fn deinterleave(block: &[u8], rows: &mut [u8]) {
    assert_eq!(rows.len(), block.len());
    let rows = rows.as_chunks_mut::<WORD_BYTES>().0;
    let words_per_row = rows.len() / BLOCK_ROWS;
    let lines = block.as_chunks::<WORD_BYTES>().0.as_chunks::<BLOCK_ROWS>().0;
    for (word, line) in lines.iter().enumerate() {
        for (row, from) in line.iter().enumerate() {
            rows[row * words_per_row + word] = *from;
        }
    }
}

/// Where byte `at` of a row lies in a block.
pub fn position(row: usize, at: usize) -> usize {
    at / WORD_BYTES * LINE_BYTES + row * WORD_BYTES + at % WORD_BYTES
}

/// Folds a block of codes below 16 to half its size.
pub fn fold(codes: &[u8], folded: &mut [u8]) {
    assert_eq!(codes.len(), 2 * folded.len());
    let steps = codes.chunks_exact(2 * FOLDED_BYTES).zip(folded.chunks_exact_mut(FOLDED_BYTES));
    for (codes, folded) in steps {
        let (low, high) = codes.split_at(FOLDED_BYTES);
        for ((to, low), high) in folded.iter_mut().zip(low).zip(high) {
            *to = low | high << 4;
        }
    }
}

/// Code `at` of a row in a folded block.
pub fn unfolded(block: &[u8], row: usize, at: usize) -> u8 {
    let place = position(row, at);
    let byte = block[place / (2 * FOLDED_BYTES) * FOLDED_BYTES + place % FOLDED_BYTES];
    if place % (2 * FOLDED_BYTES) < FOLDED_BYTES { byte & 15 } else { byte >> 4 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_from_where_they_were_put() {
        let row_bytes = 128;
        let byte = |row: usize, at: usize| (row * 31 + at * 7) as u8;
        let rows: Vec<u8> =
            (0..16 * row_bytes).map(|i| byte(i / row_bytes, i % row_bytes)).collect();
        let mut block = vec![0; rows.len()];
        interleave(&rows, &mut block);
        for (row, at) in (0..16).flat_map(|row| (0..row_bytes).map(move |at| (row, at))) {
            assert_eq!(block[position(row, at)], byte(row, at), "byte {at} of row {row}");
        }
        let mut apart = vec![0; rows.len()];
        deinterleave(&block, &mut apart);
        assert_eq!(apart, rows);
        // Word 1 of row 2.
        assert_eq!(block[64 + 8..64 + 12], [byte(2, 4), byte(2, 5), byte(2, 6), byte(2, 7)]);
    }

    #[test]
    fn folded_codes_come_back() {
        let code = |row: usize, at: usize| ((row * 5 + at * 3) % 16) as u8;
        let rows: Vec<u8> = (0..16 * 192).map(|i| code(i / 192, i % 192)).collect();
        let (mut block, mut folded) = (vec![0; rows.len()], vec![0; rows.len() / 2]);
        interleave(&rows, &mut block);
        fold(&block, &mut folded);
        for (row, at) in (0..16).flat_map(|row| (0..192).map(move |at| (row, at))) {
            assert_eq!(unfolded(&folded, row, at), code(row, at), "code {at} of row {row}");
        }
    }
}
