//! What went wrong at the hub, in the words of somebody who wants to get on.

use std::error::Error as StdError;
use std::time::Duration;

use hf_hub::HFError;

use super::RepoKind;
use super::repo::HubRepo;
use crate::Error;

/// What the hub answered.
struct Answer<'a> {
    status: u16,
    url: &'a str,
    /// The hub's own name for the fault, such as `GatedRepo`.
    code: &'a str,
    message: &'a str,
}

fn answer(error: &HFError) -> Option<Answer<'_>> {
    let context = match error {
        HFError::Http { context }
        | HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::Conflict { context }
        | HFError::RateLimited { context, .. } => context,
        HFError::RepoNotFound { context, .. }
        | HFError::RevisionNotFound { context, .. }
        | HFError::EntryNotFound { context, .. } => context.as_ref()?,
        _ => return None,
    };
    Some(Answer {
        status: context.status.as_u16(),
        url: &context.url,
        code: context.error_code.as_deref().unwrap_or_default(),
        message: context.server_message.as_deref().unwrap_or_default(),
    })
}

/// The HTTP status behind `error`.
pub(super) fn status(error: &HFError) -> Option<u16> {
    answer(error).map(|answer| answer.status)
}

/// How long to wait before another try, at the least; `None` where the same call would fail again.
pub(super) fn wait(error: &HFError) -> Option<Duration> {
    match error {
        HFError::RateLimited { retry_after, .. } => Some(retry_after.unwrap_or_default()),
        HFError::Request { source, .. } => (!source.is_builder() && !source.is_redirect()).then_some(Duration::ZERO),
        HFError::Xet { .. } => Some(Duration::ZERO),
        _ => status(error).filter(|status| matches!(status, 408 | 429 | 500 | 502..=504)).map(|_| Duration::ZERO),
    }
}

/// What a user needs to know of `error`, which came from looking for `file`, or for the repository.
pub(super) fn explain(repo: &HubRepo, file: Option<&str>, error: &HFError) -> Error {
    let HubRepo { hub, id, revision, .. } = repo;
    let (kind, page) = match repo.kind {
        RepoKind::Model => ("model", format!("{}/{id}", hub.endpoint)),
        RepoKind::Dataset => ("dataset", format!("{}/datasets/{id}", hub.endpoint)),
    };
    let tokens = format!("{}/settings/tokens", hub.endpoint);
    let use_token = format!("  = make a token with read access at {tokens} and give it as --hf-token or HF_TOKEN");
    let what = file.map_or(id.clone(), |file| format!("{file} of {id}"));

    let Some(answer) = answer(error) else {
        return match error {
            HFError::Request { .. } => Error::Hub(format!(
                "{} does not answer: {}\n  = HF_HUB_OFFLINE=1 uses only what is in {}",
                hub.endpoint,
                chain(error),
                hub.cache_dir.display()
            )),
            _ => Error::Hub(format!("cannot fetch {what}: {}", chain(error))),
        };
    };
    let is_gated =
        answer.code == "GatedRepo" || ["gated", "restricted"].iter().any(|word| answer.message.contains(word));
    if let (404, Some(file)) = (answer.status, file) {
        return no_such_file(repo, file);
    }
    Error::Hub(match (answer.status, answer.code) {
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
        _ => format!("cannot fetch {what}: {}", chain(error)),
    })
}

pub(super) fn no_such_file(repo: &HubRepo, file: &str) -> Error {
    let prefix = if repo.kind == RepoKind::Dataset { "datasets/" } else { "" };
    Error::Hub(format!(
        "{} has no file `{file}` at revision `{}`\n  = its files: {}/{prefix}{}/tree/{}",
        repo.id, repo.revision, repo.hub.endpoint, repo.id, repo.revision
    ))
}

pub(super) fn not_cached(repo: &HubRepo, file: Option<&str>) -> Error {
    let what = file.map_or_else(|| format!("nothing of {}", repo.id), |file| format!("no {file} of {}", repo.id));
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
