//! Which tokens a sequence has had, for penalties: kept up to date token by token, because what is
//! counted anew in every step takes longer than the step once texts are long.

use std::collections::HashMap;

use crate::request::SeenToken;

/// Every token of a sequence once.
#[derive(Debug, Default)]
pub(super) struct SeenTokens {
    /// In the order of their first appearance.
    tokens: Vec<SeenToken>,
    /// Where each token is.
    places: HashMap<u32, usize>,
}

impl SeenTokens {
    /// Those of a prompt and of what was generated after it.
    pub(super) fn of(prompt: &[u32], output: &[u32]) -> SeenTokens {
        let mut seen = SeenTokens::default();
        for &token_id in prompt {
            seen.entry(token_id);
        }
        for &token_id in output {
            seen.add_generated(token_id);
        }
        seen
    }

    /// One more token was generated.
    pub(super) fn add_generated(&mut self, token_id: u32) {
        self.entry(token_id).times_generated += 1;
    }

    /// All of them.
    pub(super) fn as_slice(&self) -> &[SeenToken] {
        &self.tokens
    }

    fn entry(&mut self, token_id: u32) -> &mut SeenToken {
        let next = self.tokens.len();
        let place = *self.places.entry(token_id).or_insert(next);
        if place == next {
            self.tokens.push(SeenToken { token_id, times_generated: 0 });
        }
        &mut self.tokens[place]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_counted_once_however_it_came() {
        let mut seen = SeenTokens::of(&[7, 3, 7], &[3, 9]);
        seen.add_generated(9);
        seen.add_generated(1);
        let counts: Vec<(u32, u32)> =
            seen.as_slice().iter().map(|token| (token.token_id, token.times_generated)).collect();
        assert_eq!(counts, [(7, 0), (3, 1), (9, 2), (1, 1)]);
        assert_eq!(SeenTokens::of(&[7, 3, 7], &[3, 9, 9, 1]).as_slice(), seen.as_slice());
    }
}
