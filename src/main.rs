//! The program: flags in, server out.

fn main() {}
