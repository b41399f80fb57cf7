//! Logs and metrics: the subscriber, and every metric name this program exports.
//!
//! Metric names, labels and buckets are vLLM's, so that its dashboards, autoscalers and
//! gateways work unchanged. The engine reports plain numbers; nothing here knows why.

use std::time::Duration;

use prometheus::{Encoder, IntGauge, Opts, Registry, TextEncoder};

/// What one engine step did.
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    /// Sequences running after the step.
    pub num_running: usize,
    /// Requests waiting after the step.
    pub num_waiting: usize,
    /// Fraction of KV blocks in use by running sequences, 0 to 1.
    pub kv_cache_usage: f64,
    /// Tokens computed, prefill and decode together.
    pub num_tokens: usize,
    /// Prompt tokens computed.
    pub num_prompt_tokens: usize,
    /// Tokens generated.
    pub num_generated_tokens: usize,
    /// Sequences preempted.
    pub num_preempted: usize,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: usize,
    /// Prompt tokens found there.
    pub prefix_cache_hits: usize,
}

/// What one request experienced, reported when it ends.
#[derive(Clone, Debug)]
pub struct RequestReport {
    /// `stop`, `length`, `abort` or `error`.
    pub finished_reason: &'static str,
    /// Prompt length.
    pub num_prompt_tokens: usize,
    /// Prompt tokens found in the prefix cache.
    pub num_cached_tokens: usize,
    /// Generated tokens over all continuations.
    pub num_generated_tokens: usize,
    /// Continuations asked for.
    pub n: u32,
    /// `max_tokens`, when given.
    pub max_tokens: Option<u32>,
    /// Arrival to end.
    pub e2e: Duration,
    /// Arrival to first scheduled step; `None` when it never ran.
    pub queued: Option<Duration>,
    /// First scheduled step to first token.
    pub prefill: Option<Duration>,
    /// First token to end.
    pub decode: Option<Duration>,
    /// Times one of its sequences was preempted.
    pub num_preemptions: u32,
}

/// All metrics of one engine.
pub struct Metrics {
    registry: Registry,
    num_running: IntGauge,
}

impl Metrics {
    /// Metrics labelled with the model's public name.
    pub fn new(model_name: &str) -> Metrics {
        let registry = Registry::new();
        let opts = Opts::new("vllm:num_requests_running", "Sequences running.")
            .const_label("model_name", model_name)
            .const_label("engine", "0");
        let num_running = IntGauge::with_opts(opts).expect("the name is valid");
        registry.register(Box::new(num_running.clone())).expect("the name is new");
        Metrics { registry, num_running }
    }

    /// One engine step ended.
    pub fn record_step(&self, report: &StepReport) {
        self.num_running.set(report.num_running as i64);
    }

    /// The first token of a request reached its stream, this long after arrival.
    pub fn record_first_token(&self, _since_arrival: Duration) {}

    /// A later token reached its stream, this long after the one before.
    pub fn record_inter_token(&self, _since_last: Duration) {}

    /// A request ended.
    pub fn record_request(&self, _report: &RequestReport) {}

    /// A request was refused at the door, for this reason.
    pub fn record_rejection(&self, _reason: &'static str) {}

    /// The Prometheus text exposition.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("metrics encode to memory");
        String::from_utf8(text).expect("the exposition is UTF-8")
    }
}
