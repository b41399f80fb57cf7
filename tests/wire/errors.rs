//! Every way to be refused, with its status and the parameter at fault.

use serde_json::{Value, json};

use super::support::{
    BreakingDevice, MAX_MODEL_LEN, Setup, TestServer, has_answer, read_answer, wait_until,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let Value::Object(extra) = extra else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(extra);
    body
}

#[test]
fn a_value_out_of_range() {
    let server = TestServer::saying("x");
    insta::assert_snapshot!(server.client().transcript(CHAT, &chat(json!({"top_p": 1.5}))));
}

#[test]
fn a_value_of_the_wrong_type() {
    let server = TestServer::saying("x");
    let body = chat(json!({"stream_options": {"include_usage": "yes"}, "stream": true}));
    insta::assert_snapshot!(server.client().transcript(CHAT, &body));
}

#[test]
fn a_body_that_is_not_json() {
    let reply = TestServer::saying("x").client().request("POST", CHAT, "{\"messages\": [");
    insta::assert_snapshot!(reply.transcript());
}

#[test]
fn another_content_type() {
    let server = TestServer::saying("x");
    for content_type in ["text/plain", ""] {
        let client = server.client().with_header("content-type", content_type);
        let reply = client.post(CHAT, &chat(json!({})));
        assert_eq!(reply.status, 400);
        assert!(reply.body.contains("Content-Type"), "{}", reply.body);
    }
}

#[test]
fn an_unknown_model() {
    let server = TestServer::saying("x");
    insta::assert_snapshot!(server.client().transcript(CHAT, &chat(json!({"model": "gpt-9"}))));
}

#[test]
fn what_would_change_the_answer_is_refused_not_ignored() {
    let server = TestServer::saying("x");
    for (name, value) in [
        ("response_format", json!({"type": "json_object"})),
        ("tool_choice", json!("required")),
        ("guided_json", json!({})),
        ("structured_outputs", json!({"regex": "a"})),
        ("use_beam_search", json!(true)),
        ("chat_template", json!("{{ messages }}")),
        ("priority", json!(3)),
    ] {
        let reply = server.client().post(CHAT, &chat(json!({name: value})));
        assert_eq!((reply.status, reply.error_param().as_deref()), (400, Some(name)));
    }
}

#[test]
fn a_prompt_without_tokens() {
    let server = TestServer::saying("x");
    let reply = server.client().post(COMPLETIONS, &json!({"prompt": ""}));
    assert_eq!((reply.status, reply.error_param().as_deref()), (400, Some("prompt")));
}

#[test]
fn a_prompt_that_is_too_long() {
    let server = TestServer::saying("x");
    let prompt = "x".repeat(MAX_MODEL_LEN);
    let reply = server.client().post(COMPLETIONS, &json!({"prompt": prompt}));
    insta::assert_snapshot!(reply.transcript());
    let reply =
        server.client().post(CHAT, &json!({"messages": [{"role": "user", "content": prompt}]}));
    assert_eq!(reply.error_param().as_deref(), Some("messages"));
}

#[test]
fn an_output_that_does_not_fit() {
    let server = TestServer::saying("x");
    let reply = server.client().post(COMPLETIONS, &json!({"prompt": "abc", "max_tokens": 254}));
    insta::assert_snapshot!(reply.transcript());
}

#[test]
fn no_key_or_a_wrong_one() {
    let server = Setup { api_keys: &["secret"], ..Setup::default() }.start();
    let body = chat(json!({}));
    insta::assert_snapshot!(server.client().transcript(CHAT, &body));
    let with = |value: &str| server.client().with_header("authorization", value);
    assert_eq!(with("Bearer wrong").post(CHAT, &body).status, 401);
    assert_eq!(with("Bearer secret").post(CHAT, &body).status, 200);
    assert_eq!(with("").get("/v1/models").status, 401);
    assert_eq!(with("").post("/tokenize", &json!({"prompt": "x"})).status, 401);
    for open in ["/health", "/ready", "/metrics", "/version", "/ping", "/load"] {
        assert_eq!(with("").get(open).status, 200, "{open}");
    }
}

