//! Hostile actors with valid keys: their forgeries are detected, and their malformed messages harm nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actor::engine::{Engine, LoadedVersion};
use bus::nats::{Credentials, Nats, Server, Settings};
use bus::{Presence as _, Queues as _, WeightStore as _};
use domains::symbols::vocabulary::VOCABULARY_SIZE;
use language::{Language as _, Next, SymbolLanguage};
use learner::{BanRecord, GroupRecord, Record, read_journal};
use policy::Backend;
use proto::{
    Behavior, Choices, Digest, Envelope, Group, LegalTokens, Message, Problem, ProblemOrigin, Request, Rollout,
    Sampling, SetDictionary, StopReason, Task, TaskId, TaskKind, TokenId, VersionSpan, wire,
};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::cluster::{Cluster, Guarded};
use crate::runs::{HASTE, reference, wait_until};

/// The hostile actor; `actor-0` and `actor-1` are honest.
const FORGER: &str = "actor-2";

impl Guarded {
    /// Starts the hostile actor for a run. In place of the training groups that it plays it sends the results of `forge`.
    fn forger(&self, run: &str, forge: Forge) -> Forger {
        Forger::start(self.server.url(), self.credentials(FORGER), run, FORGER, forge)
    }

    fn credentials(&self, name: &str) -> Credentials {
        Credentials {
            nkey: Some(self.folder.path(&format!("keys/{name}.nk"))),
            tls_ca: Some(self.folder.path("keys/ca.pem")),
        }
    }

    /// Counts the records of a kind in the journal.
    fn num_records(&self, is_kind: fn(&Record) -> bool) -> usize {
        let mut count = 0;
        drop(read_journal(&self.folder.path("run/journal"), |record| count += usize::from(is_kind(&record))));
        count
    }
}

/// Maps the nth training group that an actor has played to the groups that it sends.
type Forge = fn(Group, u64) -> Vec<Group>;

/// An actor that plays exams honestly, and forges all training groups.
struct Forger {
    num_forged: Arc<AtomicU64>,
    _runtime: Runtime,
}

impl Forger {
    fn start(url: String, credentials: Credentials, run: &str, name: &str, forge: Forge) -> Forger {
        let runtime = Runtime::new().unwrap();
        let num_forged = Arc::new(AtomicU64::new(0));
        let nats = runtime.block_on(join(url, credentials, run, name));
        runtime.spawn(forge_all(nats, forge, num_forged.clone()));
        Forger { num_forged, _runtime: runtime }
    }

    fn has_forged(&self) -> bool {
        self.num_forged.load(Ordering::SeqCst) > 0
    }
}

async fn join(url: String, credentials: Credentials, run: &str, name: &str) -> Nats {
    let settings = Settings { servers: url.parse().unwrap(), patience: Duration::from_secs(60), credentials };
    Server::connect(settings, name).await.unwrap().join(run, name, Duration::from_secs(1))
}

/// Plays a task honestly.
async fn play(bus: &Nats, task: &Task) -> Group {
    let (engine, mut groups) =
        Engine::start(actor::Config { backend: Backend::Cpu, num_threads: 1, num_slots: 8 }, Arc::new(SymbolLanguage));
    let weights = actor::load(task.weights, &bus.get_weights(task.weights).await.unwrap(), &Backend::Cpu).unwrap();
    engine.submit(task.clone(), LoadedVersion { policy_version: task.policy_version, weights }).unwrap();
    groups.recv().await.unwrap().unwrap()
}

