//! The hub, against one on the loopback address.
#![cfg(feature = "hub")]

#[path = "common/hub_server.rs"]
mod hub_server;

use std::fs;
use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;
use hub_server::{COMMIT, Fault, HubServer, Kind};
use predicates::prelude::*;
use predicates::str::contains;
use tempfile::TempDir;
use titan::Error;
use titan::data::hub::{Hub, HubOptions, HubRepo, RepoKind};
use titan::data::remote::RemoteFiles;

const MODEL: &str = "acme/Tiny-1B";
const DATA: &str = "allenai/c4";
const SHARD: &str = "en/c4-train.00000-of-00002.json.gz";

/// Two pieces and a bit.
fn shard() -> Vec<u8> {
    (0..40_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn server() -> HubServer {
    let server = HubServer::start();
    server.add_file(Kind::Model, MODEL, "tokenizer.json", "{\"tokens\": 1}");
    server.add_file(Kind::Model, MODEL, "tokenizer_config.json", "{}");
    server.add_file(Kind::Model, MODEL, "original/tokenizer.model", vec![7; 20_000]);
    server.add_file(Kind::Model, MODEL, "config.json", "{\"dim\": 2}");
    server.add_file(Kind::Model, MODEL, "model.safetensors", vec![9; 50_000]);
    server.add_file(Kind::Dataset, DATA, SHARD, vec![1; 30_000]);
    server.add_file(Kind::Dataset, DATA, "en/c4-train.00001-of-00002.json.gz", vec![2; 30_000]);
    server.add_file(Kind::Dataset, DATA, "en/c4-validation.00000-of-00001.json.gz", vec![3; 100]);
    server.add_file(Kind::Dataset, DATA, "en.noclean/c4-train.00000-of-07168.json.gz", vec![4; 100]);
    server
}

fn hub(server: &HubServer, cache: &TempDir) -> Hub {
    Hub::new(options(server, cache)).unwrap()
}

fn options(server: &HubServer, cache: &TempDir) -> HubOptions {
    HubOptions {
        token: Some("secret".into()),
        endpoint: Some(server.url.clone()),
        cache_dir: Some(cache.path().into()),
        offline: false,
        first_wait: Duration::from_millis(1),
    }
}

fn c4(server: &HubServer, cache: &TempDir) -> HubRepo {
    hub(server, cache).repo(RepoKind::Dataset, DATA, None).unwrap()
}

/// The text of the error, which must be the hub's.
fn refusal<T: std::fmt::Debug>(result: titan::Result<T>) -> String {
    match result.unwrap_err() {
        Error::Hub(message) => message,
        other => panic!("not a fault of the hub: {other}"),
    }
}

/// `titan download-tokenizer` in an environment of its own.
fn download_tokenizer(server: &HubServer, home: &TempDir) -> Command {
    let mut titan = Command::cargo_bin("titan").unwrap();
    titan
        .arg("download-tokenizer")
        .current_dir(home.path())
        .env("HF_ENDPOINT", &server.url)
        .env("HF_HOME", home.path());
    for variable in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"] {
        titan.env_remove(variable);
    }
    titan
}

#[test]
fn a_glob_lists_its_folder_only_and_in_order() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    let files = c4(&server, &cache).list("en/c4-train.*.json.gz").unwrap();
    assert_eq!(files, [SHARD, "en/c4-train.00001-of-00002.json.gz"]);
    let asked = server.requests();
    assert!(asked.iter().any(|request| request.path.contains(&format!("/tree/{COMMIT}/en?"))), "{asked:?}");
}

#[test]
fn two_stars_list_all_folders_across_pages() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    server.paginate(2);
    assert_eq!(c4(&server, &cache).list("**/*.json.gz").unwrap().len(), 4);
    assert!(c4(&server, &cache).list("fr/*.gz").unwrap().is_empty());
}