#[test]
fn a_route_that_does_not_exist() {
    let reply = TestServer::saying("x").client().get("/v1/nothing");
    insta::assert_snapshot!(reply.transcript());
}

#[test]
fn a_method_that_a_route_does_not_take() {
    let reply = TestServer::saying("x").client().get(CHAT);
    insta::assert_snapshot!(reply.transcript());
}

#[test]
fn a_body_that_is_too_large() {
    let server = Setup { max_body_bytes: 100, ..Setup::default() }.start();
    let body = json!({"prompt": "x".repeat(200)});
    let reply = server.client().post(COMPLETIONS, &body);
    insta::assert_snapshot!(reply.transcript());
    assert_eq!(server.client().post(COMPLETIONS, &json!({"prompt": "x"})).status, 200);
}

#[test]
fn a_full_queue_asks_to_come_back() {
    let setup = Setup { gated: true, max_num_queued_requests: 1, ..Setup::default() };
    let mut server = setup.start();
    let send = || server.client().send("POST", CHAT, &chat(json!({})).to_string());
    let running = send();
    server.allow_steps(1);
    server.wait_for_metric("vllm:num_requests_running{", 1.0);
    // The model holds its next step back, so one of these waits and the other is refused.
    let mut others = vec![send(), send()];
    wait_until("one is refused", || others.iter().any(has_answer));
    others.retain(has_answer);
    let refused = others.pop().map(read_answer).expect("an answer");
    insta::assert_snapshot!(refused.transcript());
    assert_eq!(server.metric("vllm:admission_rejections_total{engine=\"0\",model_name=\"scripted\",reason=\"queue_full\""), Some(1.0));
    server.open_gate();
    assert_eq!(read_answer(running).status, 200);
}

#[test]
fn an_engine_that_fails_is_reported_and_unhealthy() {
    let server = Setup { fails_at: Some(0), ..Setup::default() }.start();
    let reply = server.client().post(CHAT, &chat(json!({})));
    insta::assert_snapshot!(reply.transcript());
    assert_eq!(server.client().post(CHAT, &chat(json!({}))).status, 503);
    assert_eq!(server.client().get("/health").status, 503);
    assert_eq!(server.client().get("/ready").status, 503);
}

#[test]
fn an_engine_that_fails_during_a_stream_ends_it_with_an_error_event() {
    let server = Setup { fails_at: Some(2), says: "abcdef", ..Setup::default() }.start();
    let reply = server.client().post(CHAT, &chat(json!({"stream": true})));
    assert_eq!(reply.status, 200);
    let events = reply.events();
    let error = events.last().expect("an event");
    assert_eq!(error["error"]["code"], 500);
    assert_eq!(error["error"]["type"], "InternalServerError");
    assert!(!reply.body.contains("the script says so"), "the reason is for the log");
}

#[test]
fn a_gpu_that_breaks_ends_its_requests_and_is_unhealthy() {
    // After the prompt and a few tokens.
    let runner = BreakingDevice::after(100).runner();
    let server = Setup::default().start_with(Box::new(runner));
    let body = chat(json!({"stream": true, "max_tokens": 100, "ignore_eos": true}));
    let reply = server.client().post(CHAT, &body);
    let events = reply.events();
    assert!(events.len() > 2, "tokens came before: {events:?}");
    let error = &events.last().expect("an event")["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!(500), &json!("InternalServerError")));
    let health = server.client().get("/health");
    assert_eq!(health.status, 503);
    for part in ["0 Breaking GPU failed", "kernel ", "(grid [", "an illegal memory access"] {
        assert!(health.body.contains(part), "{part:?} is not in {}", health.body);
    }
    assert_eq!(server.client().post(CHAT, &chat(json!({}))).status, 503);
}

#[test]
fn whatever_arrives_the_server_goes_on() {
    let server = TestServer::saying("ok");
    let deep = format!("{{\"messages\": {}", "[".repeat(20_000));
    for body in ["", "null", "[]", "{}", "\u{0}", "{\"messages\": 1e999}", &deep] {
        let reply = server.client().request("POST", CHAT, body);
        assert_eq!(reply.status, 400, "{body:.20}");
    }
    assert_eq!(server.client().post(CHAT, &chat(json!({}))).status, 200);
}
