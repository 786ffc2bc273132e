//! `eval`: scores on an exam or on a file of problems, with standard errors and baselines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, Result, ensure};
use domains::{File, Split, exams_of, trained_variant};
use language::Language;
use proto::KeyedProblem;
use serde_json::Value;

use crate::pairing::Pairing;
use crate::player::{Player, Scored, Scores};
use crate::problems::{self, Records, exam_problems};
use crate::report::{note, percent, print, table};
use crate::room::{expect_room, positions_needed};
use crate::subject::{self, Subject, run_at};
use crate::{baselines, run_config};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    subject: subject::Args,
    /// Exam from `autodidact domains`, or `all` for the exams of all domains that the run trains on.
    #[arg(long, conflicts_with = "problems", default_value = "all")]
    exam: String,
    /// File of problems, one JSON object per line or a Parquet file, or `-` for standard input; see docs/formats.md.
    #[arg(long, value_name = "FILE.jsonl")]
    problems: Option<PathBuf>,
    /// Sampled answers per problem, for pass@k.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    samples: u32,
    /// Sit the first N problems of each exam alone: a large model takes minutes for a hundred.
    #[arg(long, value_name = "N", conflicts_with = "problems", value_parser = clap::value_parser!(u32).range(1..))]
    num_problems: Option<u32>,
    /// Split of the exam.
    #[arg(long, conflicts_with = "problems", default_value = "test", value_parser = ["dev", "test"])]
    split: String,
    /// Another run or pretrained model to compare with, instead of the network before its training. A pretrained model is asked
    /// as the subject is.
    #[arg(long, value_name = "RUN|MODEL")]
    compare: Option<PathBuf>,
    /// Print one JSON object per exam instead of tables.
    #[arg(long)]
    json: bool,
    /// CPU threads; 0 uses all cores.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let subject = Subject::named(&args.subject)?;
    let (language, has, step) = (subject.language.clone(), subject.model.max_positions, subject.step);
    let language = language.as_ref();
    let split = if args.split == "dev" { Split::Dev } else { Split::Test };
    let mut sets: Vec<(String, Vec<KeyedProblem>)> = Vec::new();
    ensure!(
        subject.step.is_some() || args.problems.is_some() || args.exam != "all",
        "--exam: expected one exam for a pretrained model, such as countdown-3, since all of them take hours"
    );
    let config = run_at(&args.subject.subject).map(|run| run_config::of_run(&run, &args.subject.places.overrides()));
    let config = config.transpose()?;
    let trained_on =
        config.as_ref().map_or_else(|| known_domains(&subject), |config| config.domains().map(str::to_owned).collect());
    let sit = |name: &str| {
        let mut problems = match &config {
            Some(config) => config.exam(name, split),
            None => exam_problems(name, split, trained_on.iter().map(String::as_str)),
        }?;
        problems.truncate(args.num_problems.map_or(usize::MAX, |wanted| wanted as usize));
        Ok::<_, Error>(problems)
    };
    match &args.problems {
        Some(path) => sets.push(read_problems(path, &trained_on, language, has)?),
        None if args.exam == "all" => {
            let own = trained_on.iter().map(String::as_str).filter(|name| *name == problems::NAME);
            for exam in exams_of(trained_on.iter().map(String::as_str)).into_iter().map(|spec| spec.name).chain(own) {
                let (name, problems) = (format!("{exam} ({})", args.split), sit(exam)?);
                if positions_needed(language, &problems)? <= has {
                    sets.push((name, problems));
                } else {
                    note(format_args!("{name}: skipped, its problems need more than model.max_positions = {has}"));
                }
            }
            ensure!(
                !sets.is_empty(),
                "--exam all: expected exams of the run's domains, found none that fits the model; name an exam instead"
            );
        }
        None => sets.push((format!("{} ({})", args.exam, args.split), sit(&args.exam)?)),
    }
    let player = |subject: Subject| {
        let needed = sets.iter().map(|(_, problems)| positions_needed(subject.language.as_ref(), problems));
        let longest = needed.collect::<Result<Vec<_>>>()?.into_iter().max();
        let has = subject.model.max_positions;
        Player::new(subject, longest.map_or(has, |longest| longest.min(has)), usize::from(args.threads))
    };
    let reads_symbols = subject.reads_symbols();
    let before = if reads_symbols { "untrained network, same mask" } else { "pretrained model" };
    let (other, before) = match &args.compare {
        Some(path) => (Some(Subject::named(&args.subject.of(path, &subject))?), path.display().to_string()),
        None => (subject.untrained()?, before.to_owned()),
    };
    let untrained = other.map(player).transpose()?;
    let trained = player(subject)?;
    for (name, problems) in sets {
        if step.is_none() {
            note(format_args!("{name}: {} problems, {} answers to each", problems.len(), args.samples + 1));
        }
        let sat = Sat::sit(&trained, untrained.as_ref(), &problems, args.samples, reads_symbols)
            .with_context(|| name.clone())?;
        let report = Report { parts: by_part(&problems, &sat)?, step, sat, name, before: before.clone() };
        print(&if args.json { report.json().to_string() } else { report.text() })?;
    }
    Ok(())
}

