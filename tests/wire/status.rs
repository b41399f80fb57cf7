//! What operators, probes, scrapers and browsers see.

use serde_json::json;

use super::support::TestServer;

#[test]
fn the_served_models() {
    let server = TestServer::saying("x");
    insta::assert_snapshot!(server.client().get("/v1/models").transcript());
    assert_eq!(server.client().get("/v1/models/org/alias").json()["id"], "org/alias");
    assert_eq!(server.client().get("/v1/models/other").status, 404);
}

#[test]
fn probes_are_answered() {
    let server = TestServer::saying("x");
    let client = server.client();
    for path in ["/health", "/ready", "/ping"] {
        let reply = client.get(path);
        assert_eq!((reply.status, reply.body.as_str()), (200, ""), "{path}");
    }
    assert_eq!(client.request("POST", "/ping", "").status, 200);
    assert_eq!(client.get("/load").json(), json!({"server_load": 0}));
    assert_eq!(client.get("/version").json(), json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[test]
fn browsers_may_call_from_anywhere() {
    let server = TestServer::saying("x");
    let client = server
        .client()
        .with_header("origin", "https://example.org")
        .with_header("access-control-request-method", "POST")
        .with_header("access-control-request-headers", "authorization,content-type");
    let reply = client.request("OPTIONS", "/v1/chat/completions", "");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
    assert!(reply.header("access-control-allow-headers").is_some());
}

/// What gateways, autoscalers and dashboards query.
const QUERIED: &[&str] = &[
    "vllm:num_requests_running{",
    "vllm:num_requests_waiting{",
    "vllm:num_requests_waiting_by_reason{",
    "vllm:kv_cache_usage_perc{",
    "vllm:gpu_cache_usage_perc{",
    "vllm:cache_config_info{",
    "vllm:prefix_cache_queries_total{",
    "vllm:prefix_cache_hits_total{",
    "vllm:gpu_prefix_cache_queries_total{",
    "vllm:gpu_prefix_cache_hits_total{",
    "vllm:num_preemptions_total{",
    "vllm:prompt_tokens_total{",
    "vllm:prompt_tokens_cached_total{",
    "vllm:generation_tokens_total{",
    "vllm:request_success_total{",
    "vllm:admission_rejections_total{",
    "vllm:iteration_tokens_total_bucket{",
    "vllm:time_to_first_token_seconds_bucket{",
    "vllm:inter_token_latency_seconds_bucket{",
    "vllm:request_time_per_output_token_seconds_bucket{",
    "vllm:e2e_request_latency_seconds_bucket{",
    "vllm:request_queue_time_seconds_bucket{",
    "vllm:request_inference_time_seconds_bucket{",
    "vllm:request_prefill_time_seconds_bucket{",
    "vllm:request_decode_time_seconds_bucket{",
    "vllm:request_prompt_tokens_bucket{",
    "vllm:request_generation_tokens_bucket{",
    "vllm:request_max_num_generation_tokens_bucket{",
    "vllm:request_params_n_bucket{",
    "vllm:request_params_max_tokens_bucket{",
    "vllm:request_num_preemptions_bucket{",
    "vllm:request_prefill_kv_computed_tokens_bucket{",
    "http_requests_total{",
    "http_request_duration_seconds_bucket{",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
];

#[test]
fn every_metric_that_others_query_is_there_and_well_formed() {
    let server = TestServer::saying("abc");
    let body = json!({"prompt": "ab", "max_tokens": 2});
    assert_eq!(server.client().post("/v1/completions", &body).status, 200);
    server.wait_for_metric("http_requests_total{handler=\"/v1/completions\"", 1.0);
    let text = server.client().get("/metrics").body;
    for name in QUERIED {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name} is missing");
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').expect("a sample");
        value.parse::<f64>().expect("a number");
        let is_ours = series.starts_with("vllm:");
        assert!(!is_ours || series.contains("model_name=\"scripted\""), "{series}");
    }
    assert_eq!(server.metric("vllm:prompt_tokens_total{"), Some(2.0));
    assert_eq!(server.metric("vllm:generation_tokens_total{"), Some(2.0));
    let by_length = "vllm:request_success_total{engine=\"0\",finished_reason=\"length\"";
    assert_eq!(server.metric(by_length), Some(1.0));
    assert_eq!(server.metric("vllm:request_params_max_tokens_sum{"), Some(2.0));
    let probes = text.lines().any(|line| line.contains("handler=\"/metrics\""));
    assert!(!probes, "scrapes are not measured");
}
