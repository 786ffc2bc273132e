//! `inspect`: shows the content of a run's journal, also while the run is in progress.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};
use domains::domain;
use language::Language;
use learner::{
    BanRecord, Control, Damage, EvalRecord, GroupRecord, Known, Manifest, Opening, Record, RecordError, StepRecord,
};
use proto::{Digest, LabelOrigin, ProblemOrigin, Request, StopReason, Task, TokenId, Verdict, VersionSpan};
use serde::Serialize;

use crate::report::{bytes, clock, folder_bytes, percent, print, table, word};
use crate::{language, run_config};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run directory.
    run: PathBuf,
    /// List the groups that step N folded.
    #[arg(long, value_name = "N", conflicts_with = "group")]
    step: Option<u64>,
    /// Show one group: its task, its answers with verdicts, and the training examples made from it.
    #[arg(long, value_name = "BATCH/INDEX")]
    group: Option<GroupId>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Batch and index of a group. Step n folds batch n - 1.
#[derive(Clone, Copy, Debug)]
struct GroupId {
    batch: u64,
    index: u32,
}

impl FromStr for GroupId {
    type Err = String;

    fn from_str(text: &str) -> Result<GroupId, String> {
        let parsed = text.split_once('/').and_then(|(batch, index)| Some((batch.parse().ok()?, index.parse().ok()?)));
        let (batch, index) = parsed.ok_or_else(|| format!("expected BATCH/INDEX, such as 20/3, got {text:?}"))?;
        Ok(GroupId { batch, index })
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match (args.step, args.group) {
        (Some(step), _) => show(&Step::read(&args.run, step)?, Step::text, args.json),
        (None, Some(id)) => show(&Group::read(&args.run, id)?, Group::text, args.json),
        (None, None) => show(&Summary::read(&args.run)?, Summary::text, args.json),
    }
}

fn show<T: Serialize>(found: &T, text: fn(&T) -> String, json: bool) -> Result<()> {
    if json { print(&serde_json::to_string(found)?) } else { print(&text(found)) }
}

/// Visits every record that can be read, in order; returns those that cannot.
pub(crate) fn read_journal(run: &Path, visit: impl FnMut(Record)) -> Result<Vec<RecordError>> {
    let journal = run.join("journal");
    if !journal.is_dir() {
        bail!("{}: expected a run directory with a journal, found none", run.display());
    }
    let Damage { tail, mut unreadable } = learner::read_journal(&journal, visit)?;
    unreadable.extend(tail);
    Ok(unreadable)
}

/// The run as a whole.
#[derive(Debug, Default, Serialize)]
struct Summary {
    manifest: Option<Manifest>,
    num_groups: u64,
    num_rollouts: u64,
    is_free_running: bool,
    /// The last step; absent before the first.
    last_step: Option<LastStep>,
    evals: Vec<EvalRecord>,
    /// The end of the run, if the clock fixed it.
    control: Option<Control>,
    /// How often an actor's result contradicted that of a task already done.
    num_disputes: u64,
    bans: Vec<BanRecord>,
    size_bytes: u64,
    unreadable: Vec<RecordError>,
    /// How many steps were dropped from the journal.
    num_gone_steps: u64,
}

#[derive(Debug, Serialize)]
struct LastStep {
    step: u64,
    weights_digest: Digest,
    state_digest: Digest,
    elapsed_s: f64,
}

impl Summary {
    fn read(run: &Path) -> Result<Summary> {
        let mut summary = Summary::default();
        let unreadable = read_journal(run, |record| match record {
            Record::Manifest(manifest) => summary.manifest = Some(manifest),
            // An opening summarises the records before it. Skip it if those are still there.
            Record::Opening(_) if summary.manifest.is_some() || summary.num_groups > 0 => {}
            Record::Opening(opening) => {
                let Opening { manifest, known } = *opening;
                let Known { step, control, evals, bans, num_disputes, .. } = known;
                summary = Summary {
                    manifest: Some(manifest),
                    num_gone_steps: step,
                    control,
                    evals,
                    bans,
                    num_disputes,
                    ..Summary::default()
                };
            }
            Record::Group(GroupRecord { scored, .. }) => {
                summary.num_groups += 1;
                summary.num_rollouts += scored.group.rollouts.len() as u64;
                summary.is_free_running |= scored.group.task.free_running;
            }
            Record::Eval(eval) => summary.evals.push(eval),
            Record::Step(StepRecord { step, weights_digest, state_digest, elapsed_ms, .. }) => {
                let elapsed_s = elapsed_ms as f64 / 1e3;
                summary.last_step = Some(LastStep { step, weights_digest, state_digest, elapsed_s });
            }
            Record::Control(control) => summary.control = Some(control),
            Record::Ban(ban) => summary.bans.push(ban),
            Record::Dispute(_) => summary.num_disputes += 1,
        })?;
        summary.size_bytes = folder_bytes(&run.join("journal"));
        summary.unreadable = unreadable;
        Ok(summary)
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| text += &format!("{name:<13} {value}\n");
        match &self.manifest {
            None => line("manifest", "not written yet".to_owned()),
            Some(manifest) => {
                let numerics = &manifest.numerics;
                line("config", manifest.config.to_string());
                line("build", manifest.build.0.clone());
                line("arithmetic", format!("{} {} {}", numerics.kernels, word(&numerics.device), numerics.dtype));
                let reproducible = match (manifest.reproducible, self.is_free_running) {
                    (true, false) => "yes",
                    (true, true) => "from its journal",
                    (false, _) => "no",
                };
                line("reproducible", reproducible.to_owned());
            }
        }
        match &self.last_step {
            None => line("steps", "none yet".to_owned()),
            Some(last) => {
                let elapsed = clock(std::time::Duration::from_secs_f64(last.elapsed_s));
                line("steps", format!("{} in {elapsed}", last.step));
                line("weights", last.weights_digest.to_string());
                line("state", last.state_digest.to_string());
            }
        }
        line("groups", format!("{} with {} answers", self.num_groups, self.num_rollouts));
        if self.num_gone_steps > 0 {
            let step = self.num_gone_steps;
            line("removed", format!("steps 1 to {step} and their groups, which every kept checkpoint includes"));
        }
        for EvalRecord { step, exam, num_correct, num_problems } in &self.evals {
            let share = percent(*num_correct as f64 / *num_problems as f64);
            line("exam", format!("{exam} at step {step}: {share} of {num_problems} dev problems"));
        }
        if let Some(Control { decay_from, stop_at }) = self.control {
            line(
                "time limit",
                format!("the learning rate decays from step {decay_from}, the run ends at step {stop_at}"),
            );
        }
        if self.num_disputes > 0 {
            line(
                "disputes",
                format!("{}: another actor returned a different group for a completed task", self.num_disputes),
            );
        }
        for BanRecord { player, tasks } in &self.bans {
            line("banned", format!("{player}; its groups of {} tasks were withdrawn", tasks.len()));
        }
        line("journal", bytes(self.size_bytes));
        text + &unreadable_lines(&self.unreadable)
    }
}

/// Describes the unreadable places of a journal.
fn unreadable_lines(unreadable: &[RecordError]) -> String {
    let line = |RecordError { segment, offset, truncated, foreign }: &RecordError| {
        let what = match (truncated, foreign) {
            (true, _) => "ends inside a record",
            (_, true) => "has a record in another build's format",
            _ => "has a damaged record",
        };
        format!("{:<13} {} {what} at byte {offset}\n", "unreadable", segment.display())
    };
    unreadable.iter().map(line).collect()
}

/// Returns the end of a not-found message: what is missing may be in the unreadable records.
fn unreadable_hint(unreadable: &[RecordError]) -> String {
    match unreadable.len() {
        0 => String::new(),
        count => format!(" ({count} of its records cannot be read)"),
    }
}

/// The groups that a step folded, and its result.
#[derive(Debug, Serialize)]
struct Step {
    step: u64,
    weights_digest: Digest,
    state_digest: Digest,
    /// In folding order; unreadable groups are absent.
    groups: Vec<GroupLine>,
    unreadable: Vec<RecordError>,
}

#[derive(Debug, Serialize)]
struct GroupLine {
    batch: u64,
    index: u32,
    digest: Digest,
    /// The problem, or a description of the problem to propose.
    asked: String,
    /// Absent if the task was to propose a problem.
    origin: Option<ProblemOrigin>,
    family: String,
    num_correct: usize,
    num_rollouts: usize,
}

impl Step {
    fn read(run: &Path, number: u64) -> Result<Step> {
        let (mut gone, mut last, mut found) = (None, 0, None);
        let unreadable = read_journal(run, |record| {
            gone.get_or_insert(if let Record::Opening(opening) = &record { opening.known.step } else { 0 });
            if let Record::Step(step) = record {
                last = step.step;
                // Take the newest: a run that is not reproducible plays steps again when it resumes.
                found = (step.step == number).then_some(step).or(found.take());
            }
        })?;
        let StepRecord { step, weights_digest, state_digest, groups: digests, .. } = found.with_context(|| {
            let hint = unreadable_hint(&unreadable);
            let steps = match gone {
                Some(gone) if gone > 0 => format!("steps {} to {last}", gone + 1),
                _ => format!("{last} steps"),
            };
            format!("--step: expected one of the {steps} in the journal{hint}, got {number}")
        })?;
        // A group may come after its step: an unreadable group was played again.
        let wanted: BTreeSet<Digest> = digests.iter().copied().collect();
        let mut groups = BTreeMap::new();
        read_journal(run, |record| {
            if let Record::Group(group) = record
                && wanted.contains(&group.name())
            {
                groups.insert(group.name(), group);
            }
        })?;
        let groups = digests.iter().filter_map(|digest| groups.get(digest));
        let groups = groups.map(GroupLine::new).collect::<Result<_>>()?;
        Ok(Step { step, weights_digest, state_digest, groups, unreadable })
    }

