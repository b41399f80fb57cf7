//! The referee: every operation as plain f32 loops.