#[test]
fn a_large_file_comes_in_pieces_and_lies_in_the_caches_layout() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    server.add_file(Kind::Dataset, DATA, "en/big.gz", shard());
    let repo = c4(&server, &cache);
    let path = repo.fetch("en/big.gz").unwrap();
    assert_eq!(path, cache.path().join(format!("datasets--allenai--c4/snapshots/{COMMIT}/en/big.gz")));
    assert!(fs::read(&path).unwrap() == shard());
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(cache.path().join("datasets--allenai--c4/refs/main")).unwrap(), COMMIT);

    let pieces = |method| {
        let from_storage =
            |request: &&hub_server::Request| request.path.starts_with("storage:") && request.method == method;
        server.requests().iter().filter(from_storage).count()
    };
    assert_eq!(pieces("GET"), 3);
    repo.fetch("en/big.gz").unwrap();
    assert_eq!(pieces("GET"), 3, "what is in the cache is not asked for again");
}

#[test]
fn the_token_goes_to_the_hub_and_to_no_other_host() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    c4(&server, &cache).fetch(SHARD).unwrap();
    let (storage, hub): (Vec<_>, Vec<_>) =
        server.requests().into_iter().partition(|request| request.path.starts_with("storage:"));
    assert!(!storage.is_empty() && storage.iter().all(|request| request.authorization.is_none()), "{storage:?}");
    assert!(hub.iter().all(|request| request.authorization.as_deref() == Some("Bearer secret")), "{hub:?}");
}

#[test]
fn faults_that_pass_are_waited_out() {
    let faults = [Fault::Status(503, ""), Fault::Status(500, ""), Fault::Status(429, ""), Fault::Cut(1000)];
    for fault in faults {
        let (server, cache) = (server(), TempDir::new().unwrap());
        for part in ["/revision/", "/paths-info/", "storage:"] {
            server.fail(part, fault, 2);
        }
        let path = c4(&server, &cache).fetch(SHARD).unwrap_or_else(|e| panic!("{fault:?}: {e}"));
        assert_eq!(fs::read(path).unwrap(), [1; 30_000]);
    }
}

#[test]
fn a_hub_that_asks_for_a_pause_gets_it() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    server.fail("storage:", Fault::RetryAfter(1), 1);
    let start = std::time::Instant::now();
    c4(&server, &cache).fetch(SHARD).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_download_goes_on_where_it_was_cut_off() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    server.add_file(Kind::Dataset, DATA, "en/big.gz", shard());
    server.fail("bytes=16777216-", Fault::Status(404, ""), 1);
    c4(&server, &cache).fetch("en/big.gz").unwrap_err();

    let asked = server.requests().len();
    let path = c4(&server, &cache).fetch("en/big.gz").unwrap();
    assert!(fs::read(path).unwrap() == shard());
    let ranges: Vec<_> = server.requests().into_iter().skip(asked).filter_map(|request| request.range).collect();
    assert!(ranges.iter().all(|range| !range.starts_with("bytes=0-")), "{ranges:?}");
}

#[test]
fn two_that_want_the_same_file_download_it_once() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    server.add_file(Kind::Dataset, DATA, "en/big.gz", shard());
    let fetch = || c4(&server, &cache).fetch("en/big.gz").unwrap();
    std::thread::scope(|scope| [scope.spawn(fetch), scope.spawn(fetch)].map(|thread| thread.join().unwrap()));
    let pieces = server.requests().iter().filter(|r| r.method == "GET" && r.path.starts_with("storage:")).count();
    assert_eq!(pieces, 3);
}

#[test]
fn damage_is_found_and_nothing_of_it_is_kept() {
    for file in [SHARD, "en/c4-validation.00000-of-00001.json.gz"] {
        let (server, cache) = (server(), TempDir::new().unwrap());
        let place = if file == SHARD { "storage:" } else { "/resolve/" };
        server.fail(place, Fault::Garbled, 1);
        let repo = c4(&server, &cache);
        let message = refusal(repo.fetch(file));
        assert!(message.contains("damaged") && message.contains(file), "{message}");
        let blobs: Vec<_> = fs::read_dir(cache.path().join("datasets--allenai--c4/blobs")).unwrap().collect();
        assert!(blobs.is_empty(), "{blobs:?}");
        repo.fetch(file).unwrap();
    }
}

