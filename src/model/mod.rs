//! One decoder, many descriptions.
