//! A runner without a model: the next token is a function of the tokens so far.
//!
//! It keeps the whole contract of [`StepRunner`], and checks the scheduler's side of it: a
//! plan that a real runner would compute into nonsense is an error here. With
//! [`ScriptedRunner::reading_cache`] it even goes through a KV cache, one that holds token ids
//! instead of keys and values, so that whoever shares, evicts or overwrites the wrong block
//! gets the wrong tokens.

use std::collections::{HashMap, HashSet};

use super::{RunnerError, StepRunner};
use crate::kv::BlockId;
use crate::output::{SampledToken, TokenLogprobs};
use crate::scheduler::batch::{ScheduledBatch, ScheduledSequence, StepTokens};

/// Chooses each token by a rule over the tokens before it; used by tests and simulations.
pub struct ScriptedRunner {
    script: Script,
}

type PrefixRule = Box<dyn FnMut(u64, &[u32]) -> u32 + Send>;

enum Script {
    /// `rule(position, last_token)` gives the token for `position`.
    LastToken(Box<dyn FnMut(u32, u32) -> u32 + Send>),
    /// `rule(seed, prefix)` gives the token after `prefix`, as read from the cache.
    Prefix { rule: PrefixRule, cache: TokenCache },
}

impl ScriptedRunner {
    /// `rule(position, last_token)` returns the token for `position`.
    pub fn new(rule: impl FnMut(u32, u32) -> u32 + Send + 'static) -> ScriptedRunner {
        ScriptedRunner { script: Script::LastToken(Box::new(rule)) }
    }

    /// Repeats `tokens` from the first generated position on, whatever the prompt was.
    pub fn cycling(tokens: Vec<u32>) -> ScriptedRunner {
        assert!(!tokens.is_empty(), "a script has at least one token");
        ScriptedRunner::new(move |_, last| {
            let next = tokens.iter().position(|&t| t == last).map_or(0, |i| i + 1);
            tokens[next % tokens.len()]
        })
    }

    /// `rule(seed, prefix)` returns the token after `prefix`, which is read block by block from
    /// a cache of token ids, as attention would read keys and values.
    ///
    /// A token that the rule chooses has log-probability -0.5, any other one less by its
    /// distance from the rule's choice.
    pub fn reading_cache(
        block_size: usize,
        rule: impl FnMut(u64, &[u32]) -> u32 + Send + 'static,
    ) -> ScriptedRunner {
        let cache = TokenCache { block_size, blocks: HashMap::new() };
        ScriptedRunner { script: Script::Prefix { rule: Box::new(rule), cache } }
    }
}

impl StepRunner for ScriptedRunner {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        self.step(batch).map_err(|reason| RunnerError::StepFailed { step: batch.step, reason })
    }
}

