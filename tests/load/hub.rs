//! Models from the hub, against a local server: downloads, the cache, faults, refusals.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;
use tokenmill::checkpoint::files::{CHAT_TEMPLATE, CONFIG, ModelFiles, TOKENIZER};
use tokenmill::checkpoint::hub::Progress;
use tokenmill::checkpoint::{CheckpointError, TensorSource};
use tokenmill::config::{HubSettings, LoadFormat, ModelSource};
use tokenmill::tensor::DType;

use crate::hub_server::{Hub, HubServer};

const SINGLE: &str = "model.safetensors";

/// A safetensors file with one f32 vector of this name and length.
fn shard(name: &str, len: usize) -> Vec<u8> {
    let values: Vec<u8> = (0..len).flat_map(|i| (i as f32).to_le_bytes()).collect();
    serialize([(name, TensorView::new(Dtype::F32, vec![len], &values).unwrap())], None).unwrap()
}

/// A repository with a single weights file and a file that is never needed.
fn hub() -> Hub {
    let files = BTreeMap::from([
        (CONFIG.to_owned(), b"{\"a\":1}".to_vec()),
        (TOKENIZER.to_owned(), b"{}".to_vec()),
        (SINGLE.to_owned(), shard("w", 40_000)),
        ("pytorch_model.bin".to_owned(), vec![0; 100]),
    ]);
    Hub { commit: "c0ffee".to_owned(), files, ..Hub::default() }
}

struct Client {
    cache: TempDir,
    settings: HubSettings,
}

impl Client {
    fn new(server: &HubServer) -> Client {
        let cache = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            endpoint: server.endpoint(),
            token: None,
            cache: cache.path().to_owned(),
            offline: false,
        };
        Client { cache, settings }
    }

    fn open(&self) -> Result<ModelFiles, CheckpointError> {
        self.open_id("owner/name", "main")
    }

    fn open_id(&self, id: &str, revision: &str) -> Result<ModelFiles, CheckpointError> {
        let hub = self.settings.clone();
        let source = ModelSource::Hub { id: id.to_owned(), revision: revision.to_owned(), hub };
        ModelFiles::open(&source, Progress::Hidden)
    }

    fn weights(&self) -> Result<Box<dyn TensorSource>, CheckpointError> {
        self.open()?.weights(LoadFormat::Auto, Vec::new(), DType::F32)
    }

    fn refusal(&self) -> String {
        match self.weights() {
            Ok(_) => panic!("opened what should have been refused"),
            Err(error) => error.to_string(),
        }
    }

    fn in_cache(&self, path: &str) -> PathBuf {
        self.cache.path().join("models--owner--name").join(path)
    }
}

fn assert_whole(weights: &dyn TensorSource) {
    let tensor = weights.tensor("w").unwrap();
    let values = tensor.as_slice::<f32>();
    assert_eq!(values.len(), 40_000);
    assert!(values.iter().enumerate().all(|(i, value)| *value == i as f32));
}

/// The downloads among some requests.
fn downloads(requests: &[String]) -> Vec<&str> {
    let content = |r: &&str| r.starts_with("GET /cdn/") || r.starts_with("GET /api/resolve-cache/");
    requests.iter().map(String::as_str).filter(content).collect()
}

#[test]
fn a_model_is_downloaded_into_the_layout_that_other_tools_share() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    let files = client.open().unwrap();
    assert_eq!(files.text(CONFIG).unwrap().unwrap(), "{\"a\":1}");
    assert!(files.text(CHAT_TEMPLATE).is_none());
    assert!(!client.in_cache("snapshots/c0ffee/model.safetensors").exists());
    assert_whole(&*files.weights(LoadFormat::Auto, Vec::new(), DType::F32).unwrap());

    assert_eq!(std::fs::read_to_string(client.in_cache("refs/main")).unwrap(), "c0ffee");
    let etag = server.hub.lock().unwrap().etag(SINGLE);
    let pointer = client.in_cache("snapshots/c0ffee/model.safetensors");
    assert_eq!(
        std::fs::canonicalize(pointer).unwrap(),
        std::fs::canonicalize(client.in_cache("blobs").join(etag)).unwrap()
    );
    assert!(!client.in_cache("snapshots/c0ffee/pytorch_model.bin").exists());
}

