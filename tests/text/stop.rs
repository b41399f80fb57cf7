//! Stop strings are found wherever the text is cut.

use proptest::prelude::*;
use tokenmill::text::StopMatcher;

/// All text that was shown, and the stop string that ended it.
fn run<'a>(
    stops: &[&str],
    include: bool,
    pieces: impl IntoIterator<Item = &'a str>,
) -> (String, Option<String>) {
    let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
    let mut matcher = StopMatcher::new(&stops, include);
    let mut shown = String::new();
    for piece in pieces {
        let push = matcher.push(piece);
        shown.push_str(&push.text);
        if push.matched.is_some() {
            assert_eq!(matcher.finish(), "", "nothing follows a stop string");
            return (shown, push.matched);
        }
    }
    shown.push_str(&matcher.finish());
    (shown, None)
}

/// The definition, written as slowly as it reads: the first end wins, then the longest.
fn by_definition(stops: &[&str], include: bool, text: &str) -> (String, Option<String>) {
    for end in text.char_indices().map(|(at, c)| at + c.len_utf8()) {
        let head = &text[..end];
        let found = stops.iter().filter(|stop| !stop.is_empty() && head.ends_with(**stop));
        if let Some(stop) = found.max_by_key(|stop| stop.len()) {
            let shown = if include { head } else { &head[..end - stop.len()] };
            return (shown.to_owned(), Some((*stop).to_owned()));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #[test]
    fn any_cut_gives_what_the_definition_gives(
        text in "[ab世]{0,24}",
        stops in prop::collection::vec("[ab世]{0,4}", 0..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        include: bool,
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let expected = by_definition(&stops, include, &text);
        prop_assert_eq!(&run(&stops, include, [text.as_str()]), &expected);

        let mut bounds: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        bounds.push(text.len());
        let mut at: Vec<usize> = cuts.iter().map(|cut| bounds[cut.index(bounds.len())]).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        let pieces = at.windows(2).map(|range| &text[range[0]..range[1]]);
        prop_assert_eq!(run(&stops, include, pieces), expected);
    }
}

#[test]
fn only_a_possible_beginning_is_held_back() {
    let mut matcher = StopMatcher::new(&["<end>".to_owned()], false);
    assert_eq!(matcher.push("one <").text, "one ");
    assert_eq!(matcher.push("en").text, "");
    assert_eq!(matcher.push("x two").text, "<enx two");
    assert_eq!(matcher.push(" <end").text, " ");
    assert_eq!(matcher.finish(), "<end");
}

#[test]
fn the_stop_string_is_shown_only_when_asked_for() {
    let stops = ["\n\n"];
    assert_eq!(run(&stops, false, ["a\n", "\nb"]), ("a".into(), Some("\n\n".into())));
    assert_eq!(run(&stops, true, ["a\n", "\nb"]), ("a\n\n".into(), Some("\n\n".into())));
}

#[test]
fn of_stops_that_end_together_the_longest_is_cut() {
    assert_eq!(run(&["c", "abc", "bc"], false, ["xabcd"]), ("x".into(), Some("abc".into())));
}

#[test]
fn a_repetitive_stop_string_costs_no_more_than_the_text() {
    let stop = "a".repeat(50_000) + "b";
    let text = "a".repeat(200_000);
    assert_eq!(run(&[&stop], false, [text.as_str()]), (text.clone(), None));
}
