//! Where an HTTP/1.1 body ends: chunked, by length, or with the connection (RFC 9112, 6.3).

use super::ClientError;

/// A body on its way in.
#[derive(Debug)]
pub(super) enum Body {
    /// A chunk size precedes each chunk.
    Chunked(ChunkedBody),
    /// This many bytes are still to come.
    Length(usize),
    /// Everything until the connection ends.
    UntilClose,
}

/// The state of a chunked body.
#[derive(Debug, Default)]
pub(super) struct ChunkedBody {
    unparsed: Vec<u8>,
    place: Place,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Place {
    #[default]
    Size,
    Data(usize),
    LineEnd,
    Ended,
}

impl Body {
    pub fn chunked() -> Body {
        Body::Chunked(ChunkedBody::default())
    }

    pub fn of_length(len: usize) -> Body {
        Body::Length(len)
    }

    pub fn until_close() -> Body {
        Body::UntilClose
    }

    /// Takes bytes from the connection, gives bytes of the body.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<u8>, ClientError> {
        match self {
            Body::Chunked(chunked) => chunked.push(bytes),
            Body::Length(left) => {
                let taken = bytes.len().min(*left);
                *left -= taken;
                Ok(bytes[..taken].to_vec())
            }
            Body::UntilClose => Ok(bytes.to_vec()),
        }
    }

    /// True when nothing can follow.
    pub fn has_ended(&self) -> bool {
        match self {
            Body::Chunked(chunked) => chunked.place == Place::Ended,
            Body::Length(left) => *left == 0,
            Body::UntilClose => false,
        }
    }

    /// True when the connection may end now.
    pub fn may_end_here(&self) -> bool {
        matches!(self, Body::UntilClose) || self.has_ended()
    }
}

impl ChunkedBody {
    fn push(&mut self, bytes: &[u8]) -> Result<Vec<u8>, ClientError> {
        self.unparsed.extend_from_slice(bytes);
        let mut payload = Vec::with_capacity(self.unparsed.len());
        loop {
            match self.place {
                Place::Size => {
                    let line = self.unparsed.windows(2).position(|pair| pair == b"\r\n");
                    let Some(end) = line else { return Ok(payload) };
                    let size = chunk_size(&self.unparsed[..end])?;
                    self.unparsed.drain(..end + 2);
                    self.place = if size == 0 { Place::Ended } else { Place::Data(size) };
                }
                Place::Data(left) => {
                    let taken = left.min(self.unparsed.len());
                    payload.extend(self.unparsed.drain(..taken));
                    if taken < left {
                        self.place = Place::Data(left - taken);
                        return Ok(payload);
                    }
                    self.place = Place::LineEnd;
                }
                Place::LineEnd if self.unparsed.len() < 2 => return Ok(payload),
                Place::LineEnd => {
                    self.unparsed.drain(..2);
                    self.place = Place::Size;
                }
                Place::Ended => return Ok(payload),
            }
        }
    }
}

/// A hexadecimal number, perhaps with extensions after a semicolon.
fn chunk_size(line: &[u8]) -> Result<usize, ClientError> {
    let text = String::from_utf8_lossy(line);
    let digits = text.split(';').next().unwrap_or_default().trim();
    usize::from_str_radix(digits, 16)
        .map_err(|_| ClientError::Malformed(format!("a chunk size is {digits:.20?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_join_wherever_the_connection_cuts_them() {
        let raw = b"5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\n\r\n";
        for cut in 0..raw.len() {
            let mut body = Body::chunked();
            let mut text = body.push(&raw[..cut]).unwrap();
            text.extend(body.push(&raw[cut..]).unwrap());
            assert_eq!(text, b"hello, world", "cut at {cut}");
            assert!(body.has_ended());
        }
    }

    #[test]
    fn a_chunked_body_may_not_end_early() {
        let mut body = Body::chunked();
        body.push(b"5\r\nhel").unwrap();
        assert!(!body.may_end_here());
        assert!(Body::chunked().push(b"size\r\n").is_err());
    }

    #[test]
    fn a_length_ends_the_body_and_a_close_ends_one_without() {
        let mut body = Body::of_length(4);
        assert_eq!(body.push(b"ab").unwrap(), b"ab");
        assert!(!body.may_end_here());
        assert_eq!(body.push(b"cdef").unwrap(), b"cd");
        assert!(body.has_ended());
        let mut body = Body::until_close();
        assert_eq!(body.push(b"ab").unwrap(), b"ab");
        assert!(body.may_end_here() && !body.has_ended());
    }
}
