//! Rotary position embedding: from its description to tables of cosines and sines.
//!
//! Angles are computed in f64, because at position 100,000 an f32 angle is off by a
//! hundredth of a radian. Sources: RoFormer (Su et al., 2021); linear interpolation (Chen
//! et al., 2023); YaRN (Peng et al., 2023), section 3; the Llama 3.1 model card.

use std::f64::consts::PI;

use crate::ops::args::RopeStyle;
use crate::tensor::Tensor;
use crate::weights::{LoadError, Loader};

/// How angles follow from positions.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Elements of each head that rotate; even.
    pub rotary_dim: usize,
    /// Which elements form a pair.
    pub style: RopeStyle,
    /// Change of the wavelengths beyond the trained context.
    pub scaling: RopeScaling,
}

/// How a model reaches beyond the context it was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Long wavelengths stretched, short ones kept, a smooth passage between.
    Llama3 {
        /// How far long wavelengths are stretched.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are stretched fully.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the first training, in tokens.
        original_max_position: f64,
    },
    /// As Llama 3, with the passage linear in the dimension, and hotter attention.
    Yarn {
        /// How far long wavelengths are stretched.
        factor: f64,
        /// Multiplies cosines and sines, hence attention logits by its square.
        attention_factor: f64,
        /// Dimensions that turn more often than this within the context are kept.
        beta_fast: f64,
        /// Dimensions that turn less often than this are stretched fully.
        beta_slow: f64,
        /// Context length of the first training, in tokens.
        original_max_position: f64,
        /// Round the ends of the passage to whole dimensions.
        truncate: bool,
    },
}

/// The attention factor that the YaRN paper recommends for a stretch (equation 22), with
/// the weight that DeepSeek added.
pub fn yarn_attention_factor(stretch: f64, weight: f64) -> f64 {
    if stretch <= 1.0 { 1.0 } else { 0.1 * weight * stretch.ln() + 1.0 }
}

/// Cosines and sines of every position, read by `Ops::rope`.
#[derive(Debug)]
pub struct RopeTable {
    /// `[max_position, rotary_dim / 2]`, f32.
    pub cos: Tensor,
    /// `[max_position, rotary_dim / 2]`, f32.
    pub sin: Tensor,
}

impl RopeTable {
    /// Tables for positions `0..max_position`, on the host.
    pub fn new(spec: &RopeSpec, max_position: usize) -> RopeTable {
        let frequencies = spec.frequencies();
        let magnitude = spec.magnitude();
        let shape = [max_position, frequencies.len()];
        let mut cos = Tensor::zeros(crate::tensor::DType::F32, shape);
        let mut sin = Tensor::zeros(crate::tensor::DType::F32, shape);
        let cos_rows = cos.as_mut_slice::<f32>().chunks_exact_mut(frequencies.len());
        let sin_rows = sin.as_mut_slice::<f32>().chunks_exact_mut(frequencies.len());
        for (position, (cos_row, sin_row)) in cos_rows.zip(sin_rows).enumerate() {
            for ((cos, sin), frequency) in cos_row.iter_mut().zip(sin_row).zip(&frequencies) {
                let (s, c) = (position as f64 * frequency).sin_cos();
                *cos = (c * magnitude) as f32;
                *sin = (s * magnitude) as f32;
            }
        }
        RopeTable { cos, sin }
    }

    /// As [`RopeTable::new`], where operations read it.
    pub fn load(
        spec: &RopeSpec,
        max_position: usize,
        loader: &Loader<'_>,
    ) -> Result<RopeTable, LoadError> {
        let RopeTable { cos, sin } = RopeTable::new(spec, max_position);
        Ok(RopeTable { cos: loader.place(cos)?, sin: loader.place(sin)? })
    }
}

impl RopeSpec {
    /// Radians per token of each pair, `[rotary_dim / 2]`.
    pub fn frequencies(&self) -> Vec<f64> {
        let num_pairs = self.rotary_dim / 2;
        let exponent = |pair: usize| 2.0 * pair as f64 / self.rotary_dim as f64;
        (0..num_pairs).map(|pair| self.scaled(pair, self.theta.powf(-exponent(pair)))).collect()
    }

