//! What every request must yield, computed without batching, blocks or caches.

use tokenmill::output::FinishReason;
use tokenmill::request::{TokenizedRequest, continuation_seed};
use tokenmill::scheduler::SchedulerParams;

/// The model's own end token in these tests.
pub const EOS: u32 = 2;
/// A token that some requests stop at.
pub const STOP: u32 = 3;
/// Ordinary tokens lie between [`STOP`] and this.
const VOCAB_SIZE: u32 = 48;

/// The "model": depends on the seed and on every token of the prefix and its order.
pub fn next_token(seed: u64, prefix: &[u32]) -> u32 {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    for &token in prefix {
        state = (state ^ u64::from(token)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }
    state ^= state >> 33;
    (state.wrapping_mul(0xff51_afd7_ed55_8ccd) >> 33) as u32 % (VOCAB_SIZE - EOS) + EOS
}

/// Tokens and reason of one continuation.
pub fn expected_output(
    params: &SchedulerParams,
    request: &TokenizedRequest,
    index: u32,
) -> (Vec<u32>, FinishReason) {
    let prompt_len = request.prompt_token_ids.len();
    // The last token is sampled, but never computed: it needs no slot.
    let max_len = params.max_model_len.min(params.num_blocks * params.block_size + 1);
    let room = max_len.saturating_sub(prompt_len);
    let max_tokens = request.stop.max_tokens.map_or(room, |max| room.min(max as usize));
    let seed = continuation_seed(request.sampling.seed, index);
    let mut tokens = request.prompt_token_ids.clone();
    while tokens.len() - prompt_len < max_tokens {
        let mut token = next_token(seed, &tokens);
        if tokens.len() - prompt_len < request.stop.min_tokens as usize {
            while token == EOS || request.stop.stop_token_ids.contains(&token) {
                token += 1;
            }
        }
        tokens.push(token);
        if token == EOS && !request.stop.ignore_eos {
            return (tokens.split_off(prompt_len), FinishReason::EndOfText);
        }
        if request.stop.stop_token_ids.contains(&token) {
            return (tokens.split_off(prompt_len), FinishReason::StopToken(token));
        }
    }
    (tokens.split_off(prompt_len), FinishReason::Length)
}

/// The log-probabilities that `ScriptedRunner::reading_cache` gives to the prompt.
pub fn expected_prompt_logprobs(request: &TokenizedRequest) -> Vec<Option<f32>> {
    let prompt = &request.prompt_token_ids;
    let score = |i: usize| {
        let choice = next_token(request.sampling.seed, &prompt[..i]);
        -0.5 - choice.abs_diff(prompt[i]) as f32
    };
    (0..prompt.len()).map(|i| (i > 0).then(|| score(i))).collect()
}
