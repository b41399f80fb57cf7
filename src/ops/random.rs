//! The sampler's random numbers: a pure function of a seed and a position.
//!
//! Stateless, so a result never depends on batching, preemption or the device; every
//! backend must compute exactly this.

use crate::request::mix;

/// A number in `[0, 1)` with 24 random bits, from the SplitMix64 finaliser
/// (Steele, Lea, Flood 2014) over seed and position.
pub fn uniform(seed: u64, position: u32) -> f32 {
    let mixed = mix(seed ^ mix(u64::from(position).wrapping_add(0x9e37_79b9_7f4a_7c15)));
    (mixed >> 40) as f32 / (1u64 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::continuation_seed;

    #[test]
    fn numbers_are_in_range_and_even() {
        let mean = (0..10_000u32).map(|p| f64::from(uniform(7, p))).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        assert!((0..10_000u64).all(|seed| (0.0..1.0).contains(&uniform(seed, 3))));
    }

    #[test]
    fn seeds_and_positions_give_different_numbers() {
        assert_ne!(uniform(1, 0), uniform(2, 0));
        assert_ne!(uniform(1, 0), uniform(1, 1));
        assert_ne!(continuation_seed(5, 1), continuation_seed(5, 2));
    }
}
