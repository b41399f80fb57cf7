//! Templates render as Jinja2 on Python renders them, character by character.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokenmill::request::ChatPrompt;
use tokenmill::text::{ChatTemplate, TextError};

const CASES: &str = include_str!("templates/cases.json");
/// Written by `templates/render.py` with Jinja2 itself.
const EXPECTED: &str = include_str!("templates/expected.json");
const TEMPLATES: [(&str, &str); 5] = [
    ("chatml_tools", include_str!("templates/chatml_tools.jinja")),
    ("features", include_str!("templates/features.jinja")),
    ("headers", include_str!("templates/headers.jinja")),
    ("inst", include_str!("templates/inst.jinja")),
    ("thinking", include_str!("templates/thinking.jinja")),
];

fn parse(json: &str) -> Value {
    serde_json::from_str(json).expect("the file is JSON")
}

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens: BTreeMap<String, String> =
        tokens.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
    ChatTemplate::new(source, tokens).expect("the template parses")
}

/// A case of `cases.json`: what is neither messages nor tools are template variables.
fn prompt(case: &Value) -> ChatPrompt {
    let mut kwargs = case.as_object().expect("a case is an object").clone();
    let messages = kwargs.remove("messages").and_then(|value| value.as_array().cloned());
    let tools = kwargs.remove("tools").and_then(|value| value.as_array().cloned());
    let open = kwargs.remove("add_generation_prompt").and_then(|value| value.as_bool());
    ChatPrompt {
        messages: messages.unwrap_or_default(),
        tools,
        documents: None,
        add_generation_prompt: open.unwrap_or(false),
        continue_final_message: false,
        add_special_tokens: false,
        template_kwargs: kwargs,
    }
}

fn user(content: &Value) -> ChatPrompt {
    prompt(&json!({"messages": [{"role": "user", "content": content}]}))
}

fn source(name: &str) -> &'static str {
    TEMPLATES.iter().find(|(known, _)| *known == name).expect("the template exists").1
}

#[test]
fn every_template_renders_as_jinja2_does() {
    let (cases, expected) = (parse(CASES), parse(EXPECTED));
    let mut num_compared = 0;
    for (name, source) in TEMPLATES {
        let template = template(source);
        for (case_name, case) in cases.as_object().unwrap() {
            let expected = &expected[format!("{name}/{case_name}")];
            let rendered = match template.render(&prompt(case)) {
                Ok(text) => json!({"text": text}),
                Err(TextError::TemplateRefused { reason }) => json!({"refused": reason}),
                Err(error) => panic!("{name}/{case_name}: {error}"),
            };
            assert_eq!(&rendered, expected, "{name}/{case_name}");
            num_compared += 1;
        }
    }
    assert_eq!(num_compared, expected.as_object().unwrap().len(), "no expectation is left over");
}

#[test]
fn arguments_may_come_as_a_json_string() {
    let template = template(source("chatml_tools"));
    let with_arguments = |arguments: Value| {
        let call = json!({"type": "function", "function": {"name": "f", "arguments": arguments}});
        let message = json!({"role": "assistant", "content": null, "tool_calls": [call]});
        template.render(&prompt(&json!({"messages": [message]}))).unwrap()
    };
    let text = with_arguments(json!("{\"b\":1,\"a\":[true]}"));
    assert_eq!(text, with_arguments(json!({"b": 1, "a": [true]})));
    assert!(text.contains("\"arguments\": {\"b\": 1, \"a\": [true]}"), "{text}");
}

#[test]
fn a_list_of_texts_reaches_a_text_template_joined() {
    let template = template(source("chatml_tools"));
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    let text = template.render(&user(&parts)).unwrap();
    assert!(text.ends_with("user\none\ntwo<|im_end|>\n"), "{text}");
}

#[test]
fn a_template_that_reads_parts_gets_parts() {
    let reads_parts = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}";
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    assert_eq!(template(reads_parts).render(&user(&parts)).unwrap(), "<one><two>");
    assert_eq!(template(reads_parts).render(&user(&json!("one"))).unwrap(), "<one>");

    let reads_both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}\
        {% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}";
    assert_eq!(template(reads_both).render(&user(&parts)).unwrap(), "onetwo");
}

#[test]
fn a_continued_message_ends_where_its_content_ends() {
    let render = |source: &str, content: Value| {
        let message = json!({"role": "assistant", "content": content});
        let mut prompt = prompt(&json!({"messages": [{"role": "user", "content": "a"}, message]}));
        prompt.continue_final_message = true;
        template(source).render(&prompt)
    };
    let keeps_spaces = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}";
    let text = |content: &str| render(keeps_spaces, json!(content)).unwrap();
    assert_eq!(text("I think "), "[user]a[end][assistant]I think ");
    assert_eq!(text("a"), "[user]a[end][assistant]a");

    let trims = "{% for m in messages %}[{{ m.role }}]{{ m.content|trim }}[end]{% endfor %}";
    let trimmed = render(trims, json!("I think ")).unwrap();
    assert_eq!(trimmed, "[user]a[end][assistant]I think");

    let parts = json!([{"type": "text", "text": "I think"}]);
    assert_eq!(render(keeps_spaces, parts).unwrap(), "[user]a[end][assistant]I think");

    let drops = "{{ messages[0].content }}";
    let refused = [render(drops, json!("b")), render(keeps_spaces, Value::Null)];
    for result in refused {
        assert!(matches!(result, Err(TextError::ContinueFinalMessage { .. })), "{result:?}");
    }
}

#[test]
fn the_date_is_todays() {
    let before = chrono::Local::now().format("%d %b %Y").to_string();
    let text = template("{{ strftime_now('%d %b %Y') }}").render(&user(&json!("a"))).unwrap();
    let after = chrono::Local::now().format("%d %b %Y").to_string();
    assert!(text == before || text == after, "{text}");
    let broken = template("{{ strftime_now('%!') }}").render(&user(&json!("a"))).unwrap_err();
    assert!(broken.to_string().contains("does not know the format \"%!\""), "{broken}");
}

#[test]
fn a_failure_names_the_line() {
    let template = template("one\n{{ messages[0].content.nothing.more }}");
    let error = template.render(&user(&json!("a"))).unwrap_err();
    assert!(error.is_request_error() && error.to_string().contains("line 2"), "{error}");
}
