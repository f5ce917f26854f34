//! A hub, or somebody between, that does not do what a hub does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use titan::data::hub::{Hub, HubOptions, RepoKind};
use titan::data::remote::RemoteFiles;

use crate::binary::titan;
use crate::bounded::{Verdict, examine};
use crate::common::{files, held};
use crate::hub_server::{Fault, HubServer, Kind, LARGE};

const REPO: &str = "acme/tales";
/// Stored by the hub itself, and behind a redirect to its storage.
const FILES: [&str; 2] = ["small.json", "large.json.gz"];

fn server() -> HubServer {
    let server = HubServer::start();
    server.add_file(Kind::Dataset, REPO, FILES[0], vec![1; 100]);
    server.add_file(Kind::Dataset, REPO, FILES[1], vec![2; 3 * LARGE]);
    server
}

fn fetch(server: &HubServer, cache: &Path, file: &str) -> titan::Result<PathBuf> {
    let options = HubOptions {
        token: Some("secret".into()),
        endpoint: Some(server.url.clone()),
        cache_dir: Some(cache.into()),
        offline: false,
        first_wait: Duration::from_millis(1),
    };
    Hub::new(options)?.repo(RepoKind::Dataset, REPO, None)?.fetch(file)
}

/// What is under a name that somebody would read.
fn final_files(cache: &Path) -> Vec<PathBuf> {
    files(cache).into_keys().filter(|path| !path.to_string_lossy().ends_with(".part")).collect()
}

#[test]
fn every_fault_of_a_hub_is_waited_out_or_explained_and_leaves_no_half_file() {
    let passing = |status| (Fault::Status(status, ""), true);
    let lasting = |status| (Fault::Status(status, ""), false);
    let faults = [
        passing(408),
        passing(429),
        passing(500),
        passing(502),
        passing(503),
        passing(504),
        lasting(400),
        lasting(401),
        lasting(403),
        lasting(404),
        lasting(410),
        lasting(501),
        (Fault::RetryAfter(0), true),
        (Fault::Cut(0), true),
        (Fault::Cut(50), true),
        (Fault::Garbled, false),
        (Fault::Short, false),
        (Fault::Long, false),
        (Fault::Endless, false),
        (Fault::Circle, false),
        (Fault::Elsewhere, false),
    ];
    let (mut n, mut secrets) = (0, 0);
    for (fault, passes) in faults {
        for (part, file) in
            [("/revision/", FILES[0]), ("/paths-info/", FILES[0]), ("/resolve/", FILES[0]), ("storage:", FILES[1])]
        {
            // What describes a repository is read by hf-hub, which knows no bound but time.
            if matches!(fault, Fault::Endless) && ["/revision/", "/paths-info/"].contains(&part) {
                continue;
            }
            for times in [1, usize::MAX] {
                let (server, cache) = (server(), TempDir::new().unwrap());
                server.fail(part, fault, times);
                match fetch(&server, cache.path(), file) {
                    Ok(path) => {
                        let bytes = fs::read(path).unwrap();
                        assert!(
                            bytes == vec![1; 100] || bytes == vec![2; 3 * LARGE],
                            "{fault:?} at {part} went unnoticed"
                        );
                    }
                    Err(error) => {
                        let message = error.to_string();
                        assert!(!(passes && times == 1), "{fault:?} at {part} was not waited out: {message}");
                        assert!((20..2000).contains(&message.len()), "{message}");
                        assert!(
                            final_files(cache.path()).is_empty(),
                            "{fault:?} at {part}: {:?}",
                            final_files(cache.path())
                        );
                    }
                }
                let asked = server.requests();
                assert!(asked.len() < 40, "{fault:?} at {part}: {} requests", asked.len());
                secrets +=
                    asked.iter().filter(|it| it.path.starts_with("storage:") && it.authorization.is_some()).count();
                n += 1;
            }
        }
    }
    assert_eq!(secrets, 0, "the token went to another host");
    held("faults of the hub: retried or explained; no half file, no token elsewhere", format!("{n} of {n}"));
}

/// Downloads all files of a model into `home`.
fn download_tokenizer(server: &HubServer, home: &TempDir) -> Verdict {
    let mut titan = titan(&["download-tokenizer", "--repo-id", "acme/evil", "--all"]);
    titan.current_dir(home).env("HF_ENDPOINT", &server.url).env("HF_HOME", home.path().join("cache"));
    for variable in ["HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"] {
        titan.env_remove(variable);
    }
    examine(titan.env("HF_TOKEN", "secret"))
}

#[test]
fn a_listing_without_an_end_is_given_up() {
    for (fault, words) in [(Fault::Endless, "where it should end"), (Fault::Again, "list of files does not end")] {
        let (server, home) = (HubServer::start(), TempDir::new().unwrap());
        server.add_file(Kind::Model, "acme/evil", "tokenizer.json", "{}");
        server.fail("/tree/", fault, usize::MAX);
        download_tokenizer(&server, &home).assert_refused(1, &[&server.url, "acme/evil", words]);
    }
    held("a listing of the hub without an end: refused, under 1.5 GB and 40 s", "2 of 2");
}

#[test]
fn a_listing_that_goes_on_elsewhere_does_so_without_the_token() {
    let (server, home) = (HubServer::start(), TempDir::new().unwrap());
    server.add_file(Kind::Model, "acme/evil", "tokenizer.json", "{}");
    server.fail("/tree/", Fault::GoesOnElsewhere, 1);
    download_tokenizer(&server, &home);
    let (storage, hub): (Vec<_>, Vec<_>) =
        server.requests().into_iter().partition(|request| request.path.starts_with("storage:"));
    assert!(!storage.is_empty() && storage.iter().all(|request| request.authorization.is_none()), "{storage:?}");
    assert!(hub.iter().all(|request| request.authorization.as_deref() == Some("Bearer secret")), "{hub:?}");
}

#[test]
fn names_that_a_hub_lists_stay_in_their_folder() {
    let names = [
        "../evil.json",
        "a/../../evil.json",
        "/tmp/titan-evil.json",
        "a//b.json",
        "./evil.json",
        "..",
        "a\\..\\evil.json",
    ];
    for name in names {
        let (server, home) = (HubServer::start(), TempDir::new().unwrap());
        server.add_file(Kind::Model, "acme/evil", name, "{}");
        download_tokenizer(&server, &home).assert_refused(1, &["is refused"]);
        assert!(final_files(home.path()).is_empty(), "{name}: {:?}", final_files(home.path()));
        assert!(!Path::new("/tmp/titan-evil.json").exists());
    }
    held("names with `..` in a hub's listing: refused, nothing written", format!("{0} of {0}", names.len()));
}