    fn text(&self) -> String {
        let mut rows = vec![["task", "group", "family", "origin", "correct", "digest"].map(str::to_owned).to_vec()];
        rows.extend(self.groups.iter().map(|group| {
            vec![
                group.asked.clone(),
                format!("{}/{}", group.batch, group.index),
                group.family.clone(),
                group.origin.map_or("-".to_owned(), |origin| word(&origin)),
                format!("{} of {}", group.num_correct, group.num_rollouts),
                group.digest.short(),
            ]
        }));
        format!(
            "step {}\nweights {}\nstate   {}\n\n{}{}",
            self.step,
            self.weights_digest,
            self.state_digest,
            table(&rows),
            unreadable_lines(&self.unreadable)
        )
    }
}

impl GroupLine {
    fn new(group: &GroupRecord) -> Result<GroupLine> {
        let scored = &group.scored;
        let task = &scored.group.task;
        let origin = match &task.request {
            Request::Solve { origin, .. } => Some(*origin),
            Request::Propose { .. } => None,
        };
        Ok(GroupLine {
            batch: task.id.batch,
            index: task.id.index,
            digest: group.name(),
            asked: asked(&task.request)?,
            origin,
            family: task.family.clone(),
            num_correct: scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count(),
            num_rollouts: scored.verdicts.len(),
        })
    }
}

/// One group in full.
#[derive(Debug, Serialize)]
struct Group {
    task: Task,
    /// The step that folded the group; absent if none has yet.
    step: Option<u64>,
    /// The actor; absent if actors have no names.
    played_by: Option<String>,
    asked: String,
    /// The prompt that the network read, in words of the vocabulary.
    prompt: String,
    answers: Vec<Answer>,
    examples: Vec<ExampleLine>,
}

#[derive(Debug, Serialize)]
struct Answer {
    text: String,
    verdict: Verdict,
    /// Why a proposal was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// The weights that sampled the tokens, each with the index of its first token.
    versions: Vec<VersionSpan>,
    /// Log-probability of the whole answer under the behaviour policy.
    logprob: f64,
    /// Tokens that were chosen rather than forced.
    num_choices: usize,
    /// Whether the answer reached the token limit.
    cut_short: bool,
}

#[derive(Debug, Serialize)]
struct ExampleLine {
    prompt: String,
    answer: String,
    problem_origin: ProblemOrigin,
    label_origin: LabelOrigin,
    /// Tokens that carry loss.
    num_choices: usize,
}

impl Group {
    fn read(run: &Path, id: GroupId) -> Result<Group> {
        let GroupId { batch, index } = id;
        let (mut found, mut indices) = (None, BTreeSet::new());
        let mut steps = BTreeMap::new();
        let unreadable = read_journal(run, |record| match record {
            Record::Group(group) if group.scored.group.task.id.batch == batch => {
                let task = group.scored.group.task.id;
                indices.insert(task.index);
                // Take the last: an earlier one may have arrived too late.
                found = (task.index == index).then_some(group).or(found.take());
            }
            Record::Step(step) => steps.extend(step.groups.into_iter().map(|digest| (digest, step.step))),
            _ => {}
        })?;
        let found = found.with_context(|| {
            format!(
                "--group: expected a group in the journal, which has {} of batch {batch}{}, got {batch}/{index}",
                indices.len(),
                unreadable_hint(&unreadable)
            )
        })?;
        let step = steps.get(&found.name()).copied();
        let has_config = run.join("config.toml").exists();
        let language = if has_config { run_config::of_run(run, &[])?.language() } else { language() };
        Group::new(found, step, language.as_ref())
    }

