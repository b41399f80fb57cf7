//! Metric families: names, help texts, labels and buckets, declared once.
//!
//! Family names carry `_total` where vLLM's Python client adds it. The `gpu_` names are
//! aliases that older dashboards still query.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

use super::{CacheConfigReport, HttpReport, RequestReport, StepReport};

/// Seconds to the first token.
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between tokens.
const TOKEN_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Seconds of a whole request or one of its phases.
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Tokens of one step.
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Continuations of one request.
const CONTINUATIONS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// Preemptions of one request.
const PREEMPTIONS: &[f64] = &[0.0, 1.0, 2.0, 5.0, 10.0, 20.0];
/// Seconds of one HTTP exchange.
const HTTP_SECONDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// 1, 2, 5, 10, 20, 50, … up to and including `max`.
fn one_two_five(max: usize) -> Vec<f64> {
    let mut buckets = Vec::new();
    let mut decade = 1usize;
    loop {
        for step in [1, 2, 5] {
            let bound = decade * step;
            if bound > max {
                if buckets.is_empty() {
                    buckets.push(1.0);
                }
                return buckets;
            }
            buckets.push(bound as f64);
        }
        decade *= 10;
    }
}

/// Creates families with the same constant labels and puts them into a registry.
struct Declare<'a> {
    registry: &'a Registry,
    labels: HashMap<String, String>,
}

impl<'a> Declare<'a> {
    fn plain(registry: &'a Registry) -> Declare<'a> {
        Declare { registry, labels: HashMap::new() }
    }

    fn for_model(registry: &'a Registry, model_name: &str) -> Declare<'a> {
        let labels = [("model_name", model_name), ("engine", "0")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        Declare { registry, labels }
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_labels(self.labels.clone())
    }

    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("names and labels in this file are valid");
        self.registry
            .register(Box::new(collector.clone()))
            .expect("every name in this file is declared once");
        collector
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::with_opts(self.opts(name, help)))
    }

    fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(self.opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(self.opts(name, help), labels))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(self.opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(opts))
    }
}

/// What changes with every engine step.
pub(super) struct StepFamilies {
    running: IntGauge,
    waiting: IntGauge,
    waiting_for_capacity: IntGauge,
    kv_usage: [Gauge; 2],
    prefix_queries: [IntCounter; 2],
    prefix_hits: [IntCounter; 2],
    prompt_tokens: IntCounter,
    prompt_tokens_cached: IntCounter,
    generation_tokens: IntCounter,
    preemptions: IntCounter,
    step_tokens: Histogram,
    cache_config: IntGaugeVec,
}

impl StepFamilies {
    pub(super) fn register(registry: &Registry, model_name: &str) -> StepFamilies {
        let d = Declare::for_model(registry, model_name);
        let by_reason = d.gauges(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting, by what they wait for.",
            &["reason"],
        );
        by_reason.with_label_values(&["deferred"]).set(0);
        let queries = "Prompt tokens looked up in the prefix cache.";
        let hits = "Prompt tokens found in the prefix cache.";
        let usage = "Fraction of KV blocks in use, 1 means all.";
        StepFamilies {
            running: d.int_gauge("vllm:num_requests_running", "Sequences running."),
            waiting: d.int_gauge("vllm:num_requests_waiting", "Requests waiting."),
            waiting_for_capacity: by_reason.with_label_values(&["capacity"]),
            kv_usage: ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"]
                .map(|name| d.gauge(name, usage)),
            prefix_queries: [
                "vllm:prefix_cache_queries_total",
                "vllm:gpu_prefix_cache_queries_total",
            ]
            .map(|name| d.counter(name, queries)),
            prefix_hits: ["vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"]
                .map(|name| d.counter(name, hits)),
            prompt_tokens: d
                .counter("vllm:prompt_tokens_total", "Prompt tokens computed or found cached."),
            prompt_tokens_cached: d
                .counter("vllm:prompt_tokens_cached_total", "Prompt tokens found cached."),
            generation_tokens: d.counter("vllm:generation_tokens_total", "Tokens generated."),
            preemptions: d.counter("vllm:num_preemptions_total", "Sequences preempted."),
            step_tokens: d.histogram(
                "vllm:iteration_tokens_total",
                "Tokens computed per engine step.",
                STEP_TOKENS,
            ),
            cache_config: d.gauges(
                "vllm:cache_config_info",
                "How the KV cache is laid out.",
                &["block_size", "num_gpu_blocks", "enable_prefix_caching"],
            ),
        }
    }

