//! Operations that were recorded instead of run, to be run again and again.

use std::any::Any;

/// What a device keeps of a recorded step. Only the operations that recorded it can replay it,
/// and only while every tensor that they were given is alive.
pub struct Recording(Box<dyn Any + Send + Sync>);

impl Recording {
    /// Keeps whatever the device needs.
    pub fn new(kept: impl Any + Send + Sync) -> Recording {
        Recording(Box::new(kept))
    }

    /// What was kept; panics when another device recorded it.
    pub fn get<T: Any>(&self) -> &T {
        self.0.downcast_ref().expect("a recording is replayed where it was recorded")
    }
}