    fn new(
        GroupRecord { played_by, scored, .. }: GroupRecord,
        step: Option<u64>,
        language: &dyn Language,
    ) -> Result<Group> {
        let task = scored.group.task;
        let name = task.request.domain();
        let words = |tokens: &[TokenId]| language.show_tokens(tokens);
        let rollouts = scored.group.rollouts.iter().zip(&scored.verdicts).enumerate();
        let answers = rollouts.map(|(number, (rollout, verdict))| {
            let proposal = scored.proposals.iter().find(|proposal| proposal.rollout as usize == number);
            let (text, reason) = match (&task.request, proposal) {
                (Request::Solve { .. }, _) => (language.show(name, &rollout.tokens), None),
                (Request::Propose { .. }, Some(proposal)) => (proposal.keyed.problem.text.clone(), None),
                (Request::Propose { niche, .. }, None) => match language.text(&task.request, &rollout.tokens)? {
                    // Admission depends on the text alone.
                    Some(text) => {
                        let reason = domain(name)?.admit(*niche, &text)?.err().and_then(|refused| refused.reason);
                        (text, reason)
                    }
                    None => (language.show(name, &rollout.tokens), Some("is not complete".to_owned())),
                },
            };
            Ok(Answer {
                text,
                reason,
                verdict: *verdict,
                versions: rollout.versions.clone(),
                logprob: rollout.logprobs.iter().map(|logprob| f64::from(*logprob)).sum(),
                num_choices: rollout.choices.len(),
                cut_short: rollout.stop == StopReason::Length,
            })
        });
        let answers: Vec<Answer> = answers.collect::<Result<_>>()?;
        let examples = scored.examples.iter().map(|example| ExampleLine {
            prompt: words(&example.prompt),
            answer: language.show(name, &example.answer),
            problem_origin: example.problem_origin,
            label_origin: example.label_origin,
            num_choices: example.choices.len(),
        });
        Ok(Group {
            step,
            asked: asked(&task.request)?,
            prompt: words(&scored.prompt),
            answers,
            examples: examples.collect(),
            played_by: Some(played_by).filter(|player| !player.is_empty()),
            task,
        })
    }

