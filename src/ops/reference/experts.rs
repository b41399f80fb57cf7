//! Routing and experts, one token and one expert at a time.

use super::ReferenceOps;
use crate::ops::args::*;
use crate::ops::mlp_in_steps;
use crate::tensor::{DType, Tensor, View};

/// See [`crate::ops::Ops::route_experts`].
pub fn route_experts(args: RouteExpertsArgs<'_>) {
    let (per_token, num_experts) = (args.expert_ids.size(1), args.logits.size(1));
    let logits = args.logits.as_slice::<f32>().chunks_exact(num_experts);
    let bias = args.bias.map(View::as_slice::<f32>);
    let ids = args.expert_ids.into_mut_slice::<u32>().chunks_exact_mut(per_token);
    let weights = args.weights.into_mut_slice::<f32>().chunks_exact_mut(per_token);
    for ((logits, ids), weights) in logits.zip(ids).zip(weights) {
        let logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        let (chosen, scores, renormalize, scale) = match args.routing {
            Routing::Softmax { renormalize } => {
                (largest(&logits, per_token), softmax(&logits), renormalize, 1.0)
            }
            Routing::Grouped(routing) => {
                let scores: Vec<f64> = match routing.scoring {
                    Scoring::Softmax => softmax(&logits),
                    Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
                };
                let chosen = chosen_by_score(&routing, &scores, bias, per_token);
                (chosen, scores, routing.renormalize, f64::from(routing.scale))
            }
        };
        ids.copy_from_slice(&chosen);
        ids.sort_unstable();
        let chosen: Vec<f64> = ids.iter().map(|&id| scores[id as usize]).collect();
        let sum = if renormalize { chosen.iter().sum() } else { 1.0 };
        for (weight, score) in weights.iter_mut().zip(chosen) {
            *weight = (score / sum * scale) as f32;
        }
    }
}

/// Places of the largest values, of equal ones the first.
fn largest(values: &[f64], num: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    // A stable sort, so that of equal values the first one comes first.
    order.sort_by(|&a, &b| {
        let order = values[b as usize].partial_cmp(&values[a as usize]);
        order.expect("logits are numbers")
    });
    order.truncate(num);
    order
}

fn chosen_by_score(
    routing: &GroupedRouting,
    scores: &[f64],
    bias: Option<&[f32]>,
    num: usize,
) -> Vec<u32> {
    let biased = |(i, score): (usize, &f64)| score + bias.map_or(0.0, |bias| f64::from(bias[i]));
    let mut biased: Vec<f64> = scores.iter().enumerate().map(biased).collect();
    let group_len = scores.len() / routing.num_groups;
    let num_best = if routing.scoring == Scoring::Sigmoid { 2 } else { 1 };
    let of_group = |group: &[f64]| -> f64 {
        largest(group, num_best).iter().map(|&best| group[best as usize]).sum()
    };
    let groups: Vec<f64> = biased.chunks_exact(group_len).map(of_group).collect();
    let groups = largest(&groups, routing.num_chosen_groups);
    for (i, group) in biased.chunks_exact_mut(group_len).enumerate() {
        if !groups.contains(&(i as u32)) {
            group.fill(f64::NEG_INFINITY);
        }
    }
    largest(&biased, num)
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(x));
    let powers: Vec<f64> = logits.iter().map(|&x| (x - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

/// See [`crate::ops::Ops::expert_mlp`].
pub fn expert_mlp(ops: &ReferenceOps, args: ExpertMlpArgs<'_>) {
    let (per_token, width) = (args.expert_ids.size(1), args.out.size(1));
    let ids = args.expert_ids.as_slice::<u32>().chunks_exact(per_token);
    let weights = args.weights.as_slice::<f32>().chunks_exact(per_token);
    let out = args.out.into_mut_slice::<f32>().chunks_exact_mut(width);
    for (token, ((ids, weights), out)) in ids.zip(weights).zip(out).enumerate() {
        let mut sum = vec![0.0_f64; width];
        for (&id, &weight) in ids.iter().zip(weights) {
            let Expert { gate, up, down } = &args.experts[id as usize];
            let mut yielded = Tensor::zeros(DType::F32, [1, width]);
            let mut middle = [0, 1, 2].map(|_| Tensor::zeros(DType::F32, [1, gate.num_rows]));
            let [middle, gate_out, up_out] = middle.each_mut().map(Tensor::view_mut);
            mlp_in_steps(
                ops,
                GatedMlpArgs {
                    gated: GatedMatmulArgs {
                        out: middle,
                        x: args.x.rows(token..token + 1),
                        gate: (gate, None),
                        up: (up, None),
                        activation: args.activation,
                        scratch: [gate_out, up_out],
                    },
                    down: Projection { out: yielded.view_mut(), weight: down, bias: None },
                },
            );
            for (sum, &y) in sum.iter_mut().zip(yielded.as_slice::<f32>()) {
                *sum += f64::from(weight) * f64::from(y);
            }
        }
        for (out, sum) in out.iter_mut().zip(sum) {
            *out = sum as f32;
        }
    }
}
