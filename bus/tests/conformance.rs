//! What every bus promises.

use std::collections::BTreeSet;
use std::sync::Arc;

use bus::{Bus, InProcess};
use proto::{Behavior, Digest, Problem, ProblemKey, ProblemOrigin, Request, Sampling, Task, TaskId, TaskKind};

fn buses() -> Vec<Arc<dyn Bus>> {
    vec![Arc::new(InProcess::new(64))]
}

fn task(index: u32) -> Task {
    Task {
        id: TaskId { kind: TaskKind::Train, batch: 0, index },
        seed: 0,
        weights: Digest::of_bytes(b""),
        policy_version: 0,
        request: Request::Solve {
            problem: Problem { domain: "countdown".to_owned(), text: "2 1 -> 3".to_owned() },
            origin: ProblemOrigin::Ladder,
            has_key: false,
        },
        family: String::new(),
        num_rollouts: 1,
        sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
        max_tokens: 5,
    }
}

#[tokio::test]
async fn every_task_is_taken_by_one_of_many_workers() {
    for bus in buses() {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let bus = bus.clone();
                tokio::spawn(async move {
                    let mut taken = Vec::new();
                    for _ in 0..8 {
                        taken.push(bus.next_task().await.unwrap().id.index);
                    }
                    taken
                })
            })
            .collect();
        for index in 0..32 {
            bus.publish_task(task(index)).await.unwrap();
        }
        let mut taken = BTreeSet::new();
        for worker in workers {
            taken.extend(worker.await.unwrap());
        }
        assert_eq!(taken, (0..32).collect());
    }
}

/// A task that is asked for again is delivered again: the bus may not mistake it for a copy.
#[tokio::test]
async fn a_reissue_is_delivered() {
    for bus in buses() {
        for _ in 0..2 {
            bus.publish_task(task(7)).await.unwrap();
        }
        assert_eq!(bus.next_task().await.unwrap(), task(7));
        assert_eq!(bus.next_task().await.unwrap(), task(7));
    }
}

#[tokio::test]
async fn weights_are_kept_until_they_are_let_go() {
    for bus in buses() {
        let digests = [b"a", b"b"].map(|bytes| Digest::of_bytes(bytes));
        for digest in digests {
            bus.put_weights(digest, digest.as_bytes()[..].into()).await.unwrap();
        }
        bus.retain_weights(&digests[..1]).await.unwrap();
        assert_eq!(*bus.get_weights(digests[0]).await.unwrap(), digests[0].as_bytes()[..]);
        let missing = bus.get_weights(digests[1]).await.unwrap_err();
        assert!(missing.to_string().contains(&digests[1].short()), "{missing}");
    }
}

#[tokio::test]
async fn keys_are_kept_until_their_batch_is_over() {
    for bus in buses() {
        let id = |batch| TaskId { batch, ..task(3).id };
        for batch in [4, 5] {
            bus.put_key(id(batch), ProblemKey { text: batch.to_string() }).await.unwrap();
        }
        bus.forget_keys(5).await.unwrap();
        assert_eq!(bus.get_key(id(5)).await.unwrap().text, "5");
        let missing = bus.get_key(id(4)).await.unwrap_err();
        assert!(missing.to_string().contains("batch: 4"), "{missing}");
    }
}