async fn forge_all(bus: Nats, forge: Forge, num_forged: Arc<AtomicU64>) {
    let (engine, mut groups) =
        Engine::start(actor::Config { backend: Backend::Cpu, num_threads: 1, num_slots: 8 }, Arc::new(SymbolLanguage));
    let mut known = None;
    loop {
        let task = bus.next_task().await.unwrap();
        let digest = task.message.body.weights;
        let weights = match known.take().filter(|(of, _)| *of == digest) {
            Some((_, weights)) => weights,
            // The store has dropped a version that nobody needs any more.
            None => match bus.get_weights(digest).await {
                Ok(bytes) => actor::load(digest, &bytes, &Backend::Cpu).unwrap(),
                Err(_) => {
                    task.acknowledge().await.unwrap();
                    continue;
                }
            },
        };
        let policy_version = task.message.body.policy_version;
        engine.submit(task.message.body.clone(), LoadedVersion { policy_version, weights: weights.clone() }).unwrap();
        known = Some((digest, weights));
        let group = groups.recv().await.unwrap().unwrap();
        let said = match group.task.id.kind {
            TaskKind::Evaluate => vec![group],
            TaskKind::Train => forge(group, num_forged.fetch_add(1, Ordering::SeqCst)),
        };
        for group in said {
            bus.publish_group(task.message.reply(group)).await.unwrap();
        }
        task.acknowledge().await.unwrap();
    }
}

/// Changes a log-probability if `number` is even, else a token to another legal one. All checks without playing still pass.
fn forged(mut group: Group, number: u64) -> Vec<Group> {
    let rollout = &mut group.rollouts[0];
    if number.is_multiple_of(2) {
        rollout.logprobs[0] -= 0.5;
    } else {
        let (position, legal) = rollout.choices.iter().next().unwrap();
        let LegalTokens::Only(legal) = legal.tokens(&group.sets) else { panic!("a grammar names what is legal") };
        let token = rollout.tokens[position];
        let other = legal.iter().find(|other| *other != token).unwrap();
        rollout.tokens.truncate(position);
        rollout.tokens.push(other);
        group = played_on(group);
    }
    group.check(VOCABULARY_SIZE).unwrap();
    verifier::check_choices(&SymbolLanguage, &group).unwrap();
    vec![group]
}

/// Completes rollouts with the lowest legal tokens, and records their choices as the language defines them.
fn played_on(mut group: Group) -> Group {
    let episode = SymbolLanguage.open(&group.task.request).unwrap();
    let mut sets = SetDictionary::default();
    for rollout in &mut group.rollouts {
        let mut episode = episode.fork();
        let mut said = std::mem::take(&mut rollout.logprobs).into_iter();
        let (mut choices, mut position) = (Vec::new(), 0);
        rollout.stop = loop {
            let next = episode.next();
            let lowest = match &next {
                Next::Done => break StopReason::Complete,
                _ if position == group.task.max_tokens as usize => break StopReason::Length,
                Next::Forced(token) => *token,
                Next::Choice(LegalTokens::Only(legal)) => legal.iter().next().unwrap(),
                Next::Choice(LegalTokens::Any) => panic!("a grammar names what is legal"),
            };
            if let Next::Choice(legal) = next {
                rollout.logprobs.push(said.next().unwrap_or(-0.5));
                choices.push((position, sets.refer(legal)));
            }
            if position == rollout.tokens.len() {
                rollout.tokens.push(lowest);
            }
            assert!(episode.push(rollout.tokens[position]));
            position += 1;
        };
        rollout.choices = Choices::new(rollout.tokens.len(), choices);
    }
    group.sets = sets.into_sets();
    group
}

