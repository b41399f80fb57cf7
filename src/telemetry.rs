//! Logs and metrics: the subscriber, and every metric name this program exports.
//!
//! Metric names, labels and buckets are vLLM's, so that its dashboards, autoscalers and
//! gateways work unchanged. The engine and the server report plain numbers; nothing here
//! knows why. The families themselves are declared in [`families`].

mod families;

use std::io::IsTerminal;
use std::time::Duration;

use prometheus::{Encoder, Registry, TextEncoder};
use tracing_subscriber::EnvFilter;

use families::{HttpFamilies, ProcessFamilies, RequestFamilies, StepFamilies};

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

/// How the KV cache was laid out at start-up; exported once as labels.
#[derive(Clone, Copy, Debug)]
pub struct CacheConfigReport {
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Prefixes are reused.
    pub enable_prefix_caching: bool,
}

/// One answered HTTP request.
#[derive(Clone, Copy, Debug)]
pub struct HttpReport<'a> {
    /// The route, not the path: `/v1/models/{model}`; `none` when no route matched.
    pub handler: &'a str,
    /// The method.
    pub method: &'a str,
    /// Status code of the answer.
    pub status: u16,
    /// First byte of the request to last byte of the answer.
    pub duration: Duration,
}

/// All metrics of one engine.
pub struct Metrics {
    registry: Registry,
    steps: StepFamilies,
    requests: RequestFamilies,
    http: HttpFamilies,
    process: ProcessFamilies,
}

impl Metrics {
    /// Metrics labelled with the model's public name; histograms of token counts reach up to
    /// `max_model_len`.
    pub fn new(model_name: &str, max_model_len: usize) -> Metrics {
        let registry = Registry::new();
        Metrics {
            steps: StepFamilies::register(&registry, model_name),
            requests: RequestFamilies::register(&registry, model_name, max_model_len),
            http: HttpFamilies::register(&registry),
            process: ProcessFamilies::register(&registry),
            registry,
        }
    }

    /// The KV cache was laid out.
    pub fn record_cache_config(&self, report: &CacheConfigReport) {
        self.steps.record_cache_config(report);
    }

    /// One engine step ended.
    pub fn record_step(&self, report: &StepReport) {
        self.steps.record(report);
    }

    /// The first token of a request reached its stream, this long after arrival.
    pub fn record_first_token(&self, since_arrival: Duration) {
        self.requests.time_to_first_token.observe(since_arrival.as_secs_f64());
    }

    /// A later token reached its stream, this long after the one before.
    pub fn record_inter_token(&self, since_last: Duration) {
        self.requests.inter_token_latency.observe(since_last.as_secs_f64());
    }

    /// A request ended.
    pub fn record_request(&self, report: &RequestReport) {
        self.requests.record(report);
    }

    /// A request was refused at the door, for this reason.
    pub fn record_rejection(&self, reason: &'static str) {
        self.requests.admission_rejections.with_label_values(&[reason]).inc();
    }

    /// An HTTP request was answered to its last byte.
    pub fn record_http(&self, report: HttpReport<'_>) {
        self.http.record(report);
    }

    /// The Prometheus text exposition.
    pub fn render(&self) -> String {
        self.process.refresh();
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("metrics encode to memory");
        String::from_utf8(text).expect("the exposition is UTF-8")
    }
}

/// Installs the log subscriber: levels from `RUST_LOG` (default `info`), to standard error,
/// as text or as JSON lines. A second call changes nothing.
pub fn init_logging(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // The only error is that a subscriber is already installed, which is what is wanted.
    let _ = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_target(false).try_init()
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample<'a>(text: &'a str, name: &str) -> &'a str {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit(' ').next()).unwrap_or("absent")
    }

    #[test]
    fn a_step_moves_gauges_and_counters() {
        let metrics = Metrics::new("m", 4096);
        let step = StepReport {
            num_running: 3,
            num_waiting: 2,
            kv_cache_usage: 0.5,
            num_tokens: 40,
            num_prompt_tokens: 30,
            num_generated_tokens: 10,
            num_preempted: 1,
            prefix_cache_queries: 64,
            prefix_cache_hits: 32,
        };
        metrics.record_step(&step);
        metrics.record_step(&step);
        let text = metrics.render();
        assert_eq!(sample(&text, "vllm:num_requests_running{"), "3");
        assert_eq!(sample(&text, "vllm:num_requests_waiting{"), "2");
        assert_eq!(sample(&text, "vllm:kv_cache_usage_perc{"), "0.5");
        assert_eq!(sample(&text, "vllm:gpu_cache_usage_perc{"), "0.5");
        assert_eq!(sample(&text, "vllm:prompt_tokens_total{"), "124");
        assert_eq!(sample(&text, "vllm:prompt_tokens_cached_total{"), "64");
        assert_eq!(sample(&text, "vllm:generation_tokens_total{"), "20");
        assert_eq!(sample(&text, "vllm:num_preemptions_total{"), "2");
        assert_eq!(sample(&text, "vllm:gpu_prefix_cache_hits_total{"), "64");
        assert_eq!(sample(&text, "vllm:iteration_tokens_total_count{"), "2");
    }

    #[test]
    fn a_request_is_counted_by_reason_and_timed() {
        let metrics = Metrics::new("m", 4096);
        let seconds = |s| Some(Duration::from_secs(s));
        metrics.record_request(&RequestReport {
            finished_reason: "length",
            num_prompt_tokens: 12,
            num_cached_tokens: 4,
            num_generated_tokens: 5,
            n: 1,
            max_tokens: Some(5),
            e2e: Duration::from_secs(7),
            queued: seconds(1),
            prefill: seconds(2),
            decode: seconds(4),
            num_preemptions: 0,
        });
        let text = metrics.render();
        let success = "vllm:request_success_total{engine=\"0\",finished_reason=\"length\"";
        assert_eq!(sample(&text, success), "1");
        assert_eq!(sample(&text, "vllm:request_inference_time_seconds_sum"), "6");
        assert_eq!(sample(&text, "vllm:request_time_per_output_token_seconds_sum"), "1");
        assert_eq!(sample(&text, "vllm:request_prefill_kv_computed_tokens_sum"), "8");
    }

    #[test]
    fn token_histograms_end_at_the_context_length() {
        let text = Metrics::new("m", 300).render();
        assert!(text.contains(
            "vllm:request_prompt_tokens_bucket{engine=\"0\",model_name=\"m\",le=\"200\"}"
        ));
        assert!(!text.contains(
            "vllm:request_prompt_tokens_bucket{engine=\"0\",model_name=\"m\",le=\"500\"}"
        ));
    }

    #[test]
    fn known_reasons_are_exported_before_they_happen() {
        let text = Metrics::new("m", 300).render();
        for reason in ["stop", "length", "abort", "error"] {
            assert!(text.contains(&format!("finished_reason=\"{reason}\"")), "{reason}");
        }
    }

    #[test]
    fn http_answers_are_grouped_by_status_class() {
        let metrics = Metrics::new("m", 300);
        let duration = Duration::from_millis(3);
        metrics.record_http(HttpReport {
            handler: "/v1/models",
            method: "GET",
            status: 404,
            duration,
        });
        let text = metrics.render();
        let name = "http_requests_total{handler=\"/v1/models\",method=\"GET\",status=\"4xx\"}";
        assert_eq!(sample(&text, name), "1");
    }
}
