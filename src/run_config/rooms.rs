//! Whether a network has room for the problems of its run.

use anyhow::{Result, bail, ensure};
use domains::{Split, Wording, domain};
use language::Language;
use proto::{Behavior, KeyedProblem};

use crate::problems::{self, ProblemFile, exam_of};
use crate::room::positions;

/// Checks that a pretrained model can be asked for problems of every domain, if the run asks for any.
pub(super) fn validate_proposals(config: &learner::Config) -> Result<()> {
    let num_asked = config.self_play.as_ref().map_or(0, |own| own.propose_tasks);
    if config.language.is_none() || num_asked == 0 {
        return Ok(());
    }
    for entry in &config.domains {
        if domain(&entry.name)?.wording().and_then(Wording::proposing).is_none() {
            bail!("expected 0 with domain {}, whose problems no model can propose, got {num_asked}", entry.name);
        }
    }
    Ok(())
}

/// Checks on a few problems of every level that their answers fit in full, and that their niches can be proposed.
pub(super) fn validate_ladder(config: &learner::Config, language: &dyn Language) -> Result<()> {
    let proposes = config.self_play.as_ref().is_some_and(|own| own.propose_tasks > 0);
    let solves = config.actor.behavior == Behavior::Solver;
    let has_file = config.domains.iter().any(|entry| entry.name == problems::NAME);
    ensure!(
        !(solves && has_file),
        "actor.behavior: expected policy for the domain {}, which has no solver",
        problems::NAME
    );
    ensure!(!(solves && proposes), "actor.behavior: expected no solver with self_play.propose_tasks, got \"solver\"");
    for entry in config.domains.iter().filter(|entry| entry.name != problems::NAME) {
        let domain = domain(&entry.name)?;
        for level in entry.levels.iter().map(|entry| entry.level) {
            let name = format!("{} level {level}", entry.name);
            for index in 0..NUM_CHECKED_PROBLEMS {
                let KeyedProblem { problem, key } = domain.ladder(level, config.seed, index);
                ensure!(
                    !solves || language::solution(language, &problem)?.is_some(),
                    "actor.behavior: expected policy or uniform-legal for {name}, which has no solver in this language"
                );
                let room = language.room(&problem)?;
                let (needed, available) = (room.answer, config.actor.max_answer_tokens as usize);
                ensure!(needed <= available, "{name} needs actor.max_answer_tokens = {needed}, got {available}");
                let (needed, positions) = (room.prompt + available, config.model.max_positions);
                ensure!(needed <= positions, "{name} needs model.max_positions = {needed}, got {positions}");
                if !proposes {
                    continue;
                }
                let niche = domain.niche(&problem, key.as_ref())?;
                let room = language.proposal_room(&entry.name, niche)?;
                let (needed, available) = (room.prompt + room.answer, config.model.max_positions);
                ensure!(
                    needed <= available,
                    "{name} needs model.max_positions = {needed} for proposals, got {available}"
                );
            }
        }
    }
    Ok(())
}

const NUM_CHECKED_PROBLEMS: u64 = 8;

/// Checks that the exams exist, once each, and that the network has room for their problems.
pub(super) fn validate_exams(
    config: &learner::Config,
    file: Option<&ProblemFile>,
    language: &dyn Language,
    has_problems: impl Fn(&str) -> bool,
) -> Result<()> {
    for (index, name) in config.exams.names.iter().enumerate().filter(|(_, name)| has_problems(name)) {
        let problems = exam_of(config, file, name, Split::Dev)?;
        ensure!(!config.exams.names[..index].contains(name), "expected every exam once, got {name} twice");
        let lengths = problems.iter().map(|keyed| positions(language, &keyed.problem)).collect::<Result<Vec<_>>>()?;
        let longest = lengths.iter().map(|(prompt, _)| *prompt).max().unwrap_or(0);
        let answer = config.actor.max_answer_tokens as usize;
        let (needed, available) = (longest + answer, config.model.max_positions);
        ensure!(
            needed <= available,
            "{name} needs model.max_positions = {needed} (prompts of up to {longest} tokens, actor.max_answer_tokens = \
             {answer}), got {available}"
        );
        let needed = lengths.iter().map(|(_, answer)| *answer).max().unwrap_or(0);
        let available = config.actor.max_answer_tokens as usize;
        ensure!(needed <= available, "{name} needs actor.max_answer_tokens = {needed}, got {available}");
    }
    Ok(())
}