/// Every task is audited, and the learner is killed once it has banned the forger.
#[test]
fn a_forger_is_banned_and_the_weights_are_those_of_a_run_without_it() {
    let cluster = Guarded::new();
    let learner = cluster.learner(&["smoke", "--set", "local.bus.audit_share=1.0"]);
    let forger = cluster.forger(&Cluster::run_of(&learner), forged);
    let _verifier = cluster.start("verifier-0", &[]);
    let mut honest = vec![cluster.start("actor-0", &[])];
    // The two actors play every task, so they disagree, and a third decides.
    wait_until("a forged group", || forger.has_forged());
    honest.push(cluster.start("actor-1", &[]));
    wait_until("a ban", || learner.said_so_far().contains("is banned"));
    wait_until("a checkpoint after it", || cluster.folder.last_step() >= 12);
    let killed = learner.kill();
    assert!(killed.stderr.contains(&format!("warning: {FORGER} is banned for its group of task ")), "{killed:#?}");
    // If a learner that waited too long asks it twice, the forger contradicts itself; otherwise two others outvote it.
    let is_told_why =
        [", but others agree on ", ", but an earlier copy has "].iter().any(|why| killed.stderr.contains(why));
    assert!(killed.stderr.contains(": it has digest ") && is_told_why, "{killed:#?}");
    assert_eq!(killed.stderr.matches(" is banned").count(), 1, "{killed:#?}");

    let ended = cluster.learner(&["--resume", "--json"]).end().success();
    assert_eq!(ended.stderr, format!("banned: {FORGER}\n"));
    cluster.folder.history().assert_steps_of(&reference(0).history);
    assert_eq!(cluster.folder.history().exams, reference(0).history.exams);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(summary["banned"], serde_json::json!([FORGER]));
    assert!(summary["num_audited"].as_u64().unwrap() >= 16, "{summary}");
    for actor in honest {
        actor.end().success();
    }
    let inspected = cluster.folder.call(&["inspect", "run"]).success().stdout;
    assert!(inspected.contains(&format!("banned        {FORGER}; its groups of ")), "{inspected}");
    assert!(cluster.folder.call(&["replay", "run"]).success().stdout.starts_with("replayed 40 steps "));
}

/// A fifth of the tasks is audited. A forged group is audited with probability 0.2, so `MISSED` in a row escape with a
/// probability of 0.8^93, less than 1e-9. Groups that arrive while an audit is being decided are of one batch, which waits for
/// it.
#[test]
fn a_forger_is_banned_after_few_forged_groups() {
    const MISSED: usize = 93;
    const BATCH: usize = 16;
    let cluster = Guarded::new();
    let steps = ["--set", "schedule.num_steps=100000", "--set", "exams.names=[]"];
    let learner = cluster.learner(&[&["smoke", "--set", "local.bus.audit_share=0.2"], &steps[..]].concat());
    let forger = cluster.forger(&Cluster::run_of(&learner), forged);
    let _workers = ["verifier-0", "actor-0", "actor-1"].map(|name| cluster.start(name, &[]));
    wait_until("a ban", || learner.said_so_far().contains("is banned"));
    let step = cluster.folder.last_step();
    wait_until("steps after it", || cluster.folder.last_step() >= step + 3);
    learner.terminate();
    let ended = learner.end().success();
    assert!(ended.stderr.contains(&format!("warning: {FORGER} is banned")), "{ended:#?}");
    assert!(!ended.stderr.contains("actor-0 is") && !ended.stderr.contains("actor-1 is"), "{ended:#?}");
    assert!(forger.has_forged());

    let (mut num_believed, mut taken_back) = (0, None);
    let of_forger = |group: &GroupRecord| group.played_by == FORGER;
    let damage = read_journal(&cluster.folder.path("run/journal"), |record| match record {
        Record::Group(group) if of_forger(&group) => {
            assert!(taken_back.is_none(), "it is believed nothing any more");
            num_believed += 1;
        }
        Record::Ban(BanRecord { player, tasks }) => {
            assert_eq!(player, FORGER);
            taken_back = Some(tasks);
        }
        _ => {}
    });
    assert!(damage.unwrap().unreadable.is_empty() && !taken_back.unwrap().is_empty());
    assert!(num_believed <= MISSED + BATCH, "{num_believed}");
    assert!(cluster.folder.call(&["replay", "run"]).success().stdout.starts_with("replayed "));
}

