//! `generate` writes problems; `domains` lists domains, levels and exams.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use domains::{Domain, Exam, ExamSpec, File, domain, exam, exam_specs, registry};
use proto::{Digest, LadderLevel, Problem};
use serde::Serialize;

use crate::files::write_whole;
use crate::problems::{self, ProblemFile};
use crate::report::print;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Domain from `autodidact domains`.
    #[arg(long, required_unless_present = "exam")]
    domain: Option<String>,
    /// Level of the domain's ladder.
    #[arg(long, default_value_t = 1)]
    level: u32,
    /// File of problems, if the domain is `file`.
    #[arg(long, value_name = "FILE", conflicts_with = "exam")]
    path: Option<PathBuf>,
    /// Number of problems.
    #[arg(long, default_value_t = 10)]
    count: u64,
    /// Seed of the ladder.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Rebuild this exam and compare it with the committed one.
    #[arg(long, conflicts_with_all = ["domain", "level", "count", "seed"])]
    exam: Option<String>,
    /// Output file for the rebuilt exam, such as `programs-induction.jsonl.zst`; its keys, if any, go next to it.
    #[arg(long, conflicts_with = "domain", value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(name) = &args.exam {
        return rebuild_exam(name, args.out.as_ref());
    }
    let domain = named(args)?;
    let levels = domain.ladder_levels();
    let known = || levels.iter().map(|level| level.level.to_string()).collect::<Vec<_>>().join(", ");
    levels
        .iter()
        .find(|level| level.level == args.level)
        .with_context(|| format!("level: expected one of {} for {}, got {}", known(), domain.name(), args.level))?;
    for index in 0..args.count {
        print(&domain.keyed_to_json(&domain.ladder(args.level, args.seed, index))?.to_string())?;
    }
    Ok(())
}

/// Returns the domain that is named, with its file.
fn named(args: &Args) -> Result<Arc<dyn Domain>> {
    let domain = domain(args.domain.as_deref().unwrap_or_default())?.clone();
    match (&args.path, domain.name() == problems::NAME) {
        (Some(path), true) => {
            let file = ProblemFile::open(path)?;
            ensure!(file.problems.train().len() > 0, "{}: {}", path.display(), problems::NOTHING_TO_TRAIN_ON);
            Ok(Arc::new(File::of(file.problems)))
        }
        (None, true) => bail!("--path: expected the file whose problems are generated, got none"),
        (Some(path), false) => {
            bail!("--path: expected none for {}, which draws its problems, got {}", domain.name(), path.display())
        }
        (None, false) => Ok(domain),
    }
}

fn rebuild_exam(name: &str, out: Option<&PathBuf>) -> Result<()> {
    let committed = exam(name)?;
    let spec = exam_specs().into_iter().find(|spec| spec.name == name).context("every exam has a spec")?;
    let rebuilt = Exam::generate(spec)?;
    if let Some(path) = out {
        write_whole(path, &rebuilt.to_file()?)?;
        let keys = domain(spec.domain)?.exams().and_then(|exams| exams.keys_file(spec, &rebuilt));
        if let Some(keys) = keys {
            let text = path.display().to_string();
            let path = PathBuf::from(format!("{}.keys.zst", text.strip_suffix(".jsonl.zst").unwrap_or(&text)));
            write_whole(&path, &keys)?;
            print(&format!("keys: {}\n", path.display()))?;
        }
    }
    let (got, expected) = (rebuilt.digest(), committed.digest());
    ensure!(rebuilt == *committed, "{name}: expected the committed exam with digest {expected}, got digest {got}");
    let (num_dev, num_test) = (rebuilt.dev.len(), rebuilt.test.len());
    print(&format!("{name}: {num_dev} dev and {num_test} test problems, digest {got}: matches the committed exam\n"))
}

#[derive(clap::Args)]
pub(crate) struct DomainsArgs {
    /// Print one JSON object per domain instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct DomainLine<'a> {
    domain: &'a str,
    description: &'a str,
    levels: &'static [LadderLevel],
    exams: Vec<ExamLine<'a>>,
}

#[derive(Serialize)]
struct ExamLine<'a> {
    exam: &'a str,
    num_dev: usize,
    num_test: usize,
    /// Levels of the exam's problems.
    levels: BTreeSet<u32>,
    digest: Digest,
}

pub(crate) fn print_domains(args: &DomainsArgs) -> Result<()> {
    for domain in registry() {
        let exam = |spec: &'static ExamSpec| {
            let exam = exam(spec.name)?;
            let level = |problem: &Problem| Ok(domain.level_of(domain.niche(problem, None)?));
            Ok(ExamLine {
                exam: spec.name,
                num_dev: exam.dev.len(),
                num_test: exam.test.len(),
                levels: exam.dev.iter().map(level).collect::<Result<_>>()?,
                digest: exam.digest(),
            })
        };
        let line = DomainLine {
            domain: domain.name(),
            description: domain.description(),
            levels: domain.ladder_levels(),
            exams: domain.exams().map_or(&[][..], |exams| exams.specs()).iter().map(exam).collect::<Result<_>>()?,
        };
        print(&if args.json { serde_json::to_string(&line)? } else { line.text() })?;
    }
    Ok(())
}

impl DomainLine<'_> {
    fn text(&self) -> String {
        let mut text = format!("{}: {}\n", self.domain, self.description);
        for LadderLevel { level, description } in self.levels {
            text += &format!("  level {level}  {description}\n");
        }
        for ExamLine { exam, num_dev, num_test, levels, digest } in &self.exams {
            let word = if levels.len() == 1 { "level" } else { "levels" };
            let levels = levels.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            text +=
                &format!("  exam {exam}  {num_dev} dev, {num_test} test, {word} {levels}, digest {}\n", digest.short());
        }
        text
    }
}