    pub(super) fn record(&self, report: &StepReport) {
        self.running.set(report.num_running as i64);
        self.waiting.set(report.num_waiting as i64);
        self.waiting_for_capacity.set(report.num_waiting as i64);
        self.kv_usage.iter().for_each(|gauge| gauge.set(report.kv_cache_usage));
        let (queries, hits) = (report.prefix_cache_queries as u64, report.prefix_cache_hits as u64);
        self.prefix_queries.iter().for_each(|counter| counter.inc_by(queries));
        self.prefix_hits.iter().for_each(|counter| counter.inc_by(hits));
        self.prompt_tokens.inc_by(report.num_prompt_tokens as u64 + hits);
        self.prompt_tokens_cached.inc_by(hits);
        self.generation_tokens.inc_by(report.num_generated_tokens as u64);
        self.preemptions.inc_by(report.num_preempted as u64);
        if report.num_tokens > 0 {
            self.step_tokens.observe(report.num_tokens as f64);
        }
    }

    pub(super) fn record_cache_config(&self, report: &CacheConfigReport) {
        let block_size = report.block_size.to_string();
        let num_blocks = report.num_blocks.to_string();
        self.cache_config.reset();
        let caching = if report.enable_prefix_caching { "True" } else { "False" };
        let labels = [block_size.as_str(), num_blocks.as_str(), caching];
        self.cache_config.with_label_values(&labels).set(1);
    }
}

/// What is known when a request's tokens come out and when it ends.
pub(super) struct RequestFamilies {
    pub(super) time_to_first_token: Histogram,
    pub(super) inter_token_latency: Histogram,
    pub(super) admission_rejections: IntCounterVec,
    success: IntCounterVec,
    time_per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    max_generation_tokens: Histogram,
    prefill_computed_tokens: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
    preemptions: Histogram,
}

impl RequestFamilies {
    pub(super) fn register(
        registry: &Registry,
        model_name: &str,
        max_model_len: usize,
    ) -> RequestFamilies {
        let d = Declare::for_model(registry, model_name);
        let token_counts = one_two_five(max_model_len);
        let seconds = |name: &str, help: &str| d.histogram(name, help, REQUEST_SECONDS);
        let tokens = |name: &str, help: &str| d.histogram(name, help, &token_counts);
        RequestFamilies {
            time_to_first_token: d.histogram(
                "vllm:time_to_first_token_seconds",
                "Arrival to first token.",
                FIRST_TOKEN_SECONDS,
            ),
            inter_token_latency: d.histogram(
                "vllm:inter_token_latency_seconds",
                "Time between tokens of a stream.",
                TOKEN_SECONDS,
            ),
            admission_rejections: rejections(&d),
            success: successes(&d),
            time_per_output_token: d.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first, per request.",
                TOKEN_SECONDS,
            ),
            e2e: seconds("vllm:e2e_request_latency_seconds", "Arrival to end."),
            queue: seconds("vllm:request_queue_time_seconds", "Arrival to first step."),
            inference: seconds("vllm:request_inference_time_seconds", "First step to end."),
            prefill: seconds("vllm:request_prefill_time_seconds", "First step to first token."),
            decode: seconds("vllm:request_decode_time_seconds", "First token to end."),
            prompt_tokens: tokens("vllm:request_prompt_tokens", "Prompt length."),
            generation_tokens: tokens("vllm:request_generation_tokens", "Tokens generated."),
            max_generation_tokens: tokens(
                "vllm:request_max_num_generation_tokens",
                "Tokens generated per continuation.",
            ),
            prefill_computed_tokens: tokens(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens computed because they were not cached.",
            ),
            params_n: d.histogram("vllm:request_params_n", "Parameter n.", CONTINUATIONS),
            params_max_tokens: tokens("vllm:request_params_max_tokens", "Parameter max_tokens."),
            preemptions: d.histogram(
                "vllm:request_num_preemptions",
                "Times a request was preempted.",
                PREEMPTIONS,
            ),
        }
    }

    pub(super) fn record(&self, report: &RequestReport) {
        self.success.with_label_values(&[report.finished_reason]).inc();
        self.record_times(report);
        let per_continuation = report.num_generated_tokens as f64 / f64::from(report.n.max(1));
        let computed = report.num_prompt_tokens.saturating_sub(report.num_cached_tokens);
        self.prompt_tokens.observe(report.num_prompt_tokens as f64);
        self.generation_tokens.observe(report.num_generated_tokens as f64);
        self.max_generation_tokens.observe(per_continuation);
        self.prefill_computed_tokens.observe(computed as f64);
        self.params_n.observe(f64::from(report.n));
        if let Some(max_tokens) = report.max_tokens {
            self.params_max_tokens.observe(f64::from(max_tokens));
        }
        self.preemptions.observe(f64::from(report.num_preemptions));
    }

    fn record_times(&self, report: &RequestReport) {
        self.e2e.observe(report.e2e.as_secs_f64());
        if let Some(queued) = report.queued {
            self.queue.observe(queued.as_secs_f64());
        }
        let Some(prefill) = report.prefill else { return };
        self.prefill.observe(prefill.as_secs_f64());
        let decode = report.decode.unwrap_or_default();
        self.decode.observe(decode.as_secs_f64());
        self.inference.observe((prefill + decode).as_secs_f64());
        let later_tokens = report.num_generated_tokens as f64 / f64::from(report.n.max(1)) - 1.0;
        if later_tokens > 0.0 {
            self.time_per_output_token.observe(decode.as_secs_f64() / later_tokens);
        }
    }
}