/// With audits an actor is banned at once for anything that no honest actor does. Almost no task is audited here.
#[test]
fn an_actor_that_gives_itself_away_needs_no_audit() {
    let other_plan: Forge = |mut group, _| {
        group.task.seed ^= 1;
        vec![group]
    };
    let two_things: Forge = |group, number| [vec![group.clone()], forged(group, number)].concat();
    for (forge, says) in
        [(other_plan, ": it does not match the planned task; none of"), (two_things, ": it has digest ")]
    {
        let cluster = Guarded::new();
        let learner = cluster.learner(&["smoke", "--set", "local.bus.audit_share=1e-9"]);
        let _forger = cluster.forger(&Cluster::run_of(&learner), forge);
        let _verifier = cluster.start("verifier-0", &[]);
        wait_until("a ban", || learner.said_so_far().contains("is banned"));
        let _honest = cluster.start("actor-0", &[]);
        let ended = learner.end().success();
        assert!(ended.stderr.starts_with(&format!("warning: {FORGER} is banned for its group of task ")), "{ended:#?}");
        assert!(ended.stderr.contains(says) && ended.stderr.lines().count() == 1, "{ended:#?}");
        assert!(ended.stdout.contains(&format!("; banned: {FORGER}\n")), "{ended:#?}");
        cluster.folder.history().assert_steps_of(&reference(0).history);
    }
}

/// A forged group is in the journal, and another actor disagrees; the learner is killed before a third can decide. After the
/// resume the forged group is still in dispute.
#[test]
fn what_is_disputed_outlives_the_learner() {
    let cluster = Guarded::new();
    let learner = cluster.learner(&["smoke", "--set", "local.bus.audit_share=1e-9", "--set", "exams.names=[]"]);
    let run = Cluster::run_of(&learner);
    let _verifier = cluster.start("verifier-0", &[]);
    let runtime = Runtime::new().unwrap();
    let [forger, other] = [FORGER, "actor-1"]
        .map(|name| runtime.block_on(join(cluster.server.url(), cluster.credentials(name), &run, name)));
    let honest = runtime.block_on(async {
        let task = forger.next_task().await.unwrap();
        let group = play(&forger, &task.message.body).await;
        let lie = forged(group.clone(), 0).remove(0);
        forger.publish_group(task.message.reply(lie)).await.unwrap();
        task.acknowledge().await.unwrap();
        forger.leave().await;
        task.message.reply(group)
    });
    wait_until("the forged group", || cluster.num_records(|record| matches!(record, Record::Group(_))) > 0);
    runtime.block_on(other.publish_group(honest)).unwrap();
    wait_until("the dispute", || cluster.num_records(|record| matches!(record, Record::Dispute(_))) > 0);
    learner.kill();
    let resumed = cluster.learner(&["--resume", "--json"]);
    let actors = ["actor-0", "actor-1"].map(|name| cluster.start(name, &[]));
    let ended = resumed.end().success();
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(summary["num_audited"], 1, "two must agree on it");
    for actor in actors {
        actor.end().success();
    }
    cluster.folder.history().assert_steps_of(&reference(0).history);
    let inspected = cluster.folder.call(&["inspect", "run"]).success().stdout;
    assert!(
        inspected.contains("\ndisputes      1: another actor returned a different group for a completed task\n"),
        "{inspected}"
    );
}

#[test]
fn an_audit_without_a_second_actor_says_what_it_waits_for() {
    let cluster = Cluster::new();
    let audit = ["--set", "local.bus.audit_share=1.0", "--set", "local.stall_seconds=4"];
    let learner = cluster.learner(&[&audit[..], &HASTE].concat());
    let _workers = [cluster.start("actor", &["--name", "lonely"]), cluster.start("verifier", &[])];
    let ended = learner.end();
    let refusal = ended.stderr.lines().last().unwrap();
    assert!(
        !ended.status.success() && refusal.starts_with("error: stalled: no progress for 4 s at step 0: "),
        "{ended:#?}"
    );
    assert!(refusal.contains("(played by lonely; needs another actor)") && refusal.contains("1 actor "), "{ended:#?}");
}

