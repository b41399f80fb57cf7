//! Where bytes wait on the host for a copy to or from a GPU.
//!
//! Copies run while the host goes on, and at full speed only from memory that the system does
//! not move. One such buffer is cut into segments, which are filled in turn. Whoever enters a
//! segment again waits for the copies that were begun when it was last left, three segments ago.

/// Bytes of a segment, hence of the largest single copy.
pub(super) const SEGMENT_BYTES: usize = 4 << 20;
/// Segments of the buffer.
pub(super) const NUM_SEGMENTS: usize = 4;
/// Alignment of what is copied: a cache line.
const ALIGN: usize = 64;

/// The next free place.
#[derive(Debug, Default)]
pub(super) struct Ring {
    segment: usize,
    used: usize,
}

/// A place in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its first byte.
    pub offset: usize,
    /// The segment that was left for it, whose copies are all begun; the place lies in another
    /// one then, whose earlier copies must have ended.
    pub left: Option<usize>,
}

impl Place {
    /// The segment in which it lies.
    pub fn segment(self) -> usize {
        self.offset / SEGMENT_BYTES
    }
}

impl Ring {
    /// A place for `len` bytes, at most a segment.
    pub fn take(&mut self, len: usize) -> Place {
        assert!(len <= SEGMENT_BYTES, "{len} bytes in one copy");
        let start = self.used.next_multiple_of(ALIGN);
        if start + len <= SEGMENT_BYTES {
            self.used = start + len;
            return Place { offset: self.segment * SEGMENT_BYTES + start, left: None };
        }
        let left = Some(self.segment);
        self.segment = (self.segment + 1) % NUM_SEGMENTS;
        self.used = len;
        Place { offset: self.segment * SEGMENT_BYTES, left }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_each_other_and_never_overlap_within_a_round() {
        let mut ring = Ring::default();
        let mut taken: Vec<(usize, usize)> = Vec::new();
        let mut left = Vec::new();
        for i in 0.. {
            let len = [100, 1 << 20, 3 << 20, 64, 0][i % 5];
            let place = ring.take(len);
            left.extend(place.left);
            if left.len() == NUM_SEGMENTS {
                break;
            }
            assert!(place.offset + len <= NUM_SEGMENTS * SEGMENT_BYTES);
            assert_eq!(place.offset % ALIGN, 0);
            let apart =
                |&(start, end): &(usize, usize)| place.offset >= end || place.offset + len <= start;
            assert!(taken.iter().all(apart), "{place:?} of {len} bytes in {taken:?}");
            taken.push((place.offset, place.offset + len));
        }
        assert_eq!(left, [0, 1, 2, 3], "segments are left in turn");
    }

    #[test]
    fn a_whole_segment_may_be_taken() {
        let mut ring = Ring::default();
        ring.take(1);
        let whole = ring.take(SEGMENT_BYTES);
        assert_eq!((whole.segment(), whole.left), (1, Some(0)));
        assert_eq!(ring.take(1).left, Some(1));
    }
}
