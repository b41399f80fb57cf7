//! Sequences by id, without hashing: an id is a slot and the generation of its tenant.
//!
//! A slot is reused, an id never: an id that outlived its sequence finds nothing.

use std::ops::{Index, IndexMut};

use super::batch::SequenceId;
use super::sequence::Sequence;

/// All living sequences.
#[derive(Debug, Default)]
pub(super) struct SequenceSlab {
    slots: Vec<Slot>,
    vacant: Vec<u32>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    sequence: Option<Sequence>,
}

impl SequenceSlab {
    /// Takes a sequence in and names it.
    pub(super) fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, sequence: None });
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.sequence = Some(sequence);
        SequenceId(u64::from(entry.generation) << 32 | u64::from(slot))
    }

    /// Takes a sequence out; its id is never used again.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let (generation, slot) = parts(id);
        let entry = self.slots.get_mut(slot).filter(|entry| entry.generation == generation)?;
        let sequence = entry.sequence.take()?;
        entry.generation += 1;
        self.vacant.push(slot as u32);
        Some(sequence)
    }

    /// The sequence, unless it is gone.
    pub(super) fn get(&self, id: SequenceId) -> Option<&Sequence> {
        let (generation, slot) = parts(id);
        let entry = self.slots.get(slot).filter(|entry| entry.generation == generation)?;
        entry.sequence.as_ref()
    }

    /// The sequence, unless it is gone.
    pub(super) fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        let (generation, slot) = parts(id);
        let entry = self.slots.get_mut(slot).filter(|entry| entry.generation == generation)?;
        entry.sequence.as_mut()
    }

    /// Number of living sequences.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }
}

fn parts(id: SequenceId) -> (u32, usize) {
    ((id.0 >> 32) as u32, id.0 as u32 as usize)
}

impl Index<SequenceId> for SequenceSlab {
    type Output = Sequence;

    fn index(&self, id: SequenceId) -> &Sequence {
        self.get(id).expect("a queued sequence is alive")
    }
}

impl IndexMut<SequenceId> for SequenceSlab {
    fn index_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.get_mut(id).expect("a queued sequence is alive")
    }
}
