//! `POST /v1/completions`, `/tokenize` and `/detokenize`.

use serde_json::{Value, json};

use super::support::TestServer;

const COMPLETIONS: &str = "/v1/completions";

#[test]
fn a_whole_completion() {
    let server = TestServer::saying(" world");
    insta::assert_snapshot!(server.client().transcript(COMPLETIONS, &json!({"prompt": "Hello"})));
}

#[test]
fn a_streamed_completion_with_usage() {
    let server = TestServer::saying("ok");
    let body =
        json!({"prompt": "Hello", "stream": true, "stream_options": {"include_usage": true}});
    insta::assert_snapshot!(server.client().transcript(COMPLETIONS, &body));
}

#[test]
fn sixteen_tokens_are_generated_by_default() {
    let server = TestServer::saying("0123456789abcdefghij");
    let reply = server.client().post(COMPLETIONS, &json!({"prompt": "x"})).json();
    assert_eq!(reply["choices"][0]["text"], "0123456789abcdef");
}

#[test]
fn log_probabilities_with_the_prompt() {
    let server = TestServer::saying("cd");
    let body = json!({"prompt": "ab", "echo": true, "logprobs": 2, "max_tokens": 2});
    insta::assert_snapshot!(server.client().transcript(COMPLETIONS, &body));
}

#[test]
fn offsets_continue_over_the_events_of_a_stream() {
    let server = TestServer::saying("cd");
    let body =
        json!({"prompt": "ab", "echo": true, "logprobs": 0, "max_tokens": 2, "stream": true});
    let events = server.client().post(COMPLETIONS, &body).events();
    let offsets: Vec<Value> = events
        .iter()
        .flat_map(|event| event["choices"][0]["logprobs"]["text_offset"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(offsets, [0, 1, 2, 3]);
    assert_eq!(events[0]["choices"][0]["text"], "ab");
}

#[test]
fn a_prompt_can_be_scored_without_generating() {
    let server = TestServer::saying("cd");
    let body = json!({"prompt": "ab", "echo": true, "logprobs": 1, "max_tokens": 0});
    let reply = server.client().post(COMPLETIONS, &body).json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["text"], "ab");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(reply["usage"]["completion_tokens"], 0);
}

#[test]
fn choices_of_several_prompts_are_numbered_prompt_by_prompt() {
    let server = TestServer::saying("!");
    for stream in [false, true] {
        let body = json!({"prompt": ["a", [98, 98]], "n": 2, "echo": true, "stream": stream});
        assert_eq!(server.client().post(COMPLETIONS, &body).status, 400, "mixed kinds");
        let body = json!({"prompt": [[97], [98, 98]], "n": 2, "echo": true, "stream": stream});
        let reply = server.client().post(COMPLETIONS, &body);
        let bodies = if stream { reply.events() } else { vec![reply.json()] };
        let mut texts = vec![String::new(); 4];
        for choice in bodies.iter().flat_map(|body| body["choices"].as_array()).flatten() {
            let index = choice["index"].as_u64().expect("an index") as usize;
            texts[index].push_str(choice["text"].as_str().expect("a text"));
        }
        assert_eq!(texts, ["a!", "a!", "bb!", "bb!"]);
    }
}

#[test]
fn token_ids_of_prompt_and_output_are_returned_per_choice() {
    let server = TestServer::saying("c");
    let body = json!({"prompt": "ab", "return_token_ids": true, "logprobs": 0,
        "return_tokens_as_token_ids": true});
    let choice = &server.client().post(COMPLETIONS, &body).json()["choices"][0];
    assert_eq!(choice["prompt_token_ids"], json!([97, 98]));
    assert_eq!(choice["token_ids"], json!([99, 257]));
    assert_eq!(choice["logprobs"]["tokens"], json!(["token_id:99", "token_id:257"]));
}

#[test]
fn a_truncated_prompt_keeps_its_end() {
    let server = TestServer::saying("!");
    let body = json!({"prompt": "abcdef", "truncate_prompt_tokens": 2, "echo": true});
    let reply = server.client().post(COMPLETIONS, &body).json();
    assert_eq!(reply["choices"][0]["text"], "ef!");
    assert_eq!(reply["usage"]["prompt_tokens"], 2);
}

#[test]
fn texts_and_conversations_can_be_tokenized_and_back() {
    let server = TestServer::saying("");
    let client = server.client();
    insta::assert_snapshot!(
        client.transcript("/tokenize", &json!({"prompt": "é!", "return_token_strs": true}))
    );
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let reply = client.post("/tokenize", &chat).json();
    let body = json!({"tokens": reply["tokens"]});
    let text = &client.post("/detokenize", &body).json()["prompt"];
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}
