//! `runs`: lists the runs on a NATS server and their learners, and removes runs without a learner.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Result, bail};
use bus::nats::{Leader, Server, StreamUse};
use serde::Serialize;

use crate::cluster::{Place, describe, identity, read};
use crate::report::{bytes, clock, print, table};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
    /// Remove the data of this run from the server; refused while the run has a learner.
    #[arg(long, value_name = "ID")]
    remove: Option<String>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// A run as a server stores it.
#[derive(Debug, Serialize)]
struct Run {
    id: String,
    /// The name of its config; absent if no learner of this build announced it.
    config: Option<String>,
    is_over: bool,
    /// Whether the run has a learner that is alive.
    lives: bool,
    /// Machine, process and run directory of its learner, or of the last one that did not leave cleanly.
    learner: Option<String>,
    /// For how long that learner has led the run.
    leads_for_seconds: Option<f64>,
    /// Time since the learner was last seen, or left.
    last_alive_seconds_ago: Option<f64>,
    step: Option<u64>,
    num_bytes: u64,
    num_messages: u64,
    streams: Vec<String>,
}

/// Maximum time to wait for a server. Short, because a person waits for the answer.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &Args) -> Result<()> {
    let servers = args.place.servers()?;
    let name = args.place.name_of_key()?.unwrap_or_else(|| "runs".to_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let server = args.place.connect(&name, PATIENCE).await?;
        let found = find(&server).await?;
        let Some(id) = &args.remove else { return print(&list(args.json, &found)?) };
        let Some((run, leader, streams)) = found.iter().find(|(run, ..)| run.id == *id) else {
            let ids: Vec<&str> = found.iter().map(|(run, ..)| run.id.as_str()).collect();
            let ids = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
            bail!("--remove: expected a run on {servers}, which has {ids}, got {id:?}");
        };
        let lives =
            |leader: &Leader| format!("--remove: expected a run without a learner, got {id}: {}", describe(leader));
        if let Some(leader) = leader.as_ref().filter(|leader| leader.lives) {
            bail!(lives(leader));
        }
        let remover = identity("autodidact runs --remove".as_ref())?;
        match server.remove(id, streams, &remover).await {
            // A learner took the run in the meantime.
            Err(error @ bus::Error::Taken { .. }) => match server.leader(id).await? {
                Some(leader) if leader.lives => bail!(lives(&leader)),
                _ => return Err(error.into()),
            },
            removed => removed?,
        }
        server.flush().await;
        print(&match args.json {
            true => serde_json::json!({ "removed": run }).to_string(),
            false => format!("removed run {id}: {} in {} streams", bytes(run.num_bytes), streams.len()),
        })
    })
}

type Found = (Run, Option<Leader>, Vec<StreamUse>);

/// Finds all runs: announced runs, and runs of which only streams are left, which are identified by their fingerprint.
async fn find(server: &Server) -> Result<Vec<Found>> {
    let announced: BTreeSet<String> = server.announced_runs().await?.into_iter().collect();
    let mut streams = BTreeMap::<String, Vec<StreamUse>>::new();
    for stream in server.stream_uses().await? {
        streams.entry(run_of(&stream.fingerprint, &announced).to_owned()).or_default().push(stream);
    }
    let ids: BTreeSet<String> = announced.into_iter().chain(streams.keys().cloned()).collect();
    let mut found = Vec::new();
    for id in ids {
        let (announced, leader) = (read(server, &id).await?, server.leader(&id).await?);
        let streams = streams.remove(&id).unwrap_or_default();
        // The run was removed or never started: the server keeps only its name.
        let has_learner = leader.as_ref().is_some_and(|leader| leader.name.is_some());
        if matches!(announced, Ok(None)) && !has_learner && streams.is_empty() {
            continue;
        }
        let announced = announced.ok().flatten();
        let config = announced.as_ref().map(|announced| announced.config_name.clone());
        let held = leader.as_ref().filter(|leader| leader.name.is_some());
        let run = Run {
            config: config.filter(|name| !name.is_empty()),
            is_over: announced.as_ref().is_some_and(|announced| announced.is_over),
            lives: leader.as_ref().is_some_and(|leader| leader.lives),
            learner: held.and_then(|leader| leader.name.clone()),
            leads_for_seconds: held.filter(|leader| leader.lives).map(|leader| leader.leads_for.as_secs_f64()),
            last_alive_seconds_ago: leader.as_ref().map(|leader| leader.silent_for.as_secs_f64()),
            step: leader
                .as_ref()
                .and_then(|leader| leader.step)
                .or(announced.and_then(|announced| announced.num_steps)),
            num_bytes: streams.iter().map(|stream| stream.num_bytes).sum(),
            num_messages: streams.iter().map(|stream| stream.num_messages).sum(),
            streams: streams.iter().map(|stream| stream.name.clone()).collect(),
            id,
        };
        found.push((run, leader, streams));
    }
    Ok(found)
}

/// Returns the run of a fingerprint, which is `RUN-DIGEST` or the digest alone; for an unknown run, the fingerprint itself.
fn run_of<'a>(fingerprint: &'a str, announced: &BTreeSet<String>) -> &'a str {
    let is_digest = |digest: &str| digest.len() == 12 && digest.chars().all(|digit| digit.is_ascii_hexdigit());
    match fingerprint.rsplit_once('-') {
        Some((run, digest)) if is_digest(digest) && announced.contains(run) => run,
        _ => fingerprint,
    }
}

fn list(json: bool, found: &[Found]) -> Result<String> {
    if json {
        let runs: Vec<&Run> = found.iter().map(|(run, ..)| run).collect();
        return Ok(serde_json::json!({ "runs": runs }).to_string());
    }
    if found.is_empty() {
        return Ok("no runs".to_owned());
    }
    let head = ["run", "config", "step", "size", "learner"].map(str::to_owned).to_vec();
    let rows = found.iter().map(|(run, leader, _)| {
        let learner = match (leader, run.is_over) {
            (Some(leader), _) if leader.lives => {
                let name = leader.name.as_deref().unwrap_or_default();
                format!("{name}, for {}", clock(leader.leads_for))
            }
            (_, true) => "none: the run is over".to_owned(),
            (Some(Leader { name: Some(name), silent_for, .. }), _) => {
                format!("none: {name} was last seen {} ago", clock(*silent_for))
            }
            (Some(Leader { name: None, silent_for, .. }), _) => {
                format!("none: the last one left {} ago", clock(*silent_for))
            }
            (None, _) => "none".to_owned(),
        };
        let step = run.step.map_or_else(|| "-".to_owned(), |step| step.to_string());
        let config = run.config.clone().unwrap_or_else(|| "-".to_owned());
        vec![run.id.clone(), config, step, bytes(run.num_bytes), learner]
    });
    Ok(table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_course_is_of_the_run_that_takes_it() {
        let announced = BTreeSet::from(["mine", "a-0123456789ab", "0123456789ab"].map(str::to_owned));
        for (fingerprint, run) in [
            ("mine-0123456789ab", "mine"),
            ("0123456789ab", "0123456789ab"),
            ("a-0123456789ab-0123456789ab", "a-0123456789ab"),
            ("a-0123456789ab", "a-0123456789ab"),
            ("mine-x", "mine-x"),
            ("other-0123456789ab", "other-0123456789ab"),
        ] {
            assert_eq!(run_of(fingerprint, &announced), run, "{fingerprint}");
        }
    }
}