#[test]
fn a_second_start_costs_one_request() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    client.weights().unwrap();
    server.take_requests();
    assert_whole(&*client.weights().unwrap());
    assert_eq!(server.take_requests(), ["GET /api/models/owner/name/revision/main"]);
}

#[test]
fn the_cache_serves_when_the_hub_is_gone_or_fails() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    client.weights().unwrap();
    server.hub.lock().unwrap().refuse_with = Some(503);
    assert_whole(&*client.weights().unwrap());
    drop(server);
    assert_whole(&*client.weights().unwrap());
}

#[test]
fn offline_uses_the_cache_only_and_says_what_is_missing() {
    let server = HubServer::start(hub());
    let mut client = Client::new(&server);
    client.settings.offline = true;
    let cache = client.cache.path().display().to_string();
    assert_eq!(
        client.refusal(),
        format!(
            "owner/name is not in {cache} (config.json is missing) and HF_HUB_OFFLINE is set: \
             run once without it"
        )
    );
    client.settings.offline = false;
    client.open().unwrap();
    client.settings.offline = true;
    assert!(client.refusal().contains("(model.safetensors is missing)"));
    client.settings.offline = false;
    client.weights().unwrap();
    server.take_requests();
    client.settings.offline = true;
    assert_whole(&*client.weights().unwrap());
    let by_commit = client.open_id("owner/name", "c0ffee").unwrap();
    assert!(by_commit.text(CONFIG).is_some());
    assert!(server.take_requests().is_empty());
}

#[test]
fn without_hub_and_cache_the_error_names_the_way_out() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    drop(server);
    let text = client.refusal();
    assert!(text.starts_with("cannot reach http://127.0.0.1:"), "{text}");
    assert!(text.ends_with("check the network or HF_ENDPOINT, or give a folder"), "{text}");
}

#[test]
fn a_broken_download_is_resumed_where_it_broke() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    server.hub.lock().unwrap().break_once = Some((SINGLE.to_owned(), 50_000));
    assert_whole(&*client.weights().unwrap());
    let requests = server.take_requests();
    let weights: Vec<&str> =
        downloads(&requests).into_iter().filter(|r| r.contains(SINGLE)).collect();
    let whole = "GET /cdn/model.safetensors";
    assert_eq!(weights, [whole, "GET /cdn/model.safetensors from 50000"]);
}

#[test]
fn a_later_start_resumes_what_an_earlier_one_left() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    let content = server.hub.lock().unwrap().files[SINGLE].clone();
    let etag = server.hub.lock().unwrap().etag(SINGLE);
    let partial = client.in_cache("blobs").join(format!("{etag}.incomplete"));
    for (received, requests_for_weights) in [(1000, 1), (content.len(), 0)] {
        let _ = std::fs::remove_dir_all(client.in_cache(""));
        std::fs::create_dir_all(client.in_cache("blobs")).unwrap();
        std::fs::write(&partial, &content[..received]).unwrap();
        server.take_requests();
        assert_whole(&*client.weights().unwrap());
        let requests = server.take_requests();
        let resumed = format!("GET /cdn/model.safetensors from {received}");
        assert_eq!(requests.iter().filter(|r| **r == resumed).count(), requests_for_weights);
        assert!(!requests.contains(&"GET /cdn/model.safetensors".to_owned()));
        assert!(!partial.exists());
    }
}

#[test]
fn a_server_that_ignores_ranges_does_not_corrupt_the_file() {
    let server = HubServer::start(Hub { ignores_ranges: true, ..hub() });
    let client = Client::new(&server);
    server.hub.lock().unwrap().break_once = Some((SINGLE.to_owned(), 50_000));
    assert_whole(&*client.weights().unwrap());
}

#[test]
fn a_part_on_disk_that_is_too_long_is_fetched_anew() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    let etag = server.hub.lock().unwrap().etag(SINGLE);
    std::fs::create_dir_all(client.in_cache("blobs")).unwrap();
    let partial = client.in_cache("blobs").join(format!("{etag}.incomplete"));
    std::fs::write(partial, vec![7; 1_000_000]).unwrap();
    assert_whole(&*client.weights().unwrap());
}

