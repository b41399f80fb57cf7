//! Stop strings in a stream of text.
//!
//! The match that *ends* first wins, because that is the moment a streaming engine can know it;
//! of matches that end together the longest wins, so that no part of it is shown. Text is held
//! back only while it could still be the beginning of a stop string. Both follow from running
//! one automaton (Knuth, Morris and Pratt's) per stop string over the bytes: the result is a
//! function of the text, never of how it was cut into pieces, and each byte costs a constant.

/// Finds the first stop string of one output.
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include_stop_str: bool,
    held: String,
    is_stopped: bool,
}

/// What one piece of text did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopPush {
    /// Text that can be shown now.
    pub text: String,
    /// The stop string that was completed; nothing is released after it.
    pub matched: Option<String>,
}

impl StopMatcher {
    /// A matcher for these stop strings (empty ones never match). With `include_stop_str` the
    /// stop string itself is shown.
    pub fn new(stops: &[String], include_stop_str: bool) -> StopMatcher {
        let patterns = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| Pattern::new(stop));
        StopMatcher {
            patterns: patterns.collect(),
            include_stop_str,
            held: String::new(),
            is_stopped: false,
        }
    }

    /// Adds text to the stream.
    pub fn push(&mut self, text: &str) -> StopPush {
        if self.is_stopped {
            return StopPush::default();
        }
        for (index, byte) in text.bytes().enumerate() {
            if let Some(stop) = self.advance(byte) {
                self.held.push_str(&text[..=index]);
                return self.stop_at_end_of_held(stop);
            }
        }
        self.held.push_str(text);
        let keep = self.patterns.iter().map(Pattern::matched_len).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - keep);
        StopPush { text: std::mem::replace(&mut self.held, kept), matched: None }
    }

    /// What was held back, once no more text can come.
    pub fn finish(&mut self) -> String {
        self.is_stopped = true;
        std::mem::take(&mut self.held)
    }

    /// Moves every automaton by one byte; the longest stop string that is now complete.
    fn advance(&mut self, byte: u8) -> Option<String> {
        let mut longest: Option<&Pattern> = None;
        for pattern in &mut self.patterns {
            let is_complete = pattern.advance(byte);
            if is_complete && longest.is_none_or(|found| found.text.len() < pattern.text.len()) {
                longest = Some(pattern);
            }
        }
        longest.map(|pattern| pattern.text.clone())
    }

    fn stop_at_end_of_held(&mut self, stop: String) -> StopPush {
        self.is_stopped = true;
        let mut text = std::mem::take(&mut self.held);
        if !self.include_stop_str {
            text.truncate(text.len() - stop.len());
        }
        StopPush { text, matched: Some(stop) }
    }
}

/// One string to find, and how much of it the stream's end matches.
pub(super) struct Pattern {
    text: String,
    /// For each prefix length, the length of its longest border (a proper prefix that is also
    /// its suffix): where to go on after a mismatch.
    borders: Vec<usize>,
    matched: usize,
}

impl Pattern {
    /// Panics when `text` is empty: it would match everywhere.
    pub(super) fn new(text: &str) -> Pattern {
        assert!(!text.is_empty(), "an empty string matches everywhere");
        let bytes = text.as_bytes();
        let mut borders = vec![0, 0];
        for index in 1..bytes.len() {
            let mut border = borders[index];
            while border > 0 && bytes[border] != bytes[index] {
                border = borders[border];
            }
            borders.push(border + usize::from(bytes[border] == bytes[index]));
        }
        Pattern { text: text.to_owned(), borders, matched: 0 }
    }

    /// Feeds one byte; true when the stream now ends with the whole string, after which the
    /// search begins anew.
    pub(super) fn advance(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.borders[self.matched];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        let is_complete = self.matched == bytes.len();
        if is_complete {
            self.matched = 0;
        }
        is_complete
    }

    /// Bytes at the end of the stream that begin the string.
    pub(super) fn matched_len(&self) -> usize {
        self.matched
    }
}
