//! Faults of kernels, which the driver reports later than they happen.

use std::time::Instant;

use serde_json::Value;

use crate::PATIENCE;
use crate::stub::{Server, Setup, greedy};

const ILLEGAL: &str = "an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS)";

/// A server whose kernel of this name reads an illegal address at its nth run.
fn breaking(flags: &str, fault: &str) -> Setup {
    Setup::new(&format!("--device cuda {flags}")).with("STUB_CUDA_FAULT", &fault)
}

/// Asks until a step breaks: all requests get the same reason, and the server says that it must
/// be restarted.
fn broken(server: &Server) -> String {
    let questions = ["Hello", "Who are you?"].map(|question| greedy(question, 40));
    let replies = server.answers(&questions);
    let reason = |reply: &crate::client::Reply| {
        assert_eq!(reply.status, 500, "{}\n{}", reply.body, server.log());
        let body: Value = reply.json();
        body["error"]["message"].as_str().unwrap().to_owned()
    };
    let reasons: Vec<String> = replies.iter().map(reason).collect();
    assert_eq!(server.client.get("/health").status, 503);
    assert!(server.log().contains(ILLEGAL), "{}", server.log());
    let log = server.log();
    let line = log.lines().find(|line| line.contains("the engine has stopped")).unwrap();
    assert!(!reasons[0].is_empty());
    line.to_owned()
}

#[test]
fn a_fault_in_a_replayed_step_is_blamed_on_all_of_its_kernels_and_not_on_the_sampler() {
    // Steps at start run it for every shape that is recorded; prompts come after that.
    let server = breaking("", "attention_decode_kvbf16_d64:30").start();
    let reason = broken(&server);
    let trace = server.trace();
    let last = trace.iter().position(|line| line == "fault attention_decode_kvbf16_d64").unwrap();
    let [replay, sampler] = [&trace[last - 2], &trace[last - 1]];
    assert!(replay.starts_with("replay ") && sampler == "launch sample_f32", "{replay}, {sampler}");
    assert!(reason.contains("at fault is one of what was launched"), "{reason}");
    assert!(reason.contains("attention_decode_kvbf16_d64 (4 times)"), "{reason}");
    assert!(!reason.contains("kernel sample_f32 ("), "{reason}");
}

#[test]
fn a_fault_of_launched_kernels_names_those_that_may_have_been_at_fault() {
    let server = breaking("--enforce-eager", "rope_kv_halves_bf16_kvbf16:9").start();
    let reason = broken(&server);
    assert!(reason.contains("rope_kv_halves_bf16_kvbf16 (4 times)"), "{reason}");
}

#[test]
fn a_launch_that_waits_for_its_kernel_names_it_alone() {
    let setup = breaking("--enforce-eager", "rope_kv_halves_bf16_kvbf16:9");
    let reason = broken(&setup.with("CUDA_LAUNCH_BLOCKING", &1).start());
    assert!(reason.contains("kernel rope_kv_halves_bf16_kvbf16 (grid ["), "{reason}");
    assert!(!reason.contains("at fault is one of"), "{reason}");
}

#[test]
fn a_kernel_that_never_ends_turns_health_to_503() {
    let setup = Setup::new("--device cuda --step-timeout 5");
    let server = setup.with("STUB_CUDA_HANG", &"attention_decode_kvbf16_d64:30").start();
    assert_eq!(server.client.get("/health").status, 200);
    let body = greedy("Hello", 40).to_string();
    let _unanswered = server.client.send("POST", "/v1/chat/completions", &body);
    let started = Instant::now();
    let health = loop {
        let health = server.client.get("/health");
        if health.status != 200 {
            break health;
        }
        assert!(started.elapsed() < PATIENCE, "the server thinks that it is healthy");
        std::thread::yield_now();
    };
    assert_eq!(health.status, 503);
    assert!(health.body.contains("longer than --step-timeout 5"), "{}", health.body);
    assert!(server.log().contains("the engine does not get on"), "{}", server.log());
}

#[test]
fn a_fault_before_anything_is_served_is_one_clear_error() {
    let error = breaking("", "matmul_skinny_bf16:5").failure();
    assert!(error.contains(ILLEGAL) && error.contains("matmul_skinny_bf16 ("), "{error}");
}

#[test]
fn a_driver_that_finds_no_gpu_is_one_clear_error() {
    let error = Setup::new("--device cuda").with("STUB_CUDA_DEVICES", &0).failure();
    assert_eq!(error, "error: --device cuda:0 cannot be used: the NVIDIA driver finds no GPU");
}

#[test]
fn an_old_driver_is_one_clear_error() {
    let error = Setup::new("--device cuda").with("STUB_CUDA_VERSION", &12_040).failure();
    assert!(error.contains("supports CUDA 12.4, but the kernels need 13.0"), "{error}");
}