#[test]
fn a_new_commit_is_fetched_and_unchanged_files_are_kept() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    client.weights().unwrap();
    server.take_requests();
    {
        let mut hub = server.hub.lock().unwrap();
        hub.commit = "beef".to_owned();
        hub.files.insert(CONFIG.to_owned(), b"{\"a\":2}".to_vec());
    }
    let files = client.open().unwrap();
    assert_eq!(files.text(CONFIG).unwrap().unwrap(), "{\"a\":2}");
    assert_whole(&*files.weights(LoadFormat::Auto, Vec::new(), DType::F32).unwrap());
    assert_eq!(downloads(&server.take_requests()), ["GET /api/resolve-cache/config.json"]);
}

#[test]
fn a_blob_that_was_deleted_is_fetched_again() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    client.weights().unwrap();
    std::fs::remove_dir_all(client.in_cache("blobs")).unwrap();
    assert_whole(&*client.weights().unwrap());
}

#[test]
fn shards_are_found_through_their_index() {
    let mut hub = hub();
    hub.files.remove(SINGLE);
    hub.files.insert("one.safetensors".to_owned(), shard("w", 40_000));
    hub.files.insert("two.safetensors".to_owned(), shard("v", 3));
    hub.files.insert("spare.safetensors".to_owned(), shard("u", 3));
    let map = serde_json::json!({"w": "one.safetensors", "v": "two.safetensors"});
    let index = serde_json::json!({"weight_map": map}).to_string();
    hub.files.insert("model.safetensors.index.json".to_owned(), index.into_bytes());
    let server = HubServer::start(hub);
    let client = Client::new(&server);
    let weights = client.weights().unwrap();
    assert_whole(&*weights);
    assert_eq!(weights.names(), ["v", "w"]);
    assert!(!client.in_cache("snapshots/c0ffee/spare.safetensors").exists());
}

#[test]
fn random_weights_need_no_download() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    client.open().unwrap().weights(LoadFormat::Dummy, Vec::new(), DType::F32).unwrap();
    assert!(!downloads(&server.take_requests()).iter().any(|r| r.contains("safetensors")));
}

#[test]
fn refusals_say_what_to_do_next() {
    let server = HubServer::start(Hub { token: Some("secret".to_owned()), ..hub() });
    let mut client = Client::new(&server);
    assert_eq!(
        client.refusal(),
        "the hub does not show owner/name without a token (401): check the id; if the model is \
         private or gated, set HF_TOKEN"
    );
    client.settings.token = Some("wrong".to_owned());
    assert!(client.refusal().starts_with("the hub refuses owner/name to the owner of HF_TOKEN"));
    client.settings.token = Some("secret".to_owned());
    server.hub.lock().unwrap().refuse_with = Some(403);
    let licence = format!("accept the model's licence at {}/owner/name", server.endpoint());
    assert!(client.refusal().contains(&licence));
    server.hub.lock().unwrap().refuse_with = Some(404);
    assert_eq!(
        client.refusal(),
        "the hub has no owner/name at revision main: check the id and --revision"
    );
    server.hub.lock().unwrap().refuse_with = None;
    assert_whole(&*client.weights().unwrap());
    assert!(!server.hub.lock().unwrap().token_leaked, "the other host saw the token");
}

#[test]
fn repositories_without_a_model_are_named() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    server.hub.lock().unwrap().files.remove(SINGLE);
    assert_eq!(
        client.refusal(),
        "owner/name on the hub has no safetensors weights (it has pytorch_model.bin, which is \
         not supported)"
    );
    server.hub.lock().unwrap().files.remove(CONFIG);
    assert!(client.refusal().contains("has no config.json, so it is not a model"));
}

#[test]
fn ids_and_revisions_cannot_leave_the_cache() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    for id in ["../name", "owner/..", "a/b/c", "owner/na me", "owner/", ""] {
        let error = client.open_id(id, "main").err().unwrap().to_string();
        assert!(error.contains("is neither a folder nor a hub id"), "{error}");
    }
    for revision in ["../main", "", "a//b", "ma?in"] {
        let error = client.open_id("owner/name", revision).err().unwrap().to_string();
        assert!(error.starts_with("--revision"), "{error}");
    }
    assert!(server.take_requests().is_empty());
}

#[test]
fn two_starts_at_once_download_once() {
    let server = HubServer::start(hub());
    let client = Client::new(&server);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| assert_whole(&*client.weights().unwrap()));
        }
    });
    let requests = server.take_requests();
    assert_eq!(downloads(&requests).iter().filter(|r| r.contains(SINGLE)).count(), 1);
}
