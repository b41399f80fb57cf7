//! Server-sent events: bytes in, the data of whole events out (WHATWG HTML, 9.2.6).

/// Joins bytes into events. Fields other than `data` carry nothing that a benchmark needs.
#[derive(Debug, Default)]
pub(super) struct EventParser {
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    data: Option<String>,
}

impl EventParser {
    /// Takes bytes of the body, gives the data of the events that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let (line, after) = (&rest[..end], &rest[end + 1..]);
            rest = after;
            if self.line.is_empty() {
                self.end_line(line, &mut events);
            } else {
                let mut begun = std::mem::take(&mut self.line);
                begun.extend_from_slice(line);
                self.end_line(&begun, &mut events);
            }
        }
        self.line.extend_from_slice(rest);
        events
    }

    fn end_line(&mut self, line: &[u8], events: &mut Vec<String>) {
        match line.strip_suffix(b"\r").unwrap_or(line) {
            [] => events.extend(self.data.take()),
            line => self.field(&String::from_utf8_lossy(line)),
        }
    }

    fn field(&mut self, line: &str) {
        let Some(value) = line.strip_prefix("data:") else { return };
        let value = value.strip_prefix(' ').unwrap_or(value);
        match &mut self.data {
            None => self.data = Some(value.to_owned()),
            Some(data) => {
                data.push('\n');
                data.push_str(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_join_wherever_the_bytes_are_cut() {
        let raw = "data: {\"text\": \"é\"}\n\ndata:[DONE]\r\n\r\n".as_bytes();
        for cut in 0..raw.len() {
            let mut parser = EventParser::default();
            let mut events = parser.push(&raw[..cut]);
            events.extend(parser.push(&raw[cut..]));
            assert_eq!(events, ["{\"text\": \"é\"}", "[DONE]"], "cut at {cut}");
        }
    }

    #[test]
    fn comments_and_other_fields_are_no_events_and_data_lines_join() {
        let mut parser = EventParser::default();
        let raw = b": ping\n\nevent: x\nid: 3\ndata: a\ndata: b\n\nretry: 5\n\n";
        assert_eq!(parser.push(raw), ["a\nb"]);
    }
}
