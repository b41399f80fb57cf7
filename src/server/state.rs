//! What every handler can reach.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{SystemTime, UNIX_EPOCH};

use super::auth::Keys;
use super::error::ServerError;
use crate::api::ApiLimits;
use crate::config::ServerConfig;
use crate::engine::{Engine, EngineError, Generation};
use crate::request::GenerateRequest;

/// Shared by all handlers; clones are cheap.
#[derive(Clone)]
pub(super) struct App {
    pub engine: Engine,
    pub limits: Arc<ApiLimits>,
    pub keys: Arc<Keys>,
    pub max_body_bytes: usize,
    /// HTTP requests being answered.
    pub load: Arc<AtomicUsize>,
}

impl App {
    pub fn new(engine: Engine, config: &ServerConfig) -> App {
        let model = engine.model();
        let limits = ApiLimits {
            served_model_names: config.served_model_names.clone(),
            max_logprobs: config.max_logprobs,
            max_model_len: model.max_model_len,
            vocab_size: model.vocab_size,
            default_seed: config.seed,
            accepts_priority: config.accepts_priority,
            defaults: model.defaults.clone(),
        };
        App {
            limits: Arc::new(limits),
            keys: Arc::new(Keys::new(&config.api_keys)),
            max_body_bytes: usize::try_from(config.max_body_bytes).unwrap_or(usize::MAX),
            load: Arc::new(AtomicUsize::new(0)),
            engine,
        }
    }

    /// Submits a request. An output length that the client did not ask for itself shrinks to
    /// what the context has room for.
    pub async fn submit(
        &self,
        request: GenerateRequest,
        shrinks_to_fit: bool,
    ) -> Result<Generation, ServerError> {
        let shrinkable =
            (shrinks_to_fit && request.stop.max_tokens.is_some()).then(|| request.clone());
        let result = match (self.engine.submit(request).await, shrinkable) {
            (
                Err(EngineError::OutputTooLong { prompt_tokens, max_model_len, .. }),
                Some(mut request),
            ) => {
                let room = max_model_len.saturating_sub(prompt_tokens) as u32;
                request.stop.max_tokens = Some(room);
                request.stop.min_tokens = request.stop.min_tokens.min(room);
                self.engine.submit(request).await
            }
            (result, _) => result,
        };
        if let Err(EngineError::Draining) = &result {
            self.engine.metrics().record_rejection("draining");
        }
        Ok(result?)
    }
}

/// Unix seconds.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
