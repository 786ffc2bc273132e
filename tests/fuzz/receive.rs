//! Handling of bytes that anybody may have sent: shared by the fuzzer and the test that replays its corpus.

use domains::symbols::vocabulary::VOCABULARY_SIZE;
use language::SymbolLanguage;
use proto::{Beat, Group, Message, ProblemKey, Refusal, ScoredGroup, Task, Version, wire};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most rollouts that a run asks for, which verifiers know from its config.
const MAX_ROLLOUTS: u32 = 64;

/// Decodes bytes as the kind of message that the first byte names, and handles it as a process handles an untrusted message.
pub(crate) fn receive(bytes: &[u8]) {
    let Some((kind, payload)) = bytes.split_first() else { return };
    match kind % 7 {
        0 => drop(read::<Message<Task>>(payload)),
        1 => {
            let Some(group) = read::<Message<Group>>(payload).map(|message| message.body) else { return };
            if group.check(VOCABULARY_SIZE).is_ok() && group.task.num_rollouts <= MAX_ROLLOUTS {
                // A key comes from the learner; here it is trusted as little as the rest.
                drop(verifier::check_choices(&SymbolLanguage, &group));
                let key = ProblemKey { text: group.task.family.clone() };
                drop(verifier::score(&SymbolLanguage, group.clone(), Some(&key)));
                drop(verifier::score(&SymbolLanguage, group, None));
            }
        }
        2 => {
            if let Some(message) = read::<Message<ScoredGroup>>(payload) {
                drop(message.body.check(VOCABULARY_SIZE));
            }
        }
        3 => drop(read::<Beat>(payload)),
        4 => drop(read::<Version>(payload)),
        5 => drop(read::<Refusal>(payload)),
        _ => drop(read::<ProblemKey>(payload)),
    }
}

/// Decodes a message, and checks that it can be encoded and decoded again.
fn read<T: Serialize + DeserializeOwned>(payload: &[u8]) -> Option<T> {
    let message: T = wire::decode(payload).ok()?;
    let again = wire::encode(&message);
    assert!(wire::decode::<T>(&again).is_ok_and(|message| wire::encode(&message) == again));
    Some(message)
}