#[test]
fn a_piece_of_the_wrong_size_is_refused() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    server.fail("storage:", Fault::Short, 9);
    let message = refusal(c4(&server, &cache).fetch(SHARD));
    assert!(message.contains("29999 bytes") && message.contains("30000"), "{message}");
}

#[test]
fn a_storage_that_refuses_is_not_taken_for_a_gate() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    server.fail("storage:", Fault::Status(403, ""), 9);
    let message = refusal(c4(&server, &cache).fetch(SHARD));
    assert!(message.contains("the storage behind") && message.contains("403"), "{message}");
    assert!(!cache.path().join(format!("datasets--allenai--c4/snapshots/{COMMIT}/{SHARD}")).exists());
}

#[test]
fn names_that_lead_out_of_the_folder_are_refused() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    let repo = c4(&server, &cache);
    for name in ["../x", "/etc/passwd", "en/../../x", "en//x", "./x", "", "en\\..\\x", "C:x"] {
        assert!(refusal(repo.fetch(name)).contains("refused"), "{name}");
        assert!(refusal(repo.save(name, cache.path())).contains("refused"), "{name}");
    }
    let hub = hub(&server, &cache);
    for id in ["../c4", "a/b/c", "a b", "/c4", ""] {
        assert!(hub.repo(RepoKind::Model, id, None).is_err(), "{id}");
    }
    assert!(hub.repo(RepoKind::Model, MODEL, Some("../../main")).is_err());
    assert!(server.requests().is_empty());
}

#[test]
fn offline_the_cache_serves_what_it_has_and_asks_nobody() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    let path = c4(&server, &cache).fetch(SHARD).unwrap();
    let asked = server.requests().len();

    let hub = Hub::new(HubOptions { offline: true, ..options(&server, &cache) }).unwrap();
    let repo = hub.repo(RepoKind::Dataset, DATA, None).unwrap();
    assert_eq!(repo.fetch(SHARD).unwrap(), path);
    assert_eq!(repo.list("en/*").unwrap(), [SHARD]);
    let message = refusal(repo.fetch("en/c4-train.00001-of-00002.json.gz"));
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    let message = refusal(hub.repo(RepoKind::Model, MODEL, None).unwrap().list("*"));
    assert!(message.contains(MODEL) && message.contains("HF_HUB_OFFLINE"), "{message}");
    assert_eq!(server.requests().len(), asked);
}

#[test]
fn a_hub_that_is_down_leaves_what_is_in_the_cache() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    let path = c4(&server, &cache).fetch(SHARD).unwrap();
    server.fail("/", Fault::Status(503, ""), usize::MAX);
    let repo = c4(&server, &cache);
    assert_eq!(repo.list("en/*").unwrap(), [SHARD]);
    assert_eq!(repo.fetch(SHARD).unwrap(), path);
}

#[test]
fn a_hub_that_cannot_be_reached_says_how_to_do_without() {
    let cache = TempDir::new().unwrap();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options = HubOptions { endpoint: Some(format!("http://{nobody}")), ..options(&server(), &cache) };
    let message = refusal(Hub::new(options).unwrap().repo(RepoKind::Dataset, DATA, None).unwrap().list("*"));
    assert!(message.contains(&nobody.to_string()) && message.contains("HF_HUB_OFFLINE=1"), "{message}");
    assert!(message.to_lowercase().contains("connection refused"), "{message}");
}

#[test]
fn missing_things_are_named() {
    let (server, cache) = (server(), TempDir::new().unwrap());
    let message = refusal(c4(&server, &cache).fetch("en/nothing.gz"));
    assert!(message.contains("`en/nothing.gz`") && message.contains("/datasets/allenai/c4/tree/main"), "{message}");
    let hub = hub(&server, &cache);
    let message = refusal(hub.repo(RepoKind::Dataset, DATA, Some("v2")).unwrap().list("*"));
    assert!(message.contains("no revision `v2`"), "{message}");
}

