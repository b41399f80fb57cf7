//! Where a server is: `http://host:port/path`.

use std::str::FromStr;

/// A base URL, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    /// Name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// `host:port` as typed, for the `Host` header.
    pub authority: String,
    /// What comes before `/v1`, without a slash at its end; often empty.
    pub path: String,
}

impl BaseUrl {
    /// True when the server is on this machine.
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for BaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<BaseUrl, String> {
        if text.starts_with("https://") {
            return Err("only http:// is spoken, because TLS would be measured too; give the \
                        address of the server behind its proxy"
                .to_owned());
        }
        let wrong = || format!("`{text}` is not a URL like http://127.0.0.1:8000");
        let rest = text.strip_prefix("http://").ok_or_else(wrong)?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong())?)
            }
            _ => (authority, 80),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || authority.contains('@') {
            return Err(wrong());
        }
        // OpenAI clients take a base URL that ends in /v1; accept both.
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix("/v1").unwrap_or(path);
        Ok(BaseUrl {
            host: host.to_owned(),
            port,
            authority: authority.to_owned(),
            path: path.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> (String, u16, String) {
        let url: BaseUrl = text.parse().unwrap();
        (url.host, url.port, url.path)
    }

    #[test]
    fn a_url_has_host_port_and_path() {
        assert_eq!(parts("http://box"), ("box".to_owned(), 80, String::new()));
        assert_eq!(parts("http://127.0.0.1:8000/"), ("127.0.0.1".to_owned(), 8000, String::new()));
        assert_eq!(parts("http://[::1]:81/a/v1/"), ("::1".to_owned(), 81, "/a".to_owned()));
        assert_eq!(parts("http://[::1]"), ("::1".to_owned(), 80, String::new()));
    }

    #[test]
    fn other_schemes_are_refused_with_a_reason() {
        assert!("https://box".parse::<BaseUrl>().unwrap_err().contains("only http://"));
        for wrong in ["box:8000", "ftp://box", "http://", "http://:80", "http://box:port"] {
            assert!(wrong.parse::<BaseUrl>().unwrap_err().contains("is not a URL"), "{wrong}");
        }
    }

    #[test]
    fn this_machine_is_recognised() {
        let is_loopback = |text: &str| text.parse::<BaseUrl>().unwrap().is_loopback();
        assert!(is_loopback("http://localhost:1") && is_loopback("http://127.0.0.9"));
        assert!(is_loopback("http://[::1]:8000") && !is_loopback("http://10.0.0.1"));
    }
}