    fn text(&self) -> String {
        let task = &self.task;
        let mut answers = vec![["answer", "verdict", "logprob", "choices"].map(str::to_owned).to_vec()];
        answers.extend(self.answers.iter().map(|answer| {
            let cut = if answer.cut_short { " ... (token limit)" } else { "" };
            let reason = answer.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
            vec![
                format!("{}{cut}", answer.text),
                format!("{}{reason}", word(&answer.verdict)),
                format!("{:.3}", answer.logprob),
                answer.num_choices.to_string(),
            ]
        }));
        let drawn_by = || self.answers.iter().flat_map(|answer| &answer.versions).map(|span| span.policy_version);
        let versions = match (drawn_by().min(), drawn_by().max()) {
            (Some(oldest), Some(newest)) if task.free_running && oldest < newest => {
                format!("versions {oldest} to {newest}")
            }
            (Some(version), _) if task.free_running => format!("version {version}"),
            _ => format!("version {} (weights {})", task.policy_version, task.weights.short()),
        };
        let folded = self.step.map_or("not folded".to_owned(), |step| format!("folded in step {step}"));
        let mut text = format!(
            "group {}/{}, {folded}: {}\nprompt: {}\n{} answers by policy {versions}, {} at temperature {}{}\n\n{}",
            task.id.batch,
            task.id.index,
            self.asked,
            self.prompt,
            self.answers.len(),
            word(&task.sampling.behavior),
            task.sampling.temperature,
            self.played_by.as_ref().map_or(String::new(), |player| format!(", generated by {player}")),
            table(&answers),
        );
        let mut examples = vec![["example", "prompt", "label", "problem", "choices"].map(str::to_owned).to_vec()];
        examples.extend(self.examples.iter().map(|example| {
            vec![
                example.answer.clone(),
                example.prompt.clone(),
                word(&example.label_origin),
                word(&example.problem_origin),
                example.num_choices.to_string(),
            ]
        }));
        text += &match self.examples.len() {
            0 => "\nno training examples were made from this group\n".to_owned(),
            _ => format!("\n{}", table(&examples)),
        };
        text
    }
}

/// Describes what a task asks for.
fn asked(request: &Request) -> Result<String> {
    Ok(match request {
        Request::Solve { problem, .. } => problem.text.clone(),
        Request::Propose { domain: name, niche, difficulty } => {
            format!("a problem: {}, {}", domain(name)?.describe_niche(*niche), word(difficulty))
        }
    })
}