impl ScriptedRunner {
    fn step(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, String> {
        check_ranges(batch)?;
        match &mut self.script {
            Script::LastToken(rule) => {
                Ok(batch.sequences.iter().map(|seq| by_last_token(rule, batch, seq)).collect())
            }
            Script::Prefix { rule, cache } => {
                cache.copy(&batch.copies)?;
                cache.write(batch)?;
                batch
                    .sequences
                    .iter()
                    .map(|seq| Ok(by_prefix(rule, batch, seq, &cache.read(batch, seq)?)))
                    .collect()
            }
        }
    }
}

fn by_last_token(
    rule: &mut dyn FnMut(u32, u32) -> u32,
    batch: &ScheduledBatch,
    seq: &ScheduledSequence,
) -> StepTokens {
    let tokens = &batch.token_ids[seq.tokens.clone()];
    let end = seq.start_position + tokens.len() as u32;
    let scores = vec![logprobs(0); seq.scores.len()];
    let sampled = match tokens.last() {
        Some(&last) if seq.samples => vec![choose(rule(end, last), batch, seq)],
        _ => Vec::new(),
    };
    StepTokens { sampled, scores }
}

fn by_prefix(
    rule: &mut dyn FnMut(u64, &[u32]) -> u32,
    batch: &ScheduledBatch,
    seq: &ScheduledSequence,
    prefix: &[u32],
) -> StepTokens {
    let start = seq.start_position as usize;
    let scores = batch.score_targets[seq.scores.clone()]
        .iter()
        .enumerate()
        .map(|(i, &target)| logprobs(rule(seq.seed, &prefix[..=start + i]).abs_diff(target)))
        .collect();
    let sampled = match seq.samples {
        true => vec![choose(rule(seq.seed, prefix), batch, seq)],
        false => Vec::new(),
    };
    StepTokens { sampled, scores }
}

/// The rule's choice, or the next token that is not banned.
fn choose(choice: u32, batch: &ScheduledBatch, seq: &ScheduledSequence) -> SampledToken {
    let banned = &batch.banned[seq.banned.clone()];
    let mut token_id = choice;
    while banned.contains(&token_id) {
        token_id += 1;
    }
    let wanted = seq.params.logprobs.is_some();
    SampledToken { token_id, logprobs: wanted.then(|| logprobs(token_id - choice)) }
}

fn logprobs(distance: u32) -> TokenLogprobs {
    TokenLogprobs { logprob: -0.5 - distance as f32, rank: 1 + distance, top: Vec::new() }
}

/// What holds for every plan, whatever the runner is.
fn check_ranges(batch: &ScheduledBatch) -> Result<(), String> {
    let mut seen = HashSet::new();
    let mut next_token = 0;
    for seq in &batch.sequences {
        let id = seq.id.0;
        if !seen.insert(id) {
            return Err(format!("sequence {id} is scheduled twice"));
        }
        if seq.tokens.is_empty() || seq.tokens.start != next_token {
            return Err(format!("sequence {id} has tokens {:?} after {next_token}", seq.tokens));
        }
        next_token = seq.tokens.end;
        if seq.scores.len() > seq.tokens.len() {
            return Err(format!("sequence {id} scores more tokens than it computes"));
        }
        let blocks = &batch.block_ids[seq.blocks.clone()];
        if blocks.iter().collect::<HashSet<_>>().len() != blocks.len() {
            return Err(format!("sequence {id} has a block twice: {blocks:?}"));
        }
    }
    if next_token != batch.token_ids.len() {
        return Err(format!("{} tokens, but {next_token} are used", batch.token_ids.len()));
    }
    Ok(())
}

/// A KV cache that holds the token ids themselves.
struct TokenCache {
    block_size: usize,
    blocks: HashMap<BlockId, Vec<u32>>,
}

impl TokenCache {
    fn copy(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), String> {
        let sources: HashSet<_> = pairs.iter().map(|&(source, _)| source).collect();
        let destinations: HashSet<_> = pairs.iter().map(|&(_, destination)| destination).collect();
        if destinations.len() != pairs.len() || !destinations.is_disjoint(&sources) {
            return Err(format!("the order of the copies {pairs:?} would matter"));
        }
        for &(source, destination) in pairs {
            let tokens = self.blocks.get(&source).cloned();
            let tokens = tokens.ok_or_else(|| format!("block {source} holds nothing to copy"))?;
            self.blocks.insert(destination, tokens);
        }
        Ok(())
    }

    fn write(&mut self, batch: &ScheduledBatch) -> Result<(), String> {
        let mut num_users: HashMap<BlockId, u32> = HashMap::new();
        for seq in &batch.sequences {
            for &block in &batch.block_ids[seq.blocks.clone()] {
                *num_users.entry(block).or_default() += 1;
            }
        }
        for seq in &batch.sequences {
            for (i, &token) in batch.token_ids[seq.tokens.clone()].iter().enumerate() {
                let position = seq.start_position as usize + i;
                let block = self.block_at(batch, seq, position)?;
                if num_users[&block] > 1 {
                    let id = seq.id.0;
                    return Err(format!("sequence {id} writes to block {block}, which is shared"));
                }
                self.write_slot(block, position % self.block_size, token)?;
            }
        }
        Ok(())
    }

    /// What follows the slot is from an earlier owner of the block and counts no longer.
    fn write_slot(&mut self, block: BlockId, slot: usize, token: u32) -> Result<(), String> {
        let tokens = self.blocks.entry(block).or_default();
        if slot > tokens.len() {
            return Err(format!("block {block} has a hole before slot {slot}"));
        }
        tokens.truncate(slot);
        tokens.push(token);
        Ok(())
    }