#[test]
fn repeating_what_is_known_hides_no_stall() {
    let cluster = Cluster::new();
    let learner = cluster.start("learner", &["smoke", "--run-dir", "run", "--set", "local.stall_seconds=4"]);
    let url = cluster.server.url();
    let run = Cluster::run_of(&learner);
    let _verifier = cluster.start("verifier", &[]);
    let runtime = Runtime::new().unwrap();
    let parrot = runtime.block_on(join(url, Credentials::default(), &run, "parrot"));
    runtime.spawn(async move {
        let task = parrot.next_task().await.unwrap();
        let group = play(&parrot, &task.message.body).await;
        loop {
            parrot.publish_group(task.message.reply(group.clone())).await.unwrap();
        }
    });
    let ended = learner.end();
    assert!(
        !ended.status.success() && ended.stderr.contains("error: stalled: no progress for 4 s at step 0: "),
        "{ended:#?}"
    );
}

/// Makes a group that no verifier can judge.
const SPOIL: Forge = |mut group, _| {
    group.rollouts[0].tokens[0] = TokenId::MAX;
    vec![group]
};

/// The timeouts are too long to reissue a task: it is reissued because a verifier reports its group.
#[test]
fn a_task_whose_group_cannot_be_judged_is_played_again_at_once() {
    let cluster = Cluster::new();
    let waits = ["--set", "local.bus.ack_wait_seconds=600", "--set", "local.bus.reissue_seconds=600"];
    let learner = cluster.start("learner", &[&["smoke", "--run-dir", "run"], &waits[..]].concat());
    let run = Cluster::run_of(&learner);
    let workers = [cluster.start("verifier", &[]), cluster.start("actor", &[])];
    // If the spoiler were alone for five tries, the run would end.
    wait_until("an honest actor", || cluster.folder.last_step() >= 1);
    let spoiler = Forger::start(cluster.server.url(), Credentials::default(), &run, "spoiler", SPOIL);
    let ended = learner.end().success();
    assert!(spoiler.has_forged());
    assert!(ended.stderr.contains("group could not be scored; reissuing its task actor=\"spoiler\""), "{ended:#?}");
    cluster.folder.history().assert_steps_of(&reference(0).history);
    for worker in workers {
        worker.end().success();
    }
}

/// With audits the actor is also banned: its group could not be judged, while another actor's could.
#[test]
fn an_actor_whose_groups_cannot_be_judged_is_banned() {
    let cluster = Guarded::new();
    let steps = ["--set", "schedule.num_steps=100000", "--set", "exams.names=[]"];
    let learner = cluster.learner(&[&["smoke", "--set", "local.bus.audit_share=1e-9"], &steps[..]].concat());
    let run = Cluster::run_of(&learner);
    let _workers = ["verifier-0", "actor-0"].map(|name| cluster.start(name, &[]));
    wait_until("an honest actor", || cluster.folder.last_step() >= 1);
    let _forger = cluster.forger(&run, SPOIL);
    wait_until("a ban", || learner.said_so_far().contains(" is banned"));
    let step = cluster.folder.last_step();
    wait_until("steps after it", || cluster.folder.last_step() >= step + 3);
    learner.terminate();
    let ended = learner.end().success();
    let bans: Vec<&str> = ended.stderr.lines().filter(|line| line.contains(" is banned")).collect();
    assert!(bans.len() == 1 && bans[0].contains(FORGER), "{ended:#?}");
    assert!(bans[0].contains("it could not be scored, but another actor's could"), "{ended:#?}");
}

#[test]
fn a_task_of_which_no_group_can_be_judged_ends_the_run() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&[]);
    let run = Cluster::run_of(&learner);
    let _spoilers =
        ["one", "two"].map(|name| Forger::start(cluster.server.url(), Credentials::default(), &run, name, SPOIL));
    let _verifier = cluster.start("verifier", &[]);
    let ended = learner.end();
    let refusal = ended.stderr.lines().last().unwrap();
    assert!(!ended.status.success() && refusal.starts_with("error: task "), "{ended:#?}");
    assert!(
        refusal.contains(" of batch 0: ") && refusal.contains(" consecutive groups could not be scored"),
        "{ended:#?}"
    );
    assert!(refusal.ends_with(": expected tokens of the vocabulary"), "{ended:#?}");
}

