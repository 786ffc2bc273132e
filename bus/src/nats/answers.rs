//! JetStream's error responses, extracted from the errors of its client.

use async_nats::jetstream::context::{
    CreateStreamError, CreateStreamErrorKind, DeleteStreamError, DeleteStreamErrorKind, GetStreamError,
    GetStreamErrorKind,
};
use async_nats::jetstream::{self, ErrorCode};

pub(super) fn is_not_enabled(code: ErrorCode) -> bool {
    [ErrorCode::JETSTREAM_NOT_ENABLED, ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT].contains(&code)
}

/// Returns the code of JetStream's response from an error of the client.
pub(super) fn code(error: &(dyn std::error::Error + 'static)) -> Option<ErrorCode> {
    let answered = |cause: &(dyn std::error::Error + 'static)| {
        let kinds = [
            cause.downcast_ref().map(jetstream::Error::error_code),
            cause.downcast_ref().and_then(|error: &GetStreamError| match error.kind() {
                GetStreamErrorKind::JetStream(answer) => Some(answer.error_code()),
                _ => None,
            }),
            cause.downcast_ref().and_then(|error: &CreateStreamError| match error.kind() {
                CreateStreamErrorKind::JetStream(answer) => Some(answer.error_code()),
                _ => None,
            }),
            cause.downcast_ref().and_then(|error: &DeleteStreamError| match error.kind() {
                DeleteStreamErrorKind::JetStream(answer) => Some(answer.error_code()),
                _ => None,
            }),
        ];
        kinds.into_iter().flatten().next()
    };
    std::iter::successors(Some(error), |error| error.source()).find_map(answered)
}

/// Whether the error means that the server has too little room.
pub(super) fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let full = [
        ErrorCode::STORAGE_RESOURCES_EXCEEDED,
        ErrorCode::INSUFFICIENT_RESOURCES,
        ErrorCode::ACCOUNT_RESOURCES_EXCEEDED,
        ErrorCode::MEMORY_RESOURCES_EXCEEDED,
    ];
    code(error).is_some_and(|code| full.contains(&code))
}

/// Describes a failure for lack of storage: how much is needed, and which setting provides it.
pub(super) fn with_room(error: impl Into<async_nats::Error>, what: &str, num_bytes: u64) -> String {
    let error = error.into();
    match is_full(error.as_ref()) {
        false => error.to_string(),
        true => format!("{error}: {}", room(what, num_bytes)),
    }
}

pub(super) fn room(what: &str, num_bytes: u64) -> String {
    format!(
        "{what} needs {num_bytes} bytes of the server's store: raise max_file_store in the jetstream block of its config, or \
         remove runs from it (`autodidact runs`)"
    )
}