    /// All tokens of the sequence up to the end of this step.
    fn read(&self, batch: &ScheduledBatch, seq: &ScheduledSequence) -> Result<Vec<u32>, String> {
        (0..seq.start_position as usize + seq.tokens.len())
            .map(|position| {
                let block = self.block_at(batch, seq, position)?;
                let tokens = self.blocks.get(&block);
                tokens
                    .and_then(|tokens| tokens.get(position % self.block_size))
                    .copied()
                    .ok_or_else(|| {
                        format!("sequence {} lacks position {position} in block {block}", seq.id.0)
                    })
            })
            .collect()
    }

    fn block_at(
        &self,
        batch: &ScheduledBatch,
        seq: &ScheduledSequence,
        position: usize,
    ) -> Result<BlockId, String> {
        let table = &batch.block_ids[seq.blocks.clone()];
        table
            .get(position / self.block_size)
            .copied()
            .ok_or_else(|| format!("sequence {} has no block for position {position}", seq.id.0))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::request::SamplingParams;
    use crate::scheduler::batch::SequenceId;

    fn part(
        id: u64,
        tokens: std::ops::Range<usize>,
        blocks: std::ops::Range<usize>,
    ) -> ScheduledSequence {
        ScheduledSequence {
            id: SequenceId(id),
            tokens,
            blocks,
            start_position: 0,
            samples: true,
            scores: 0..0,
            params: Arc::new(SamplingParams::greedy()),
            seed: 0,
            seen: 0..0,
            banned: 0..0,
        }
    }

    fn counting() -> ScriptedRunner {
        ScriptedRunner::reading_cache(2, |_, prefix| prefix.len() as u32)
    }

    fn reason(runner: &mut ScriptedRunner, batch: &ScheduledBatch) -> String {
        runner.execute(batch).unwrap_err().to_string()
    }

    #[test]
    fn a_prefix_is_read_through_the_blocks() {
        let mut runner = counting();
        let mut batch = ScheduledBatch {
            sequences: vec![part(1, 0..3, 0..2)],
            token_ids: vec![7, 8, 9],
            block_ids: vec![4, 5],
            ..ScheduledBatch::default()
        };
        assert_eq!(runner.execute(&batch).unwrap()[0].sampled[0].token_id, 3);
        batch.token_ids = vec![3];
        batch.sequences[0] = ScheduledSequence { start_position: 3, ..part(1, 0..1, 0..2) };
        assert_eq!(runner.execute(&batch).unwrap()[0].sampled[0].token_id, 4);
        batch.block_ids = vec![4, 6];
        assert!(reason(&mut runner, &batch).contains("hole before slot 1"));
    }

    #[test]
    fn a_shared_block_must_not_be_written() {
        let batch = ScheduledBatch {
            sequences: vec![part(1, 0..1, 0..1), part(2, 1..2, 0..1)],
            token_ids: vec![7, 7],
            block_ids: vec![4],
            ..ScheduledBatch::default()
        };
        assert!(reason(&mut counting(), &batch).contains("block 4, which is shared"));
    }

    #[test]
    fn a_banned_token_is_not_chosen() {
        let mut batch = ScheduledBatch {
            sequences: vec![part(1, 0..1, 0..1)],
            token_ids: vec![7],
            block_ids: vec![0],
            banned: vec![1, 2],
            ..ScheduledBatch::default()
        };
        batch.sequences[0].banned = 0..2;
        assert_eq!(counting().execute(&batch).unwrap()[0].sampled[0].token_id, 3);
    }

    #[test]
    fn a_sequence_scheduled_twice_is_an_error() {
        let batch = ScheduledBatch {
            sequences: vec![part(1, 0..1, 0..1), part(1, 1..2, 1..2)],
            token_ids: vec![7, 7],
            block_ids: vec![4, 5],
            ..ScheduledBatch::default()
        };
        let mut runner = ScriptedRunner::new(|_, last| last);
        assert!(reason(&mut runner, &batch).contains("scheduled twice"));
    }
}