#[test]
fn the_tokenizer_comes_into_a_folder_named_like_the_model() {
    let (server, home) = (server(), TempDir::new().unwrap());
    let printed = contains("assets/hf/Tiny-1B/tokenizer.json").and(contains("model.safetensors").not());
    download_tokenizer(&server, &home).args(["--repo-id", MODEL]).assert().success().stdout(printed);
    let dir = home.path().join("assets/hf/Tiny-1B");
    assert_eq!(fs::read_to_string(dir.join("tokenizer.json")).unwrap(), "{\"tokens\": 1}");
    assert_eq!(fs::read(dir.join("original/tokenizer.model")).unwrap(), [7; 20_000]);
    assert_eq!(names(&dir), ["original", "tokenizer.json", "tokenizer_config.json"]);
}

#[test]
fn assets_patterns_and_everything_can_be_asked_for() {
    let tokenizer = ["original", "tokenizer.json", "tokenizer_config.json"];
    let cases: [(&[&str], Vec<&str>); 4] = [
        (&["--assets", "config,safetensors"], vec!["config.json", "model.safetensors"]),
        (&["--assets", "config", "tokenizer"], [&["config.json"], &tokenizer[..]].concat()),
        (&["--additional_patterns", "*.safetensors"], vec!["model.safetensors"]),
        (&["--all"], [&["config.json", "model.safetensors"], &tokenizer[..]].concat()),
    ];
    for (args, expected) in cases {
        let (server, home) = (server(), TempDir::new().unwrap());
        download_tokenizer(&server, &home)
            .args(["--repo_id", MODEL, "--local_dir", "out"])
            .args(args)
            .assert()
            .success();
        assert_eq!(names(&home.path().join("out/Tiny-1B")), expected, "{args:?}");
    }
}

#[test]
fn what_was_downloaded_before_is_not_downloaded_again() {
    let (server, home) = (server(), TempDir::new().unwrap());
    let fetched = || server.requests().iter().filter(|r| r.method == "GET" && r.path.contains("/resolve/")).count();
    download_tokenizer(&server, &home).args(["--repo-id", MODEL]).assert().success();
    assert_eq!(fetched(), 3);
    fs::write(home.path().join("assets/hf/Tiny-1B/tokenizer.json"), "{\"tokens\": 2}").unwrap();
    download_tokenizer(&server, &home).args(["--repo-id", MODEL]).assert().success();
    assert_eq!(fetched(), 4, "only the file that was changed");
}

#[test]
fn a_gated_model_says_what_to_accept_and_where_to_get_a_token() {
    let (server, home) = (server(), TempDir::new().unwrap());
    server.gate(MODEL, "right");
    let page = format!("{}/{MODEL}", server.url);
    let tokens = format!("{}/settings/tokens", server.url);
    let gated = contains("gated").and(contains(&page)).and(contains(&tokens)).and(contains("--hf-token"));
    download_tokenizer(&server, &home).args(["--repo-id", MODEL]).assert().code(1).stderr(gated);
    let refused = contains("this token may not read it").and(contains(&page)).and(contains("wrong").not());
    download_tokenizer(&server, &home)
        .args(["--repo-id", MODEL])
        .env("HF_TOKEN", "wrong")
        .assert()
        .code(1)
        .stderr(refused);
    download_tokenizer(&server, &home).args(["--repo-id", MODEL]).env("HF_TOKEN", "right\n").assert().success();
    download_tokenizer(&server, &home).args(["--repo-id", MODEL, "--hf_token", "right"]).assert().success();
}

#[test]
fn a_missing_model_or_asset_is_named() {
    let (server, home) = (server(), TempDir::new().unwrap());
    let missing = contains("there is no public model acme/None").and(contains("is the name right?"));
    download_tokenizer(&server, &home).args(["--repo-id", "acme/None"]).assert().code(1).stderr(missing);
    let no_index = contains("has none of model.safetensors.index.json").and(contains("model.safetensors"));
    download_tokenizer(&server, &home)
        .args(["--repo-id", MODEL, "--assets", "index"])
        .assert()
        .code(1)
        .stderr(no_index);
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