fn successes(d: &Declare<'_>) -> IntCounterVec {
    let family =
        d.counters("vllm:request_success_total", "Requests that ended.", &["finished_reason"]);
    for reason in ["stop", "length", "abort", "error", "repetition"] {
        family.with_label_values(&[reason]);
    }
    family
}

fn rejections(d: &Declare<'_>) -> IntCounterVec {
    let family =
        d.counters("vllm:admission_rejections_total", "Requests refused at the door.", &["reason"]);
    for reason in ["queue_full", "draining"] {
        family.with_label_values(&[reason]);
    }
    family
}

/// HTTP exchanges, named like prometheus-fastapi-instrumentator does.
pub(super) struct HttpFamilies {
    requests: IntCounterVec,
    duration: HistogramVec,
}

impl HttpFamilies {
    pub(super) fn register(registry: &Registry) -> HttpFamilies {
        let d = Declare::plain(registry);
        let opts = HistogramOpts::new("http_request_duration_seconds", "Length of HTTP exchanges.")
            .buckets(HTTP_SECONDS.to_vec());
        HttpFamilies {
            requests: d.counters(
                "http_requests_total",
                "HTTP requests answered.",
                &["handler", "method", "status"],
            ),
            duration: d.add(HistogramVec::new(opts, &["handler", "method"])),
        }
    }

    pub(super) fn record(&self, report: HttpReport<'_>) {
        let status = format!("{}xx", report.status / 100);
        self.requests.with_label_values(&[report.handler, report.method, status.as_str()]).inc();
        self.duration
            .with_label_values(&[report.handler, report.method])
            .observe(report.duration.as_secs_f64());
    }
}

/// The process and its build.
pub(super) struct ProcessFamilies {
    resident_memory: IntGauge,
}

impl ProcessFamilies {
    pub(super) fn register(registry: &Registry) -> ProcessFamilies {
        let d = Declare::plain(registry);
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        d.gauge("process_start_time_seconds", "Start of the process, Unix time.")
            .set(started.as_secs_f64());
        d.gauges("tokenmill_build_info", "Which build this is.", &["version"])
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        ProcessFamilies {
            resident_memory: d
                .int_gauge("process_resident_memory_bytes", "Resident memory of the process."),
        }
    }

    /// Reads what the kernel knows about this process.
    pub(super) fn refresh(&self) {
        if let Some(bytes) = resident_bytes() {
            self.resident_memory.set(bytes);
        }
    }
}

/// Resident set size, from `/proc`; `None` where that does not exist.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_buckets_follow_one_two_five() {
        assert_eq!(one_two_five(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(one_two_five(100).last(), Some(&100.0));
        assert_eq!(one_two_five(0), [1.0]);
    }

    #[test]
    fn resident_memory_is_known_on_linux() {
        assert!(resident_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
