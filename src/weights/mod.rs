//! How checkpoints store a matrix: one file per scheme.
