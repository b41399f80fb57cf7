//! The way in: a validated request becomes token ids, a command and a stream.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;

use super::step::{Command, Submission};
use super::{EngineError, Generation};
use crate::request::{GenerateRequest, OutputOptions, StopConditions, TokenizedRequest};
use crate::text::TextPipeline;

/// Turns the prompt into ids and checks that prompt and output fit the context.
pub(super) fn tokenize(
    text: &TextPipeline,
    request: GenerateRequest,
    max_model_len: usize,
    vocab_size: usize,
) -> Result<(TokenizedRequest, OutputOptions), EngineError> {
    let mut prompt_token_ids = text.prompt_token_ids(&request.prompt).map_err(Arc::new)?;
    if let Some(keep) = request.truncate_prompt_tokens {
        let excess = prompt_token_ids.len().saturating_sub(keep as usize);
        prompt_token_ids.drain(..excess);
    }
    check_prompt(&prompt_token_ids, &request.stop, max_model_len, vocab_size)?;
    let tokenized = TokenizedRequest {
        id: request.id,
        prompt_token_ids,
        sampling: Arc::new(request.sampling),
        stop: request.stop,
        n: request.n,
        priority: request.priority,
        cache_salt: request.cache_salt,
    };
    Ok((tokenized, request.output))
}

fn check_prompt(
    ids: &[u32],
    stop: &StopConditions,
    max_model_len: usize,
    vocab_size: usize,
) -> Result<(), EngineError> {
    if ids.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    if let Some(&token_id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(EngineError::TokenOutOfRange { token_id, vocab_size });
    }
    let prompt_tokens = ids.len();
    // Scoring generates nothing, so the prompt may fill the context.
    let least_output = usize::from(stop.max_tokens != Some(0));
    if prompt_tokens + least_output > max_model_len {
        return Err(EngineError::PromptTooLong { prompt_tokens, max_model_len });
    }
    match stop.max_tokens {
        Some(max_tokens) if prompt_tokens + max_tokens as usize > max_model_len => {
            Err(EngineError::OutputTooLong { prompt_tokens, max_tokens, max_model_len })
        }
        _ => Ok(()),
    }
}

/// Makes the two ends of a request: the stream for its client, the command for the engine.
pub(super) fn connect(
    request: TokenizedRequest,
    output: &OutputOptions,
    text: &Arc<TextPipeline>,
    commands: Sender<Command>,
    max_model_len: usize,
) -> (Generation, Command) {
    // The channel can hold everything the request may ever yield, so the engine never waits
    // for a slow client and memory per request stays bounded.
    let room = max_model_len.saturating_sub(request.prompt_token_ids.len());
    let longest = request.stop.max_tokens.map_or(room, |max| room.min(max as usize));
    let capacity = request.n as usize * (longest + 2);
    let (events, receiver) = tokio::sync::mpsc::channel(capacity);
    let generation = Generation::new(&request, output, Arc::clone(text), commands, receiver);
    let submission = Submission { request, events, arrived: Instant::now() };
    (generation, Command::Submit(Box::new(submission)))
}
