//! Where tensors lie on a GPU: few pieces of the driver's memory, cut by us.
//!
//! The driver gives memory in pages of 2 MiB. A tensor of 3 MiB with memory of its own takes 4,
//! and a plan of what fits is wrong by a quarter. So whoever knows how much will be needed sets it
//! aside in one piece, from which tensors are cut one after the other. Small tensors that nobody
//! planned share pieces as well, large ones get their own.
//!
//! Only `allocate` calls the driver; a step that makes no tensors takes no memory. A piece is
//! given back when no tensor lies in it any more and the next tensor or the free memory is asked
//! for. Everything runs on one stream, so that what was cut from a piece before has run when new
//! tensors in it are written.

use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::result::DriverError;

use super::context::{Context, DeviceMemory};

/// Alignment of tensors.
const ALIGN: usize = 256;
/// What is taken for tensors that nobody planned.
const CHUNK_BYTES: usize = 16 << 20;
/// From this size on, a tensor that nobody planned has memory of its own.
const LARGE_BYTES: usize = 4 << 20;

/// Pieces of memory that may have room.
#[derive(Default)]
pub(super) struct Arena {
    chunks: Vec<Chunk>,
}

/// A piece of memory, of which the first bytes are tensors.
struct Chunk {
    memory: Arc<DeviceMemory>,
    used: usize,
}

/// A tensor's bytes and the memory to keep alive for them.
pub(super) type Cut = (NonNull<u8>, Arc<DeviceMemory>);

impl Arena {
    /// Takes memory in one piece for tensors to come.
    pub fn set_aside(&mut self, context: &Arc<Context>, bytes: usize) -> Result<(), DriverError> {
        let memory = Arc::new(context.allocate(bytes)?);
        self.chunks.push(Chunk { memory, used: 0 });
        Ok(())
    }

    /// Memory for a tensor, aligned to 256 bytes, whose bytes are not set.
    pub fn allocate(&mut self, context: &Arc<Context>, bytes: usize) -> Result<Cut, DriverError> {
        self.give_back();
        if let Some(cut) = self.chunks.iter_mut().find_map(|chunk| chunk.cut(bytes)) {
            return Ok(cut);
        }
        if bytes < LARGE_BYTES && self.set_aside(context, CHUNK_BYTES).is_ok() {
            let chunk = self.chunks.last_mut().expect("it was just taken");
            return Ok(chunk.cut(bytes).expect("it is larger"));
        }
        let memory = Arc::new(context.allocate(bytes)?);
        Ok((memory.address(), memory))
    }

    /// Frees pieces in which tensors lay and lie no more.
    pub fn give_back(&mut self) {
        self.chunks.retain(|chunk| chunk.used == 0 || Arc::strong_count(&chunk.memory) > 1);
    }
}

impl Chunk {
    fn cut(&mut self, bytes: usize) -> Option<Cut> {
        let start = place(self.used, self.memory.bytes(), bytes)?;
        self.used = start + bytes.max(1);
        // SAFETY: the place lies in the memory.
        let address = unsafe { self.memory.address().add(start) };
        Some((address, Arc::clone(&self.memory)))
    }
}

/// Where in a chunk of `size` bytes, of which some are used, there is room.
fn place(used: usize, size: usize, bytes: usize) -> Option<usize> {
    let start = used.next_multiple_of(ALIGN);
    (start + bytes.max(1) <= size).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_aligned_and_end_before_the_memory_does() {
        assert_eq!(place(0, 1024, 1024), Some(0));
        assert_eq!(place(1, 1024, 768), Some(256));
        assert_eq!(place(1, 1024, 769), None);
        assert_eq!(place(768, 1024, 0), Some(768));
        assert_eq!(place(1024, 1024, 0), None, "empty tensors have an address too");
    }
}