    /// Factor on cosines and sines.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// The frequency of a pair after scaling.
    fn scaled(&self, pair: usize, frequency: f64) -> f64 {
        match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            } => {
                let turns = original_max_position * frequency / (2.0 * PI);
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                blend(kept.clamp(0.0, 1.0), frequency, frequency / factor)
            }
            RopeScaling::Yarn { factor, .. } => {
                let (first, last) = self.yarn_passage();
                let stretched = (pair as f64 - first) / (last - first);
                blend(1.0 - stretched.clamp(0.0, 1.0), frequency, frequency / factor)
            }
        }
    }

    /// First and last pair of YaRN's passage from kept to stretched frequencies.
    fn yarn_passage(&self) -> (f64, f64) {
        let RopeScaling::Yarn { beta_fast, beta_slow, original_max_position, truncate, .. } =
            self.scaling
        else {
            return (0.0, 1.0);
        };
        // The pair that turns `turns` times within the original context.
        let dim = self.rotary_dim as f64;
        let pair_turning = |turns: f64| {
            dim * (original_max_position / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut first, mut last) = (pair_turning(beta_fast), pair_turning(beta_slow));
        if truncate {
            (first, last) = (first.floor(), last.ceil());
        }
        // The upper bound is the published implementation's: dimensions, not pairs.
        (first, last) = (first.max(0.0), last.min(dim - 1.0));
        // Without width the passage would divide by zero; the same width as published.
        if first == last { (first, last + 0.001) } else { (first, last) }
    }
}

/// `share` of `kept`, the rest of `stretched`.
fn blend(share: f64, kept: f64, stretched: f64) -> f64 {
    share * kept + (1.0 - share) * stretched
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(scaling: RopeScaling) -> RopeSpec {
        RopeSpec { theta: 10_000.0, rotary_dim: 64, style: RopeStyle::Halves, scaling }
    }

    #[test]
    fn position_zero_does_not_turn_and_position_one_turns_by_the_frequency() {
        let spec = spec(RopeScaling::Default);
        let table = RopeTable::new(&spec, 2);
        assert_eq!(&table.cos.as_slice::<f32>()[..32], [1.0; 32]);
        assert_eq!(&table.sin.as_slice::<f32>()[..32], [0.0; 32]);
        for (pair, frequency) in spec.frequencies().iter().enumerate() {
            assert_eq!(table.sin.as_slice::<f32>()[32 + pair], frequency.sin() as f32);
        }
        assert_eq!(spec.frequencies()[0], 1.0);
        assert!((spec.frequencies()[16] - 0.01).abs() < 1e-15);
    }

    #[test]
    fn linear_scaling_turns_as_the_divided_position() {
        let plain = RopeTable::new(&spec(RopeScaling::Default), 3);
        let scaled = RopeTable::new(&spec(RopeScaling::Linear { factor: 4.0 }), 9);
        assert_eq!(
            plain.cos.rows(3).rows(2..3).as_slice::<f32>(),
            scaled.cos.rows(9).rows(8..9).as_slice::<f32>()
        );
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let plain = spec(RopeScaling::Default).frequencies();
        let scaled = spec(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        })
        .frequencies();
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[31], plain[31] / 8.0);
        for pair in 0..32 {
            assert!(scaled[pair] <= plain[pair] && scaled[pair] >= plain[pair] / 8.0);
        }
    }

    #[test]
    fn yarn_keeps_fast_pairs_stretches_slow_ones_and_heats_attention() {
        let plain = spec(RopeScaling::Default).frequencies();
        let yarn = spec(RopeScaling::Yarn {
            factor: 4.0,
            attention_factor: yarn_attention_factor(4.0, 1.0),
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position: 32_768.0,
            truncate: true,
        });
        assert_eq!(yarn.frequencies()[0], plain[0]);
        assert_eq!(yarn.frequencies()[31], plain[31] / 4.0);
        assert!(
            (f64::from(RopeTable::new(&yarn, 1).cos.as_slice::<f32>()[0]) - 1.138_629_4).abs()
                < 1e-6
        );
        assert_eq!(yarn_attention_factor(0.5, 1.0), 1.0);
    }
}
