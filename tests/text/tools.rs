//! Tool calls are found wherever the text is cut, and nothing the model wrote is lost.

use proptest::prelude::*;
use tokenmill::text::{ToolCall, ToolCallParser, ToolEvent};

/// Events of a text given in pieces, with neighbouring deltas joined.
fn events<'a>(pieces: impl IntoIterator<Item = &'a str>) -> Vec<ToolEvent> {
    let mut parser = ToolCallParser::new();
    let mut all: Vec<ToolEvent> = Vec::new();
    for event in pieces.into_iter().flat_map(|p| parser.push(p)).collect::<Vec<_>>() {
        join(&mut all, event);
    }
    for event in parser.finish() {
        join(&mut all, event);
    }
    all
}

fn join(all: &mut Vec<ToolEvent>, event: ToolEvent) {
    match (all.last_mut(), event) {
        (Some(ToolEvent::Text(last)), ToolEvent::Text(text)) => last.push_str(&text),
        (
            Some(ToolEvent::ArgumentsDelta { text: last, .. }),
            ToolEvent::ArgumentsDelta { text, .. },
        ) => last.push_str(&text),
        (_, event) => all.push(event),
    }
}

fn call(name: &str, arguments: &str) -> ToolCall {
    ToolCall { name: name.to_owned(), arguments: arguments.to_owned() }
}

const CASES: [&str; 14] = [
    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Zürich\", \"days\": [1, 2]}}\n</tool_call>",
    "Let me see.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"b\", \"arguments\": {\"x\": {\"y\": \"}\\\"{\"}}}\n</tool_call>\n",
    "<tool_call>{\"arguments\": {\"x\": 1.0}, \"name\": \"late\"}</tool_call>",
    "<tool_call>{\"name\": \"bare\"}</tool_call>",
    "<tool_call>{\"name\": \"quoted\", \"arguments\": \"{\\\"x\\\": 1}\"}</tool_call>",
    "a < b <tool_ <tool_call> is no tag's end",
    "<tool_call>\n{\"nome\": \"x\", \"arguments\": {}}\n</tool_call> after",
    "<tool_call>{\"name\": \"cut\", \"arguments\": {\"a\": \"b",
    "<tool_call>{\"name\": \"broken\", \"arguments\": {\"a\": \"</tool_call> then text",
    "<tool_call>{\"name\": \"unclosed\", \"arguments\": {}}\n</tool_ca",
    "<tool_call>{\"name\": \"one\", \"arguments\": {}}\n<tool_call>{\"name\": \"two\", \"arguments\": {}}",
    "  text with spaces \n ",
    "<tool_call>{\"arguments\": {\"name\": \"inner\"}, \"id\": 7, \"name\": \"outer\"}</tool_call>\n\nDone.",
    "<tool_call><tool_call>{\"name\": \"x{\", \"arguments\": {\"s\": \"<tool_call></tool\"}}</tool_call>",
];

#[test]
fn every_cut_gives_the_same_events() {
    for text in CASES {
        let whole = events([text]);
        let characters: Vec<&str> =
            text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]).collect();
        assert_eq!(events(characters), whole, "one character at a time: {text}");
        for (first, _) in text.char_indices() {
            assert_eq!(events([&text[..first], &text[first..]]), whole, "cut at {first}: {text}");
            for (second, _) in text.char_indices().filter(|&(at, _)| at > first) {
                let pieces = [&text[..first], &text[first..second], &text[second..]];
                assert_eq!(events(pieces), whole, "cut at {first} and {second}: {text}");
            }
        }
    }
}

proptest! {
    #[test]
    fn nothing_is_lost_and_no_cut_matters(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<tool_call>", "</tool_call>", "{\"name\": \"f\", \"arguments\": ", "{\"a\": 1}", "}",
            "{", "\"", "\\", " ", "\n", "text", "<", "\"arguments\": ", ",",
        ]), 0..12),
        cut: prop::sample::Index,
    ) {
        let text = parts.concat();
        let whole = events([text.as_str()]);
        let mut at = cut.index(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        prop_assert_eq!(&events([&text[..at], &text[at..]]), &whole);
        if !whole.iter().any(|event| matches!(event, ToolEvent::CallStart { .. })) {
            prop_assert_eq!(ToolCallParser::parse_whole(&text).0, text);
        }
    }
}

#[test]
fn calls_carry_their_name_and_their_exact_arguments() {
    let whole = |case: usize| ToolCallParser::parse_whole(CASES[case]);
    let weather = call("weather", "{\"city\": \"Zürich\", \"days\": [1, 2]}");
    assert_eq!(whole(0), (String::new(), vec![weather]));
    let two = vec![call("a", "{}"), call("b", "{\"x\": {\"y\": \"}\\\"{\"}}")];
    assert_eq!(whole(1), ("Let me see.".to_owned(), two));
    assert_eq!(whole(2).1, [call("late", "{\"x\": 1.0}")]);
    assert_eq!(whole(3).1, [call("bare", "{}")]);
    assert_eq!(whole(4).1, [call("quoted", "{\"x\": 1}")]);
    assert_eq!(whole(10).1, [call("one", "{}"), call("two", "{}")]);
    let outer = call("outer", "{\"name\": \"inner\"}");
    assert_eq!(whole(12), ("\n\nDone.".to_owned(), vec![outer]));
}

#[test]
fn what_is_no_call_is_text() {
    for case in [5, 6, 11] {
        assert_eq!(ToolCallParser::parse_whole(CASES[case]), (CASES[case].to_owned(), vec![]));
    }
}

#[test]
fn a_call_cut_off_inside_its_arguments_has_no_end() {
    let cut = events([CASES[7]]);
    assert!(
        matches!(cut.last(), Some(ToolEvent::ArgumentsDelta { text, .. }) if text == "{\"a\": \"b")
    );
    let unclosed = events([CASES[9]]);
    assert_eq!(unclosed.last(), Some(&ToolEvent::CallEnd { index: 0 }));
}

#[test]
fn arguments_stream_as_soon_as_the_name_is_known() {
    let mut parser = ToolCallParser::new();
    assert_eq!(parser.push("<tool_call>{\"name\": \"f\", \"arguments\": "), []);
    let expected = [
        ToolEvent::CallStart { index: 0, name: "f".to_owned() },
        ToolEvent::ArgumentsDelta { index: 0, text: "{\"a\"".to_owned() },
    ];
    assert_eq!(parser.push("{\"a\""), expected);
    assert_eq!(parser.num_calls(), 1);
}
