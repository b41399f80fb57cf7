//! Where hub models come from and are kept, from the environment that other hub tools use.

use std::fmt;
use std::path::{Path, PathBuf};

/// How to reach the hub.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// Address without a slash at the end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// Sent as bearer token (`HF_TOKEN`, or the file that the hub's login command writes).
    pub token: Option<String>,
    /// Folder with the hub's cache layout (`--download-dir`, `HF_HUB_CACHE`, `HF_HOME/hub`).
    pub cache: PathBuf,
    /// Use the cache only (`HF_HUB_OFFLINE`).
    pub offline: bool,
}

impl HubSettings {
    /// Reads the environment once; a given folder replaces the cache.
    pub fn from_env(download_dir: Option<PathBuf>) -> HubSettings {
        HubSettings::from_lookup(&|name| std::env::var(name).ok(), download_dir)
    }

    /// As [`HubSettings::from_env`], from any source of variables.
    pub fn from_lookup(
        variable: &dyn Fn(&str) -> Option<String>,
        download_dir: Option<PathBuf>,
    ) -> HubSettings {
        let get = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let cache_home = path("XDG_CACHE_HOME")
            .or_else(|| path("HOME").map(|home| home.join(".cache")))
            .unwrap_or_else(|| PathBuf::from(".cache"));
        let home = path("HF_HOME").unwrap_or_else(|| cache_home.join("huggingface"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let offline = get("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        HubSettings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: get("HF_TOKEN").map(|t| t.trim().to_owned()).or_else(|| read_token(&token_file)),
            cache: download_dir
                .or_else(|| path("HF_HUB_CACHE"))
                .unwrap_or_else(|| home.join("hub")),
            offline: ["1", "on", "yes", "true"].contains(&offline.as_str()),
        }
    }
}

fn read_token(file: &Path) -> Option<String> {
    let token = std::fs::read_to_string(file).ok()?.trim().to_owned();
    Some(token).filter(|token| !token.is_empty())
}

impl fmt::Debug for HubSettings {
    /// Without the token, which must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)], download_dir: Option<&str>) -> HubSettings {
        let lookup = |name: &str| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        HubSettings::from_lookup(&lookup, download_dir.map(PathBuf::from))
    }

    #[test]
    fn the_cache_is_the_first_of_its_four_places() {
        let cache = |variables: &[_], dir| settings(variables, dir).cache;
        let all = [("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h"), ("HOME", "/home/x")];
        assert_eq!(cache(&all, Some("/d")), PathBuf::from("/d"));
        assert_eq!(cache(&all, None), PathBuf::from("/c"));
        assert_eq!(cache(&all[1..], None), PathBuf::from("/h/hub"));
        assert_eq!(cache(&all[2..], None), PathBuf::from("/home/x/.cache/huggingface/hub"));
    }

    #[test]
    fn the_token_comes_from_the_variable_or_the_login_file_and_is_never_printed() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = ("HF_HOME", home.path().to_str().unwrap());
        assert_eq!(settings(&[home], None).token.as_deref(), Some("hf_file"));
        let both = settings(&[home, ("HF_TOKEN", "hf_variable")], None);
        assert_eq!(both.token.as_deref(), Some("hf_variable"));
        assert!(!format!("{both:?}").contains("hf_"));
        assert_eq!(settings(&[("HF_HOME", "/nowhere")], None).token, None);
    }

    #[test]
    fn the_endpoint_has_no_trailing_slash_and_offline_has_four_spellings() {
        assert_eq!(settings(&[], None).endpoint, "https://huggingface.co");
        let mirror = settings(&[("HF_ENDPOINT", "https://mirror.example/")], None);
        assert_eq!(mirror.endpoint, "https://mirror.example");
        for (value, offline) in [("1", true), ("TRUE", true), ("0", false), ("", false)] {
            assert_eq!(settings(&[("HF_HUB_OFFLINE", value)], None).offline, offline, "{value}");
        }
    }
}
