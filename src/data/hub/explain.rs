//! What went wrong at the hub, in the words of somebody who wants to get on.

use std::error::Error as StdError;
use std::time::Duration;

use super::RepoKind;
use super::api::Fault;
use super::repo::HubRepo;
use crate::Error;

/// The HTTP status behind `fault`.
pub(super) fn status(fault: &Fault) -> Option<u16> {
    if let Fault::Refused(refusal) = fault { Some(refusal.status) } else { None }
}

/// How long to wait before another try, at the least; `None` where the same call would fail again.
pub(super) fn wait(fault: &Fault) -> Option<Duration> {
    let passes = match fault {
        Fault::Network(error) => !error.is_builder() && !error.is_redirect(),
        Fault::BrokenOff(_) => true,
        Fault::Refused(refusal) => matches!(refusal.status, 408 | 429 | 500 | 502..=504),
        Fault::Nonsense(_) => false,
    };
    let asked_for = if let Fault::Refused(refusal) = fault { refusal.retry_after } else { Duration::ZERO };
    passes.then_some(asked_for)
}

/// What a user needs to know of `fault`, which came from looking for `file`, or for the repository.
pub(super) fn explain(repo: &HubRepo, file: Option<&str>, fault: &Fault) -> Error {
    let (hub, id, revision) = (&repo.hub, &repo.api.id, &repo.revision);
    let (kind, page) = match repo.api.kind {
        RepoKind::Model => ("model", format!("{}/{id}", hub.endpoint)),
        RepoKind::Dataset => ("dataset", format!("{}/datasets/{id}", hub.endpoint)),
    };
    let tokens = format!("{}/settings/tokens", hub.endpoint);
    let use_token = format!("  = make a token with read access at {tokens} and give it as --hf-token or HF_TOKEN");
    let what = file.map_or(id.clone(), |file| format!("{file} of {id}"));

    let answer = match fault {
        Fault::Refused(refusal) => refusal,
        Fault::Network(_) | Fault::BrokenOff(_) => {
            return Error::Hub(format!(
                "{} does not answer: {fault}\n  = HF_HUB_OFFLINE=1 uses only what is in {}",
                hub.endpoint,
                hub.cache_dir.display()
            ));
        }
        Fault::Nonsense(_) => return Error::Hub(format!("{}: cannot fetch {what}: {fault}", hub.endpoint)),
    };
    let is_gated =
        answer.code == "GatedRepo" || ["gated", "restricted"].iter().any(|word| answer.message.contains(word));
    if let (404, Some(file)) = (answer.status, file) {
        return no_such_file(repo, file);
    }
    Error::Hub(match (answer.status, answer.code.as_str()) {
        (401 | 403, _) if !answer.url.starts_with(&hub.endpoint) => {
            format!("the storage behind {} refuses {what} ({}): {}", hub.endpoint, answer.status, answer.url)
        }
        (401, _) if is_gated && !hub.has_token => {
            format!("{id} is gated\n  = read and accept its conditions at {page}\n{use_token}")
        }
        (401 | 403, _) if is_gated => format!(
            "{id} is gated, and this token may not read it\n  \
             = read and accept its conditions at {page}, with the account of the token; some owners must then agree\n  \
             = a fine-grained token also needs the permission to read gated repositories: {tokens}"
        ),
        (401 | 404, _) if !hub.has_token && answer.code != "RevisionNotFound" && file.is_none() => {
            format!(
                "there is no public {kind} {id} at {}\n  = is the name right? it was looked for at {page}\n  = if it is private:\n{use_token}",
                hub.endpoint
            )
        }
        (401, _) => {
            format!("{} does not accept this token\n  = make a new one with read access at {tokens}", hub.endpoint)
        }
        (403, _) => format!("this token may not read {id}\n  = see what it may do at {tokens}"),
        (404, "RevisionNotFound") => {
            format!("{id} has no revision `{revision}`\n  = branches and tags: {page}/tree/main")
        }
        (404, _) => format!(
            "there is no {kind} {id} that this token can see at {}\n  = is the name right? it was looked for at {page}",
            hub.endpoint
        ),
        (429, _) => {
            format!("{} asks for fewer requests: try again later; a token raises the limit\n{use_token}", hub.endpoint)
        }
        _ => format!("cannot fetch {what}: {fault}"),
    })
}

pub(super) fn no_such_file(repo: &HubRepo, file: &str) -> Error {
    let prefix = if repo.api.kind == RepoKind::Dataset { "datasets/" } else { "" };
    Error::Hub(format!(
        "{} has no file `{file}` at revision `{}`\n  = its files: {}/{prefix}{}/tree/{}",
        repo.api.id, repo.revision, repo.hub.endpoint, repo.api.id, repo.revision
    ))
}

pub(super) fn not_cached(repo: &HubRepo, file: Option<&str>) -> Error {
    let what =
        file.map_or_else(|| format!("nothing of {}", repo.api.id), |file| format!("no {file} of {}", repo.api.id));
    Error::Hub(format!(
        "there is {what} at revision `{}` in {}, and the hub is not asked\n  = without HF_HUB_OFFLINE it would be downloaded",
        repo.revision,
        repo.hub.cache_dir.display()
    ))
}

/// `error` with what caused it.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
