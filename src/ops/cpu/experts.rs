//! A mixture of experts: which experts compute a token, and which tokens an expert computes.
//! `launch_experts` is how they do.

use std::ops::Range;

use super::CpuOps;
use super::share::Parts;
use crate::ops::args::{
    GroupedRouting, LEAST_SCORE_SUM, MAX_GROUPS, RouteExpertsArgs, Routing, Scoring,
};
use crate::tensor::View;

/// Elements of a row-wise operation that take as long as one logit does here.
const ELEMENTS_PER_LOGIT: usize = 8;

/// The tokens of every expert; kept to be filled again by the next operation.
#[derive(Default)]
pub struct ExpertTokens {
    /// Those of the first expert in ascending order, then those of the next.
    tokens: Vec<u32>,
    /// What the expert's results are multiplied by.
    weights: Vec<f32>,
    /// Where each expert's tokens begin, and where the last one's end.
    starts: Vec<usize>,
}

impl ExpertTokens {
    /// Makes room for this many choices among this many experts.
    pub fn reserve(&mut self, num_choices: usize, num_experts: usize) {
        self.tokens.reserve(num_choices.saturating_sub(self.tokens.len()));
        self.weights.reserve(num_choices.saturating_sub(self.weights.len()));
        self.starts.reserve((num_experts + 1).saturating_sub(self.starts.len()));
    }

    /// Bytes of that room.
    pub fn size_bytes(num_choices: usize, num_experts: usize) -> usize {
        num_choices * (size_of::<u32>() + size_of::<f32>()) + (num_experts + 1) * size_of::<usize>()
    }

    /// Sorts the choices of all tokens, `per_token` each, by expert; panics on an expert that
    /// there is not.
    pub(super) fn sort(
        &mut self,
        ids: &[u32],
        weights: &[f32],
        per_token: usize,
        num_experts: usize,
    ) {
        self.starts.clear();
        self.starts.resize(num_experts + 1, 0);
        for &id in ids {
            assert!((id as usize) < num_experts, "expert {id} of {num_experts}");
            self.starts[id as usize + 1] += 1;
        }
        for expert in 0..num_experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        self.tokens.resize(ids.len(), 0);
        self.weights.resize(ids.len(), 0.0);
        for (choice, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
            let at = &mut self.starts[id as usize];
            self.tokens[*at] = (choice / per_token) as u32;
            self.weights[*at] = weight;
            *at += 1;
        }
        // Every start has moved to the next expert's.
        self.starts.copy_within(..num_experts, 1);
        self.starts[0] = 0;
    }

    /// Tokens of an expert.
    pub(super) fn count(&self, expert: usize) -> usize {
        self.starts[expert + 1] - self.starts[expert]
    }

    /// Tokens and weights of experts that follow each other.
    pub(super) fn of(&self, experts: Range<usize>) -> (&[u32], &[f32]) {
        let range = self.starts[experts.start]..self.starts[experts.end];
        (&self.tokens[range.clone()], &self.weights[range])
    }
}

impl CpuOps {
    pub(super) fn route(&self, args: RouteExpertsArgs<'_>) {
        let RouteExpertsArgs { expert_ids, weights, logits, bias, routing } = args;
        let bias = bias.map(View::as_slice);
        let (per_token, num_experts) = (expert_ids.size(1), logits.size(1));
        let ids = Parts::new(expert_ids.into_mut_slice::<u32>());
        let weights = Parts::new(weights.into_mut_slice::<f32>());
        self.for_rows(logits.size(0), ELEMENTS_PER_LOGIT * num_experts, |tokens| {
            for token in tokens {
                let chosen = token * per_token..(token + 1) * per_token;
                // SAFETY: tasks have different tokens.
                let (ids, weights) = unsafe { (ids.part(chosen.clone()), weights.part(chosen)) };
                let logits = logits.rows(token..token + 1).as_slice();
                match routing {
                    Routing::Softmax { renormalize } => {
                        route_by_softmax(logits, renormalize, ids, weights);
                    }
                    Routing::Grouped(routing) => {
                        route_in_groups(logits, bias, &routing, ids, weights);
                    }
                }
            }
        });
    }
}

