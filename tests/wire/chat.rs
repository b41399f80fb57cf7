//! `POST /v1/chat/completions`.

use serde_json::{Value, json};

use super::support::{Setup, TestServer};

const CHAT: &str = "/v1/chat/completions";

fn hello(extra: Value) -> Value {
    let mut body = json!({"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]});
    let Value::Object(extra) = extra else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(extra);
    body
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}])
}

#[test]
fn a_whole_answer() {
    let server = TestServer::saying("Hello!");
    insta::assert_snapshot!(server.client().transcript(CHAT, &hello(json!({}))));
}

#[test]
fn a_streamed_answer_with_usage() {
    let server = TestServer::saying("Hey");
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    insta::assert_snapshot!(server.client().transcript(CHAT, &hello(options)));
}

#[test]
fn a_stream_without_options_carries_no_usage() {
    let reply = TestServer::saying("Hey").client().post(CHAT, &hello(json!({"stream": true})));
    assert!(reply.events().iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn continuous_usage_counts_along() {
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = hello(json!({"stream": true, "stream_options": options}));
    let events = TestServer::saying("Hey").client().post(CHAT, &body).events();
    let counts: Vec<u64> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap_or(99))
        .collect();
    assert_eq!(counts, [0, 1, 2, 3, 4, 4]);
}

#[test]
fn two_continuations_interleave_and_each_has_its_role_and_end() {
    let body = hello(json!({"n": 2, "stream": true}));
    let events = TestServer::saying("Hi").client().post(CHAT, &body).events();
    for index in 0..2 {
        let choices: Vec<&Value> = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(choices[0]["delta"]["role"], "assistant");
        assert_eq!(choices.last().expect("an end")["finish_reason"], "stop");
        assert_eq!(text_of(&choices), "Hi");
    }
}

fn text_of(choices: &[&Value]) -> String {
    choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

#[test]
fn two_whole_continuations() {
    let reply = TestServer::saying("Hi").client().post(CHAT, &hello(json!({"n": 2}))).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "Hi");
    assert_eq!(reply["choices"][1]["message"]["content"], "Hi");
    assert_eq!(reply["choices"][1]["index"], 1);
    assert_eq!(reply["usage"]["completion_tokens"], 6, "both count, with their end tokens");
}

#[test]
fn log_probabilities_of_a_whole_answer() {
    let server = TestServer::saying("é");
    let options = json!({"logprobs": true, "top_logprobs": 2});
    insta::assert_snapshot!(server.client().transcript(CHAT, &hello(options)));
}

#[test]
fn log_probabilities_stream_with_their_tokens() {
    let server = TestServer::saying("ok");
    let options = json!({"logprobs": true, "stream": true, "max_tokens": 2});
    insta::assert_snapshot!(server.client().transcript(CHAT, &hello(options)));
}

#[test]
fn a_stop_string_ends_the_answer_and_is_named() {
    let server = TestServer::saying("one two three");
    let reply = server.client().post(CHAT, &hello(json!({"stop": ["two"]}))).json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], "one ");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], "two");
    let kept = json!({"stop": "two", "include_stop_str_in_output": true});
    let reply = server.client().post(CHAT, &hello(kept)).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "one two");
}

#[test]
fn a_stop_string_never_leaks_into_a_stream() {
    let server = TestServer::saying("one two three");
    let reply = server.client().post(CHAT, &hello(json!({"stop": ["two"], "stream": true})));
    let events = reply.events();
    let choices: Vec<&Value> = events.iter().map(|event| &event["choices"][0]).collect();
    assert_eq!(text_of(&choices), "one ");
    assert_eq!(choices.last().expect("an end")["stop_reason"], "two");
}

#[test]
fn a_stop_token_is_named_by_its_id() {
    let server = TestServer::saying("ab");
    let id = u32::from(b'b');
    let reply = server.client().post(CHAT, &hello(json!({"stop_token_ids": [id]}))).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "a");
    assert_eq!(reply["choices"][0]["stop_reason"], id);
}

#[test]
fn the_length_limit_is_reported() {
    let reply = TestServer::saying("abcdef").client().post(CHAT, &hello(json!({"max_tokens": 3})));
    let reply = reply.json();
    assert_eq!(reply["choices"][0]["message"]["content"], "abc");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(reply["usage"]["completion_tokens"], 3);
}

