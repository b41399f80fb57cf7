//! What is sent: random prompts of exact lengths, the same for every engine that gets the seed.

use clap::Args;

use super::parse_count;
use crate::request::mix;

/// Flags about the prompts of `throughput` and `serve`.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Load")]
pub struct WorkloadArgs {
    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = parse_count)]
    pub num_prompts: usize,

    /// Tokens of each prompt, after the shared prefix
    #[arg(
        long,
        value_name = "N",
        default_value_t = 128,
        alias = "random-input-len",
        value_parser = parse_count
    )]
    pub input_len: usize,

    /// Tokens that each request generates; end tokens are ignored
    #[arg(
        long,
        value_name = "N",
        default_value_t = 128,
        alias = "random-output-len",
        value_parser = parse_count
    )]
    pub output_len: usize,

    /// Tokens of a prefix that all prompts share
    #[arg(long, value_name = "N", default_value_t = 0, alias = "random-prefix-len")]
    pub prefix_len: usize,

    /// Seed of the shared prefix alone; default: the seed. Two runs with this seed and
    /// different --seed share the prefix and nothing else
    #[arg(long, value_name = "N")]
    pub prefix_seed: Option<u64>,

    /// Most requests under way at once; default: all of them
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub max_concurrency: Option<usize>,

    /// Requests per second, as a Poisson process; default: as fast as --max-concurrency allows
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub request_rate: Option<f64>,

    /// Requests of the same shape, without the shared prefix, before the clock starts
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_warmups: usize,
}

impl WorkloadArgs {
    /// Tokens of prompt and output of one request.
    pub(super) fn request_len(&self) -> usize {
        self.prefix_len + self.input_len + self.output_len
    }

    /// The prompts of the run.
    pub(super) fn prompts(&self, vocab_size: usize, seed: u64) -> Vec<Vec<u32>> {
        let prefix_seed = self.prefix_seed.unwrap_or(seed);
        let prefix = token_ids(PREFIX_STREAM, prefix_seed, self.prefix_len, vocab_size);
        let prompt = |i: usize| {
            let own = token_ids(PROMPT_STREAM + i as u64, seed, self.input_len, vocab_size);
            [prefix.as_slice(), &own].concat()
        };
        (0..self.num_prompts).map(prompt).collect()
    }

    /// Prompts of the same lengths that share nothing with any other.
    pub(super) fn warmup_prompts(&self, vocab_size: usize, seed: u64) -> Vec<Vec<u32>> {
        let len = self.prefix_len + self.input_len;
        let prompt = |i: usize| token_ids(WARMUP_STREAM + i as u64, seed, len, vocab_size);
        (0..self.num_warmups).map(prompt).collect()
    }
}

/// Streams of random numbers under one seed.
const PREFIX_STREAM: u64 = 0;
const PROMPT_STREAM: u64 = 1;
const WARMUP_STREAM: u64 = 1 << 40;

/// `len` random ids below `vocab_size`: a function of stream and seed.
pub(super) fn token_ids(stream: u64, seed: u64, len: usize, vocab_size: usize) -> Vec<u32> {
    let mut random = Random::new(seed, stream);
    (0..len).map(|_| random.below(vocab_size as u64) as u32).collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014): plenty for prompts and arrival times.
pub(super) struct Random {
    state: u64,
}

impl Random {
    /// Streams of one seed are independent.
    pub fn new(seed: u64, stream: u64) -> Random {
        Random { state: mix(mix(seed) ^ stream.wrapping_mul(0xd134_2543_de82_ef95)) }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// The gap before the next arrival of a Poisson process, in seconds.
    pub fn gap(&mut self, rate: f64) -> f64 {
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        -(1.0 - unit).ln() / rate
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
        _ => Err("a number of requests per second above 0 is needed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(prefix_seed: Option<u64>) -> WorkloadArgs {
        WorkloadArgs {
            num_prompts: 3,
            input_len: 20,
            output_len: 4,
            prefix_len: 32,
            prefix_seed,
            max_concurrency: None,
            request_rate: None,
            num_warmups: 2,
        }
    }

    #[test]
    fn prompts_share_their_prefix_and_nothing_else() {
        let prompts = workload(None).prompts(4096, 7);
        assert!(prompts.iter().all(|prompt| prompt.len() == 52));
        assert_eq!(prompts[0][..32], prompts[1][..32]);
        assert_ne!(prompts[0][32..], prompts[1][32..]);
        assert!(prompts.iter().flatten().all(|&id| id < 4096));
        assert_eq!(prompts, workload(None).prompts(4096, 7), "a seed gives the same prompts");
    }

    #[test]
    fn a_prefix_seed_keeps_the_prefix_while_the_seed_changes_the_rest() {
        let (first, second) =
            (workload(Some(1)).prompts(4096, 7), workload(Some(1)).prompts(4096, 8));
        assert_eq!(first[0][..32], second[0][..32]);
        assert_ne!(first[0][32..], second[0][32..]);
        let warmup = workload(Some(1)).warmup_prompts(4096, 7);
        assert_eq!(warmup.len(), 2);
        assert_eq!(warmup[0].len(), 52);
        assert_ne!(warmup[0][..16], first[0][..16], "warming up must not warm the prefix");
    }

    #[test]
    fn arrivals_keep_their_rate() {
        let mut random = Random::new(3, 0);
        let mean = (0..20_000).map(|_| random.gap(4.0)).sum::<f64>() / 20_000.0;
        assert!((mean - 0.25).abs() < 0.01, "mean gap {mean}");
    }

    #[test]
    fn a_rate_is_above_zero() {
        assert_eq!(parse_rate("2.5"), Ok(2.5));
        for wrong in ["0", "-1", "inf", "fast"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
    }
}