/// Chooses as many experts as there is room for, and their weights.
fn route_by_softmax(logits: &[f32], renormalize: bool, ids: &mut [u32], weights: &mut [f32]) {
    choose(logits.iter().copied(), ids, weights);
    let largest = weights[0];
    sort_by_id(ids, weights);
    weights.iter_mut().for_each(|weight| *weight = (*weight - largest).exp());
    // Probabilities divided by their sum need no sum over the others.
    let sum: f32 = match renormalize {
        true => weights.iter().sum(),
        false => logits.iter().map(|logit| (logit - largest).exp()).sum(),
    };
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

/// The same by scores, within the best groups.
fn route_in_groups(
    logits: &[f32],
    bias: Option<&[f32]>,
    routing: &GroupedRouting,
    ids: &mut [u32],
    weights: &mut [f32],
) {
    let is_softmax = routing.scoring == Scoring::Softmax;
    let score = |id: usize| 1.0 / (1.0 + (-logits[id]).exp());
    // Probabilities have the order of logits.
    let biased = |id: usize| match is_softmax {
        true => logits[id],
        false => score(id) + bias.map_or(0.0, |bias| bias[id]),
    };
    let group_len = logits.len() / routing.num_groups;
    let of_group = |group: usize| {
        let (mut ids, mut best) = ([0; 2], [0.0; 2]);
        let num_best = if is_softmax { 1 } else { group_len.min(2) };
        let group = (group * group_len..(group + 1) * group_len).map(biased);
        choose(group, &mut ids[..num_best], &mut best[..num_best]);
        best[0] + best[1]
    };
    let (mut groups, mut sums) = ([0; MAX_GROUPS], [0.0; MAX_GROUPS]);
    let groups = &mut groups[..routing.num_chosen_groups];
    choose((0..routing.num_groups).map(of_group), groups, &mut sums[..groups.len()]);
    let of_chosen_group = |id: usize| {
        let is_chosen = groups.contains(&((id / group_len) as u32));
        if is_chosen { biased(id) } else { f32::NEG_INFINITY }
    };
    choose((0..logits.len()).map(of_chosen_group), ids, weights);
    // The largest of all logits lies in the best group.
    let largest = weights[0];
    ids.sort_unstable();
    for (weight, &id) in weights.iter_mut().zip(&*ids) {
        let id = id as usize;
        *weight = if is_softmax { (logits[id] - largest).exp() } else { score(id) };
    }
    let sum = match (routing.renormalize, is_softmax) {
        (true, _) => weights.iter().sum::<f32>() + LEAST_SCORE_SUM,
        (false, true) => logits.iter().map(|logit| (logit - largest).exp()).sum(),
        (false, false) => 1.0,
    };
    weights.iter_mut().for_each(|weight| *weight = *weight / sum * routing.scale);
}

/// The largest values in falling order, of equal ones those with the lower ids first.
fn choose(values: impl Iterator<Item = f32>, ids: &mut [u32], chosen: &mut [f32]) {
    let mut num_chosen = 0;
    for (id, logit) in values.enumerate() {
        // A number that is none loses against all others.
        let logit = logit.max(f32::NEG_INFINITY);
        if num_chosen == chosen.len() && logit <= chosen[num_chosen - 1] {
            continue;
        }
        num_chosen = (num_chosen + 1).min(chosen.len());
        let mut at = num_chosen - 1;
        while at > 0 && chosen[at - 1] < logit {
            (chosen[at], ids[at]) = (chosen[at - 1], ids[at - 1]);
            at -= 1;
        }
        (chosen[at], ids[at]) = (logit, id as u32);
    }
}

/// Brings a few pairs into ascending order of their ids.
fn sort_by_id(ids: &mut [u32], values: &mut [f32]) {
    for end in 1..ids.len() {
        let mut at = end;
        while at > 0 && ids[at - 1] > ids[at] {
            ids.swap(at - 1, at);
            values.swap(at - 1, at);
            at -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_sorted_by_expert_and_stay_in_order() {
        let mut tokens = ExpertTokens::default();
        for _ in 0..2 {
            tokens.sort(&[0, 3, 1, 3, 0, 1], &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2, 5);
            assert_eq!(tokens.of(0..1), (&[0, 2][..], &[0.1, 0.5][..]));
            assert_eq!(tokens.of(1..3), (&[1, 2][..], &[0.3, 0.6][..]));
            assert_eq!(tokens.of(3..5), (&[0, 1][..], &[0.2, 0.4][..]));
            assert_eq!([0, 1, 2, 3, 4].map(|expert| tokens.count(expert)), [2, 2, 0, 2, 0]);
        }
    }

    #[test]
    fn numbers_that_are_none_are_chosen_last() {
        let (mut ids, mut chosen) = ([9; 3], [0.0; 3]);
        choose([f32::NAN, 1.0, f32::NAN, 2.0].into_iter(), &mut ids, &mut chosen);
        assert_eq!(ids, [3, 1, 0]);
        assert_eq!(chosen, [2.0, 1.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn room_is_reserved_for_every_smaller_operation() {
        let mut tokens = ExpertTokens::default();
        tokens.reserve(64, 16);
        let capacities = |tokens: &ExpertTokens| {
            [tokens.tokens.capacity(), tokens.weights.capacity(), tokens.starts.capacity()]
        };
        let reserved = capacities(&tokens);
        tokens.sort(&[15; 64], &[1.0; 64], 1, 16);
        assert_eq!(capacities(&tokens), reserved);
    }
}
