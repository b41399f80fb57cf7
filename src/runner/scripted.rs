//! A runner without a model: the next token is a function of the tokens so far.

use std::collections::HashMap;

use super::{RunnerError, StepRunner};
use crate::output::{SampledToken, TokenLogprobs};
use crate::scheduler::batch::{ScheduledBatch, SequenceId, StepTokens};

/// Chooses each token by a rule over `(position, last token)`; used by tests and simulations.
///
/// It also checks the plan it is given: every sequence must continue exactly where its last
/// step ended, or restart from a position that was computed before.
pub struct ScriptedRunner {
    rule: Box<dyn FnMut(u32, u32) -> u32 + Send>,
    computed: HashMap<SequenceId, u32>,
}

impl ScriptedRunner {
    /// `rule(position, last_token)` returns the token for `position`.
    pub fn new(rule: impl FnMut(u32, u32) -> u32 + Send + 'static) -> ScriptedRunner {
        ScriptedRunner { rule: Box::new(rule), computed: HashMap::new() }
    }

    /// Repeats `tokens` from the first generated position on, whatever the prompt was.
    pub fn cycling(tokens: Vec<u32>) -> ScriptedRunner {
        assert!(!tokens.is_empty(), "a script has at least one token");
        ScriptedRunner::new(move |_, last| {
            let next = tokens.iter().position(|&t| t == last).map_or(0, |i| i + 1);
            tokens[next % tokens.len()]
        })
    }
}

impl StepRunner for ScriptedRunner {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        let mut results = Vec::with_capacity(batch.sequences.len());
        for seq in &batch.sequences {
            let tokens = &batch.token_ids[seq.tokens.clone()];
            let end = seq.start_position + tokens.len() as u32;
            let seen = self.computed.insert(seq.id, end);
            if let Some(seen) = seen.filter(|&seen| seq.start_position > seen) {
                let reason = format!("sequence jumps from {seen} to {}", seq.start_position);
                return Err(RunnerError::StepFailed { step: batch.step, reason });
            }
            let logprobs = TokenLogprobs { logprob: -0.5, rank: 1, top: Vec::new() };
            let mut result = StepTokens {
                sampled: Vec::new(),
                scores: vec![logprobs.clone(); seq.scores.len()],
            };
            if seq.samples {
                let last = tokens[tokens.len() - 1];
                let token_id = (self.rule)(end, last);
                let wanted = seq.params.logprobs.is_some();
                result
                    .sampled
                    .push(SampledToken { token_id, logprobs: wanted.then_some(logprobs) });
            }
            results.push(result);
        }
        Ok(results)
    }
}
