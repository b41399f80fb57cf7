//! Model files and prompts to token ids.

use serde_json::json;
use tokenmill::request::{ChatPrompt, Prompt};
use tokenmill::text::{TextError, TextPipeline};

use crate::tokenizers_for_tests::{BUNDLED, BUNDLED_CONFIG, sentencepiece_json};

fn chat(text: &str) -> ChatPrompt {
    ChatPrompt {
        messages: vec![json!({"role": "user", "content": text})],
        tools: None,
        documents: None,
        add_generation_prompt: true,
        continue_final_message: false,
        add_special_tokens: false,
        template_kwargs: serde_json::Map::new(),
    }
}

#[test]
fn the_bundled_model_reads_a_conversation() {
    let bundled =
        TextPipeline::from_files(BUNDLED.as_bytes(), Some(BUNDLED_CONFIG), None, None).unwrap();
    let ids = bundled.prompt_token_ids(&Prompt::Chat(chat("Hello!"))).unwrap();
    let tokenizer = bundled.tokenizer();
    let expected = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(tokenizer.decode(&ids, false), expected);
    assert_eq!(tokenizer.decode(&ids, true), "user\nHello!\nassistant\n");
    assert_eq!(tokenizer.token(ids[0]).as_deref(), Some("<|im_start|>"));
    assert_eq!(bundled.special_token_id("eos_token"), tokenizer.token_id("<|im_end|>"));
    assert_eq!(bundled.special_token_id("bos_token"), None);
}

#[test]
fn special_tokens_are_added_only_when_asked_for() {
    let json = sentencepiece_json().to_string();
    let pipeline = TextPipeline::from_files(json.as_bytes(), None, None, None).unwrap();
    let ids = |add_special_tokens| {
        let text = "the the the the".to_owned();
        pipeline.prompt_token_ids(&Prompt::Text { text, add_special_tokens }).unwrap()
    };
    assert_eq!(ids(true)[0], 1);
    assert_eq!(ids(true)[1..], ids(false));
    assert!(ids(false).len() > 4, "the file's truncation to 4 tokens must not cut a prompt");
}

#[test]
fn token_ids_are_taken_as_they_are() {
    let pipeline = TextPipeline::from_files(BUNDLED.as_bytes(), None, None, None).unwrap();
    assert_eq!(pipeline.prompt_token_ids(&Prompt::Tokens(vec![5, 6])).unwrap(), [5, 6]);
}

#[test]
fn a_model_without_a_template_refuses_a_conversation_and_says_what_to_do() {
    let pipeline = TextPipeline::from_files(BUNDLED.as_bytes(), Some("{}"), None, None).unwrap();
    let error = pipeline.prompt_token_ids(&Prompt::Chat(chat("Hi"))).unwrap_err();
    assert!(matches!(error, TextError::NoChatTemplate) && error.is_request_error());
    assert!(error.to_string().contains("--chat-template"), "{error}");
}

#[test]
fn the_given_template_comes_before_the_jinja_file_and_that_before_the_configuration() {
    let config = r#"{"chat_template": "from config"}"#;
    let render = |jinja, given| {
        let pipeline = TextPipeline::from_files(BUNDLED.as_bytes(), Some(config), jinja, given);
        pipeline.unwrap().render(&chat("Hi")).unwrap()
    };
    assert_eq!(render(None, None), "from config");
    assert_eq!(render(Some("from jinja"), None), "from jinja");
    assert_eq!(render(Some("from jinja"), Some("given")), "given");
}

#[test]
fn the_tool_template_is_used_when_there_are_tools() {
    let config = r#"{"chat_template": [{"name": "default", "template": "plain"},
                                       {"name": "tool_use", "template": "{{ tools|length }} tools"}]}"#;
    let pipeline = TextPipeline::from_files(BUNDLED.as_bytes(), Some(config), None, None).unwrap();
    assert_eq!(pipeline.render(&chat("Hi")).unwrap(), "plain");
    let with_tools = ChatPrompt { tools: Some(vec![json!({"type": "function"})]), ..chat("Hi") };
    assert_eq!(pipeline.render(&with_tools).unwrap(), "1 tools");
}

#[test]
fn unusable_files_are_named() {
    let open = |json: &[u8], config| TextPipeline::from_files(json, config, None, None).err();
    let message = |error: Option<TextError>| error.unwrap().to_string();
    assert!(message(open(b"{}", None)).starts_with("tokenizer.json is not usable"));
    let config = Some(r#"{"chat_template": "{% if %}"}"#);
    let error = message(open(BUNDLED.as_bytes(), config));
    assert!(error.contains("\"default\" does not parse") && error.contains("line 1"), "{error}");
}