/// Scores of the run and of the baselines on the same problems.
#[derive(Clone, Debug)]
struct Sat {
    trained: Scored,
    /// Those of the network before its training, if a run trained it, or of the one to compare with.
    untrained: Option<Scored>,
    /// Only of networks that read symbols.
    blind: Option<Blind>,
}

/// Scores of baselines that read no problem.
#[derive(Clone, Debug)]
struct Blind {
    random: Scores,
    /// Enumeration with one checker call, and with one call per sample.
    enumerated: (Scores, Scores),
}

impl Sat {
    fn sit(
        trained: &Player,
        untrained: Option<&Player>,
        problems: &[KeyedProblem],
        num_samples: u32,
        reads_symbols: bool,
    ) -> Result<Sat> {
        let blind = || {
            Ok::<_, Error>(Blind {
                random: baselines::uniform_legal(problems, num_samples)?,
                enumerated: (baselines::enumeration(problems, 1)?, baselines::enumeration(problems, num_samples)?),
            })
        };
        Ok(Sat {
            trained: trained.score(problems, num_samples)?,
            untrained: untrained.map(|player| player.score(problems, num_samples)).transpose()?,
            blind: reads_symbols.then(blind).transpose()?,
        })
    }

    fn at(&self, places: &[usize]) -> Sat {
        let both = |(left, right): &(Scores, Scores)| (left.at(places), right.at(places));
        Sat {
            trained: self.trained.at(places),
            untrained: self.untrained.as_ref().map(|scored| scored.at(places)),
            blind: self
                .blind
                .as_ref()
                .map(|Blind { random, enumerated }| Blind { random: random.at(places), enumerated: both(enumerated) }),
        }
    }

    /// Compares the greedy answers with those of the network before its training, or the one to compare with.
    fn pairing(&self) -> Option<Pairing> {
        self.untrained.as_ref().map(|untrained| Pairing::of(&self.trained.greedy, &untrained.greedy))
    }

    fn num_problems(&self) -> usize {
        self.trained.sampled.correct.len()
    }

    fn num_samples(&self) -> u32 {
        self.trained.sampled.num_samples
    }

    fn json(&self) -> serde_json::Value {
        let k = self.num_samples();
        let estimate = |(mean, error): (f64, f64)| serde_json::json!({"mean": mean, "standard_error": error});
        let network = |scored: &Scored| {
            serde_json::json!({
                "greedy_pass_at_1": estimate(scored.greedy.pass_at(1)),
                "sampled_pass_at_1": estimate(scored.sampled.pass_at(1)),
                "pass_at_k": estimate(scored.sampled.pass_at(k)),
                "majority_at_k": estimate(scored.majority()),
            })
        };
        let mut scores = serde_json::json!({
            "num_problems": self.num_problems(),
            "trained": network(&self.trained),
            "untrained": self.untrained.as_ref().map(network),
            "paired_greedy": self.pairing(),
        });
        if let Some(Blind { random, enumerated }) = &self.blind {
            let pair = |one, many| serde_json::json!({"pass_at_1": estimate(one), "pass_at_k": estimate(many)});
            scores["uniform_legal"] = pair(random.pass_at(1), random.pass_at(k));
            scores["enumeration"] = pair(enumerated.0.pass_at(1), enumerated.1.pass_at(1));
        }
        scores
    }
}

/// The results of one exam.
struct Report {
    name: String,
    /// The step of the run; `None` for a pretrained model.
    step: Option<u64>,
    /// What the network is compared with.
    before: String,
    sat: Sat,
    parts: Vec<Part>,
}

/// The results on the problems of one ladder level, either held out from training or not.
struct Part {
    domain: String,
    level: u32,
    description: &'static str,
    held_out: bool,
    sat: Sat,
}

/// Splits an exam by level and held-out status if its problems are of several kinds.
fn by_part(problems: &[KeyedProblem], sat: &Sat) -> Result<Vec<Part>> {
    let mut places = BTreeMap::<(&str, u32, bool), Vec<usize>>::new();
    for (place, KeyedProblem { problem, .. }) in problems.iter().enumerate() {
        let domain = domains::domain(&problem.domain)?;
        let level = domain.level_of(domain.niche(problem, None)?);
        let held_out = domain.exams().map_or(Ok(false), |exams| exams.is_held_out(problem))?;
        places.entry((&problem.domain, level, held_out)).or_default().push(place);
    }
    if places.len() == 1 {
        return Ok(Vec::new());
    }
    let part = |((name, level, held_out), places): ((&str, u32, bool), Vec<usize>)| {
        let levels = domains::domain(name)?.ladder_levels();
        let description = levels.iter().find(|known| known.level == level).map_or("of no level", |it| it.description);
        Ok(Part { domain: name.to_owned(), level, description, held_out, sat: sat.at(&places) })
    };
    places.into_iter().map(part).collect()
}

