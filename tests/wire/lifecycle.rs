//! Clients that leave, servers that stop.

use std::time::Duration;

use serde_json::{Value, json};

use super::support::{Setup, TestServer, wait_until};

const CHAT: &str = "/v1/chat/completions";
const RUNNING: &str = "vllm:num_requests_running{";

fn chat(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "stream": stream, "max_tokens": 200})
}

fn gated() -> TestServer {
    Setup { says: "abc", endless: true, gated: true, ..Setup::default() }.start()
}

#[test]
fn a_client_that_leaves_a_stream_frees_its_place() {
    let server = gated();
    server.allow_steps(3);
    let mut stream = server.client().open("POST", CHAT, &chat(true).to_string());
    stream.read_until("\"content\":\"a\"");
    server.wait_for_metric(RUNNING, 1.0);
    drop(stream);
    // The engine learns of it at its next step.
    wait_until("the request has ended", || {
        server.allow_steps(1);
        server.metric(RUNNING) == Some(0.0)
    });
    assert_eq!(
        server.metric("vllm:request_success_total{engine=\"0\",finished_reason=\"abort\""),
        Some(1.0)
    );
    assert_eq!(server.metric("vllm:kv_cache_usage_perc{"), Some(0.0));
}

#[test]
fn a_client_that_leaves_before_a_whole_answer_frees_its_place() {
    let server = gated();
    let connection = server.client().send("POST", CHAT, &chat(false).to_string());
    server.allow_steps(2);
    server.wait_for_metric(RUNNING, 1.0);
    drop(connection);
    wait_until("the request has ended", || {
        server.allow_steps(1);
        server.metric(RUNNING) == Some(0.0)
    });
    assert_eq!(server.client().get("/load").json()["server_load"], 0);
}

#[test]
fn a_client_that_reads_nothing_does_not_hold_up_others() {
    let server = Setup { says: "abc", endless: true, ..Setup::default() }.start();
    let mut idle = Vec::new();
    for _ in 0..4 {
        idle.push(server.client().send("POST", CHAT, &chat(true).to_string()));
    }
    let reply = server.client().post(CHAT, &chat(false)).json();
    assert_eq!(reply["usage"]["completion_tokens"], 200);
}

#[test]
fn a_draining_server_finishes_its_streams_and_refuses_new_ones() {
    let mut server = gated();
    server.allow_steps(2);
    let mut stream = server.client().open("POST", CHAT, &chat(true).to_string());
    stream.read_until("\"content\":\"a\"");
    server.ask_to_stop();
    let client = server.client();
    wait_until("the server is not ready", || client.get("/ready").status == 503);
    assert_eq!(client.get("/health").status, 200, "it still lives");
    let refused = client.post(CHAT, &chat(false));
    insta::assert_snapshot!(refused.transcript());
    assert_eq!(refused.header("connection"), Some("close"));
    server.open_gate();
    let rest = stream.finish_chunks();
    assert!(rest.contains("\"finish_reason\":\"length\""), "{rest}");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    server.wait_until_stopped();
}

#[test]
fn a_stream_that_outlasts_the_grace_is_aborted() {
    let setup = Setup {
        says: "abc",
        endless: true,
        gated: true,
        shutdown_timeout: Duration::from_millis(50),
        ..Setup::default()
    };
    let mut server = setup.start();
    server.allow_steps(2);
    let mut stream = server.client().open("POST", CHAT, &chat(true).to_string());
    stream.read_until("\"content\":\"a\"");
    server.ask_to_stop();
    let client = server.client();
    wait_until("the server is not ready", || client.get("/ready").status == 503);
    // The engine handles the abort between two steps: let steps trickle until it has.
    wait_until("the server has stopped", || {
        server.allow_steps(1);
        std::thread::sleep(Duration::from_millis(20));
        server.has_stopped()
    });
    let rest = stream.finish_chunks();
    assert!(rest.contains("\"finish_reason\":\"abort\""), "{rest}");
    assert!(rest.contains("data: [DONE]"), "{rest}");
}

#[test]
fn an_idle_server_stops_at_once() {
    let mut server = TestServer::saying("x");
    assert_eq!(server.client().get("/health").status, 200);
    server.ask_to_stop();
    server.wait_until_stopped();
}
