//! Composition root: from a device description to a rank's operations and communicator.