#[test]
fn characters_of_several_tokens_arrive_whole() {
    let server = TestServer::saying("a😀é漢");
    let events = server.client().post(CHAT, &hello(json!({"stream": true}))).events();
    let pieces: Vec<&str> = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(pieces, ["", "a", "😀", "é", "漢"]);
}

#[test]
fn a_repeated_prompt_is_found_in_the_cache() {
    let server = TestServer::saying("Hi");
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(40)}]});
    let cached = |reply: Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert_eq!(cached(server.client().post(CHAT, &long).json()), 0);
    assert_eq!(cached(server.client().post(CHAT, &long).json()), 48);
}

#[test]
fn token_ids_are_returned_when_asked_for() {
    let server = TestServer::saying("ok");
    let reply = server.client().post(CHAT, &hello(json!({"return_token_ids": true}))).json();
    assert_eq!(reply["choices"][0]["token_ids"], json!([b'o', b'k', 257]));
    let prompt = reply["prompt_token_ids"].as_array().expect("ids");
    assert_eq!(prompt.len() as u64, reply["usage"]["prompt_tokens"].as_u64().expect("a count"));
    assert_eq!(prompt[0], 256);
}

#[test]
fn prompt_log_probabilities_cover_every_prompt_token() {
    let server = TestServer::saying("ok");
    let reply = server.client().post(CHAT, &hello(json!({"prompt_logprobs": 1}))).json();
    let entries = reply["prompt_logprobs"].as_array().expect("entries");
    assert_eq!(entries.len() as u64, reply["usage"]["prompt_tokens"].as_u64().expect("a count"));
    assert!(entries[0].is_null());
    assert_eq!(entries[1]["117"]["decoded_token"], "u", "of <|im_start|>user");
}

#[test]
fn a_tool_call_in_a_whole_answer() {
    let server = TestServer::saying(
        "Let me see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>",
    );
    insta::assert_snapshot!(server.client().transcript(CHAT, &hello(json!({"tools": tools()}))));
}

#[test]
fn a_tool_call_in_a_stream() {
    let server =
        TestServer::saying("<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>");
    let body = hello(json!({"tools": tools(), "stream": true}));
    insta::assert_snapshot!(server.client().transcript(CHAT, &body));
}

#[test]
fn without_tools_a_call_is_text() {
    let text = "<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>";
    let server = TestServer::saying(text);
    for extra in [json!({}), json!({"tools": tools(), "tool_choice": "none"})] {
        let reply = server.client().post(CHAT, &hello(extra)).json();
        assert_eq!(reply["choices"][0]["message"]["content"], text);
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    }
}

#[test]
fn parameters_without_effect_are_listed_in_a_header() {
    let server = TestServer::saying("ok");
    for stream in [false, true] {
        let extra = json!({"store": true, "frobnicate": 1, "stream": stream});
        let reply = server.client().post(CHAT, &hello(extra));
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("x-ignored-params"), Some("store,frobnicate"));
    }
    assert_eq!(server.client().post(CHAT, &hello(json!({}))).header("x-ignored-params"), None);
}

#[test]
fn request_ids_are_taken_over_or_made_up() {
    let server = TestServer::saying("ok");
    let reply = server.client().post(CHAT, &hello(json!({})));
    assert_eq!(reply.header("x-request-id"), Some("test"));
    assert_eq!(reply.json()["id"], "chatcmpl-test");
    let anonymous = server.client().with_header("x-request-id", "");
    let reply = anonymous.post(CHAT, &hello(json!({})));
    let id = reply.header("x-request-id").expect("an id");
    assert_eq!(reply.json()["id"], format!("chatcmpl-{id}"));
}

#[test]
fn the_models_own_output_length_shrinks_to_what_fits() {
    let mut setup = Setup { says: "x", endless: true, ..Setup::default() };
    setup.defaults.max_new_tokens = Some(250);
    let server = setup.start();
    let reply = server.client().post(CHAT, &hello(json!({}))).json();
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(reply["usage"]["total_tokens"], 256, "the context is used to its end");
}

#[test]
fn an_echoed_message_is_continued() {
    let messages =
        json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]);
    let body = json!({"messages": messages, "continue_final_message": true, "echo": true});
    let reply = TestServer::saying(" upon").client().post(CHAT, &body).json();
    assert_eq!(reply["choices"][0]["message"]["content"], "Once upon");
}