impl Report {
    fn text(&self) -> String {
        let Report { name, step, before, sat, parts } = self;
        let k = sat.num_samples();
        let cell = |(mean, error): (f64, f64)| format!("{} ± {:.1}", percent(mean), 100.0 * error);
        let network = |name: &str, scored: &Scored| {
            let Scored { greedy, sampled, .. } = scored;
            let scores = [greedy.pass_at(1), sampled.pass_at(1), sampled.pass_at(k), scored.majority()];
            let [greedy, sampled, best, majority] = scores.map(cell);
            [name.to_owned(), greedy, sampled, best, majority]
        };
        let alone = |name: &str, one: &Scores, many: (f64, f64)| {
            [name.to_owned(), "-".to_owned(), cell(one.pass_at(1)), cell(many), "-".to_owned()]
        };
        let head = ["", "pass@1 greedy", "pass@1 sampled", &format!("pass@{k}"), &format!("majority of {k}")];
        let mut rows = vec![head.map(str::to_owned)];
        rows.push(network(if step.is_some() { "trained" } else { "pretrained model" }, &sat.trained));
        rows.extend(sat.untrained.as_ref().map(|scores| network(before, scores)));
        if let Some(Blind { random, enumerated }) = &sat.blind {
            rows.push(alone("uniform random legal tokens", random, random.pass_at(k)));
            rows.push(alone("blind enumeration, k checker calls", &enumerated.0, enumerated.1.pass_at(1)));
        }
        let mut rows: Vec<_> = rows.into_iter().map(Vec::from).collect();
        rows.iter_mut().for_each(|row| row.truncate(if k > 1 { 5 } else { 3 }));
        let step = step.map_or(String::new(), |step| format!(", step {step}"));
        let mut text = format!("{name}, {} problems{step}\n{}", sat.num_problems(), table(&rows));
        if let Some(pairing) = sat.pairing() {
            let first = if self.step.is_some() { "trained" } else { "pretrained model" };
            text += &format!("{}\n", pairing.text(first, before));
        }
        if !parts.is_empty() {
            let best = format!("pass@{k}");
            let head = ["part", "problems", "greedy", &best, "untrained", "random", "enumeration"].map(str::to_owned);
            let blind = |sat: &Sat, score: fn(&Blind, u32) -> (f64, f64)| {
                sat.blind.as_ref().map_or("-".to_owned(), |blind| cell(score(blind, k)))
            };
            let row = |Part { description, held_out, sat, .. }: &Part| {
                let what = if *held_out { ", held out" } else { "" };
                vec![
                    format!("{description}{what}"),
                    sat.num_problems().to_string(),
                    cell(sat.trained.greedy.pass_at(1)),
                    cell(sat.trained.sampled.pass_at(k)),
                    sat.untrained.as_ref().map_or("-".to_owned(), |scored| cell(scored.sampled.pass_at(k))),
                    blind(sat, |blind, k| blind.random.pass_at(k)),
                    blind(sat, |blind, _| blind.enumerated.1.pass_at(1)),
                ]
            };
            let rows: Vec<_> = std::iter::once(head.to_vec()).chain(parts.iter().map(row)).collect();
            text += &format!("\n{}(untrained, random and enumeration: pass@{k})\n", table(&rows));
        }
        text
    }

    fn json(&self) -> serde_json::Value {
        let Report { name, step, before, sat, parts } = self;
        let part = |Part { domain, level, description, held_out, sat }: &Part| {
            serde_json::json!({
                "domain": domain,
                "level": level,
                "description": description,
                "held_out": held_out,
                "scores": sat.json(),
            })
        };
        serde_json::json!({
            "exam": name,
            "step": step,
            "k": sat.num_samples(),
            "compared_with": before,
            "scores": sat.json(),
            "parts": parts.iter().map(part).collect::<Vec<_>>(),
        })
    }
}

/// Returns the domains that a network without a run can be asked about.
fn known_domains(subject: &Subject) -> Vec<String> {
    let in_words = subject.step.is_none();
    let known = domains::registry().iter();
    let can_ask = known.filter(|domain| if in_words { domain.wording().is_some() } else { domain.symbols().is_some() });
    can_ask.map(|domain| domain.name().to_owned()).collect()
}

/// Reads a file of problems. Returns its name too. A problem without a domain uses the variant that the run trains on.
fn read_problems(
    path: &Path,
    trained_on: &[String],
    language: &dyn Language,
    max_positions: usize,
) -> Result<(String, Vec<KeyedProblem>)> {
    let columns: Vec<&str> = File::FIELDS.into_iter().chain(["domain"]).collect();
    let Records { name, place, records } = Records::read(path, &columns)?;
    let problem_of = |json: &Value| -> Result<KeyedProblem> {
        let mut keyed = domains::keyed_from_json(json)?;
        let problem = &mut keyed.problem;
        let variant = trained_variant(&problem.domain, trained_on.iter().map(String::as_str));
        if let Some(variant) = variant.filter(|_| json.get("domain").is_none()) {
            problem.domain = variant.to_owned();
        }
        expect_room(language, problem, max_positions)?;
        Ok(keyed)
    };
    let problems =
        records.iter().map(|(number, json)| problem_of(json).with_context(|| format!("{name}, {place} {number}")));
    let problems = problems.collect::<Result<_>>()?;
    Ok((name, problems))
}