/// Groups that no verifier can judge: a single one could end all verifiers, one after the other.
#[test]
fn what_cannot_be_judged_is_set_aside() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&[]);
    let run = Cluster::run_of(&learner);
    let verifier = cluster.start("verifier", &["--name", "judge"]);
    // With its verdicts the group is larger than a message may be.
    let plain = group("countdown", "2 1 -> 3", "", &vec![vec![2, 110, 1, 114, 3]; 8]);
    let mut large = played_on(plain.clone());
    let num_bytes = |group: &Group| wire::encode(group).len();
    large.task.family = "x".repeat((1 << 20) - 350 + num_bytes(&plain) - num_bytes(&large));
    // A choice that was none: the policy gradient would train on it.
    let mut forged = played_on(plain);
    let mut choices: Vec<_> = forged.rollouts[7].choices.iter().collect();
    choices.pop();
    forged.rollouts[7].choices = Choices::new(5, choices);
    forged.rollouts[7].logprobs.pop();
    let hostile: Vec<Group> = vec![
        group("countdown", &"no problem ".repeat(10_000), "", &[]),
        group("chess", "e4", "", &[]),
        // `smoke` asks for eight.
        group("countdown", "2 1 -> 3", "", &vec![vec![2, 110, 1, 114, 3]; 9]),
        group("countdown", "2 1 -> 3", "", &[vec![300; 5]]),
        large,
        forged,
    ];
    let num_hostile = hostile.len();
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let mallory = join(cluster.server.url(), Credentials::default(), &run, "mallory").await;
        for body in hostile {
            mallory.publish_group(Message { envelope: Envelope::default(), body }).await.unwrap();
        }
    });
    let set_aside = || {
        let said = verifier.said_so_far();
        said.lines().filter(|line| line.contains("group could not be scored; moved to the dead-letter stream")).count()
    };
    wait_until("all of it to be set aside", || set_aside() == num_hostile);
    let said = verifier.said_so_far();
    assert_eq!(said.matches("mallory").count(), num_hostile, "{said}");
    assert!(said.contains("rollout 7: expected a choice at token ") && said.contains("bytes"), "{said}");
    assert!(said.len() < 1_000 * num_hostile, "it does not quote all of it: {said}");
    runtime.block_on(async {
        let jetstream = async_nats::jetstream::new(async_nats::connect(cluster.server.url()).await.unwrap());
        let dead = jetstream.get_stream(format!("autodidact_{run}_dead")).await.unwrap();
        assert_eq!(dead.cached_info().state.messages, num_hostile as u64);
    });
    let _actor = cluster.start("actor", &[]);
    learner.end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    verifier.end().success();
}

fn group(domain: &str, text: &str, family: &str, answers: &[Vec<TokenId>]) -> Group {
    let problem = Problem { domain: domain.to_owned(), text: text.to_owned() };
    let rollouts = answers.iter().map(|answer| Rollout {
        tokens: answer.clone(),
        choices: Choices::new(answer.len(), []),
        logprobs: Vec::new(),
        values: None,
        search: None,
        stop: StopReason::Complete,
        versions: vec![VersionSpan { first_token: 0, policy_version: 0 }],
    });
    let task = Task {
        id: TaskId { kind: TaskKind::Train, batch: 0, index: 0 },
        seed: 0,
        weights: Digest::of_bytes(b""),
        policy_version: 0,
        free_running: false,
        request: Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: false },
        family: family.to_owned(),
        num_rollouts: answers.len() as u32,
        sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
        max_tokens: 5,
    };
    Group { task, sets: Vec::new(), rollouts: rollouts.collect() }
}
